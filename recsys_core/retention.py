"""What is older than the policy and may go: landing files, partitions, releases, runs and versions of MLflow.

Never the champion and those to which a rollback returns, nor what they were made from.

`plan` decides and touches nothing; `remove` does what was decided. Ages are those of the data (event times, partition keys)
against its newest event, so that a history that ended long ago and a platform that stood still lose nothing. Files of the
quarantine, which have no time but that of their arrival, are held against the clock, and so is what runs left that broke off.

What is decided is done only while it still holds: a partition or a file that was written again since stays, and so does a
release that became the champion.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Any, Literal

from recsys_core.errors import UserError
from recsys_core.events import DAY_MS, day_key, hour_key
from recsys_core.lake import STAGING, Lake, Partition
from recsys_core.landing import ENDING, Landing, OffsetRange
from recsys_core.ledger import LANDING, LEDGER, QUARANTINE, LandingFile, Listing, is_ours
from recsys_core.registry import PARTITION_TAG, Registry, Version
from recsys_core.release import ChampionServes, Manifest, Pointer, ReleaseError, Releases, StoreAway
from recsys_core.settings import RetentionSettings, Settings
from recsys_core.stores import TEMPORARY, is_local, written_at
from recsys_core.tombstones import TOMBSTONES

if TYPE_CHECKING:
    from mlflow.entities import Run

Kind = Literal["landing", "quarantine", "partition", "release", "leftover"]
AREAS = (LANDING, QUARANTINE)
"""The kinds of removals that the ledger of the landing zone has to know of."""
LEFTOVER_MS = DAY_MS
"""Files that no pointer names are of a run at work; older ones are of a run that broke off."""
_HALF = re.compile(rf"\.[0-9a-f]{{32}}{re.escape(TEMPORARY)}$")
_VERSION = re.compile(r"[0-9a-f]{16}-[0-9a-f]{8}")
_RELEASE = re.compile(r"\d{4}-\d\d-\d\d\.\d{8}T\d{6}\.[0-9a-f]{4}")
HOUR_KEY, DAY_KEY = len("2026-01-31T09"), len("2026-01-31")


@dataclass(frozen=True)
class Removal:
    """Something that may go: a path, a table's partition (`table/key`) or a release, and its size. A leftover is a file.

    `written` is when a file had been written (seconds since 1970) at the time of the decision.
    """

    kind: Kind
    name: str
    bytes: int
    part: Partition | None = None
    written: float = 0.0


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
    listing = landing.ledger.read()
    return [
        *_landing(listing, policy, end_ms),
        *_quarantine(listing, policy, now_ms),
        *_partitions(landing.lake, policy, needed, end_ms),
        *gone,
        *leftovers(landing, releases, now_ms),
    ]


def _landing(listing: Listing, policy: RetentionSettings, end_ms: int) -> Iterator[Removal]:
    """Old files; of the archive of a partition those before its first newer one, so that no gap comes to be.

    The last of an archive, which says where it ends, stays.
    """
    if not policy.landing_days:
        return
    oldest = end_ms - policy.landing_days * DAY_MS
    files = listing.files()
    gone = [file for file in files if OffsetRange.parse(file.path) is None and file.last_ts < oldest]
    for _, archive in groupby(_archived(files), lambda one: one[0].archive):
        ordered = [file for _, file in archive]
        first = list(takewhile(lambda file: file.last_ts < oldest, ordered[:-1]))
        dated = [number for number, file in enumerate(first, 1) if file.rows]
        gone += first[: max(dated, default=0)]
    for file in sorted(gone, key=lambda file: file.path):
        yield Removal("landing", file.path, file.bytes, written=file.arrived / 1000)


def _archived(files: Iterable[LandingFile]) -> list[tuple[OffsetRange, LandingFile]]:
    """The archive files among some, in the order of their offsets."""
    found = ((OffsetRange.parse(file.path), file) for file in files)
    return sorted(((one, file) for one, file in found if one), key=lambda pair: pair[0])


def _quarantine(listing: Listing, policy: RetentionSettings, now_ms: int) -> Iterator[Removal]:
    if policy.quarantine_days:
        for file in listing.files(QUARANTINE):
            if file.arrived < now_ms - policy.quarantine_days * DAY_MS:
                yield Removal("quarantine", file.path, file.bytes, written=file.arrived / 1000)


def _partitions(lake: Lake, policy: RetentionSettings, needed: set[str], end_ms: int) -> Iterator[Removal]:
    """The newest partition of a table stays whatever its age: a platform that stood still goes on where it was."""
    for table in tables(lake):
        for key in lake.keys(table)[:-1]:
            if not is_kept(key, policy, end_ms) and key not in needed and (part := lake.find(table, key)):
                yield Removal("partition", f"{table}/{key}", part.bytes, part)


def tables(lake: Lake) -> list[str]:
    """The tables of a lake."""
    lake.fs.invalidate_cache()
    if not lake.fs.exists(lake.root):
        return []
    names = (os.path.basename(e["name"].rstrip("/")) for e in lake.fs.ls(lake.root, detail=True) if e["type"] == "directory")
    return sorted(name for name in names if name not in (LANDING, QUARANTINE, LEDGER, TOMBSTONES, STAGING))


def leftovers(landing: Landing, releases: Releases, now_ms: int) -> Iterator[Removal]:
    """Files of runs that broke off: half-written ones, staged folders, landing files, versions and releases that nothing
    names."""
    yield from _left_by(_uncommitted(landing), now_ms)
    yield from _left_by(_unnamed(landing.lake), now_ms)
    yield from _left_by(_unreleased(releases), now_ms)


Files = dict[str, dict[str, Any]]
"""Files by path as the store lists them."""


def _left_by(groups: Iterable[Files], now_ms: int) -> Iterator[Removal]:
    """The files of those groups of which none was written within a day."""
    for files in groups:
        if all(written_at(entry) * 1000 < now_ms - LEFTOVER_MS for entry in files.values()):
            for path, entry in sorted(files.items()):
                yield Removal("leftover", path, int(entry["size"]), written=written_at(entry))


def _uncommitted(landing: Landing) -> Iterator[Files]:
    """Files with names that we give which no commit names, nor did until they were taken out; and parts of the ledger that its
    head does not name."""
    lake, parts = landing.lake, landing.ledger.parts()
    found = {area: _find(lake.fs, lake.path(area)) for area in (LANDING, QUARANTINE, LEDGER)}
    listing = landing.ledger.read()  # after the files: what was written since is in neither
    known = set(listing.table["path"].to_pylist()) | set(listing.gone["path"].to_pylist())
    for area in (LANDING, QUARANTINE):
        for path, entry in found[area].items():
            if is_ours(lake.below(path).partition("/")[2]) and lake.below(path) not in known:
                yield {path: entry}
    yield from ({path: entry} for path, entry in found[LEDGER].items() if path.endswith(ENDING) and path not in parts)


def _unnamed(lake: Lake) -> Iterator[Files]:
    """Files of the lake that no pointer names, those of a version in one group. What is not ours by its name is left alone."""
    lake.fs.invalidate_cache()
    for area in (LANDING, QUARANTINE, LEDGER, TOMBSTONES):
        yield from _half_written(_find(lake.fs, lake.path(area)))
    for table in tables(lake):
        root = lake.path(table)
        found = _find(lake.fs, root)
        yield from _half_written(found)
        versions: dict[tuple[str, str], Files] = defaultdict(dict)
        for path, entry in found.items():
            key, version, *inside = [*path.removeprefix(f"{root}/").split("/"), ""][:3]
            if inside and _VERSION.fullmatch(version):
                versions[key, version][path] = entry
        parts = lake.find_all(table, sorted({key for key, _ in versions} - {STAGING}))
        named = {(part.key, version) for part in parts.values() for version in (part.version, *part.older)}
        yield from (files for version, files in versions.items() if version not in named)


def _unreleased(releases: Releases) -> Iterator[Files]:
    """Files of releases without a manifest, and half-written ones."""
    releases.fs.invalidate_cache()
    there = {*releases.names(), *releases.removing()}
    found = _find(releases.fs, releases.root)
    yield from _half_written(found)
    groups: dict[str, Files] = defaultdict(dict)
    for path, entry in found.items():
        folder, _, name = path.removeprefix(f"{releases.root}/").partition("/")
        if name and folder not in there and _RELEASE.fullmatch(folder):
            groups[folder][path] = entry
    yield from groups.values()


def _half_written(found: Files) -> Iterator[Files]:
    yield from ({path: entry} for path, entry in found.items() if _HALF.search(path))


def _find(fs: Any, root: str) -> Files:
    found: Files = fs.find(root, detail=True) if fs.exists(root) else {}
    return found


def _releases(releases: Releases, policy: RetentionSettings) -> tuple[list[Manifest], list[Removal]]:
    """The manifests that stay, and the releases that may go: all but the newest, the champion and those before it.

    Earlier champions count among those that are still there, so that as many stay for a rollback as the policy says. A removal
    that broke off is ended in any case. A release whose manifest can't be read stays, and keeps nothing; the check
    `releases_are_whole` names it. Raises ReleaseError when it is the champion.
    """
    champion = releases.champion()
    made = _manifests(releases, champion)
    whole = {manifest.release_id for manifest in made}
    earlier = [name for name in champion.previous if name in whole] if champion else []
    names = {champion.release_id, *earlier[: policy.champions]} if champion else set()
    names |= {manifest.release_id for manifest in made[-policy.releases :]}
    begun = set(releases.removing())
    gone = [m for m in made if m.release_id in begun or (policy.releases and m.release_id not in names)]
    broken_off = [Removal("release", name, 0) for name in sorted(begun - whole)]
    removals = broken_off + [Removal("release", m.release_id, sum(int(f["bytes"]) for f in m.files.values())) for m in gone]
    return [m for m in made if m not in gone], removals


def _manifests(releases: Releases, champion: Pointer | None) -> list[Manifest]:
    """The manifests that can be read, oldest first. Raises StoreAway, and ReleaseError for that of the champion."""
    found = []
    for name in releases.names():
        try:
            found.append(releases.manifest(name))
        except StoreAway:
            raise
        except ReleaseError:
            if champion is not None and champion.release_id == name:
                raise
    return sorted(found, key=lambda manifest: manifest.created_at)


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


def remove(landing: Landing, releases: Releases, removals: Iterable[Removal]) -> list[Removal]:
    """Remove what `plan` named and what may still go. Returns what went.

    The pointer of a partition, the manifest of a release go first: no reader finds a half.
    """
    landing.lake.fs.invalidate_cache()
    planned = list(removals)
    gone = _remove_files(landing, [removal for removal in planned if removal.kind in AREAS])
    gone += [r for r in planned if r.kind not in AREAS and _remove(landing.lake, releases, r)]
    _drop_empty_folders(landing.lake.fs, gone)
    landing.lake.fs.invalidate_cache()
    return gone


def _remove_files(landing: Landing, removals: Sequence[Removal]) -> list[Removal]:
    """Take landing and quarantine files out that are still those of the plan, all of them with one commit."""
    listing = landing.ledger.read()
    arrived = dict(zip(listing.table["path"].to_pylist(), listing.table["arrived"].to_pylist(), strict=True))
    gone = [r for r in removals if arrived.get(landing.lake.below(r.name)) == round(r.written * 1000)]
    landing.commit((), [removal.name for removal in gone])
    return gone


def _remove(lake: Lake, releases: Releases, removal: Removal) -> bool:
    if removal.kind == "partition":
        return removal.part is not None and lake.remove(removal.part)
    if removal.kind == "release":
        try:
            releases.remove(removal.name)
        except ChampionServes:
            return False
        return True
    fs = releases.fs if removal.name.startswith(f"{releases.root}/") else lake.fs
    with suppress(FileNotFoundError):  # its writer took it back
        if removal.written and written_at(fs.info(removal.name)) != removal.written:
            return False
        fs.rm_file(removal.name)
    return True


def _drop_empty_folders(fs: Any, gone: Iterable[Removal]) -> None:
    """Folders of leftovers, and those around them; only a disk has such."""
    inner = {os.path.dirname(removal.name) for removal in gone if removal.kind == "leftover"}
    for folder in (*inner, *{os.path.dirname(folder) for folder in inner}) if is_local(fs) else ():
        with suppress(OSError):  # something else is in it
            os.rmdir(folder)


def totals(removals: Sequence[Removal]) -> dict[Kind, tuple[int, int]]:
    """Count and bytes by kind."""
    found: dict[Kind, tuple[int, int]] = {}
    for removal in removals:
        count, size = found.get(removal.kind, (0, 0))
        found[removal.kind] = (count + 1, size + removal.bytes)
    return found
