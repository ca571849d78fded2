"""Users' records and trends made again from the topic or from its archive, while workers go on.

The same writers apply the events to records in an area of their own, beside the live ones and in their slots. Then each
record takes the place of the live one in one atomic step, unless the live one was taken further meanwhile; what happened
meanwhile is read and applied as well, and those that it touched are tried again. In the end another
computation is compared with Redis.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import AdminClient

from recsys_core.events import EVENT_SCHEMA, HOUR_MS, USER_ID, now_ms
from recsys_core.kafka_config import client_config
from recsys_core.lake import Lake
from recsys_core.landing import OFFSET, Landing, OffsetRange, offset_faults, row_groups
from recsys_core.ledger import LANDING
from recsys_core.live import Batch
from recsys_core.live_trends import announce_sources, bucket_key
from recsys_core.online import REBUILD_AREAS_KEY, user_key
from recsys_core.recompute import Differences, Recomputation
from recsys_core.redis_client import Script, client, run_calls
from recsys_core.settings import Settings
from recsys_core.tombstones import REREAD_SECONDS, TombstoneLog, hash_of
from streaming.arrival import Arrivals
from streaming.decode import decode
from streaming.incarnations import incarnation, read_cuts, valid_ranges
from streaming.rebuild_lock import RebuildLock
from streaming.sink import RedisSink
from streaming.topics import Topic, TopicError, find_topic

log = logging.getLogger(__name__)

AREA = "rebuild-"
"""What the keys of every rebuild begin with; its token follows."""
KINDS = ("user", "trend")
ROUNDS = 20
KEYS_AT_ONCE = 500
FETCH_SECONDS = 30.0

PROMOTE = Script("""
local live, made = KEYS[1], KEYS[2]
local function is_fence(name)
  if ARGV[1] == 'trend' then return name == '' end
  return string.sub(name, 1, 1) == '@'
end
local new, old = redis.call('HGETALL', made), {}
if #new == 0 then return 1 end
local kind = redis.call('TYPE', live).ok
if kind == 'hash' then old = redis.call('HGETALL', live) elseif kind ~= 'none' then redis.call('DEL', live) end
local fences = {}
for i = 1, #new, 2 do if is_fence(new[i]) then fences[new[i]] = tonumber(new[i + 1]) end end
for i = 1, #old, 2 do
  if is_fence(old[i]) and fences[old[i]] and tonumber(old[i + 1]) > fences[old[i]] then return 0 end
end
if ARGV[1] == 'trend' then redis.call('DEL', live) end
for i = 1, #new, 2 do redis.call('HSET', live, new[i], new[i + 1]) end
if ARGV[1] == 'trend' then redis.call('PEXPIRE', live, math.max(redis.call('PTTL', made), 1))
else redis.call('EXPIRE', live, ARGV[2]) end
return 1
""")
"""KEYS: the live record or bucket, and the one made anew. Returns 0 when the live one is further: nothing is changed."""


@dataclass(frozen=True)
class RebuildReport:
    """What a rebuild did.

    Attributes:
        events: that were applied.
        users, buckets: that took the place of the live ones.
        rounds: of catching up with the live workers.
        differences: between Redis afterwards and a computation from the same events.
    """

    events: int
    users: int
    buckets: int
    rounds: int
    seconds: float
    differences: Differences


def rebuild(settings: Settings, since_ms: int, from_landing: bool = False) -> RebuildReport:
    """Make the live state again from the events that the brokers took at `since_ms` or later.

    A user's record is replaced by what these events give; fields of the batch layer stay. Raises TopicError without a
    topic, RebuildRefused while another rebuild runs, KafkaException and redis.RedisError when one of them is away: run it
    again then.
    """
    started = time.monotonic()
    admin = AdminClient(client_config(settings.kafka))
    topic = find_topic(admin, settings.kafka.topic)
    if topic is None:
        raise TopicError(f"there is no topic {settings.kafka.topic}")
    redis = client(settings.redis)
    try:
        with RebuildLock(redis) as lock:
            return _rebuild(settings, topic, since_ms, from_landing, redis, lock, started)
    finally:
        redis.close()


def _rebuild(
    settings: Settings, topic: Topic, since_ms: int, from_landing: bool, redis: Any, lock: RebuildLock, started: float
) -> RebuildReport:
    area = f"{AREA}{lock.token}-"
    cuts = read_cuts(redis, topic.identity, range(topic.partitions))
    sources = {number: incarnation(topic.identity, number, cuts[number]).source for number in cuts}
    sink = RedisSink(redis, settings, area)
    computed = Recomputation(settings)
    forgotten = _Forgotten(Lake(settings.lake_uri), computed, redis, area)
    # Whoever left them has no lock any more.
    _remove(redis, AREA)
    redis.delete(REBUILD_AREAS_KEY)
    redis.sadd(REBUILD_AREAS_KEY, area)
    source = LandingSource(settings, topic, since_ms, cuts) if from_landing else TopicSource(settings, topic, since_ms)
    moved = dict.fromkeys(KINDS, 0)
    waiting: dict[str, list[bytes]] = {}
    events = 0
    try:
        for turn in range(1, ROUNDS + 1):
            touched: dict[str, set[bytes]] = {kind: set(waiting.get(kind, ())) for kind in KINDS}
            for read in source.read():
                lock.check()
                batch = forgotten.without(read)
                events += batch.rows
                _apply(sink, computed, batch, sources, area, touched if turn > 1 else None)
            for kind in KINDS:
                every = redis.scan_iter(match=f"{area}{kind}:*", count=KEYS_AT_ONCE)
                keys, before = (every if turn == 1 else touched[kind]), set(waiting.get(kind, ()))
                done, waiting[kind] = _promote(redis, lock, keys, area, kind, settings.cache.feature_ttl_seconds, forgotten)
                moved[kind] += done if turn == 1 else len(before - set(waiting[kind]))
            left = sum(map(len, waiting.values()))
            log.info("round %d: %d events so far, %d users and buckets are to be tried again", turn, events, left)
            if not left:
                break
    finally:
        source.close()
        _remove(redis, area)
        redis.srem(REBUILD_AREAS_KEY, area)
    announce_sources(redis, list(sources.values()), settings, now_ms())
    oldest = now_ms() - (settings.stream.trend_hours - 1) * HOUR_MS
    forgotten.look()
    found = computed.differences(redis, oldest)
    return RebuildReport(events, moved["user"], moved["trend"], turn, time.monotonic() - started, found)


def _apply(
    sink: RedisSink,
    computed: Recomputation,
    batch: Batch,
    sources: dict[int, str],
    area: str,
    touched: dict[str, set[bytes]] | None,
) -> None:
    """Apply a batch beside the live keys and compute it; `touched` gets the keys that were changed, by kind."""
    prepared = sink.prepare(batch, sources, now_ms())
    if prepared is not None:
        sink.apply(prepared, sources, now_ms())
        if touched is not None:
            touched["user"].update(user_key(user, f"{area}user").encode() for user in prepared.users.users)
            buckets = (bucket_key(sources[c.partition], c.bucket, f"{area}trend") for c in prepared.counts)
            touched["trend"].update(key.encode() for key in buckets)
    for number in np.unique(batch.partition).tolist():
        own = batch.take(batch.partition == number)
        computed.add(own.events, sources[number], own.offset.tolist(), None if own.arrived is None else own.arrived.tolist())


def _promote(
    redis: Any, lock: RebuildLock, keys: Iterable[bytes], area: str, kind: str, ttl_seconds: int, forgotten: _Forgotten
) -> tuple[int, list[bytes]]:
    """Put what was made in the place of the live keys. Returns how many were, and those whose live one is further."""
    moved = 0
    waiting: list[bytes] = []
    remaining = iter(keys)
    while some := list(islice(remaining, KEYS_AT_ONCE)):
        lock.check()
        forgotten.look_now_and_then()
        some = [key for key in some if key not in forgotten.keys]
        calls = [PROMOTE.call([key.removeprefix(area.encode()), key], kind, ttl_seconds) for key in some]
        answers = run_calls(redis, calls, [PROMOTE])
        moved += sum(answers)
        waiting += [key for key, answer in zip(some, answers, strict=True) if not answer]
    return moved, waiting


class _Forgotten:
    """Who was forgotten, looked at again all the time. Those who are while the rebuild goes on are left to the live workers:
    what was made of them goes, and nothing of them is made any more.

    `keys` are those of their records beside the live ones.
    """

    def __init__(self, lake: Lake, computed: Recomputation, redis: Any, area: str) -> None:
        self._log = TombstoneLog(lake)
        self._computed, self._redis, self._area = computed, redis, area
        self._known = self._log.read()
        self._looked = time.monotonic()
        self._since: set[str] = set()
        self.keys: set[bytes] = set()

    def without(self, batch: Batch) -> Batch:
        """The events of a batch that are to be applied."""
        self.look_now_and_then()
        left_out = self._known.covers(batch.events, batch.arrived)
        if self._since:
            users = batch.events[USER_ID].to_pylist()
            left_out |= np.fromiter((hash_of(user) in self._since for user in users), bool, len(users))
        return batch.take(~left_out) if left_out.any() else batch

    def look_now_and_then(self) -> None:
        """Whoever removes a user waits until this has been called again, see `recsys_core.forget`."""
        if time.monotonic() - self._looked >= REREAD_SECONDS:
            self.look()

    def look(self) -> None:
        """Learn of new removals. Raises what the lake raises: a rebuild that does not know of them must not go on."""
        known = self._log.read()
        self._looked = time.monotonic()
        new = {user for user, moment in known.moments.items() if self._known.moments.get(user, -1) < moment}
        self._known = known
        if not new:
            return
        self._since |= new
        gone = [user for user in self._computed.users if hash_of(user) in new]
        for user in gone:
            del self._computed.users[user]
            key = user_key(user, f"{self._area}user")
            self.keys.add(key.encode())
            self._redis.delete(key)


def _remove(redis: Any, area: str) -> None:
    for key in redis.scan_iter(match=f"{area}*", count=KEYS_AT_ONCE):
        redis.delete(key)


class TopicSource:
    """The topic from a time on, each partition in order."""

    def __init__(self, settings: Settings, topic: Topic, since_ms: int) -> None:
        self._settings = settings
        self._topic = topic
        self._arrivals = Arrivals(topic.name)
        group = f"recsys-rebuild-{uuid.uuid4().hex}"
        more = {"group_id": group, "enable_auto_commit": False, "enable_partition_eof": True}
        self._consumer = Consumer(client_config(settings.kafka, **more))
        asked = [TopicPartition(topic.name, number, since_ms) for number in range(topic.partitions)]
        found = self._consumer.offsets_for_times(asked, timeout=30)
        self._next = {}
        for place in found:
            low, high = self._ends(place.partition)
            self._next[place.partition] = high if place.offset < 0 else max(low, place.offset)

    def _ends(self, number: int) -> tuple[int, int]:
        ends: tuple[int, int] = self._consumer.get_watermark_offsets(TopicPartition(self._topic.name, number), timeout=30)
        return ends

    def read(self) -> Iterator[Batch]:
        """What came since the last call. Raises TopicError when the brokers give nothing for FETCH_SECONDS."""
        ends = {number: self._ends(number)[1] for number in self._next}
        open_ = {number for number, end in ends.items() if self._next[number] < end}
        self._consumer.assign([TopicPartition(self._topic.name, number, self._next[number]) for number in open_])
        deadline = time.monotonic() + FETCH_SECONDS
        while open_:
            messages = []
            for message in self._consumer.consume(self._settings.stream.batch_events, 0.5):
                error = message.error()
                if error is None:
                    messages.append(message)
                elif error.code() == KafkaError._PARTITION_EOF:
                    open_.discard(message.partition())
                elif not error.retriable():
                    raise KafkaException(error)
            if messages:
                deadline = time.monotonic() + FETCH_SECONDS
                yield self._decoded(messages)
            elif time.monotonic() > deadline:
                raise TopicError(
                    f"{self._topic.name} gave nothing for {FETCH_SECONDS:.0f} s, partitions {sorted(open_)} are open"
                )
            open_ = {number for number in open_ if self._next[number] < ends[number]}

    def _decoded(self, messages: list[Message]) -> Batch:
        partition = np.fromiter([m.partition() for m in messages], np.int64, len(messages))
        offset = np.fromiter([m.offset() for m in messages], np.int64, len(messages))
        values = [m.value() for m in messages]
        max_bytes = self._settings.kafka.max_message_bytes
        appended = self._arrivals.of(messages)
        decoded = decode(values, self._settings.events, max_bytes, appended)
        for number in np.unique(partition).tolist():
            self._next[number] = int(offset[partition == number][-1]) + 1
        return Batch(decoded.events, partition[decoded.rows], offset[decoded.rows], appended[decoded.rows])

    def skip_to(self, number: int, offset: int) -> None:
        """Go on at `offset` of a partition."""
        self._next[number] = offset

    def close(self) -> None:
        """Leave the brokers."""
        self._consumer.close()


class LandingSource:
    """The archive from the files on that arrived since a time, then the topic from where the archive ends.

    A file that was written again without a forgotten user arrived when it first came.

    Where the log of a partition was cut, what the archive has beyond the cut is no longer part of it.
    """

    def __init__(self, settings: Settings, topic: Topic, since_ms: int, cuts: Mapping[int, Sequence[int]]) -> None:
        self._landing = Landing(Lake(settings.lake_uri, settings.lake.keep_versions))
        listing = self._landing.ledger.read()
        late = pc.greater_equal(listing.table["arrived"], since_ms)
        valid = [
            (number, one.identity, before)
            for number in cuts
            for one, before in valid_ranges(topic.identity, number, cuts[number])
        ]
        files = {OffsetRange.parse(file.path): file.path for file in listing.files(LANDING, topic.name, late)}
        self._files = [
            (held, path, before)
            for number, identity, before in valid
            for held, path in sorted((held, path) for held, path in files.items() if held)
            if (held.partition, held.identity) == (number, identity) and (before is None or held.first < before)
        ]
        if faults := offset_faults(held for held, _, _ in self._files):
            raise TopicError("the archive is not whole: " + "; ".join(faults))
        self._rest = TopicSource(settings, topic, since_ms)
        for held, _, before in self._files:
            self._rest.skip_to(held.partition, held.last + 1 if before is None else min(held.last + 1, before))

    def read(self) -> Iterator[Batch]:
        """What came since the last call."""
        files, self._files = self._files, []
        for held, path, before in files:
            with self._landing.lake.fs.open(path, "rb") as source:
                for table in row_groups(pq.ParquetFile(source)):
                    own = table if before is None else table.filter(pc.less(table[OFFSET], before))
                    offset = own[OFFSET].to_numpy()
                    partition, by_now = (np.full(len(offset), value, np.int64) for value in (held.partition, now_ms()))
                    yield Batch(own.select(EVENT_SCHEMA.names), partition, offset, by_now)
        yield from self._rest.read()

    def close(self) -> None:
        """Leave the brokers."""
        self._rest.close()
