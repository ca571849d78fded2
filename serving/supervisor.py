"""Several serving processes on one port: starts them, starts again what ends, adds up their numbers, ends them in order."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

from pydantic import SecretStr

from recsys_core.cores import usable_cores
from recsys_core.settings import Settings
from serving.metrics import serve_metrics

log = logging.getLogger(__name__)

RESTARTS = 3
"""Starts of a process that keeps ending, before all are ended."""
RESTART_WINDOW_SECONDS = 60.0
RESTART_SECONDS = 0.5
LINE_BYTES = 4 * 1024 * 1024


class Worker:
    """One serving process.

    Attributes:
        snapshot: its numbers as of the last second, None before the first.
    """

    def __init__(self, number: int, settings: Settings) -> None:
        self.number = number
        self.snapshot: dict[str, Any] | None = None
        self.ready = asyncio.Event()
        self._settings = settings
        self._process: asyncio.subprocess.Process | None = None

    async def run(self) -> int:
        """Start the process, read what it says until it ends, and return its exit code."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "serving.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
            limit=LINE_BYTES,
        )
        self._process = process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(self._settings.model_dump(), default=_plain).encode() + b"\n")
        try:
            with suppress(ConnectionError):
                await process.stdin.drain()
            while line := await process.stdout.readline():
                try:
                    said = json.loads(line)
                except ValueError:
                    log.warning("serving process %d says %r, which is not for its supervisor", self.number, line)
                    continue
                if "ready" in said:
                    self.ready.set()
                self.snapshot = said.get("numbers", self.snapshot)
            return await process.wait()
        finally:
            self._process = None
            self.snapshot = None

    def end(self) -> None:
        """Ask the process to drain and end."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.terminate()

    def kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()


def _plain(value: Any) -> Any:
    """What JSON has no form of; secrets as they are, for the pipe alone."""
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


async def supervise(settings: Settings, on_ready: Callable[[str], None]) -> None:
    """Run the serving processes until SIGTERM or SIGINT. Raises OSError when they can't listen or keep ending."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    count = settings.serving.processes or usable_cores()
    with ExitStack() as held:
        port = held.enter_context(reserved_port(settings.serving.host, settings.serving.port)).getsockname()[1]
        if settings.serving.health_port:
            held.enter_context(reserved_port(settings.serving.host, settings.serving.health_port, "health_port"))
        serving = settings.serving.model_copy(update={"port": port, "processes": 1, "metrics_port": 0})
        of_workers = settings.model_copy(update={"serving": serving})
        workers = [Worker(k, of_workers) for k in range(count)]
        if metrics_port := settings.serving.metrics_port:
            snapshots = lambda: [found for worker in workers if (found := worker.snapshot)]  # noqa: E731
            serve_metrics(settings.serving.host, metrics_port, snapshots)
        keeping = [asyncio.create_task(_keep(worker, stopping)) for worker in workers]
        stopped = asyncio.create_task(stopping.wait())
        started = asyncio.gather(*(worker.ready.wait() for worker in workers))
        try:
            first: list[asyncio.Future[Any]] = [started, stopped, *keeping]
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if started.done():
                address = f"{settings.serving.host}:{port}"
                log.info("serving on %s with %d processes", address, count)
                on_ready(address)
            await asyncio.wait(first[1:], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.set()
            started.cancel()
            for worker in workers:
                worker.end()
            limit = settings.serving.linger_seconds + settings.serving.drain_seconds + 5
            _, late = await asyncio.wait(keeping, timeout=limit)
            if late:
                log.error("%d processes did not end within %.0f s and are killed", len(late), limit)
                for worker in workers:
                    worker.kill()
            ended = await asyncio.gather(*keeping, stopped, started, return_exceptions=True)
        for error in ended:
            if isinstance(error, Exception):
                raise error


async def _keep(worker: Worker, stopping: asyncio.Event) -> None:
    """Run a process again when it ends by itself. Raises OSError when it does so again and again."""
    restarts = 0
    while True:
        started = time.monotonic()
        code = await worker.run()
        if stopping.is_set():
            return
        restarts = 1 if time.monotonic() - started > RESTART_WINDOW_SECONDS else restarts + 1
        if restarts > RESTARTS:
            raise OSError(f"serving process {worker.number} ended with exit code {code}, for the {restarts}th time in a row")
        log.error("serving process %d ended with exit code %d; it is started again", worker.number, code)
        with suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), RESTART_SECONDS * restarts)
        if stopping.is_set():
            return


def reserved_port(host: str, port: int, setting: str = "port") -> socket.socket:
    """A socket that holds the port for the processes and takes no connections itself. Raises OSError that names the setting."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    held = socket.socket(family, socket.SOCK_STREAM)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((host.strip("[]"), port))
    except OSError as error:
        held.close()
        reason = f"is something else there? serving.{setting} chooses another one ({error})"
        raise OSError(f"can't listen on {host}:{port}, {reason}") from error
    return held
