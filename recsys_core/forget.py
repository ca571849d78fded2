"""Everything the platform holds of one user, removed: landing, tables with their older versions, Redis, MLflow; with a proof.

Rows are taken out partition by partition, in a stream, and do not come back (`tombstones`). A partition keeps its data
version, so that what was made from it stays valid: factors, index and verdicts are of the others as well. Models that were
fitted with the user's events are replaced by the next night, whose tables no longer have them.

Removed is what certainly is the user's, by a column or a field (`mentions.Named`). A text in which the id stands as a word is
named in the report and left to people: the word may mean something else, and the text is of others as well.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from recsys_core import progress
from recsys_core.events import USER_ID, now_ms
from recsys_core.heartbeat import read_heartbeats
from recsys_core.lake import STAGING, DamagedPartition, Lake, MissingPartition, Partition, PartitionChanged
from recsys_core.landing import DAMAGED, ENDING, Landing, row_groups
from recsys_core.ledger import LANDING, LEDGER, QUARANTINE, Listing
from recsys_core.masking import masked_text
from recsys_core.mentions import Named
from recsys_core.online import REBUILD_AREAS_KEY, REBUILD_LOCK_KEY, recs_key, user_key
from recsys_core.registry import Registry, RegistryError
from recsys_core.release import ReleaseError, Releases
from recsys_core.stores import files_below
from recsys_core.tombstones import FORGOTTEN_AT, REREAD_SECONDS, TOMBSTONES, USER_HASH, TombstoneLog, hash_of

FORGOTTEN = "forgotten_users"
"""Lake table with the report of each removal, a partition named by its moment and the user's hash."""
READ_SECONDS = 1.0
"""What a worker needs to read the tombstones, once it looks."""
FACTOR_ID = "id"
USER_SIDE = "_users"
"""Tables of user factors end with it and name the user `id`."""
TEXTS = (".json", ".txt", ".csv", ".md", ".html")
NAMELESS = (LANDING, QUARANTINE, LEDGER, TOMBSTONES, FORGOTTEN, DAMAGED)
"""Folders of the lake that are searched in another way, or hold hashes only."""


@dataclass(frozen=True)
class Forgotten:
    """What was found of a user and removed, and what a second search found.

    Attributes:
        user_hash: SHA-256 of the id; the report is kept and must not hold the id itself.
        forgotten_at: ms; events up to this moment are not taken in again (`tombstones`).
        removed: rows (or keys, tags) by place.
        remaining: what the search after the removal found by place; empty is the proof.
        looked_at: how many files, partitions, keys, runs that search went through.
        unsearched: places that could not be searched, and why.
        mentioned: texts in which the id stands as a word that may mean something else.
        outside: places that keep what was sent to them for a time of their own, and for how long.
        releases: releases that were made with the user's events and hold item vectors, which name no user.
        seconds: how long it took.
    """

    user_hash: str
    forgotten_at: int
    removed: dict[str, int]
    remaining: dict[str, int]
    looked_at: dict[str, int] = field(default_factory=dict)
    unsearched: dict[str, str] = field(default_factory=dict)
    mentioned: dict[str, int] = field(default_factory=dict)
    outside: dict[str, str] = field(default_factory=dict)
    releases: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def is_known(self) -> bool:
        """Whether anything of the user was found."""
        return bool(self.removed or self.remaining)


@dataclass(frozen=True)
class Places:
    """Where a user can be found.

    Attributes:
        user_fields: names that sources have for the user's id besides the usual ones.
        unsearched: what may hold the user and can't be searched now, and why.
        outside: see `Forgotten`.
    """

    lake: Lake
    redis: Any
    releases: Releases
    registry: Registry
    user_fields: Collection[str] = ()
    unsearched: Mapping[str, str] = field(default_factory=dict)
    outside: Mapping[str, str] = field(default_factory=dict)


def forget_user(places: Places, user_id: str) -> Forgotten:
    """Remove a user and search again. The report is kept in the lake table `forgotten_users`.

    The tombstone is there before anything is removed: what runs meanwhile does not take the user in again.
    Until the second search is done the partition holds no report, so that a run that was cut off proves nothing.
    A search that found nothing to remove is the proof itself.
    """
    started = time.perf_counter()
    forgotten_at = now_ms()
    user_hash = hash_of(user_id)
    key = f"{forgotten_at:013d}-{user_hash[:16]}"
    tombstones = TombstoneLog(places.lake)
    tombstones.add(user_hash, forgotten_at)
    _wait_for_workers(places.redis)
    places.lake.write_blobs(FORGOTTEN, key, {}, 0, {USER_HASH: user_hash, FORGOTTEN_AT: forgotten_at})
    removed = Search(places, user_id, remove=True).run()
    left = Search(places, user_id).run() if removed.found else removed
    report = Forgotten(
        user_hash=user_hash,
        forgotten_at=forgotten_at,
        removed=dict(removed.found),
        remaining=dict(left.found + left.fixed),
        looked_at=dict(left.looked_at),
        unsearched={**places.unsearched, **left.unsearched},
        mentioned=dict(left.mentioned),
        outside=dict(places.outside),
        releases=list(places.releases.names()),
        seconds=time.perf_counter() - started,
    )
    places.lake.write_blobs(FORGOTTEN, key, {}, removed.found.total(), asdict(report))
    tombstones.merge()
    return report


def _wait_for_workers(redis: Any) -> None:
    """Return when the workers of the speed layer and a rebuild know the tombstone: what is removed before that they might take
    in again. Nobody is at work on a Redis that is away."""
    from redis.exceptions import RedisError, ResponseError

    try:
        at_work = bool(redis.exists(REBUILD_LOCK_KEY) or read_heartbeats(redis))
    except ResponseError:  # what is there can't be read
        at_work = True
    except (RedisError, OSError):
        return
    if at_work:
        time.sleep(REREAD_SECONDS + READ_SECONDS)


class Search:
    """A walk through all places that counts what is the user's and, with `remove`, takes it out.

    Attributes:
        found: rows, keys and tags that are the user's, by place.
        fixed: what is the user's and can't be taken out here: fields of texts, parameters of MLflow runs.
        mentioned: texts in which the id stands as a word.
        looked_at: what was read for it.
        unsearched: places that can't be read, and why.
    """

    def __init__(self, places: Places, user_id: str, remove: bool = False) -> None:
        self.places, self.user_id, self.remove = places, user_id, remove
        self.found: Counter[str] = Counter()
        self.fixed: Counter[str] = Counter()
        self.mentioned: Counter[str] = Counter()
        self.looked_at: Counter[str] = Counter()
        self.unsearched: dict[str, str] = {}
        self._named = Named(user_id, places.user_fields)
        self._landing = Landing(places.lake)

    def run(self) -> Search:
        self._files()
        self._tables()
        self._redis()
        self._releases()
        try:
            self._mlflow()
        except RegistryError as error:
            self.unsearched["MLflow"] = str(error)
        self.found, self.fixed = +self.found, +self.fixed
        return self

    def _read(self, place: str, text: str) -> None:
        """Look at a text that can't be changed."""
        if self._named.in_fields(text):
            self.fixed[place] += 1
        elif self._named.mentioned(text):
            self.mentioned[place] += 1

    # -- files as they arrived ----------------------------------------------------------------------------------

    def _files(self) -> None:
        """Landing and quarantine files: the same names without the user's rows, whether or not the ledger names them. Those
        that come meanwhile are searched as well: they may be others' joined."""
        lake = self.places.lake
        for area in (LANDING, QUARANTINE):
            seen: set[str] = set()
            while new := [path for path in self._paths(lake.path(area)) if path not in seen]:
                listing = self._landing.ledger.read()
                for path in progress.track(new, area, len(new)):
                    if path.lower().endswith(ENDING):
                        self._file(area, path, listing)
                    else:
                        self.unsearched[lake.below(path)] = "it is no Parquet file; look into it and remove it"
                seen.update(new)
            self.looked_at[f"{area} files"] += sum(path.lower().endswith(ENDING) for path in seen)

    def _paths(self, folder: str) -> list[str]:
        lake = self.places.lake
        lake.fs.invalidate_cache()

        def unseen(path: str, error: OSError) -> None:
            self.unsearched[lake.below(path)] = f"{str(error)[:200]}; let it be read"

        return [path for path, _ in files_below(lake.fs, folder, unseen)]

    def _file(self, area: str, path: str, listing: Listing) -> None:
        lake = self.places.lake
        mine = self._mine_of_events if area == LANDING else partial(self._mine_of_rejected, area)
        try:
            with lake.fs.open(path, "rb") as source:
                count = sum(int(pc.sum(mine(rows)).as_py() or 0) for rows in row_groups(pq.ParquetFile(source)))
            if count and self.remove:
                self._landing.take_out(path, mine, listing)
        except FileNotFoundError:  # it was removed since it was listed
            return
        except (pa.ArrowException, OSError, KeyError) as error:
            self.unsearched[lake.below(path)] = f"{str(error)[:200]}; mend or remove it"
            return
        self.found[area] += count

    def _mine_of_events(self, table: pa.Table) -> pa.ChunkedArray:
        return pc.fill_null(pc.equal(table[USER_ID].cast(pa.string()), self.user_id), False)

    def _mine_of_rejected(self, area: str, table: pa.Table) -> pa.Array:
        """Whose field of a user has the id; JSON may have escaped it, and then has a backslash."""
        content = table["content"]
        may = pc.or_(pc.match_substring(content, self.user_id), pc.match_substring(content, "\\"))
        mine = []
        for text in pc.if_else(pc.fill_null(may, False), content, None).to_pylist():
            mine.append(text is not None and self._named.is_of(text))
            if text is not None and not mine[-1] and self._named.mentioned(text):
                self.mentioned[f"{area} (rows that name no user by a field)"] += 1
        return pa.array(mine, pa.bool_())

    # -- tables -------------------------------------------------------------------------------------------------

    def _tables(self) -> None:
        """Every table of the lake whose rows name a user, in every version that is there, and the texts of models."""
        lake = self.places.lake
        lake.fs.invalidate_cache()
        try:
            names = sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in lake.fs.ls(lake.root, detail=False))
        except FileNotFoundError:
            names = []
        tables = [name for name in names if name not in NAMELESS]
        for table in progress.track(tables, "tables", len(tables)):
            for key in lake.folders(table):
                try:
                    self.found[table] += lake.revise(table, key, partial(self._partition, table, key))
                except DamagedPartition as error:
                    self.unsearched[f"{table}/{key}"] = str(error)
            self._staged(table)

    def _partition(self, table: str, key: str, part: Partition | None) -> int:
        """Rows of the user in all versions of a partition; another writer that is faster makes this begin again."""
        try:
            return self._versions(table, key, part)
        except (pa.ArrowException, OSError, MissingPartition) as error:
            if self.places.lake.find(table, key) != part:
                raise PartitionChanged(f"{table}/{key} was replaced while it was read") from error
            self.unsearched[f"{table}/{key}"] = f"{str(error)[:200]}; make the partition again"
            return 0

    def _versions(self, table: str, key: str, part: Partition | None) -> int:
        lake, count = self.places.lake, 0
        kept = (part.version, *part.older) if part else ()
        for version, paths in lake.versions(table, key).items():
            self.looked_at["versions of partitions"] += 1
            if version not in kept:
                self._in_the_making(f"{table}/{key}/{version}", table, paths)
                continue
            dataset, mine = self._rows_of(table, paths)
            if dataset is None or mine is None:
                continue
            found = dataset.count_rows(filter=mine)
            count += found
            if found and self.remove and part and version == part.version:
                others = (b for b in dataset.to_batches(filter=~mine | mine.is_null()) if b.num_rows)
                part = lake.replace_rows(part, others, dataset.schema)
        if part and count and self.remove:
            lake.drop_older(part)
        if part:
            self._texts(part)
        return count

    def _rows_of(self, table: str, paths: list[str]) -> tuple[ds.Dataset | None, ds.Expression | None]:
        """The rows of some files, and which of them are the user's; None where they name no user."""
        dataset = ds.dataset(paths, filesystem=self.places.lake.fs, format="parquet") if paths else None
        column = _user_column(table, dataset.schema.names) if dataset is not None else None
        return dataset, ds.field(column) == self.user_id if column else None

    def _texts(self, part: Partition) -> None:
        lake = self.places.lake
        self._read(f"{part.table} (pointer)", json.dumps(part.extra))
        for name in part.files:
            if name.endswith(TEXTS):
                self.looked_at["texts of partitions"] += 1
                self._read(f"{part.table} (text)", lake.read_blob(part.table, part.key, name).decode(errors="replace"))

    def _staged(self, table: str) -> None:
        lake = self.places.lake
        root = lake.path(table, STAGING)
        paths = self._paths(root)
        folders = {path.removeprefix(f"{root}/").split("/")[0] for path in paths}
        for folder in sorted(folders):
            inside = [p for p in paths if p.startswith(f"{root}/{folder}/") and p.lower().endswith(ENDING)]
            self._in_the_making(f"{table}/{STAGING}/{folder}", table, inside)

    def _in_the_making(self, name: str, table: str, paths: list[str]) -> None:
        """Files that no pointer names: a run writes them now, or broke off."""
        try:
            dataset, mine = self._rows_of(table, [path for path in paths if path.lower().endswith(ENDING)])
            holds = dataset is not None and mine is not None and dataset.count_rows(filter=mine) > 0
        except (pa.ArrowException, OSError):
            holds = True
        if holds:
            self.unsearched[name] = "a run is writing it, or broke off; `recsys prune` removes it when it is a day old"

    # -- Redis, releases, MLflow --------------------------------------------------------------------------------

    def _redis(self) -> None:
        from redis.exceptions import RedisError

        redis = self.places.redis
        keys = [user_key(self.user_id), recs_key(self.user_id)]
        try:
            areas = sorted(area.decode() for area in redis.smembers(REBUILD_AREAS_KEY))
            keys += [user_key(self.user_id, f"{area}user") for area in areas]
            self.found["redis"] += sum(int(redis.exists(key)) for key in keys)
            if self.remove:
                for key in keys:
                    redis.delete(key)
        except (RedisError, OSError) as error:
            self.unsearched["Redis"] = masked_text(f"{type(error).__name__}: {error}")
            return
        self.looked_at["Redis keys"] += len(keys)

    def _releases(self) -> None:
        """Text files of releases that name the user; vectors name nobody."""
        releases = self.places.releases
        for release_id in releases.names():
            try:
                for name in releases.manifest(release_id).files:
                    if name.endswith(TEXTS):
                        content = bytes(releases.fs.cat_file(releases.path(release_id, name)))
                        self._read(f"release {release_id}", content.decode(errors="replace"))
            except (ReleaseError, FileNotFoundError) as error:
                self.unsearched[f"release {release_id}"] = f"{error}; promote another one and remove its folder"
                continue
            self.looked_at["releases"] += 1

    def _mlflow(self) -> None:
        """Runs, deleted ones as well. Tags that name the user are removed; a parameter can't be, its run can be deleted."""
        registry = self.places.registry
        for run in registry.runs():
            self.looked_at["MLflow runs"] += 1
            for name, value in run.data.tags.items():
                if self._named.is_field(name) and value == self.user_id:
                    self.found["MLflow tags"] += 1
                    if self.remove:
                        registry.remove_tag(run, name)
                else:
                    self._read(f"MLflow tags of run {run.info.run_id}", value)
            for name, value in run.data.params.items():
                if self._named.is_field(name) and value == self.user_id:
                    self.fixed[f"MLflow parameters of run {run.info.run_id}"] += 1
                else:
                    self._read(f"MLflow parameters of run {run.info.run_id}", value)
            for path in [path for path in registry.files(run) if path.endswith(TEXTS)]:
                self.looked_at["MLflow files"] += 1
                text = registry.read_file(run, path).decode(errors="replace")
                self._read(f"MLflow file {path} of run {run.info.run_id}", text)


def _user_column(table: str, names: list[str]) -> str | None:
    if USER_ID in names:
        return USER_ID
    return FACTOR_ID if table.endswith(USER_SIDE) and FACTOR_ID in names else None
