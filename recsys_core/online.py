"""The Redis contract: keys, the cached answer, the user's record, and their batch writers.

    user:{<user_id>}   hash: `last` [[item_id, event_type, ts_ms], …] newest first: all that `seen` does not know, at least
                       `ranking.last_items` and at most LAST_ACTIONS, `last_ts`, `seen` [item_id, …] newest first,
                       after which NUL and six bytes of each older item may come (`item_ids.digests`),
                       `als` <factor version> NUL <float32 vector>, `features` see `OnlineFeatures`; of the speed layer
                       `stream` (counters and session) and `@<source>`, the last offset applied from a Kafka partition
    recs:{<user_id>}   string: the answer, see `AnswerEncoder`
    trending           string: JSON {"computed_at": ms, "hour": key, "items": [[item_id, score by half-life, …], …]}
    rebuild:lock       string: who makes records again (`streaming.rebuild_lock`)
    rebuild:areas      set: what the keys begin with that hold records beside the live ones

The braces are Redis Cluster hash tags: both keys of a user live in one slot and are read in one round trip. A brace in an
id is escaped (`hash_tag`).
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any
from zlib import crc32

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from recsys_core.features import OnlineFeatures, user_inputs
from recsys_core.item_ids import DIGEST_BYTES, ItemIds, digests, packed, unpacked
from recsys_core.ranking import Scores, Snapshot, Users
from recsys_core.redis_client import Script, is_cluster, is_of_wrong_type, run_calls
from recsys_core.settings import RankingSettings
from recsys_core.tower import TowerInputs

TRENDING_KEY = "trending"
REBUILD_LOCK_KEY = "rebuild:lock"
REBUILD_AREAS_KEY = "rebuild:areas"
LATEST_MOMENT = (1 << 63) - 1

LAST, LAST_TS, SEEN, ALS, FEATURES = b"last", b"last_ts", b"seen", b"als", b"features"
RECORD_FIELDS = (LAST, LAST_TS, SEEN, ALS, FEATURES)
LAST_ACTIONS = 256
"""Most actions that `last` holds."""
STREAM = b"stream"
STREAM_STATE = "<dddd"
"""`stream`: events, start (ms) and events of the latest session, when the TTL was last set (s)."""

MERGE_LUA = """
local function is_list(text)
  return text and string.sub(text, 1, 2) == '[[' and string.sub(text, -2) == ']]'
end
local function inside(list)
  return is_list(list) and string.sub(list, 2, -2) or ''
end
local function entry(inside, from)
  local to = string.find(inside, '],[', from, true) or #inside
  local text = string.sub(inside, from, to)
  return {tonumber(string.match(text, '(%d+)%]$') or 0), text}, to + 2
end
local function comes_first(a, b)
  if a[1] ~= b[1] then return a[1] > b[1] end
  local x, y = a[2], b[2]
  for i = 1, math.min(#x, #y) do
    local p, q = string.byte(x, i), string.byte(y, i)
    if p ~= q then return p < q end
  end
  return #x < #y
end
local function head(inside, n)
  if #inside < 10 * n then return inside end
  local from = 1
  for _ = 1, n do
    local hit = string.find(inside, '],[', from, true)
    if not hit then return inside end
    from = hit + 2
  end
  return string.sub(inside, 1, from - 2)
end
local function merge(one, other, keep)
  local out, i, j, a, b, after_a, after_b = {}, 1, 1
  while #out < keep and i <= #one and j <= #other do
    if not a then a, after_a = entry(one, i) end
    if not b then b, after_b = entry(other, j) end
    local same = a[2] == b[2]
    if same or comes_first(a, b) then out[#out + 1], i, a = a[2], after_a end
    if same then j, b = after_b elseif a then out[#out + 1], j, b = b[2], after_b end
  end
  local rest = string.sub(one, i) .. string.sub(other, j)
  if #out < keep and rest ~= '' then out[#out + 1] = head(rest, keep - #out) end
  return table.concat(out, ',')
end
local function cut(inside, keep, moment)
  local from, n = 1, 0
  while from <= #inside do
    local this, after = entry(inside, from)
    if n >= keep and this[1] < moment then return string.sub(inside, 1, from - 2) end
    from, n = after, n + 1
  end
  return inside
end
"""
"""Lua on the text of `last` without its outer brackets. Brackets inside of ids are escaped there (`online.action_text`).

`head` are the first n actions; each has at least ten bytes with its comma. `merge` ends where one of the lists does and takes
what is left of the other as it is. `cut` are the first `keep` and all further ones that are not before a moment."""

WRITE_LUA = (
    MERGE_LUA
    + """
local key, keep, covered, ttl = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
for i = 4, #ARGV, 2 do
  local name, value = ARGV[i], ARGV[i + 1]
  local old = redis.pcall('HGET', key, name)
  if type(old) == 'table' then
    redis.call('DEL', key)
    old = false
  end
  if old and name == 'last' then
    value = '[' .. cut(merge(inside(value), inside(old), LAST_ACTIONS), keep, covered) .. ']'
  elseif old and name == 'last_ts' then
    value = math.max(tonumber(old) or 0, tonumber(value))
  end
  redis.call('HSET', key, name, value)
end
redis.call('EXPIRE', key, ttl)
""".replace("LAST_ACTIONS", str(LAST_ACTIONS))
)
"""KEYS: one record. ARGV: actions kept in any case, the end of what the batch layer knows (ms), TTL (s), then its fields and
values. Live actions since that end stay; a key that holds no record is replaced by one."""
WRITE = Script(WRITE_LUA)

CLOCK_MS = 60_000
"""Clocks of two machines may differ by so much: what is dated further ahead was dated by a wrong clock and is never fresh."""

PUT_ANSWERS_LUA = """
local ttl, beside = ARGV[1], ARGV[2] == '1'
local function is_newer(held, value)
  if type(held) ~= 'string' or #held < 11 or string.byte(held) ~= string.byte(value) then return false end
  local at = struct.unpack('<i8', held, 4)
  if at <= struct.unpack('<i8', value, 4) then return false end
  local now = redis.call('TIME')
  return at <= now[1] * 1000 + now[2] / 1000 + CLOCK_MS
end
for i = 1, #KEYS, 2 do
  local value = ARGV[2 + (i + 1) / 2]
  if not beside or redis.call('EXISTS', KEYS[i + 1]) == 1 then
    if not is_newer(redis.pcall('GETRANGE', KEYS[i], 0, 10), value) then redis.call('SET', KEYS[i], value, 'EX', ttl) end
  end
end
""".replace("CLOCK_MS", str(CLOCK_MS))
"""KEYS: answer and record of each user. ARGV: TTL (s), 1 when answers may lie only beside records, an encoded answer of each.

An answer is not written over a newer one (unless a wrong clock dated that), nor, with 1, when the record that it was made
from is gone: the user was forgotten meanwhile. Who removes a user removes the record first."""
PUT_ANSWERS = Script(PUT_ANSWERS_LUA)
ANSWERS_A_CALL = 64
"""Answers that are written by one call where they need not share a slot: half the time of a SET for each."""

_HEADER = struct.Struct("<BHqqB")
_END = struct.Struct("<i")
_CHECKSUM = struct.Struct("<I")
_FORMAT = 3
_WHOLE = 0x2144DF1C
"""CRC-32 of anything with its own CRC-32 behind it (the residue of the polynomial)."""
_ITEM_TAG = 0x0A
_ID_TAG = 0x0A
_SCORE_TAG = 0x15
_BEFORE_ID = (_ITEM_TAG, 0, _ID_TAG, 0)
_MAX_SHORT_ID = 119
"""Bytes of an id up to which the lengths in the wire format of its item are single bytes."""


def hash_tag(user_id: str) -> str:
    """A user id as it stands between the braces of a key: another text for each id, without a closing brace in it.

    A cluster hashes what lies before the first closing brace, and the whole key where that is nothing.
    """
    if "{" in user_id or "}" in user_id:
        return user_id.replace("{", "{0").replace("}", "{1")
    return user_id


def user_key(user_id: str, area: str = "user") -> str:
    """Key of the user's record."""
    return f"{area}:{{{hash_tag(user_id)}}}"


def recs_key(user_id: str) -> str:
    """Key of the user's cached answer."""
    return f"recs:{{{hash_tag(user_id)}}}"


class CorruptValue(ValueError):
    """A Redis value is not of the format that its key promises."""


@dataclass(frozen=True)
class CachedAnswer:
    """A cached answer as it lies in Redis; `wire` is passed on to the caller without being parsed.

    Attributes:
        release_id: the release that made it.
        computed_at: ms since 1970 (UTC).
        acted: time of the user's last action that it knows, ms.
        ends: int32 (items,), end of each item in `wire`.
        wire: `repeated ScoredItem items = 1` of `recsys.v1.RecommendResponse` in protobuf's wire format.
    """

    release_id: str
    computed_at: int
    acted: int
    ends: np.ndarray
    wire: bytes

    def first(self, n: int) -> bytes:
        """Wire format of the first `n` items."""
        if n <= 0 or not len(self.ends):
            return b""
        return self.wire[: self.ends[min(n, len(self.ends)) - 1]]

    def is_fresh(self, now: int, oldest: int, last_ts: int) -> bool:
        """Whether it was computed since `oldest`, not in the future, and knows the user's last action; all in ms.

        An action may reach the record after an answer that was computed later than it happened.
        """
        return oldest <= self.computed_at <= now + CLOCK_MS and last_ts <= self.acted

    def items(self) -> list[tuple[str, float]]:
        """Item ids and scores. Raises CorruptValue when `wire` does not hold what `ends` says."""
        found = []
        start = 0
        try:
            for end in self.ends.tolist():
                item = self.wire[start:end]
                score = struct.unpack_from("<f", item, len(item) - 4)[0]
                at = 2 + _varint_size(item, 1)
                length, size = _varint(item, at)
                found.append((item[at + size : at + size + length].decode(), score))
                start = end
        except (struct.error, IndexError, UnicodeDecodeError) as error:
            raise CorruptValue(f"cached answer, item {len(found)}: {error}") from error
        return found

    @classmethod
    def decode(cls, data: bytes) -> CachedAnswer:
        """Raises CorruptValue."""
        try:
            version, count, computed_at, acted, name_length = _HEADER.unpack_from(data)
            if version != _FORMAT:
                raise CorruptValue(f"cached answer of format {version}, this process reads {_FORMAT}")
            if crc32(data) != _WHOLE:
                raise CorruptValue(f"cached answer of {len(data)} bytes does not have its checksum")
            at = _HEADER.size
            release_id = data[at : at + name_length].decode()
            at += name_length
            ends = np.frombuffer(data, "<i4", count, at)
        except (struct.error, ValueError) as error:
            raise CorruptValue(f"cached answer of {len(data)} bytes: {error}") from error
        wire = data[at + 4 * count : -_CHECKSUM.size]
        if count and len(wire) != ends[-1]:
            raise CorruptValue(f"cached answer has {len(wire)} bytes of items, its header says {ends[-1]}")
        return cls(release_id, computed_at, acted, ends, wire)


def first_items(value: bytes, release: bytes, count: int, now: int, oldest: int, last_ts: int) -> tuple[bytes, int] | None:
    """The first `count` items of a cached answer in wire format and its `computed_at`.

    None when the value is not of `release` (its id encoded), is not fresh (see `CachedAnswer.is_fresh`), holds fewer items
    or was changed by a byte: what `CachedAnswer` is for. This is the fast path of a cache hit, a few microseconds.
    """
    if len(value) < _HEADER.size:
        return None
    version, held, computed_at, acted, name_length = _HEADER.unpack_from(value)
    if version != _FORMAT or held < count or not oldest <= computed_at <= now + CLOCK_MS or last_ts > acted:
        return None
    ends = _HEADER.size + name_length
    if name_length != len(release) or value[_HEADER.size : ends] != release:
        return None
    start = ends + 4 * held
    if start > len(value) or crc32(value) != _WHOLE:
        return None
    return value[start : start + _END.unpack_from(value, ends + 4 * count - 4)[0]], computed_at


class AnswerEncoder:
    """Encodes the answers of one release, many at a time, without a Python loop over items.

    Layout: format u8, count u16, computed_at i64 (ms), the last action known i64 (ms), length of the release id u8, the
    release id, `count` end offsets i32, the items in protobuf's wire format, and the CRC-32 of all that as u32
    (little-endian throughout).
    """

    def __init__(self, release_id: str, item_ids: ItemIds) -> None:
        self._ids = item_ids
        self._release = release_id.encode()

    def encode(
        self, positions: np.ndarray, scores: np.ndarray, computed_at: int, acted: Sequence[int] | None = None
    ) -> list[bytes]:
        """The values of `b` users from positions int64 (b, n), padded by -1, and scores float32 (b, n).

        `acted` are the times of the users' last actions that the answers know (ms), None: all until `computed_at`.
        """
        held = positions >= 0
        counts = held.sum(axis=1)
        data, ends = _wire(self._ids, positions[held], np.ascontiguousarray(scores[held], "<f4"))
        values = []
        item = 0
        offset = 0
        for row, count in enumerate(counts):
            last = item + int(count)
            local = (ends[item:last] - offset).astype("<i4")
            end = offset + (int(local[-1]) if count else 0)
            known = computed_at if acted is None else acted[row]
            head = _HEADER.pack(_FORMAT, int(count), computed_at, known, len(self._release)) + self._release
            whole = head + local.tobytes() + data[offset:end]
            values.append(whole + _CHECKSUM.pack(crc32(whole)))
            item, offset = last, end
        return values


def _wire(ids: ItemIds, positions: np.ndarray, scores: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Items at positions (k,) with scores (k,) in wire format, joined, and where each ends, int64 (k,)."""
    begins = ids.offsets[positions]
    sizes = ids.offsets[positions + 1] - begins
    if sizes.max(initial=0) > _MAX_SHORT_ID:
        items = [_item(ids[p].encode(), score) for p, score in zip(positions.tolist(), scores, strict=True)]
        return b"".join(items), np.cumsum([len(item) for item in items])
    before, count = len(_BEFORE_ID), len(positions)
    around = np.empty((count, before + 5), np.uint8)
    around[:, :before] = _BEFORE_ID
    around[:, 1], around[:, 3] = sizes + 7, sizes
    around[:, before] = _SCORE_TAG
    around[:, before + 1 :] = scores.view(np.uint8).reshape(-1, 4)
    ends = np.cumsum(sizes + around.shape[1])
    wire = np.empty(sizes.sum() + around.size, np.uint8)
    places = np.empty(around.shape, np.int64)
    places[:, :before] = (ends - sizes)[:, None] + np.arange(-around.shape[1], -5)
    places[:, before:] = ends[:, None] + np.arange(-5, 0)
    wire[places] = around
    within = np.arange(len(wire) - around.size)
    gaps = np.arange(count) * around.shape[1] + before
    joined = ends - sizes - gaps - 5
    wire[within + np.repeat(gaps, sizes)] = ids.content[within + np.repeat(begins - joined, sizes)]
    return wire.tobytes(), ends


def _item(item_id: bytes, score: np.ndarray) -> bytes:
    """Wire format of a ScoredItem as a field of the response. `score` is a little-endian float32."""
    inner = bytes([_ID_TAG]) + varint(len(item_id)) + item_id + bytes([_SCORE_TAG]) + score.tobytes()
    return bytes([_ITEM_TAG]) + varint(len(inner)) + inner


def varint(value: int) -> bytes:
    """A non-negative integer in protobuf's wire format."""
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A varint and its size in bytes."""
    value = size = 0
    while True:
        byte = data[at + size]
        value |= (byte & 0x7F) << 7 * size
        size += 1
        if byte < 0x80:
            return value, size


def _varint_size(data: bytes, at: int) -> int:
    return _varint(data, at)[1]


@dataclass(frozen=True)
class UserRecord:
    """A user's record. Empty values where a field is absent.

    Attributes:
        last: the last actions, newest first: (item_id, event_type, ts in ms); all since the other fields were made.
        last_ts: time of the last action in ms, 0 when unknown.
        seen: items the user had, most recent first, as many as a history has.
        had: the digests of the items that the user had before those, packed.
        als_version: version of the factors that `als` belongs to.
        als: float32 (rank,) or None.
        features: batch features of the last night, or None.
    """

    last: tuple[tuple[str, str, int], ...] = ()
    last_ts: int = 0
    seen: tuple[str, ...] = ()
    als_version: str = ""
    als: np.ndarray | None = None
    features: OnlineFeatures | None = None
    had: bytes = b""

    @property
    def items_had(self) -> int:
        """How many items the user had before `last`."""
        return len(self.seen) + len(self.had) // DIGEST_BYTES

    @classmethod
    def with_items(cls, items: Sequence[str], history: int, most: int, **others: Any) -> UserRecord:
        """Of a user that had `items`, most recent first: at most `most`, of which `history` stay readable."""
        return cls(seen=tuple(items[:history]), had=packed(digests(items[history:most])), **others)

    @property
    def known(self) -> bool:
        """Whether anything is known of the user."""
        return bool(self.last or self.last_ts or self.items_had or self.als is not None or self.features is not None)

    @classmethod
    def decode(cls, values: Sequence[bytes | None]) -> UserRecord:
        """From the values of RECORD_FIELDS, as HMGET gives them. Raises CorruptValue.

        A factor whose length is not finite is absent: one such number would spread over all scores.
        """
        last, last_ts, seen, als, features = values
        try:
            version, vector = _factor(als) if als else ("", None)
            actions = tuple((str(i), str(t), int(ts)) for i, t, ts in orjson.loads(last)) if last else ()
            moment = int(last_ts) if last_ts else 0
            if moment > LATEST_MOMENT or (actions and actions[0][2] > LATEST_MOMENT):
                raise ValueError("an action of a time that no calendar has")
            newest, _, had = seen.partition(b"\0") if seen else (b"", b"", b"")
            if len(had) % DIGEST_BYTES:
                raise ValueError(f"{len(had)} bytes are no digests of items")
            return cls(
                last=actions,
                last_ts=moment,
                seen=tuple(map(str, orjson.loads(newest))) if newest else (),
                als_version=version,
                als=vector,
                features=OnlineFeatures.decode(features) if features else None,
                had=had,
            )
        except (ValueError, TypeError, OverflowError) as error:
            raise CorruptValue(f"user record: {error}") from error

    def encode(self) -> dict[bytes, bytes]:
        """The hash fields of those values that are there."""
        fields: dict[bytes, bytes] = {}
        if self.last:
            fields[LAST] = b"[" + b",".join(action_text(*action) for action in self.last) + b"]"
        if self.last_ts:
            fields[LAST_TS] = str(self.last_ts).encode()
        if self.seen:
            fields[SEEN] = orjson.dumps(self.seen) + (b"\0" + self.had if self.had else b"")
        if self.als is not None:
            fields[ALS] = self.als_version.encode() + b"\0" + np.ascontiguousarray(self.als, "<f4").tobytes()
        if self.features is not None:
            fields[FEATURES] = self.features.encode()
        return fields


def _factor(value: bytes) -> tuple[str, np.ndarray | None]:
    """Version and vector of `als`. Raises ValueError."""
    name, _, raw = value.partition(b"\0")
    version, vector = name.decode(), np.frombuffer(raw, "<f4")
    return (version, vector) if math.isfinite(vector.dot(vector)) else ("", None)


FEW_HAD = 150
"""Digests of a user that are left out together with those of the other users; more are left out user by user."""
FEW_ACTIONS = 64
"""Up to so many actions are faster one by one."""


def action_text(item_id: str, event_type: str, ts: int) -> bytes:
    """An action as it stands in `last`: JSON, with brackets escaped inside of strings.

    So `],[` occurs between actions only, where the server cuts the list without parsing it.
    """
    return b"[%s,%s,%d]" % (_quoted(item_id), _quoted(event_type), ts)


def action_texts(items: pa.ChunkedArray, types: pa.ChunkedArray, ts: pa.ChunkedArray) -> pa.Array:
    """`action_text` of many actions: string (n,)."""
    if len(ts) <= FEW_ACTIONS:
        rows = zip(items.to_pylist(), types.to_pylist(), ts.to_pylist(), strict=True)
        return pa.array([action_text(*row).decode() for row in rows], pa.string())
    parts = [_all_quoted(items), _all_quoted(types), ts.combine_chunks().cast(pa.string())]
    joined = pc.binary_join_element_wise(*parts, ",")
    return pc.binary_join_element_wise("[", joined, "]", "")


def _quoted(text: str) -> bytes:
    return orjson.dumps(text).replace(b"[", b"\\u005b").replace(b"]", b"\\u005d")


def _all_quoted(column: pa.ChunkedArray) -> pa.Array:
    encoded = column.combine_chunks().dictionary_encode()
    texts = encoded.dictionary
    if pc.any(pc.match_substring_regex(texts, r'[\x00-\x1f"\\\[\]]')).as_py():
        quoted = pa.array([_quoted(text).decode() for text in texts.to_pylist()], pa.string())
    else:
        quoted = pc.binary_join_element_wise('"', texts, '"', "")
    return quoted.take(encoded.indices)


def users_of(
    snapshot: Snapshot,
    records: Sequence[UserRecord],
    settings: RankingSettings,
    excluded: Sequence[Sequence[str]] = (),
    *,
    user_ids: Sequence[str] = (),
    now: int | None = None,
    device: str | None = None,
    country: str | None = None,
) -> Users:
    """The state that is ranked, from users' records; `excluded` are further item ids for each user.

    A factor of another model version than the snapshot's is left out, so that the user is folded in instead. The keyword
    arguments are for the user tower: `now` (ms), by default the moment after the user's last action, and where the users are
    now, in place of what their records say.
    """
    als = np.zeros((len(records), snapshot.als_items.shape[1]), np.float32)
    for row, record in enumerate(records):
        if record.als is not None and record.als_version == snapshot.als_version and len(record.als) == als.shape[1]:
            als[row] = record.als
    last, exclusions, had = _last_and_excluded(snapshot, records, settings, excluded)
    if snapshot.tower is None:
        return Users(als, last, exclusions, had=had)
    moments = [record.last_ts + 1 if now is None else now for record in records]
    known = [
        user_inputs(r.last, r.seen, r.features or OnlineFeatures(0, 1), moment, snapshot.tower.spec.history)
        for r, moment in zip(records, moments, strict=True)
    ]
    inputs = TowerInputs(
        user_ids=user_ids or [""] * len(records),
        history=[user.history for user in known],
        ts_ms=np.array(moments, np.int64),
        device=[device or user.device for user in known],
        country=[country or user.country for user in known],
        category=[user.category for user in known],
        counts=np.array([user.counts for user in known], np.float32).reshape(len(known), 4),
    )
    return Users(als, last, exclusions, snapshot.tower.vectors(inputs), had)


def consumed(snapshot: Snapshot, record: UserRecord, most: int) -> np.ndarray:
    """int64: positions of the `most` newest items that a user had, of those that the release knows."""
    acted, reach = items_acted_on(record)[:most], _reach(record, most)
    had = snapshot.item_ids.positions_of_digests(_digests_of(record, reach))
    return np.concatenate([snapshot.positions_of([*acted, *record.seen[:reach]]), had[had >= 0]])


def items_acted_on(record: UserRecord) -> list[str]:
    """The distinct items of `last`, newest first."""
    return list(dict.fromkeys([item for item, _, _ in record.last]))


def _reach(record: UserRecord, most: int) -> int:
    """How many of the items before `last` are among the `most` newest ones; those that `last` has as well don't count."""
    before = record.items_had
    if len(record.last) + before <= most:
        return before
    acted = {item for item, _, _ in record.last}
    left = most - len(acted)
    if left <= 0:
        return 0
    others = [at for at, item in enumerate(record.seen) if item not in acted]
    return others[left] if left < len(others) else min(before, len(record.seen) + left - len(others))


def _digests_of(record: UserRecord, reach: int) -> np.ndarray:
    return unpacked(record.had[: max(0, reach - len(record.seen)) * DIGEST_BYTES])


def _last_and_excluded(
    snapshot: Snapshot, records: Sequence[UserRecord], settings: RankingSettings, excluded: Sequence[Sequence[str]]
) -> tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]]:
    """`Users.last_items`, `Users.excluded` and `Users.had`, all their ids looked up together.

    The last items are the newest distinct ones, those of `last` before those of `seen`.
    """
    count, most = len(records), settings.max_consumed if settings.exclude_consumed else 0
    others = excluded or [()] * count
    lists: list[Sequence[str]] = []
    for record, asked in zip(records, others, strict=True):
        lists += items_acted_on(record), asked, record.seen
    sizes = np.fromiter(map(len, lists), np.int64, len(lists))
    positions = snapshot.item_ids.positions(list(chain.from_iterable(lists)))
    parts = np.repeat(np.arange(len(sizes)), sizes)
    rows, kind = np.divmod(parts, 3)
    known = positions >= 0
    # Each of the two lists is distinct: of what comes first of both, no more than half is there twice.
    newest = _padded(rows, positions, known & (kind != 1), count, 2 * settings.last_items)
    reach = [_reach(record, most) for record in records]
    limits = sizes.copy()
    limits[::3], limits[2::3] = most, reach
    if (sizes > limits).any():
        within = np.arange(len(parts)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        known &= within < limits[parts]
    rows, positions, had = _with_digests(snapshot, records, rows[known], positions[known], reach)
    everything = np.ones(len(rows), bool)
    return _first_distinct(newest, settings.last_items), _padded(rows, positions, everything, count), had


def _with_digests(
    snapshot: Snapshot, records: Sequence[UserRecord], rows: np.ndarray, positions: np.ndarray, reach: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]]:
    """Rows and positions with those of the records' digests, and apart, by row, those of users that had very many items."""
    if not any(of_user > len(record.seen) for record, of_user in zip(records, reach, strict=True)):
        return rows, positions, {}
    found = [_digests_of(record, of_user) for record, of_user in zip(records, reach, strict=True)]
    sizes = np.array([len(of_user) for of_user in found], np.int64)
    more, owners = snapshot.item_ids.positions_of_digests(np.concatenate(found)), np.repeat(np.arange(len(sizes)), sizes)
    ends = np.cumsum(sizes)
    many = np.flatnonzero(sizes > FEW_HAD)
    apart = {int(row): more[ends[row] - sizes[row] : ends[row]] for row in many}
    few = (more >= 0) & (sizes[owners] <= FEW_HAD)
    rows, positions = np.concatenate([rows, owners[few]]), np.concatenate([positions, more[few]])
    order = np.argsort(rows, kind="stable")
    return rows[order], positions[order], {row: of_user[of_user >= 0] for row, of_user in apart.items()}


def _first_distinct(rows: np.ndarray, count: int) -> np.ndarray:
    """int64 (b, count): the first distinct positions of each row, padded by -1."""
    first_equal = (rows[:, :, None] == rows[:, None, :]).argmax(axis=2) if rows.size else rows
    at, columns = np.nonzero((first_equal == np.arange(rows.shape[1])) & (rows >= 0))
    found = rows[at, columns]
    return _padded(at, found, np.ones(len(found), bool), len(rows), count)


def _padded(rows: np.ndarray, positions: np.ndarray, chosen: np.ndarray, count: int, width: int | None = None) -> np.ndarray:
    """int64 (count, w): the chosen positions of each row in their order, padded by -1; as many as `width`, else all."""
    rows, positions = rows[chosen], positions[chosen]
    counts = np.bincount(rows, minlength=count)
    at = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    padded = np.full((count, int(counts.max(initial=0)) if width is None else width), -1, np.int64)
    within = at < padded.shape[1]
    padded[rows[within], at[within]] = positions[within]
    return padded


@dataclass(frozen=True)
class TrendingValue:
    """The trending items as serving reads them; `scores` are one a half-life of trends.half_lives_hours."""

    computed_at: int
    hour: str
    scores: Mapping[str, Scores]

    def encode(self) -> bytes:
        items = [[item, *np.atleast_1d(scores).tolist()] for item, scores in self.scores.items()]
        return orjson.dumps({"computed_at": self.computed_at, "hour": self.hour, "items": items})

    @classmethod
    def decode(cls, data: bytes) -> TrendingValue:
        """Items whose scores are no numbers are left out. Raises CorruptValue, also when that is all of them."""
        try:
            raw = orjson.loads(data)
            readable = dict(filter(None, map(_trending_item, raw["items"])))
            width = Counter(map(len, readable.values())).most_common(1)
            scores = {item: of_item for item, of_item in readable.items() if len(of_item) == width[0][0]}
            if raw["items"] and not scores:
                raise ValueError(f"none of {len(raw['items'])} items has scores")
            return cls(int(raw["computed_at"]), str(raw["hour"]), scores)
        except (ValueError, TypeError, KeyError) as error:
            raise CorruptValue(f"trending: {error}") from error


def _trending_item(entry: object) -> tuple[str, tuple[float, ...]] | None:
    if not isinstance(entry, list) or len(entry) < 2 or not isinstance(entry[0], str):
        return None
    scores = entry[1:]
    finite = all(isinstance(score, int | float) and math.isfinite(score) for score in scores)
    return (entry[0], tuple(map(float, scores))) if finite else None


def read_each_record(redis: Any, user_ids: Sequence[str], features: bool = True) -> list[UserRecord | CorruptValue]:
    """The records of users in one pipeline: an empty one for a user that has none, and what is wrong with one that is none.

    Without `features`, which only the user tower needs, there is half as much to read.
    """
    fields = RECORD_FIELDS if features else RECORD_FIELDS[:-1]
    missing = [None] * (len(RECORD_FIELDS) - len(fields))
    pipeline = redis.pipeline(transaction=False)
    for user_id in user_ids:
        pipeline.execute_command("HMGET", user_key(user_id), *fields)
    return [_decoded(answer, missing) for answer in pipeline.execute(raise_on_error=False)]


def _decoded(answer: Any, missing: list[None]) -> UserRecord | CorruptValue:
    if isinstance(answer, Exception):
        if is_of_wrong_type(answer):
            return CorruptValue(f"user record: {answer}")
        raise answer
    try:
        return UserRecord.decode([*answer, *missing])
    except CorruptValue as error:
        return error


def read_records(redis: Any, user_ids: Sequence[str], features: bool = True) -> list[UserRecord]:
    """The records of users, as `read_each_record` has them. Raises CorruptValue for one that is none."""
    found = read_each_record(redis, user_ids, features)
    for record in found:
        if isinstance(record, CorruptValue):
            raise record
    return found  # type: ignore[return-value]


def put_answers(
    answers: Sequence[tuple[str, bytes]], ttl_seconds: int, beside_record: bool, a_call: int
) -> list[tuple[object, ...]]:
    """The calls of PUT_ANSWERS that write encoded answers by user id, `a_call` of them by each."""
    calls = []
    for at in range(0, len(answers), a_call):
        some = answers[at : at + a_call]
        keys = [key for user_id, _ in some for key in (recs_key(user_id), user_key(user_id))]
        calls.append(PUT_ANSWERS.call(keys, ttl_seconds, int(beside_record), *(value for _, value in some)))
    return calls


def write_answers(redis: Any, answers: Iterable[tuple[str, bytes]], ttl_seconds: int, beside_record: bool = False) -> int:
    """Write encoded answers by user id in one pipeline, each unless PUT_ANSWERS says otherwise. Returns how many there were.

    `redis` is a redis-py client (standalone or cluster). Raises redis.RedisError.
    """
    made = list(answers)
    run_calls(redis, put_answers(made, ttl_seconds, beside_record, 1 if is_cluster(redis) else ANSWERS_A_CALL), [PUT_ANSWERS])
    return len(made)


def write_records(
    redis: Any, records: Iterable[tuple[str, UserRecord]], ttl_seconds: int, keep: int = 5, covered: int = 0
) -> int:
    """Write the fields of users' records in one pipeline; fields that a record does not hold stay as they are.

    Each record is merged by one server-side step: of `last` the `keep` newest actions of both sides stay and those since
    `covered` (ms), before which `seen` has all, of `last_ts` the later. So what the speed layer wrote is never lost.
    """
    calls = []
    for user_id, record in records:
        words = [word for pair in record.encode().items() for word in pair]
        if words:
            calls.append(WRITE.call([user_key(user_id)], keep, covered, ttl_seconds, *words))
    run_calls(redis, calls, [WRITE])
    return len(calls)
