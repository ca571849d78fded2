"""A stream worker and a server on one Redis, under clicks and callers, while a part of that Redis is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from callers import FAILED, Calls, calling
from load import clicks, passes, stalls
from rig import Drill
from stream_world import Broker
from stream_world import World as Stream
from waiting import eventually
from worlds import World as Serving
from worlds import serving_on

from recsys_core.settings import load_settings

READERS = [f"reader-{n}" for n in range(300)]
"""Users with a cached answer who click nothing."""
BEFORE, AFTER = 3.0, 6.0
"""Seconds of clicks and calls."""
BACK_SECONDS = 5.0
"""So long after another server took over all answers are from the cache again."""
WELL = 0.99
"""Of the answers when nothing is wrong; a busy machine may miss the deadline of a read now and then."""
TIMEOUT_MS = 100
NOWHERE = "redis://127.0.0.1:1/0"


@dataclass(frozen=True)
class SpeedLayer:
    """What was started."""

    stream: Stream
    serving: Serving


@dataclass(frozen=True)
class Loss:
    """What happened while a part was lost, by monotonic seconds: when it was struck, and when another one took over."""

    struck: float
    taken: float
    calls: Calls
    stall: float

    def kept(self, users: Collection[str] = READERS) -> float:
        """The share of the answers for some users that were from the cache, from the loss until all shall be well again."""
        meanwhile = self.calls.between(self.struck, self.taken + BACK_SECONDS)
        tiers = [call.tier for call in meanwhile if call.user_id in users]
        return tiers.count("CACHE") / len(tiers)

    def drill(self, engine: str, fault: str, sent: int) -> Drill:
        back = self.calls.last_other("CACHE", self.taken + BACK_SECONDS) - self.struck
        return Drill(
            engine,
            "stream worker, server",
            fault,
            f"0 of {sent:,} events, 0 of {len(self.calls.made):,} answers",
            f"{1 - self.kept():.0%} of answers below CACHE for {back:.1f} s; clicks visible after {self.stall:.1f} s at most",
        )


@contextmanager
def speed_layer(broker: Broker, home: Path, redis: dict[str, Any]) -> Iterator[SpeedLayer]:
    """A worker and a server with a promoted release on the Redis of some settings, and the cached answers of READERS."""
    stream = Stream.make(broker.address, NOWHERE, home, redis=redis)
    settings = load_settings(
        home / "serving", redis={**redis, "timeout_ms": TIMEOUT_MS}, serving={"port": 0, "rank_timeout_ms": 30_000}
    )
    try:
        stream.start()
        with serving_on(settings) as serving:
            for user in READERS:
                serving.put_cached_user(user)
            yield SpeedLayer(stream, serving)
    finally:
        stream.close()


def lose(layer: SpeedLayer, strike: Callable[[], None], taken_over: Callable[[], bool], heal: Callable[[], None]) -> Loss:
    """Strike under load, wait until another server has taken over, and heal; then prove that nothing was lost or doubled and
    that every answer came, from the cache before and soon after."""
    stream = layer.stream
    with clicks(stream), stalls(stream) as stall, calling(layer.serving.address, READERS) as calls:
        passes(BEFORE)
        struck = time.monotonic()
        strike()
        eventually(taken_over)
        taken = time.monotonic()
        passes(AFTER + BACK_SECONDS)
        heal()
        passes(AFTER)
    assert calls.tiers(0)[FAILED] == 0
    for start, end in ((0.0, struck), (taken + BACK_SECONDS, float("inf"))):
        tiers = calls.tiers(start, end)
        assert tiers["CACHE"] >= WELL * tiers.total(), tiers
    stream.settle()
    stream.prove()
    assert stream.workers
    assert all(worker.is_alive() for worker in stream.workers)
    return Loss(struck, taken, calls, stall.seconds)
