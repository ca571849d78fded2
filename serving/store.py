"""Users' states and trends from Redis: one round trip with a deadline, and no round trip while Redis is down."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

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
from recsys_core.settings import RedisSettings

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 16
MAX_CALLS = 128
"""Calls that share one round trip."""
TIMEOUTS_TO_OPEN = 3
PAUSE_SECONDS = 0.5
BACKGROUND_SECONDS = 1.0
"""Deadline of what no caller waits for: trends and write-back."""

T = TypeVar("T")
_LAST_TS_AT = RECORD_FIELDS.index(LAST_TS)


class Breaker:
    """Whether Redis is worth a call. Refused connections open it at once, timeouts when some come in a row.

    While it is open one call in PAUSE_SECONDS goes through as a probe; its success closes it.
    """

    def __init__(self) -> None:
        self.open = False
        self._timeouts = 0
        self._probe_at = 0.0

    def allows(self) -> bool:
        """Whether to call now."""
        if not self.open:
            return True
        now = time.monotonic()
        if now < self._probe_at:
            return False
        self._probe_at = now + PAUSE_SECONDS
        return True

    def succeeded(self) -> None:
        if self.open:
            log.info("Redis answers again")
        self.open = False
        self._timeouts = 0

    def failed(self, error: Exception) -> None:
        self._timeouts += 1
        if isinstance(error, TimeoutError) and self._timeouts < TIMEOUTS_TO_OPEN:
            return
        if not self.open:
            log.warning("Redis does not answer (%s: %s); answers come from lower tiers", type(error).__name__, error)
        self.open = True
        self._probe_at = time.monotonic() + PAUSE_SECONDS


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


_Read = tuple[Sequence[str], asyncio.Future[list[UserState]]]


class Store:
    """Reads that never raise and never last longer than their deadline.

    Attributes:
        counts: failures, skipped calls and corrupt values since the start.
    """

    def __init__(self, settings: RedisSettings, ttl_seconds: int) -> None:
        pool = BlockingConnectionPool.from_url(
            settings.url,
            max_connections=MAX_CONNECTIONS,
            timeout=None,
            socket_timeout=None,
            socket_connect_timeout=None,
            retry=Retry(NoBackoff(), 0),
        )
        self._redis: Redis = Redis.from_pool(pool)
        self._deadline = settings.timeout_ms / 1000
        self._ttl = ttl_seconds
        self._breaker = Breaker()
        self._waiting: list[_Read] = []
        self._reader: asyncio.Task[None] | None = None
        self.counts: Counter[str] = Counter()

    async def read(self, user_ids: Sequence[str]) -> list[UserState]:
        """The states of some users; empty ones when Redis does not answer in time.

        Calls that wait at the same time share one round trip, so that a busy process makes fewer and larger ones.
        """
        states: asyncio.Future[list[UserState]] = asyncio.get_running_loop().create_future()
        self._waiting.append((user_ids, states))
        if self._reader is None:
            self._reader = asyncio.create_task(self._read_waiting())
        return await states

    async def _read_waiting(self) -> None:
        try:
            while self._waiting:
                taken, self._waiting = self._waiting[:MAX_CALLS], self._waiting[MAX_CALLS:]
                await self._read_together(taken)
        finally:
            self._reader = None

    async def _read_together(self, calls: Sequence[_Read]) -> None:
        try:
            states = iter(await self._read_all([user_id for user_ids, _ in calls for user_id in user_ids]))
            results = [list(islice(states, len(user_ids))) for user_ids, _ in calls]
        except Exception as error:
            log.exception("reading from Redis failed")
            for _, future in calls:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), result in zip(calls, results, strict=True):
            if not future.done():
                future.set_result(result)

    async def _read_all(self, user_ids: Sequence[str]) -> list[UserState]:
        pipeline = self._redis.pipeline(transaction=False)
        for user_id in user_ids:
            pipeline.hmget(user_key(user_id), RECORD_FIELDS)
            pipeline.get(recs_key(user_id))
        values = await self._call(lambda: pipeline.execute(raise_on_error=False), self._deadline)
        if values is None:
            return [UserState()] * len(user_ids)
        return [self._state(u, r, a) for u, r, a in zip(user_ids, values[::2], values[1::2], strict=True)]

    def _state(self, user_id: str, record: Any, answer: Any) -> UserState:
        if isinstance(record, ResponseError):
            self.note_corrupt(user_key(user_id), record)
            record = UserState().values
        try:
            decoded = None if answer is None else CachedAnswer.decode(_bytes(answer))
        except CorruptValue as error:
            self.note_corrupt(recs_key(user_id), error)
            decoded = None
        try:
            last_ts = int(record[_LAST_TS_AT] or 0)
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
        pipeline = self._redis.pipeline(transaction=False)
        for user_id, value in answers:
            pipeline.set(recs_key(user_id), value, ex=self._ttl)
        await self._call(pipeline.execute, BACKGROUND_SECONDS)

    async def trending(self) -> TrendingValue | None:
        """What is trending, None when there is nothing or it can't be read."""
        value = await self._call(lambda: self._redis.get(TRENDING_KEY), BACKGROUND_SECONDS)
        try:
            return None if value is None else TrendingValue.decode(_bytes(value))
        except CorruptValue as error:
            self.note_corrupt(TRENDING_KEY, error)
            return None

    async def follow_trending(self, seconds: float, on_change: Callable[[TrendingValue], Awaitable[None]]) -> None:
        """Look every `seconds` and pass on what is new; the last known value stays in use while there is none."""
        known: TrendingValue | None = None
        while True:
            found = await self.trending()
            if found is not None and found != known:
                await on_change(found)
                known = found
            await asyncio.sleep(seconds)

    async def _call(self, call: Callable[[], Awaitable[T]], deadline: float) -> T | None:
        if not self._breaker.allows():
            self.counts["redis_skipped"] += 1
            return None
        try:
            async with asyncio.timeout(deadline):
                result = await call()
        except (RedisError, OSError) as error:
            self.counts["redis_failures"] += 1
            self._breaker.failed(error)
            return None
        self._breaker.succeeded()
        return result

    async def close(self) -> None:
        await self._redis.aclose()
        await self._redis.connection_pool.disconnect()


def _bytes(value: Any) -> bytes:
    if isinstance(value, ResponseError):
        raise CorruptValue(str(value))
    return bytes(value)
