"""Computed answers: requests that wait together are ranked together, in a thread, never on the event loop.

While a batch is ranked the next one gathers, so that an idle process adds no wait and a busy one makes larger batches;
the wait is bounded by one batch and by the caller's deadline.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from recsys_core.index import one_faiss_thread
from recsys_core.online import UserRecord
from serving.breaker import Breaker
from serving.champion import Loaded
from serving.metrics import Metrics
from serving.validation import Options

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Computed:
    """A ranked answer.

    Attributes:
        response: for the caller.
        value: for the cache, None when the answer is not the user's plain one.
        tier: how it was made.
    """

    response: bytes
    value: bytes | None
    tier: int


@dataclass(frozen=True)
class Batch:
    """Users that are ranked in one go.

    Attributes:
        loaded: the release.
        options: shared by all, but for what is excluded.
        user_ids: whom to rank for.
        records: of the users.
        excluded: further item ids of each user.
        now: ms since 1970.
    """

    loaded: Loaded
    options: Options
    user_ids: Sequence[str]
    records: Sequence[UserRecord]
    excluded: Sequence[Sequence[str]]
    now: int


@dataclass(eq=False)
class _Job:
    loaded: Loaded
    options: Options
    user_ids: Sequence[str]
    records: Sequence[UserRecord]
    now: int
    result: asyncio.Future[list[Computed]]
    key: object = field(default=None)


class TooSlow(TimeoutError):
    """No computed answer in time."""


class Ranker:
    """A thread that ranks, and the queue before it."""

    def __init__(
        self, name: str, work: Callable[[Batch], list[Computed]], seconds: float, max_users: int, metrics: Metrics
    ) -> None:
        self._thread = ThreadPoolExecutor(1, name, initializer=one_faiss_thread)
        self._work = work
        self._seconds = seconds
        self._max_users = max_users
        self._metrics = metrics
        self._waiting: list[_Job] = []
        self._running: asyncio.Task[None] | None = None
        self.breaker = Breaker(f"ranking ({name})")

    async def compute(
        self,
        loaded: Loaded,
        options: Options,
        user_ids: Sequence[str],
        records: Sequence[UserRecord],
        now: int,
        remaining: float | None,
    ) -> list[Computed]:
        """Ranked answers in the order of the records. Raises TooSlow, and what ranking raises.

        `remaining` are the seconds that the caller still waits, None when it does not say.
        """
        if not self.breaker.allows():
            self._metrics.events["ranking_skipped"] += len(records)
            raise TooSlow("ranking is too slow at the moment")
        result: asyncio.Future[list[Computed]] = asyncio.get_running_loop().create_future()
        job = _Job(loaded, options, user_ids, records, now, result, _shared(loaded, options))
        self._waiting.append(job)
        if self._running is None:
            self._running = asyncio.create_task(self._drain())
        own = self._seconds if remaining is None else min(self._seconds, remaining)
        try:
            async with asyncio.timeout(own):
                return await job.result
        except TimeoutError as error:
            self._metrics.events["late_rankings"] += 1
            if own == self._seconds:
                self.breaker.failed(error)
            raise TooSlow(f"ranking {len(records)} users took longer than {own:.3f} s") from error

    async def run(self, work: Callable[[], T], remaining: float | None) -> T:
        """Some other work over a release in the same thread. Raises TooSlow."""
        own = self._seconds if remaining is None else min(self._seconds, remaining)
        try:
            async with asyncio.timeout(own):
                return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except TimeoutError as error:
            raise TooSlow("the deadline of this answer's computation has passed") from error

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while jobs := self._next():
                batch = Batch(
                    loaded=jobs[0].loaded,
                    options=jobs[0].options,
                    user_ids=[user_id for job in jobs for user_id in job.user_ids],
                    records=[record for job in jobs for record in job.records],
                    excluded=[job.options.excluded for job in jobs for _ in job.records],
                    now=jobs[0].now,
                )
                started = time.perf_counter()
                try:
                    computed = await loop.run_in_executor(self._thread, self._work, batch)
                except Exception as error:  # noqa: BLE001
                    self._failed(jobs, error)
                    continue
                self._metrics.steps["rank"].observe(time.perf_counter() - started)
                self.breaker.succeeded()
                at = 0
                for job in jobs:
                    if not job.result.done():
                        job.result.set_result(computed[at : at + len(job.records)])
                    at += len(job.records)
        finally:
            self._running = None

    def _failed(self, jobs: Sequence[_Job], error: Exception) -> None:
        for job in jobs:
            if not job.result.done():
                job.result.set_exception(error)

    def _next(self) -> list[_Job]:
        """The oldest job that is still waited for, and those that can share its batch."""
        self._waiting = [job for job in self._waiting if not job.result.done()]
        if not self._waiting:
            return []
        first = self._waiting[0]
        taken, left, users = [first], [], len(first.records)
        for job in self._waiting[1:]:
            if job.key == first.key and users + len(job.records) <= self._max_users:
                taken.append(job)
                users += len(job.records)
            else:
                left.append(job)
        self._waiting = left
        return taken

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        for job in self._waiting:
            job.result.cancel()


def _shared(loaded: Loaded, options: Options) -> object:
    """What jobs must have in common to be ranked together. Plain ones, the many, are told by their count alone."""
    if options.plain:
        return id(loaded), options.count
    context = options.context
    return (
        id(loaded),
        options.count,
        options.filter,
        context.device,
        context.country,
        context.ts_ms,
        bool(context.current_item),
        options.diversity,
        options.include_consumed,
        options.explain,
        len(options.excluded),
    )
