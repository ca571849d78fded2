"""Heartbeats of the stream workers in Redis: that they live, how far they are, and how far behind.

stream:heartbeats   hash: worker -> JSON {"at": ms, "lag": events behind the topic's end, "events": applied so far}
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import orjson

HEARTBEATS_KEY = "stream:heartbeats"


@dataclass(frozen=True)
class Heartbeat:
    """What a worker said of itself last. `at` is ms since 1970, `lag` events that it has not read yet (-1: unknown)."""

    worker: str
    at: int
    lag: int = -1
    events: int = 0


def write_heartbeat(redis: Any, beat: Heartbeat) -> None:
    """Replace what the worker said before."""
    fields = asdict(beat)
    redis.hset(HEARTBEATS_KEY, fields.pop("worker"), orjson.dumps(fields))


def forget_heartbeat(redis: Any, worker: str) -> None:
    """A worker that ends as it should is not missed."""
    redis.hdel(HEARTBEATS_KEY, worker)


def read_heartbeats(redis: Any) -> list[Heartbeat]:
    """The last heartbeat of every worker, sorted by worker."""
    found = redis.hgetall(HEARTBEATS_KEY)
    beats = []
    for worker, value in sorted(found.items()):
        raw = orjson.loads(value)
        beats.append(Heartbeat(worker.decode(), int(raw["at"]), int(raw.get("lag", -1)), int(raw.get("events", 0))))
    return beats
