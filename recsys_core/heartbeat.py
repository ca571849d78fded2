"""Heartbeats of the stream workers in Redis: that they live, how far they are, and how far behind.

stream:heartbeats   hash: worker -> JSON {"at": ms, "lag": events behind the topic's end, "events": applied so far,
                    "partitions": {topic/number: lag}}

A partition is its newest owner's. A worker that others have replaced, by whatever name it came back, is neither missed nor
counted, and its heartbeat is removed by theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import orjson

HEARTBEATS_KEY = "stream:heartbeats"
STANDBY_MS = 60_000
"""A worker without a partition is not missed when another one was heard of so much later."""


@dataclass(frozen=True)
class Heartbeat:
    """What a worker said of itself last.

    Attributes:
        at: ms since 1970.
        lag: events that it has not read yet, -1 when unknown.
        events: applied since it started.
        partitions: that it has, with the lag of each.
    """

    worker: str
    at: int
    lag: int = -1
    events: int = 0
    partitions: Mapping[str, int] = field(default_factory=dict)


def write_heartbeat(redis: Any, beat: Heartbeat) -> None:
    """Replace what the worker said before, and remove the workers that were replaced."""
    fields = asdict(beat)
    redis.hset(HEARTBEATS_KEY, fields.pop("worker"), orjson.dumps(fields))
    told = _told(redis)
    if gone := {one.worker for one in told} - {one.worker for one in _current(told)}:
        redis.hdel(HEARTBEATS_KEY, *gone)


def forget_heartbeat(redis: Any, worker: str) -> None:
    """A worker that ends as it should is not missed."""
    redis.hdel(HEARTBEATS_KEY, worker)


def read_heartbeats(redis: Any) -> list[Heartbeat]:
    """The last heartbeat of every worker that was not replaced, with the partitions that no other took over, by worker."""
    return _current(_told(redis))


def _told(redis: Any) -> list[Heartbeat]:
    beats = []
    for worker, value in sorted(redis.hgetall(HEARTBEATS_KEY).items()):
        raw = orjson.loads(value)
        numbers = int(raw["at"]), int(raw.get("lag", -1)), int(raw.get("events", 0))
        beats.append(Heartbeat(worker.decode(), *numbers, raw.get("partitions", {})))
    return beats


def _current(beats: Sequence[Heartbeat]) -> list[Heartbeat]:
    newest = max((beat.at for beat in beats), default=0)
    owners = {name: beat.worker for beat in sorted(beats, key=lambda beat: beat.at) for name in beat.partitions}
    current = []
    for beat in beats:
        if not beat.partitions:
            current += [beat] if beat.at >= newest - STANDBY_MS else []
        elif own := {name: lag for name, lag in beat.partitions.items() if owners[name] == beat.worker}:
            current.append(replace(beat, lag=sum(own.values()), partitions=own))
    return current
