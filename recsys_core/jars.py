"""Jar files that are fetched once, by the Apache Ivy that PySpark brings, from wherever Ivy is set up to look.

Ivy verifies them by their checksums. They are kept in the user's cache folder.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from recsys_core.errors import UserError

CACHE_VARIABLE = "RECSYS_JARS"
FETCH_SECONDS = 600
DONE = "complete"


class JarsUnavailable(UserError, RuntimeError):
    """Jar files can't be had; the message says which and why."""


@dataclass(frozen=True)
class Module:
    """A module of a Maven repository, with all that it needs or alone."""

    group: str
    name: str
    version: str
    alone: bool = False

    def __str__(self) -> str:
        return f"{self.group}:{self.name}:{self.version}"


def cache_folder() -> Path:
    """Where fetched jar files are kept: RECSYS_JARS, else the user's cache folder."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    if sys.platform == "darwin" and not base:
        return Path.home() / "Library" / "Caches" / "recsys"
    return (Path(base) if base else Path.home() / ".cache") / "recsys"


def folder_of(*modules: Module) -> Path:
    """Where the jar files of some modules are kept; it is named by the first."""
    return cache_folder() / f"{modules[0].name}-{modules[0].version}"


def fetch_jars(java_home: Path, *modules: Module) -> Path:
    """The folder of some modules' jar files, fetched at the first use. Raises JarsUnavailable."""
    folder = folder_of(*modules)
    if (folder / DONE).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    fetched = Path(tempfile.mkdtemp(dir=folder.parent, prefix="fetching-"))
    try:
        for module in modules:
            _fetch(java_home, module, fetched)
        (fetched / DONE).touch()
        if not folder.exists():
            os.replace(fetched, folder)
    finally:
        shutil.rmtree(fetched, ignore_errors=True)
    return folder


def _fetch(java_home: Path, module: Module, folder: Path) -> None:
    """Resolve a module and copy the jar files into `folder`."""
    command = [str(java_home / "bin" / "java"), "-jar", str(_ivy()), "-cache", str(cache_folder() / "ivy")]
    command += ["-dependency", module.group, module.name, module.version]
    command += ["-confs", "default", "-types", "jar", "bundle", *(["-notransitive"] if module.alone else [])]
    command += ["-retrieve", f"{folder}/[artifact]-[revision].[ext]"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=FETCH_SECONDS, cwd=folder
        )
    except subprocess.TimeoutExpired:
        raise JarsUnavailable(f"fetching {module} took longer than {FETCH_SECONDS} s") from None
    if done.returncode or not list(folder.glob(f"{module.name}-{module.version}.jar")):
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        said = "\n".join(f"  {line}" for line in lines[-8:])
        raise JarsUnavailable(f"{module} can't be fetched; Ivy says:\n{said}")


def _ivy() -> Path:
    package = importlib.util.find_spec("pyspark")
    folder = Path(package.origin).parent / "jars" if package and package.origin else Path()
    found = sorted(folder.glob("ivy-*.jar"))
    if not found:
        raise JarsUnavailable(f"PySpark's jar files in {folder} have no Ivy to fetch others with")
    return found[-1]
