"""Foreign files as batches of text columns: CSV, TSV, JSON lines and Parquet, plain or gzip, in bounded memory.

Every row of a file comes out exactly once, either in a table or as a `Rejected` with its number and the reason. Delimited
text is cut into blocks of whole lines. A regular block goes through Arrow; a block with a stray or multi-line quote or
with bytes that are not UTF-8 is read record by record, so that one bad line costs one row.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, cast

import fsspec
import numpy as np
import orjson
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from recsys_core.errors import UserError

DELIMITED = (".csv", ".tsv", ".txt", ".data", ".inter", ".item")
JSON_LINES = (".jsonl", ".ndjson", ".json")
TEXT = DELIMITED + JSON_LINES
PARQUET = (".parquet",)
ENDINGS = (*TEXT, *(f"{ending}.gz" for ending in TEXT), *PARQUET)

BLOCK_BYTES = 4 << 20
MAX_LINE_BYTES = 16 << 20
MAX_RECORD_LINES = 1000
"""A quoted value that spans more lines is taken for a stray quote."""
JSON_SAMPLE_ROWS = 10_000
PARQUET_BATCH_ROWS = 65_536
RAGGED = "{found} columns where {wanted} are expected"
NOT_UTF8 = "not UTF-8"
DAMAGE = (gzip.BadGzipFile, EOFError, zlib.error, pa.ArrowInvalid)
OPEN_QUOTE = "a quote that is never closed"


class IngestError(UserError, ValueError):
    """A file can't be taken in as a whole; nothing of one row."""


@dataclass(frozen=True)
class SourceFile:
    """A file to read and how. `header` names the columns of a file that has no header line."""

    fs: fsspec.AbstractFileSystem
    path: str
    delimiter: str = ","
    header: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    @property
    def ending(self) -> str:
        """`.csv` of `clicks.CSV.gz`."""
        return os.path.splitext(self.name.lower().removesuffix(".gz"))[1]


@dataclass(frozen=True)
class Rejected:
    """A row that has no columns: its 1-based number, why, and what was there."""

    row: int
    reason: str
    content: str


@dataclass(frozen=True)
class RawBatch:
    """Rows of a file as text. `rows` are the 1-based numbers (n,) of the rows of `table`."""

    table: pa.Table
    rows: np.ndarray
    rejected: list[Rejected]


def find_files(fs: fsspec.AbstractFileSystem, path: str) -> list[str]:
    """The data files at `path`, a file or a folder, sorted; names that begin with `.` or `_` are left out.

    Raises FileNotFoundError when there is nothing, IngestError when nothing there is a data file.
    """
    if not fs.exists(path):
        raise FileNotFoundError(f"{path}: no such file or folder")
    found = [path] if fs.isfile(path) else sorted(fs.find(path))
    visible = [p for p in found if p == path or not any(part.startswith((".", "_")) for part in _below(path, p))]
    usable = [p for p in visible if p.lower().endswith(ENDINGS)]
    if not usable:
        raise IngestError(f"{path}: no data file; the endings read are {', '.join(ENDINGS)}")
    return usable


def _below(folder: str, path: str) -> list[str]:
    return os.path.relpath(path, folder).split("/")


def columns_of(source: SourceFile) -> list[str]:
    """Column names of a file; of JSON lines, the keys of its first 10,000 rows. An empty file has none."""
    with _opened(source) as raw:
        if source.ending in PARQUET:
            return list(pq.ParquetFile(raw).schema_arrow.names)
        if source.ending in JSON_LINES:
            rows = (_json_object(line) for line in itertools.islice(raw, JSON_SAMPLE_ROWS))
            return list(dict.fromkeys(key for row in rows if row for key in row))
        return list(source.header) or _header(source, raw)


def first_record(source: SourceFile) -> list[str]:
    """The fields of the first line of a delimited file, empty for any other file."""
    if source.ending not in DELIMITED:
        return []
    with _opened(source) as raw:
        return _header(source, raw)


def read_rows(source: SourceFile) -> Iterator[RawBatch]:
    """All rows of a file in order. Raises IngestError for a damaged file."""
    reader = _parquet if source.ending in PARQUET else _json_lines if source.ending in JSON_LINES else _delimited
    with _opened(source) as raw:
        yield from reader(source, raw)


@contextmanager
def _opened(source: SourceFile) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a file; what goes wrong inside the block is reported as damage of that file."""
    with source.fs.open(source.path, "rb") as raw:
        try:
            yield cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if source.name.lower().endswith(".gz") else raw
        except DAMAGE as error:
            raise IngestError(f"{source.path} is damaged or not what its ending says: {error}") from error


# -- delimited text -------------------------------------------------------------------------------------------------


def _delimiter(source: SourceFile) -> str:
    return "\t" if source.ending == ".tsv" else source.delimiter


def _header(source: SourceFile, raw: IO[bytes]) -> list[str]:
    line = raw.readline(MAX_LINE_BYTES)
    try:
        text = line.decode("utf-8-sig").rstrip("\r\n")
        fields = next(csv.reader([text], delimiter=_delimiter(source)), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise IngestError(f"{source.path}: the first line is not delimited UTF-8 text: {error}") from error
    seen: dict[str, int] = {}
    names = []
    for name in (field.strip() for field in fields):
        seen[name] = seen.get(name, 0) + 1
        names.append(name if seen[name] == 1 else f"{name}.{seen[name]}")
    return names


def _delimited(source: SourceFile, raw: IO[bytes]) -> Iterator[RawBatch]:
    names = list(source.header) or _header(source, raw)
    if not names:
        return
    first, rest = 1, b""
    while True:
        data = raw.read(BLOCK_BYTES)
        block = rest + data
        cut = block.rfind(b"\n") + 1 if data else len(block)
        if cut == 0 and len(block) > MAX_LINE_BYTES:
            raise IngestError(f"{source.path}: the line of data row {first} is longer than {MAX_LINE_BYTES} bytes")
        block, rest = block[:cut], block[cut:]
        if block:
            batch = _regular_block(block, names, _delimiter(source), first)
            if batch is None:
                batch, left = _irregular_block(block, names, _delimiter(source), first, at_end=not data)
                rest = left + rest
            yield batch
            first += len(batch.rows) + len(batch.rejected)
        if not data:
            return


def _regular_block(block: bytes, names: list[str], delimiter: str, first: int) -> RawBatch | None:
    """Parse whole lines, one record each; None when they are not."""
    try:
        block.decode()
    except UnicodeDecodeError:
        return None
    skipped: list[pa.csv.InvalidRow] = []

    def skip(row: pa.csv.InvalidRow) -> str:
        skipped.append(row)
        return "skip"

    records = sum(1 for line in block.split(b"\n") if line not in (b"", b"\r"))
    if records == 0:
        return _batch([], names, [], [])
    try:
        table = pa.csv.read_csv(
            io.BytesIO(block),
            pa.csv.ReadOptions(use_threads=False, block_size=len(block) + 1, column_names=names),
            pa.csv.ParseOptions(delimiter=delimiter, invalid_row_handler=skip),
            pa.csv.ConvertOptions(
                check_utf8=False,
                column_types=dict.fromkeys(names, pa.string()),
                strings_can_be_null=True,
                null_values=[""],
                quoted_strings_can_be_null=True,
            ),
        )
    except pa.ArrowInvalid:
        return None
    if table.num_rows + len(skipped) != records or any("\n" in row.text for row in skipped):
        return None
    ragged = [
        Rejected(first + r.number - 1, RAGGED.format(found=r.actual_columns, wanted=r.expected_columns), r.text)
        for r in skipped
    ]
    rows = np.setdiff1d(np.arange(first, first + records), [r.row for r in ragged], assume_unique=True)
    return RawBatch(table, rows, ragged)


def _irregular_block(block: bytes, names: list[str], delimiter: str, first: int, at_end: bool) -> tuple[RawBatch, bytes]:
    """Parse record by record. Returns also the tail that begins with a quoted value the block does not end."""
    lines = block.removesuffix(b"\n").split(b"\n")
    values: list[list[str]] = []
    rows: list[int] = []
    rejected: list[Rejected] = []
    at, row, tail = 0, first, b""
    while at < len(lines):
        if lines[at] in (b"", b"\r"):
            at += 1
            continue
        window = lines[at : at + MAX_RECORD_LINES] if lines[at].count(b'"') % 2 else lines[at : at + 1]
        fields, reason, used = _record(window, delimiter, len(names))
        if reason == OPEN_QUOTE and not at_end and at + len(window) == len(lines) and len(window) < MAX_RECORD_LINES:
            tail = b"\n".join(lines[at:]) + b"\n"
            break
        if reason:
            rejected.append(Rejected(row, reason, lines[at].decode(errors="replace").rstrip("\r")))
        else:
            values.append(fields)
            rows.append(row)
        at, row = at + used, row + 1
    return _batch(values, names, rows, rejected), tail


def _record(lines: list[bytes], delimiter: str, wanted: int) -> tuple[list[str], str, int]:
    """The record that begins at the first of `lines`: its fields, what is wrong with it, and the lines it takes."""
    text = (line.decode().removesuffix("\r") + "\n" for line in lines)
    reader = csv.reader(itertools.chain(text, ["\n"]), delimiter=delimiter)
    try:
        fields = next(reader)
    except UnicodeDecodeError:
        return [], NOT_UTF8, 1
    except csv.Error as error:
        return [], str(error), 1
    used = reader.line_num
    if used > len(lines):
        return [], OPEN_QUOTE, 1
    if len(fields) != wanted:
        return [], RAGGED.format(found=len(fields), wanted=wanted), 1
    return fields, "", used


def _batch(values: list[list[str]], names: list[str], rows: list[int], rejected: list[Rejected]) -> RawBatch:
    columns = zip(*values, strict=True) if values else ([] for _ in names)
    arrays = [pa.array([value or None for value in column], pa.string()) for column in columns]
    return RawBatch(pa.table(arrays, names=names), np.array(rows, dtype=np.int64), rejected)


# -- JSON lines -----------------------------------------------------------------------------------------------------


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and row else None


def _json_lines(source: SourceFile, raw: IO[bytes]) -> Iterator[RawBatch]:
    names = columns_of(source)
    first = 1
    while lines := raw.readlines(BLOCK_BYTES):
        objects: list[dict[str, Any]] = []
        rows: list[int] = []
        rejected: list[Rejected] = []
        for line in lines:
            if not line.strip():
                continue
            row = _json_object(line)
            number = first + len(rows) + len(rejected)
            if row is None:
                rejected.append(Rejected(number, "not a JSON object with fields", line.decode(errors="replace").rstrip("\r\n")))
            else:
                objects.append(row)
                rows.append(number)
        arrays = [pa.array([_json_text(row.get(name)) for row in objects], pa.string()) for name in names]
        yield RawBatch(pa.table(arrays, names=names), np.array(rows, dtype=np.int64), rejected)
        first += len(rows) + len(rejected)


def _json_text(value: Any) -> str | None:
    """A JSON value as text; objects and lists stay JSON, an empty string is as good as none."""
    if value is None or isinstance(value, str):
        return value or None
    return orjson.dumps(value).decode()


# -- Parquet --------------------------------------------------------------------------------------------------------


def _parquet(_: SourceFile, raw: IO[bytes]) -> Iterator[RawBatch]:
    first = 1
    for batch in pq.ParquetFile(raw).iter_batches(batch_size=PARQUET_BATCH_ROWS):
        arrays = [_arrow_text(column) for column in batch.columns]
        rows = np.arange(first, first + batch.num_rows)
        yield RawBatch(pa.table(arrays, names=batch.schema.names), rows, [])
        first += batch.num_rows


def _arrow_text(column: pa.Array) -> pa.Array:
    """Any column as text; lists and structs become JSON, bytes that are not UTF-8 become null."""
    try:
        return column.cast(pa.string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        return pa.array([_python_text(value) for value in column.to_pylist()], pa.string())


def _python_text(value: Any) -> str | None:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    return None if value is None else orjson.dumps(value, default=str).decode()
