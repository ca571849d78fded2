"""A prepared batch into Redis: users' records and trend buckets in one pipeline, what is half known again in part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recsys_core.events import MINUTE_MS
from recsys_core.live import UPDATE, Batch, UserUpdates, UserWriter, not_yet_applied, user_updates
from recsys_core.live_trends import COUNT, BucketCounts, TrendWriter
from recsys_core.redis_client import run_calls
from recsys_core.settings import Settings

SCRIPTS = (UPDATE, COUNT)


@dataclass(frozen=True)
class Prepared:
    """A batch with what it adds to users and buckets."""

    batch: Batch
    users: UserUpdates
    counts: list[BucketCounts]
    user_calls: list[tuple[object, ...]]
    count_calls: list[tuple[object, ...]]


class RedisSink:
    """Applies batches. `area` sets a rebuild's records and buckets apart from the live ones."""

    def __init__(self, redis: Any, settings: Settings, area: str = "") -> None:
        self.redis = redis
        self._keep = settings.ranking.last_items
        self._gap_ms = settings.events.session_gap_minutes * MINUTE_MS
        self._users = UserWriter(redis, settings, f"{area}user")
        self._trends = TrendWriter(settings, f"{area}trend")

    def prepare(self, batch: Batch, sources: Mapping[int, str], now_ms: int) -> Prepared | None:
        """Sum a batch up and make its calls; None for an empty one."""
        if not batch.rows:
            return None
        users = user_updates(batch, self._keep, self._gap_ms)
        counts = self._trends.counts(batch, now_ms)
        return Prepared(batch, users, counts, self._users.calls(users, sources, now_ms), self._trends.calls(counts, sources))

    def apply(self, prepared: Prepared, sources: Mapping[int, str], now_ms: int) -> int:
        """Make the calls. Returns how many updates had been applied before. Raises redis.RedisError: apply it again."""
        answers = run_calls(self.redis, [*prepared.user_calls, *prepared.count_calls], SCRIPTS)
        split = len(prepared.user_calls)
        ignored, behind = self._users.behind(prepared.users, answers[:split])
        while behind:
            batch = not_yet_applied(prepared.batch, behind)
            users = user_updates(batch, self._keep, self._gap_ms)
            answers_again = run_calls(self.redis, self._users.calls(users, sources, now_ms), SCRIPTS)
            more, behind = self._users.behind(users, answers_again)
            ignored += more + 1
        more, late = self._trends.behind(prepared.counts, answers[split:])
        ignored += more
        while late:
            batch = self._trends.not_yet_applied(prepared.batch, late)
            counts = self._trends.counts(batch, now_ms)
            again = run_calls(self.redis, self._trends.calls(counts, sources), SCRIPTS)
            more, late = self._trends.behind(counts, again)
            ignored += more + 1
        return ignored
