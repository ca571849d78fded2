"""Callers at a steady pace, and which tier answered them when."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc

from serving.client import RecsysClient, RecsysError

FAILED = "no answer"


@dataclass(frozen=True)
class Call:
    """A call and its answer.

    Attributes:
        at: when it was made (monotonic s).
        user_id: for whom.
        seconds: how long it took.
        tier: of the answer, or FAILED.
        release_id: of the answer; empty when there was none.
        age: of the answer when it came (s).
    """

    at: float
    user_id: str
    seconds: float
    tier: str
    release_id: str = ""
    age: float = 0.0


@dataclass
class Calls:
    """All calls so far."""

    made: list[Call] = field(default_factory=list)

    def between(self, start: float, end: float = float("inf")) -> list[Call]:
        return [call for call in self.made if start <= call.at < end]

    def tiers(self, start: float, end: float = float("inf")) -> Counter[str]:
        return Counter(call.tier for call in self.between(start, end))

    def last_other(self, tier: str, end: float) -> float:
        """When the last call before `end` was made that another tier answered (monotonic s), 0 where there is none."""
        return max((call.at for call in self.between(0.0, end) if call.tier != tier), default=0.0)


@contextmanager
def calling(address: str, users: Sequence[str], per_second: int = 200) -> Iterator[Calls]:
    """One caller after the other, for one user after the other, until the block ends."""
    found, stop = Calls(), threading.Event()

    def call() -> None:
        began, done = time.monotonic(), 0
        with RecsysClient(address, timeout=10) as client:
            while not stop.is_set():
                wait = began + done / per_second - time.monotonic()
                if wait > 0:
                    time.sleep(wait)
                user_id, at = users[done % len(users)], time.monotonic()
                try:
                    answer = client.recommend(user_id)
                    took, age = time.monotonic() - at, time.time() - answer.computed_at.timestamp()
                    found.made.append(Call(at, user_id, took, answer.tier, answer.release_id, age))
                except (grpc.RpcError, RecsysError):
                    found.made.append(Call(at, user_id, time.monotonic() - at, FAILED))
                done += 1

    caller = threading.Thread(target=call)
    caller.start()
    try:
        yield found
    finally:
        stop.set()
        caller.join()
