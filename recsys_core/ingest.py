"""Bring your own data: event files of any mapped shape into the landing zone, item files into the catalogue.

A landing file is named by the digest of the file it came from and its number in it, so that ingesting a file again
rewrites the same files. Every row read is landed, quarantined with its file, row number, reason and content, or in a file that
is another's copy. A file is taken in whole or, when it is damaged, not at all.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from recsys_core import progress
from recsys_core.catalog import CATALOG_SCHEMA, last_of_each, merge_catalog
from recsys_core.events import DAY_MS, EARLIEST_TS, EVENT_ID, HOUR_MS, ITEM_ID, TS, day_key, invalid_reasons, now_ms
from recsys_core.lake import Lake
from recsys_core.landing import QUARANTINE_SCHEMA, Landing
from recsys_core.ledger import LANDING, QUARANTINE, LandingFile, Ledger
from recsys_core.mapped import is_header, item_ids, map_events, map_items, text_column, unreadable_items, unreadable_values
from recsys_core.mappings import FIELDS, MappingError, check_columns, mapped_columns, mapped_fields, source_file
from recsys_core.parsing import parse_ts
from recsys_core.readers import read_rows
from recsys_core.settings import EventSettings, SourceMapping
from recsys_core.sources import IngestError, NotRead, RawBatch, Rejected, SourceFile, find_files, stored
from recsys_core.stores import open_filesystem

CHUNK_ROWS = 250_000
CHUNK_BYTES = 128 << 20
CHUNK_CELLS = 50_000_000
"""A landing file is written when its source rows, their bytes, or rows times columns reach one of these."""
MAX_CONTENT = 10_000
"""Characters of a rejected row that are kept."""
BUSY_SHARE = 0.01
"""History ends with the last hour that has at least this share of a typical hour's events."""
EMPTY = "it is empty"
OWN = "it is a file of the lake"


class NothingTaken(IngestError):
    """Every file that fits the mapping is damaged. `left_out` are all files and why."""

    def __init__(self, text: str, left_out: dict[str, str]) -> None:
        super().__init__(text)
        self.left_out = left_out


@dataclass(frozen=True)
class Example:
    """One of the rows that something was wrong with: its file and number, the mapped column, and what is there.

    Without a column it is the whole row.
    """

    path: str
    row: int
    column: str | None
    content: str


@dataclass
class Account:
    """What of the rows of files was wrong, for a report.

    Attributes:
        quarantined: rows that are no event or item, by reason.
        unreadable: rows that were kept without the value of an optional field, which can't be read, by field.
        examples: the first row of each reason and of each of those fields.
    """

    quarantined: Counter[str] = field(default_factory=Counter)
    unreadable: Counter[str] = field(default_factory=Counter)
    examples: dict[str, Example] = field(default_factory=dict)

    def add_rejected(self, path: str, rejected: list[Rejected], table: RawBatch, mapping: SourceMapping) -> None:
        self.quarantined.update(r.reason for r in rejected)
        for reason in {r.reason for r in rejected} - self.examples.keys():
            first = next(r for r in rejected if r.reason == reason)
            column = _column_of(reason, mapping)
            at = np.flatnonzero(table.rows == first.row)
            if column and len(at):
                shown = text_column(table.table, column)[int(at[0])].as_py() or ""
            else:
                column, shown = None, first.content
            self.examples[reason] = Example(path, first.row, column, shown[:MAX_CONTENT])

    def add_unreadable(self, path: str, chunk: RawBatch, found: dict[str, pa.ChunkedArray], mapping: SourceMapping) -> None:
        for name, rows in found.items():
            at = np.flatnonzero(rows.to_numpy())
            self.unreadable[name] += len(at)
            if len(at) and name not in self.examples:
                column = mapped_fields(mapping)[name]
                value = text_column(chunk.table, column)[int(at[0])].as_py()
                self.examples[name] = Example(path, int(chunk.rows[at[0]]), column, value[:MAX_CONTENT])

    def add(self, other: Account) -> None:
        self.quarantined.update(other.quarantined)
        self.unreadable.update(other.unreadable)
        self.examples = {**other.examples, **self.examples}


def _column_of(reason: str, mapping: SourceMapping) -> str | None:
    """The column of the field that a reason names."""
    words = reason.replace(":", " ").split()
    return next((column for name, column in mapped_fields(mapping).items() if name in words), None)


@dataclass(frozen=True)
class CatalogReport:
    """What became of the rows of item files. `rows_read` = `landed` + the sum of `quarantined` + `duplicates`.

    `items` is the size of the catalogue afterwards. A row whose price, availability or category can't be read is kept, with no
    price or category or as available; `unreadable` counts them by field. `examples`, `left_out` and `unused` are as in
    IngestReport.
    """

    rows_read: int
    landed: int
    quarantined: dict[str, int]
    items: int
    unreadable: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    duplicates: int = 0
    files: list[FileReport] = field(default_factory=list)
    examples: dict[str, Example] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class FileReport:
    """What became of the rows of one file. `again`: the same content was taken in before, and stands in its place.

    `forgotten` are events of users who were forgotten after them. `former` are the first and last time (ms) of the events that
    stood there before, where they reach further: hours that were made from them do not know that they are gone.
    """

    path: str
    source: str
    rows_read: int
    landed: int
    quarantined: int
    duplicates: int = 0
    again: bool = False
    forgotten: int = 0
    former: tuple[int, int] | None = None


@dataclass(frozen=True)
class IngestReport:
    """What became of the rows of event files. `rows_read` = `landed` + the sum of `quarantined` + `duplicates` + `forgotten`.

    Attributes:
        quarantined: counts by reason.
        duplicates: rows of files that have the content, and the `key=value` folders, of another one.
        days: landed events by day.
        unreadable: events that landed without a value, as theirs can't be read, by field.
        examples: the first row of each reason and of each of those fields.
        left_out: the files that were not taken in, and why.
        unused: the columns that the mapping names nowhere.
        forgotten: events of users who were forgotten after them; they are left out.
        repeated: landed events whose own event id another one near them has. Tables have each id once.
    """

    rows_read: int
    landed: int
    quarantined: dict[str, int]
    files: list[FileReport]
    first_ts: int | None
    last_ts: int | None
    shift_ms: int
    seconds: float
    catalog: CatalogReport | None = None
    duplicates: int = 0
    days: dict[str, int] = field(default_factory=dict)
    unreadable: dict[str, int] = field(default_factory=dict)
    examples: dict[str, Example] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    forgotten: int = 0
    repeated: int = 0


def ingest(
    path: str,
    landing: Landing,
    mapping: SourceMapping,
    events: EventSettings,
    *,
    shift_to_ms: int | None = None,
    now: int | None = None,
) -> IngestReport:
    """Land the events of a file or of all data files of a folder.

    `shift_to_ms` moves history by whole hours so that its last busy hour is the one completed before that moment; `now`
    is the clock for events of the future. A file that is empty, damaged or lacks a mapped column is left out of a folder.

    Raises MappingError or IngestError when that leaves none, FileNotFoundError.
    """
    started = time.perf_counter()
    found = _sources(path, mapping, "events", landing.lake)
    clock = now_ms() if now is None else now
    shift = 0 if shift_to_ms is None else _shift(found.files, mapping, shift_to_ms)
    run = _EventRun(landing, mapping, events, clock, shift)
    files = _take_in(found, landing, run.file, "ingesting files", mapping.kind)
    catalog = run.items.merge(landing.lake) if mapping.catalog_from_events else None
    return IngestReport(
        rows_read=sum(f.rows_read for f in files),
        landed=sum(f.landed for f in files),
        quarantined=dict(run.account.quarantined),
        files=files,
        first_ts=run.first_ts,
        last_ts=run.last_ts,
        shift_ms=shift,
        seconds=time.perf_counter() - started,
        catalog=catalog,
        duplicates=sum(f.duplicates for f in files),
        days=dict(sorted(run.days.items())),
        unreadable=dict(+run.account.unreadable),
        examples=run.account.examples,
        left_out=found.left_out,
        unused=found.unused,
        forgotten=sum(f.forgotten for f in files),
        repeated=run.repeated,
    )


def ingest_catalog(path: str, lake: Lake, mapping: SourceMapping) -> CatalogReport:
    """Merge the items of a file or of all data files of a folder into the catalogue; the last row of an item wins.

    A row without an item_id is quarantined. Distinct items are held in memory. Files are left out, and errors raised, as by
    `ingest`.
    """
    started = time.perf_counter()
    landing = Landing(lake)
    found = _sources(path, mapping, "catalog", lake)
    run = _CatalogRun(landing, mapping)
    files = _take_in(found, landing, run.file, "ingesting items", mapping.kind)
    return replace(
        run.items.merge(lake),
        rows_read=sum(f.rows_read for f in files),
        landed=sum(f.landed for f in files),
        quarantined=dict(run.account.quarantined),
        seconds=time.perf_counter() - started,
        duplicates=sum(f.duplicates for f in files),
        files=files,
        examples={**run.items.account.examples, **run.account.examples},
        left_out=found.left_out,
        unused=found.unused,
    )


def _shift(sources: list[SourceFile], mapping: SourceMapping, to_ms: int) -> int:
    """Milliseconds, a whole number of hours, that move the end of a history into the hour completed before `to_ms`.

    Real exports have stray times long after their end. The end is the last hour that holds at least 1/100 of the events
    of a typical hour, and the typical hour is the one in which the median event lies, so that many nearly empty hours
    don't count. Times before 1990 or after the present are no part of the history. 0 when there is none.
    """
    hours: Counter[int] = Counter()
    for source in progress.track(sources, "finding the end of history"):
        hours.update(_hours(source, mapping))
    if not hours:
        return 0
    volumes = np.sort(np.array(list(hours.values())))
    typical = volumes[np.searchsorted(np.cumsum(volumes), volumes.sum() / 2)]
    end = max(hour for hour, volume in hours.items() if volume >= BUSY_SHARE * typical)
    return (to_ms // HOUR_MS - 1 - end) * HOUR_MS


def _hours(source: SourceFile, mapping: SourceMapping) -> Counter[int]:
    """Number of events by hour; nothing of a damaged file."""
    hours: Counter[int] = Counter()
    try:
        for batch in read_rows(source):
            ts = parse_ts(text_column(batch.table, mapping.ts), mapping.ts_unit)
            known = ts.filter(pc.and_(pc.greater_equal(ts, EARLIEST_TS), pc.less_equal(ts, now_ms())))
            found, counts = np.unique(known.to_numpy() // HOUR_MS, return_counts=True)
            hours.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))
    except IngestError:
        # It is left out, and named, when its rows are to be landed.
        return Counter()
    return hours


# -- which files, and each of them whole or not at all ---------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    files: list[SourceFile]
    left_out: dict[str, str]
    unused: list[str]


def _sources(path: str, mapping: SourceMapping, kind: str, lake: Lake) -> _Found:
    """The files to read, after their columns were checked. Raises what is wrong with the first when nothing is right.

    In a folder around the lake its own files are events that landed already; in a folder of the lake those that count.
    """
    if mapping.kind != kind:
        raise MappingError(f"{path}: a mapping of kind {kind!r} is needed, this one is of kind {mapping.kind!r}")
    fs, root = open_filesystem(path)
    data, others = find_files(fs, root)
    others |= dict.fromkeys(_own([*data, *others], root, lake) if type(lake.fs) is type(fs) else (), OWN)
    files: list[SourceFile] = []
    columns: dict[str, None] = {}
    left_out = others
    problems: list[IngestError] = []
    for file in (file for file in data if file not in others):
        source = source_file(fs, file, mapping)
        try:
            there = check_columns(source, mapping)
        except IngestError as error:
            problems.append(error)
            left_out[file] = _without_path(error, file)
            continue
        columns |= dict.fromkeys(there)
        if there:
            files.append(source)
        else:
            left_out[file] = EMPTY
    if problems and not files:
        raise problems[0]
    used = columns.keys() if "*" in mapping.attributes else {*mapped_columns(mapping), *_fields_of_folders(files)}
    return _Found(files, dict(sorted(left_out.items())), [name for name in columns if name not in used])


def _own(files: list[str], root: str, lake: Lake) -> set[str]:
    """Those of some files below `root` that are the lake's."""
    if not f"{root}/".startswith(f"{lake.root}/"):
        return {file for file in files if file.startswith(f"{lake.root}/")}
    counting = set(Ledger(lake).read().table["path"].to_pylist())
    return {file for file in files if lake.below(file) in counting}


def _fields_of_folders(files: list[SourceFile]) -> set[str]:
    return {name for source in files for name in source.folders if name in FIELDS}


def _without_path(error: IngestError, path: str) -> str:
    return str(error).removeprefix(path).lstrip(": ")


def _take_in(
    found: _Found, landing: Landing, take: Callable[[SourceFile, str, list[LandingFile]], FileReport], what: str, kind: str
) -> list[FileReport]:
    """Take each file in once. One that turns out to be damaged leaves nothing behind but its name among those left out."""
    known = _known_sources(landing)
    done: dict[str, FileReport] = {}
    files: list[FileReport] = []
    problems: list[IngestError] = []
    for source in progress.track(found.files, what):
        try:
            state = _state(source)
            digest = _digest(source, kind)
            if digest in done:
                rows = done[digest].rows_read
                files.append(FileReport(source.path, done[digest].source, rows, 0, 0, duplicates=rows))
                continue
            former = landing.extent(known[digest]) if digest in known and kind == "events" else None
            name = known.get(digest) or f"{_slug(source)}-{digest}"
            with _whole(landing, name, again=digest in known) as staged:
                report = take(source, name, staged)
                if _state(source) != state:
                    raise IngestError(f"{source.path} was changed while it was read; take it in again, or a copy of it")
        except IngestError as error:
            found.left_out[source.path] = _without_path(error, source.path)
            problems.append(error)
            continue
        if former and (now := landing.extent(name)) and now[0] <= former[0] and former[1] <= now[1]:
            former = None
        done[digest] = replace(report, again=digest in known, former=former)
        files.append(done[digest])
    if problems and not files:
        named = (f"{path}: {reason}" for path, reason in found.left_out.items())
        raise NothingTaken(str(problems[0]) if len(found.files) == 1 else "\n".join(named), found.left_out) from problems[0]
    return files


@contextmanager
def _whole(landing: Landing, name: str, again: bool) -> Iterator[list[LandingFile]]:
    """The files that are written of a source; they count once all are, in the place of those that stood there before.

    Nothing is left of a source whose file turns out to be damaged. One that the store doesn't give now and that was taken in
    before stays.
    """
    staged: list[LandingFile] = []
    listing = landing.ledger.read()
    before = {file.path: file for area in (LANDING, QUARANTINE) for file in listing.files(area, name)}
    try:
        yield staged
    except IngestError as error:
        if not (again and isinstance(error, NotRead)):
            landing.commit([], before.keys() | {file.path for file in staged})
        raise
    stale = before.keys() - {file.path for file in staged}
    landing.commit(staged, stale)


def _state(source: SourceFile) -> list[Any]:
    """What a store says of a file that changes when somebody writes to it."""
    source.fs.invalidate_cache(source.path)
    try:
        entry = source.fs.info(source.path)
    except OSError as error:
        raise NotRead(f"{source.path} can't be read: {error.strerror or error}") from error
    return [entry.get(name) for name in ("size", "mtime", "LastModified", "last_modified", "ETag")]


def _digest(source: SourceFile, kind: str) -> str:
    """Of the content of a file, what its folders say, and what it is taken for: a file of events may be one of items too."""
    digest = hashlib.sha256(b"" if kind == "events" else kind.encode())
    with stored(source) as raw:
        while block := raw.read(1 << 20):
            digest.update(block)
    if source.folders:
        digest.update(orjson.dumps(source.folders))
    return digest.hexdigest()[:16]


def _slug(source: SourceFile) -> str:
    """`clicks-hour-000` of `clicks_hour_000.csv.gz`."""
    stem = source.name.lower().removesuffix(".gz").removesuffix(source.ending)
    return re.sub(r"[^a-z0-9]+", "-", stem).strip("-")[:60] or "file"


def _known_sources(landing: Landing) -> dict[str, str]:
    """The sources in the landing zone and the quarantine by the digest that their names end with."""
    names = sorted(landing.sources())
    return {name[-16:]: name for name in names if re.search(r"-[0-9a-f]{16}$", name)}


# -- chunks of a file -----------------------------------------------------------------------------------------------


def _chunks(source: SourceFile) -> Iterator[RawBatch]:
    """The batches of a file joined to chunks; a file without rows has none."""
    held: list[RawBatch] = []
    names: set[str] = set()
    rows = size = 0
    for batch in read_rows(source):
        wider = names.union(batch.table.column_names)
        if held and (rows + len(batch.rows)) * len(wider) > CHUNK_CELLS:
            yield _join(held)
            held, rows, size, wider = [], 0, 0, set(batch.table.column_names)
        held.append(batch)
        names = wider
        rows += len(batch.rows) + len(batch.rejected)
        size += batch.table.nbytes
        if rows >= CHUNK_ROWS or size >= CHUNK_BYTES:
            yield _join(held)
            held, rows, size, names = [], 0, 0, set()
    if rows:
        yield _join(held)


def _join(batches: list[RawBatch]) -> RawBatch:
    table = pa.concat_tables([b.table for b in batches], promote_options="default")
    return RawBatch(table, np.concatenate([b.rows for b in batches]), [r for b in batches for r in b.rejected])


def _rejections(chunk: RawBatch, reasons: pa.Array | pa.ChunkedArray) -> list[Rejected]:
    """What the reader rejected and the rows that have a reason (string (n,), null: none), in the order of the file."""
    at = np.flatnonzero(pc.is_valid(reasons).to_numpy(zero_copy_only=False))
    texts = reasons.take(pa.array(at)).to_pylist()
    rows = chunk.table.take(pa.array(at)).to_pylist()
    numbers = chunk.rows[at].tolist()
    refused = [Rejected(n, text, orjson.dumps(row).decode()) for n, text, row in zip(numbers, texts, rows, strict=True)]
    return sorted([*chunk.rejected, *refused], key=lambda r: r.row)


def _quarantine(source: SourceFile, rejected: list[Rejected]) -> pa.Table:
    columns = [
        pa.array([source.path] * len(rejected), pa.string()),
        pa.array([r.row for r in rejected], pa.int64()),
        pa.array([r.reason for r in rejected], pa.string()),
        pa.array([r.content[:MAX_CONTENT] for r in rejected], pa.string()),
    ]
    return pa.table(columns, schema=QUARANTINE_SCHEMA)


def _mapping_of(source: SourceFile, mapping: SourceMapping) -> SourceMapping:
    """The mapping for a file: a field that it names no column for is read from the folder called after that field."""
    named = {name: name for name in FIELDS if name in source.folders and not getattr(mapping, name)}
    return mapping.model_copy(update=named) if named else mapping


def _settled(path: str, name: str, read: int, landed: int, quarantined: int, forgotten: int = 0) -> FileReport:
    if read != landed + quarantined + forgotten:
        raise IngestError(f"{path}: {read} rows were read, {landed} kept and {quarantined} quarantined: a fault of the ingest")
    return FileReport(path, name, read, landed, quarantined, forgotten=forgotten)


class _Items:
    """The last row of each item seen, in the memory that the distinct items take."""

    def __init__(self) -> None:
        self.table = CATALOG_SCHEMA.empty_table()
        self.account = Account()
        self.rows = 0

    def add(self, path: str, chunk: RawBatch, mapping: SourceMapping) -> None:
        """Take the items of rows that have an item id."""
        ids = pa.table({ITEM_ID: item_ids(chunk.table, mapping), "at": pa.array(np.arange(chunk.table.num_rows))})
        last = chunk.table.take(last_of_each(ids, ITEM_ID)["at"])
        self.table = last_of_each(pa.concat_tables([self.table, map_items(last, mapping)]), ITEM_ID)
        self.account.add_unreadable(path, chunk, unreadable_items(chunk.table, mapping), mapping)
        self.rows += chunk.table.num_rows

    def add_all(self, other: _Items) -> None:
        if other.rows:
            self.table = last_of_each(pa.concat_tables([self.table, other.table]), ITEM_ID)
        self.account.add(other.account)
        self.rows += other.rows

    def merge(self, lake: Lake) -> CatalogReport:
        written = merge_catalog(lake, self.table)
        unreadable = dict(+self.account.unreadable)
        return CatalogReport(self.rows, self.rows, {}, written.rows, unreadable, examples=self.account.examples)


class _CatalogRun:
    """One call of `ingest_catalog`: adds up items and what became of the rows, file after file."""

    def __init__(self, landing: Landing, mapping: SourceMapping) -> None:
        self.landing, self.mapping = landing, mapping
        self.items = _Items()
        self.account = Account()

    def file(self, source: SourceFile, name: str, staged: list[LandingFile]) -> FileReport:
        mapping = _mapping_of(source, self.mapping)
        items, account = _Items(), Account()
        read = 0
        for number, chunk in enumerate(_chunks(source)):
            missing = pc.is_null(item_ids(chunk.table, mapping))
            reason = pc.if_else(missing, pa.scalar("missing item_id"), pa.scalar(None, pa.string()))
            reason = pc.if_else(is_header(chunk.table, mapping), pa.scalar("the header again"), reason)
            rejected = _rejections(chunk, reason)
            if rejected:
                staged.append(self.landing.stage_quarantine(name, f"{number:05d}", _quarantine(source, rejected)))
            account.add_rejected(source.path, rejected, chunk, mapping)
            items.add(source.path, _only(chunk, pc.is_null(reason)), mapping)
            read += len(chunk.rows) + len(chunk.rejected)
        self.items.add_all(items)
        self.account.add(account)
        return _settled(source.path, name, read, items.rows, account.quarantined.total())


def _only(chunk: RawBatch, wanted: pa.Array | pa.ChunkedArray) -> RawBatch:
    """The rows of a chunk that are wanted, bool (n,)."""
    if pc.all(wanted).as_py():
        return RawBatch(chunk.table, chunk.rows, [])
    return RawBatch(chunk.table.filter(wanted), chunk.rows[wanted.to_numpy(zero_copy_only=False)], [])


class _EventRun:
    """One call of `ingest`: lands file after file and adds up what became of the rows."""

    def __init__(self, landing: Landing, mapping: SourceMapping, events: EventSettings, now: int, shift: int) -> None:
        self.landing, self.mapping, self.events, self.now, self.shift = landing, mapping, events, now, shift
        self.account = Account()
        self.items = _Items()
        self.days: Counter[str] = Counter()
        self.repeated = 0
        self.first_ts: int | None = None
        self.last_ts: int | None = None

    def file(self, source: SourceFile, name: str, staged: list[LandingFile]) -> FileReport:
        one = _EventFile(self, source, name, staged)
        read = landed = 0
        for number, chunk in enumerate(_chunks(source)):
            read += len(chunk.rows) + len(chunk.rejected)
            landed += one.chunk(f"{number:05d}", chunk)
        self._add(one)
        return _settled(source.path, name, read, landed, one.account.quarantined.total(), one.forgotten)

    def _add(self, one: _EventFile) -> None:
        self.account.add(one.account)
        self.items.add_all(one.items)
        self.days.update(one.days)
        self.repeated += one.repeated
        ends = [end for end in (self.first_ts, self.last_ts, *one.ends) if end is not None]
        self.first_ts, self.last_ts = min(ends, default=None), max(ends, default=None)


class _EventFile:
    """Lands one file of a run."""

    def __init__(self, run: _EventRun, source: SourceFile, name: str, staged: list[LandingFile]) -> None:
        self.run, self.source, self.name, self.staged = run, source, name, staged
        self.mapping = _mapping_of(source, run.mapping)
        self.account = Account()
        self.items = _Items()
        self.days: Counter[str] = Counter()
        self.repeated = 0
        self.forgotten = 0
        self.ends: list[int] = []

    def chunk(self, number: str, chunk: RawBatch) -> int:
        """Land one chunk. Returns the number of events."""
        mapped = map_events(chunk.table, self.mapping, self.run.shift)
        reason = invalid_reasons(mapped, self.run.events, self.run.now)
        rejected = _rejections(chunk, reason)
        good = pc.is_null(reason)
        valid = mapped if pc.all(good).as_py() else mapped.filter(good)
        landed = self.run.landing.not_forgotten(valid)
        self.forgotten += valid.num_rows - landed.num_rows
        if landed.num_rows:
            self.staged.append(self.run.landing.stage_events(self.name, number, landed))
        if rejected:
            self.staged.append(self.run.landing.stage_quarantine(self.name, number, _quarantine(self.source, rejected)))
        self.account.add_rejected(self.source.path, rejected, chunk, self.mapping)
        kept = _only(chunk, good)
        self.account.add_unreadable(self.source.path, kept, unreadable_values(kept.table, valid, self.mapping), self.mapping)
        if self.mapping.catalog_from_events:
            self.items.add(self.source.path, kept, self.mapping)
        if self.mapping.event_id in chunk.table.column_names:
            self.repeated += landed.num_rows - pc.count_distinct(landed[EVENT_ID]).as_py()
        if landed.num_rows:
            days, counts = np.unique(landed[TS].to_numpy() // DAY_MS, return_counts=True)
            self.days.update({day_key(int(day) * DAY_MS): int(n) for day, n in zip(days, counts, strict=True)})
            self.ends += pc.min_max(landed[TS]).as_py().values()
        return landed.num_rows
