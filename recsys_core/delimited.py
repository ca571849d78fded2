"""Delimited text, record by record: CSV and its kin, with whatever delimiter, header, quotes and damage.

Blocks of whole lines go through Arrow where every line is one record. A block with a stray quote, a quoted line end or bytes
that are not UTF-8 is read record by record, so that one bad line costs one row and never its neighbours.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.csv

from recsys_core.sources import MAX_LINE_BYTES, IngestError, Lines, RawBatch, Rejected, SourceFile, filled_lines

DELIMITERS = (",", "\t", ";", "|", "::")
"""What is looked for where no delimiter is named; of those that fit alike the first is taken."""
SAMPLE_LINES = 20
SAMPLE_BYTES = 1 << 16
MAX_RECORD_LINES = 1000
"""A quoted value that spans more lines is taken for a stray quote."""
COINCIDENCES = 6
"""So many delimiters inside a quoted value, each just where records would have it, are no chance."""
SEPARATOR = "\x1f"
"""Stands for a delimiter of several bytes; it is the character that ASCII has for this."""

RAGGED = "{found} columns where {wanted} are expected"
NOT_UTF8 = "not UTF-8"
OPEN_QUOTE = "a quote that is never closed"
INNER_QUOTE = "a quote inside a value"
CARRIAGE_RETURN = "a carriage return inside a row"

csv.field_size_limit(MAX_LINE_BYTES)


@dataclass(frozen=True)
class Layout:
    """How a file's lines are records: the delimiter, the names of the columns, and the lines before the first record.

    `one_line` are the columns whose values hold no line end.
    """

    delimiter: str
    names: tuple[str, ...]
    preface: int
    one_line: frozenset[str]

    @property
    def quoted(self) -> bool:
        """A writer that puts several characters between fields has no quotes."""
        return len(self.delimiter.encode()) == 1

    @property
    def separator(self) -> str:
        return self.delimiter if self.quoted else SEPARATOR

    @property
    def width(self) -> int:
        return len(self.names)


def sample_of(source: SourceFile, raw: IO[bytes]) -> list[str]:
    """The first lines of a file that are not blank. Raises IngestError for what is no UTF-8 in the first of them."""
    lines = Lines(raw, source.path)
    return _first_lines(source, _start(lines, lines.blocks(SAMPLE_BYTES)))


def layout_of(source: SourceFile, sample: list[str]) -> Layout:
    """The layout that a file's first lines show, as far as `source` does not name it."""
    lines = sample
    delimiter = source.delimiter
    if lines and len(lines[0]) == 5 and lines[0].startswith("sep="):
        # Spreadsheets write the delimiter above the header.
        delimiter, lines = delimiter or lines[0][4], lines[1:]
    if source.ending == ".tsv":
        delimiter = "\t"
    delimiter = delimiter or _sniffed(lines)
    names = _unique(list(source.header) or (fields_of(lines[0], delimiter) if lines else []))
    return Layout(delimiter, tuple(names), len(sample) - len(lines) + (not source.header and bool(lines)), source.one_line)


def fields_of(line: str, delimiter: str) -> list[str]:
    """The fields of one line, without the blanks around them."""
    if len(delimiter.encode()) > 1:
        return [field.strip() for field in line.split(delimiter)]
    try:
        return [field.strip() for field in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return [field.strip() for field in line.split(delimiter)]


def _sniffed(lines: list[str]) -> str:
    """The delimiter that cuts most of the lines into as many fields as the first one, and into the most."""

    def fitness(delimiter: str) -> tuple[bool, int]:
        widths = [len(fields_of(line, delimiter)) for line in lines]
        return 2 * widths.count(widths[0]) > len(widths), widths[0]

    candidates = [delimiter for delimiter in DELIMITERS if lines and delimiter in lines[0]]
    return max(candidates, key=fitness, default=DELIMITERS[0])


def _unique(fields: list[str]) -> list[str]:
    taken = set(fields)
    seen: dict[str, int] = {}
    names = []
    for name in fields:
        number = seen[name] = seen.get(name, 0) + 1
        unique = name
        while number > 1 and (unique := f"{name}.{seen[name]}") in taken:
            seen[name] += 1
        taken.add(unique)
        names.append(unique)
    return names


def _start(lines: Lines, blocks: Iterator[bytes]) -> bytes:
    start = b""
    for block in blocks:
        start += block
        if lines.count >= SAMPLE_LINES:
            break
    return start


def _first_lines(source: SourceFile, start: bytes) -> list[str]:
    filled = itertools.islice((line for line in io.BytesIO(start) if line.strip()), SAMPLE_LINES)
    texts = [line.decode(errors="replace").rstrip("\r\n") for line in filled]
    if texts and not source.header and ("\ufffd" in texts[0] or "\r" in texts[0]):
        raise IngestError(f"{source.path}: the first line is not delimited UTF-8 text")
    return texts


def read_delimited(source: SourceFile, raw: IO[bytes], block_bytes: int) -> Iterator[RawBatch]:
    """All rows of a file in order. Raises IngestError where they do not add up to its lines."""
    lines = Lines(raw, source.path)
    blocks = lines.blocks(block_bytes)
    start = _start(lines, blocks)
    layout = layout_of(source, _first_lines(source, start))
    start = _without_preface(start, layout.preface)
    accounted, number, rest = layout.preface, 1, b""
    for block in itertools.chain([start], blocks, [b""]):
        batch, rest = _parsed(rest + block, layout, number, at_end=not block and block is not start)
        yield batch
        number += len(batch.rows) + len(batch.rejected)
        accounted += batch.lines
    lines.settle(accounted)


def _without_preface(start: bytes, preface: int) -> bytes:
    stream = io.BytesIO(start)
    while preface:
        preface -= bool(stream.readline().strip())
    return stream.read()


def _parsed(block: bytes, layout: Layout, number: int, at_end: bool) -> tuple[RawBatch, bytes]:
    """The rows of whole lines, and the tail that begins with a quoted value the block does not end."""
    if not layout.quoted:
        block = block.replace(layout.delimiter.encode(), SEPARATOR.encode())
    batch = _regular(block, layout, number)
    return (batch, b"") if batch else _irregular(block, layout, number, at_end)


# -- lines that are records -----------------------------------------------------------------------------------------


def _regular(block: bytes, layout: Layout, number: int) -> RawBatch | None:
    """Parse whole lines, one record each; None when they are not."""
    quotes = layout.quoted and b'"' in block
    returns = b"\r" in block and block.count(b"\r") != block.count(b"\r\n")
    if returns or not _is_utf8(block) or (quotes and not _is_well_quoted(block, layout)):
        return None
    records = filled_lines(block)
    if records == 0:
        return _batch([], layout, [], [], 0)
    skipped: list[pa.csv.InvalidRow] = []

    def skip(row: pa.csv.InvalidRow) -> str:
        skipped.append(row)
        return "skip"

    try:
        table = pa.csv.read_csv(
            io.BytesIO(block),
            pa.csv.ReadOptions(use_threads=False, block_size=len(block) + 1, column_names=layout.names),
            pa.csv.ParseOptions(delimiter=layout.separator, quote_char='"' if quotes else False, invalid_row_handler=skip),
            pa.csv.ConvertOptions(
                check_utf8=False,
                column_types=dict.fromkeys(layout.names, pa.string()),
                strings_can_be_null=True,
                null_values=[""],
                quoted_strings_can_be_null=True,
            ),
        )
    except pa.ArrowInvalid:
        return None
    if table.num_rows + len(skipped) != records:
        return None
    ragged = [
        Rejected(
            number + r.number - 1, RAGGED.format(found=r.actual_columns, wanted=r.expected_columns), _content(r.text, layout)
        )
        for r in skipped
    ]
    rows = np.setdiff1d(np.arange(number, number + records), [r.row for r in ragged], assume_unique=True)
    return RawBatch(table, rows, ragged, records)


def _is_utf8(block: bytes) -> bool:
    try:
        return block.isascii() or bool(block.decode())
    except UnicodeDecodeError:
        return False


def _is_well_quoted(block: bytes, layout: Layout) -> bool:
    """Whether each line has quotes only around whole fields and, doubled, inside of quoted ones."""
    data = np.frombuffer(b"\n" + block + b"\n", np.uint8)
    marks = np.flatnonzero((data == ord('"')) | (data == ord("\n")))
    is_quote = data[marks] == ord('"')
    so_far = np.cumsum(is_quote)
    if (so_far[~is_quote] % 2).any():
        return False
    quotes = marks[is_quote]
    fence = np.zeros(256, bool)
    fence[[ord(layout.delimiter), ord("\n"), ord("\r"), ord('"')]] = True
    return bool(fence[data[quotes[::2] - 1]].all() and fence[data[quotes[1::2] + 1]].all())


# -- lines of any kind ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Record:
    """What begins at a line: its fields, or why it has none, and the lines that it takes."""

    fields: list[str]
    reason: str
    used: int


def _irregular(block: bytes, layout: Layout, number: int, at_end: bool) -> tuple[RawBatch, bytes]:
    lines = block.removesuffix(b"\n").split(b"\n")
    values: list[list[str]] = []
    rows: list[int] = []
    rejected: list[Rejected] = []
    at, row, filled, tail = 0, number, 0, b""
    while at < len(lines):
        if not lines[at].strip():
            at += 1
            continue
        record = _record(lines, at, layout, at_end)
        if record is None:
            tail = block[sum(len(line) + 1 for line in lines[:at]) :]
            break
        taken = lines[at : at + record.used]
        if record.reason:
            rejected.append(Rejected(row, record.reason, _content(b"\n".join(taken).decode(errors="replace"), layout)))
        else:
            values.append(record.fields)
            rows.append(row)
        filled += sum(1 for line in taken if line.strip())
        at, row = at + record.used, row + 1
    return _batch(values, layout, rows, rejected, filled), tail


def _record(lines: list[bytes], at: int, layout: Layout, at_end: bool) -> _Record | None:
    """The record that begins at a line; None when it may go on after the last of `lines`."""
    line = _text(lines[at])
    if '"' not in line or not layout.quoted:
        return _checked(line.split(layout.separator), 1, layout, CARRIAGE_RETURN if "\r" in line else "")
    alone = _strict([line], layout)
    if alone.reason != OPEN_QUOTE and (not alone.reason or '\\"' not in line):
        return alone
    escaped = _strict([line], layout, doublequote=False, escapechar="\\") if '\\"' in line else alone
    if not escaped.reason or alone.reason != OPEN_QUOTE:
        return alone if escaped.reason else escaped
    window = [_text(line) for line in lines[at : at + MAX_RECORD_LINES]]
    several = _strict(window, layout)
    if several.reason == OPEN_QUOTE:
        may_go_on = not at_end and at + len(window) == len(lines) and len(window) < MAX_RECORD_LINES
        return None if may_go_on else alone
    if several.reason == INNER_QUOTE or _swallows_records(window[: several.used], several.fields, layout):
        return alone
    return several


def _text(line: bytes) -> str:
    return line.decode(errors="surrogateescape").removesuffix("\r")


def _checked(fields: list[str], used: int, layout: Layout, reason: str = "") -> _Record:
    if not reason and len(fields) != layout.width:
        reason = RAGGED.format(found=len(fields), wanted=layout.width)
    text = "".join(fields)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            reason = NOT_UTF8
    return _Record(fields, reason, used)


def _strict(lines: list[str], layout: Layout, doublequote: bool = True, escapechar: str | None = None) -> _Record:
    """The first record of some lines, read as RFC 4180 has it."""
    exhausted = False

    def feed() -> Iterator[str]:
        nonlocal exhausted
        yield from (f"{line}\n" for line in lines)
        exhausted = True

    reader = csv.reader(feed(), delimiter=layout.delimiter, strict=True, doublequote=doublequote, escapechar=escapechar)
    try:
        fields = next(reader)
    except csv.Error:
        reason = OPEN_QUOTE if exhausted else CARRIAGE_RETURN if "\r" in lines[0] else INNER_QUOTE
        return _Record([], reason, 1)
    return _checked(fields, reader.line_num, layout)


def _swallows_records(lines: list[str], fields: list[str], layout: Layout) -> bool:
    """Whether what reads as one record of several lines is two stray quotes with records between them.

    Its form cannot tell: a quoted text may hold anything. But a text whose every line has just the delimiters of a record is
    none, and a value that holds no line ends, such as an id, does not span lines.
    """
    whole = sum(line.count(layout.delimiter) + 1 == layout.width for line in lines)
    if len(fields) != layout.width:
        return whole > 0
    spans = any("\n" in field for field, name in zip(fields, layout.names, strict=True) if name in layout.one_line)
    lone = lines[0].count('"') == lines[-1].count('"') == 1
    return lone and whole == len(lines) and (spans or (len(lines) - 1) * (layout.width - 1) >= COINCIDENCES)


def _content(text: str, layout: Layout) -> str:
    return (text if layout.quoted else text.replace(SEPARATOR, layout.delimiter)).rstrip("\r")


def _batch(values: list[list[str]], layout: Layout, rows: list[int], rejected: list[Rejected], lines: int) -> RawBatch:
    columns = zip(*values, strict=True) if values else ([] for _ in layout.names)
    arrays = [pa.array([value or None for value in column], pa.string()) for column in columns]
    return RawBatch(pa.table(arrays, names=list(layout.names)), np.array(rows, dtype=np.int64), rejected, lines)
