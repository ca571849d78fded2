"""Messages to events: JSON of schema v1 in columns, and a reason for each message that is no event.

What a message is, `_row` says: a JSON object by the letter of the standard, nested at most MAX_DEPTH deep. Many values are
parsed together by Arrow. Whatever Arrow might read otherwise (a broken value, two values in one message, a wrong type, NaN,
deep nesting, a number beyond a double) is found beforehand or makes its slice be parsed again value by value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from recsys_core.events import EVENT_SCHEMA, SCHEMA_VERSION, TS, VALUE, invalid_reason, invalid_reasons
from recsys_core.settings import EventSettings

VERSION = "v"
SLICE = 4096
"""Values that are parsed again one by one when one of them is broken."""
FEW = 128
"""Up to so many values are faster one by one than by Arrow, whose reader costs as much as 100 values to start."""
_NULLABLE = pa.schema([pa.field(f.name, f.type) for f in EVENT_SCHEMA])
_COLUMNS = pa.schema([pa.field(VERSION, pa.int64()), *_NULLABLE])
_BLOCK = 64 << 20
MAX_DEPTH = 1024
"""Objects and lists within one another, as many as orjson reads."""
_NO_NUMBER = re.compile(rb"(?:NaN|Inf(?:inity)?)[,}\]\s]")
"""What Arrow takes for a number, and the standard does not. Text that looks like it costs time and nothing else."""
_MAY_BE_HUGE = re.compile(rb"\d{200}|[eE]\+?\d{3}")
_STRING_OR_NUMBER = re.compile(rb'"(?:[^"\\]++|\\.)*+\\?(?:"|\Z)|-?(?:0|[1-9]\d*+)(?:\.\d++)?+(?:[eE][+-]?\d++)?+', re.DOTALL)
_MAX_INT = 2**63
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(_COLUMNS.names, ((str,), "a string")),
    **dict.fromkeys((VERSION, TS), ((int,), "an integer")),
    VALUE: ((int, float), "a finite number"),
}
"""What each known field may be, and how that is called."""
_VALUE_AT = _COLUMNS.get_field_index(VALUE)
_FIELDS = tuple((name, *_KINDS[name]) for name in _COLUMNS.names)
_WRONG_VERSION = f"schema version is not {SCHEMA_VERSION}"


@dataclass(frozen=True)
class Decoded:
    """What a batch of messages holds.

    Attributes:
        events: EVENT_SCHEMA, the valid ones in the order of the messages.
        rows: int64, the position of the message of each event.
        rejected: position and reason of each other message.
    """

    events: pa.Table
    rows: np.ndarray
    rejected: list[tuple[int, str]]


def decode(values: Sequence[bytes | None], settings: EventSettings, max_bytes: int, appended: np.ndarray) -> Decoded:
    """Parse and judge the values of messages.

    `appended` int64 (n,) is the broker's time of each (ms), by which the future is judged: a replay judges alike.
    """
    refused: dict[int, str] = {}
    tables = []
    for at in range(0, len(values), SLICE * 4):
        tables += _parse(values[at : at + SLICE * 4], at, max_bytes, refused)
    rows = pa.concat_tables(tables)
    reasons = invalid_reasons(rows, settings, appended)
    wrong = pc.fill_null(rows[VERSION], 0).to_numpy() != SCHEMA_VERSION
    if wrong.any() or reasons.null_count < len(reasons):
        bad = wrong | reasons.is_valid().to_numpy(zero_copy_only=False)
        for row in np.flatnonzero(bad).tolist():
            refused.setdefault(row, _WRONG_VERSION if wrong[row] else reasons[row].as_py())
    kept = np.arange(len(values), dtype=np.int64)
    if refused:
        kept = np.delete(kept, sorted(refused))
        rows = rows.take(pa.array(kept))
    events = pa.Table.from_arrays([rows[name] for name in EVENT_SCHEMA.names], schema=EVENT_SCHEMA)
    return Decoded(events, kept, sorted(refused.items()))


def decode_one(value: bytes | None, settings: EventSettings, max_bytes: int, appended: int) -> dict[str, Any]:
    """`decode` for one message: the fields of its event by their names. Raises ValueError with the reason when it is none."""
    row = _row(value, max_bytes)
    if row[VERSION] != SCHEMA_VERSION:
        raise ValueError(_WRONG_VERSION)
    if reason := invalid_reason(row, settings, appended):
        raise ValueError(reason)
    return row


def _parse(values: Sequence[bytes | None], start: int, max_bytes: int, refused: dict[int, str]) -> list[pa.Table]:
    """Tables of `_COLUMNS` with a row for each value, empty rows for those that are refused."""
    table = _parse_together(values, max_bytes) if len(values) > FEW else None
    if table is not None:
        return [table]
    if len(values) > SLICE:
        parts = [(values[at : at + SLICE], start + at) for at in range(0, len(values), SLICE)]
        return [table for part, at in parts for table in _parse(part, at, max_bytes, refused)]
    return [_parse_each(values, start, max_bytes, refused)]


def _parse_together(values: Sequence[bytes | None], max_bytes: int) -> pa.Table | None:
    """All values at once, None when that might differ from parsing each: lines must be exactly the values."""
    try:
        lines = b"\n".join(values)  # type: ignore[arg-type]
    except TypeError:
        return None
    lengths = np.fromiter(map(len, values), np.int64, len(values))  # type: ignore[arg-type]
    longest = int(lengths.max())
    if longest > max_bytes or int(lengths.min()) == 0 or lines.count(b"\n") != len(values) - 1:
        return None
    # Between a closing and an opening brace no object goes on, so that none reaches over the end of its message.
    ends = np.cumsum(lengths + 1) - 1
    text = np.frombuffer(lines, np.uint8)
    if (text[ends - lengths] != ord("{")).any() or (text[ends - 1] != ord("}")).any():
        return None
    if (b"\\" in lines and b"\\u" in lines) or not _is_text(lines) or _may_hold_nan(lines, text):
        return None
    if longest > 2 * MAX_DEPTH and _is_deep(values):
        return None
    try:
        table = pj.read_json(
            pa.BufferReader(lines),
            read_options=pj.ReadOptions(use_threads=False, block_size=_BLOCK),
            parse_options=pj.ParseOptions(explicit_schema=_COLUMNS, unexpected_field_behavior="ignore"),
        )
    except pa.ArrowInvalid:
        return None
    if table.num_rows != len(values) or not table.schema.equals(_COLUMNS):
        return None
    value = pc.add(table[VALUE], 0.0)
    if not pc.all(pc.is_finite(value), min_count=0).as_py():
        return None
    return table.set_column(_VALUE_AT, _COLUMNS.field(_VALUE_AT), value)


def _may_hold_nan(lines: bytes, text: np.ndarray) -> bool:
    """Whether NaN or an infinity may stand where a number does; `text` are the bytes of `lines`."""
    at = np.flatnonzero((text[:-3] == ord("N")) | (text[:-3] == ord("I")))
    begins = ((text[at + 1] == ord("a")) & (text[at + 2] == ord("N"))) | (
        (text[at + 1] == ord("n")) & (text[at + 2] == ord("f"))
    )
    return bool(begins.any()) and _NO_NUMBER.search(lines) is not None


def _is_deep(values: Sequence[bytes | None]) -> bool:
    """Whether one of the values may be nested deeper than MAX_DEPTH, which takes two bytes for each level."""
    long = (value for value in values if value and len(value) > 2 * MAX_DEPTH)
    return any(value.count(b"{") + value.count(b"[") > MAX_DEPTH for value in long)


def _is_text(data: bytes) -> bool:
    if data.isascii():
        return True
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _parse_each(values: Sequence[bytes | None], start: int, max_bytes: int, refused: dict[int, str]) -> pa.Table:
    rows: list[dict[str, Any]] = []
    for at, value in enumerate(values):
        row: dict[str, Any] = {}
        try:
            row = _row(value, max_bytes)
        except ValueError as error:
            refused[start + at] = str(error)
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=_COLUMNS)


def _row(value: bytes | None, max_bytes: int) -> dict[str, Any]:
    """The known fields of one value. Raises ValueError with the reason for what is no event."""
    if not value:
        raise ValueError("no value")
    if len(value) > max_bytes:
        raise ValueError(f"value longer than {max_bytes} bytes")
    found = _loads(value)
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    row: dict[str, Any] = {}
    for name, kinds, what in _FIELDS:
        field = row[name] = found.get(name)
        if field is None:
            continue
        kind = type(field)
        if kind not in kinds:
            raise ValueError(f"{name} is not {what}")
        if name == VALUE:
            # Adding zero makes one zero of two.
            row[name] = float(field) + 0.0
        elif kind is int and not -_MAX_INT <= field < _MAX_INT:
            raise ValueError(f"{name} out of range")
    return row


def _loads(value: bytes) -> Any:
    """The JSON of a message. A number beyond a double is valid JSON: where no number is wanted, nobody minds it."""
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        pass
    try:
        return orjson.loads(_STRING_OR_NUMBER.sub(_without_huge, value) if _MAY_BE_HUGE.search(value) else value)
    except orjson.JSONDecodeError:
        raise ValueError("not JSON") from None


def _without_huge(found: re.Match[bytes]) -> bytes:
    """A string or number as it is, but `true` for a number beyond a double, which is of no type that a known field has."""
    token = found[0]
    return token if token.startswith(b'"') or math.isfinite(float(token)) else b"true"
