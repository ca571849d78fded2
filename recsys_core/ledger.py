"""Which files of the landing zone and the quarantine count, and since when.

    <lake>/ledger/head.json                  the newest changes, how far archives have come, and which parts hold the rest
    <lake>/ledger/<time>-<random>.parquet    a part: earlier changes in the order of their commits, never changed

A file counts from the commit that names it to the one that takes it out. What a writer that broke off left is named by none and
read by nobody. A commit replaces the head by what it said before (`stores.update`). So files come, go and are replaced together
or not at all, and of two workers that archive the same offsets one is refused.

A commit costs the same however many files there are. The changes in the head become a part once they are many, together with
those parts before it that hold no more. So each is rewritten a few times, and parts are as many as the logarithm of the changes
up to PART_ROWS. What was replaced or taken out goes from the parts with `settle`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys_core.errors import UserError
from recsys_core.events import now_ms
from recsys_core.lake import Lake, timed_name
from recsys_core.masking import masked_text
from recsys_core.stores import files_below, read_pointer, update, write_atomically

LANDING = "landing"
QUARANTINE = "quarantine"
LEDGER, HEAD = "ledger", "head.json"
HEAD_ROWS = 256
"""So many changes stand in the head before they become a part."""
PART_ROWS = 65_536
"""A part grows up to this: it bounds the memory of who makes one."""
READERS = 4
"""Parts that are read at once."""

ROWS = pa.schema(
    [
        ("path", pa.string()),
        ("commit", pa.int64()),
        ("since", pa.int64()),
        ("gone", pa.bool_()),
        ("first_time", pa.bool_()),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),
        ("first_ts", pa.int64()),
        ("last_ts", pa.int64()),
        ("arrived", pa.int64()),
        ("messages", pa.int64()),
        ("rejected", pa.int64()),
        ("forgotten", pa.int64()),
        ("hours", pa.map_(pa.string(), pa.int64())),
    ]
)
"""What a commit says of a file: the attributes of `LandingFile`, its number, whether the file is gone from then on, and whether
no commit before can have named it. `arrived` of a file that is gone is when it went. Paths are below the lake."""


RANGE_NAME = re.compile(
    r"^(?P<identity>[0-9a-f]{8})-(?P<partition>\d{5})-(?P<first>\d{20})-(?P<last>\d{20})(-[0-9a-f]{8})?\.parquet$"
)
"""Name of an archive file; one that was joined of others has a random end."""
_NUMBER_NAME = re.compile(r"^\d{5}\.parquet$")
_SOURCE_NAME = re.compile(r"-[0-9a-f]{16}$")
"""Those of files that were taken in, and of the folder of their source."""


class LedgerChanged(Exception):
    """Another writer has gone on since the look that this commit was made from: look again."""


class DamagedLedger(UserError, ValueError):
    """The head can't be read, or is not there while files are that it named; the message says what to do."""


@dataclass(frozen=True)
class LandingFile:
    """A file that counts.

    Attributes:
        path: of the lake's filesystem.
        rows, bytes: of it.
        first_ts, last_ts: of its events, ms, both ends included; (0, -1) where it has none.
        arrived: when it came, ms since 1970.
        messages: that were taken from the topic for it; of an archive file.
        rejected: of them, those that are in the quarantine.
        forgotten: of them, those that were left out or taken out with their users.
        hours: its events by the hour they are in.
        since: number of the commit by which its events came; 0 where that is still to be made.
    """

    path: str
    rows: int
    bytes: int
    first_ts: int
    last_ts: int
    arrived: int
    messages: int = 0
    rejected: int = 0
    forgotten: int = 0
    hours: Mapping[str, int] = field(default_factory=dict)
    since: int = 0


@dataclass(frozen=True)
class Advance:
    """What an archive goes on with: the offsets from `first` up to before `end` of a partition, which `archive` names."""

    archive: str
    first: int
    end: int


@dataclass(frozen=True)
class Listing:
    """The files that count as of a commit.

    Attributes:
        version: number of the commit; 0 before the first.
        table: ROWS, in the order of the commits.
        gone: ROWS of the files that were taken out and that `settle` still knows of.
    """

    version: int
    table: pa.Table
    gone: pa.Table
    _root: str

    def files(self, area: str = LANDING, source: str | None = None, where: pa.ChunkedArray | None = None) -> list[LandingFile]:
        """The files of an area, or of one source in it, in the order of their paths. `where` bool (n,) leaves rows of `table`
        out."""
        return self.as_files(self.rows(area, source, where))

    def rows(self, area: str = LANDING, source: str | None = None, where: pa.ChunkedArray | None = None) -> pa.Table:
        """The same as ROWS, in the order of the commits."""
        mask = pc.starts_with(self.table["path"], f"{area}/{source}/" if source else f"{area}/")
        return self.table.filter(mask if where is None else pc.and_(mask, where))

    def as_files(self, rows: pa.Table) -> list[LandingFile]:
        """Rows of `table` as files, in the order of their paths."""
        columns = [name for name in ROWS.names if name not in ("commit", "gone", "first_time", "hours")]
        hours = rows["hours"].to_pylist()
        found = zip(rows.select(columns).to_pylist(), hours, strict=True)
        files = [LandingFile(**{**row, "path": f"{self._root}/{row['path']}"}, hours=dict(by_hour)) for row, by_hour in found]
        return sorted(files, key=lambda file: file.path)

    def find(self, path: str) -> LandingFile | None:
        """The file at a path, None where none counts there."""
        rows = self.table.filter(pc.equal(self.table["path"], path.removeprefix(f"{self._root}/")))
        return self.as_files(rows)[0] if rows.num_rows else None

    def covering(self, start_ms: int, end_ms: int) -> list[LandingFile]:
        """The landing files that may hold events of [start_ms, end_ms)."""
        before, after = pc.less(self.table["first_ts"], end_ms), pc.greater_equal(self.table["last_ts"], start_ms)
        some = pc.greater(self.table["rows"], 0)
        return self.files(where=pc.and_(some, pc.and_(before, after)))

    def extent(self, source: str | None = None) -> tuple[int, int] | None:
        """First and last event time in the landing zone or of one source (ms), None when it is empty."""
        rows = self.rows(source=source, where=pc.less_equal(self.table["first_ts"], self.table["last_ts"]))
        return (pc.min(rows["first_ts"]).as_py(), pc.max(rows["last_ts"]).as_py()) if rows.num_rows else None


@dataclass(frozen=True)
class _Part:
    """A part and the number of the last commit in it."""

    name: str
    rows: int
    last: int


@dataclass(frozen=True)
class _Head:
    """What the head says. `reached` has for each archive up to before which offset it has come, `recent` are ROWS."""

    version: int = 0
    reached: dict[str, int] = field(default_factory=dict)
    parts: tuple[_Part, ...] = ()
    recent: tuple[dict[str, Any], ...] = ()


class Ledger:
    """The ledger of a lake. Raises what the store raises, and DamagedLedger."""

    def __init__(self, lake: Lake) -> None:
        self._lake = lake
        self._path = lake.path(LEDGER, HEAD)
        self._parts: dict[str, pa.Table] = {}
        self._begun = False

    def read(self) -> Listing:
        """All files that count now. Parts that this object has read before are not read again."""
        head = self._now()
        known = {part.name: self._parts.get(part.name) for part in head.parts}
        new = [name for name, table in known.items() if table is None]
        with ThreadPoolExecutor(READERS) as pool:
            known.update(zip(new, pool.map(self._part, new), strict=True))
        self._parts = {name: table for name, table in known.items() if table is not None}
        rows = _newest(pa.concat_tables([*self._parts.values(), _table(head.recent)]))
        gone = rows["gone"]
        counting = rows.filter(pc.invert(gone)) if pc.any(gone).as_py() else rows
        return Listing(head.version, counting, rows.filter(gone), self._lake.root)

    def begin(self) -> None:
        """Make the ledger where there is none, before the first file is written: one that lies there without it was lost."""
        if not self._begun:
            self._now()
            update(self._lake.fs, self._path, lambda said: orjson.dumps(_Head()) if said is None else None)
            self._begun = True

    def version(self) -> int:
        """Number of the last commit; 0 before the first."""
        return self._now().version

    def reached(self, archive: str) -> int | None:
        """Up to before which offset an archive has come, None where it has not begun."""
        return self._now().reached.get(archive)

    def commit(
        self,
        added: Iterable[LandingFile] = (),
        removed: Iterable[str] = (),
        advance: Advance | None = None,
        as_of: int | None = None,
    ) -> int:
        """Have files count, and those at other paths count no more, from now on. Returns the number of the commit.

        A file that counts already is replaced by what is said of it now. Raises LedgerChanged when `advance` begins before
        where its archive is, or when one of these files changed in a commit after `as_of`.
        """
        files = [{**asdict(file), "path": self._lake.below(file.path)} for file in added]
        paths = [self._lake.below(path) for path in removed]
        if not files and not paths:
            return self.version()
        touched = {*paths, *(row["path"] for row in files)}
        went = now_ms()

        def change(said: bytes | None) -> bytes:
            head = self._head(said)
            if advance and head.reached.get(advance.archive, advance.first) > advance.first:
                raise LedgerChanged(f"{advance.archive} is at {head.reached[advance.archive]}, beyond {advance.first}")
            if as_of is not None and (other := touched & set(self._since(head, as_of)["path"].to_pylist())):
                raise LedgerChanged(f"{min(other)} changed after commit {as_of}")
            number = head.version + 1
            said_of_all = {"commit": number, "gone": False, "first_time": advance is not None}
            rows = [{**row, **said_of_all, "since": row["since"] or number} for row in files]
            rows += [{"path": path, "commit": number, "gone": True, "first_time": False, "arrived": went} for path in paths]
            reached = head.reached | ({advance.archive: advance.end} if advance else {})
            return orjson.dumps(replace(head, version=number, reached=reached, recent=(*head.recent, *rows)))

        head = self._head(update(self._lake.fs, self._path, change))
        if len(head.recent) >= HEAD_ROWS:
            self._fold(head)
        return head.version

    def added_since(self, version: int) -> pa.Table:
        """ROWS of the files whose events came after a commit and that still count. Only parts that were made since are read."""
        head = self._now()
        rows = _newest(self._since(head, version))
        return rows.filter(pc.and_(pc.invert(rows["gone"]), pc.greater(pc.fill_null(rows["since"], 0), version)))

    def settle(self, listing: Listing, keep_gone: pa.Table) -> None:
        """Rewrite all parts without what was replaced or taken out, but for `keep_gone` of `listing.gone`."""
        head = self._now()
        last = max((part.last for part in head.parts), default=0)
        if listing.version < last:
            return
        rows = pa.concat_tables([keep_gone, listing.table])
        rows = rows.filter(pc.less_equal(rows["commit"], last))
        parts = [self._write(rows.slice(at, PART_ROWS)) for at in range(0, rows.num_rows, PART_ROWS)]
        self._replace(head.parts, parts, 0)

    def parts(self) -> set[str]:
        """Paths of the parts that the head names."""
        return {self._lake.path(LEDGER, part.name) for part in self._now().parts}

    # -- the head and its parts -----------------------------------------------------------------------------------

    def _now(self) -> _Head:
        said = read_pointer(self._lake.fs, self._path)
        if said is None and (lost := self._left_behind()) and (said := read_pointer(self._lake.fs, self._path)) is None:
            raise DamagedLedger(
                f"{masked_text(lost)} is there and {HEAD} of the ledger is not, which says which files count: put "
                f"{masked_text(self._path)} back from a backup of the lake; without one, move the files of {LANDING}/ and "
                f"{QUARANTINE}/ out of the lake and take them in by `recsys ingest`"
            )
        return self._head(said)

    def _left_behind(self) -> str | None:
        """A file with a name that we give, None where there is none: the lake is a new one."""
        fs = self._lake.fs
        fs.invalidate_cache()

        def unseen(_: str, error: OSError) -> None:
            raise error

        areas = (self._lake.path(area) for area in (LANDING, QUARANTINE))
        found = (path for area in areas for path, _ in files_below(fs, area, unseen))
        return next((path for path in found if is_ours(self._lake.below(path).partition("/")[2])), None)

    def _head(self, said: bytes | None) -> _Head:
        if said is None:
            return _Head()
        try:
            raw = orjson.loads(said)
            parts = tuple(_Part(**part) for part in raw["parts"])
            return _Head(raw["version"], raw["reached"], parts, tuple(raw["recent"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedLedger(
                f"{masked_text(self._path)} is damaged ({type(error).__name__}: {error}): put it back from a backup of the lake"
            ) from error

    def _fold(self, head: _Head) -> None:
        """Make a part of the changes in the head. Of two writers that do it at once one leaves a part that nobody names."""
        rows, absorbed = len(head.recent), 0
        for part in reversed(head.parts):
            if part.rows > rows or part.rows + rows > PART_ROWS:
                break
            rows, absorbed = rows + part.rows, absorbed + 1
        old = head.parts[len(head.parts) - absorbed :]
        made = self._write(_newest(pa.concat_tables([*(self._part(part.name) for part in old), _table(head.recent)])))
        self._replace(old, [made], len(head.recent))

    def _replace(self, old: Sequence[_Part], new: Sequence[_Part], taken: int) -> None:
        """Put parts in the place of others and of the first `taken` changes in the head, unless another writer did."""

        def change(said: bytes | None) -> bytes | None:
            head = self._head(said)
            kept = head.parts[: len(head.parts) - len(old)]
            done = [row["commit"] for row in head.recent[:taken]]
            if (*kept, *old) != head.parts or len(done) < taken or (done and done[-1] != new[-1].last):
                return None
            return orjson.dumps(replace(head, parts=(*kept, *new), recent=head.recent[taken:]))

        update(self._lake.fs, self._path, change)

    def _since(self, head: _Head, version: int) -> pa.Table:
        """ROWS of the commits after one."""
        parts = [part.name for part in head.parts if part.last > version]
        known = [self._parts[name] if name in self._parts else self._part(name) for name in parts]
        rows = pa.concat_tables([*known, _table(head.recent)])
        return rows.filter(pc.greater(rows["commit"], version))

    def _part(self, name: str) -> pa.Table:
        return pq.read_table(pa.BufferReader(self._lake.fs.cat_file(self._lake.path(LEDGER, name))), schema=ROWS)

    def _write(self, rows: pa.Table) -> _Part:
        name = f"{timed_name()}.parquet"
        sink = pa.BufferOutputStream()
        pq.write_table(rows, sink, compression="zstd")
        write_atomically(self._lake.fs, self._lake.path(LEDGER, name), sink.getvalue().to_pybytes())
        return _Part(name, rows.num_rows, pc.max(rows["commit"]).as_py())


def is_ours(below: str) -> bool:
    """Whether a path below an area is one of those that a writer of ours gives its files: such a file that does not count is of
    one that is at work, or broke off."""
    source, _, name = below.rpartition("/")
    return bool(RANGE_NAME.match(name) or (_NUMBER_NAME.match(name) and _SOURCE_NAME.search(source)))


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Changes of the head as ROWS."""
    return pa.Table.from_pylist([{**row, "hours": list(row.get("hours", {}).items())} for row in rows], schema=ROWS)


def _newest(rows: pa.Table) -> pa.Table:
    """The last change of each path, in the order in which they were made."""
    again = pc.unique(rows["path"].filter(pc.invert(rows["first_time"])))
    at = np.flatnonzero(pc.is_in(rows["path"], value_set=again).to_numpy())
    places = rows["path"].take(pa.array(at)).combine_chunks().dictionary_encode()
    last = np.zeros(len(places.dictionary), np.int64)
    np.maximum.at(last, places.indices.to_numpy(), at)
    kept = np.ones(rows.num_rows, bool)
    kept[at] = last[places.indices.to_numpy()] == at
    return rows if kept.all() else rows.filter(pa.array(kept))
