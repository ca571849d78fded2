"""Users who were forgotten: what they did before that moment is not taken in again, wherever it comes from.

A topic keeps messages for days and a source file can be ingested twice, so a removal alone does not last. The landing zone and
the speed layer leave such events out. What a user does after that moment is taken in.

    <lake>/tombstones/new/<moment>-<hash>                a removal; the name is all there is to know of it
    <lake>/tombstones/merged/<time>-<random>.parquet     many of them, never changed

What is forgotten is the union of both folders. Nothing goes before a whole file holds it, so a crash between two steps
loses none, nor do two removals at once, and no store has to lock. A reader lists `new/` first: what a merge took away
from there is in a file that was complete before.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys_core.events import TS, USER_ID
from recsys_core.lake import Lake, timed_name
from recsys_core.stores import write_atomically

TOMBSTONES = "tombstones"
"""Folder of the lake beside its tables, see above."""
NEW, MERGED = "new", "merged"
USER_HASH, FORGOTTEN_AT = "user_hash", "forgotten_at"
MERGED_SCHEMA = pa.schema([pa.field(USER_HASH, pa.binary(32), False), pa.field(FORGOTTEN_AT, pa.int64(), False)])
REREAD_SECONDS = 2.0
"""How often those who take events in all the time look for new removals."""
MERGE_AT = 200
"""New removals that are merged into a file: as many names a reader lists with one request of any store."""
KEEP_SECONDS = 600
"""For so long stays a file whose rows are all in a later one: a listing that began before that was there still finds it."""
_NEW_NAME = re.compile(r"^(?P<moment>\d{13})-(?P<hash>[0-9a-f]{64})$")
_MERGED_NAME = re.compile(r"^(?P<time>[0-9a-f]{16})-[0-9a-f]{8}\.parquet$")
"""`time` in ns since 1970, hexadecimal."""


def hash_of(user_id: str) -> str:
    """SHA-256 of a user's id, hexadecimal: what stands for it in what is kept."""
    return sha256(user_id.encode()).hexdigest()


@dataclass(frozen=True)
class Tombstones:
    """`moments` has the time (ms) up to which a user's events are left out, by the hash of the id."""

    moments: Mapping[str, int]

    @classmethod
    def read(cls, lake: Lake) -> Tombstones:
        """Those of a lake."""
        return TombstoneLog(lake).read()

    def __bool__(self) -> bool:
        return bool(self.moments)

    def covers(self, events: pa.Table, arrived: np.ndarray | None = None) -> np.ndarray:
        """Which events are left out, bool (n,). `events` has the columns `user_id` and `ts`.

        `arrived` int64 (n,), ms, is when each came, where that is known: what came before the moment was done before it,
        whatever the clock of its sender says.
        """
        if not self.moments or not events.num_rows:
            return np.zeros(events.num_rows, bool)
        users = events[USER_ID].combine_chunks().dictionary_encode()
        upto = [self.moments.get(hash_of(user), -1) if user is not None else -1 for user in users.dictionary.to_pylist()]
        limits = np.array([*upto, -1], np.int64)[pc.fill_null(users.indices, len(upto)).to_numpy(zero_copy_only=False)]
        moments = pc.fill_null(events[TS], np.iinfo(np.int64).max).to_numpy()
        found: np.ndarray = (moments if arrived is None else np.minimum(moments, arrived)) <= limits
        return found

    def covers_one(self, user_id: str, ts: int) -> bool:
        """Whether one event is left out."""
        return bool(self.moments) and ts <= self.moments.get(hash_of(user_id), -1)

    def names(self, users: Iterable[str]) -> bool:
        """Whether one of some users was forgotten, at whatever time."""
        return bool(self.moments) and any(hash_of(user) in self.moments for user in users)

    def filtered(self, events: pa.Table, arrived: np.ndarray | None = None) -> pa.Table:
        """The events that are not left out."""
        left_out = self.covers(events, arrived)
        return events.filter(pa.array(~left_out)) if left_out.any() else events


class TombstoneLog:
    """The tombstones of a lake: added one by one, merged into files, read with two listings once they are known."""

    def __init__(self, lake: Lake) -> None:
        self.lake = lake
        self._known = _Known()

    def add(self, user_hash: str, moment: int) -> None:
        """Note a removal. From the return of this call on every reader knows it."""
        write_atomically(self.lake.fs, self._path(NEW, f"{moment:013d}-{user_hash}"), b"")

    def read(self) -> Tombstones:
        """What is forgotten now; the same object as before when nothing was added."""
        return self._read().tombstones

    def merge(self, least: int = MERGE_AT) -> None:
        """Write all that is known into a file once `least` removals are new, remove their names and what is contained."""
        known = self._read()
        if known.tombstones and len(known.new) >= least:
            self._write(known.tombstones.moments)
            for name in known.new:
                self._remove(NEW, name)
        self._drop_contained()

    def _write(self, moments: Mapping[str, int]) -> None:
        table = pa.table([[bytes.fromhex(user) for user in moments], list(moments.values())], schema=MERGED_SCHEMA)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        write_atomically(self.lake.fs, self._path(MERGED, f"{timed_name()}.parquet"), sink.getvalue().to_pybytes())

    def _drop_contained(self) -> None:
        """Remove files whose rows are all in a later one that has been there for KEEP_SECONDS; the last stays in any case."""
        limit = time.time_ns() - KEEP_SECONDS * 10**9
        old = sorted(name for name in self._names(MERGED, _MERGED_NAME) if int(name.split("-")[0], 16) < limit)
        if len(old) < 2:
            return
        with suppress(FileNotFoundError):  # another merge drops them now
            last = dict(self._rows(old[-1]))
            for name in old[:-1]:
                if all(last.get(user, -1) >= moment for user, moment in self._rows(name)):
                    self._remove(MERGED, name)

    def _read(self) -> _Known:
        before = self._known
        new = self._names(NEW, _NEW_NAME)
        files = self._names(MERGED, _MERGED_NAME)
        if (new, files) == (before.new, before.files):
            return before
        try:
            rows = [row for name in files - before.files for row in self._rows(name)]
        except FileNotFoundError:  # a merge dropped it since it was listed
            return self._read()
        merged = _latest(before.merged, rows)
        named = ((name.split("-")[1], int(name.split("-")[0])) for name in new)
        self._known = _Known(new, files, merged, Tombstones(_latest(merged, named)))
        return self._known

    def _rows(self, name: str) -> list[tuple[str, int]]:
        table = pq.read_table(pa.BufferReader(self.lake.fs.cat_file(self._path(MERGED, name))))
        users, moments = table[USER_HASH].to_pylist(), table[FORGOTTEN_AT].to_pylist()
        return [(user.hex(), moment) for user, moment in zip(users, moments, strict=True)]

    def _names(self, folder: str, pattern: re.Pattern[str]) -> frozenset[str]:
        """Names in a folder that are whole: a file that is being written has another."""
        self.lake.fs.invalidate_cache()
        try:
            paths = self.lake.fs.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return frozenset()
        return frozenset(name for path in paths if pattern.match(name := path.rsplit("/", 1)[-1]))

    def _remove(self, folder: str, name: str) -> None:
        with suppress(FileNotFoundError):  # another merge was here first
            self.lake.fs.rm_file(self._path(folder, name))

    def _path(self, *parts: str) -> str:
        return self.lake.path(TOMBSTONES, *parts)


@dataclass(frozen=True)
class _Known:
    """What was listed at the last look, the tombstones of the files, and those of both folders."""

    new: frozenset[str] = frozenset()
    files: frozenset[str] = frozenset()
    merged: Mapping[str, int] = field(default_factory=dict)
    tombstones: Tombstones = field(default_factory=lambda: Tombstones({}))


def _latest(moments: Mapping[str, int], rows: Iterable[tuple[str, int]]) -> dict[str, int]:
    """`moments` with further rows; of a user who was forgotten twice the later moment."""
    found = dict(moments)
    for user, moment in rows:
        found[user] = max(moment, found.get(user, 0))
    return found
