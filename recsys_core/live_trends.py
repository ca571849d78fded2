"""Live trends: weighted counts of items in buckets of some minutes, kept by the speed layer and summed up by readers.

    trend:{<source>}:<bucket>   hash: item id -> Σ weight × 1000 of the events of one Kafka partition in one bucket of event
                                time; the empty field is the fence, the last offset applied
    trend:sources               hash: source -> JSON [seen at, bucket length, how long buckets are kept] (ms)

Each partition writes hashes of its own and changes them together with their fence, so a batch that comes again changes
nothing; counts are whole numbers, so their sum does not depend on an order. A category's trend is that of its items:
readers know the categories of the release they serve, so none is stored here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from recsys_core.events import EVENT_TYPE, HOUR_MS, ITEM_ID, MINUTE_MS, TS
from recsys_core.live import GUARD_LUA, Batch, Guard, LiveEvent, guarded
from recsys_core.online import TrendingValue
from recsys_core.redis_client import Script, clear_unless_hash, is_of_wrong_type
from recsys_core.settings import Settings

SOURCES_KEY = "trend:sources"
SCALE = 1000
FENCE = b""
KEPT_HALF_LIVES = 10.0
"""An event older than so many half-lives counts less than a thousandth and is not read."""
BUCKETS_A_CALL = 8
MOST = 1 << 53
"""What counts more is no count."""

COUNT_LUA = (
    GUARD_LUA
    + """
local out, at = {0}, 2
for i = 1, n do
  local key = KEYS[i]
  local first, last, expires, size = struct.unpack('<dddd', ARGV[at])
  local fence = redis.pcall('HGET', key, '')
  if type(fence) == 'table' and fence.err then
    redis.call('DEL', key)
    fence = false
  end
  local applied = tonumber(fence or -1) or -1
  if applied >= last then
    out[1] = out[1] + 1
  elseif applied >= first then
    out[#out + 1] = i
    out[#out + 1] = applied
  else
    for from = 1, size, 2000 do
      local upto = math.min(from + 1999, size)
      local old, new = redis.call('HMGET', key, unpack(ARGV, at + from, at + upto)), {}
      for j = 1, upto - from + 1 do
        new[2 * j - 1] = ARGV[at + from + j - 1]
        new[2 * j] = (tonumber(old[j] or 0) or 0) + tonumber(ARGV[at + size + from + j - 1])
      end
      redis.call('HSET', key, unpack(new))
    end
    redis.call('HSET', key, '', last)
    redis.call('PEXPIREAT', key, expires)
  end
  at = at + 2 * size + 1
end
return out
"""
)
"""KEYS: buckets of one source. ARGV: see GUARD_LUA, then for each bucket first and last offset, expiry in ms and n as doubles,
n items, n counts.
Returns what `live.UPDATE_LUA` returns.
"""

COUNT = Script(COUNT_LUA)
_HEAD = struct.Struct("<4d")


def bucket_key(source: str, bucket: int, area: str = "trend") -> str:
    """Key of the counts of one bucket (its number since 1970) from one source."""
    return f"{area}:{{{source}}}:{bucket}"


@dataclass(frozen=True)
class BucketCounts:
    """What one partition adds to one bucket."""

    partition: int
    bucket: int
    first: int
    last: int
    items: list[bytes]
    counts: list[int]


class TrendWriter:
    """Applies batches to the buckets."""

    def __init__(self, settings: Settings, area: str = "trend") -> None:
        self._area = area
        self._bucket_ms = settings.stream.bucket_minutes * MINUTE_MS
        self._keep_ms = settings.stream.trend_hours * HOUR_MS
        self._weight = {name: round(SCALE * weight) for name, weight in settings.events.weights.items()}
        self._types = pa.array(list(self._weight), pa.string())
        self._weights = np.array(list(self._weight.values()), np.int64)

    def counts(self, batch: Batch, now_ms: int) -> list[BucketCounts]:
        """A batch by partition and bucket; what would expire at once is left out."""
        buckets = batch.events[TS].to_numpy() // self._bucket_ms
        fresh = self._expires(buckets) > now_ms
        if not fresh.all():
            batch, buckets = batch.take(fresh), buckets[fresh]
        if not batch.rows:
            return []
        weights = self._weights[pc.index_in(batch.events[EVENT_TYPE], self._types).to_numpy()]
        encoded = batch.events[ITEM_ID].combine_chunks().dictionary_encode()
        codes = encoded.indices.to_numpy().astype(np.int64)
        first_bucket, spread = int(buckets.min()), int(buckets.max() - buckets.min()) + 1
        groups, group = np.unique(batch.partition * spread + buckets - first_bucket, return_inverse=True)
        pairs, pair = np.unique(group * len(encoded.dictionary) + codes, return_inverse=True)
        sums = np.bincount(pair, weights, len(pairs)).astype(np.int64)
        names = encoded.dictionary.cast(pa.binary()).take(pa.array(pairs % len(encoded.dictionary))).to_pylist()
        ends = np.searchsorted(pairs // len(encoded.dictionary), np.arange(len(groups)), side="right")
        first = np.full(len(groups), np.iinfo(np.int64).max)
        last = np.full(len(groups), -1)
        np.minimum.at(first, group, batch.offset)
        np.maximum.at(last, group, batch.offset)
        found, start = [], 0
        for at, end in enumerate(ends.tolist()):
            partition, bucket = int(groups[at]) // spread, int(groups[at]) % spread + first_bucket
            added = sums[start:end].tolist()
            found.append(BucketCounts(partition, bucket, int(first[at]), int(last[at]), names[start:end], added))
            start = end
        return found

    def few_counts(self, events: Sequence[LiveEvent], now_ms: int) -> list[BucketCounts]:
        """`counts` of a handful of events."""
        groups: dict[tuple[int, int], list[LiveEvent]] = {}
        for event in events:
            bucket = event.ts // self._bucket_ms
            if self._expires(bucket) > now_ms:
                groups.setdefault((event.partition, bucket), []).append(event)
        found = []
        for partition, bucket in sorted(groups):
            group = groups[partition, bucket]
            added: dict[bytes, int] = {}
            for event in group:
                item = event.item_id.encode()
                added[item] = added.get(item, 0) + self._weight[event.event_type]
            sums = list(added), list(added.values())
            found.append(BucketCounts(partition, bucket, group[0].offset, group[-1].offset, *sums))
        return found

    def _expires(self, bucket: Any) -> Any:
        """When a bucket, or each of an array, is let go, ms."""
        return (bucket + 1) * self._bucket_ms + self._keep_ms

    def calls(
        self, counts: Sequence[BucketCounts], sources: Mapping[int, str], guards: Mapping[int, Guard] | None = None
    ) -> list[tuple[object, ...]]:
        """The calls of `counts`, in their order. Buckets of one source lie in one slot."""
        calls = []
        for together in self._together(counts):
            buckets: list[str] = []
            words: list[object] = []
            for part in together:
                buckets.append(bucket_key(sources[part.partition], part.bucket, self._area))
                head = _HEAD.pack(part.first, part.last, self._expires(part.bucket), len(part.items))
                words += [head, *part.items, *part.counts]
            keys, known = guarded(buckets, together[0].partition, guards)
            calls.append(COUNT.call(keys, known, *words))
        return calls

    def _together(self, counts: Sequence[BucketCounts]) -> Iterator[list[BucketCounts]]:
        together: list[BucketCounts] = []
        for part in counts:
            if together and (together[0].partition != part.partition or len(together) == BUCKETS_A_CALL):
                yield together
                together = []
            together.append(part)
        if together:
            yield together

    def behind(self, counts: Sequence[BucketCounts], answers: Sequence[list[int]]) -> tuple[int, dict[tuple[int, int], int]]:
        """From the answers of `calls`: what was known already, and the offset of what is half known."""
        ignored, found = 0, {}
        for together, answer in zip(self._together(counts), answers, strict=True):
            ignored += answer[0]
            for index, applied in zip(answer[1::2], answer[2::2], strict=True):
                found[together[index - 1].partition, together[index - 1].bucket] = applied
        return ignored, found

    def not_yet_applied(self, batch: Batch, behind: dict[tuple[int, int], int]) -> Batch:
        """The events of half known buckets that come after what was applied."""
        buckets = (batch.events[TS].to_numpy() // self._bucket_ms).tolist()
        rows = zip(batch.partition.tolist(), buckets, batch.offset.tolist(), strict=True)
        new = [at for at, (partition, bucket, offset) in enumerate(rows) if offset > behind.get((partition, bucket), offset)]
        return batch.take(np.array(new, np.int64))


def announce_sources(redis: Any, sources: Sequence[str], settings: Settings, now_ms: int) -> None:
    """Tell readers from which sources there may be buckets; those not seen for longer than a bucket is kept are removed.

    What is no value of ours gives way.
    """
    if not sources:
        return
    keep_ms = (settings.stream.trend_hours + 1) * HOUR_MS
    value = orjson.dumps([now_ms, settings.stream.bucket_minutes * MINUTE_MS, keep_ms])
    clear_unless_hash(redis, SOURCES_KEY)
    told = redis.hgetall(SOURCES_KEY)
    known = _sources(told)
    gone = [name for name in told if name not in known or known[name][0] < now_ms - keep_ms]
    if gone:
        redis.hdel(SOURCES_KEY, *gone)
    redis.hset(SOURCES_KEY, mapping=dict.fromkeys(sources, value))
    redis.pexpire(SOURCES_KEY, keep_ms)


def _sources(values: Mapping[bytes, bytes]) -> dict[bytes, tuple[int, int, int]]:
    """When each source was seen, the length of its buckets and how long they are kept; without those that can't be read."""
    found = {}
    for name, value in values.items():
        with suppress(ValueError, TypeError):
            seen, length, kept = map(int, orjson.loads(value))
            name.decode()
            if length >= MINUTE_MS:
                found[name] = (seen, length, kept)
    return found


def _counts(fields: Mapping[bytes, bytes]) -> dict[bytes, int]:
    """The counts of a bucket by item, without those that are none."""
    counts = {}
    try:
        counts = {name: int(count) for name, count in fields.items() if name != FENCE}
    except ValueError:
        for name, count in fields.items():
            with suppress(ValueError):
                counts[name] = int(count)
        counts.pop(FENCE, None)
    most = max(counts.values(), default=0)
    return counts if most < MOST else {name: count for name, count in counts.items() if count < MOST}


@dataclass(frozen=True)
class LiveTrend:
    """Scores of items as of a moment.

    Attributes:
        items: item ids.
        scores: float64 (items, half-lives), Σ weight × 2^(−age / half-life); a bucket's age is that of its middle.
        computed_at: ms since 1970 (UTC).
    """

    items: tuple[str, ...]
    scores: np.ndarray
    computed_at: int


class LiveTrendReader:
    """Reads and sums up the buckets. Those that ended a while ago are read again only now and then.

    `half_lives_hours` are the half-lives of the scores; buckets older than KEPT_HALF_LIVES of the longest are not read. What is
    no source, bucket or count is left out: `left_out` are the sources and keys of the last read that held such.
    """

    RECENT_MS = 15 * MINUTE_MS
    REREAD_MS = 5 * MINUTE_MS

    def __init__(self, half_lives_hours: Sequence[float]) -> None:
        self._half_lives = np.asarray(half_lives_hours, np.float64) * HOUR_MS
        self._known: dict[str, tuple[int, dict[bytes, int]]] = {}
        self.left_out: list[str] = []

    def read(self, redis: Any, now_ms: int) -> LiveTrend | None:
        """The trend as of `now_ms`; None while there are no live buckets. Raises redis.RedisError."""
        told = redis.hgetall(SOURCES_KEY)
        sources = _sources(told)
        self.left_out = [f"{SOURCES_KEY} {name.decode(errors='replace')}" for name in told if name not in sources]
        wanted, stale = self._wanted(sources, now_ms)
        pipeline = redis.pipeline(transaction=False)
        for key in stale:
            pipeline.hgetall(key)
        return self._score(wanted, stale, pipeline.execute(raise_on_error=False) if stale else [], now_ms)

    def _wanted(self, sources: Mapping[bytes, tuple[int, int, int]], now_ms: int) -> tuple[dict[str, float], list[str]]:
        """The buckets that count with the time (ms) of their middle, and those of them that have to be read."""
        reach = int(KEPT_HALF_LIVES * self._half_lives.max())
        wanted, stale = {}, []
        for source, (_, length, kept_ms) in sources.items():
            for bucket in range((now_ms - min(reach, kept_ms)) // length, now_ms // length + 1):
                key = bucket_key(source.decode(), bucket)
                wanted[key] = (bucket + 0.5) * length
                read_at = self._known[key][0] if key in self._known else -1
                recent = (bucket + 1) * length > now_ms - self.RECENT_MS
                if read_at < 0 or recent or read_at < now_ms - self.REREAD_MS:
                    stale.append(key)
        return wanted, stale

    def _score(self, wanted: Mapping[str, float], stale: Sequence[str], values: Sequence[Any], now_ms: int) -> LiveTrend | None:
        known = {key: found for key, found in self._known.items() if key in wanted}
        for key, fields in zip(stale, values, strict=True):
            if isinstance(fields, Exception) and not is_of_wrong_type(fields):
                raise fields
            read = {} if isinstance(fields, Exception) else _counts(fields)
            known[key] = (now_ms, read)
            if isinstance(fields, Exception) or len(read) < len(fields) - (FENCE in fields):
                self.left_out.append(key)
        self._known = known
        position: dict[bytes, int] = {}
        items: list[int] = []
        counts: list[int] = []
        ages: list[float] = []
        for key, (_, held) in known.items():
            items += [position.setdefault(name, len(position)) for name in held]
            counts += held.values()
            ages += [max(0.0, now_ms - wanted[key])] * len(held)
        if not position:
            return None
        age, count = np.array(ages), np.array(counts, np.float64) / SCALE
        columns = [np.bincount(items, count * np.exp2(-age / half), len(position)) for half in self._half_lives]
        return LiveTrend(tuple(name.decode(errors="replace") for name in position), np.stack(columns, axis=1), now_ms)


def live_trend(redis: Any, now_ms: int, half_lives_hours: Sequence[float]) -> LiveTrend | None:
    """The trend as of `now_ms`, read once; None while there are no live buckets."""
    return LiveTrendReader(half_lives_hours).read(redis, now_ms)


def with_hourly(live: TrendingValue, hourly: TrendingValue | None, half_lives_hours: Sequence[float]) -> TrendingValue:
    """The live trend, with what the hourly one knows and the speed layer does not.

    Both add up the same events, one from the newest on and one up to its hour: of each score the larger is the nearer one. So a
    handful of events, all that a speed layer knows that has just begun, leads a quiet moment only.
    """
    held = [] if hourly is None else [np.atleast_1d(scores) for scores in hourly.scores.values()]
    if hourly is None or any(len(scores) != len(half_lives_hours) for scores in held):
        return live
    age = max(0, live.computed_at - hourly.computed_at) / HOUR_MS
    decay = np.exp2(-age / np.asarray(half_lives_hours, np.float64))
    scores = dict(live.scores)
    for item, known in zip(hourly.scores, held, strict=True):
        scores[item] = tuple(np.maximum(known * decay, scores.get(item, 0.0)).tolist())
    return TrendingValue(live.computed_at, live.hour, scores)
