"""A user is removed from everything, older versions included, and what was made from the rest stays valid."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
import redis as redis_py
from builders import event, event_table, land, write_clicks, write_interactions

from recsys_cli.stack import redis_server
from recsys_core.bundle import (
    ALS_FACTORS,
    ALS_USERS,
    POPULAR_ITEMS,
    build_item_index,
    fit_als_factors,
    publish_release,
)
from recsys_core.events import EVENT_SCHEMA
from recsys_core.forget import FORGOTTEN, Places, Search, forget_user
from recsys_core.lake import Lake
from recsys_core.landing import QUARANTINE_SCHEMA, Landing
from recsys_core.online import UserRecord, recs_key, user_key, write_answers, write_records
from recsys_core.popularity import popular_items
from recsys_core.registry import Registry
from recsys_core.release import Releases
from recsys_core.retention import is_kept, tables
from recsys_core.settings import RetentionSettings, Settings
from recsys_core.tables import ACTIVE_USERS, CLICKS_HOURLY, INTERACTIONS
from recsys_core.tombstones import MERGE_AT, NEW, TOMBSTONES, TombstoneLog, Tombstones, hash_of

HOUR, DAY = "2026-03-02T10", "2026-03-02"
GONE, STAYS = "user-7", "user-77"


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url, redis_py.Redis.from_url(url) as client:
        yield client


def search(places: Places, user: str) -> dict[str, int]:
    found = Search(places, user).run()
    return dict(found.found + found.fixed)


@pytest.fixture
def places(lake: Lake, redis: Any, releases: Releases, mlflow_settings: Settings) -> Places:
    return Places(lake, redis, releases, Registry(mlflow_settings))


@pytest.fixture
def releases(settings: Settings) -> Releases:
    return Releases(settings.releases_uri)


@pytest.fixture
def filled(places: Places, lake: Lake, redis: Any, releases: Releases, settings: Settings) -> Lake:
    """A lake in which both users are everywhere, tables with an older version, a release, Redis."""
    land(lake, *(event(f"e-{user}-{n}", user, f"i{n}", HOUR) for user in (GONE, STAYS) for n in range(3)))
    rejected = [
        {"origin": "a.csv", "row": n, "reason": "missing item", "content": f'{{"uid": "{u}"}}'}
        for n, u in enumerate((GONE, STAYS))
    ]
    Landing(lake).write_quarantine("test", "a", pa.Table.from_pylist(rejected, schema=QUARANTINE_SCHEMA))
    for _ in range(2):
        write_clicks(lake, [(user, f"i{n}", HOUR) for user in (GONE, STAYS) for n in range(3)])
    pairs = [(f"user-{u}", f"i{(u + n) % 20}", 1.0 + n) for u in range(80) for n in range(5)]
    write_interactions(lake, DAY, pairs)
    lake.write(ACTIVE_USERS, HOUR, pa.table({"user_id": [GONE, STAYS]}))
    small = settings.model_copy(update={"als": settings.als.model_copy(update={"rank": 4, "iterations": 2})})
    fit_als_factors(lake, DAY, small, None, "implicit")
    build_item_index(lake, DAY, small)
    window = lake.dataset(INTERACTIONS, [DAY])
    assert window is not None
    lake.write(POPULAR_ITEMS, DAY, popular_items(window))
    publish_release(lake, releases, DAY, small, {})
    write_records(redis, [(user, UserRecord(last_ts=1, seen=("i1",))) for user in (GONE, STAYS)], 60)
    write_answers(redis, [(user, b"answer") for user in (GONE, STAYS)], 60)
    with places.registry.run("als_factors", {"user_id": GONE, "seen last": STAYS}) as run:
        run.log_params({"rank": 4})
        run.log_text("reports/worst.md", f"| {GONE} | 0.0 |")
        run.log_text("reports/best.md", f"| {STAYS} | 1.0 |")
    return lake


@pytest.mark.usefixtures("filled")
def test_every_trace_is_removed_and_the_report_proves_it(places: Places, redis: Any) -> None:
    before = search(places, GONE)
    places_of_rows = {"landing", "quarantine", CLICKS_HOURLY, INTERACTIONS, ALS_USERS, ACTIVE_USERS}
    assert set(before) == {*places_of_rows, "redis", "MLflow tags"}
    assert before[CLICKS_HOURLY] == 6, "two versions of three rows"
    report = forget_user(places, GONE)
    assert report.removed == before
    assert report.remaining == {}
    assert report.looked_at == {
        "landing files": 1,
        "quarantine files": 1,
        "versions of partitions": 8,
        "texts of partitions": 1,
        "Redis keys": 2,
        "releases": 1,
        "MLflow runs": 1,
        "MLflow files": 2,
    }
    (told,) = report.mentioned
    assert told.startswith("MLflow file reports/worst.md of run "), "a text of others as well is for people to look at"
    assert search(places, GONE) == {}
    assert not redis.exists(user_key(GONE), recs_key(GONE))


@pytest.mark.usefixtures("filled")
def test_another_user_whose_id_begins_alike_keeps_everything(places: Places) -> None:
    before = search(places, STAYS)
    older = {CLICKS_HOURLY: before[CLICKS_HOURLY] // 2}
    forget_user(places, GONE)
    assert search(places, STAYS) == {**before, **older}


def test_the_next_release_is_made_from_what_is_left_without_anything_made_again(
    filled: Lake, places: Places, releases: Releases, settings: Settings
) -> None:
    versions = {table: filled.get(table, DAY).data_version for table in (INTERACTIONS, ALS_USERS, ALS_FACTORS)}
    forget_user(places, GONE)
    assert {table: filled.get(table, DAY).data_version for table in versions} == versions
    manifest, _ = publish_release(filled, releases, DAY, settings, {})
    assert search(places, GONE) == {}
    assert releases.load(manifest.release_id)[0].day == DAY


def test_landing_files_keep_their_time_of_arrival_so_that_no_hour_counts_as_late(filled: Lake, places: Places) -> None:
    path = Landing(filled).files()[0].path
    os.utime(path, (1_000_000, 1_000_000))
    forget_user(places, GONE)
    assert os.stat(path).st_mtime == 1_000_000
    assert sum(file.rows for file in Landing(filled).files()) == 3


def test_the_same_events_do_not_land_again(filled: Lake, places: Places) -> None:
    again = event_table(*(event(f"e-{GONE}-{n}", GONE, f"i{n}", HOUR) for n in range(3)), schema=EVENT_SCHEMA)
    forget_user(places, GONE)
    Landing(filled).write_events("test", "again", again)
    assert search(places, GONE) == {}


def test_the_kept_report_does_not_name_the_user(filled: Lake, places: Places) -> None:
    forget_user(places, GONE)
    (key,) = filled.keys(FORGOTTEN)
    kept = filled.get(FORGOTTEN, key).extra
    assert kept["user_hash"] == hash_of(GONE)
    assert GONE not in str(kept)


def test_two_users_of_one_moment_are_both_kept_out(places: Places, lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys_core.forget.now_ms", lambda: 1_000)
    for user in (GONE, STAYS):
        forget_user(places, user)
    assert set(Tombstones.read(lake).moments) == {hash_of(GONE), hash_of(STAYS)}


def test_removals_do_not_pile_up(places: Places, lake: Lake) -> None:
    log = TombstoneLog(lake)
    others = [hash_of(f"another {n}") for n in range(MERGE_AT)]
    for other in others:
        log.add(other, 1_000)
    forget_user(places, GONE)
    assert lake.fs.ls(lake.path(TOMBSTONES, NEW)) == []
    assert set(Tombstones.read(lake).moments) == {*others, hash_of(GONE)}


def test_two_removals_at_the_same_time_both_last(places: Places, lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2, timeout=30)

    def found_nothing(search: Search) -> Search:
        together.wait()
        assert {hash_of(GONE), hash_of(STAYS)} == set(Tombstones.read(lake).moments), "both began"
        together.wait()
        return search

    monkeypatch.setattr(Search, "run", found_nothing)
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda user: forget_user(places, user), (GONE, STAYS)))
    assert {report.user_hash for report in reports} == set(Tombstones.read(lake).moments) == {hash_of(GONE), hash_of(STAYS)}
    assert len(lake.keys(FORGOTTEN)) == 2


def test_pruning_never_lets_a_forgotten_user_back_in(places: Places, lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys_core.forget.now_ms", lambda: 1_600_000_000_000)
    for user in (GONE, STAYS):
        forget_user(places, user)
    keys = lake.keys(FORGOTTEN)
    policy = RetentionSettings(hourly_days=1, daily_days=1)
    assert [key for key in keys if is_kept(key, policy, 1_900_000_000_000)] == keys
    assert TOMBSTONES not in tables(lake), "no policy looks at them"
    assert not is_kept("2020-09-13T12", policy, 1_900_000_000_000), "an hour as old goes"


def test_a_removal_that_was_cut_off_keeps_the_user_out_and_proves_nothing(
    filled: Lake, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Search, "run", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forget_user(places, GONE)
    (key,) = filled.keys(FORGOTTEN)
    assert "remaining" not in filled.get(FORGOTTEN, key).extra
    assert hash_of(GONE) in Tombstones.read(filled).moments


def test_a_user_that_nothing_is_known_of_is_reported_as_such(places: Places) -> None:
    report = forget_user(places, "nobody")
    assert (report.removed, report.remaining, report.unsearched) == ({}, {}, {})
    assert report.looked_at["Redis keys"] == 2


def test_a_tracking_server_that_is_away_is_said_and_everything_else_goes(
    filled: Lake, places: Places, settings: Settings
) -> None:
    away = settings.mlflow.model_copy(update={"tracking_uri": "http://127.0.0.1:9", "timeout_seconds": 1})
    cut_off = replace(places, registry=Registry(settings.model_copy(update={"mlflow": away})))
    report = forget_user(cut_off, GONE)
    assert set(report.unsearched) == {"MLflow"}
    assert report.remaining == {}
    assert set(search(places, GONE)) == {"MLflow tags"}
    assert filled.keys(FORGOTTEN)


def test_a_parameter_that_names_the_user_is_reported_with_its_run(places: Places) -> None:
    with places.registry.run("odd", {}) as run:
        run.log_params({"user": GONE})
    assert forget_user(places, GONE).remaining == {f"MLflow parameters of run {run.run_id}": 1}
