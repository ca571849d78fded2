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
from recsys_core.online import LAST_ACTIONS
from recsys_core.redis_client import is_cluster, run_calls
from recsys_core.settings import Settings
from streaming.connections import PinnedConnection
from streaming.progress import ADVANCE, StateLost, advance_calls, applied_key, check_kept

SCRIPTS = (UPDATE, COUNT, ADVANCE)


@dataclass(frozen=True)
class Prepared:
    """A batch with what it adds to users and buckets."""

    batch: Batch
    users: UserUpdates
    counts: list[BucketCounts]
    user_calls: list[tuple[object, ...]]
    count_calls: list[tuple[object, ...]]


class RedisSink:
    """Applies batches. `area` sets a rebuild's records and buckets apart from the live ones, and its batches from positions.

    On a Redis that is no cluster each call asks whether the position of its partition is still there, and the position
    follows the data on the same connection, which one thread keeps.
    """

    def __init__(self, redis: Any, settings: Settings, area: str = "") -> None:
        self.redis = redis
        self._gap_ms = settings.events.session_gap_minutes * MINUTE_MS
        self._ttl = settings.cache.feature_ttl_seconds
        self._users = UserWriter(redis, settings, f"{area}user")
        self._trends = TrendWriter(settings, f"{area}trend")
        self._connection = None if area or is_cluster(redis) else PinnedConnection(redis)

    @property
    def follows(self) -> bool:
        """Whether positions follow each batch."""
        return self._connection is not None

    def prepare(self, batch: Batch, sources: Mapping[int, str], now_ms: int) -> Prepared | None:
        """Sum a batch up and make its calls; None for an empty one."""
        if not batch.rows:
            return None
        users = user_updates(batch, LAST_ACTIONS, self._gap_ms)
        counts = self._trends.counts(batch, now_ms)
        guards = self._guards(sources, {})
        user_calls = self._users.calls(users, sources, now_ms, guards)
        return Prepared(batch, users, counts, user_calls, self._trends.calls(counts, sources, guards))

    def apply(
        self,
        prepared: Prepared,
        sources: Mapping[int, str],
        now_ms: int,
        known: Mapping[int, int] | None = None,
        upto: Mapping[int, int] | None = None,
    ) -> int:
        """Make the calls. Returns how many updates had been applied before. Raises redis.RedisError: apply it again.

        `known` are the positions that Redis is known to have had, by partition: raises StateLost when it is behind of one of
        them. `upto` are those that it has with this batch.
        """
        known = known or {}
        if self._connection is None and known:
            check_kept(self.redis, {sources[number]: offset for number, offset in known.items()})
        guards = self._guards(sources, known)
        calls = [*prepared.user_calls, *prepared.count_calls]
        if guards:
            at = {guards[number].key: offset for number, offset in known.items()}
            calls = [_knowing(call, at) for call in calls]
        answers = self._run(calls)
        split = len(prepared.user_calls)
        ignored, behind = self._users.behind(prepared.users, answers[:split])
        while behind:
            batch = not_yet_applied(prepared.batch, behind)
            users = user_updates(batch, LAST_ACTIONS, self._gap_ms)
            answers_again = self._run(self._users.calls(users, sources, now_ms, guards))
            more, behind = self._users.behind(users, answers_again)
            ignored += more + 1
        more, late = self._trends.behind(prepared.counts, answers[split:])
        ignored += more
        while late:
            batch = self._trends.not_yet_applied(prepared.batch, late)
            counts = self._trends.counts(batch, now_ms)
            again = self._run(self._trends.calls(counts, sources, guards))
            more, late = self._trends.behind(counts, again)
            ignored += more + 1
        if upto and self.follows:
            self._run(self._advance(sources, known, upto))
        return ignored

    def apply_few(
        self,
        events: Sequence[LiveEvent],
        sources: Mapping[int, str],
        known: Mapping[int, int],
        now_ms: int,
        upto: Mapping[int, int] | None = None,
    ) -> int | None:
        """Apply a handful of events in one round trip, by one thread. Returns what `apply` returns, None when `apply` has to do
        it because some of it is half known.

        `known` and `upto` as for `apply`. Raises StateLost when Redis is behind, with nothing of that partition changed, and
        redis.RedisError: apply them again then.
        """
        users = few_user_updates(events, LAST_ACTIONS, self._gap_ms)
        counts = self._trends.few_counts(events, now_ms)
        guards = self._guards(sources, known)
        calls = self._users.calls(users, sources, now_ms, guards)
        split = len(calls)
        calls += self._trends.calls(counts, sources, guards)
        end = len(calls)
        if self._connection is None:
            check_kept(self.redis, {sources[number]: offset for number, offset in known.items()})
        elif upto:
            calls += self._advance(sources, known, upto)
        answers = self._run(calls)
        ignored, behind = self._users.behind(users, answers[:split])
        more, late = self._trends.behind(counts, answers[split:end])
        return None if behind or late else ignored + more

    def wait(self, replicas: int, seconds: float) -> int:
        """How many replicas have what was applied, at least `replicas` unless they take longer. Not for a cluster."""
        assert self._connection is not None
        return int(self._connection.run([("WAIT", replicas, int(seconds * 1000))], [])[0])

    def close(self) -> None:
        """Give up the connection of its thread."""
        if self._connection is not None:
            self._connection.close()

    def _guards(self, sources: Mapping[int, str], known: Mapping[int, int]) -> dict[int, Guard] | None:
        """What calls of each partition ask for. Keys of a cluster's call lie in one slot, where those of positions are not."""
        if not self.follows:
            return None
        return {number: Guard(applied_key(source), known.get(number, 0)) for number, source in sources.items()}

    def _advance(
        self, sources: Mapping[int, str], known: Mapping[int, int], upto: Mapping[int, int]
    ) -> list[tuple[object, ...]]:
        ahead = {sources[number]: offset for number, offset in upto.items()}
        return advance_calls(ahead, {sources[number]: offset for number, offset in known.items()}, self._ttl)

    def _run(self, calls: Sequence[tuple[object, ...]]) -> list[Any]:
        if self._connection is None:
            return run_calls(self.redis, calls, SCRIPTS)
        answers = self._connection.run(calls, SCRIPTS)
        if any(answer[0] < 0 for answer in answers):
            raise StateLost("Redis is behind of the positions that it had")
        return answers


def _knowing(call: tuple[Any, ...], known: Mapping[str, int]) -> tuple[Any, ...]:
    """A call that was made before its position was known, with the position that its last key has to have reached."""
    at = 3 + call[2]
    offset = known.get(call[at - 1], 0)
    return (*call[:at], offset, *call[at + 1 :]) if offset else call
