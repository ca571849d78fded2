"""Two writers of one thing: neither undoes the other, whichever is faster and wherever it is overtaken."""

from __future__ import annotations

import random
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as property_settings
from hypothesis import strategies as st
from snapshots import make_manifest, make_snapshot
from together import in_processes

from recsys_core.catalog import CATALOG_KEY, CATALOG_SCHEMA, CATALOG_TABLE, merge_catalog, read_catalog
from recsys_core.lake import Lake, Partition, PartitionChanged
from recsys_core.precompute import NewerCaches, plan_caches, read_plan
from recsys_core.profiles import CATALOG_PROFILE, CLICKS_PROFILE, Profile, Profiles, Verdict, judge_catalogue
from recsys_core.quality import Report, Suite, validate
from recsys_core.release import NO_CHAMPION, ChampionChanged, ChampionServes, Pointer, ReleaseError, Releases
from recsys_core.settings import QualitySettings, Settings
from recsys_core.tables import ACTIVE_USERS

KEY = "2026-03-02"
WRITERS, TIMES = 3, 8


@pytest.fixture
def anywhere(any_store: str) -> Lake:
    return Lake(f"{any_store}/lake")


def rows(*values: int) -> pa.Table:
    return pa.table({"n": pa.array(values, pa.int64())})


def values(lake: Lake, key: str = KEY) -> list[int]:
    return [] if lake.find("t", key) is None else sorted(lake.read("t", key)["n"].to_pylist())


# -- partitions -------------------------------------------------------------------------------------------------------


def test_a_writer_whose_result_rests_on_what_was_read_is_refused_once_that_has_changed(anywhere: Lake) -> None:
    read = anywhere.write("t", KEY, rows(1))
    newer = anywhere.write("t", KEY, rows(2))
    for write in (
        lambda: anywhere.write("t", KEY, rows(3), instead_of=read),
        lambda: anywhere.write_blobs("t", KEY, {"a": b"3"}, 1, instead_of=read),
        lambda: anywhere.replace_rows(read, rows(3).to_batches(), rows().schema),
        lambda: anywhere.drop_older(read),
        lambda: anywhere.write("t", KEY, rows(3), instead_of=None),
    ):
        with pytest.raises(PartitionChanged, match="t/2026-03-02 has been replaced since it was read"):
            write()
    assert anywhere.get("t", KEY) == newer
    assert len(anywhere.versions("t", KEY)) == 2, "what was refused left nothing"
    assert not anywhere.remove(read)
    assert values(anywhere) == [2]
    assert anywhere.remove(newer)
    assert anywhere.find("t", KEY) is None


def append(lake: Lake, key: str, value: int) -> None:
    def add(part: Partition | None) -> None:
        held = lake.read("t", key)["n"].to_pylist() if part else []
        lake.write("t", key, rows(*held, value), instead_of=part)

    lake.revise("t", key, add)


def append_all(uri: str, writer: int) -> None:
    for time in range(TIMES):
        append(Lake(uri), KEY, writer * TIMES + time)


def test_processes_that_read_and_then_write_a_partition_lose_no_row(tmp_path: Path) -> None:
    uri = str(tmp_path / "lake")
    in_processes(append_all, [(uri, writer) for writer in range(WRITERS)])
    assert values(Lake(uri)) == list(range(WRITERS * TIMES))


def test_threads_that_read_and_then_write_a_partition_in_memory_lose_no_row() -> None:
    uri = f"memory://{uuid.uuid4().hex}/lake"
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(lambda writer: append_all(uri, writer), range(WRITERS)))
    assert values(Lake(uri)) == list(range(WRITERS * TIMES))


def test_a_slow_writers_version_is_not_dropped_by_those_that_are_done_before_it(anywhere: Lake) -> None:
    def slow() -> Iterator[pa.RecordBatch]:
        yield rows(1).to_batches()[0]
        for value in range(2, 7):
            anywhere.write("t", KEY, rows(value))
        yield rows(7).to_batches()[0]

    anywhere.write("t", KEY, slow(), rows().schema)
    assert values(anywhere) == [1, 7]


def test_of_many_writers_of_a_partition_one_is_read_whole_and_so_many_versions_stay(anywhere: Lake) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda value: anywhere.write("t", KEY, rows(*[value] * 5)), range(24)))
    part = anywhere.get("t", KEY)
    assert len(set(values(anywhere))) == 1
    assert set(anywhere.versions("t", KEY)) == {part.version, *part.older}
    assert len(part.older) == anywhere.keep_versions - 1


def test_a_removed_partition_that_is_made_again_meanwhile_is_whole(anywhere: Lake) -> None:
    """Prune beside a backfill: what is read is the old partition, none, or the new one; never a half."""

    def make() -> None:
        for value in range(20):
            anywhere.write("t", KEY, rows(value))

    def prune() -> None:
        for _ in range(20):
            if part := anywhere.find("t", KEY):
                anywhere.remove(part)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(make), pool.submit(prune)]:
            done.result()
    anywhere.write("t", KEY, rows(99))
    assert values(anywhere) == [99]


def test_two_ingests_of_catalogues_at_once_keep_the_items_of_both(tmp_path: Path) -> None:
    uri = str(tmp_path / "lake")
    in_processes(merge_items, [(uri, writer) for writer in range(WRITERS)])
    found = read_catalog(Lake(uri))["item_id"].to_pylist()
    assert found == sorted(f"i{writer}-{time}" for writer in range(WRITERS) for time in range(TIMES))


def merge_items(uri: str, writer: int) -> None:
    for time in range(TIMES):
        item = dict.fromkeys(CATALOG_SCHEMA.names) | {"item_id": f"i{writer}-{time}", "available": True}
        merge_catalog(Lake(uri), pa.Table.from_pylist([item], schema=CATALOG_SCHEMA))


def test_runs_that_judge_hours_of_one_day_at_once_keep_every_verdict(tmp_path: Path) -> None:
    uri = str(tmp_path / "lake")
    in_processes(store_verdicts, [(uri, writer) for writer in range(WRITERS)])
    kept = Lake(uri).get(CLICKS_PROFILE, KEY).extra["hours"]
    assert sorted(kept) == [f"{KEY}T{hour:02}" for hour in range(WRITERS * TIMES)]


def store_verdicts(uri: str, writer: int) -> None:
    profiles = Profiles(Lake(uri), QualitySettings())
    for time in range(TIMES):
        profiles.store([Verdict(Profile(f"{KEY}T{writer * TIMES + time:02}", "v", 1))])


def test_what_a_person_accepts_while_it_is_judged_stays_accepted(lake: Lake) -> None:
    hour = f"{KEY}T09"
    judged = Verdict(Profile(hour, "v", 1), {"volume_is_as_usual": "few"}, judged=True)
    judging = Profiles(lake, QualitySettings())
    judging.store([judged])
    judging.verdict(hour)
    Profiles(lake, QualitySettings()).store([replace(judged, accepted=True)])
    judging.store([replace(judged, failed={"volume_is_as_usual": "fewer"})])
    assert lake.get(CLICKS_PROFILE, KEY).extra["hours"][hour]["accepted"]
    judging.store([Verdict(Profile(hour, "other data", 1), {"volume_is_as_usual": "few"}, judged=True)])
    assert not lake.get(CLICKS_PROFILE, KEY).extra["hours"][hour]["accepted"]


def test_a_catalogue_accepted_while_another_is_judged_is_what_counts(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(count: int) -> None:
        items = [dict.fromkeys(CATALOG_SCHEMA.names) | {"item_id": f"i{n}", "available": True} for n in range(count)]
        lake.write(CATALOG_TABLE, CATALOG_KEY, pa.Table.from_pylist(items, schema=CATALOG_SCHEMA))

    def kept() -> int:
        return int(lake.get(CATALOG_PROFILE, CATALOG_KEY).extra["profile"]["items"])

    def accepting_meanwhile(suite: Suite, frame: pd.DataFrame) -> Report:
        monkeypatch.undo()
        write(10)
        judge_catalogue(lake, Report("", 0), accepted=True)
        return validate(suite, frame)

    write(100)
    judge_catalogue(lake, Report("", 0))
    write(90)
    monkeypatch.setattr("recsys_core.profiles.validate", accepting_meanwhile)
    judge_catalogue(lake, Report("", 0))
    assert kept() == 10

    def judging_meanwhile(*arguments: Any) -> Partition:
        monkeypatch.undo()
        lake.write_blobs(CATALOG_PROFILE, CATALOG_KEY, {}, 1, {"profile": {"items": 1}})
        return lake.write_blobs(*arguments)

    write(5)
    monkeypatch.setattr(lake, "write_blobs", judging_meanwhile)
    judge_catalogue(lake, Report("", 0), accepted=True)
    assert kept() == 5


def test_the_plan_of_a_later_hour_is_never_replaced_by_that_of_an_earlier_one(lake: Lake, settings: Settings) -> None:
    hours = [f"2026-03-02T{hour:02}" for hour in range(12)]
    for hour in hours:
        lake.write(ACTIVE_USERS, hour, pa.table({"user_id": ["ann"]}))
    champion = Pointer("r", "", 0.0)

    def plan(hour: str) -> None:
        with suppress(NewerCaches):
            plan_caches(lake, hour, champion, settings, hour)

    shuffled = random.Random(1).sample(hours, len(hours))
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(plan, shuffled))
    newest = read_plan(lake)
    assert newest is not None
    assert newest.hour == hours[-1]
    with pytest.raises(NewerCaches, match=f"caches of {hours[0]}: those of {hours[-1]} are made or in the making"):
        plan_caches(lake, hours[0], champion, settings, "late")


# -- the champion -----------------------------------------------------------------------------------------------------

IDS = [f"r{n}" for n in range(5)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five releases of which none was promoted."""
    folder = tmp_path_factory.mktemp("made")
    releases = Releases(str(folder))
    for at, name in enumerate(IDS):
        snapshot = make_snapshot(name, items=20, rank=2)
        releases.write(replace(make_manifest(snapshot), created_at=float(at)), snapshot)
    return folder


@pytest.fixture
def releases(made: Path, tmp_path: Path) -> Releases:
    return copied(made, tmp_path / "releases")


def copied(made: Path, to: Path) -> Releases:
    shutil.copytree(made, to)
    return Releases(str(to))


def test_a_promotion_decided_against_another_champion_than_now_is_refused(releases: Releases) -> None:
    first = releases.promote("r0", sequence=0)
    releases.promote("r1", sequence=first.sequence)
    with pytest.raises(ChampionChanged, match="r2 was judged against another champion than r1, which was named since"):
        releases.promote("r2", sequence=first.sequence)
    rolled_back, _ = releases.roll_back()
    assert rolled_back.release_id == "r0"
    with pytest.raises(ChampionChanged):
        releases.promote("r1", sequence=first.sequence)
    assert releases.promote("r2").release_id == "r2", "an operator may"


def test_sequences_only_grow(releases: Releases) -> None:
    named = [releases.promote(name).sequence for name in IDS]
    named.append(releases.roll_back()[0].sequence)
    releases.remove("r0")
    named.append(releases.promote("r1").sequence)
    assert named == list(range(1, 8))


def test_a_release_on_its_way_out_does_not_become_champion_and_a_champion_does_not_go(releases: Releases) -> None:
    releases.promote("r0")
    releases.promote("r1")
    with pytest.raises(ReleaseError, match="r1 is the champion"):
        releases.remove("r1")
    releases.remove("r0")
    assert (releases.removing(), sorted(releases.names())) == ((), IDS[1:])
    with pytest.raises(ReleaseError, match=r"no earlier champion to return to; release r0: manifest.json is missing"):
        releases.roll_back()
    pointer = releases.champion()
    assert pointer is not None
    assert pointer.release_id == "r1"


@pytest.mark.parametrize("other", ["promote", "roll_back"])
def test_whatever_happens_between_the_steps_of_a_removal_the_champion_is_whole(
    releases: Releases, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """The other one acts at each look and each write of the removal in turn."""
    for step in range(6):
        folder = copied(Path(releases.root), Path(releases.root).parent / f"{other}{step}")
        folder.promote("r0")
        folder.promote("r1")
        at = iter(range(100))
        told: list[str] = []

        def act(folder: Releases = folder, at: Iterator[int] = at, step: int = step, told: list[str] = told) -> None:
            if next(at) == step:
                try:
                    folder.promote("r0") if other == "promote" else folder.roll_back()
                except ReleaseError as error:
                    told.append(str(error))

        with monkeypatch.context() as patch:
            for name in ("rm_file", "rm"):
                whole = getattr(folder.fs, name)
                patch.setattr(folder.fs, name, lambda *a, w=whole, act=act, **k: (act(), w(*a, **k), act())[1])
            repoint = folder._repoint
            patch.setattr(folder, "_repoint", lambda *a, r=repoint, act=act, **k: (act(), r(*a, **k))[1])
            with suppress(ChampionServes):
                folder.remove("r0")
        pointer = folder.champion()
        assert pointer is not None
        folder.load(pointer.release_id, pointer.manifest_sha256)


def test_a_release_can_be_removed_before_anything_was_promoted(releases: Releases) -> None:
    releases.remove("r0")
    assert releases.champion() is None
    assert releases.promote("r1", sequence=NO_CHAMPION.sequence).sequence == 1


def act_on_releases(root: str, seed: int) -> None:
    """Promotions, rollbacks and removals by chance."""
    releases, chance = Releases(root), random.Random(seed)
    for _ in range(12):
        name = chance.choice(IDS)
        act: Callable[[], Any] = chance.choice(
            [lambda n=name: releases.promote(n), releases.roll_back, lambda n=name: releases.remove(n)]
        )
        with suppress(ReleaseError):
            act()
        pointer, there = releases.champion(), releases.names()
        assert pointer != releases.champion() or pointer is None or pointer.release_id in there, "at any moment"


def test_processes_that_promote_roll_back_and_prune_by_chance_always_leave_a_champion_that_is_whole(releases: Releases) -> None:
    releases.promote("r0")
    in_processes(act_on_releases, [(releases.root, seed) for seed in range(WRITERS)])
    pointer = releases.champion()
    assert pointer is not None
    releases.load(pointer.release_id, pointer.manifest_sha256)
    assert pointer.removing == ()


ACTS = st.lists(st.tuples(st.sampled_from(["promote", "judge", "decide", "back", "remove"]), st.sampled_from(IDS)), max_size=14)


@property_settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ACTS)
def test_a_verdict_is_used_at_most_once_and_only_while_its_champion_serves(
    made: Path, tmp_path: Path, acts: list[tuple[str, str]]
) -> None:
    """In any order of what operators and nights do a night names a champion only where none was named since it judged."""
    releases = copied(made, tmp_path / uuid.uuid4().hex)
    verdicts: list[tuple[str, int]] = []
    for act, name in acts:
        before = releases.champion() or NO_CHAMPION
        there = name in releases.names()
        try:
            if act == "judge":
                verdicts.append((name, before.sequence))
            elif act == "decide":
                for release_id, sequence in verdicts[-1:]:
                    named = releases.promote(release_id, sequence=sequence)
                    assert before.sequence == sequence == named.sequence - 1
            elif act == "promote":
                assert releases.promote(name).release_id == name
            elif act == "back":
                assert releases.roll_back()[0].release_id in before.previous
            else:
                releases.remove(name)
                assert name != before.release_id
        except ChampionChanged:
            assert act == "decide"
            assert before.sequence != verdicts[-1][1]
        except ReleaseError:
            assert act != "promote" or not there
        after = releases.champion()
        assert after is None or releases.load(after.release_id, after.manifest_sha256)
