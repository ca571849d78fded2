"""One of several serving processes: settings come on stdin, readiness and numbers go to stdout, a line each.

It ends on SIGTERM, and when its supervisor is gone and stdin therefore ends.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys

from recsys_core.settings import Settings
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
        _say({"ready": address})
        while not stopping.is_set():
            _say({"numbers": server.metrics.snapshot()})
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


def _say(message: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Read the settings, serve, and return the exit code."""
    line = sys.stdin.buffer.readline()
    settings = Settings(**json.loads(line))
    set_up_logging(settings.serving)
    without_pandas()
    return run(work(settings))


if __name__ == "__main__":
    sys.exit(main())
