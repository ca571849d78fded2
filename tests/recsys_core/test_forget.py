"""A user is removed from everything, older versions included, and what was made from the rest stays valid."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
import redis as redis_py
from builders import event, land, write_clicks, write_interactions

from recsys_cli.stack import redis_server
from recsys_core.bundle import (
    ALS_FACTORS,
    ALS_USERS,
    POPULAR_ITEMS,
    build_item_index,
    fit_als_factors,
    publish_release,
)
from recsys_core.forget import FORGOTTEN, forget_user, hash_of, search_user
from recsys_core.lake import Lake
from recsys_core.landing import QUARANTINE_SCHEMA, Landing
from recsys_core.online import UserRecord, recs_key, user_key, write_answers, write_records
from recsys_core.popularity import popular_items
from recsys_core.release import Releases
from recsys_core.settings import Settings
from recsys_core.tables import ACTIVE_USERS, CLICKS_HOURLY, INTERACTIONS

HOUR, DAY = "2026-03-02T10", "2026-03-02"
GONE, STAYS = "user-7", "user-77"


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url, redis_py.Redis.from_url(url) as client:
        yield client


@pytest.fixture
def releases(settings: Settings) -> Releases:
    return Releases(settings.releases_uri)


@pytest.fixture
def filled(lake: Lake, redis: Any, releases: Releases, settings: Settings) -> Lake:
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
    return lake


def test_every_trace_is_removed_and_the_report_proves_it(filled: Lake, redis: Any, releases: Releases) -> None:
    before = search_user(filled, redis, releases, GONE)
    assert set(before) == {"landing", "quarantine", CLICKS_HOURLY, INTERACTIONS, ALS_USERS, ACTIVE_USERS, "redis"}
    assert before[CLICKS_HOURLY] == 6, "two versions of three rows"
    report = forget_user(filled, redis, releases, GONE)
    assert report.removed == before
    assert report.remaining == {}
    assert search_user(filled, redis, releases, GONE) == {}
    assert not redis.exists(user_key(GONE), recs_key(GONE))


def test_another_user_whose_id_begins_alike_keeps_everything(filled: Lake, redis: Any, releases: Releases) -> None:
    before = search_user(filled, redis, releases, STAYS)
    older = {CLICKS_HOURLY: before[CLICKS_HOURLY] // 2}
    forget_user(filled, redis, releases, GONE)
    assert search_user(filled, redis, releases, STAYS) == {**before, **older}


def test_the_next_release_is_made_from_what_is_left_without_anything_made_again(
    filled: Lake, redis: Any, releases: Releases, settings: Settings
) -> None:
    versions = {table: filled.get(table, DAY).data_version for table in (INTERACTIONS, ALS_USERS, ALS_FACTORS)}
    forget_user(filled, redis, releases, GONE)
    assert {table: filled.get(table, DAY).data_version for table in versions} == versions
    manifest, _ = publish_release(filled, releases, DAY, settings, {})
    assert search_user(filled, redis, releases, GONE) == {}
    assert releases.manifest(manifest.release_id).day == DAY


def test_landing_files_keep_their_time_of_arrival_so_that_no_hour_counts_as_late(
    filled: Lake, redis: Any, releases: Releases
) -> None:
    path = Landing(filled).files()[0].path
    os.utime(path, (1_000_000, 1_000_000))
    forget_user(filled, redis, releases, GONE)
    assert os.stat(path).st_mtime == 1_000_000
    assert sum(file.rows for file in Landing(filled).files()) == 3


def test_the_kept_report_does_not_name_the_user(filled: Lake, redis: Any, releases: Releases) -> None:
    forget_user(filled, redis, releases, GONE)
    (key,) = filled.keys(FORGOTTEN)
    kept = filled.get(FORGOTTEN, key).extra
    assert kept["user_hash"] == hash_of(GONE)
    assert GONE not in str(kept)


def test_a_user_that_nothing_is_known_of_is_reported_as_such(lake: Lake, redis: Any, releases: Releases) -> None:
    report = forget_user(lake, redis, releases, "nobody")
    assert (report.removed, report.remaining) == ({}, {})
