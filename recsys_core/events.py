"""The event, schema v1: its columns, its Arrow schema, what makes a row invalid, and ids made from content."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_core.errors import UserError
from recsys_core.settings import EventSettings

SCHEMA_VERSION = 1

EVENT_ID = "event_id"
USER_ID = "user_id"
ITEM_ID = "item_id"
EVENT_TYPE = "event_type"
TS = "ts"
SESSION_ID = "session_id"
DEVICE = "device"
COUNTRY = "country"
VALUE = "value"
RECOMMENDATION_ID = "recommendation_id"

EVENT_SCHEMA = pa.schema(
    [
        pa.field(EVENT_ID, pa.string(), nullable=False),
        pa.field(USER_ID, pa.string(), nullable=False),
        pa.field(ITEM_ID, pa.string(), nullable=False),
        pa.field(EVENT_TYPE, pa.string(), nullable=False),
        pa.field(TS, pa.int64(), nullable=False),
        pa.field(SESSION_ID, pa.string()),
        pa.field(DEVICE, pa.string()),
        pa.field(COUNTRY, pa.string()),
        pa.field(VALUE, pa.float64()),
        pa.field(RECOMMENDATION_ID, pa.string()),
    ]
)
"""Landing files have these columns; `ts` is milliseconds since 1970 (UTC)."""

MISSING_TS = -(2**63)
EARLIEST_TS = 631_152_000_000
"""1990-01-01: an event before it has a broken clock or a wrong unit."""

CONTENT_ID_BYTES = 16
"""Of the digest that an event without an id gets; written out they are twice as many characters."""

NEEDED = (USER_ID, ITEM_ID, EVENT_ID)
NAMES = (*NEEDED, SESSION_ID, DEVICE, COUNTRY, RECOMMENDATION_ID)
"""The ids and names of an event, in the order in which they are judged."""

HOLDS_NUL = "{} holds a NUL character"

NOT_FINITE = f"{VALUE} is not a finite number"
"""A NaN passes every comparison that it should fail, wherever the value is used."""

MINUTE_MS = 60_000
HOUR_MS = 60 * MINUTE_MS
DAY_MS = 24 * HOUR_MS


def now_ms() -> int:
    """The wall clock, milliseconds since 1970 (UTC)."""
    return time.time_ns() // 1_000_000


def hour_key(ts: int) -> str:
    """Partition key of the hour that contains `ts` (ms): `2026-01-31T09`."""
    return str(np.datetime64(ts // HOUR_MS, "h"))


def day_key(ts: int) -> str:
    """Partition key of the day that contains `ts` (ms): `2026-01-31`."""
    return str(np.datetime64(ts // DAY_MS, "D"))


class BadKey(UserError, ValueError):
    """What was given as an hour or a day is none."""


def key_start_ms(key: str) -> int:
    """First millisecond of the hour or day that a partition key names. Raises BadKey."""
    try:
        return int(np.datetime64(key, "ms").astype(np.int64))
    except ValueError as error:
        raise BadKey(f"{key!r} is neither a day such as 2026-01-31 nor an hour such as 2026-01-31T09: {error}") from None


def checked_key(key: str) -> str:
    """`key` if it is written as partition keys are, an hour or a day that there is. Raises BadKey."""
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}(T\d{2})?", key):
        raise BadKey(f"{key!r} is neither a day such as 2026-01-31 nor an hour such as 2026-01-31T09")
    key_start_ms(key)
    return key


def hour_keys(start_ms: int, end_ms: int) -> list[str]:
    """Keys of the hours that touch [start_ms, end_ms)."""
    return [hour_key(ts) for ts in range(start_ms // HOUR_MS * HOUR_MS, end_ms, HOUR_MS)]


def day_keys(start_ms: int, end_ms: int) -> list[str]:
    """Keys of the days that touch [start_ms, end_ms)."""
    return [day_key(ts) for ts in range(start_ms // DAY_MS * DAY_MS, end_ms, DAY_MS)]


def content_ids(columns: list[pa.Array | pa.ChunkedArray]) -> pa.Array:
    """128-bit hexadecimal ids, string (n,), that depend on nothing but the values of each row (BLAKE2b).

    Equal rows get equal ids on every machine, so a file that is ingested twice is deduplicated later.
    """
    if not columns:
        raise ValueError("content_ids needs at least one column")
    parts = []
    for column in columns:
        text = column.cast(pa.string())
        length = pc.fill_null(pc.binary_length(text), -1).cast(pa.string())
        parts += [length, pc.fill_null(text, "")]
    digests = []
    begun = blake2b(digest_size=CONTENT_ID_BYTES)
    for row in pc.binary_join_element_wise(*parts, ":").cast(pa.binary()).to_pylist():
        # Copying a hash costs less than making one, and this is a third of all that an ingest does.
        digest = begun.copy()
        digest.update(row)
        digests.append(digest.digest())
    text = b"".join(digests).hex().encode()
    starts = np.arange(0, len(text) + 1, 2 * CONTENT_ID_BYTES, dtype=np.int32)
    return pa.StringArray.from_buffers(len(digests), pa.py_buffer(starts), pa.py_buffer(text))


def invalid_reasons(
    events: pa.Table | pa.RecordBatch, settings: EventSettings, now: int | np.ndarray | None = None
) -> pa.Array:
    """Why each row can't be an event, string (n,), null where it can.

    `events` has the columns of EVENT_SCHEMA, nulls allowed everywhere. The first reason that applies is given. `now` is
    the moment that the future is judged by, in ms, for all rows or for each (int64 (n,)); without it, the clock.
    """
    latest = (now_ms() if now is None else now) + settings.max_future_minutes * MINUTE_MS
    rules: list[tuple[str, np.ndarray]] = []
    for name in NAMES:
        length = _byte_lengths(events[name])
        if name in NEEDED:
            rules.append((f"missing {name}", length == 0))
        rules.append((f"{name} longer than {settings.max_id_bytes} bytes", length > settings.max_id_bytes))
        if _may_hold_nul(events[name]):
            rules.append((HOLDS_NUL.format(name), _numpy(pc.fill_null(pc.match_substring(events[name], "\0"), False))))
    known = pc.is_in(events[EVENT_TYPE], value_set=pa.array(sorted(settings.weights), pa.string()))
    rules.append(("unknown event_type", ~_numpy(known)))
    # A missing time stands as the smallest integer.
    ts = _numpy(pc.fill_null(events[TS], MISSING_TS))
    rules.append(("missing or unreadable ts", ts == MISSING_TS))
    rules.append(("ts before 1990: wrong unit or broken clock", ts < EARLIEST_TS))
    rules.append(("ts in the future", ts > latest))
    rules.append((NOT_FINITE, ~_numpy(pc.fill_null(pc.is_finite(events[VALUE]), True))))
    first = np.full(len(ts), -1, np.int64)
    for number in range(len(rules) - 1, -1, -1):
        first[rules[number][1]] = number
    if (first < 0).all():
        return pa.nulls(len(ts), pa.string())
    return pa.array([text for text, _ in rules], pa.string()).take(pa.array(first, mask=first < 0))


def invalid_reason(event: Mapping[str, Any], settings: EventSettings, now: int) -> str | None:
    """What `invalid_reasons` says of one event, by its rules and in their order; `event` has every name of EVENT_SCHEMA."""
    longest = settings.max_id_bytes
    for name in NAMES:
        if not event[name]:
            if name in NEEDED:
                return f"missing {name}"
            continue
        if _is_longer(event[name], longest):
            return f"{name} longer than {longest} bytes"
        if "\0" in event[name]:
            return HOLDS_NUL.format(name)
    if event[EVENT_TYPE] not in settings.weights:
        return "unknown event_type"
    ts = event[TS]
    if ts is None or ts == MISSING_TS:
        return "missing or unreadable ts"
    if ts < EARLIEST_TS:
        return "ts before 1990: wrong unit or broken clock"
    if ts > now + settings.max_future_minutes * MINUTE_MS:
        return "ts in the future"
    return NOT_FINITE if event[VALUE] is not None and not math.isfinite(event[VALUE]) else None


def _is_longer(text: str, size: int) -> bool:
    """Whether a text has more bytes; a character has four at most."""
    return 4 * len(text) > size and len(text.encode()) > size


def _may_hold_nul(column: pa.Array | pa.ChunkedArray) -> bool:
    """Whether there is one among the bytes of all strings, and maybe of their neighbours."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    return any(b"\0" in content.to_pybytes() for chunk in chunks if (content := chunk.buffers()[2]))


def _byte_lengths(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Bytes of each string, 0 for a null."""
    return _numpy(pc.fill_null(pc.binary_length(column), 0))


def _numpy(values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    found: np.ndarray = values.to_numpy() if isinstance(values, pa.ChunkedArray) else values.to_numpy(zero_copy_only=False)
    return found
