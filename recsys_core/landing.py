"""The landing zone: what arrived, as Parquet files of event schema v1, and the quarantine beside it.

    <lake>/landing/<source>/<name>.parquet       events; names are fixed by the content's origin, so a replay rewrites them
    <lake>/quarantine/<source>/<name>.parquet    rows that can't be events: origin, row number, reason, the row as text

The archive of a Kafka topic has the topic as its source and names of topic identity, partition, first and last offset:
`OffsetRange`. Its files have a further column, `offset`.

A file counts once the ledger names it (`recsys_core.ledger`), which also says which hours it holds events of. A file that can't
be read is left out and noted; the hours that were made without it are made again once it can.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

from recsys_core.events import EVENT_SCHEMA, HOUR_MS, TS, hour_key, now_ms
from recsys_core.lake import Lake, Partition
from recsys_core.ledger import (
    LANDING,
    QUARANTINE,
    RANGE_NAME,
    Advance,
    LandingFile,
    Ledger,
    LedgerChanged,
    Listing,
    is_ours,
)
from recsys_core.mentions import Named
from recsys_core.stores import files_below, is_of_the_store, move_atomically, write_atomically
from recsys_core.tombstones import TombstoneLog, Tombstones

ENDING = ".parquet"
DAY_LENGTH = len("2026-01-31")
DAMAGED = "landing_damaged"
"""Lake table of the landing files that could not be read, a partition each: its path, why, and the hours made without it."""
LOOKED, WITHOUT = "looked", "without"
"""What the pointer of an hour of clicks says: by which commit it was made, and the paths (below the lake) of files that could
not be read."""

STRANGE = "no reader knows of it; take it in by `recsys ingest`, and remove it"

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
ROW_GROUP = 131_072


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

    @property
    def archive(self) -> str:
        """What the ledger calls the archive of the partition."""
        return f"{self.topic}/{self.identity}-{self.partition:05d}"

    @classmethod
    def parse(cls, path: str) -> OffsetRange | None:
        """The range that a path of the landing zone names, None for a file that is no archive of a topic."""
        file = PurePosixPath(path)
        found = RANGE_NAME.match(file.name)
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


class Landing:
    """Writes the landing zone of a lake, and says what is in it."""

    def __init__(self, lake: Lake) -> None:
        self.lake = lake
        self.ledger = Ledger(lake)
        self._forgotten = TombstoneLog(lake)

    # -- writing ----------------------------------------------------------------------------------------------------

    def write_events(self, source: str, name: str, events: pa.Table) -> str:
        """Write one file of events, without those of users who were forgotten. `events` has EVENT_SCHEMA. Returns its path."""
        file = self.stage_events(source, name, events)
        self.ledger.commit([file])
        return file.path

    def write_quarantine(self, source: str, name: str, rows: pa.Table) -> str:
        """Write one file of rejected rows, without the content of those that name a user who was forgotten. `rows` has
        QUARANTINE_SCHEMA. Returns its path."""
        file = self.stage_quarantine(source, name, rows)
        self.ledger.commit([file])
        return file.path

    def stage_events(self, source: str, name: str, events: pa.Table) -> LandingFile:
        """The same as `write_events`, but for the commit by which the file counts."""
        path, made = self._path(LANDING, source, name), events.cast(EVENT_SCHEMA)
        return self._without_forgotten(lambda known: known.filtered(made), partial(self._put, path))

    def stage_quarantine(self, source: str, name: str, rows: pa.Table) -> LandingFile:
        """The same as `write_quarantine`, but for the commit by which the file counts."""
        path, made = self._path(QUARANTINE, source, name), rows.cast(QUARANTINE_SCHEMA)
        return self._without_forgotten(partial(_without_content, made), partial(self._put, path))

    def write_archive(
        self, held: OffsetRange, messages: int, events: pa.Table, rejected: pa.Table, arrived: np.ndarray | None = None
    ) -> LandingFile:
        """Write the archive file of a range, and the quarantine file of the same name when something was rejected. The archive
        of the partition has then come to the end of the range.

        `messages` were taken from the topic for it; an offset without one is a marker of the broker's own. `events` has
        ARCHIVE_SCHEMA, `rejected` QUARANTINE_SCHEMA with the offset as its row; `arrived` see `Tombstones.covers`. The same
        content gives the same bytes, but for users who were forgotten since.

        Raises LedgerChanged when the archive is beyond the beginning of the range.
        """
        beside = [self.stage_quarantine(held.topic, held.name, rejected)] if rejected.num_rows else []
        path = self._path(LANDING, held.topic, held.name)
        made = events.cast(ARCHIVE_SCHEMA).combine_chunks()
        left = self._without_forgotten(lambda known: known.filtered(made, arrived), partial(self._put, path))
        forgotten = events.num_rows - left.rows
        file = replace(left, messages=messages, rejected=rejected.num_rows, forgotten=forgotten)
        self.ledger.commit([*beside, file], advance=Advance(held.archive, held.first, held.last + 1))
        return file

    def not_forgotten(self, events: pa.Table) -> pa.Table:
        """The events that `write_events` would write now."""
        return self._forgotten.read().filtered(events)

    def take_out(self, path: str, mine: Callable[[pa.Table], pa.Array], listing: Listing) -> None:
        """Replace a landing or quarantine file by its rows that are not `mine` (rows to bool (n,)), which is no news to anyone.

        Of an archive file the messages stay what they were, and it counts what was taken out. What `listing` does not name, or
        what changed since, is replaced all the same, and the ledger says of it what it said.
        """
        with self.lake.fs.open(path, "rb") as source:
            file = pq.ParquetFile(source)
            now = self.write_stream(path, file.schema_arrow, (t.filter(pc.invert(mine(t))) for t in row_groups(file)))
        if said := listing.find(path):
            gone = said.forgotten + said.rows - now.rows if said.messages else 0
            kept = replace(now, arrived=said.arrived, since=said.since, messages=said.messages, rejected=said.rejected)
            with suppress(LedgerChanged):
                self.ledger.commit([replace(kept, forgotten=gone)], as_of=listing.version)

    def write_stream(self, path: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> LandingFile:
        """Write a file of many rows, a row group a table, in the memory that one takes. It counts only once it is committed."""
        parts = [file_of(path, schema.empty_table(), 0)]
        with tempfile.NamedTemporaryFile(suffix=ENDING) as spool:
            with pq.ParquetWriter(spool.name, schema, compression="zstd") as out:
                for table in tables:
                    out.write_table(table, row_group_size=ROW_GROUP)
                    parts.append(file_of(path, table, 0))
            move_atomically(self.lake.fs, spool.name, path)
            return replace(joined(path, parts), bytes=os.path.getsize(spool.name))

    def commit(self, staged: Iterable[LandingFile], stale: Iterable[str] = ()) -> None:
        """Have files count that were staged, and remove others."""
        self.ledger.commit(staged, stale := list(stale))
        for path in stale:
            with suppress(FileNotFoundError):
                self.lake.fs.rm_file(path)

    def _path(self, area: str, source: str, name: str) -> str:
        return self.lake.path(area, source, f"{name}{ENDING}")

    def _put(self, path: str, table: pa.Table) -> LandingFile:
        """Write a file, which counts only once it is committed."""
        self.ledger.begin()
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", row_group_size=ROW_GROUP)
        content = sink.getvalue().to_pybytes()
        write_atomically(self.lake.fs, path, content)
        return file_of(path, table, len(content))

    def _without_forgotten(
        self, leave: Callable[[Tombstones], pa.Table], write: Callable[[pa.Table], LandingFile]
    ) -> LandingFile:
        """Write what `leave` leaves of those who are not forgotten, and again where a removal began meanwhile.

        The search of such a removal may have been past the place before the file was there.
        """
        known = self._forgotten.read()
        left = leave(known)
        file = write(left)
        while (now := self._forgotten.read()) != known:
            known, before = now, left
            left = leave(known)
            if not left.equals(before):
                file = write(left)
        return file

    # -- what there is ------------------------------------------------------------------------------------------------

    def files(self) -> list[LandingFile]:
        """The landing files, in the order of their paths."""
        return self.ledger.read().files()

    def sources(self) -> set[str]:
        """The sources that have a file in the landing zone or the quarantine."""
        return set(pc.unique(_sources_of(self.ledger.read().table)).to_pylist())

    def extent(self, source: str | None = None) -> tuple[int, int] | None:
        """First and last event time in the landing zone or of one source (ms), None when it is empty."""
        return self.ledger.read().extent(source)

    def archived(self, topic: str | None = None) -> list[OffsetRange]:
        """The ranges of all archive files, or of those of one topic, in order."""
        return ranges(self.ledger.read().rows(LANDING, topic)["path"].to_pylist())

    def news(self, version: int) -> dict[str, int]:
        """The hours of which events arrived after a commit, and the number of the last commit that brought some."""
        rows = self.ledger.added_since(version)
        rows = rows.filter(pc.starts_with(rows["path"], f"{LANDING}/"))
        hours, _, places = _hours_of(rows)
        last = pa.table({"hour": hours, "since": rows["since"].take(places)}).group_by("hour").aggregate([("since", "max")])
        return dict(zip(last["hour"].to_pylist(), last["since_max"].to_pylist(), strict=True))

    def last_busy_day(self, share: float = 0.2) -> str | None:
        """The last day with at least `share` of the events of the day in which the median event lies.

        Real histories end with stray events of broken clocks, and with a day that has only begun.
        """
        hours, events, _ = _hours_of(self.ledger.read().rows())
        days = pc.utf8_slice_codeunits(hours, 0, DAY_LENGTH)
        counts = pa.table({"day": days, "events": events}).group_by("day").aggregate([("events", "sum")]).sort_by("day")
        if not counts.num_rows:
            return None
        found = counts["events_sum"].to_numpy()
        before = np.cumsum(found)
        typical = found[int(np.searchsorted(before, before[-1] / 2))]
        return str(counts["day"][int(np.flatnonzero(found >= share * typical)[-1])])

    def quarantined(self) -> Iterator[pa.Table]:
        """The rejected rows, a table a file. A file that can't be read, or that goes meanwhile, is left out."""
        for file in self.ledger.read().files(QUARANTINE):
            yield from self._rejected(file.path)

    def _rejected(self, path: str) -> list[pa.Table]:
        tables: list[pa.Table] = []
        self._trouble(path, lambda source: tables.append(pq.read_table(source)))
        return tables

    # -- what can't be read, and what nobody reads ----------------------------------------------------------------------

    def damaged(self, files: Iterable[LandingFile]) -> dict[str, str]:
        """Those of some files that can't be read to their end, by path, and why."""
        found = {file.path: self._reading_trouble(file.path) for file in files}
        return {path: reason for path, reason in found.items() if reason}

    def note_damaged(self, damaged: Mapping[str, str], hours: Sequence[str] = ()) -> None:
        """Keep which files could not be read, and the hours that are made without them."""
        for path, reason in damaged.items():
            below = self.lake.below(path)
            key = _damage_key(below)

            def note(part: Partition | None, below: str = below, reason: str = reason, key: str = key) -> None:
                noted = sorted({*(part.extra["hours"] if part else ()), *hours})
                said = {"path": below, "reason": reason, "hours": noted}
                self.lake.write_blobs(DAMAGED, key, {}, 0, said, instead_of=part)

            self.lake.revise(DAMAGED, key, note)

    def noted(self) -> list[Damage]:
        """The files that were noted as damaged, and whether they are still."""
        parts = self.lake.find_all(DAMAGED, self.lake.keys(DAMAGED)).values()
        if not parts:
            return []
        counting = set(self.ledger.read().table["path"].to_pylist())
        found = []
        for part in parts:
            below = part.extra["path"]
            reason = self._reading_trouble(self.lake.path(below)) if below in counting else ""
            found.append(Damage(below, reason, tuple(part.extra["hours"]), part))
        return found

    def unreadable(self) -> dict[str, str]:
        """The landing files that could not be read and still can't, by path, and why."""
        return {self.lake.path(damage.path): damage.reason for damage in self.noted() if damage.reason}

    def strangers(self) -> list[str]:
        """Files and folders that somebody put into the landing zone, where nobody reads them.

        Looked at are the folders in which no file counts, and what lies beside the folders. `recsys_core.retention` lists the
        others as well.
        """
        counting = set(pc.unique(_sources_of(self.ledger.read().rows())).to_pylist())
        fs, root = self.lake.fs, self.lake.path(LANDING)
        fs.invalidate_cache()
        closed: list[str] = []
        try:
            entries = fs.ls(root, detail=True)
        except FileNotFoundError:
            return []
        found: list[str] = []
        for entry in entries:
            path = entry["name"].rstrip("/")
            if entry["type"] != "directory":
                found.append(path)
            elif path.rsplit("/", 1)[-1] not in counting:
                found += [file for file, _ in files_below(fs, path, lambda folder, _: closed.append(folder))]
        return sorted([path for path in found if is_strange(path.removeprefix(f"{root}/"))] + closed)

    def _reading_trouble(self, path: str) -> str:
        return self._trouble(path, _read_through)

    def _trouble(self, path: str, read: Callable[[Any], object]) -> str:
        """Why a file can't be read, empty when it can. What the store itself raises is passed on."""
        try:
            with self.lake.fs.open(path, "rb") as source:
                read(source)
        except FileNotFoundError:
            return "it is gone"
        except pa.ArrowException as error:
            return f"not readable as Parquet: {error}"
        except (ValueError, PermissionError) as error:
            return str(error)
        except OSError as error:
            if is_of_the_store(error):
                raise
            return f"not readable as Parquet: {error}"
        return ""


@dataclass(frozen=True)
class Damage:
    """A file that could not be read, by its path below the lake, the hours that were made without it, and why it still can't;
    empty when it can, or when it no longer counts."""

    path: str
    reason: str
    hours: tuple[str, ...]
    note: Partition


def file_of(path: str, table: pa.Table, size: int) -> LandingFile:
    """What the ledger says of a file of events or rejected rows that comes now."""
    times = table[TS].drop_null() if TS in table.column_names else pa.chunked_array([], pa.int64())
    ends = pc.min_max(times).as_py() if len(times) else {"min": 0, "max": -1}
    return LandingFile(path, table.num_rows, size, ends["min"], ends["max"], now_ms(), hours=by_hour(times))


def joined(path: str, files: Sequence[LandingFile]) -> LandingFile:
    """What the ledger says of one file at `path` with the content of several."""
    dated = [file for file in files if file.first_ts <= file.last_ts]
    return LandingFile(
        path,
        rows=sum(file.rows for file in files),
        bytes=sum(file.bytes for file in files),
        first_ts=min((file.first_ts for file in dated), default=0),
        last_ts=max((file.last_ts for file in dated), default=-1),
        arrived=max(file.arrived for file in files),
        messages=sum(file.messages for file in files),
        rejected=sum(file.rejected for file in files),
        forgotten=sum(file.forgotten for file in files),
        hours=dict(sum((Counter(file.hours) for file in files), Counter())),
        since=max(file.since for file in files),
    )


def row_groups(file: pq.ParquetFile) -> Iterator[pa.Table]:
    """The rows of a file, a row group at a time."""
    for number in range(file.num_row_groups):
        yield file.read_row_group(number)


def is_strange(below: str) -> bool:
    """Whether a path below an area is neither one that we give nor that of a copy under way."""
    return not is_ours(below) and not any(part.startswith((".", "_")) for part in below.split("/"))


def ranges(paths: Iterable[str]) -> list[OffsetRange]:
    """What the paths of archive files hold, in order; others are left out."""
    return sorted(found for path in paths if (found := OffsetRange.parse(path)))


def what_was_read(version: int, without: Iterable[str]) -> dict[str, Any]:
    """What the pointer of an hour says of the files that it was made from, see LOOKED."""
    return {LOOKED: version, WITHOUT: sorted(without)}


def by_hour(times: pa.ChunkedArray) -> dict[str, int]:
    """Number of times (ms) by the hour they are in."""
    hours, counts = np.unique(times.to_numpy() // HOUR_MS, return_counts=True)
    return {hour_key(int(hour) * HOUR_MS): int(count) for hour, count in zip(hours, counts, strict=True)}


def _sources_of(rows: pa.Table) -> pa.ChunkedArray:
    return pc.list_element(pc.split_pattern(rows["path"], "/"), 1)


def _hours_of(rows: pa.Table) -> tuple[pa.Array, pa.Array, pa.Array]:
    """The hours that files hold events of (n,), how many, and the place of each one's file in `rows`."""
    held = rows["hours"].combine_chunks()
    ends = held.offsets.to_numpy()
    places = np.repeat(np.arange(rows.num_rows), np.diff(ends))
    inside = slice(int(ends[0]), int(ends[-1])) if len(ends) else slice(0, 0)
    return held.keys[inside], held.items[inside], pa.array(places)


def _read_through(source: Any) -> None:
    for _ in pq.ParquetFile(source).iter_batches(columns=EVENT_SCHEMA.names):
        pass


def _damage_key(path: str) -> str:
    return sha1(path.encode(), usedforsecurity=False).hexdigest()[:16]


def _without_content(rows: pa.Table, forgotten: Tombstones) -> pa.Table:
    """Rejected rows without the content of those that name a user who was forgotten."""
    if not forgotten:
        return rows
    named = Named("")
    texts = rows["content"].to_pylist()
    left = [None if text is None or forgotten.names(named.users_of(text)) else text for text in texts]
    return rows.set_column(rows.schema.get_field_index("content"), rows.schema.field("content"), pa.array(left, pa.string()))
