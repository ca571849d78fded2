"""What is older than the policy and may go: landing files, partitions, releases, runs and versions of MLflow.

Never the champion and those to which a rollback returns, nor what they were made from.

`plan` decides and touches nothing; `remove` does what was decided. Ages are those of the data (event times, partition keys)
against its newest event, so that a history that ended long ago and a platform that stood still lose nothing. Only files of the
quarantine, which have no time but that of their writing, are held against the clock.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from recsys_core.errors import UserError
from recsys_core.events import DAY_MS, day_key, hour_key
from recsys_core.lake import POINTER, STAGING, Lake
from recsys_core.landing import LANDING, QUARANTINE, Landing
from recsys_core.registry import PARTITION_TAG, Registry, Version
from recsys_core.release import Manifest, Releases
from recsys_core.settings import RetentionSettings, Settings
from recsys_core.tombstones import TOMBSTONES

if TYPE_CHECKING:
    from mlflow.entities import Run

Kind = Literal["landing", "quarantine", "partition", "release"]
HOUR_KEY, DAY_KEY = len("2026-01-31T09"), len("2026-01-31")


@dataclass(frozen=True)
class Removal:
    """Something that may go: a path, a table's partition (`table/key`) or a release, and its size."""

    kind: Kind
    name: str
    bytes: int


class UnsafePolicy(UserError, ValueError):
    """The policy would remove what the next runs read."""


def check_policy(settings: Settings) -> None:
    """Raises UnsafePolicy when what a model's window still reads would go."""
    policy, window = settings.retention, settings.interactions.window_days
    for name, days in {"landing_days": policy.landing_days, "hourly_days": policy.hourly_days}.items():
        if 0 < days <= window + 1:
            raise UnsafePolicy(f"retention.{name} = {days}: a model reads {window} days back, keep more than {window + 1}")


def is_kept(key: str, policy: RetentionSettings, end_ms: int) -> bool:
    """Whether the policy keeps a partition by its key. A key that is neither an hour nor a day is kept."""
    days = {HOUR_KEY: policy.hourly_days, DAY_KEY: policy.daily_days}.get(len(key), 0)
    return not days or key >= oldest_key(len(key), days, end_ms)


def oldest_key(length: int, days: int, end_ms: int) -> str:
    """The first hour or day of the `days` days before a moment."""
    start = end_ms - days * DAY_MS
    return hour_key(start) if length == HOUR_KEY else day_key(start)


def data_end(landing: Landing, now_ms: int) -> int:
    """The moment (ms) from which ages are counted: the newest event's, and not later than the clock."""
    extent = landing.extent()
    return min(now_ms, extent[1]) if extent else now_ms


def plan(landing: Landing, releases: Releases, settings: Settings, now_ms: int) -> list[Removal]:
    """All that the policy lets go when the clock says `now_ms`. Raises UnsafePolicy, ReleaseError."""
    check_policy(settings)
    end_ms = data_end(landing, now_ms)
    policy = settings.retention
    kept, gone = _releases(releases, policy)
    needed = {source["partition"] for manifest in kept for source in manifest.sources.values()}
    return [
        *_landing(landing, policy, end_ms),
        *_quarantine(landing.lake, policy, now_ms),
        *_partitions(landing.lake, policy, needed, end_ms),
        *gone,
    ]


def _landing(landing: Landing, policy: RetentionSettings, end_ms: int) -> Iterator[Removal]:
    if policy.landing_days:
        for file in landing.files():
            if file.last_ts < end_ms - policy.landing_days * DAY_MS:
                yield Removal("landing", file.path, file.bytes)


def _quarantine(lake: Lake, policy: RetentionSettings, now_ms: int) -> Iterator[Removal]:
    if policy.quarantine_days:
        for path, entry in sorted(lake.fs.find(lake.path(QUARANTINE), detail=True).items()):
            if _written_ms(entry) < now_ms - policy.quarantine_days * DAY_MS:
                yield Removal("quarantine", path, int(entry["size"]))


def _written_ms(entry: dict[str, Any]) -> int:
    """When a file was written, by what its store calls that."""
    written = next(entry[name] for name in ("mtime", "LastModified", "last_modified", "created") if name in entry)
    return int(written.timestamp() * 1000 if isinstance(written, datetime) else written * 1000)


def _partitions(lake: Lake, policy: RetentionSettings, needed: set[str], end_ms: int) -> Iterator[Removal]:
    """The newest partition of a table stays whatever its age: a platform that stood still goes on where it was."""
    for table in tables(lake):
        for key in lake.keys(table)[:-1]:
            if not is_kept(key, policy, end_ms) and key not in needed:
                yield Removal("partition", f"{table}/{key}", lake.get(table, key).bytes)


def tables(lake: Lake) -> list[str]:
    """The tables of a lake."""
    lake.fs.invalidate_cache()
    if not lake.fs.exists(lake.root):
        return []
    names = (os.path.basename(e["name"].rstrip("/")) for e in lake.fs.ls(lake.root, detail=True) if e["type"] == "directory")
    return sorted(name for name in names if name not in (LANDING, QUARANTINE, TOMBSTONES, STAGING))


def _releases(releases: Releases, policy: RetentionSettings) -> tuple[list[Manifest], list[Removal]]:
    """The manifests that stay, and the releases that may go: all but the newest, the champion and those before it.

    Earlier champions count among those that are still there, so that as many stay for a rollback as the policy says.
    """
    made = releases.list()
    champion = releases.champion()
    whole = {manifest.release_id for manifest in made}
    earlier = [name for name in champion.previous if name in whole] if champion else []
    names = {champion.release_id, *earlier[: policy.champions]} if champion else set()
    names |= {manifest.release_id for manifest in made[-policy.releases :]}
    gone = [m for m in made if policy.releases and m.release_id not in names]
    removals = [Removal("release", m.release_id, sum(int(f["bytes"]) for f in m.files.values())) for m in gone]
    return [m for m in made if m not in gone], removals


def spent_runs_of_mlflow(registry: Registry, releases: Releases, settings: Settings, end_ms: int) -> list[Run]:
    """Ended runs of days that the policy doesn't keep and that no kept release was made from. Raises RegistryError."""
    kept, _ = _releases(releases, settings.retention)
    needed = {source["partition"] for manifest in kept for source in manifest.sources.values()} | {m.day for m in kept}
    return [
        run
        for run in registry.runs()
        if run.info.status != "RUNNING"
        and run.info.lifecycle_stage == "active"
        and (day := run.data.tags.get(PARTITION_TAG))
        and day not in needed
        and not is_kept(day, settings.retention, end_ms)
    ]


def spent_versions(registry: Registry, releases: Releases) -> list[Version]:
    """Versions of the registered model whose release is gone and that no alias names. Raises RegistryError."""
    there = set(releases.names())
    return [v for v in (registry.versions() if registry.exists() else ()) if v.release_id not in there and not v.aliases]


def prune_mlflow(registry: Registry, releases: Releases, settings: Settings, end_ms: int) -> dict[str, int]:
    """Remove spent runs with their files, and spent versions. Returns their numbers. Raises RegistryError.

    MLflow keeps the row of a deleted run until `mlflow gc`; its files, which are what takes place, go at once.
    """
    runs = spent_runs_of_mlflow(registry, releases, settings, end_ms)
    versions = spent_versions(registry, releases)
    for version in versions:
        registry.remove_version(version)
    for run in runs:
        registry.remove_run(run)
    return {"runs of MLflow": len(runs), "versions of MLflow": len(versions)}


def remove(landing: Landing, releases: Releases, removals: Iterable[Removal]) -> None:
    """Remove what `plan` named. The pointer of a partition, the manifest of a release go first: no reader finds a half."""
    lake = landing.lake
    for removal in removals:
        if removal.kind == "partition":
            folder = lake.path(removal.name)
            lake.fs.rm_file(f"{folder}/{POINTER}")
            lake.fs.rm(folder, recursive=True)
        elif removal.kind == "release":
            releases.remove(removal.name)
        else:
            lake.fs.rm_file(removal.name)
    lake.fs.invalidate_cache()


def totals(removals: Sequence[Removal]) -> dict[Kind, tuple[int, int]]:
    """Count and bytes by kind."""
    found: dict[Kind, tuple[int, int]] = {}
    for removal in removals:
        count, size = found.get(removal.kind, (0, 0))
        found[removal.kind] = (count + 1, size + removal.bytes)
    return found
