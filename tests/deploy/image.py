"""What a process finds in an image, made on this machine: the files that the Dockerfile copies, the programs and packages of
the image's list and no others. Building the image itself needs Docker."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from deployment import DEPLOY, PROJECT, stages
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LISTS = {
    "serving": ("serving.txt", "s3.txt"),
    "streaming": ("streaming.txt", "s3.txt"),
    "webserver": ("webserver.txt",),
    "mlflow": ("mlflow.txt", "s3.txt"),
}
"""The lists of requirements that an image installs."""
FOLDER = "/app"
SHELL = ("sh", "env")
"""What of the system an image's commands use."""

ONLY = """
import importlib.metadata, json, sys

class Only:
    '''Refuses what only distributions outside of the image bring.'''
    def __init__(self, kept):
        brought = importlib.metadata.packages_distributions()
        self.refused = {top for top, by in brought.items() if not kept & {name.lower().replace("_", "-") for name in by}}
        self.refused -= {"recsys_core", "serving", "streaming", "recsys_cli", "_distutils_hack"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.refused:
            raise ModuleNotFoundError(f"{name} is not in the image", name=name)

sys.meta_path.insert(0, Only(set(json.loads(sys.argv.pop(1)))))
"""
PYTHON = (
    ONLY
    + """
import os, runpy

sys.argv.pop(0)
sys.path[0] = os.getcwd()
if sys.argv[0] == "-m":
    sys.argv.pop(0)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
elif sys.argv[0] == "-c":
    exec(sys.argv.pop(1))
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
)


def named(file: str) -> list[Requirement]:
    """The requirements that a file below deploy/requirements/ names."""
    lines = (DEPLOY / "requirements" / file).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def closure(*files: str) -> set[str]:
    """All packages that the requirements of some files bring, by what the installed ones say they need."""
    found: set[str] = set()
    todo = [wanted for file in files for wanted in named(file)]
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        extras = ["", *wanted.extras]
        if name in found and not wanted.extras:
            continue
        found.add(name)
        for line in metadata.requires(name) or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(needed)
    return found


class Image:
    """The inside of an image of the Dockerfile.

    Attributes:
        folder: where its processes start.
        programs: the folder of its programs.
    """

    def __init__(self, target: str, into: Path) -> None:
        self.folder = into / target
        self.folder.mkdir(parents=True)
        self.programs = into / f"{target}-bin"
        self.programs.mkdir()
        self._own: dict[str, str] = {}
        self.command: list[str] = []
        for name, rest in stages()[target]:
            if name == "COPY" and not rest.startswith("--from"):
                self._copy(*rest.split())
            elif name == "ENV":
                self._own |= dict(word.split("=", 1) for word in shlex.split(rest))
            elif name == "CMD":
                self.command = json.loads(rest)
        packages = closure(*LISTS[target])
        self._put("python", [sys.executable, "-c", PYTHON, json.dumps(sorted(packages))])
        for package in packages:
            for script in metadata.distribution(package).entry_points.select(group="console_scripts"):
                code = f"import sys; from {script.module} import {script.attr.split('.')[0]}; sys.exit({script.attr}())"
                self._put(script.name, [str(self.programs / "python"), "-c", code])
        for program in SHELL:
            (self.programs / program).symlink_to(shutil.which(program) or program)

    def _copy(self, *words: str) -> None:
        *sources, target = words
        for source in sources:
            to = self.folder / (Path(source).name if target == "./" else target)
            if (PROJECT / source).is_dir():
                shutil.copytree(PROJECT / source, to, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(PROJECT / source, to)

    def _put(self, name: str, command: Sequence[str]) -> None:
        program = self.programs / name
        program.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        program.chmod(0o755)

    def environment(self, more: Mapping[str, str]) -> dict[str, str]:
        """The variables of a process in it: those of the Dockerfile and `more`."""
        own = {name: re.sub(rf"(?<![\w/]){FOLDER}\b", str(self.folder), value) for name, value in self._own.items()}
        system = {name: os.environ[name] for name in ("JAVA_HOME", "TMPDIR") if name in os.environ}
        return {**system, **own, "PATH": str(self.programs), "HOME": str(self.folder), **more}
