"""A prepared batch into Redis: users' records and trend buckets in one pipeline, what is half known again in part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recsys_core.events import MINUTE_MS
from recsys_core.live import (
    UPDATE,
    Batch,
    Guard,
    LiveEvent,
    UserUpdates,
    UserWriter,
    few_user_updates,
    not_yet_applied,
    user_updates,
)
from recsys_core.live_trends import COUNT, BucketCounts, TrendWriter
from recsys_core.redis_client import is_cluster, run_calls
from recsys_core.settings import Settings
from streaming.connections import PinnedConnection
from streaming.progress import StateLost, applied_key, check_kept

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
        self._connection = None if is_cluster(redis) else PinnedConnection(redis)

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

    def apply_few(
        self, events: Sequence[LiveEvent], sources: Mapping[int, str], known: Mapping[int, int], now_ms: int
    ) -> int | None:
        """Apply a handful of events in one round trip, by one thread. Returns what `apply` returns, None when `apply` has to do
        it because some of it is half known.

        `known` are the positions that Redis is known to have had, by partition. Raises StateLost when it is behind of one of
        them, with nothing of that partition changed, and redis.RedisError: apply them again then.
        """
        users = few_user_updates(events, self._keep, self._gap_ms)
        counts = self._trends.few_counts(events, now_ms)
        # Keys of a cluster's call lie in one slot, where those of positions are not.
        guards = None if self._connection is None else {n: Guard(applied_key(sources[n]), known[n]) for n in known}
        calls = self._users.calls(users, sources, now_ms, guards)
        split = len(calls)
        calls += self._trends.calls(counts, sources, guards)
        if self._connection is None:
            check_kept(self.redis, {sources[number]: offset for number, offset in known.items()})
            answers = run_calls(self.redis, calls, SCRIPTS)
        else:
            answers = self._connection.run(calls, SCRIPTS)
            if any(answer[0] < 0 for answer in answers):
                raise StateLost(f"Redis is behind of the positions {dict(known)} that it had")
        ignored, behind = self._users.behind(users, answers[:split])
        more, late = self._trends.behind(counts, answers[split:])
        return None if behind or late else ignored + more

    def close(self) -> None:
        """Give up the connection of `apply_few`."""
        if self._connection is not None:
            self._connection.close()
