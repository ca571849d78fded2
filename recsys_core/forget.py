"""Everything the platform holds of one user, removed: landing, tables with their older versions, Redis; with a proof.

Rows are taken out partition by partition, in a stream. A partition keeps its data version, so that what was made from it
stays valid: factors, index and verdicts are of the others as well. Models that were fitted with the user's events are
replaced by the next night, whose tables no longer have them.
"""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from recsys_core import progress
from recsys_core.events import USER_ID
from recsys_core.lake import Lake, Partition, write_atomically
from recsys_core.landing import LANDING, QUARANTINE
from recsys_core.online import recs_key, user_key
from recsys_core.release import Releases

FORGOTTEN = "forgotten_users"
FACTOR_ID = "id"
USER_SIDE = "_users"
"""Tables of user factors end with it and name the user `id`."""


@dataclass(frozen=True)
class Forgotten:
    """What was found of a user and removed, and what a second search found.

    Attributes:
        user_hash: BLAKE2b of the id; the report is kept and must not hold the id itself.
        removed: rows (or keys) by place.
        remaining: what the search after the removal found by place; empty is the proof.
        releases: releases that were made with the user's events and hold item vectors, which name no user.
        seconds: how long it took.
    """

    user_hash: str
    removed: dict[str, int]
    remaining: dict[str, int]
    releases: list[str] = field(default_factory=list)
    seconds: float = 0.0


def forget_user(lake: Lake, redis: Any, releases: Releases, user_id: str) -> Forgotten:
    """Remove a user and search again. The report is kept in the lake table `forgotten_users`."""
    started = time.perf_counter()
    removed = {
        **_places(_clean_files(lake, user_id, remove=True)),
        **{place: n for place, n in _places(_clean_tables(lake, user_id, remove=True)).items() if "(text)" not in place},
        **_clean_redis(redis, user_id, remove=True),
    }
    remaining = search_user(lake, redis, releases, user_id)
    report = Forgotten(
        user_hash=hash_of(user_id),
        removed=removed,
        remaining=remaining,
        releases=[manifest.release_id for manifest in releases.list()],
        seconds=time.perf_counter() - started,
    )
    lake.write_blobs(FORGOTTEN, f"{time.time_ns():016x}", {}, sum(removed.values()), asdict(report))
    return report


def search_user(lake: Lake, redis: Any, releases: Releases, user_id: str) -> dict[str, int]:
    """Rows and keys that name the user, by place: landing, quarantine, tables with all their versions, Redis, releases."""
    return {
        **_places(_clean_files(lake, user_id, remove=False)),
        **_places(_clean_tables(lake, user_id, remove=False)),
        **_clean_redis(redis, user_id, remove=False),
        **_places(_in_releases(releases, user_id)),
    }


def hash_of(user_id: str) -> str:
    """A user's id as reports name it."""
    return blake2b(user_id.encode(), digest_size=16).hexdigest()


def _places(found: Iterator[tuple[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for place, count in found:
        if count:
            total[place] = total.get(place, 0) + count
    return total


# -- files as they arrived --------------------------------------------------------------------------------------


def _clean_files(lake: Lake, user_id: str, remove: bool) -> Iterator[tuple[str, int]]:
    """Landing and quarantine files: the same names without the user's rows. A local file keeps its time of arrival."""
    named = _named(user_id)
    for area in (LANDING, QUARANTINE):
        root = lake.path(area)
        paths = [p for p in sorted(lake.fs.find(root)) if p.endswith(".parquet")] if lake.fs.exists(root) else []
        for path in progress.track(paths, area, len(paths)):
            with lake.fs.open(path, "rb") as source:
                table = pq.read_table(source)
            if area == LANDING:
                mine = pc.fill_null(pc.equal(table[USER_ID], user_id), False)
            else:
                mine = pc.fill_null(pc.match_substring_regex(table["content"], named), False)
            count = int(pc.sum(mine).as_py() or 0)
            if count and remove:
                _rewrite(lake, path, table.filter(pc.invert(mine)))
            yield area, count


def _rewrite(lake: Lake, path: str, table: pa.Table) -> None:
    arrived = os.stat(path) if os.path.exists(path) else None
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd", row_group_size=131_072)
    write_atomically(lake.fs, path, out.getvalue())
    if arrived:
        os.utime(path, ns=(arrived.st_atime_ns, arrived.st_mtime_ns))


def _named(user_id: str) -> str:
    """A pattern that finds the id in a row's text, and not as a part of a longer one."""
    return rf"(?:^|[^A-Za-z0-9_-]){re.escape(user_id)}(?:$|[^A-Za-z0-9_-])"


# -- tables -----------------------------------------------------------------------------------------------------


def _clean_tables(lake: Lake, user_id: str, remove: bool) -> Iterator[tuple[str, int]]:
    """Every table of the lake whose rows name a user, in every version that is kept."""
    lake.fs.invalidate_cache()
    tables = sorted(e.rstrip("/").rsplit("/", 1)[-1] for e in lake.fs.ls(lake.root, detail=False)) if _exists(lake) else []
    for table in progress.track([t for t in tables if t not in (LANDING, QUARANTINE)], "tables", len(tables)):
        for part in lake.find_all(table, lake.keys(table)).values():
            yield table, _clean_partition(lake, part, user_id, remove)
            yield f"{table} (text)", _in_texts(lake, part, user_id)


def _exists(lake: Lake) -> bool:
    return bool(lake.fs.exists(lake.root))


def _user_column(table: str, names: list[str]) -> str | None:
    if USER_ID in names:
        return USER_ID
    return FACTOR_ID if table.endswith(USER_SIDE) and FACTOR_ID in names else None


def _in_texts(lake: Lake, part: Partition, user_id: str) -> int:
    """Files of a partition that are text and name the user; they belong to a model and go with its next partition."""
    named = re.compile(_named(user_id).encode())
    texts = [name for name in part.files if name.endswith((".json", ".txt"))]
    return sum(named.search(lake.read_blob(part.table, part.key, name)) is not None for name in texts)


def _clean_partition(lake: Lake, part: Partition, user_id: str, remove: bool) -> int:
    count = 0
    for version, paths in lake.versions(part.table, part.key).items():
        dataset = ds.dataset(paths, filesystem=lake.fs, format="parquet") if paths else None
        column = _user_column(part.table, dataset.schema.names) if dataset is not None else None
        if dataset is None or column is None:
            continue
        mine = ds.field(column) == user_id
        found = dataset.count_rows(filter=mine)
        count += found
        if found and remove and version == part.version:
            others = (b for b in dataset.to_batches(filter=~mine | ds.field(column).is_null()) if b.num_rows)
            lake.replace_rows(part, others, dataset.schema)
    if count and remove:
        lake.drop_older(part.table, part.key)
    return count


# -- Redis and releases -----------------------------------------------------------------------------------------


def _clean_redis(redis: Any, user_id: str, remove: bool) -> dict[str, int]:
    keys = [user_key(user_id), recs_key(user_id)]
    found = sum(int(redis.exists(key)) for key in keys)
    if remove:
        for key in keys:
            redis.delete(key)
    return {"redis": found} if found else {}


def _in_releases(releases: Releases, user_id: str) -> Iterator[tuple[str, int]]:
    """Text files of releases that name the user; vectors name nobody."""
    named = re.compile(_named(user_id).encode())
    for manifest in releases.list():
        for name in manifest.files:
            if name.endswith((".json", ".txt", ".csv")):
                found = named.search(releases.fs.cat_file(releases.path(manifest.release_id, name)))
                yield f"release {manifest.release_id}", int(found is not None)
