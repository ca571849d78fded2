"""Heartbeats of the stream workers in Redis: that they live, how far they are, and how far behind.

stream:heartbeats   hash: worker -> JSON {"at": ms, "lag": events behind the topic's end, "events": applied so far,
                    "partitions": {topic/number: lag}}

A partition is its newest owner's. A worker that others have replaced, by whatever name it came back, is neither missed nor
counted, and its heartbeat is removed by theirs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import orjson

from recsys_core.redis_client import clear_unless_hash

log = logging.getLogger(__name__)

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
    """Replace what the worker said before, and remove the workers that were replaced and what is no heartbeat."""
    clear_unless_hash(redis, HEARTBEATS_KEY)
    fields = asdict(beat)
    redis.hset(HEARTBEATS_KEY, fields.pop("worker"), orjson.dumps(fields))
    kept = {one.worker.encode() for one in read_heartbeats(redis)}
    if gone := set(redis.hkeys(HEARTBEATS_KEY)) - kept:
        redis.hdel(HEARTBEATS_KEY, *gone)


def forget_heartbeat(redis: Any, worker: str) -> None:
    """A worker that ends as it should is not missed."""
    redis.hdel(HEARTBEATS_KEY, worker)


def read_heartbeats(redis: Any) -> list[Heartbeat]:
    """The last heartbeat of every worker that was not replaced, with the partitions that no other took over, by worker.

    A value that is no heartbeat is passed over.
    """
    found = [_decoded(worker, value) for worker, value in sorted(redis.hgetall(HEARTBEATS_KEY).items())]
    return _current([beat for beat in found if beat is not None])


def _decoded(worker: bytes, value: bytes) -> Heartbeat | None:
    try:
        raw = orjson.loads(value)
        numbers = int(raw["at"]), int(raw.get("lag", -1)), int(raw.get("events", 0))
        partitions = {str(name): int(lag) for name, lag in raw.get("partitions", {}).items()}
        return Heartbeat(worker.decode(), *numbers, partitions)
    except (ValueError, TypeError, KeyError, AttributeError):
        log.warning("the heartbeat of %r can't be read: %r", worker, value[:100])
        return None


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
