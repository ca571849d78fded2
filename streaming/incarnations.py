"""A partition whose log was cut short goes on as another source: its offsets are given again, to other messages.

    stream:cuts   hash: <topic identity>.<partition> -> JSON [first offset that was given again, for each cut]

Brokers that elect a replica which lacks the newest messages cut the log. What Redis and the archive know of offsets beyond
the cut is of messages that are gone. Under the same names, their fences and files would hide the messages that have these
offsets now.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import orjson

CUTS_KEY = "stream:cuts"


@dataclass(frozen=True)
class Incarnation:
    """A partition between two cuts of its log.

    Attributes:
        source: its name in Redis.
        identity: 8 hexadecimal digits, in the names of its archive files.
        start: the first offset that is its own.
    """

    source: str
    identity: str
    start: int


def incarnation(topic_identity: str, number: int, cuts: Sequence[int]) -> Incarnation:
    """The partition after `cuts` of its log, by the topic's identity before the first one."""
    source = f"{topic_identity}.{number}"
    if not cuts:
        return Incarnation(source, topic_identity, 0)
    source = f"{source}~{len(cuts)}"
    return Incarnation(source, blake2b(source.encode(), digest_size=4).hexdigest(), cuts[-1])


def read_cuts(redis: Any, topic_identity: str, numbers: Iterable[int]) -> dict[int, list[int]]:
    """The cuts of each partition, in their order. Raises redis.RedisError."""
    asked = list(numbers)
    found = redis.hmget(CUTS_KEY, [f"{topic_identity}.{number}" for number in asked]) if asked else []
    return {number: orjson.loads(value) if value else [] for number, value in zip(asked, found, strict=True)}


def add_cut(redis: Any, topic_identity: str, number: int, cuts: Sequence[int], at: int) -> list[int]:
    """Note that the log of a partition was cut at `at`, after `cuts`. Returns all. Raises redis.RedisError."""
    longer = [*cuts, at]
    redis.hset(CUTS_KEY, f"{topic_identity}.{number}", orjson.dumps(longer))
    return longer


def valid_ranges(topic_identity: str, number: int, cuts: Sequence[int]) -> list[tuple[Incarnation, int | None]]:
    """Every incarnation, and before which offset what its archive holds is still in the log (None: all of it)."""
    return [
        (incarnation(topic_identity, number, cuts[:count]), min(cuts[count:], default=None)) for count in range(len(cuts) + 1)
    ]
