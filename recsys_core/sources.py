"""The files of a folder to read: which are data, what their folders are called, their bytes, and how many lines they have.

Lines are counted here, on the bytes, before any parser sees them: a reader whose rows do not add up to them has lost some.
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, cast
from urllib.parse import unquote

import fsspec
import numpy as np
import pyarrow as pa

from recsys_core.errors import UserError
from recsys_core.stores import is_of_the_store

DELIMITED = (".csv", ".tsv", ".txt", ".dat", ".data", ".inter", ".item")
JSON = (".jsonl", ".ndjson", ".json")
TEXT = DELIMITED + JSON
PARQUET = (".parquet",)
ENDINGS = (*TEXT, *(f"{ending}.gz" for ending in TEXT), *PARQUET)

MAX_LINE_BYTES = 16 << 20
BOM = b"\xef\xbb\xbf"
_MARKS = re.compile(rb"^(?:%b)+" % BOM, re.MULTILINE)
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
GZIP = b"\x1f\x8b"
NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"
NO_DATA = "its ending is none of a data file"
NO_FILE = "it is no file but a pipe, a link that leads nowhere, or a link to a folder, which is not followed"
DAMAGE = (OSError, EOFError, zlib.error, pa.ArrowException)
"""What reading the bytes of a damaged file raises; `gzip.BadGzipFile` is an OSError."""


class IngestError(UserError, ValueError):
    """A file can't be taken in as a whole; nothing of one row."""


class NotRead(IngestError):
    """The store gave an error instead of a file's bytes, which says nothing of what is in it."""


@dataclass(frozen=True)
class SourceFile:
    """A file to read and how.

    Attributes:
        delimiter: between the fields of delimited text; None: the one that its first lines show.
        header: names of the columns of a file that has no header line.
        nested: names with dots, of values inside the objects of a JSON or Parquet file, that are columns too.
        one_line: columns whose values hold no line end, such as ids.
    """

    fs: fsspec.AbstractFileSystem
    path: str
    delimiter: str | None = None
    header: tuple[str, ...] = ()
    nested: tuple[str, ...] = ()
    one_line: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    @property
    def ending(self) -> str:
        """`.csv` of `clicks.CSV.gz`."""
        return os.path.splitext(self.name.lower().removesuffix(".gz"))[1]

    @property
    def folders(self) -> dict[str, str | None]:
        """The columns that folders called `key=value` give every row of the file."""
        pairs = (part.split("=", 1) for part in self.path.split("/")[:-1] if "=" in part)
        return {unquote(key): None if value in ("", NO_PARTITION) else unquote(value) for key, value in pairs if key}


@dataclass(frozen=True)
class Rejected:
    """A row that has no columns: its 1-based number, why, and what was there."""

    row: int
    reason: str
    content: str


@dataclass(frozen=True)
class RawBatch:
    """Rows of a file as text. `rows` are the 1-based numbers (n,) of the rows of `table`.

    `lines` is how many lines of the file all of them take up, blank lines not counted; 0 where a file has no lines.
    """

    table: pa.Table
    rows: np.ndarray
    rejected: list[Rejected]
    lines: int = 0


def find_files(fs: fsspec.AbstractFileSystem, path: str) -> tuple[list[str], dict[str, str]]:
    """The data files at `path`, a file or a folder, and the others there with what they are, sorted.

    Names that begin with `.` or `_` are neither. Raises FileNotFoundError when there is nothing, IngestError when nothing
    there is a data file.
    """
    if not fs.exists(path):
        raise FileNotFoundError(f"{path}: no such file or folder")
    found = {path: fs.info(path)} if fs.isfile(path) else fs.find(path, detail=True)
    visible = [p for p in sorted(found) if p == path or not any(part.startswith((".", "_")) for part in _below(path, p))]
    # A pipe would be waited for, and a link may lead anywhere.
    foreign = {p: NO_FILE for p in visible if found[p]["type"] != "file" and not fs.isfile(p)}
    foreign |= {p: NO_DATA for p in visible if p not in foreign and not p.lower().endswith(ENDINGS)}
    usable = [p for p in visible if p not in foreign]
    if not usable:
        raise IngestError(f"{path}: no data file; the endings read are {', '.join(ENDINGS)}")
    return usable, dict(sorted(foreign.items()))


def _below(folder: str, path: str) -> list[str]:
    return os.path.relpath(path, folder).split("/")


@contextmanager
def stored(source: SourceFile) -> Iterator[IO[bytes]]:
    """The bytes of a file as they are stored; what goes wrong inside the block is reported as damage of that file, or as
    NotRead where the store tells it."""
    try:
        with source.fs.open(source.path, "rb") as raw:
            yield raw
    except DAMAGE as error:
        if isinstance(error, OSError) and is_of_the_store(error):
            raise NotRead(f"{source.path} can't be read: {error.strerror or error}") from error
        raise IngestError(f"{source.path} is damaged or not what its ending says: {error}") from error


@contextmanager
def opened(source: SourceFile) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a file, with errors as of `stored`.

    Compressed is what begins as gzip does, whatever the name says.
    """
    with stored(source) as raw:
        compressed = raw.read(len(GZIP)) == GZIP
        raw.seek(0)
        yield cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if compressed else raw


class Lines:
    """The bytes of a text file in blocks of whole lines. `count` is the number of lines that are not blank, so far.

    Byte order marks stand where lines begin, also inside of a file that was joined from several.
    """

    def __init__(self, raw: IO[bytes], path: str) -> None:
        self._raw, self._path = raw, path
        self.count = 0

    def blocks(self, size: int) -> Iterator[bytes]:
        """Blocks of about `size` bytes, without a byte order mark. Raises IngestError for what is no text in UTF-8."""
        rest = self._start()
        while data := self._raw.read(size):
            cut = data.rfind(b"\n") + 1
            if cut:
                yield self._counted(rest + data[:cut])
            rest = data[cut:] if cut else rest + data
            if len(rest) > MAX_LINE_BYTES:
                raise IngestError(f"{self._path}: line {self.count + 1} is longer than {MAX_LINE_BYTES} bytes")
        if rest:
            yield self._counted(rest)

    def settle(self, accounted: int) -> None:
        """Raise IngestError where a reader's rows take up another number of lines than there are."""
        if accounted != self.count:
            raise IngestError(f"{self._path} has {self.count} lines, its rows account for {accounted}: a fault of the reader")

    def _start(self) -> bytes:
        start = self._raw.read(len(BOM))
        if start.startswith(UTF_16):
            raise IngestError(f"{self._path} is UTF-16; save it as UTF-8")
        return start

    def _counted(self, block: bytes) -> bytes:
        if BOM in block:
            block = _MARKS.sub(b"", block)
        self.count += filled_lines(block)
        return block


def filled_lines(block: bytes) -> int:
    """The number of lines that hold more than white space."""
    data = np.frombuffer(block, np.uint8)
    starts = np.concatenate([[0], np.flatnonzero(data == ord("\n")) + 1])
    starts = starts[starts < len(data)]
    # A line of white space begins with some, which few others do.
    doubtful = starts[data[starts] <= ord(" ")].tolist()
    return len(starts) - sum(1 for start in doubtful if not _line_at(block, start).strip())


def _line_at(block: bytes, start: int) -> bytes:
    end = block.find(b"\n", start)
    return block[start:] if end < 0 else block[start:end]
