"""A user is removed from everything, older versions included, and what was made from the rest stays valid."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis as redis_py
from builders import event, event_table, land, write_clicks, write_interactions
from hypothesis import HealthCheck, example, given
from hypothesis import settings as settings_of_property
from hypothesis import strategies as st
from redis.backoff import NoBackoff
from redis.retry import Retry
from together import in_threads

from recsys_cli.stack import redis_server
from recsys_core import forget
from recsys_core.bundle import (
    ALS_FACTORS,
    ALS_USERS,
    POPULAR_ITEMS,
    build_item_index,
    fit_als_factors,
    publish_release,
)
from recsys_core.events import EVENT_SCHEMA, now_ms
from recsys_core.forget import FORGOTTEN, READ_SECONDS, Places, Search, forget_user
from recsys_core.heartbeat import HEARTBEATS_KEY, Heartbeat, write_heartbeat
from recsys_core.lake import STAGING, Lake
from recsys_core.landing import ARCHIVE_SCHEMA, QUARANTINE_SCHEMA, Landing, OffsetRange
from recsys_core.online import (
    REBUILD_AREAS_KEY,
    REBUILD_LOCK_KEY,
    UserRecord,
    recs_key,
    user_key,
    write_answers,
    write_records,
)
from recsys_core.popularity import popular_items
from recsys_core.registry import Registry
from recsys_core.release import MANIFEST, Releases
from recsys_core.retention import is_kept, tables
from recsys_core.settings import RetentionSettings, Settings
from recsys_core.tables import ACTIVE_USERS, CLICKS_HOURLY, INTERACTIONS
from recsys_core.tombstones import MERGE_AT, NEW, REREAD_SECONDS, TOMBSTONES, TombstoneLog, Tombstones, hash_of

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
    landing = Landing(filled)
    [before] = landing.files()
    forget_user(places, GONE)
    [after] = landing.files()
    assert (after.rows, after.arrived, after.since) == (3, before.arrived, before.since)
    assert landing.news(before.since) == {}


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


# -- nothing else is destroyed ------------------------------------------------------------------------------------------


def reject(lake: Lake, *contents: str) -> None:
    rows = [{"origin": "a.csv", "row": n, "reason": "bad ts", "content": content} for n, content in enumerate(contents)]
    Landing(lake).write_quarantine("shop", "rejected", pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA))


def rejected(lake: Lake) -> list[str]:
    return [row["content"] for table in Landing(lake).quarantined() for row in table.to_pylist()]


@pytest.fixture
def small_places(lake: Lake, redis: Any, releases: Releases, settings: Settings) -> Places:
    """Without a database of MLflow."""
    redis.flushall()
    return Places(lake, redis, releases, Registry(settings))


def test_a_number_is_no_user_where_it_means_something_else(places: Places, lake: Lake) -> None:
    of_others = ['{"user_id":"6","item_id":"5","ts":"x"}', '{"user_id":"8","value":5,"ts":"x"}', "6,5,view"]
    reject(lake, *of_others, '{"user_id":"5","item_id":"6","ts":"x"}')
    with places.registry.run("release", {"dagster.partition": "2026-01-05", "top_k": "5", "user": "5"}) as run:
        run.log_params({"rank": 5, "users": 5})
        texts = {"release/manifest.json": '{"rank": 5}', "report.md": "recall@50 = 0.99 over 5 folds", "curve.csv": "ef\n5,0.9"}
        for name, text in texts.items():
            run.log_text(name, text)
    report = forget_user(places, "5")
    assert report.removed == {"quarantine": 1, "MLflow tags": 1}
    assert report.remaining == {}
    assert rejected(lake) == of_others
    (kept,) = places.registry.runs()
    assert kept.data.tags["top_k"] == "5"
    assert {path: places.registry.read_file(kept, path).decode() for path in places.registry.files(kept)} == texts
    assert any("report.md" in place for place in report.mentioned), "it is said, and left to people"


def test_an_id_that_json_has_escaped_is_found(small_places: Places, lake: Lake) -> None:
    stays = '{"user_id":"j\\u00fcrg","item_id":"1"}'
    reject(lake, '{"user_id":"j\\u00fcrgen","item_id":"1"}', '{"user_id":"jürgen"}', '{"user_id":"j\\u00FCrgen","ts":', stays)
    report = forget_user(small_places, "jürgen")
    assert (report.removed, report.remaining) == ({"quarantine": 3}, {})
    assert rejected(lake) == [stays]


def test_a_field_that_a_mapping_names_is_a_users(small_places: Places, lake: Lake) -> None:
    reject(lake, '{"kundennummer":"k1","user_id":""}')
    assert forget_user(small_places, "k1").removed == {}
    assert forget_user(replace(small_places, user_fields={"kundennummer"}), "k1").removed == {"quarantine": 1}


ALL_TABLES = (CLICKS_HOURLY, INTERACTIONS, ALS_USERS, ACTIVE_USERS, "clicks_quarantine")


def plant(places: Places, users: list[str]) -> None:
    """Each user in every place that the platform writes, with older versions."""
    lake, redis = places.lake, places.redis
    land(lake, *(event(f"e-{user}", user, "i1", HOUR) for user in users), name="Ingested")
    archived = [{**event(f"a-{user}", user, "i1", HOUR), "offset": at} for at, user in enumerate(users)]
    table = pa.Table.from_pylist([{n: row.get(n) for n in ARCHIVE_SCHEMA.names} for row in archived], schema=ARCHIVE_SCHEMA)
    held = OffsetRange("clicks", "0abcdef0", 0, 0, len(users) - 1)
    Landing(lake).write_archive(held, len(users), table, QUARANTINE_SCHEMA.empty_table())
    texts = [json.dumps({"item_id": user, "user_id": user}, ensure_ascii=at % 2 == 0) for at, user in enumerate(users)]
    reject(lake, *texts, *(text[:-1] for text in texts))
    for name in ALL_TABLES:
        column = "id" if name == ALS_USERS else "user_id"
        for version in range(2):
            lake.write(name, HOUR, pa.table({column: users, "n": [version] * len(users)}))
    write_records(redis, [(user, UserRecord(last_ts=1, seen=(user,))) for user in users], 60)
    write_answers(redis, [(user, user.encode()) for user in users], 60)


def everything(places: Places, but: str) -> dict[str, Any]:
    """All rows and values of all users but one."""
    lake, redis = places.lake, places.redis
    files = {file.path: pq.read_table(file.path).to_pylist() for file in Landing(lake).files()}
    rows = {path: [row for row in of_file if row["user_id"] != but] for path, of_file in files.items()}
    tables_ = {name: lake.read(name, HOUR).to_pylist() for name in ALL_TABLES}
    kept = {name: [row for row in found if but not in row.values()] for name, found in tables_.items()}
    keys = sorted(key for key in redis.scan_iter() if key.decode() not in (user_key(but), recs_key(but)))
    texts = [text for text in rejected(lake) if but not in json.loads(text if text.endswith("}") else text + "}").values()]
    return {**rows, **kept, "redis": {key: redis.dump(key) for key in keys}, "rejected": texts}


ODD = [
    "5",
    "55",
    "a.b",
    "a*",
    "*",
    "a|b",
    'a"b',
    "a\\b",
    "\\u0041",
    "A",
    "jürgen",
    "x%",
    "[x]",
    "{x}",
    "}",
    "😀",
    "a\nb",
    "' OR 1=1",
]


@settings_of_property(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.text(min_size=1, max_size=8), st.sampled_from(ODD)), min_size=2, max_size=12, unique=True))
@example(ODD)
def test_whoever_is_forgotten_is_found_nowhere_and_all_others_have_what_they_had(
    redis: Any, releases: Releases, settings: Settings, tmp_path_factory: pytest.TempPathFactory, users: list[str]
) -> None:
    redis.flushall()
    places = Places(Lake(str(tmp_path_factory.mktemp("lake"))), redis, releases, Registry(settings))
    plant(places, users)
    for user in users[:6] if users == ODD else users[:1]:
        before = everything(places, user)
        report = forget_user(places, user)
        assert report.remaining == report.unsearched == {}
        assert report.removed["quarantine"] == 2
        assert set(report.removed) == {"landing", "quarantine", "redis", *ALL_TABLES}
        assert everything(places, user) == before
        assert Search(places, user).run().found == {}
        assert not forget_user(places, user).is_known


# -- beside others ------------------------------------------------------------------------------------------------------

NUMBERED = pa.schema([("user_id", pa.string()), ("v", pa.int64())])


def numbered(*users: str, v: int) -> pa.Table:
    return pa.table({"user_id": users, "v": [v] * len(users)}, schema=NUMBERED)


@pytest.mark.parametrize("at", ["versions", "replace_rows", "_write_rows", "_drop"])
def test_a_night_that_is_faster_is_not_undone(
    small_places: Places, lake: Lake, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """The night replaces the partition at some moment of the removal, with the user whom it had read before."""
    lake.write(INTERACTIONS, DAY, numbered("bob", "eve", v=1))
    own, nights = getattr(Lake, at), iter([2])

    def beside(self: Lake, *args: Any, **more: Any) -> Any:
        if self is lake and (v := next(nights, None)):
            Lake(lake.uri).write(INTERACTIONS, DAY, numbered("bob", "eve", "zed", v=v))
        return own(self, *args, **more)

    monkeypatch.setattr(Lake, at, beside)
    report = forget_user(small_places, "bob")
    assert lake.read(INTERACTIONS, DAY).to_pylist() == numbered("eve", "zed", v=2).to_pylist()
    assert report.remaining == {}


def test_nights_and_removals_of_many_users_at_once_leave_the_newest_rows_of_those_who_stay(
    small_places: Places, lake: Lake
) -> None:
    users = [f"u{n}" for n in range(8)]
    lake.write(INTERACTIONS, DAY, numbered(*users, "stays", v=0))

    def nights() -> None:
        for v in range(1, 12):
            left = Tombstones.read(lake)
            lake.write(INTERACTIONS, DAY, numbered(*(u for u in users if hash_of(u) not in left.moments), "stays", v=v))

    in_threads([nights, *(lambda u=u: forget_user(small_places, u) for u in users)])
    for user in users:
        forget_user(small_places, user)
    assert lake.read(INTERACTIONS, DAY).to_pylist() == [{"user_id": "stays", "v": 11}]


def test_what_a_run_is_writing_is_named_and_not_touched(small_places: Places, lake: Lake) -> None:
    lake.write(INTERACTIONS, DAY, numbered("eve", "bob", v=1))
    half = lake.path(INTERACTIONS, DAY, "0fffffffffffffff-aaaaaaaa", "part-00000.parquet")
    staged = f"{lake.stage(INTERACTIONS)}/day={DAY}/part-0.parquet"
    for path in (half, staged):
        lake.fs.makedirs(path.rsplit("/", 1)[0])
    lake.fs.pipe_file(half, b"PAR1half")
    pq.write_table(numbered("eve", v=1), staged)
    report = forget_user(small_places, "eve")
    assert report.removed == {INTERACTIONS: 1}
    in_the_making = "a run is writing it, or broke off"
    assert len(report.unsearched) == 2
    assert all(why.startswith(in_the_making) for why in report.unsearched.values())
    assert lake.fs.cat_file(half) == b"PAR1half"
    assert list(forget_user(small_places, "bob").unsearched) == [f"{INTERACTIONS}/{DAY}/0fffffffffffffff-aaaaaaaa"]


def test_a_landing_file_that_cannot_be_read_is_named_and_the_rest_goes(small_places: Places, lake: Lake) -> None:
    land(lake, event("e1", "eve", "i", HOUR))
    for name, content in (("half.parquet", b"PAR1x"), ("._x.parquet", b"x"), ("notes.txt", b"eve")):
        lake.fs.pipe_file(lake.path("landing", "test", name), content)
    report = forget_user(small_places, "eve")
    assert report.removed == {"landing": 1}
    assert set(report.unsearched) == {f"landing/test/{name}" for name in ("half.parquet", "._x.parquet", "notes.txt")}


def test_a_pointer_and_a_manifest_that_cannot_be_read_are_named_and_the_rest_goes(small_places: Places, lake: Lake) -> None:
    for hour in ("2026-01-31T09", "2026-01-31T10"):
        lake.write(CLICKS_HOURLY, hour, pa.table({"user_id": [GONE]}))
    lake.fs.pipe_file(lake.pointer(CLICKS_HOURLY, "2026-01-31T09"), b"{half")
    releases = small_places.releases
    releases.fs.makedirs(releases.path("broken"), exist_ok=True)
    releases.fs.pipe_file(releases.path("broken", MANIFEST), b"{half")
    report = forget_user(small_places, GONE)
    assert report.removed == {CLICKS_HOURLY: 1}
    assert set(report.unsearched) == {f"{CLICKS_HOURLY}/2026-01-31T09", "release broken"}
    assert "_current/2026-01-31T09.json is damaged" in report.unsearched[f"{CLICKS_HOURLY}/2026-01-31T09"]


@pytest.mark.parametrize("folder", ["landing", "landing/test", "quarantine/shop", f"{INTERACTIONS}/{STAGING}/run"])
def test_a_folder_that_cannot_be_listed_is_not_taken_for_empty(
    small_places: Places, lake: Lake, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    land(lake, event("e1", "eve", "i", HOUR))
    reject(lake, '{"user_id": "eve"}')
    staged = f"{lake.path(INTERACTIONS, STAGING, 'run', f'day={DAY}')}/part-0.parquet"
    lake.fs.makedirs(staged.rsplit("/", 1)[0])
    pq.write_table(numbered("eve", v=1), staged)
    own = type(lake.fs).ls

    def ls(self: Any, path: str, *args: Any, **more: Any) -> Any:
        if path.rstrip("/").endswith(folder):
            raise PermissionError(13, "Permission denied", path)
        return own(self, path, *args, **more)

    monkeypatch.setattr(type(lake.fs), "ls", ls)
    report = forget_user(small_places, "eve")
    assert report.unsearched[folder] == f"[Errno 13] Permission denied: '{lake.path(folder)}'; let it be read"


def test_a_lake_that_cannot_be_listed_proves_nothing(small_places: Places, lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    land(lake, event("e1", "eve", "i", HOUR))
    monkeypatch.setattr(type(lake.fs), "exists", lambda *_: False)
    assert forget_user(small_places, "eve").removed == {"landing": 1}


def test_without_redis_the_rest_goes_and_redis_is_named(small_places: Places, lake: Lake) -> None:
    land(lake, event("e1", "eve", "i", HOUR))
    away = replace(small_places, redis=redis_py.Redis(port=1, retry=Retry(NoBackoff(), 0)))
    report = forget_user(away, "eve")
    assert report.removed == {"landing": 1}
    assert set(report.unsearched) == {"Redis"}


def test_a_worker_that_looks_now_and_then_does_not_take_the_user_in_again(small_places: Places, lake: Lake, redis: Any) -> None:
    write_heartbeat(redis, Heartbeat("worker-1", now_ms()))
    ended = threading.Event()

    def take_in() -> None:
        known, looked = Tombstones({}), time.monotonic()
        while not ended.wait(0.01):
            if time.monotonic() - looked > REREAD_SECONDS:
                known, looked = TombstoneLog(lake).read(), time.monotonic()
            if not known.covers_one(GONE, 1):
                write_records(redis, [(GONE, UserRecord(last_ts=1, seen=("i1",)))], 60)

    worker = threading.Thread(target=take_in)
    worker.start()
    try:
        report = forget_user(small_places, GONE)
    finally:
        ended.set()
        worker.join()
        redis.delete(HEARTBEATS_KEY)
    assert report.removed["redis"] == 1
    assert (report.remaining, redis.exists(user_key(GONE))) == ({}, 0)


@pytest.mark.parametrize("user", ["eve", "}x{", "a*"])
def test_what_a_rebuild_makes_or_left_is_searched_and_a_running_one_is_waited_for(
    small_places: Places, redis: Any, monkeypatch: pytest.MonkeyPatch, user: str
) -> None:
    for area in ("rebuild-0a-", "rebuild-0b-"):
        redis.sadd(REBUILD_AREAS_KEY, area)
        for one in (user, "bob"):
            redis.hset(user_key(one, f"{area}user"), "last", "[]")
    waited: list[float] = []
    monkeypatch.setattr(forget, "time", SimpleNamespace(sleep=waited.append, perf_counter=time.perf_counter))
    assert forget_user(small_places, user).removed == {"redis": 2}
    assert waited == []
    assert redis.exists(user_key("bob", "rebuild-0a-user"), user_key("bob", "rebuild-0b-user")) == 2
    redis.set(REBUILD_LOCK_KEY, "0abcdef0 there 7")
    assert not forget_user(small_places, user).is_known
    assert waited == [REREAD_SECONDS + READ_SECONDS]
    redis.flushall()


def test_a_file_that_nobody_reads_and_one_that_comes_meanwhile_are_searched_too(
    small_places: Places, lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    land(lake, *(event(user, user, "i", HOUR) for user in ("eve", "bob")))
    stray = lake.path("landing", "test", "stray.parquet")
    pq.write_table(event_table(event("e2", "eve", "i", HOUR), event("e3", "bob", "i", HOUR)), stray)
    own, comes = Landing.take_out, iter(["joined"])

    def beside(self: Landing, *args: Any) -> None:
        if name := next(comes, None):
            land(lake, event("e4", "eve", "i", HOUR), name=name)
        own(self, *args)

    monkeypatch.setattr(Landing, "take_out", beside)
    report = forget_user(small_places, "eve")
    assert (report.removed, report.remaining, report.looked_at["landing files"]) == ({"landing": 3}, {}, 3)
    assert pq.read_table(stray)["user_id"].to_pylist() == ["bob"]
    assert sum(file.rows for file in Landing(lake).files()) == 1
