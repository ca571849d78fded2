"""A circuit breaker: whether a dependency is worth a call at the moment."""

from __future__ import annotations

import logging
import time

log = logging.getLogger(__name__)

TIMEOUTS_TO_OPEN = 3
PAUSE_SECONDS = 0.5


class Breaker:
    """Whether a dependency is worth a call. Refused connections open it at once, timeouts when some come in a row.

    While it is open one call in PAUSE_SECONDS goes through as a probe; its success closes it.

    Attributes:
        name: of the dependency, for the log.
        open: whether calls are skipped.
        opened: how often it has opened.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.open = False
        self.opened = 0
        self._timeouts = 0
        self._timed_out_at = 0.0
        self._probe_at = 0.0

    @property
    def passes(self) -> bool:
        """Whether `allows` would say so."""
        return not self.open or time.monotonic() >= self._probe_at

    def allows(self) -> bool:
        """Whether to call now."""
        if not self.open:
            return True
        now = time.monotonic()
        if now < self._probe_at:
            return False
        self._probe_at = now + PAUSE_SECONDS
        return True

    def succeeded(self) -> None:
        if self.open:
            log.info("%s answers again", self.name)
        self.open = False
        self._timeouts = 0

    def failed(self, error: Exception, began: float | None = None) -> bool:
        """Note a failure. Returns whether it is open now.

        `began` is when the call was made (`time.monotonic`): calls that were under way together and time out together are
        one timeout.
        """
        now = time.monotonic()
        if isinstance(error, TimeoutError):
            if began is None or began >= self._timed_out_at:
                self._timeouts += 1
                self._timed_out_at = now
            if self._timeouts < TIMEOUTS_TO_OPEN:
                return self.open
        if not self.open:
            log.warning("%s does not answer (%s: %s); answers come from lower tiers", self.name, type(error).__name__, error)
            self.opened += 1
        self.open = True
        self._probe_at = now + PAUSE_SECONDS
        return True
