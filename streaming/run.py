"""The process of `recsys stream`: one worker, until SIGINT or SIGTERM."""

from __future__ import annotations

import logging
import signal

from recsys_core.masking import MaskedFormatter
from recsys_core.settings import Settings
from streaming.worker import Worker


def main(settings: Settings) -> int:
    """Run a worker. Returns the exit code."""
    handler = logging.StreamHandler()
    handler.setFormatter(MaskedFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    worker = Worker(settings)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: worker.stop())
    worker.run()
    return 0
