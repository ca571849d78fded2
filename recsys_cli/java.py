"""Finds the Java that Spark needs: 17 or newer, with the module `jdk.incubator.vector`. Installs one where it can.

`python -m recsys_cli.java` prints the home of that Java.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from recsys_cli.system import install
from recsys_core.errors import UserError

OLDEST = 17
MODULE = "jdk.incubator.vector"
APT_PACKAGES = ("openjdk-17-jre-headless", "openjdk-21-jre-headless", "default-jre-headless")
APT_ACCELERATOR = "libopenblas0-pthread"


class JavaMissing(UserError):
    """No usable Java; the message says what was found and what to do."""


@dataclass(frozen=True)
class JavaHome:
    """A Java that Spark runs on."""

    path: Path
    version: int


def find_java() -> JavaHome:
    """The first usable Java: JAVA_HOME, the one on PATH, then the installed ones, the oldest usable version first.

    Raises JavaMissing with the reason for each Java that was looked at.
    """
    reasons: list[str] = []
    chosen = _first_usable(_named_homes(), reasons)
    if chosen:
        return chosen
    installed = [inspected for home in _installed_homes() if (inspected := _usable(home, reasons))]
    if installed:
        return min(installed, key=lambda java: java.version)
    looked_at = "".join(f"\n  {reason}" for reason in dict.fromkeys(reasons)) or " none is installed"
    raise JavaMissing(f"Spark needs Java {OLDEST} or newer with the module {MODULE}:{looked_at}\n{_advice()}")


def ensure_java() -> JavaHome:
    """`find_java`, after installing one by the system's package manager if need be. Sets JAVA_HOME of this process.

    Raises JavaMissing where there is none and it can't be installed.
    """
    try:
        java = find_java()
    except JavaMissing:
        if not _install():
            raise
        java = find_java()
    os.environ["JAVA_HOME"] = str(java.path)
    return java


def _first_usable(homes: Iterator[Path], reasons: list[str]) -> JavaHome | None:
    return next((java for home in homes if (java := _usable(home, reasons))), None)


def _usable(home: Path, reasons: list[str]) -> JavaHome | None:
    """The Java at `home`, None (and a line in `reasons`) when Spark can't run on it."""
    binary = home / "bin" / "java"
    if not binary.is_file():
        reasons.append(f"{home}: no bin/java")
        return None
    listed = subprocess.run([binary, "--list-modules"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    found = re.search(r"^java\.base@(\d+)", listed.stdout, re.MULTILINE)
    if listed.returncode or not found:
        reasons.append(f"{home}: older than Java 9, or it does not start")
        return None
    version = int(found.group(1))
    if version < OLDEST:
        reasons.append(f"{home}: Java {version}")
        return None
    if not re.search(rf"^{re.escape(MODULE)}(@|$)", listed.stdout, re.MULTILINE):
        reasons.append(f"{home}: Java {version} without the module {MODULE}")
        return None
    return JavaHome(home, version)


def _named_homes() -> Iterator[Path]:
    if named := os.environ.get("JAVA_HOME"):
        yield Path(named)
    if binary := shutil.which("java"):
        command = [binary, "-XshowSettings:properties", "-version"]
        shown = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if home := re.search(r"^\s*java\.home = (.+)$", shown.stderr, re.MULTILINE):
            yield Path(home.group(1))


def _installed_homes() -> list[Path]:
    homes = [path for path in sorted(Path("/usr/lib/jvm").glob("*")) if (path / "bin" / "java").is_file()]
    if sys.platform == "darwin":
        asked = subprocess.run(["/usr/libexec/java_home", "-v", f"{OLDEST}+"], capture_output=True, text=True)
        if asked.returncode == 0:
            homes.append(Path(asked.stdout.strip()))
        for prefix in ("/opt/homebrew/opt", "/usr/local/opt"):
            homes += sorted(Path(prefix).glob("openjdk*/libexec/openjdk.jdk/Contents/Home"))
    return list(dict.fromkeys(home.resolve() for home in homes))


def _advice() -> str:
    if sys.platform == "darwin":
        return f"Install it by `brew install openjdk@{OLDEST}` and run the same command again."
    if shutil.which("apt-get"):
        return f"Install it by `apt-get install {APT_PACKAGES[0]}` (or {APT_PACKAGES[1]}) and run the same command again."
    return "Install an OpenJDK 17 or 21, set JAVA_HOME to it, and run the same command again."


def _install() -> bool:
    if not install(APT_PACKAGES, f"openjdk@{OLDEST}"):
        return False
    if sys.platform == "linux":
        install([APT_ACCELERATOR], "")
    return True


if __name__ == "__main__":
    try:
        print(ensure_java().path)
    except JavaMissing as missing:
        sys.exit(str(missing))
