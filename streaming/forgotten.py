"""Who was forgotten, as far as is known: read again all the time by a thread of its own, since the lake may be away."""

from __future__ import annotations

import logging
import threading

from recsys_core.lake import Lake
from recsys_core.tombstones import REREAD_SECONDS, TombstoneLog, Tombstones

log = logging.getLogger(__name__)

NOBODY = Tombstones({})
ASK_SECONDS = 5.0
"""How long a replay waits for the lake to say who was forgotten."""


class ForgottenUsers:
    """`known` are the tombstones of the last time that the lake could be read; None before the first."""

    def __init__(self, lake: Lake) -> None:
        self.known: Tombstones | None = None
        self._tombstones = TombstoneLog(lake)
        self._away = False
        self._stopping = False
        self._asked = self._answered = 0
        self._turn = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="forgotten", daemon=True)

    def begin(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread, unless the lake does not let it go."""
        with self._turn:
            self._stopping = True
            self._turn.notify_all()
        self._thread.join(ASK_SECONDS)

    def covered(self) -> Tombstones:
        """What is known of now, the same object for as long as that is nothing new."""
        return self.known or NOBODY

    def refresh(self) -> None:
        """Look again, and wait for it unless the lake is away: what was forgotten before this call is known after it."""
        with self._turn:
            self._asked += 1
            wanted = self._asked
            self._turn.notify_all()
            if not self._away and not self._turn.wait_for(lambda: self._answered >= wanted, ASK_SECONDS):
                self._away = True
        if self.known is None:
            log.warning("the lake is away: who was forgotten is not known, and may be taken in again from the topic")

    def _learn(self, read: Tombstones) -> None:
        """Who was forgotten stays so, also when the lake shows an empty folder."""
        before = self.known or Tombstones({})
        lost = {user: moment for user, moment in before.moments.items() if read.moments.get(user, -1) < moment}
        self.known = Tombstones({**read.moments, **lost}) if lost else read

    def _run(self) -> None:
        while not self._stopping:
            asked = self._asked
            try:
                self._learn(self._tombstones.read())
                self._away = False
            except Exception as error:  # noqa: BLE001 - a store raises what it likes; what is known stays
                if not self._away:
                    log.warning("who was forgotten can't be read (%s: %s)", type(error).__name__, error)
                self._away = True
            with self._turn:
                self._answered = asked
                self._turn.notify_all()
                self._turn.wait_for(lambda: self._stopping or self._asked > self._answered, REREAD_SECONDS)
