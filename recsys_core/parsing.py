"""Text columns to times, numbers and truth values; what can't be read becomes null, never an error."""

from __future__ import annotations

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

INTEGER = r"^[+-]?([0-9]{1,18}|[1-8][0-9]{18})$"
"""Fits int64."""
DECIMAL = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,2})?$"
UNITS_IN_A_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
MAX_TS = 253_402_300_800_000
"""The year 10000 (ms); a time beyond it is not a time."""

TRUE = ("true", "t", "yes", "y", "1", "1.0", "in stock", "available")
FALSE = ("false", "f", "no", "n", "0", "0.0", "out of stock", "unavailable", "sold out")


def parse_ts(text: pa.Array | pa.ChunkedArray, unit: str) -> pa.ChunkedArray:
    """Times as int64 milliseconds since 1970 (UTC). `unit` is s, ms, us or ns for numbers, iso for dates.

    Integers and decimals, also with an exponent, count units since 1970. Whatever is no number is read as ISO 8601
    (`T` or a blank between date and time, fractions, `Z`, `UTC` or an offset; without a zone it is UTC).
    """
    text = pc.utf8_trim_whitespace(_chunked(text))
    if unit == "iso":
        return _iso(text)
    parts = UNITS_IN_A_SECOND[unit]
    whole = _where(pc.match_substring_regex(text, INTEGER), text).cast(pa.int64())
    if parts > 1000:
        exact = pc.divide(whole, parts // 1000)
    else:
        scale = 1000 // parts
        exact = pc.multiply(_where(pc.less_equal(pc.abs(whole), MAX_TS // scale), whole), scale)
    broken = pc.multiply(_where(pc.is_null(exact), parse_decimal(text)), 1000 / parts)
    rounded = pc.round(_where(pc.less(pc.abs(broken), MAX_TS), broken)).cast(pa.int64())
    ms = pc.coalesce(exact, rounded)
    if ms.null_count:
        ms = pc.coalesce(ms, _iso(_where(pc.invert(pc.match_substring_regex(text, DECIMAL)), text)))
    return _where(pc.less(pc.abs(ms), MAX_TS), ms)


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
