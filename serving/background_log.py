"""Log lines are written by a thread: whoever reads standard error and stands still holds no call up."""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time

KEPT_LINES = 10_000
"""Lines that wait for the reader; more are dropped and counted."""
FLUSH_SECONDS = 2.0
"""What a process that ends gives its reader for what is left."""


class BackgroundHandler(logging.Handler):
    """Formats where something is logged, writes to standard error elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: queue.Queue[str] = queue.Queue(KEPT_LINES)
        self._dropped = 0
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._dropped += 1

    def flush(self) -> None:
        """Wait until all is written, FLUSH_SECONDS at most."""
        until = time.monotonic() + FLUSH_SECONDS
        with self._lines.all_tasks_done:
            while self._lines.unfinished_tasks and (left := until - time.monotonic()) > 0:
                self._lines.all_tasks_done.wait(left)

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            try:
                sys.stderr.write(line + "\n")
                if dropped := self._dropped:
                    self._dropped = 0
                    sys.stderr.write(f"{dropped} lines of this log were dropped: nobody read it\n")
                sys.stderr.flush()
            except (OSError, ValueError):  # closed: nobody will read what follows either
                return
            finally:
                self._lines.task_done()
