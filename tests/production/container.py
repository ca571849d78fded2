"""A container as processes of this machine: with mounts, processes and a host name of their own, over the machine's files.

Its root is an overlay of this machine's, so that what it writes is gone with it and the rest may be read-only. It has the
user, the capabilities and the variables of a container. The network is that of the machine: a pod has an address of loopback
for itself, and where it says 0.0.0.0 its own is meant. Limits of memory and processor time are not enforced. Ports below 1024
are open to any user, as container runtimes have it.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from deployment import PROJECT
from pod_images import OWNED, USER

from recsys_cli.java import ensure_java
from recsys_core.jars import cache_folder

MOUNTED = ("/proc", "/dev", "/sys")
PORTS = "-all,+net_bind_service"


@dataclass(frozen=True)
class Mount:
    """What a container sees at a path."""

    source: Path
    path: str
    read_only: bool = False


@dataclass
class Recipe:
    """All that a container is started with."""

    command: Sequence[str]
    variables: Mapping[str, str]
    workdir: str
    user: int
    group: int
    further_group: int | None = None
    read_only: bool = False
    mounts: Sequence[Mount] = field(default_factory=list)


@cache
def of_this_machine() -> list[Mount]:
    """What every container sees where it lies here: Python, its packages, the checkout, Java and what was fetched."""
    seen = {PROJECT, Path(sys.prefix), Path(sys.base_prefix), ensure_java().path, cache_folder()}
    # A clone has its environment inside of itself.
    outermost = [path for path in sorted(seen) if not seen.intersection(path.parents)]
    return [Mount(path, str(path), True) for path in outermost]


class Container:
    """One run of a container. It ends when the thread that made it does, at the latest."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        """`folder` is its own; its output goes to `<folder>/log`."""
        self._recipe = recipe
        box = folder / "box"
        box.mkdir(parents=True)
        script = folder / "start.sh"
        script.touch(0o600)
        script.write_text(_script(recipe, box))
        with open(folder / "log", "wb") as log:
            # It ends with the thread that started it, and everything in it ends with it.
            command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child"]
            command += ["sh", str(script)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._first = 0

    def first(self) -> int:
        """The process that is number 1 inside, 0 where there is none."""
        if not self._first:
            children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
            try:
                self._first = int((children.read_text().split() or ["0"])[0])
            except OSError:
                return 0
        return self._first

    def wait(self) -> int:
        """How it ended, as a container's exit code: 128 and the signal's number where one ended it."""
        code = self._process.wait()
        return code if code >= 0 else 128 - code

    def end(self, grace_seconds: float) -> None:
        """Ask it to end, and end it when it has not."""
        self.signal(signal.SIGTERM)
        deadline = time.monotonic() + grace_seconds
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        self.signal(signal.SIGKILL)

    def signal(self, number: int) -> None:
        """Send a signal to its first process. A kill ends all of them."""
        try:
            if self._process.poll() is None and self.first():
                os.kill(self.first(), number)
        except ProcessLookupError:
            pass

    def run(self, command: Sequence[str], seconds: float) -> bool:
        """Whether a command inside ends well in time."""
        inside = [
            "nsenter",
            "--target",
            str(self.first()),
            "--mount",
            "--pid",
            "--uts",
            "--root",
            "--",
            *_as_user(self._recipe, command),
        ]
        try:
            return subprocess.run(inside, capture_output=True, stdin=subprocess.DEVNULL, timeout=seconds).returncode == 0
        except subprocess.TimeoutExpired:
            return False


def _as_user(recipe: Recipe, command: Sequence[str]) -> list[str]:
    groups = ["--clear-groups"] if recipe.further_group is None else ["--groups", str(recipe.further_group)]
    rights = ["--no-new-privs", f"--inh-caps={PORTS}", f"--ambient-caps={PORTS}", f"--bounding-set={PORTS}"]
    variables = [f"{name}={value}" for name, value in recipe.variables.items()]
    user = ["setpriv", "--reuid", str(recipe.user), "--regid", str(recipe.group), *groups, *rights]
    return [*user, "--", "env", "-i", "-C", recipe.workdir, *variables, *command]


def _script(recipe: Recipe, box: Path) -> str:
    root = box / "root"
    lines = [
        "set -e",
        "mount --make-rprivate /",
        f"echo {shlex.quote(recipe.variables['HOSTNAME'])} > /proc/sys/kernel/hostname",
        f"mount -t tmpfs tmpfs {box}",
        f"mkdir {box}/upper {box}/work {root}",
        f"mount -t overlay overlay -o lowerdir=/,upperdir={box}/upper,workdir={box}/work {root}",
        f"cd {root}",
        "mount -t tmpfs -o mode=1777 tmpfs tmp",
        *(f"mount --rbind {path} .{path}" for path in MOUNTED),
        "mount -t proc proc proc",
        f"echo 'recsys:x:{USER}:{USER}::/home/recsys:/bin/sh' >> etc/passwd",
        *(f"mkdir -p .{path}; chown {USER}:{USER} .{path}" for path in OWNED),
    ]
    for mount in [*recipe.mounts, *of_this_machine()]:
        lines += _mounting(mount)
    if recipe.read_only:
        own = ["."] if any(mount.path == "/tmp" for mount in recipe.mounts) else [".", "tmp"]
        lines += [f"mount -o remount,ro {place}" for place in own]
    lines.append(f"exec chroot . {shlex.join(_as_user(recipe, recipe.command))}")
    return "\n".join(lines)


def _mounting(mount: Mount) -> list[str]:
    # /var/run is a link to /run of this machine, not of the container.
    inside = os.path.realpath(mount.path)
    path = shlex.quote(f".{inside}")
    make = [f"mkdir -p {path}"] if mount.source.is_dir() else [f"mkdir -p $(dirname {path})", f"touch {path}"]
    above = " ".join(f".{parent}" for parent in Path(inside).parents if str(parent) != "/")
    lines = [*make, *([f"chmod a+x {above}"] if above else []), f"mount --bind {shlex.quote(str(mount.source))} {path}"]
    return lines + ([f"mount -o remount,bind,ro {path}"] if mount.read_only else [])
