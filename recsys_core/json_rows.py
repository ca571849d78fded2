"""JSON objects as rows: one a line, or the elements of one array, in bounded memory.

Every key of every object is a column, wherever in the file it first occurs. Numbers keep the digits that were written; a
whole number is written without a fraction, and NaN is a missing value.
"""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from decimal import Decimal
from typing import IO, Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from recsys_core.sources import MAX_LINE_BYTES, IngestError, Lines, RawBatch, Rejected, SourceFile

NO_OBJECT = "not a JSON object with fields"
EXACT_BELOW = 2.0**53
"""Larger numbers lose digits as floats."""
LONGEST_NUMBER = 400
MAX_CELLS = 10_000_000
"""Rows times keys of a batch. Where keys are data, such as ids, every row has keys of its own."""
PEEK_BYTES = 1 << 16
WINDOW_BYTES = 1 << 20


def json_columns(source: SourceFile, raw: IO[bytes], rows: int, needed: frozenset[str] | None) -> list[str]:
    """The keys of the first `rows` objects, and of further ones until all of `needed` were seen; of all for None.

    `a.b` is b in the object a. Raises IngestError for a file that holds something and no object.
    """
    names: dict[str, None] = {}
    number = 0
    for number, element in enumerate(_elements(source, raw), 1):
        if number > rows and names and needed is not None and needed <= names.keys():
            break
        if isinstance(element, dict):
            names |= dict.fromkeys(element)
            names |= dict.fromkeys(name for name in source.nested if _at(element, name) is not None)
    if number and not names:
        raise IngestError(f"{source.path}: no line is a JSON object with fields; an object a line or one array of them is read")
    return list(names)


def read_json(source: SourceFile, raw: IO[bytes], block_bytes: int) -> Iterator[RawBatch]:
    """All rows of a file in order. Raises IngestError for a broken array, and where rows do not add up to the lines."""
    if _is_array(raw):
        yield from _array_batches(source, raw, block_bytes)
        return
    lines = Lines(raw, source.path)
    number, accounted = 1, 0
    for block in lines.blocks(block_bytes):
        texts = [line for line in block.split(b"\n") if line.strip()]
        for batch in _batches(source, ((_object(text), text) for text in texts), number):
            accounted += batch.lines
            yield batch
        number += len(texts)
    lines.settle(accounted)


def _batches(source: SourceFile, found: Iterable[tuple[Any, bytes]], number: int) -> Iterator[RawBatch]:
    """The rows of some values, in one batch unless their keys are very many."""
    objects: list[dict[str, Any]] = []
    texts: list[bytes] = []
    rows: list[int] = []
    rejected: list[Rejected] = []
    for row, (element, text) in enumerate(found, number):
        if isinstance(element, dict) and element:
            objects.append(element)
            texts.append(text)
            rows.append(row)
        else:
            rejected.append(Rejected(row, NO_OBJECT, text.decode(errors="replace").rstrip("\r")))
    size = max(MAX_CELLS // max(len(set().union(*objects)), 1), 1)
    for at in range(0, max(len(objects), 1), size):
        some, number_of = objects[at : at + size], np.array(rows[at : at + size], dtype=np.int64)
        table = _table(source, some, texts[at : at + size])
        yield RawBatch(table, number_of, rejected, len(number_of) + len(rejected))
        rejected = []


def _table(source: SourceFile, objects: list[dict[str, Any]], texts: list[bytes]) -> pa.Table:
    names = dict.fromkeys(itertools.chain.from_iterable(objects))
    arrays = {name: _column([row.get(name) for row in objects], name, texts) for name in names}
    for name in source.nested:
        if name not in arrays:
            arrays[name] = _column([_at(row, name) for row in objects], name, texts)
    return pa.table(arrays)


def _column(values: list[Any], name: str, texts: list[bytes]) -> pa.Array:
    """The values of one key as text; `texts` are the lines that they are from."""
    try:
        found = pa.array(values)
    except (pa.ArrowException, OverflowError):
        found = pa.nulls(0)
    if pa.types.is_string(found.type):
        return pc.if_else(pc.equal(found, ""), pa.scalar(None, pa.string()), found)
    if pa.types.is_int64(found.type):
        return found.cast(pa.string())
    return pa.array([_json_text(_exact(value, name, text)) for value, text in zip(values, texts, strict=True)], pa.string())


def _exact(value: Any, name: str, line: bytes) -> Any:
    """A number with all digits of its line."""
    if type(value) is not float or -EXACT_BELOW < value < EXACT_BELOW:
        return value
    row = _exactly(line)
    return row[name] if name in row else _at(row, name)


def _at(value: Any, name: str) -> Any:
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


# -- a line ---------------------------------------------------------------------------------------------------------


def _object(line: bytes) -> Any:
    """The value on a line, None for what is no JSON."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return _exactly(line)


def _exactly(line: bytes) -> Any:
    """As `_object`, slower: with all digits of a number, with NaN as a missing value."""
    try:
        value = json.loads(line, parse_float=Decimal, parse_constant=_no_number)
        _dumped(value).encode()
    except (ValueError, RecursionError):
        return None
    return value


def _no_number(_: str) -> None:
    """NaN and the infinities are missing values."""


def _json_text(value: Any) -> str | None:
    """A JSON value as text; objects and lists stay JSON, an empty string is as good as none."""
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, float | Decimal):
        return number_text(value)
    return _dumped(value)


def number_text(value: float | Decimal) -> str:
    """A number as text, a whole one without a fraction or an exponent."""
    if isinstance(value, Decimal) and value and abs(value.adjusted()) > LONGEST_NUMBER:
        return str(value)
    return str(int(value)) if value == int(value) else str(value)


def _dumped(value: Any) -> str:
    try:
        return orjson.dumps(value, default=float).decode()
    except TypeError:
        # Integers of more than 64 bits.
        return json.dumps(value, default=float, ensure_ascii=False, separators=(",", ":"))


# -- an array -------------------------------------------------------------------------------------------------------


def _is_array(raw: IO[bytes]) -> bool:
    """Whether a file is one array of objects, and not lines of which the first is an array. Leaves the file at its start."""
    start = raw.read(PEEK_BYTES)
    raw.seek(0)
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text.startswith(b"["):
        return False
    line, end, rest = text.partition(b"\n")
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return True
    return not (end and rest.strip())


def _elements(source: SourceFile, raw: IO[bytes]) -> Iterator[Any]:
    if _is_array(raw):
        return _array(source, raw)
    return (
        _object(line) for block in Lines(raw, source.path).blocks(PEEK_BYTES) for line in block.split(b"\n") if line.strip()
    )


def _array_batches(source: SourceFile, raw: IO[bytes], block_bytes: int) -> Iterator[RawBatch]:
    elements = _array(source, raw)
    number = 1
    while held := list(itertools.islice(elements, max(block_bytes >> 8, 1))):
        found = (
            (element, b"{}" if element == {} else b"" if isinstance(element, dict) else _dumped(element).encode())
            for element in held
        )
        yield from (replace(batch, lines=0) for batch in _batches(source, found, number))
        number += len(held)


def _array(source: SourceFile, raw: IO[bytes]) -> Iterator[Any]:
    """The elements of the array that a file is. Raises IngestError where the array is broken."""
    text = _Window(raw)
    number = 1
    try:
        text.expect("[")
        if not text.skip("]"):
            yield text.value()
            while text.skip(","):
                number += 1
                yield text.value()
            text.expect("]")
        text.expect("")
    except (ValueError, RecursionError) as error:
        raise IngestError(f"{source.path}: the array can't be read at element {number}: {error}") from error


class _Window:
    """The part of a long JSON text that is being read."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._bytes = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._json = json.JSONDecoder(parse_float=Decimal, parse_constant=_no_number)
        self._text, self._at, self._ended = "", 0, False

    def expect(self, sign: str) -> None:
        """Go past a sign, or be at the end for the empty one. Raises ValueError."""
        if sign and not self.skip(sign):
            raise ValueError(f"{sign} is missing")
        if not sign and self._next():
            raise ValueError("something follows the end of the array")

    def skip(self, sign: str) -> bool:
        found = self._next() == sign
        self._at += found
        return found

    def value(self) -> Any:
        """The value that comes next; as a text with question marks what is no Unicode."""
        self._next()
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError:
                if not self._more():
                    raise
                continue
            # A number may go on behind the window.
            if end < len(self._text) or isinstance(value, dict) or not self._more():
                self._at = end
                return _unicode(value)

    def _next(self) -> str:
        while True:
            while self._at < len(self._text) and self._text[self._at].isspace():
                self._at += 1
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def _more(self) -> bool:
        """Read on. False at the end. Raises ValueError when one value is too long."""
        if len(self._text) - self._at > MAX_LINE_BYTES:
            raise ValueError(f"it is broken, or longer than {MAX_LINE_BYTES} characters")
        if self._ended:
            return False
        data = self._raw.read(WINDOW_BYTES)
        self._ended = not data
        self._text = self._text[self._at :] + self._bytes.decode(data, final=not data)
        self._at = 0
        return bool(data)


def _unicode(value: Any) -> Any:
    text = _dumped(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return value
