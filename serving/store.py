"""Users' states and trends from Redis: one round trip with a deadline, and no round trip while Redis is down."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hiredis import ReplyError
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry

from recsys_core.live_trends import LiveTrend, LiveTrendReader, with_hourly
from recsys_core.online import (
    ANSWERS_A_CALL,
    LAST_TS,
    PUT_ANSWERS,
    RECORD_FIELDS,
    TRENDING_KEY,
    CachedAnswer,
    CorruptValue,
    TrendingValue,
    UserRecord,
    put_answers,
    recs_key,
    user_key,
)
from recsys_core.redis_client import client
from recsys_core.settings import RedisSettings
from serving.metrics import Metrics
from serving.node import BACKGROUND_SECONDS, NOTHING, Node, Raw, meaning
from serving.resp import WRONG_TYPE, RespError, of_the_value, words_of
from serving.seldom import Seldom
from serving.topology import Shard, Topology, topology_of

log = logging.getLogger(__name__)

LAST_TS_AT = RECORD_FIELDS.index(LAST_TS)


@dataclass(frozen=True, slots=True)
class UserState:
    """What Redis holds of a user. The record stays undecoded, because a cache hit needs no more than `last_ts`.

    Attributes:
        answer: the cached answer, None without one that can be read.
        last_ts: time of the last action in ms, 0 when unknown.
        values: of RECORD_FIELDS.
    """

    answer: CachedAnswer | None = None
    last_ts: int = 0
    values: tuple[bytes | None, ...] = (None,) * len(RECORD_FIELDS)

    def record(self) -> UserRecord:
        """Raises CorruptValue."""
        return UserRecord.decode(self.values)


class LiveTrends:
    """The trend of the speed layer, read in a thread: it takes some milliseconds of the processor, not of a caller."""

    def __init__(self, settings: RedisSettings, half_lives_hours: Sequence[float]) -> None:
        self._settings = settings
        self._redis = self._client()
        self.half_lives_hours = half_lives_hours
        self._reader = LiveTrendReader(half_lives_hours)
        self._reading: asyncio.Task[LiveTrend | None] | None = None

    @property
    def left_out(self) -> list[str]:
        """What could not be read of the trend that was read last."""
        return self._reader.left_out

    def _client(self) -> Any:
        seconds = BACKGROUND_SECONDS
        once = Retry(NoBackoff(), 0)
        return client(self._settings, socket_timeout=seconds, socket_connect_timeout=seconds, retry=once)

    async def read(self) -> TrendingValue | None:
        """None while there are no live buckets. Raises OSError, and CorruptValue when they can't be read.

        A read that Redis holds up goes on in its thread; the next call waits for the same one.
        """
        if self._reading is None:
            self._reading = asyncio.create_task(asyncio.to_thread(self._read))
        async with asyncio.timeout(BACKGROUND_SECONDS):
            await asyncio.wait([self._reading])
        reading, self._reading = self._reading, None
        found = reading.result()
        if found is None:
            return None
        scores = dict(zip(found.items, map(tuple, found.scores.tolist()), strict=True))
        return TrendingValue(found.computed_at, "", scores)

    def _read(self) -> LiveTrend | None:
        try:
            return self._reader.read(self._redis, int(time.time() * 1000))
        except RedisError as error:
            if isinstance(error, ResponseError) and WRONG_TYPE in str(error):
                raise CorruptValue(f"live trends: {error}") from error
            self._begin_anew()
            raise ConnectionError(str(error)) from error
        except Exception as error:
            self._begin_anew()  # redis-py trips over replies of unexpected types, and further ones may lie in its connections
            raise CorruptValue(f"live trends: {type(error).__name__}: {error}") from error

    def _begin_anew(self) -> None:
        self._redis.close()
        self._redis = self._client()

    def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        self._redis.close()


class Circuit(NamedTuple):
    """The breakers of all nodes: whether one is open, and how often they have opened."""

    open: bool
    opened: int


class Store:
    """Reads that never raise and never last much longer than their deadline.

    Attributes:
        topology: which Redis has whose keys.
        counts: failures, skipped calls and corrupt values since the start.
    """

    def __init__(
        self, settings: RedisSettings, ttl_seconds: int, metrics: Metrics | None = None, topology: Topology | None = None
    ) -> None:
        """`topology` is how Redis is reached, without one as the settings say. Raises OSError for files of TLS."""
        self.metrics = metrics or Metrics()
        self.counts = self.metrics.events
        self.topology = topology or topology_of(settings, self.metrics)
        self._ttl = ttl_seconds
        self._deadline = settings.timeout_ms / 1000
        self._refuses_writes = False
        self._corrupt = Seldom(log)
        self._live_fails = False

    @property
    def breaker(self) -> Circuit:
        """Of all nodes."""
        breakers = [node.breaker for node in self.topology.nodes]
        return Circuit(any(breaker.open for breaker in breakers), sum(breaker.opened for breaker in breakers))

    async def prepare(self) -> None:
        """Find out where the keys are, so that the first callers need not wait for it. Never raises."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BACKGROUND_SECONDS):
                await self.topology.find()

    def read(self, user_ids: Sequence[bytes]) -> asyncio.Future[list[Raw]]:
        """What Redis holds of some users; NOTHING for each whose server does not answer in time."""
        layout = self.topology.layout
        shard = layout.shard(user_ids[0]) if len(user_ids) == 1 or layout.slots is None else None
        if shard is None:
            return asyncio.get_running_loop().create_task(self._read_apart(user_ids))
        return shard.reader().read(user_ids)

    async def _read_apart(self, user_ids: Sequence[bytes]) -> list[Raw]:
        """Users of several shards, each asked for its own; those whose shard is not known once it is, within the deadline."""
        if any(self.topology.layout.shard(user_id) is None for user_id in user_ids):
            self.topology.look_soon()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._deadline):
                    await self.topology.find()
        parts: dict[int, tuple[Shard, list[int]]] = {}
        for at, user_id in enumerate(user_ids):
            shard = self.topology.layout.shard(user_id)
            if shard is None:
                self.counts["redis_skipped"] += 1
            else:
                parts.setdefault(id(shard), (shard, []))[1].append(at)
        reads = [shard.reader().read([user_ids[at] for at in places]) for shard, places in parts.values()]
        raws = [NOTHING] * len(user_ids)
        for (_, places), found in zip(parts.values(), await asyncio.gather(*reads), strict=True):
            for at, raw in zip(places, found, strict=True):
                raws[at] = raw
        return raws

    def state(self, user_id: str, raw: Raw) -> UserState:
        """A user's state from what `read` gave; values that can't be read are counted and passed over."""
        record, answer = raw
        if not _is_record(record):
            self.note_corrupt(user_key(user_id), _unexpected(record))
            record = NOTHING[0]
        decoded = None
        try:
            if type(answer) is bytes:
                decoded = CachedAnswer.decode(answer)
            elif answer is not None:
                raise _unexpected(answer)
        except CorruptValue as error:
            self.note_corrupt(recs_key(user_id), error)
        try:
            last_ts = int(record[LAST_TS_AT] or 0)
        except ValueError as error:
            self.note_corrupt(user_key(user_id), error)
            last_ts = 0
        return UserState(decoded, last_ts, tuple(record))

    def note_corrupt(self, key: str, error: Exception) -> None:
        """Count a value that can't be read, and tell of it now and then."""
        self.counts["corrupt_values"] += 1
        self._corrupt.warn("Redis key %r can't be read and is passed over: %s", key, error)

    async def write_answers(self, answers: Iterable[tuple[str, bytes]]) -> None:
        """Write encoded answers by user id, each beside the record that it was made from; a failure is counted."""
        parts: dict[int, tuple[Node, list[tuple[str, bytes]]]] = {}
        for user_id, value in answers:
            shard = self.topology.layout.shard(user_id.encode())
            if shard is None:
                self.counts["redis_skipped"] += 1
            else:
                parts.setdefault(id(shard.master), (shard.master, []))[1].append((user_id, value))
        started = time.perf_counter()
        writes = [self._write(node, some) for node, some in parts.values()]
        # A single one needs no task of its own.
        refused = [await writes[0]] if len(writes) == 1 else await asyncio.gather(*writes)
        self.metrics.steps["write"].observe(time.perf_counter() - started)
        self._note_refused([error for errors in refused for error in errors])

    async def _write(self, node: Node, answers: list[tuple[str, bytes]]) -> list[ReplyError]:
        """The error replies."""
        a_call = 1 if self.topology.layout.slots is not None else ANSWERS_A_CALL
        commands = [words_of(call) for call in put_answers(answers, self._ttl, True, a_call)]
        replies = await node.call(commands) or []
        unknown = [words for words, reply in zip(commands, replies, strict=False) if _is_unknown_script(reply)]
        if unknown:
            text = PUT_ANSWERS.text.encode()
            again = await node.call([(b"EVAL", text, *words[2:]) for words in unknown]) or []
            replies = [reply for reply in replies if not _is_unknown_script(reply)] + again
        return [reply for reply in replies if type(reply) is ReplyError]

    def _note_refused(self, refused: list[ReplyError]) -> None:
        self.counts["redis_failures"] += len(refused)
        if refused:
            self.topology.look_soon()
            if not self._refuses_writes:
                log.warning("Redis takes no answers (%s); they are computed again and again", refused[0])
        self._refuses_writes = bool(refused)

    async def trending(self) -> TrendingValue | None:
        """What is trending, None when there is nothing or it can't be read."""
        key = TRENDING_KEY.encode()
        shard = self.topology.layout.shard(key)
        if shard is None:
            self.topology.look_soon()
            return None
        replies = await shard.master.call([(b"GET", key)])
        value = replies[0] if replies else None
        if type(value) is ReplyError and not of_the_value(value):
            shard.master.note_failure(RespError(meaning(value)))
            return None
        try:
            if value is not None and type(value) is not bytes:
                raise _unexpected(value)
            return None if value is None else TrendingValue.decode(value)
        except CorruptValue as error:
            self.note_corrupt(TRENDING_KEY, error)
            return None

    async def follow_trending(
        self, seconds: float, on_change: Callable[[TrendingValue], Awaitable[None]], live: LiveTrends | None = None
    ) -> None:
        """Look every `seconds` and pass on what is new; the last known value stays in use while there is none.

        `live` goes first, with what the hourly value knows beyond it; while it has nothing the hourly value is used.
        """
        known: TrendingValue | None = None
        while True:
            try:
                found = await self._live_trending(live)
                hourly = await self.trending()
                found = with_hourly(found, hourly, live.half_lives_hours) if found and live else hourly
                if found is not None and found != known:
                    await on_change(found)
                    known = found
            except Exception:
                self.counts["unexpected_failures"] += 1
                log.exception("a trend could not be taken; the last known one stays in use")
            await asyncio.sleep(seconds)

    async def _live_trending(self, live: LiveTrends | None) -> TrendingValue | None:
        """None when there is none. That Redis does not answer is told of by the breakers of its nodes."""
        if live is None:
            return None
        try:
            found = await live.read()
        except CorruptValue as error:
            self.note_corrupt("trend:*", error)
            return None
        except OSError as error:
            self.counts["redis_failures"] += 1
            if not self._live_fails:
                log.info("the live trends can't be read (%s); the last known ones stay in use", error)
            self._live_fails = True
            return None
        self._live_fails = False
        if live.left_out:
            self.note_corrupt("trend:*", CorruptValue(f"left out of the live trends: {', '.join(live.left_out[:5])}"))
        return found

    async def close(self) -> None:
        await self.topology.close()


def _is_record(reply: object) -> bool:
    """Whether a reply is one of HMGET with RECORD_FIELDS."""
    return (
        isinstance(reply, list | tuple)
        and len(reply) == len(RECORD_FIELDS)
        and all(value is None or type(value) is bytes for value in reply)
    )


def _unexpected(reply: object) -> CorruptValue:
    return CorruptValue(str(reply) if type(reply) is ReplyError else f"Redis answers with {type(reply).__name__}")


def _is_unknown_script(reply: object) -> bool:
    return type(reply) is ReplyError and str(reply).startswith("NOSCRIPT")
