"""The live state computed again from the events, one by one, to compare with what Redis holds.

It shares no code with the writers but the names of keys and the text of an action: what it finds equal was reached
twice by different ways.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa

from recsys_core.events import EVENT_TYPE, ITEM_ID, MINUTE_MS, TS, USER_ID
from recsys_core.live import StreamState, fence_field
from recsys_core.live_trends import SCALE, bucket_key
from recsys_core.online import LAST, LAST_ACTIONS, LAST_TS, STREAM, action_text, user_key
from recsys_core.settings import Settings

COMPARED_AT_ONCE = 1000


@dataclass
class UserState:
    """What a user's events come to.

    Attributes:
        actions: (−time, text), the newest first.
        fences: last offset by source.
    """

    actions: list[tuple[int, bytes]] = field(default_factory=list)
    last_ts: int = 0
    events: int = 0
    session_start: int = 0
    session_events: int = 0
    fences: dict[str, int] = field(default_factory=dict)


@dataclass
class Differences:
    """What a comparison found.

    Attributes:
        compared: users and buckets that were compared.
        ahead: users and buckets that the live workers took further meanwhile; they are not compared.
        different: keys whose values differ.
    """

    compared: int = 0
    ahead: int = 0
    different: list[str] = field(default_factory=list)


class Recomputation:
    """Takes events in the order of their offsets."""

    def __init__(self, settings: Settings) -> None:
        self._gap_ms = settings.events.session_gap_minutes * MINUTE_MS
        self._bucket_ms = settings.stream.bucket_minutes * MINUTE_MS
        self._weights = settings.events.weights
        self.users: dict[str, UserState] = {}
        self.buckets: dict[tuple[str, int], Counter[str]] = {}
        self.bucket_fences: dict[tuple[str, int], int] = {}

    def add(self, events: pa.Table, source: str, offsets: Sequence[int], arrived: Sequence[int] | None = None) -> None:
        """Add events (EVENT_SCHEMA) of one source in the order of their `offsets`; `arrived` as in `live.Batch`."""
        columns = [events[name].to_pylist() for name in (USER_ID, ITEM_ID, EVENT_TYPE, TS)]
        for user, item, kind, ts, offset, came in zip(*columns, offsets, arrived or columns[-1], strict=True):
            self._add_to_user(self.users.setdefault(user, UserState()), item, kind, ts, min(ts, came))
            self.users[user].fences[source] = offset
            bucket = (source, ts // self._bucket_ms)
            self.buckets.setdefault(bucket, Counter())[item] += round(SCALE * self._weights[kind])
            self.bucket_fences[bucket] = offset

    def _add_to_user(self, state: UserState, item: str, kind: str, ts: int, moment: int) -> None:
        action = (-ts, action_text(item, kind, ts))
        if action not in state.actions:
            state.actions = sorted([*state.actions, action])[:LAST_ACTIONS]
        if state.events == 0 or moment > state.last_ts + self._gap_ms:
            state.session_start, state.session_events = moment, 0
        state.session_events += 1
        state.events += 1
        state.last_ts = max(state.last_ts, moment)

    def differences(self, redis: Any, trends_since_ms: int = 0) -> Differences:
        """Compare with Redis; buckets that began before `trends_since_ms` may have expired and are left out."""
        found = Differences()
        for some in _chunks(iter(self.users.items())):
            pipeline = redis.pipeline(transaction=False)
            for user, state in some:
                pipeline.hmget(user_key(user), LAST, LAST_TS, STREAM, *map(fence_field, state.fences))
            for (user, state), values in zip(some, pipeline.execute(), strict=True):
                self._compare_user(user, state, values, found)
        kept = ((key, counts) for key, counts in self.buckets.items() if key[1] * self._bucket_ms >= trends_since_ms)
        for chunk in _chunks(kept):
            pipeline = redis.pipeline(transaction=False)
            for (source, bucket), _ in chunk:
                pipeline.hgetall(bucket_key(source, bucket))
            for (key, counts), values in zip(chunk, pipeline.execute(), strict=True):
                self._compare_bucket(key, counts, values, found)
        return found

    def _compare_user(self, user: str, state: UserState, values: Sequence[bytes | None], found: Differences) -> None:
        last, last_ts, stream, *fences = values
        applied = [-1 if fence is None else int(fence) for fence in fences]
        if any(is_at > known for is_at, known in zip(applied, state.fences.values(), strict=True)):
            found.ahead += 1
            return
        found.compared += 1
        try:
            counted = StreamState.decode(stream)
        except struct.error:
            counted = StreamState()
        same = (
            applied == list(state.fences.values())
            and last == b"[" + b",".join(text for _, text in state.actions) + b"]"
            and last_ts == str(state.last_ts).encode()
            and counted == StreamState(state.events, state.session_start, state.session_events)
        )
        if not same:
            found.different.append(user_key(user))

    def _compare_bucket(
        self, key: tuple[str, int], counts: Counter[str], values: dict[bytes, bytes], found: Differences
    ) -> None:
        has = {name.decode(): int(value) for name, value in values.items()}
        fence = has.pop("", -1)
        if fence > self.bucket_fences[key]:
            found.ahead += 1
            return
        found.compared += 1
        if has != dict(counts) or fence != self.bucket_fences[key]:
            found.different.append(bucket_key(*key))


def _chunks(items: Iterator[Any]) -> Iterator[list[Any]]:
    while chunk := list(islice(items, COMPARED_AT_ONCE)):
        yield chunk
