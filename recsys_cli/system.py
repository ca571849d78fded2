"""Installs what is no Python package by the system's package manager, where that needs no password."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence


def install(apt: Sequence[str], brew: str) -> bool:
    """Install the first of some Debian packages that can be had, or a Homebrew formula. False where neither can be.

    apt-get needs root or password-less sudo. What is run is told on standard error.
    """
    if sys.platform == "darwin":
        program = shutil.which("brew")
        return program is not None and _run([program, "install", brew])
    prefix = _root_prefix()
    if prefix is None or not shutil.which("apt-get"):
        return False
    command = [*prefix, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-o", "DPkg::Lock::Timeout=300"]
    _run([*command, "update"])
    return any(_run([*command, "install", "-y", "--no-install-recommends", package]) for package in apt)


def _root_prefix() -> list[str] | None:
    if os.geteuid() == 0:
        return []
    sudo = shutil.which("sudo")
    if sudo and subprocess.run([sudo, "-n", "true"], capture_output=True).returncode == 0:
        return [sudo, "-n"]
    return None


def _run(command: list[str]) -> bool:
    print("+", *command, file=sys.stderr, flush=True)
    return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode == 0
