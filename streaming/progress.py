"""How far each Kafka partition is in Redis: the position beside the data it speaks of, so both are lost together.

    applied:{<source>}   the offset before which every event of the partition is in the users' records and trends

A worker starts from this position and not from the group's committed offset, which knows nothing of a Redis that was
restored from an older copy or emptied: what is missing there is then applied again.

The position follows each batch, after its data and on the same connection: a copy that lacks the data lacks the position as
well, however soon after the batch Redis was lost. In a cluster both lie on different masters, which are lost one at a
time. There the position says what was applied TRAIL_SECONDS ago, and a master that was replaced or restarted makes the worker
start over from it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from recsys_core.redis_client import Script, is_of_wrong_type, run_calls

ADVANCE = Script("""
local now = redis.pcall('GET', KEYS[1])
now = type(now) == 'string' and tonumber(now) or 0
if now < tonumber(ARGV[3]) then return {-1} end
if tonumber(ARGV[1]) > now then redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
else redis.call('EXPIRE', KEYS[1], ARGV[2]) end
return {0}
""")
"""KEYS: a position. ARGV: its new value, TTL (s), what it must have reached. Else nothing is changed and the answer is
{-1}."""
TRAIL_SECONDS = 10.0
"""How far the replica of a cluster's master may be behind of it when it takes its place."""


class StateLost(Exception):
    """Redis is behind of what it had: it was emptied, or restored from an older copy."""


def applied_key(source: str) -> str:
    """Key of the position of a source."""
    return f"applied:{{{source}}}"


def read_positions(redis: Any, sources: Sequence[str]) -> dict[str, int | None]:
    """The position of each source, None where there is none; what is no position is none, and gives way to the next one."""
    pipeline = redis.pipeline(transaction=False)
    for source in sources:
        pipeline.get(applied_key(source))
    return dict(zip(sources, map(_position, pipeline.execute(raise_on_error=False)), strict=True))


def _position(answer: Any) -> int | None:
    if isinstance(answer, Exception):
        if is_of_wrong_type(answer):
            return None
        raise answer
    try:
        return None if answer is None else int(answer)
    except ValueError:
        return None


def advance_calls(positions: Mapping[str, int], known: Mapping[str, int], ttl_seconds: int) -> list[tuple[object, ...]]:
    """The calls that raise positions to those of `positions`, each only where the `known` one is still there."""
    return [ADVANCE.call([applied_key(source)], at, ttl_seconds, known.get(source, 0)) for source, at in positions.items()]


def advance(redis: Any, positions: Mapping[str, int], ttl_seconds: int) -> None:
    """Raise positions; one that is further already stays."""
    run_calls(redis, advance_calls(positions, {}, ttl_seconds), [ADVANCE])


def check_kept(redis: Any, known: Mapping[str, int]) -> None:
    """Raises StateLost when a source is behind of the position that this worker knows it had."""
    found = read_positions(redis, list(known))
    behind = {source: (offset, found[source]) for source, offset in known.items() if (found[source] or 0) < offset}
    if behind:
        source, (had, has) = next(iter(behind.items()))
        raise StateLost(f"Redis had {source} up to offset {had} and has it up to {has}")


class Trail:
    """What was applied some time ago to a cluster whose masters are since then the same processes."""

    def __init__(self, redis: Any) -> None:
        self._redis = redis
        self._masters = self._running()
        self._past: deque[tuple[float, dict[str, int]]] = deque()

    def follow(self, now: float, applied: Mapping[str, int]) -> dict[str, int]:
        """Note what is applied `now` (s) and return what was TRAIL_SECONDS before. Raises StateLost, redis.RedisError."""
        if (running := self._running()) != self._masters:
            raise StateLost(f"{len(running - self._masters)} masters of the cluster were replaced or restarted")
        self._past.append((now, dict(applied)))
        while len(self._past) > 1 and self._past[1][0] <= now - TRAIL_SECONDS:
            self._past.popleft()
        at, found = self._past[0]
        return found if at <= now - TRAIL_SECONDS else {}

    def _running(self) -> frozenset[str]:
        """The run ids of the masters."""
        from redis.cluster import RedisCluster

        found = self._redis.info("server", target_nodes=RedisCluster.PRIMARIES)
        return frozenset(said["run_id"] for said in ([found] if "run_id" in found else found.values()))
