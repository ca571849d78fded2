"""Runs one process of the stack and outlives neither its own process nor the stack's.

    python -m recsys_cli.child --parent PID --pid-file FILE [--address NAME=FILE [--follow]] [--restarts N] -- COMMAND…

The command runs in a session of its own. When it ends, when SIGTERM or SIGINT arrives, or when the parent process is
gone (even killed), every process of that session is ended. A command that ends by itself is started again, up to N
times without a minute between. With `--follow` it is also started again when FILE holds another address.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

POLL_SECONDS = 0.2
RESTART_SECONDS = 1.0
RESTART_WINDOW_SECONDS = 60.0
GRACE_SECONDS = 4.0
"""Below the 5 seconds after which honcho kills, so that the command's whole session is ended before its keeper is."""


def is_alive(pid: int) -> bool:
    """Whether a process runs; a killed one that nobody has waited for does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def end_group(group: int, grace_seconds: float = GRACE_SECONDS) -> None:
    """Ask every process of a process group to end, then kill what is left after the grace period."""
    if not _signal_group(group, signal.SIGTERM):
        return
    deadline = time.monotonic() + grace_seconds
    while time.monotonic() < deadline:
        if not _signal_group(group, 0):
            return
        time.sleep(0.05)
    _signal_group(group, signal.SIGKILL)


def _signal_group(group: int, number: int) -> bool:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:  # macOS, when only zombies are left in the group
        return False
    return True


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="recsys_cli.child")
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--pid-file", type=Path, required=True)
    parser.add_argument("--address", metavar="NAME=FILE", help="start when FILE is there, with its content as variable NAME")
    parser.add_argument("--follow", action="store_true", help="start again when FILE holds another address")
    parser.add_argument("--restarts", type=int, default=0)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command

    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    environment = dict(os.environ)
    name, _, file = (options.address or "").partition("=")

    def is_elsewhere() -> bool:
        return options.follow and _address(Path(file)) not in ("", environment[name])

    restarts = 0
    while True:
        if options.address:
            address = _await_address(Path(file), options.parent, stopping)
            if address is None:
                return 0
            environment[name] = address
        started = time.monotonic()
        code = _run(command, environment, options, stopping, is_elsewhere)
        if stopping.is_set() or not is_alive(options.parent):
            return code
        if is_elsewhere():
            print(f"{name} is another one; starting again", flush=True)
            continue
        restarts = 1 if time.monotonic() - started > RESTART_WINDOW_SECONDS else restarts + 1
        if restarts > options.restarts:
            return code
        print(f"ended with exit code {code}; starting it again", flush=True)
        stopping.wait(RESTART_SECONDS)


def _run(
    command: list[str],
    environment: dict[str, str],
    options: argparse.Namespace,
    stopping: threading.Event,
    is_elsewhere: Callable[[], bool],
) -> int:
    """Run the command once, until it ends or has to, and return its exit code."""
    with subprocess.Popen(command, env=environment, start_new_session=True) as child:
        options.pid_file.write_text(str(child.pid))
        try:
            while child.poll() is None:
                if stopping.is_set() or is_elsewhere() or not is_alive(options.parent):
                    _end(child)
                else:
                    stopping.wait(POLL_SECONDS)
            return child.returncode if child.returncode >= 0 else 128 - child.returncode
        finally:
            _end(child)
            options.pid_file.unlink(missing_ok=True)


def _await_address(file: Path, parent: int, stopping: threading.Event) -> str | None:
    while not stopping.is_set() and is_alive(parent):
        if address := _address(file):
            return address
        stopping.wait(POLL_SECONDS)
    return None


def _address(file: Path) -> str:
    """What a file says, empty where it is not there."""
    try:
        return file.read_text().strip()
    except FileNotFoundError:
        return ""


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child's session; in a thread, because a child that has ended stays in its group until it is waited for."""
    ending = threading.Thread(target=end_group, args=(child.pid,))
    ending.start()
    child.wait()
    ending.join()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
