"""The lock and the script that makes the environment."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

from recsys_cli import environment


def test_every_line_of_the_lock_is_a_plain_pin() -> None:
    lines = [line.partition("; ")[0] for line in environment.LOCK.read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+", line)] == []


def test_the_lock_pins_every_dependency_of_the_project() -> None:
    project = tomllib.loads(environment.PROJECT.read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    pins = {_normal(line.split("==")[0]) for line in environment.LOCK.read_text().splitlines() if "==" in line}
    assert {_normal(re.split(r"[^A-Za-z0-9._-]", name)[0]) for name in wanted} - pins == set()


def test_the_script_needs_nothing_installed() -> None:
    program = f"import runpy; runpy.run_path({environment.__file__!r}, run_name='loaded')"
    subprocess.run([sys.executable, "-I", "-S", "-c", program], check=True)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_only_packages_without_a_build_for_every_platform_have_a_marker() -> None:
    marked = dict(line.split("; ", 1) for line in environment.LOCK.read_text().splitlines() if "; " in line and line[0] != "#")
    assert {pin.split("==")[0]: marker for pin, marker in marked.items()} == environment.MARKERS
