"""How far each Kafka partition is in Redis: the position beside the data it speaks of, so both are lost together.

    applied:{<source>}   the offset before which every event of the partition is in the users' records and trends

A worker starts from this position and not from the group's committed offset, which knows nothing of a Redis that was
restored from an older copy or emptied: what is missing there is then applied again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recsys_core.redis_client import Script, run_calls

ADVANCE = Script("""
local now = tonumber(redis.call('GET', KEYS[1]) or -1) or -1
if tonumber(ARGV[1]) > now then redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
else redis.call('EXPIRE', KEYS[1], ARGV[2]) end
""")


class StateLost(Exception):
    """Redis is behind of what it had: it was emptied, or restored from an older copy."""


def applied_key(source: str) -> str:
    """Key of the position of a source."""
    return f"applied:{{{source}}}"


def read_positions(redis: Any, sources: Sequence[str]) -> dict[str, int | None]:
    """The position of each source, None where there is none."""
    pipeline = redis.pipeline(transaction=False)
    for source in sources:
        pipeline.get(applied_key(source))
    values = pipeline.execute()
    return {source: None if value is None else int(value) for source, value in zip(sources, values, strict=True)}


def advance(redis: Any, positions: Mapping[str, int], ttl_seconds: int) -> None:
    """Raise positions; one that is further already stays."""
    calls = [ADVANCE.call([applied_key(source)], offset, ttl_seconds) for source, offset in positions.items()]
    run_calls(redis, calls, [ADVANCE])


def check_kept(redis: Any, known: Mapping[str, int]) -> None:
    """Raises StateLost when a source is behind of the position that this worker knows it had."""
    found = read_positions(redis, list(known))
    behind = {source: (offset, found[source]) for source, offset in known.items() if (found[source] or 0) < offset}
    if behind:
        source, (had, has) = next(iter(behind.items()))
        raise StateLost(f"Redis had {source} up to offset {had} and has it up to {has}")
