"""Users' states and trends from Redis: one round trip with a deadline, and no round trip while Redis is down."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from hiredis import ReplyError
from redis.exceptions import RedisError, ResponseError

from recsys_core.live_trends import LiveTrendReader, with_hourly
from recsys_core.online import (
    LAST_TS,
    RECORD_FIELDS,
    TRENDING_KEY,
    CachedAnswer,
    CorruptValue,
    TrendingValue,
    UserRecord,
    recs_key,
    user_key,
)
from recsys_core.redis_client import async_client, client
from recsys_core.settings import RedisSettings
from serving.breaker import Breaker
from serving.crowd import Crowd
from serving.metrics import Metrics
from serving.resp import Login, Pipelined, ThroughClient

log = logging.getLogger(__name__)

MAX_USERS = 512
"""Users read in one round trip."""
GATHER_SECONDS = 0.002
GATHERED_USERS = 32
"""While callers queue, a read waits this long for others to share its round trip, or until it is for so many users."""
BACKGROUND_SECONDS = 1.0
"""Deadline of what no caller waits for: trends and write-back."""

T = TypeVar("T")
Raw = tuple[Any, Any]
"""The replies for a user: values of RECORD_FIELDS, and the cached answer."""
NOTHING: Raw = ((None,) * len(RECORD_FIELDS), None)
ERRORS = (ReplyError, ResponseError)
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


class _Read:
    """Calls that share a round trip; takes its replies."""

    __slots__ = ("calls", "ended", "started", "store", "timer")

    def __init__(self, store: Store, calls: list[tuple[int, asyncio.Future[list[Raw]]]]) -> None:
        self.store = store
        self.calls = calls
        self.started = time.perf_counter()
        self.timer: asyncio.TimerHandle | None = None
        self.ended = False

    def __call__(self, replies: list[Any] | None, error: Exception | None) -> None:
        """The replies, or why there are none."""
        if self.ended:
            return
        self.ended = True
        if self.timer is not None:
            self.timer.cancel()
        self.store.metrics.steps["redis"].observe(time.perf_counter() - self.started)
        if replies is None:
            self.store.note_failure(error or TimeoutError("no answer in time"))
            self.give_nothing()
        else:
            self.store.breaker.succeeded()
            self.give(replies)
        self.store.ended()

    def give(self, replies: list[Any]) -> None:
        at = 0
        for users, future in self.calls:
            if not future.done():
                future.set_result([(replies[i], replies[i + 1]) for i in range(at, at + 2 * users, 2)])
            at += 2 * users

    def late(self) -> None:
        self(None, TimeoutError("no answer in time"))

    def give_nothing(self) -> None:
        for users, future in self.calls:
            if not future.done():
                future.set_result([NOTHING] * users)


def reader(settings: RedisSettings) -> Pipelined | ThroughClient:
    """How the users' states are read: pipelined from one server, through redis-py from a Cluster or by Sentinel.

    Raises OSError when a file for TLS can't be read.
    """
    if settings.mode != "standalone":
        return ThroughClient(async_client(settings), RECORD_FIELDS)
    password = settings.password.get_secret_value()
    login = Login(settings.username, password, settings.ca_file, settings.cert_file, settings.key_file)
    return Pipelined(settings.url, RECORD_FIELDS, login)


class LiveTrends:
    """The trend of the speed layer, read in a thread: it takes some milliseconds of the processor, not of a caller."""

    def __init__(self, settings: RedisSettings, half_lives_hours: Sequence[float]) -> None:
        self._redis = client(settings, socket_timeout=BACKGROUND_SECONDS)
        self.half_lives_hours = half_lives_hours
        self._reader = LiveTrendReader(half_lives_hours)

    async def read(self) -> TrendingValue | None:
        """None while there are no live buckets. Raises OSError, and CorruptValue when they can't be read."""
        try:
            found = await asyncio.to_thread(self._reader.read, self._redis, int(time.time() * 1000))
        except (ResponseError, ValueError, TypeError) as error:
            raise CorruptValue(f"live trends: {error}") from error
        except RedisError as error:
            raise ConnectionError(str(error)) from error
        if found is None:
            return None
        scores = dict(zip(found.items, map(tuple, found.scores.tolist()), strict=True))
        return TrendingValue(found.computed_at, "", scores)

    def close(self) -> None:
        self._redis.close()


class Store:
    """Reads that never raise and never last longer than their deadline.

    Attributes:
        breaker: of Redis.
        counts: failures, skipped calls and corrupt values since the start.
        crowd: tells whether callers queue; without one no read waits for others.
    """

    def __init__(
        self,
        settings: RedisSettings,
        ttl_seconds: int,
        metrics: Metrics | None = None,
        redis: Pipelined | ThroughClient | None = None,
    ) -> None:
        """`redis` is how it is reached, without one by a pipelined connection to the server at `settings.url`."""
        self.metrics = metrics or Metrics()
        self.counts = self.metrics.events
        self.breaker = Breaker("Redis")
        self._redis: Pipelined | ThroughClient = redis or reader(settings)
        self._deadline = settings.timeout_ms / 1000
        self._ttl = ttl_seconds
        self._waiting: list[tuple[Sequence[bytes], asyncio.Future[list[Raw]]]] = []
        self._waiting_since = 0.0
        self._under_way = 0
        self._gathering: asyncio.TimerHandle | None = None
        self._refuses_writes = False
        self.crowd: Crowd | None = None

    def read(self, user_ids: Sequence[bytes]) -> asyncio.Future[list[Raw]]:
        """What Redis holds of some users; NOTHING for each when it does not answer in time.

        Calls that come while a round trip is under way share the next one. Of callers that queue most would come too late
        for that, because gRPC hands their calls over one by one: then a round trip waits for some of them.
        """
        loop = asyncio.get_running_loop()
        found: asyncio.Future[list[Raw]] = loop.create_future()
        if not self._waiting:
            self._waiting_since = time.perf_counter()
        self._waiting.append((user_ids, found))
        if not self._under_way:
            self._send_or_gather()
        return found

    def ended(self) -> None:
        """A round trip is over: send what has come meanwhile."""
        self._under_way -= 1
        if self._waiting and not self._under_way:
            self._send_or_gather()

    def _send_or_gather(self) -> None:
        if self._gathering is None:
            if self.crowd is not None and self.crowd.crowded():
                self._gathering = asyncio.get_running_loop().call_later(GATHER_SECONDS, self._gathered)
            else:
                self._send_waiting()
        elif sum(len(user_ids) for user_ids, _ in self._waiting) >= GATHERED_USERS:
            self._gathering.cancel()
            self._gathered()

    def _gathered(self) -> None:
        self._gathering = None
        if self.crowd is not None:
            self.crowd.gathered(len(self._waiting))
        self._send_waiting()

    def _send_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        while waiting:
            taken: list[tuple[Sequence[bytes], asyncio.Future[list[Raw]]]] = []
            users: list[bytes] = []
            while waiting and (not taken or len(users) + len(waiting[0][0]) <= MAX_USERS):
                call = waiting.pop(0)
                if not call[1].done():
                    taken.append(call)
                    users += call[0]
            if taken:
                self._send(users, [(len(user_ids), future) for user_ids, future in taken])

    def _send(self, users: list[bytes], calls: list[tuple[int, asyncio.Future[list[Raw]]]]) -> None:
        read = _Read(self, calls)
        if not self.breaker.allows():
            self.counts["redis_skipped"] += 1
            read.give_nothing()
            return
        left = self._deadline - (read.started - self._waiting_since)
        read.timer = asyncio.get_running_loop().call_later(max(0.0, left), read.late)
        self._under_way += 1
        self._redis.read(users, read)

    def note_failure(self, error: Exception) -> None:
        """Count a failed call; connections that time out again and again are given up."""
        self.counts["redis_failures"] += 1
        if self.breaker.failed(error):
            self._redis.drop()

    def state(self, user_id: str, raw: Raw) -> UserState:
        """A user's state from what `read` gave; values that can't be read are counted and passed over."""
        record, answer = raw
        if isinstance(record, ERRORS):
            self.note_corrupt(user_key(user_id), record)
            record = NOTHING[0]
        decoded = None
        try:
            if isinstance(answer, ERRORS):
                raise CorruptValue(str(answer))
            decoded = None if answer is None else CachedAnswer.decode(answer)
        except CorruptValue as error:
            self.note_corrupt(recs_key(user_id), error)
        try:
            last_ts = int(record[LAST_TS_AT] or 0)
        except ValueError as error:
            self.note_corrupt(user_key(user_id), error)
            last_ts = 0
        return UserState(decoded, last_ts, tuple(record))

    def note_corrupt(self, key: str, error: Exception) -> None:
        """Log and count a value that can't be read."""
        self.counts["corrupt_values"] += 1
        log.warning("Redis key %s can't be read and is passed over: %s", key, error)

    async def write_answers(self, answers: Iterable[tuple[str, bytes]]) -> None:
        """Write encoded answers by user id; a failure is counted."""
        ttl = b"%d" % self._ttl
        commands = [(b"SET", recs_key(user_id).encode(), value, b"EX", ttl) for user_id, value in answers]
        started = time.perf_counter()
        replies = await self._call(lambda: self._redis.call(commands))
        self.metrics.steps["write"].observe(time.perf_counter() - started)
        refused = [reply for reply in replies or () if isinstance(reply, ERRORS)]
        self.counts["redis_failures"] += len(refused)
        if refused and not self._refuses_writes:
            log.warning("Redis takes no answers (%s); they are computed again and again", refused[0])
        self._refuses_writes = bool(refused)

    async def trending(self) -> TrendingValue | None:
        """What is trending, None when there is nothing or it can't be read."""
        replies = await self._call(lambda: self._redis.call([(b"GET", TRENDING_KEY.encode())]))
        value = replies[0] if replies else None
        try:
            if isinstance(value, ERRORS):
                raise CorruptValue(str(value))
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
        try:
            return None if live is None else await self._call(live.read)
        except CorruptValue as error:
            self.note_corrupt("trend:*", error)
            return None

    async def _call(self, call: Callable[[], Awaitable[T]]) -> T | None:
        if not self.breaker.allows():
            self.counts["redis_skipped"] += 1
            return None
        try:
            async with asyncio.timeout(BACKGROUND_SECONDS):
                result = await call()
        except OSError as error:
            self.note_failure(error)
            return None
        self.breaker.succeeded()
        return result

    async def close(self) -> None:
        await self._redis.close()
