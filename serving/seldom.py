"""What happens with every request is told now and then, with how often it happened."""

from __future__ import annotations

import logging
import time

SECONDS = 10.0


class Seldom:
    """Warns of one kind of thing at most once in SECONDS."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._silent_until = 0.0
        self._unsaid = 0

    def warn(self, message: str, *arguments: object) -> None:
        """Log a message, or count it among those that are not logged."""
        now = time.monotonic()
        if now < self._silent_until:
            self._unsaid += 1
            return
        more = f" (and {self._unsaid} more like it)" if self._unsaid else ""
        self._silent_until, self._unsaid = now + SECONDS, 0
        self._log.warning(message + "%s", *arguments, more)
