"""One of several serving processes: settings come on stdin, readiness and numbers go to stdout, together in a line.

It ends on SIGTERM, and when its supervisor is gone and stdin therefore ends. One that stands still does not hold it up.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from contextlib import suppress

from recsys_core.settings import Settings
from serving.metrics import Metrics
from serving.server import Server, run, set_up_logging, settle, without_pandas

log = logging.getLogger(__name__)

NUMBERS_SECONDS = 1.0


async def work(settings: Settings) -> None:
    """Serve on the shared port until asked to end."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    loop.add_reader(sys.stdin.fileno(), _read_on, stopping)
    server = Server(settings, shared_port=True)
    try:
        address = await server.start()
        settle()
        reports = Reports(sys.stdout.fileno(), server.metrics)
        while not stopping.is_set():
            reports.send({"ready": address, "numbers": server.metrics.snapshot()})
            try:
                await asyncio.wait_for(stopping.wait(), NUMBERS_SECONDS)
            except TimeoutError:
                continue
    finally:
        loop.remove_reader(sys.stdin.fileno())
        await server.stop()


def _read_on(stopping: asyncio.Event) -> None:
    """Nothing more is said on stdin: what can be read is its end."""
    if not os.read(sys.stdin.fileno(), 1024):
        stopping.set()


class Reports:
    """Lines to the supervisor, each the newest state of all. Sending never waits: it happens on the event loop.

    A line that the pipe takes only a part of is finished before another one begins; until then others are dropped and counted.
    """

    def __init__(self, pipe: int, metrics: Metrics) -> None:
        os.set_blocking(pipe, False)
        self._pipe = pipe
        self._metrics = metrics
        self._unsent = b""

    def send(self, message: dict[str, object]) -> None:
        self._write()
        if self._unsent:
            self._metrics.events["dropped_reports"] += 1
            return
        self._unsent = json.dumps(message).encode() + b"\n"
        self._write()

    def _write(self) -> None:
        """Write what the pipe takes now. A supervisor that is gone is seen at stdin."""
        with suppress(BlockingIOError, BrokenPipeError):
            while self._unsent:
                self._unsent = self._unsent[os.write(self._pipe, self._unsent) :]


def main() -> int:
    """Read the settings, serve, and return the exit code."""
    line = sys.stdin.buffer.readline()
    settings = Settings(**json.loads(line))
    set_up_logging(settings.serving)
    without_pandas()
    return run(work(settings))


if __name__ == "__main__":
    sys.exit(main())
