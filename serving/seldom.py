"""What happens with every request is told now and then, with how often it happened."""

from __future__ import annotations

import logging
import time

SECONDS = 10.0


class Seldom:
    """Tells of one kind of thing at most once in SECONDS, of errors one of each type."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._silent: dict[tuple[str, type], tuple[float, int]] = {}

    def warn(self, message: str, *arguments: object) -> None:
        """Log a message, or count it among those that are not logged."""
        self._tell(logging.WARNING, message, arguments, None)

    def fail(self, error: BaseException, message: str, *arguments: object) -> None:
        """The same of an error, which is logged with its traceback."""
        self._tell(logging.ERROR, message, arguments, error)

    def _tell(self, level: int, message: str, arguments: tuple[object, ...], error: BaseException | None) -> None:
        kind = message, type(error)
        until, unsaid = self._silent.get(kind, (0.0, 0))
        now = time.monotonic()
        if now < until:
            self._silent[kind] = until, unsaid + 1
            return
        self._silent[kind] = now + SECONDS, 0
        more = f" (and {unsaid} more like it)" if unsaid else ""
        self._log.log(level, message + "%s", *arguments, more, exc_info=error)
