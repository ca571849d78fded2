"""The landing zone: what arrived, as Parquet files of event schema v1 that are never changed, and the quarantine beside it.

    <lake>/landing/<source>/<name>.parquet       events; names are fixed by the content's origin, so a replay rewrites them
    <lake>/quarantine/<source>/<name>.parquet    rows that can't be events: origin, row number, reason, the row as text

The archive of a Kafka topic has the topic as its source and names of topic identity, partition, first and last offset:
`OffsetRange`. Its files have a further column, `offset`.

Which files hold events of an hour is read from the Parquet statistics of `ts` in the files' footers. Names that begin with `.`
or `_` are of copies under way and left out. A file that can't be read is left out as well and named by `unreadable`; the hours
that were made without it are made again once it can.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha1
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys_core.events import EVENT_SCHEMA, HOUR_MS, TS, hour_key, key_start_ms
from recsys_core.lake import Lake, Partition
from recsys_core.mentions import Named
from recsys_core.stores import files_below, is_of_the_store, write_atomically, written_at
from recsys_core.tombstones import TombstoneLog, Tombstones

LANDING = "landing"
QUARANTINE = "quarantine"
ENDING = ".parquet"
DAY_LENGTH = len("2026-01-31")
LANDING_SEEN, NAMES = "landing_seen", "names"
"""Lake table of which landing files were there at the last look for late ones: 64-bit hashes of their paths."""

QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("origin", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("content", pa.string()),
    ]
)
"""`origin` is the file (or topic-partition) and `row` the 1-based data row (or offset) in it."""


OFFSET = "offset"
ARCHIVE_SCHEMA = EVENT_SCHEMA.append(pa.field(OFFSET, pa.int64(), nullable=False))
ARCHIVE_METADATA = b"recsys.archive"
"""Key of the JSON in an archive file's footer: topic, source, first, last, messages, events, rejected, hours {key: events}.

`forgotten`, where it is there, are the events that were taken out with their users; `events` are those that are left."""
_RANGE_NAME = re.compile(r"^(?P<identity>[0-9a-f]{8})-(?P<partition>\d{5})-(?P<first>\d{20})-(?P<last>\d{20})\.parquet$")


@dataclass(frozen=True, order=True)
class OffsetRange:
    """What an archive file holds: the offsets from `first` to `last` of a partition of a topic.

    `identity` are 8 hexadecimal digits of the topic's id; a topic that was deleted and made again has another.
    """

    topic: str
    identity: str
    partition: int
    first: int
    last: int

    @property
    def name(self) -> str:
        """Name of the file, without `.parquet`."""
        return f"{self.identity}-{self.partition:05d}-{self.first:020d}-{self.last:020d}"

    def without(self, others: Iterable[OffsetRange]) -> list[OffsetRange]:
        """The parts of this range that none of `others` holds."""
        parts, first = [], self.first
        for other in sorted(others):
            if (other.topic, other.identity, other.partition) != (self.topic, self.identity, self.partition):
                continue
            if other.last < first or other.first > self.last:
                continue
            if other.first > first:
                parts.append(replace(self, first=first, last=other.first - 1))
            first = max(first, other.last + 1)
        return parts if first > self.last else [*parts, replace(self, first=first)]

    @classmethod
    def parse(cls, path: str) -> OffsetRange | None:
        """The range that a path of the landing zone names, None for a file that is no archive of a topic."""
        file = PurePosixPath(path)
        found = _RANGE_NAME.match(file.name)
        if not found:
            return None
        return cls(file.parent.name, found["identity"], int(found["partition"]), int(found["first"]), int(found["last"]))


def offset_faults(ranges: Iterable[OffsetRange]) -> list[str]:
    """Where the ranges of a partition leave offsets out or hold them twice, in words; none when each is held once."""
    faults = []
    ordered = sorted(ranges)
    for before, after in itertools.pairwise(ordered):
        if (before.topic, before.identity, before.partition) != (after.topic, after.identity, after.partition):
            continue
        where = f"{before.topic} ({before.identity}) partition {before.partition}"
        if after.first > before.last + 1:
            faults.append(f"{where}: offsets {before.last + 1} to {after.first - 1} are missing")
        elif after.first <= before.last:
            faults.append(f"{where}: offsets {after.first} to {min(before.last, after.last)} are in two files")
    return faults


ARRIVED_METADATA = b"recsys.arrived"
"""Key in the footer of a file that was written again without a forgotten user: when it had arrived, seconds since 1970."""
CLOCK_SECONDS = 600
"""By so much may the clock of a store be away from that of this machine; stores tell whole seconds."""
LOOKED, RECENT = "looked", "recent"
"""What the pointer of an hour of clicks says: when the landing zone was looked at for it (seconds since 1970), and the marks of
the files that had arrived only just then."""


@dataclass(frozen=True)
class LandingFile:
    """A landing file, the range of its event times (ms, both ends included), and when it arrived (seconds since 1970)."""

    path: str
    rows: int
    bytes: int
    first_ts: int
    last_ts: int
    arrived: float = 0.0

    @property
    def mark(self) -> str:
        """What stands for this arrival of the file: another one of the same name has another."""
        return sha1(f"{self.path} {self.arrived:.6f}".encode(), usedforsecurity=False).hexdigest()[:12]


@dataclass(frozen=True)
class Arrival:
    """A file that was not there at an earlier look, and its events by hour. `unseen`: its name was not there either."""

    file: LandingFile
    hours: dict[str, int]
    unseen: bool


@dataclass(frozen=True)
class _Entry:
    """A file as the store lists it; `stamp` changes when the file does."""

    path: str
    bytes: int
    stamp: str
    written: float


class Landing:
    """Writes and lists the landing zone of a lake."""

    def __init__(self, lake: Lake) -> None:
        self.lake = lake
        self._footers: dict[_Entry, LandingFile | str] = {}
        self._hours: dict[_Entry, dict[str, int]] = {}
        self._closed: dict[str, str] = {}
        self._forgotten = TombstoneLog(lake)

    def write_events(self, source: str, name: str, events: pa.Table) -> str:
        """Write one file of events, without those of users who were forgotten. `events` has EVENT_SCHEMA. Returns its path."""
        made = events.cast(EVENT_SCHEMA)
        return self._without_forgotten(lambda known: known.filtered(made), partial(self._write, LANDING, source, name))

    def write_archive(
        self, held: OffsetRange, messages: int, events: pa.Table, rejected: pa.Table, arrived: np.ndarray | None = None
    ) -> str:
        """Write the archive file of a range, and the quarantine file of the same name when something was rejected.

        `messages` were taken from the topic for it; an offset without one is a marker of the broker's own. `events` has
        ARCHIVE_SCHEMA, `rejected` QUARANTINE_SCHEMA with the offset as its row; `arrived` see `Tombstones.covers`. The same
        content gives the same bytes, but for users who were forgotten since.
        Returns the path of the events.
        """
        if rejected.num_rows:
            self.write_quarantine(held.topic, held.name, rejected)
        write = partial(self._write_range, held, messages, events.num_rows, rejected)
        return self._without_forgotten(lambda known: known.filtered(events, arrived), write)

    def _write_range(self, held: OffsetRange, messages: int, taken: int, rejected: pa.Table, left: pa.Table) -> str:
        facts = {
            "topic": held.topic,
            "source": f"{held.identity}.{held.partition}",
            "first": held.first,
            "last": held.last,
            "messages": messages,
            "events": left.num_rows,
            "rejected": rejected.num_rows,
            "hours": _by_hour(left[TS]),
        }
        if left.num_rows < taken:
            facts["forgotten"] = taken - left.num_rows
        metadata = {ARCHIVE_METADATA: json.dumps(facts).encode()}
        table = left.cast(ARCHIVE_SCHEMA).combine_chunks().replace_schema_metadata(metadata)
        return self._write(LANDING, held.topic, held.name, table)

    def not_forgotten(self, events: pa.Table) -> pa.Table:
        """The events that `write_events` would write now."""
        return self._forgotten.read().filtered(events)

    def _without_forgotten(self, leave: Callable[[Tombstones], pa.Table], write: Callable[[pa.Table], str]) -> str:
        """Write what `leave` leaves of those who are not forgotten, and again where a removal began meanwhile.

        The search of such a removal may have been past the place before the file was there.
        """
        known = self._forgotten.read()
        left = leave(known)
        path = write(left)
        while (now := self._forgotten.read()) != known:
            known, before = now, left
            left = leave(known)
            if not left.equals(before):
                path = write(left)
        return path

    def archived(self, topic: str | None = None) -> list[OffsetRange]:
        """The ranges of all archive files, or of those of one topic, in order. Raises what the store raises."""
        self.lake.fs.invalidate_cache()
        topics = [topic] if topic else [path.rsplit("/", 1)[-1] for path in self._listed()]
        paths = (path for one in topics for path in self._listed(one))
        return sorted(found for path in paths if (found := OffsetRange.parse(path)))

    def _listed(self, *folder: str) -> list[str]:
        """What lies in a folder of the landing zone, nothing where there is none. `exists` and `find` of fsspec say of a store
        that is away that it is empty."""
        try:
            paths: list[str] = self.lake.fs.ls(self.lake.path(LANDING, *folder), detail=False)
        except FileNotFoundError:
            return []
        return paths

    def archive_facts(self, held: OffsetRange) -> dict[str, Any]:
        """What the footer of an archive file says of it, see ARCHIVE_METADATA."""
        with self.lake.fs.open(self.lake.path(LANDING, held.topic, f"{held.name}.parquet"), "rb") as source:
            facts: dict[str, Any] = json.loads(pq.read_schema(source).metadata[ARCHIVE_METADATA])
        return facts

    def remove_rows(self, path: str, kept: pa.Table) -> None:
        """Replace a landing or quarantine file by those of its rows that are `kept`.

        The facts of an archive file follow: its offsets and messages stay what they were, and it counts what was taken out.
        """
        metadata = {ARRIVED_METADATA: repr(self._arrival(path)).encode()}
        held = OffsetRange.parse(path)
        if held and path.startswith(self.lake.path(LANDING)):
            facts = self.archive_facts(held)
            gone = facts["events"] - kept.num_rows
            facts |= {"events": kept.num_rows, "forgotten": facts.get("forgotten", 0) + gone, "hours": _by_hour(kept[TS])}
            metadata[ARCHIVE_METADATA] = json.dumps(facts).encode()
        self._put(path, kept.replace_schema_metadata(metadata))

    def _arrival(self, path: str) -> float:
        """When a file arrived: by its footer, else by the store."""
        with self.lake.fs.open(path, "rb") as source:
            told = (pq.read_schema(source).metadata or {}).get(ARRIVED_METADATA)
        return float(told) if told else written_at(self.lake.fs.info(path))

    # -- what arrived since ---------------------------------------------------------------------------------------

    def arrivals(self, since: float) -> list[Arrival]:
        """Files that may have arrived after a look at `since` (seconds since 1970), by their time or because their names were
        not noted by `note_arrivals` at that look. Late events make this name hours that were made long ago."""
        noted = self._noted()
        found = []
        for entry, file in self._readable():
            unseen = noted is not None and _name_hash(entry.path) not in noted
            if (unseen or file.arrived > since - CLOCK_SECONDS) and (hours := self._hours_of(entry, file)) is not None:
                found.append(Arrival(file, hours, unseen))
        return found

    def note_arrivals(self) -> None:
        """Keep the names of the files that `arrivals` could read, for the next look."""
        names = np.array(sorted(_name_hash(f.path) for f in self._footers.values() if isinstance(f, LandingFile)), "<u8")
        content = names.tobytes()
        digest = sha1(content, usedforsecurity=False).hexdigest()
        part = self.lake.find(LANDING_SEEN, NAMES)
        if part is None or part.extra["digest"] != digest:
            self.lake.write_blobs(LANDING_SEEN, NAMES, {NAMES: content}, len(names), {"digest": digest})

    def _noted(self) -> set[int] | None:
        if self.lake.find(LANDING_SEEN, NAMES) is None:
            return None
        return set(np.frombuffer(self.lake.read_blob(LANDING_SEEN, NAMES, NAMES), "<u8").tolist())

    def _hours_of(self, entry: _Entry, file: LandingFile) -> dict[str, int] | None:
        """Events of a file by hour, None where it turns out to be damaged."""
        if entry not in self._hours:
            held = OffsetRange.parse(file.path)
            counted: dict[str, int] = {}
            reason = "" if held else self._trouble(entry.path, lambda source: counted.update(_by_hour(_times(source))))
            if reason:
                self._footers[entry] = reason
                return None
            self._hours[entry] = self.archive_facts(held)["hours"] if held else counted
        return self._hours[entry]

    def write_quarantine(self, source: str, name: str, rows: pa.Table) -> str:
        """Write one file of rejected rows, without the content of those that name a user who was forgotten. `rows` has
        QUARANTINE_SCHEMA. Returns its path."""
        made = rows.cast(QUARANTINE_SCHEMA)
        return self._without_forgotten(partial(_without_content, made), partial(self._write, QUARANTINE, source, name))

    def _write(self, area: str, source: str, name: str, table: pa.Table) -> str:
        path = self.lake.path(area, source, f"{name}.parquet")
        self._put(path, table)
        return path

    def _put(self, path: str, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", row_group_size=131_072)
        write_atomically(self.lake.fs, path, sink.getvalue().to_pybytes())

    def files(self) -> list[LandingFile]:
        """The landing files that can be read, in the order of their paths."""
        return [file for _, file in self._readable()]

    def unreadable(self) -> dict[str, str]:
        """The landing files that can't be read, by path, and why; also folders that may not be listed."""
        files = {entry.path: file for entry, file in self._all().items() if isinstance(file, str)}
        return {**files, **self._closed}

    def strangers(self) -> list[str]:
        """Paths in the landing zone that nobody reads: neither Parquet by their names nor those of copies under way."""
        return [path for path in self._found(LANDING) if not path.lower().endswith(ENDING)]

    def damaged(self, files: Iterable[LandingFile]) -> list[LandingFile]:
        """Those of some files that can't be read to their end; from now on they count as unreadable."""
        entries = {entry.path: entry for entry in self._entries()}
        found = []
        for file in files:
            entry = entries.get(file.path)
            reason = self._trouble(file.path, lambda source: pq.read_table(source, columns=EVENT_SCHEMA.names))
            if entry and reason:
                self._footers[entry] = reason
                found.append(file)
        return found

    def _readable(self) -> list[tuple[_Entry, LandingFile]]:
        return [(entry, file) for entry, file in self._all().items() if isinstance(file, LandingFile)]

    def _all(self) -> dict[_Entry, LandingFile | str]:
        """The landing files by how they are listed: what their footers say, or why they can't be read."""
        entries = self._entries()
        unknown = [entry for entry in entries if entry not in self._footers]
        with ThreadPoolExecutor(max_workers=16) as pool:
            read = dict(zip(unknown, pool.map(self._read_footer, unknown), strict=True))
        known = {entry: self._footers[entry] if entry in self._footers else read[entry] for entry in entries}
        self._footers = {entry: file for entry, file in known.items() if file is not None}
        self._hours = {entry: hours for entry, hours in self._hours.items() if entry in self._footers}
        return self._footers

    def _entries(self) -> list[_Entry]:
        closed: dict[str, str] = {}
        found = self._found(LANDING, closed)
        self._closed = closed
        return [
            _Entry(path, int(found[path]["size"]), repr(sorted(found[path].items())), written_at(found[path]))
            for path in sorted(found)
            if path.lower().endswith(ENDING)
        ]

    def _found(self, area: str, closed: dict[str, str] | None = None) -> dict[str, Mapping[str, Any]]:
        """The files of an area as the store lists them, but for copies under way. Raises what the store raises, but for
        folders in it that may not be listed: `closed` gets these, and why."""
        fs, root = self.lake.fs, self.lake.path(area)
        fs.invalidate_cache()

        def unseen(path: str, error: OSError) -> None:
            if path == root or not isinstance(error, PermissionError):
                raise error
            if closed is not None:
                closed[path] = str(error)

        return {path: entry for path, entry in files_below(fs, root, unseen) if not _is_hidden(path.removeprefix(root))}

    def covering(self, start_ms: int, end_ms: int) -> list[LandingFile]:
        """The files that may hold events of [start_ms, end_ms)."""
        return [f for f in self.files() if f.rows and f.first_ts < end_ms and f.last_ts >= start_ms]

    def extent(self, source: str | None = None) -> tuple[int, int] | None:
        """First and last event time in the landing zone or of one source (ms), None when it is empty."""
        root = self.lake.path(LANDING, source, "") if source else ""
        files = [f for f in self.files() if f.first_ts <= f.last_ts and f.path.startswith(root)]
        return (min(f.first_ts for f in files), max(f.last_ts for f in files)) if files else None

    def last_busy_day(self, share: float = 0.2) -> str | None:
        """The last day with at least `share` of the events of the day in which the median event lies.

        Real histories end with stray events of broken clocks, and with a day that has only begun.
        """
        counts: Counter[str] = Counter()
        for entry, file in self._readable():
            for hour, events in (self._hours_of(entry, file) or {}).items():
                counts[hour[:DAY_LENGTH]] += events
        if not counts:
            return None
        ordered = sorted(counts)
        before = np.cumsum([counts[day] for day in ordered])
        typical = counts[ordered[int(np.searchsorted(before, before[-1] / 2))]]
        return max(day for day in ordered if counts[day] >= share * typical)

    def quarantined(self) -> Iterator[pa.Table]:
        """The rejected rows, a table a file. A file that can't be read, or that goes meanwhile, is left out."""
        for path in sorted(self._found(QUARANTINE)):
            if path.lower().endswith(ENDING):
                yield from self._rejected(path)

    def _rejected(self, path: str) -> list[pa.Table]:
        tables: list[pa.Table] = []
        with suppress(FileNotFoundError):
            self._trouble(path, lambda source: tables.append(pq.read_table(source)))
        return tables

    def rejections(self) -> list[tuple[float, int]]:
        """Of each quarantine file when it was written (seconds since 1970), and its rows by its footer."""
        rows: list[int] = []
        found = []
        for path, entry in sorted(self._found(QUARANTINE).items()):
            if path.lower().endswith(ENDING) and not self._trouble(path, lambda source: rows.append(_rows_of(source))):
                found.append((written_at(entry), rows[-1]))
        return found

    def _read_footer(self, entry: _Entry) -> LandingFile | str | None:
        """What a file's footer says, why it can't be read, None when it is gone."""
        found: list[LandingFile] = []

        def read(source: Any) -> None:
            found.append(_file_of(entry, pq.ParquetFile(source)))

        try:
            return self._trouble(entry.path, read) or found[0]
        except FileNotFoundError:
            return None

    def _trouble(self, path: str, read: Callable[[Any], object]) -> str:
        """Why a file can't be read, empty when it can. What the store itself raises is passed on."""
        try:
            with self.lake.fs.open(path, "rb") as source:
                read(source)
        except pa.ArrowException as error:
            return f"not readable as Parquet: {error}"
        except (ValueError, PermissionError) as error:
            return str(error)
        except OSError as error:
            if is_of_the_store(error):
                raise
            return f"not readable as Parquet: {error}"
        return ""


def _rows_of(source: Any) -> int:
    return int(pq.ParquetFile(source).metadata.num_rows)


def _without_content(rows: pa.Table, forgotten: Tombstones) -> pa.Table:
    """Rejected rows without the content of those that name a user who was forgotten."""
    if not forgotten:
        return rows
    named = Named("")
    texts = rows["content"].to_pylist()
    left = [None if text is None or forgotten.names(named.users_of(text)) else text for text in texts]
    return rows.set_column(rows.schema.get_field_index("content"), rows.schema.field("content"), pa.array(left, pa.string()))


def was_read(hour: Partition, arrival: Arrival, since: float) -> bool:
    """Whether an hour of clicks was made with a file that had arrived after a look at `since`.

    A file whose name appeared after that look came after the hours that had been made before it, whatever its time says.
    """
    looked = hour.extra.get(LOOKED, hour.written_at)
    if arrival.file.mark in hour.extra.get(RECENT, ()):
        return True
    if arrival.unseen and looked < since:
        return False
    return bool(arrival.file.arrived <= looked - CLOCK_SECONDS)


def what_was_read(files: Iterable[LandingFile], looked: float, hours: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What the pointers of hours say of the files that they are made from, see LOOKED."""
    said: dict[str, dict[str, Any]] = {hour: {LOOKED: looked, RECENT: []} for hour in hours}
    recent = [file for file in files if file.arrived > looked - CLOCK_SECONDS]
    starts = [(hour, key_start_ms(hour)) for hour in hours] if recent else []
    for hour, start in starts:
        said[hour][RECENT] = [f.mark for f in recent if f.first_ts < start + HOUR_MS and f.last_ts >= start]
    return said


def _file_of(entry: _Entry, file: pq.ParquetFile) -> LandingFile:
    """Raises ValueError for a file that is not of EVENT_SCHEMA."""
    found = {field.name: _plain(field.type) for field in file.schema_arrow}
    absent = [name for name in EVENT_SCHEMA.names if name not in found]
    wrong = [f"{f.name} is {found[f.name]}, not {f.type}" for f in EVENT_SCHEMA if found.get(f.name, f.type) != f.type]
    if absent or wrong:
        lacks = [f"lacks the columns {', '.join(absent)}"] if absent else []
        raise ValueError(f"not of the event schema: {'; '.join(lacks + wrong)}; put foreign files in by `recsys ingest`")
    told = (file.schema_arrow.metadata or {}).get(ARRIVED_METADATA)
    first, last = _extent(file)
    return LandingFile(entry.path, file.metadata.num_rows, entry.bytes, first, last, float(told) if told else entry.written)


def _is_hidden(below: str) -> bool:
    return any(part.startswith((".", "_")) for part in below.split("/"))


def _times(source: Any) -> pa.ChunkedArray:
    return pq.read_table(source, columns=[TS])[TS].drop_null()


def _name_hash(path: str) -> int:
    return int.from_bytes(sha1(path.encode(), usedforsecurity=False).digest()[:8], "little")


def _by_hour(times: pa.ChunkedArray) -> dict[str, int]:
    """Number of times (ms) by the hour they are in."""
    hours, counts = np.unique(times.to_numpy() // HOUR_MS, return_counts=True)
    return {hour_key(int(hour) * HOUR_MS): int(count) for hour, count in zip(hours, counts, strict=True)}


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type of the values, whatever their encoding in Arrow."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.string() if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) else kind


def _extent(file: pq.ParquetFile) -> tuple[int, int]:
    """First and last `ts`, from the statistics in the footer where the writer left them; (0, -1) when there is none."""
    column = next(c for c in range(len(file.schema)) if file.schema.column(c).path == TS)
    statistics = [file.metadata.row_group(g).column(column).statistics for g in range(file.metadata.num_row_groups)]
    if all(s is not None and s.has_min_max for s in statistics):
        ends = [(s.min, s.max) for s in statistics]
    else:
        ends = [tuple(pc.min_max(batch[TS]).as_py().values()) for batch in file.iter_batches(columns=[TS])]
    known = [(first, last) for first, last in ends if first is not None]
    return min((first for first, _ in known), default=0), max((last for _, last in known), default=-1)
