"""Bring your own data: event files of any mapped shape into the landing zone, item files into the catalogue.

A landing file is named by the digest of the file it came from and its number in it, so that ingesting a file again
rewrites the same files. Every row read is landed or quarantined with its file, row number, reason and content.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from recsys_core import progress
from recsys_core.catalog import CATALOG_SCHEMA, last_of_each, merge_catalog
from recsys_core.events import EARLIEST_TS, EVENT_SCHEMA, HOUR_MS, ITEM_ID, TS, content_ids, invalid_reasons, now_ms
from recsys_core.lake import Lake
from recsys_core.landing import LANDING, QUARANTINE, QUARANTINE_SCHEMA, Landing
from recsys_core.mappings import MappingError, check_columns, mapped_columns
from recsys_core.parsing import parse_bool, parse_decimal, parse_ts
from recsys_core.readers import RawBatch, Rejected, SourceFile, find_files, read_rows
from recsys_core.settings import EventSettings, SourceMapping
from recsys_core.stores import open_filesystem

CHUNK_ROWS = 250_000
CHUNK_BYTES = 128 << 20
"""A landing file is written when its source rows reach either."""
MAX_CONTENT = 10_000
"""Characters of a rejected row that are kept."""
BUSY_SHARE = 0.01
"""History ends with the last hour that has at least this share of a typical hour's events."""
UNREADABLE_VALUE = "unreadable value"


@dataclass(frozen=True)
class CatalogReport:
    """What became of the rows of item files. `rows_read` = `landed` + the sum of `quarantined`.

    `items` is the size of the catalogue afterwards. A row whose price or availability can't be read is kept, with no
    price or as available; `unreadable` counts them by field.
    """

    rows_read: int
    landed: int
    quarantined: dict[str, int]
    items: int
    unreadable: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class FileReport:
    """What became of the rows of one file."""

    path: str
    source: str
    rows_read: int
    landed: int
    quarantined: int


@dataclass(frozen=True)
class IngestReport:
    """What became of the rows of event files. `rows_read` = `landed` + the sum of `quarantined`, counts by reason."""

    rows_read: int
    landed: int
    quarantined: dict[str, int]
    files: list[FileReport]
    first_ts: int | None
    last_ts: int | None
    shift_ms: int
    seconds: float
    catalog: CatalogReport | None = None


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

    `shift_to_ms` moves history by whole hours so that its last hour is the one completed before that moment (see
    `shift_ms`); `now` is the clock for events of the future. Raises MappingError before anything is written when a file
    lacks a mapped column, IngestError for a damaged file, FileNotFoundError.
    """
    started = time.perf_counter()
    sources = _sources(path, mapping, "events")
    clock = now_ms() if now is None else now
    shift = 0 if shift_to_ms is None else shift_ms(path, mapping, shift_to_ms)
    run = _EventRun(landing, mapping, events, clock, shift)
    files = [run.file(source) for source in progress.track(sources, "ingesting files")]
    catalog = run.items.merge(landing.lake) if mapping.catalog_from_events else None
    return IngestReport(
        rows_read=sum(f.rows_read for f in files),
        landed=sum(f.landed for f in files),
        quarantined=dict(run.reasons),
        files=files,
        first_ts=run.first_ts,
        last_ts=run.last_ts,
        shift_ms=shift,
        seconds=time.perf_counter() - started,
        catalog=catalog,
    )


def ingest_catalog(path: str, lake: Lake, mapping: SourceMapping) -> CatalogReport:
    """Merge the items of a file or of all data files of a folder into the catalogue; the last row of an item wins.

    A row without an item_id is quarantined. Distinct items are held in memory. Raises as `ingest` does.
    """
    started = time.perf_counter()
    landing = Landing(lake)
    items = _Items(mapping)
    reasons: Counter[str] = Counter()
    rows_read = 0
    for source in progress.track(_sources(path, mapping, "catalog"), "ingesting items"):
        name = _source_name(source)
        for number, chunk in enumerate(_chunks(source)):
            missing = pc.is_null(_column(chunk.table, mapping.item_id))
            reason = pc.if_else(missing, pa.scalar("missing item_id"), pa.scalar(None, pa.string()))
            rejected = _rejections(chunk, reason)
            _put(landing, QUARANTINE, name, f"{number:05d}", _quarantine(source, rejected))
            items.add(chunk.table.filter(pc.is_null(reason)))
            reasons.update(r.reason for r in rejected)
            rows_read += len(chunk.rows) + len(chunk.rejected)
    merged = items.merge(lake)
    return replace(merged, rows_read=rows_read, quarantined=dict(reasons), seconds=time.perf_counter() - started)


def shift_ms(path: str, mapping: SourceMapping, to_ms: int) -> int:
    """Milliseconds, a whole number of hours, that move the end of a history into the hour completed before `to_ms`.

    Real exports have stray times long after their end. The end is the last hour that holds at least 1/100 of the events
    of a typical hour, and the typical hour is the one in which the median event lies, so that many nearly empty hours
    don't count. Times before 1990 or after the present are no part of the history. 0 when there is none.
    """
    hours: Counter[int] = Counter()
    for source in progress.track(_sources(path, mapping, "events"), "finding the end of history"):
        for batch in read_rows(source):
            ts = parse_ts(_column(batch.table, mapping.ts), mapping.ts_unit)
            known = ts.filter(pc.and_(pc.greater_equal(ts, EARLIEST_TS), pc.less_equal(ts, now_ms())))
            found, counts = np.unique(known.to_numpy() // HOUR_MS, return_counts=True)
            hours.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))
    if not hours:
        return 0
    volumes = np.sort(np.array(list(hours.values())))
    typical = volumes[np.searchsorted(np.cumsum(volumes), volumes.sum() / 2)]
    end = max(hour for hour, volume in hours.items() if volume >= BUSY_SHARE * typical)
    return (to_ms // HOUR_MS - 1 - end) * HOUR_MS


def _sources(path: str, mapping: SourceMapping, kind: str) -> list[SourceFile]:
    """The files to read, after their columns were checked."""
    if mapping.kind != kind:
        raise MappingError(f"{path}: a mapping of kind {kind!r} is needed, this one is of kind {mapping.kind!r}")
    fs, root = open_filesystem(path)
    sources = [SourceFile(fs, found, mapping.delimiter, tuple(mapping.header)) for found in find_files(fs, root)]
    for source in sources:
        check_columns(source, mapping)
    return sources


def _source_name(source: SourceFile) -> str:
    """`clicks-hour-000-1f2e3d4c5b6a7988`: the file's name and the digest of its content."""
    digest = hashlib.sha256()
    with source.fs.open(source.path, "rb") as raw:
        while block := raw.read(1 << 20):
            digest.update(block)
    stem = source.name.lower().removesuffix(".gz").removesuffix(source.ending)
    slug = re.sub(r"[^a-z0-9]+", "-", stem).strip("-")[:60] or "file"
    return f"{slug}-{digest.hexdigest()[:16]}"


def _chunks(source: SourceFile) -> Iterator[RawBatch]:
    """The batches of a file joined to chunks; a file without rows has none."""
    held: list[RawBatch] = []
    rows = size = 0
    for batch in read_rows(source):
        held.append(batch)
        rows += len(batch.rows) + len(batch.rejected)
        size += batch.table.nbytes
        if rows >= CHUNK_ROWS or size >= CHUNK_BYTES:
            yield _join(held)
            held, rows, size = [], 0, 0
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


def _put(landing: Landing, area: str, source: str, name: str, table: pa.Table) -> None:
    """Write one file of an area, or remove what an earlier run left when there is nothing to write."""
    if table.num_rows:
        write = landing.write_events if area == LANDING else landing.write_quarantine
        write(source, name, table)
        return
    stale = landing.lake.path(area, source, f"{name}.parquet")
    if landing.lake.fs.exists(stale):
        landing.lake.fs.rm(stale)


def _column(table: pa.Table, name: str | None) -> pa.ChunkedArray:
    """A text column, all null when the mapping or the file has none; empty text is null."""
    if name is None or name not in table.column_names:
        return pa.chunked_array([pa.nulls(table.num_rows, pa.string())])
    text = table[name]
    return pc.if_else(pc.equal(pc.binary_length(text), 0), pa.scalar(None, pa.string()), text)


def map_events(table: pa.Table, mapping: SourceMapping, shift: int = 0) -> tuple[pa.Table, pa.ChunkedArray]:
    """The events of some rows: a table with the columns of EVENT_SCHEMA, nulls where a field is missing or unreadable,
    and whether the value can't be read, bool (n,).

    An event without an id of its own gets one made from the mapped fields before the shift.
    """
    source_ts = parse_ts(_column(table, mapping.ts), mapping.ts_unit)
    value_text = _column(table, mapping.value)
    value = parse_decimal(value_text)
    columns = {
        "user_id": _column(table, mapping.user_id),
        "item_id": _column(table, mapping.item_id),
        "event_type": _event_types(table, mapping),
        "ts": source_ts,
        "session_id": _column(table, mapping.session_id),
        "device": _column(table, mapping.device),
        "country": _column(table, mapping.country),
        "value": value,
        "recommendation_id": _column(table, mapping.recommendation_id),
    }
    columns["event_id"] = _column(table, mapping.event_id)
    if columns["event_id"].null_count:
        mapped = [column.cast(pa.string()) for name, column in columns.items() if getattr(mapping, name)]
        columns["event_id"] = pc.coalesce(columns["event_id"], content_ids(mapped))
    columns["ts"] = pc.if_else(pc.greater_equal(source_ts, EARLIEST_TS), pc.add(source_ts, shift), source_ts)
    unreadable = pc.and_(pc.is_null(value), pc.invert(pc.is_in(pc.utf8_lower(value_text), pa.array([None, "nan", "null"]))))
    return pa.table([columns[name] for name in EVENT_SCHEMA.names], names=EVENT_SCHEMA.names), unreadable


def _event_types(table: pa.Table, mapping: SourceMapping) -> pa.ChunkedArray:
    if mapping.event_type is None:
        return pa.chunked_array([pa.array([mapping.default_event_type] * table.num_rows, pa.string())])
    known = {name.strip().lower(): event_type for name, event_type in mapping.event_types.items()}
    lower = pc.utf8_lower(pc.utf8_trim_whitespace(_column(table, mapping.event_type)))
    if not known:
        return lower
    at = pc.index_in(lower, value_set=pa.array(list(known)))
    return pc.coalesce(pa.chunked_array([pa.array(list(known.values()))]).take(at), lower)


def map_items(table: pa.Table, mapping: SourceMapping) -> pa.Table:
    """The catalogue rows, CATALOG_SCHEMA, of some rows that have an item id."""
    category = pc.replace_substring(_column(table, mapping.category), mapping.category_separator, "/")
    columns = {
        "item_id": _column(table, mapping.item_id),
        "title": _column(table, mapping.title),
        "category": category,
        "price": parse_decimal(_column(table, mapping.price)),
        "available": pc.fill_null(parse_bool(_column(table, mapping.available)), True),
        "attributes": _attributes(table, mapping),
    }
    return pa.table(columns).cast(CATALOG_SCHEMA)


def _attributes(table: pa.Table, mapping: SourceMapping) -> pa.Array:
    """The further columns of each row as a JSON object of those that are not empty, null when all are."""
    names = list(mapping.attributes)
    if "*" in names:
        mapped = mapped_columns(mapping)
        names = [name for name in table.column_names if name not in mapped]
    there = [name for name in names if name in table.column_names]
    if not there:
        return pa.nulls(table.num_rows, pa.string())
    rows = ({name: value for name, value in row.items() if value} for row in table.select(there).to_pylist())
    return pa.array([orjson.dumps(row).decode() if row else None for row in rows], pa.string())


class _Items:
    """The last row of each item seen, in the memory that the distinct items take."""

    def __init__(self, mapping: SourceMapping) -> None:
        self.mapping = mapping
        self.table = CATALOG_SCHEMA.empty_table()
        self.unreadable: Counter[str] = Counter()
        self.rows = 0

    def add(self, rows: pa.Table) -> None:
        items = map_items(last_of_each(rows, self.mapping.item_id), self.mapping)
        self.table = last_of_each(pa.concat_tables([self.table, items]), ITEM_ID)
        for name, column, parse in (
            ("price", self.mapping.price, parse_decimal),
            ("available", self.mapping.available, parse_bool),
        ):
            text = _column(rows, column)
            self.unreadable[name] += parse(text).null_count - text.null_count
        self.rows += rows.num_rows

    def merge(self, lake: Lake) -> CatalogReport:
        written = merge_catalog(lake, self.table)
        return CatalogReport(self.rows, self.rows, {}, written.rows, dict(+self.unreadable))


class _EventRun:
    """One call of `ingest`: lands file after file and adds up what became of the rows."""

    def __init__(self, landing: Landing, mapping: SourceMapping, events: EventSettings, now: int, shift: int) -> None:
        self.landing, self.mapping, self.events, self.now, self.shift = landing, mapping, events, now, shift
        self.reasons: Counter[str] = Counter()
        self.items = _Items(mapping)
        self.first_ts: int | None = None
        self.last_ts: int | None = None

    def file(self, source: SourceFile) -> FileReport:
        name = _source_name(source)
        read = landed = 0
        for number, chunk in enumerate(_chunks(source)):
            read += len(chunk.rows) + len(chunk.rejected)
            landed += self._chunk(source, name, f"{number:05d}", chunk)
        return FileReport(source.path, name, read, landed, read - landed)

    def _chunk(self, source: SourceFile, name: str, number: str, chunk: RawBatch) -> int:
        """Land one chunk. Returns the number of events."""
        mapped, unreadable = map_events(chunk.table, self.mapping, self.shift)
        reason = invalid_reasons(mapped, self.events, self.now)
        reason = pc.coalesce(reason, pc.if_else(unreadable, pa.scalar(UNREADABLE_VALUE), pa.scalar(None, pa.string())))
        rejected = _rejections(chunk, reason)
        good = pc.is_null(reason)
        landed = mapped.filter(good)
        _put(self.landing, LANDING, name, number, landed)
        _put(self.landing, QUARANTINE, name, number, _quarantine(source, rejected))
        self.reasons.update(r.reason for r in rejected)
        if self.mapping.catalog_from_events:
            self.items.add(chunk.table.filter(good))
        if landed.num_rows:
            first, last = pc.min_max(landed[TS]).as_py().values()
            self.first_ts = first if self.first_ts is None else min(first, self.first_ts)
            self.last_ts = last if self.last_ts is None else max(last, self.last_ts)
        return landed.num_rows
