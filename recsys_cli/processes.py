"""Child processes that never outlive this one, free ports, and the lock of a home."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from recsys_core.errors import UserError

LOOPBACK = "127.0.0.1"
OWN_PORTS = range(20_000, 32_000)
"""Systems give outgoing connections higher ones (Linux from 32768, macOS from 49152): none takes a port of these after it was
found to be free."""


class StackError(UserError):
    """A part of the local stack can't do its work; the message says which, why and what to do."""


def heed_interrupts() -> None:
    """Take SIGINT also where a script's `&` has it ignored.

    After each run in this process Dagster gives SIGTERM the handler of SIGINT, and children inherit what is ignored: neither
    this process nor they could be stopped.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run_folder(home: Path) -> Path:
    """Where pid files, logs and the stack's description are."""
    folder = home / "run"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def kept_command(
    name: str,
    home: Path,
    command: Sequence[str],
    address: tuple[str, Path] | None = None,
    restarts: int = 0,
    follow: bool = False,
) -> list[str]:
    """The command that runs `command` under recsys_cli.child, tied to the life of this process.

    It is started again when it ends by itself, up to `restarts` times in a row.
    With `address` (variable, file) it starts once the file is there, with its content as that variable, and to `follow` starts
    again when that changes.
    """
    keeper = [sys.executable, "-m", "recsys_cli.child", "--parent", str(os.getpid())]
    keeper += ["--pid-file", str(pid_file(home, name)), "--restarts", str(restarts)]
    if address:
        keeper += ["--address", f"{address[0]}={address[1]}", *(["--follow"] if follow else [])]
    return [*keeper, "--", *command]


def pid_file(home: Path, name: str) -> Path:
    """Holds the pid of a process of the stack while it runs."""
    return run_folder(home) / f"{name}.pid"


@contextmanager
def running(
    name: str, home: Path, command: Sequence[str], env: Mapping[str, str] | None = None
) -> Iterator[Callable[[], None]]:
    """Run a child while the block runs; its output goes to `<home>/run/<name>.log`.

    Yields a function that raises StackError, with the end of that output, when the child has ended by itself.
    """
    log = run_folder(home) / f"{name}.log"
    with log.open("w") as output:
        child = subprocess.Popen(
            kept_command(name, home, command),
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def check() -> None:
        if child.poll() is not None:
            end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise StackError(f"{name} ended with exit code {child.returncode}; the end of {log}:\n{end}")

    try:
        yield check
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait()


def wait_until(ready: Callable[[], bool], what: str, seconds: float, check: Callable[[], None]) -> None:
    """Wait until `ready()` holds; `check()` raises what makes waiting pointless. Raises StackError when it takes longer."""
    deadline = time.monotonic() + seconds
    while not ready():
        check()
        if time.monotonic() > deadline:
            raise StackError(f"{what} was not ready after {seconds:.0f} s")
        time.sleep(0.05)


def accepts_connections(host: str, port: int) -> bool:
    """Whether something listens there."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, port)) == 0


def free_port(wanted: int = 0, host: str = LOOPBACK) -> int:
    """`wanted` if nothing uses it, else one that is free. 0 asks for any."""
    if wanted and not accepts_connections(host, wanted) and _is_bindable(host, wanted):
        return wanted
    for port in random.SystemRandom().sample(OWN_PORTS, len(OWN_PORTS)):
        if _is_bindable(host, port):
            return port
    raise StackError(f"no free port on {host}")


def _is_bindable(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


@contextmanager
def home_lock(home: Path) -> Iterator[None]:
    """Hold `<home>/run/lock`: one stack or demo works in a home at a time. Raises StackError naming who holds it."""
    path = run_folder(home) / "lock"
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise StackError(f"{home} is in use by {holder}; stop it, or choose another folder by --home") from error
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} (recsys {' '.join(sys.argv[1:])})")
        lock.flush()
        yield


@contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Send what this process and Spark write to standard error into a file while the block runs."""
    kept = os.dup(2)
    with log.open("w") as output:
        os.dup2(output.fileno(), 2)
        try:
            yield
        except BaseException as error:
            error.add_note(f"what led there is in {log}")
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
