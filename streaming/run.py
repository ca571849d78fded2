"""The process of `recsys stream`: one worker, until SIGINT or SIGTERM."""

from __future__ import annotations

import signal

from recsys_core.log_lines import set_up_text_log
from recsys_core.settings import Settings
from streaming.worker import Worker


def main(settings: Settings) -> int:
    """Run a worker. Returns the exit code."""
    set_up_text_log()
    worker = Worker(settings)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: worker.stop())
    worker.run()
    return 0
