"""Everything the platform holds of one user, removed: landing, tables with their older versions, Redis, MLflow; with a proof.

Rows are taken out partition by partition, in a stream, and do not come back (`tombstones`). A partition keeps its data
version, so that what was made from it stays valid: factors, index and verdicts are of the others as well. Models that were
fitted with the user's events are replaced by the next night, whose tables no longer have them.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from recsys_core import progress
from recsys_core.events import USER_ID, now_ms
from recsys_core.lake import Lake, Partition
from recsys_core.landing import LANDING, QUARANTINE, Landing
from recsys_core.online import recs_key, user_key
from recsys_core.registry import Registry, RegistryError
from recsys_core.release import Releases
from recsys_core.tombstones import FORGOTTEN_AT, TOMBSTONES, USER_HASH, TombstoneLog, hash_of

FORGOTTEN = "forgotten_users"
"""Lake table with the report of each removal, a partition named by its moment and the user's hash."""
FACTOR_ID = "id"
USER_SIDE = "_users"
"""Tables of user factors end with it and name the user `id`."""
TEXTS = (".json", ".txt", ".csv", ".md", ".html")


@dataclass(frozen=True)
class Forgotten:
    """What was found of a user and removed, and what a second search found.

    Attributes:
        user_hash: SHA-256 of the id; the report is kept and must not hold the id itself.
        forgotten_at: ms; events up to this moment are not taken in again (`tombstones`).
        removed: rows (or keys, tags, files) by place.
        remaining: what the search after the removal found by place; empty is the proof.
        looked_at: how many files, partitions, keys, runs that search went through.
        unsearched: places that could not be searched, and why.
        releases: releases that were made with the user's events and hold item vectors, which name no user.
        seconds: how long it took.
    """

    user_hash: str
    forgotten_at: int
    removed: dict[str, int]
    remaining: dict[str, int]
    looked_at: dict[str, int] = field(default_factory=dict)
    unsearched: dict[str, str] = field(default_factory=dict)
    releases: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Places:
    """Where a user can be found."""

    lake: Lake
    redis: Any
    releases: Releases
    registry: Registry


def forget_user(places: Places, user_id: str) -> Forgotten:
    """Remove a user and search again. The report is kept in the lake table `forgotten_users`.

    The tombstone is there before anything is removed: what runs meanwhile does not take the user in again.
    Until the second search is done the partition holds no report, so that a run that was cut off proves nothing.
    """
    started = time.perf_counter()
    forgotten_at = now_ms()
    user_hash = hash_of(user_id)
    key = f"{forgotten_at:013d}-{user_hash[:16]}"
    tombstones = TombstoneLog(places.lake)
    tombstones.add(user_hash, forgotten_at)
    places.lake.write_blobs(FORGOTTEN, key, {}, 0, {USER_HASH: user_hash, FORGOTTEN_AT: forgotten_at})
    removed = Search(places, user_id, remove=True).run()
    left = Search(places, user_id).run()
    report = Forgotten(
        user_hash=user_hash,
        forgotten_at=forgotten_at,
        removed=dict(removed.found),
        remaining=dict(left.found),
        looked_at=dict(left.looked_at),
        unsearched=left.unsearched,
        releases=[manifest.release_id for manifest in places.releases.list()],
        seconds=time.perf_counter() - started,
    )
    places.lake.write_blobs(FORGOTTEN, key, {}, removed.found.total(), asdict(report))
    tombstones.merge()
    return report


class Search:
    """A walk through all places that counts what names the user and, with `remove`, takes it out.

    What can't be changed is only found: texts of models and releases, parameters of MLflow runs. They are counted when nothing
    is removed.

    Attributes:
        found: rows, keys, tags and files that name the user, by place.
        looked_at: what was read for it.
        unsearched: places that can't be reached, and why.
    """

    def __init__(self, places: Places, user_id: str, remove: bool = False) -> None:
        self.places, self.user_id, self.remove = places, user_id, remove
        self.found: Counter[str] = Counter()
        self.looked_at: Counter[str] = Counter()
        self.unsearched: dict[str, str] = {}
        self._named = _pattern(user_id)
        self._named_bytes = re.compile(self._named.encode())

    def run(self) -> Search:
        self._files()
        self._tables()
        self._redis()
        self._releases()
        try:
            self._mlflow()
        except RegistryError as error:
            self.unsearched["MLflow"] = str(error)
        self.found = +self.found
        return self

    def _names(self, text: bytes) -> bool:
        return self._named_bytes.search(text) is not None

    # -- files as they arrived ----------------------------------------------------------------------------------

    def _files(self) -> None:
        """Landing and quarantine files: the same names without the user's rows. A local file keeps its time of arrival."""
        lake = self.places.lake
        for area in (LANDING, QUARANTINE):
            root = lake.path(area)
            paths = [p for p in sorted(lake.fs.find(root)) if p.endswith(".parquet")] if lake.fs.exists(root) else []
            for path in progress.track(paths, area, len(paths)):
                with lake.fs.open(path, "rb") as source:
                    table = pq.read_table(source)
                if area == LANDING:
                    mine = pc.fill_null(pc.equal(table[USER_ID], self.user_id), False)
                else:
                    mine = pc.fill_null(pc.match_substring_regex(table["content"], self._named), False)
                count = int(pc.sum(mine).as_py() or 0)
                if count and self.remove:
                    _rewrite(lake, path, table.filter(pc.invert(mine)))
                self.found[area] += count
            self.looked_at[f"{area} files"] += len(paths)

    # -- tables -------------------------------------------------------------------------------------------------

    def _tables(self) -> None:
        """Every table of the lake whose rows name a user, in every version that is kept, and the texts of models."""
        lake = self.places.lake
        lake.fs.invalidate_cache()
        names = sorted(e.rstrip("/").rsplit("/", 1)[-1] for e in lake.fs.ls(lake.root, detail=False)) if _exists(lake) else []
        # Tombstones and reports hold hashes, and there is one for each removal.
        tables = [name for name in names if name not in (LANDING, QUARANTINE, TOMBSTONES, FORGOTTEN)]
        for table in progress.track(tables, "tables", len(tables)):
            for part in lake.find_all(table, lake.keys(table)).values():
                self.found[table] += self._partition(part)
                texts = [name for name in part.files if name.endswith(TEXTS)]
                if not self.remove:
                    named = sum(self._names(lake.read_blob(part.table, part.key, name)) for name in texts)
                    self.found[f"{table} (text)"] += named
                self.looked_at["texts of partitions"] += len(texts)

    def _partition(self, part: Partition) -> int:
        lake, count = self.places.lake, 0
        for version, paths in lake.versions(part.table, part.key).items():
            self.looked_at["versions of partitions"] += 1
            dataset = ds.dataset(paths, filesystem=lake.fs, format="parquet") if paths else None
            column = _user_column(part.table, dataset.schema.names) if dataset is not None else None
            if dataset is None or column is None:
                continue
            mine = ds.field(column) == self.user_id
            found = dataset.count_rows(filter=mine)
            count += found
            if found and self.remove and version == part.version:
                others = (b for b in dataset.to_batches(filter=~mine | ds.field(column).is_null()) if b.num_rows)
                lake.replace_rows(part, others, dataset.schema)
        if count and self.remove:
            lake.drop_older(part.table, part.key)
        return count

    # -- Redis, releases, MLflow --------------------------------------------------------------------------------

    def _redis(self) -> None:
        redis = self.places.redis
        keys = [user_key(self.user_id), recs_key(self.user_id)]
        self.found["redis"] += sum(int(redis.exists(key)) for key in keys)
        self.looked_at["Redis keys"] += len(keys)
        if self.remove:
            for key in keys:
                redis.delete(key)

    def _releases(self) -> None:
        """Text files of releases that name the user; vectors name nobody."""
        releases = self.places.releases
        for manifest in releases.list():
            texts = [name for name in manifest.files if name.endswith(TEXTS)]
            self.looked_at["releases"] += 1
            if not self.remove:
                contents = (releases.fs.cat_file(releases.path(manifest.release_id, name)) for name in texts)
                self.found[f"release {manifest.release_id}"] += sum(self._names(content) for content in contents)

    def _mlflow(self) -> None:
        """Runs, deleted ones as well: tags and text files are removed; a parameter can't be changed, its run can be deleted."""
        registry = self.places.registry
        for run in registry.runs():
            self.looked_at["MLflow runs"] += 1
            for name, value in run.data.tags.items():
                if self._names(f"{name} {value}".encode()):
                    self.found["MLflow tags"] += 1
                    if self.remove:
                        registry.remove_tag(run, name)
            if not self.remove:
                named = [name for name, value in run.data.params.items() if self._names(f"{name} {value}".encode())]
                self.found[f"MLflow parameters of run {run.info.run_id}"] += len(named)
            for path in [path for path in registry.files(run) if path.endswith(TEXTS)]:
                self.looked_at["MLflow files"] += 1
                if self._names(registry.read_file(run, path)):
                    self.found["MLflow files"] += 1
                    if self.remove:
                        registry.remove_files(run, path)


def _pattern(user_id: str) -> str:
    """A pattern that finds the id in a text, and not as a part of a longer one."""
    return rf"(?:^|[^A-Za-z0-9_-]){re.escape(user_id)}(?:$|[^A-Za-z0-9_-])"


def _rewrite(lake: Lake, path: str, kept: pa.Table) -> None:
    arrived = os.stat(path) if os.path.exists(path) else None
    Landing(lake).remove_rows(path, kept)
    if arrived:
        os.utime(path, ns=(arrived.st_atime_ns, arrived.st_mtime_ns))


def _exists(lake: Lake) -> bool:
    return bool(lake.fs.exists(lake.root))


def _user_column(table: str, names: list[str]) -> str | None:
    if USER_ID in names:
        return USER_ID
    return FACTOR_ID if table.endswith(USER_SIDE) and FACTOR_ID in names else None
