"""Users' records as the speed layer updates them: one atomic, fenced call for a user and batch.

A fence is the offset of the last event applied from one Kafka partition. It lies in the record itself, so that the
state and what it was made of change together or not at all: a batch that comes again, from a crash, a rebalance, a
replay or a worker that was thought dead, is ignored. Its name holds the identity of the topic, because the offsets of a
topic that was deleted and made again start over.

`last` are the distinct actions (item, event type, time) that are newest by time, equal times in the order of their
text: at most LAST_ACTIONS, of which the nightly write leaves those that it does not know. This order does not depend on
when an event arrived, so that late events, the nightly tables and a replay agree.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_core.events import EVENT_TYPE, ITEM_ID, MINUTE_MS, TS, USER_ID
from recsys_core.online import LAST_ACTIONS, MERGE_LUA, STREAM_STATE, action_text, action_texts, user_key
from recsys_core.redis_client import Script, is_cluster
from recsys_core.settings import Settings

USERS_A_CALL = 32
"""Users of one call on a Redis that is no cluster: the server does nothing else for about 0.2 ms."""
HEADER = np.dtype([(name, "<f8") for name in ("first", "last", "oldest", "latest", "session", "since", "events", "kept")])
"""What an update says beside its actions: first and last offset, the oldest action, the latest moment, the session's start and
events, all events, and how many actions there are."""
ONE_HEADER = struct.Struct("<8d")
"""HEADER of one update."""
NEVER = 2**62
"""Later than any moment."""

GUARD_LUA = """
local known = tonumber(ARGV[1])
local n = #KEYS
if known >= 0 then
  local position = redis.pcall('GET', KEYS[n])
  if (type(position) == 'string' and tonumber(position) or 0) < known then return {-1} end
  n = n - 1
end
"""
"""ARGV[1]: the position that the last of KEYS must have reached; below 0 there is no such key. Otherwise nothing is changed and
the answer is {-1}: this is not the Redis that it was. `n` is the number of the other keys."""

UPDATE_LUA = (
    MERGE_LUA
    + GUARD_LUA
    + """
local function newest_of(list)
  local ends = string.find(list, ']', 1, true)
  if string.byte(list, ends - 14) == 44 then return tonumber(string.sub(list, ends - 13, ends - 1)) or 0 end
  return tonumber(string.match(string.sub(list, 1, ends - 1), '(%d+)$') or 0)
end
local fence, keep, gap, ttl, now = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local out = {0}
for i = 1, n do
  local key, update = KEYS[i], ARGV[6 + i]
  local first, last, oldest, latest, session, since, count, kept = struct.unpack('<dddddddd', update)
  local old = redis.pcall('HMGET', key, 'last', 'last_ts', 'stream', fence)
  if old.err then
    redis.call('DEL', key)
    old = {}
  end
  local applied = tonumber(old[4] or -1) or -1
  if applied >= last then
    out[1] = out[1] + 1
  elseif applied >= first then
    out[#out + 1] = i
    out[#out + 1] = applied
  else
    local before, actions, last_ts = old[1], string.sub(update, 65), tonumber(old[2] or 0) or 0
    if not is_list(before) then actions = '[' .. actions .. ']'
    elseif oldest <= newest_of(before) then actions = '[' .. merge(actions, inside(before), keep) .. ']'
    elseif #before < 10 * (keep - kept) then actions = '[' .. actions .. ',' .. string.sub(before, 2)
    elseif kept < keep then actions = '[' .. actions .. ',' .. head(inside(before), keep - kept) .. ']'
    else actions = '[' .. actions .. ']' end
    local total, start, within, refreshed = 0, 0, 0, 0
    if old[3] and #old[3] == 32 then total, start, within, refreshed = struct.unpack('<dddd', old[3]) end
    if within == 0 or session > last_ts + gap then start, within = session, since else within = within + count end
    local expires = math.abs(now - refreshed) > ttl / 100
    if expires then refreshed = now end
    redis.call('HSET', key, 'last', actions, 'last_ts', math.max(last_ts, latest),
      'stream', struct.pack('<dddd', total + count, start, within, refreshed), fence, last)
    if expires then redis.call('EXPIRE', key, ttl) end
  end
end
return out
"""
)
"""KEYS: users' records. ARGV: see GUARD_LUA, fence field, actions kept, session gap (ms), TTL (s), now (s), then for each
record HEADER and the new actions. Returns the number of updates that were known already, then (index, applied offset) of
those of which only the end is new; these are left as they are, for the caller to send what is new.
"""

UPDATE = Script(UPDATE_LUA)


@dataclass(frozen=True)
class Batch:
    """Valid events in the order of their arrival, with where each came from.

    Attributes:
        events: EVENT_SCHEMA.
        partition: int64 (n,), Kafka partition.
        offset: int64 (n,), ascending within each partition.
        arrived: int64 (n,), ms, when the broker took each. None where nobody is known to have a clock that is ahead.
    """

    events: pa.Table
    partition: np.ndarray
    offset: np.ndarray
    arrived: np.ndarray | None = None

    @property
    def rows(self) -> int:
        return int(self.events.num_rows)

    @property
    def moments(self) -> np.ndarray:
        """When each was done, int64 (n,), ms: its `ts`, or its arrival where the sender's clock is ahead."""
        ts: np.ndarray = self.events[TS].to_numpy()
        return ts if self.arrived is None else np.minimum(ts, self.arrived)

    def take(self, rows: np.ndarray) -> Batch:
        """Some of the events, by position or mask."""
        at = np.flatnonzero(rows) if rows.dtype == bool else rows
        arrived = None if self.arrived is None else self.arrived[at]
        return Batch(self.events.take(pa.array(at)), self.partition[at], self.offset[at], arrived)


class LiveEvent(NamedTuple):
    """A valid event with where it came from: what a `Batch` has of it, for a handful of them."""

    partition: int
    offset: int
    user_id: str
    item_id: str
    event_type: str
    ts: int
    arrived: int = NEVER

    @property
    def moment(self) -> int:
        """See `Batch.moments`."""
        return min(self.ts, self.arrived)


@dataclass(frozen=True)
class Guard:
    """What must still be there when a batch is applied: `key` with a position of `known` or more, see GUARD_LUA."""

    key: str
    known: int


@dataclass(frozen=True)
class UserUpdates:
    """What the users of a batch did, a row for each partition and user.

    Attributes:
        partition: ascending.
        users: whose records they are.
        payloads: HEADER and the actions.
    """

    partition: list[int]
    users: list[str]
    payloads: list[bytes]


def guarded(keys: list[str], partition: int, guards: Mapping[int, Guard] | None) -> tuple[list[str], int]:
    """KEYS and the first of ARGV of a call for what came from a partition, see GUARD_LUA."""
    if guards is None:
        return keys, -1
    return [*keys, guards[partition].key], guards[partition].known


def fence_field(source: str) -> str:
    """Field of a record with the last offset applied from `source`, a topic's identity and partition."""
    return f"@{source}"


def user_updates(batch: Batch, keep: int, gap_ms: int) -> UserUpdates:
    """Sum up a batch by partition and user: the `keep` newest distinct actions, counters and the session.

    A session begins with an event that is later than all before it by more than `gap_ms`. Of the events of a batch
    only the last that may begin one matters: where even it does not, given what was before, none does.
    """
    encoded = _dictionary(batch.events[USER_ID])
    group = batch.partition * len(encoded.dictionary) + encoded.indices.to_numpy()
    ts = batch.events[TS].to_numpy()
    order = np.argsort(group, kind="stable")
    sorted_group, sorted_ts, sorted_offset = group[order], ts[order], batch.offset[order]
    moments = sorted_ts if batch.arrived is None else np.minimum(sorted_ts, batch.arrived[order])
    starts = _starts(sorted_group)
    ends = np.append(starts[1:], len(order))
    header = np.empty(len(starts), HEADER)
    header["first"], header["last"] = sorted_offset[starts], sorted_offset[ends - 1]
    header["events"] = ends - starts
    begin = _session_begins(moments, starts, ends, gap_ms)
    header["session"], header["since"] = moments[begin], ends - begin
    header["latest"] = np.maximum.reduceat(moments, starts)
    newest_first = _distinct(batch, order[np.lexsort((-sorted_ts, sorted_group))], group, ts)
    kept_starts = _starts(group[newest_first])
    sizes = np.diff(np.append(kept_starts, len(newest_first)))
    rank = np.arange(len(newest_first)) - np.repeat(kept_starts, sizes)
    kept = newest_first[rank < keep]
    sizes = np.minimum(sizes, keep)
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    header["oldest"], header["kept"] = ts[kept[bounds[1:] - 1]], sizes
    some = batch.events.select([ITEM_ID, EVENT_TYPE, TS]).take(pa.array(kept))
    texts = action_texts(some[ITEM_ID], some[EVENT_TYPE], some[TS])
    joined = pc.binary_join(pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), texts), ",").cast(pa.binary())
    heads = pa.Array.from_buffers(pa.binary(HEADER.itemsize), len(header), [None, pa.py_buffer(header.tobytes())])
    payloads = pc.binary_join_element_wise(heads.cast(pa.binary()), joined, b"")
    groups = sorted_group[starts]
    users = encoded.dictionary.take(pa.array(groups % len(encoded.dictionary))).to_pylist()
    return UserUpdates((groups // len(encoded.dictionary)).tolist(), users, payloads.to_pylist())


def few_user_updates(events: Sequence[LiveEvent], keep: int, gap_ms: int) -> UserUpdates:
    """`user_updates` of a handful of events, whose columns would cost more than all that is done with them."""
    groups: dict[tuple[int, str], list[LiveEvent]] = {}
    for event in events:
        groups.setdefault((event.partition, event.user_id), []).append(event)
    names = sorted(groups, key=lambda group: group[0])
    payloads = [_payload(groups[name], keep, gap_ms) for name in names]
    return UserUpdates([partition for partition, _ in names], [user for _, user in names], payloads)


def _payload(events: Sequence[LiveEvent], keep: int, gap_ms: int) -> bytes:
    """HEADER and actions of the events of one user and partition, in the order of their offsets."""
    if len(events) == 1:
        [only] = events
        moment = only.moment
        head = ONE_HEADER.pack(only.offset, only.offset, only.ts, moment, moment, 1, 1, 1)
        return head + action_text(only.item_id, only.event_type, only.ts)
    moments = [event.moment for event in events]
    latest, begin = moments[0], 0
    for at, moment in enumerate(moments):
        if moment > latest + gap_ms:
            begin = at
        latest = max(latest, moment)
    actions = sorted({(-event.ts, action_text(event.item_id, event.event_type, event.ts)) for event in events})[:keep]
    head = ONE_HEADER.pack(
        events[0].offset,
        events[-1].offset,
        -actions[-1][0],
        latest,
        moments[begin],
        len(events) - begin,
        len(events),
        len(actions),
    )
    return head + b",".join([text for _, text in actions])


def _dictionary(column: pa.ChunkedArray) -> pa.DictionaryArray:
    return column.combine_chunks().dictionary_encode()


def _starts(values: np.ndarray) -> np.ndarray:
    """Where a run of equal values starts."""
    return np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))


def _session_begins(ts: np.ndarray, starts: np.ndarray, ends: np.ndarray, gap_ms: int) -> np.ndarray:
    """For each group the position of the last event that is later than all before it in the group by more than the gap."""
    position = np.arange(len(ts))
    lifted = ts - ts.min()
    lift = np.repeat(np.arange(len(starts)) * (int(lifted.max()) + 1), ends - starts)
    # Each group is lifted above the one before it by the whole range, so that one running maximum serves all of them.
    latest = np.maximum.accumulate(lifted + lift)
    begins = np.concatenate([[True], lifted[1:] + lift[1:] > latest[:-1] + gap_ms])
    begins[starts] = True
    last: np.ndarray = np.maximum.accumulate(np.where(begins, position, 0))[ends - 1]
    return last


def _distinct(batch: Batch, rows: np.ndarray, group: np.ndarray, ts: np.ndarray) -> np.ndarray:
    """`rows`, sorted by group and newest first, with equal times in the order of their texts and equal actions once."""
    tied = (group[rows][1:] == group[rows][:-1]) & (ts[rows][1:] == ts[rows][:-1])
    if not tied.any():
        return rows
    some = np.concatenate([[False], tied]) | np.concatenate([tied, [False]])
    events = batch.events.select([ITEM_ID, EVENT_TYPE, TS]).take(pa.array(rows[some]))
    texts = [text.encode() for text in action_texts(events[ITEM_ID], events[EVENT_TYPE], events[TS]).to_pylist()]
    rank = np.zeros(len(rows), np.int64)
    ranks = {text: at for at, text in enumerate(sorted(set(texts)))}
    rank[some] = [ranks[text] for text in texts]
    order = np.lexsort((rank, -ts[rows], group[rows]))
    rows, rank = rows[order], rank[order]
    again = (group[rows][1:] == group[rows][:-1]) & (ts[rows][1:] == ts[rows][:-1]) & (rank[1:] == rank[:-1])
    distinct: np.ndarray = rows[np.concatenate([[True], ~again])]
    return distinct


class UserWriter:
    """Applies batches to users' records.

    `area` is the first part of the keys; a rebuild works beside the live records in an area of its own, in their slots.
    """

    def __init__(self, redis: Any, settings: Settings, area: str = "user") -> None:
        self._redis = redis
        self._settings = settings
        self._area = area
        self._users_a_call = 1 if is_cluster(redis) else USERS_A_CALL

    def calls(
        self, updates: UserUpdates, sources: Mapping[int, str], now_ms: int, guards: Mapping[int, Guard] | None = None
    ) -> list[tuple[object, ...]]:
        """The calls of `updates`, in their order; `sources` names the source of each partition, `guards` its guard."""
        gap = self._settings.events.session_gap_minutes * MINUTE_MS
        rest = (LAST_ACTIONS, gap, self._settings.cache.feature_ttl_seconds, now_ms // 1000)
        calls = []
        for start, end in self._spans(updates.partition):
            number = updates.partition[start]
            keys, known = guarded([user_key(user, self._area) for user in updates.users[start:end]], number, guards)
            calls.append(UPDATE.call(keys, known, fence_field(sources[number]), *rest, *updates.payloads[start:end]))
        return calls

    def _spans(self, partition: list[int]) -> Iterable[tuple[int, int]]:
        """Rows of one call: of one partition, and not more than the server should do at once."""
        start = 0
        while start < len(partition):
            end = bisect_right(partition, partition[start], start)
            for at in range(start, end, self._users_a_call):
                yield at, min(at + self._users_a_call, end)
            start = end

    def behind(self, updates: UserUpdates, answers: Sequence[list[int]]) -> tuple[int, dict[tuple[int, str], int]]:
        """From the answers of `calls`: updates that were known already, and the offset of those half known."""
        ignored, found = 0, {}
        for (start, _), answer in zip(self._spans(updates.partition), answers, strict=True):
            ignored += answer[0]
            for index, applied in zip(answer[1::2], answer[2::2], strict=True):
                at = start + index - 1
                found[updates.partition[at], updates.users[at]] = applied
        return ignored, found


def not_yet_applied(batch: Batch, behind: dict[tuple[int, str], int]) -> Batch:
    """The events of half known updates that come after what was applied."""
    users = batch.events[USER_ID].to_pylist()
    rows = zip(batch.partition.tolist(), users, batch.offset.tolist(), strict=True)
    new = [at for at, (partition, user, offset) in enumerate(rows) if offset > behind.get((partition, user), offset)]
    return batch.take(np.array(new, np.int64))


@dataclass(frozen=True)
class StreamState:
    """Counters that the speed layer keeps in the field `stream` of a record.

    Attributes:
        events: events applied since the record began.
        session_start: time of the first event of the user's latest session, ms.
        session_events: events since then.
    """

    events: int = 0
    session_start: int = 0
    session_events: int = 0

    @classmethod
    def decode(cls, value: bytes | None) -> StreamState:
        """Raises struct.error for a value of another format."""
        if not value:
            return cls()
        events, start, since, _ = struct.unpack(STREAM_STATE, value)
        return cls(int(events), int(start), int(since))
