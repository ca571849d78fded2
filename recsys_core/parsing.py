"""Text columns to names, times, numbers and truth values; what can't be read becomes null, never an error."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

INTEGER = r"^[+-]?([0-9]{1,18}|[1-8][0-9]{18})$"
"""Fits int64."""
DECIMAL = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,2})?$"
UNITS_IN_A_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
MAX_TS = 253_402_300_800_000
"""The year 10000 (ms); a time beyond it is not a time."""

DAY_FIRST, MONTH_FIRST = "dmy", "mdy"

NOTHING_WORDS = (
    *("null", "(null)", "<null>", "[null]", "\\n", "none", "nan", "-nan", "nat", "n/a", "#n/a", "<na>", "<nan>", "nil"),
    *("undefined", "[]", "{}"),
)
"""Words, in lower case, that programs write for a value that isn't there."""
NOTHING = tuple(
    dict.fromkeys(form for w in NOTHING_WORDS for form in (w, w.upper(), w.capitalize(), w.title(), "NaN", "NaT", "-NaN"))
)
NO_ID = (*NOTHING, "NA", "#NA", "-", "--", "?")
"""What is no id besides; in a country NA is Namibia."""
WRITTEN_FLOAT = r"^[+-]?([0-9]+\.0*|[0-9]\.?[0-9]*[eE]\+[0-9]{2}|[0-9]\.[0-9]+E[0-9]{1,2})$"
"""A number as programs write those that they hold as floats: 42.0, 1e+15, 1E+15, 1.0E15. `1e5` may be a name."""

SPACES = " \u00a0\u2009\u202f'\u2019"
"""What stands between thousands, beside the comma and the point."""
MINUS = "\u2212"
CURRENCY = re.compile(
    r"^(?:[A-Z]{3}|[A-Za-z]{0,3}[$\u00a2-\u00a5\u20a0-\u20cf]|(?:kr|z\u0142|K\u010d|Ft|lei|TL|Rs|Fr)\.?)$",
)
AMOUNT = re.compile(r"^([+\-\u2212]?)\s*([^\d\s.,+\-]{0,5}\.?)\s*([+\-\u2212]?)(\d[\d.,\s'\u2019]*?)\s*([^\d\s.,]{0,5}\.?)$")
POINT_GROUPED = re.compile(rf"^[1-9]\d{{0,2}}(?:([,{SPACES}])\d{{3}})(?:\1\d{{3}})*(\.\d+)?$")
COMMA_GROUPED = re.compile(rf"^[1-9]\d{{0,2}}(?:([.{SPACES}])\d{{3}})(?:\1\d{{3}})*(,\d+)?$")

TRUE = ("true", "t", "yes", "y", "1", "1.0", "in stock", "available")
FALSE = ("false", "f", "no", "n", "0", "0.0", "out of stock", "unavailable", "sold out")


def parse_ts(text: pa.Array | pa.ChunkedArray, unit: str) -> pa.ChunkedArray:
    """Times as int64 milliseconds since 1970 (UTC). `unit` is s, ms, us or ns for numbers; iso, dmy or mdy for dates.

    Integers and decimals, also with an exponent, count units since 1970. Whatever is no number is read as ISO 8601
    (`T` or a blank between date and time, fractions, `Z`, `UTC` or an offset; without a zone it is UTC) or as 31.12.2026.
    Dates with slashes begin with the year, unless the unit is dmy (31/12/2026) or mdy (12/31/2026).
    """
    text = pc.utf8_trim_whitespace(_chunked(text))
    if unit in ("iso", DAY_FIRST, MONTH_FIRST):
        return _dates(text, unit)
    parts = UNITS_IN_A_SECOND[unit]
    integers = _where(pc.match_substring_regex(text, INTEGER), text)
    whole = pc.utf8_ltrim(integers, characters="+").cast(pa.int64())
    if parts > 1000:
        exact = pc.divide(whole, parts // 1000)
    else:
        scale = 1000 // parts
        exact = pc.multiply(_where(pc.less_equal(pc.abs(whole), MAX_TS // scale), whole), scale)
    broken = pc.multiply(_where(pc.is_null(exact), parse_decimal(text)), 1000 / parts)
    rounded = pc.round(_where(pc.less(pc.abs(broken), MAX_TS), broken)).cast(pa.int64())
    ms = pc.coalesce(exact, rounded)
    if ms.null_count:
        ms = pc.coalesce(ms, _dates(_where(pc.invert(pc.match_substring_regex(text, DECIMAL)), text), unit))
    return _where(pc.less(pc.abs(ms), MAX_TS), ms)


def _dates(text: pa.ChunkedArray, unit: str) -> pa.ChunkedArray:
    ms = _iso(text)
    if ms.null_count == text.null_count:
        return ms
    left = _where(pc.is_null(ms), text)
    separators = "[./-]" if unit in (DAY_FIRST, MONTH_FIRST) else r"\."
    order = r"\3-\1-\2\4" if unit == MONTH_FIRST else r"\3-\2-\1\4"
    for pattern, form in (
        (rf"^([0-9]{{1,2}}){separators}([0-9]{{1,2}}){separators}([0-9]{{4}})(\D.*)?$", order),
        (r"^([0-9]{4})/([0-9]{1,2})/([0-9]{1,2})(\D.*)?$", r"\1-\2-\3\4"),
        (r"-([0-9])\b", r"-0\1"),
        (r"^([0-9]{4}-[0-9]{2}-[0-9]{2}),?\s+", r"\1 "),
        (r"(:[0-9]{2}),([0-9]+)", r"\1.\2"),
    ):
        left = pc.replace_substring_regex(left, pattern, form)
    return pc.coalesce(ms, _iso(left))


def _iso(text: pa.ChunkedArray) -> pa.ChunkedArray:
    zoned = pc.replace_substring_regex(text, r"(?i)\s*(utc|gmt)$", "Z")
    dated = _where(pc.match_substring_regex(zoned, r"^[0-9]{4}-[0-9]{2}-[0-9]{2}"), zoned)
    times = pd.to_datetime(dated.to_pandas(), format="ISO8601", utc=True, errors="coerce")
    return _chunked(pa.Array.from_pandas(times).cast(pa.timestamp("ms"), safe=False).cast(pa.int64()))


def parse_decimal(text: pa.Array | pa.ChunkedArray) -> pa.ChunkedArray:
    """Finite decimal numbers as float64; a decimal comma, a currency, `nan` and `inf` are null."""
    trimmed = pc.utf8_trim_whitespace(_chunked(text))
    values = _where(pc.match_substring_regex(trimmed, DECIMAL), trimmed).cast(pa.float64())
    return _where(pc.is_finite(values), values)


def parse_amount(text: pa.Array | pa.ChunkedArray, decimal: Literal[".", ","] = ".") -> pa.ChunkedArray:
    """Numbers as people write them, as float64: with a currency, a decimal comma, thousands in groups.

    `decimal` decides only what else is open: "1,299" and "1.299" are thousands where the other sign is the decimal one.
    """
    trimmed = pc.utf8_trim_whitespace(_chunked(text))
    plain = parse_decimal(trimmed)
    left = _where(pc.is_null(plain), trimmed) if decimal == "." else trimmed
    if left.null_count == len(left):
        return plain
    return pc.coalesce(by_value(left, lambda value: _amount(value, decimal), pa.float64()), plain)


def _amount(text: str, decimal: str) -> float | None:
    found = AMOUNT.match(text)
    if not found:
        return None
    sign, before, inner, number, after = found.groups()
    if (sign and inner) or any(unit and not CURRENCY.match(unit) for unit in (before, after)):
        return None
    plain = _plain_number(number, decimal)
    value = float(plain) if plain else math.inf
    return None if math.isinf(value) else -value if sign + inner in ("-", MINUS) else value


def _plain_number(number: str, decimal: str) -> str | None:
    """A number with a decimal point and nothing between its thousands."""
    comma = re.fullmatch(r"\d+,\d+", number) is not None
    point = re.fullmatch(r"\d+(\.\d*)?", number) is not None
    if (point and decimal == ".") or (comma and decimal == ","):
        return number.replace(",", ".")
    if POINT_GROUPED.match(number):
        return re.sub(f"[,{SPACES}]", "", number)
    if COMMA_GROUPED.match(number):
        return re.sub(f"[.{SPACES}]", "", number).replace(",", ".")
    return number.replace(",", ".") if comma or point else None


def parse_names(text: pa.Array | pa.ChunkedArray, nothing: tuple[str, ...] = NOTHING) -> pa.ChunkedArray:
    """Ids and other names without the blanks around them; words for nothing are null, a float's whole number is written as one.

    Most columns hold none of that, so their bytes are looked through first.
    """
    column = _chunked(text)
    signs = _bytes_of(column)
    if not signs.isascii() or any(blank in signs for blank in b" \t\n\r\x0b\x0c"):
        column = pc.utf8_trim_whitespace(column)
    if any(letter in signs for letter in b"nN-?[{"):
        column = _where(pc.invert(pc.is_in(column, pa.array(nothing))), column)
    if ord(".") in signs or ord("+") in signs:
        floats = _where(pc.match_substring_regex(column, WRITTEN_FLOAT), column)
        if floats.null_count < len(floats):
            column = pc.coalesce(by_value(floats, _whole_number, pa.string()), column)
    return _where(pc.not_equal(pc.binary_length(column), 0), column)


def is_nothing(text: pa.ChunkedArray) -> pa.ChunkedArray:
    """Whether a text stands for a value that isn't there, bool (n,); a null does."""
    trimmed = pc.fill_null(pc.utf8_trim_whitespace(text), "")
    return pc.is_in(trimmed, pa.array(["", *NO_ID]))


def _whole_number(text: str) -> str:
    number = Decimal(text)
    return str(int(number)) if number == int(number) else text


def _bytes_of(column: pa.ChunkedArray) -> bytes:
    """The bytes of all values, and maybe of their neighbours."""
    return b"".join(chunk.buffers()[2].to_pybytes() for chunk in column.chunks if chunk.buffers()[2])


def by_value(text: pa.ChunkedArray, read: Callable[[str], Any], kind: pa.DataType) -> pa.ChunkedArray:
    """`read` of each value, called once for each distinct one."""
    values = pc.unique(text).drop_null()
    known = pa.array([read(value) for value in values.to_pylist()], kind)
    return _chunked(known.take(pc.index_in(text, values).combine_chunks()))


def parse_bool(text: pa.Array | pa.ChunkedArray) -> pa.ChunkedArray:
    """Truth values in the usual spellings, any case."""
    lower = pc.utf8_lower(pc.utf8_trim_whitespace(_chunked(text)))
    true = pc.is_in(lower, value_set=pa.array(TRUE))
    false = pc.is_in(lower, value_set=pa.array(FALSE))
    return _where(pc.or_(true, false), true)


def _chunked(values: pa.Array | pa.ChunkedArray) -> pa.ChunkedArray:
    return values if isinstance(values, pa.ChunkedArray) else pa.chunked_array([values])


def _where(mask: pa.ChunkedArray, values: pa.ChunkedArray) -> pa.ChunkedArray:
    """`values` where `mask` holds, else null."""
    return pc.if_else(mask, values, pa.scalar(None, values.type))
