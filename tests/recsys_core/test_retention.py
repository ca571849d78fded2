"""Retention: what is old goes, and nothing that is still read or served does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from builders import event, event_table, ms
from snapshots import make_manifest, make_snapshot

from recsys_core.events import DAY_MS, EVENT_SCHEMA
from recsys_core.lake import Lake, MissingPartition
from recsys_core.landing import ARCHIVE_SCHEMA, QUARANTINE_SCHEMA, Landing, OffsetRange, offset_faults
from recsys_core.registry import PARTITION_TAG, Registry
from recsys_core.release import Manifest, ReleaseError, Releases, StoreAway
from recsys_core.retention import (
    Removal,
    UnsafePolicy,
    plan,
    prune_mlflow,
    remove,
    spent_runs_of_mlflow,
    totals,
)
from recsys_core.settings import RetentionSettings, Settings

NOW = "2026-06-01"
ROWS = pa.table({"n": [1, 2]})


@pytest.fixture
def landing(lake: Lake) -> Landing:
    """A landing zone whose newest event is of now."""
    found = Landing(lake)
    arrive(found, "new", NOW)
    return found


@pytest.fixture
def releases(tmp_path: Path) -> Releases:
    return Releases(str(tmp_path / "releases"))


def arrive(landing: Landing, name: str, moment: str) -> None:
    landing.write_events("test", name, event_table(event(name, "ann", "tea", moment), schema=EVENT_SCHEMA))


@contextmanager
def at(moment: int) -> Iterator[None]:
    """What arrives within arrives at a moment (ms)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recsys_core.landing.now_ms", lambda: moment)
        yield


def with_policy(settings: Settings, **policy: Any) -> Settings:
    return settings.model_copy(update={"retention": RetentionSettings(**policy)})


def publish(releases: Releases, release_id: str, day: str, at: float) -> None:
    snapshot = make_snapshot(release_id, items=60)
    sources = {"als_factors": {"partition": day, "data_version": "v"}}
    releases.write(replace(make_manifest(snapshot), sources=sources, created_at=at), snapshot)


def names(removals: list[Removal], kind: str) -> list[str]:
    return [removal.name for removal in removals if removal.kind == kind]


def test_old_partitions_go_by_the_age_of_their_kind(landing: Landing, releases: Releases, settings: Settings) -> None:
    lake = landing.lake
    for key in ("2026-01-01T05", "2026-05-30T05", "2026-05-31T23"):
        lake.write("clicks_hourly", key, ROWS)
    for key in ("2026-04-01", "2026-05-25", "2026-05-31"):
        lake.write("als_factors", key, ROWS)
    lake.write("item_catalog", "current", ROWS)
    policy = with_policy(settings, hourly_days=100, daily_days=10)
    planned = plan(landing, releases, policy, ms(NOW))
    assert names(planned, "partition") == ["als_factors/2026-04-01", "clicks_hourly/2026-01-01T05"]
    assert lake.keys("als_factors") == ["2026-04-01", "2026-05-25", "2026-05-31"]
    remove(landing, releases, planned)
    assert lake.keys("als_factors") == ["2026-05-25", "2026-05-31"]
    assert lake.keys("clicks_hourly") == ["2026-05-30T05", "2026-05-31T23"]
    with pytest.raises(MissingPartition):
        lake.get("als_factors", "2026-04-01")
    assert plan(landing, releases, policy, ms(NOW)) == []


def test_what_a_kept_release_was_made_from_stays_whatever_its_age(
    landing: Landing, releases: Releases, settings: Settings
) -> None:
    for table in ("als_factors", "als_factors_users", "interactions"):
        for key in ("2026-02-01", "2026-02-02", "2026-05-31"):
            landing.lake.write(table, key, ROWS)
    publish(releases, "the-champion", "2026-02-01", 1.0)
    publish(releases, "old", "2026-02-02", 2.0)
    publish(releases, "newest", "2026-05-31", 3.0)
    releases.promote("the-champion")
    planned = plan(landing, releases, with_policy(settings, daily_days=10, releases=1), ms(NOW))
    assert names(planned, "release") == ["old"]
    assert {name.split("/")[1] for name in names(planned, "partition")} == {"2026-02-02"}
    remove(landing, releases, planned)
    assert [manifest.release_id for manifest in releases.list()] == ["the-champion", "newest"]
    releases.load("the-champion")


def test_the_champion_is_never_removed_even_when_a_plan_names_it(landing: Landing, releases: Releases) -> None:
    publish(releases, "one", "2026-05-31", 1.0)
    publish(releases, "two", "2026-05-31", 2.0)
    planned = [Removal("release", "one", 1)]
    releases.promote("one")
    assert remove(landing, releases, [*planned, Removal("release", "two", 1)]) == [Removal("release", "two", 1)]
    assert releases.names() == ["one"]
    releases.load("one")
    with pytest.raises(ReleaseError, match="is the champion"):
        releases.remove("one")


def test_earlier_champions_stay_so_that_a_rollback_finds_one(landing: Landing, releases: Releases, settings: Settings) -> None:
    for at in range(5):
        publish(releases, f"r{at}", f"2026-02-0{at + 1}", float(at))
        landing.lake.write("als_factors", f"2026-02-0{at + 1}", ROWS)
        releases.promote(f"r{at}")
    for at in range(5, 8):
        publish(releases, f"r{at}", "2026-05-31", float(at))
    releases.remove("r3")
    policy = with_policy(settings, daily_days=10, releases=1, champions=2)
    planned = plan(landing, releases, policy, ms(NOW))
    assert names(planned, "release") == ["r0", "r5", "r6"], "r4 is served; r2 and r1 are left before it"
    assert names(planned, "partition") == ["als_factors/2026-02-01", "als_factors/2026-02-04"]
    remove(landing, releases, planned)
    pointer, passed_over = releases.roll_back()
    assert (pointer.release_id, list(passed_over)) == ("r2", ["r3"])


def test_a_release_that_cannot_be_read_stays_and_the_rest_goes(
    landing: Landing, releases: Releases, settings: Settings
) -> None:
    for at in range(3):
        publish(releases, f"r{at}", "2026-05-31", float(at))
    releases.promote("r2")
    releases.fs.pipe_file(releases.path("r1", "manifest.json"), b"{half")
    policy = with_policy(settings, releases=1)
    assert names(plan(landing, releases, policy, ms(NOW)), "release") == ["r0"]
    releases.fs.pipe_file(releases.path("r2", "manifest.json"), b"{half")
    with pytest.raises(ReleaseError, match="r2"):
        plan(landing, releases, policy, ms(NOW))


@pytest.fixture
def registry(mlflow_settings: Settings) -> Registry:
    return Registry(mlflow_settings)


def trained(registry: Registry, day: str, release: Manifest | None = None) -> str:
    with registry.run(f"als_factors {day}", {PARTITION_TAG: day}) as run:
        run.log_text("evaluation.json", "{}")
        if release:
            registry.register(release, "/releases", run)
    assert run.run_id
    return run.run_id


def test_runs_and_versions_of_mlflow_go_with_what_they_made(releases: Releases, registry: Registry, settings: Settings) -> None:
    publish(releases, "served", "2026-02-01", 1.0)
    publish(releases, "spent", "2026-02-02", 2.0)
    manifests = [replace(releases.manifest(name), day=day) for name, day in (("spent", "2026-02-02"), ("served", "2026-02-01"))]
    old, of_the_champion = trained(registry, "2026-02-02", manifests[0]), trained(registry, "2026-02-01", manifests[1])
    recent = trained(registry, "2026-05-30")
    releases.promote("served")
    releases.remove("spent")
    files = {run.info.run_id: registry.files(run) for run in registry.runs()}
    policy = with_policy(settings, daily_days=10)
    assert [run.info.run_id for run in spent_runs_of_mlflow(registry, releases, policy, ms(NOW))] == [old]
    assert prune_mlflow(registry, releases, policy, ms(NOW)) == {"runs of MLflow": 1, "versions of MLflow": 1}
    assert {run.info.run_id for run in registry.runs() if run.info.lifecycle_stage == "active"} == {of_the_champion, recent}
    assert [version.release_id for version in registry.versions()] == ["served"]
    assert {run_id: list(found) for run_id, found in files.items()} == {
        old: [],
        of_the_champion: ["evaluation.json"],
        recent: ["evaluation.json"],
    }
    assert prune_mlflow(registry, releases, policy, ms(NOW)) == {"runs of MLflow": 0, "versions of MLflow": 0}


def test_a_version_with_an_alias_stays_without_its_release(releases: Releases, registry: Registry, settings: Settings) -> None:
    publish(releases, "gone", "2026-02-02", 1.0)
    trained(registry, "2026-05-31", releases.manifest("gone"))
    releases.remove("gone")
    assert prune_mlflow(registry, releases, settings, ms(NOW))["versions of MLflow"] == 0


def test_a_home_in_which_nothing_was_recorded_gets_no_database(releases: Releases, settings: Settings) -> None:
    assert prune_mlflow(Registry(settings), releases, settings, ms(NOW)) == {"runs of MLflow": 0, "versions of MLflow": 0}
    assert not (settings.home / "mlflow.db").exists()


def test_a_history_that_ended_long_ago_is_not_old(lake: Lake, releases: Releases, settings: Settings) -> None:
    landing = Landing(lake)
    arrive(landing, "history", "2017-10-10T12:00")
    for key in ("2017-10-09T05", "2017-10-10T05"):
        lake.write("clicks_hourly", key, ROWS)
    policy = with_policy(settings, landing_days=100, hourly_days=100, daily_days=10)
    assert plan(landing, releases, policy, ms(NOW)) == []


def test_landing_files_stay_for_ever_unless_the_policy_says_days(
    landing: Landing, releases: Releases, settings: Settings
) -> None:
    arrive(landing, "old", "2025-01-01")
    arrive(landing, "recent", "2026-04-01")
    assert names(plan(landing, releases, settings, ms(NOW)), "landing") == []
    planned = plan(landing, releases, with_policy(settings, landing_days=120), ms(NOW))
    assert [Path(name).stem for name in names(planned, "landing")] == ["old"]
    remove(landing, releases, planned)
    assert [Path(file.path).stem for file in landing.files()] == ["new", "recent"]


def test_the_archive_of_a_topic_goes_from_its_beginning_and_keeps_its_last_file(
    landing: Landing, releases: Releases, settings: Settings
) -> None:
    old, new, nothing = "2025-01-01", NOW, None
    moments = {0: [old, nothing, old, nothing, new, nothing, old, new, nothing], 1: [old, old], 2: [nothing]}
    for partition, files in moments.items():
        for offset, moment in enumerate(files):
            events = [event("e", "ann", "tea", moment) | {"offset": offset}] if moment else []
            table = pa.Table.from_pylist(events, schema=ARCHIVE_SCHEMA)
            landing.write_archive(
                OffsetRange("clicks", "0" * 8, partition, offset, offset), 1, table, QUARANTINE_SCHEMA.empty_table()
            )
    remove(landing, releases, plan(landing, releases, with_policy(settings, landing_days=120), ms(NOW)))
    held = landing.archived("clicks")
    assert [(one.partition, one.first) for one in held] == [(0, 3), (0, 4), (0, 5), (0, 6), (0, 7), (0, 8), (1, 1), (2, 0)]
    assert offset_faults(held) == []


def test_the_quarantine_goes_by_the_time_of_its_writing(landing: Landing, releases: Releases, settings: Settings) -> None:
    rows = pa.table({"origin": ["f"], "row": [1], "reason": ["no id"], "content": ["x"]}, schema=QUARANTINE_SCHEMA)
    for name, days in (("old", 91), ("new", 0)):
        with at(ms(NOW) - days * DAY_MS):
            landing.write_quarantine("test", name, rows)
    planned = plan(landing, releases, with_policy(settings, quarantine_days=90), ms(NOW))
    assert [Path(name).stem for name in names(planned, "quarantine")] == ["old"]


@pytest.mark.parametrize("policy", [{"hourly_days": 90}, {"landing_days": 91}])
def test_a_policy_that_takes_what_a_model_reads_is_refused(
    landing: Landing, releases: Releases, settings: Settings, policy: dict[str, int]
) -> None:
    with pytest.raises(UnsafePolicy, match="a model reads 90 days back"):
        plan(landing, releases, with_policy(settings, **policy), ms(NOW))


def test_zero_keeps_everything(landing: Landing, releases: Releases, settings: Settings) -> None:
    for key in ("2020-01-01", "2026-05-31"):
        landing.lake.write("als_factors", key, ROWS)
    for at in range(3):
        publish(releases, f"r{at}", "2020-01-01", float(at))
    nothing = dict.fromkeys(("landing_days", "quarantine_days", "hourly_days", "daily_days", "releases"), 0)
    assert plan(landing, releases, with_policy(settings, **nothing), ms(NOW)) == []


def test_totals_are_by_kind() -> None:
    removals = [Removal("partition", "a/1", 3), Removal("partition", "a/2", 4), Removal("release", "r", 5)]
    assert totals(removals) == {"partition": (2, 7), "release": (1, 5)}


# -- decided once, done only while it still holds -----------------------------------------------------------------------


def test_a_partition_that_was_made_again_since_the_plan_stays(landing: Landing, releases: Releases, settings: Settings) -> None:
    for key in ("2026-01-01T05", "2026-01-01T06", "2026-05-31T23"):
        landing.lake.write("clicks_hourly", key, ROWS)
    planned = plan(landing, releases, with_policy(settings, hourly_days=100), ms(NOW))
    again = landing.lake.write("clicks_hourly", "2026-01-01T05", ROWS)
    gone = remove(landing, releases, planned)
    assert names(gone, "partition") == ["clicks_hourly/2026-01-01T06"]
    assert landing.lake.get("clicks_hourly", "2026-01-01T05") == again
    assert landing.lake.read("clicks_hourly", "2026-01-01T05").equals(ROWS)


@pytest.mark.parametrize("kind", ["landing", "quarantine"])
def test_a_file_that_was_written_again_since_the_plan_stays(
    kind: str, landing: Landing, releases: Releases, settings: Settings
) -> None:
    row = {"origin": "a.csv", "row": 1, "reason": "missing item", "content": "x"}
    rejected = pa.Table.from_pylist([row], schema=QUARANTINE_SCHEMA)
    for name in ("a", "b"):
        if kind == "landing":
            arrive(landing, name, "2026-01-01")
        else:
            with at(ms("2026-01-01")):
                landing.write_quarantine("test", name, rejected)
    planned = plan(landing, releases, with_policy(settings, landing_days=100), ms(NOW))
    assert len(names(planned, kind)) == 2
    if kind == "landing":
        arrive(landing, "b", NOW)
    else:
        landing.write_quarantine("test", "b", rejected)
    gone = names(remove(landing, releases, planned), kind)
    assert [os.path.basename(path) for path in gone] == ["a.parquet"]
    assert os.path.exists(gone[0].replace("a.parquet", "b.parquet"))


def test_a_release_to_which_somebody_rolled_back_since_the_plan_stays(landing: Landing, releases: Releases) -> None:
    for at, name in enumerate(("first", "second", "third")):
        publish(releases, name, "2026-05-31", float(at))
        releases.promote(name)
    releases.promote("third")
    planned = [Removal("release", name, 1) for name in ("first", "second")]
    releases.roll_back()
    assert names(remove(landing, releases, planned), "release") == ["first"]
    releases.load("second")
    pointer = releases.champion()
    assert pointer is not None
    assert pointer.release_id == "second"


# -- what runs left that broke off --------------------------------------------------------------------------------------

VERSION, RELEASE = "18ecc3c85924e046-e0453c10", "2026-05-30.20260531T010203.abcd"
HALF = f"{'0' * 32}.tmp"
LEFT = [
    f"lake/landing/app/x.parquet.{HALF}",
    f"lake/quarantine/app/x.parquet.{HALF}",
    "lake/landing/shop-0123456789abcdef/00000.parquet",
    "lake/landing/clicks/0abcdef0-00003-00000000000000000000-00000000000000000059.parquet",
    "lake/quarantine/clicks/0abcdef0-00003-00000000000000000000-00000000000000000059.parquet",
    "lake/ledger/18ecc3c85924e046-e0453c10.parquet",
    f"lake/clicks_hourly/_current/2026-05-31T05.json.{HALF}",
    f"lake/clicks_hourly/2026-05-31T05/{VERSION}/part-0.parquet",
    f"lake/clicks_hourly/2026-05-31T06/{VERSION}/part-0.parquet",
    f"lake/clicks_hourly/_staging/{VERSION}/hour=2026-05-31T05/part-0.parquet",
    f"releases/{RELEASE}/items.parquet",
    f"releases/{RELEASE}/als/items.npy",
    f"releases/champion.json.{HALF}",
]
NOT_OURS = [
    "lake/mine/notes/summary.parquet",
    "lake/clicks_hourly/notes.txt",
    "lake/clicks_hourly/2026-05-31T05/mine/a.parquet",
    "lake/landing/app/mine.tmp",
    "lake/landing/app/mine.parquet",
    "releases/mine/items.parquet",
    "releases/readme.txt",
]


def leave(tmp_path: Path, paths: list[str], moment: float) -> list[str]:
    for path in paths:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"1234")
        os.utime(file, (moment, moment))
    return sorted(str(tmp_path / path) for path in paths)


def test_what_broken_runs_left_goes_after_a_day_and_nothing_else(
    landing: Landing, releases: Releases, settings: Settings, tmp_path: Path
) -> None:
    for _ in range(2):
        landing.lake.write("clicks_hourly", "2026-05-31T05", ROWS)
    publish(releases, "served", "2026-05-31", 1.0)
    releases.promote("served")
    before = everything(tmp_path)
    leave(tmp_path, LEFT, ms(NOW) / 1000 - 23 * 3600)
    leave(tmp_path, NOT_OURS, 0)
    keep_all = with_policy(settings, hourly_days=0, daily_days=0, releases=0, quarantine_days=0, landing_days=0)
    assert plan(landing, releases, keep_all, ms(NOW)) == [], "a run may be at work"
    left = leave(tmp_path, LEFT, ms(NOW) / 1000 - 25 * 3600)
    planned = plan(landing, releases, keep_all, ms(NOW))
    assert sorted(names(planned, "leftover")) == left == sorted(names(planned, "leftover"))
    assert totals(planned) == {"leftover": (len(LEFT), 4 * len(LEFT))}
    remove(landing, releases, planned)
    assert everything(tmp_path) == before | {str(tmp_path / path): b"1234" for path in NOT_OURS}
    assert not (tmp_path / "releases" / RELEASE).exists()
    assert not (tmp_path / "lake" / "clicks_hourly" / "_staging" / VERSION).exists()
    assert landing.lake.read("clicks_hourly", "2026-05-31T05").equals(ROWS)


def test_a_run_that_still_writes_one_of_its_files_keeps_the_others(
    landing: Landing, releases: Releases, settings: Settings, tmp_path: Path
) -> None:
    old, new = ms(NOW) / 1000 - 48 * 3600, ms(NOW) / 1000 - 60
    leave(tmp_path, [f"lake/t/_staging/{VERSION}/hour=1/a.parquet"], old)
    leave(tmp_path, [f"lake/t/_staging/{VERSION}/hour=2/b.parquet"], new)
    assert plan(landing, releases, settings, ms(NOW)) == []


def test_a_removal_that_broke_off_is_ended_by_the_next(landing: Landing, releases: Releases, settings: Settings) -> None:
    publish(releases, "one", "2026-05-31", 1.0)
    publish(releases, "two", "2026-05-31", 2.0)
    releases.promote("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(releases.fs, "rm", lambda *_, **__: 1 / 0)
        with pytest.raises(StoreAway, match="ZeroDivisionError"):
            releases.remove("one")
    assert releases.removing() == ("one",)
    with pytest.raises(ReleaseError, match=r"manifest\.json is missing"):
        releases.promote("one")
    remove(landing, releases, plan(landing, releases, settings, ms(NOW)))
    assert not Path(releases.path("one")).exists()
    assert releases.removing() == ()


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}
