from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import redis as redis_py
from builders import ms
from hypothesis import HealthCheck, given
from hypothesis import settings as property_settings
from hypothesis import strategies as st
from snapshots import make_manifest, make_snapshot, with_two_tower

from recsys_cli.stack import redis_server
from recsys_core.bundle import TRENDING_ITEMS
from recsys_core.events import DAY_MS, now_ms
from recsys_core.features import OnlineFeatures
from recsys_core.lake import Lake, MissingPartition
from recsys_core.online import (
    TRENDING_KEY,
    AnswerEncoder,
    CachedAnswer,
    TrendingValue,
    UserRecord,
    read_records,
    recs_key,
    user_key,
    users_of,
    write_answers,
    write_records,
)
from recsys_core.popularity import TRENDS_SCHEMA
from recsys_core.precompute import (
    CachePlan,
    NewerRecords,
    UnfinishedCaches,
    WriteReport,
    _covered,
    check_day_of_records,
    finish_caches,
    plan_caches,
    read_plan,
    read_samples,
    read_trend,
    shards_done,
    write_online_features,
    write_shards,
    write_trend,
)
from recsys_core.ranking import Snapshot, Trend, rank
from recsys_core.release import Pointer
from recsys_core.settings import Settings
from recsys_core.tables import ACTIVE_USERS, ONLINE_FEATURES
from recsys_core.tombstones import TombstoneLog, hash_of

DAY, HOUR, NEXT_DAY = "2026-03-02", "2026-03-02T10", "2026-03-03"
SNAPSHOT = make_snapshot(items=60, rank=4, unavailable=(0, 7))
VERSION = SNAPSHOT.als_version

ACTION = pa.struct([("item_id", pa.string()), ("event_type", pa.string()), ("ts", pa.int64())])
FEATURES_SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("last", pa.list_(ACTION)),
        ("last_ts", pa.int64()),
        ("seen", pa.list_(pa.string())),
        ("features", pa.string()),
        ("factor", pa.list_(pa.float32())),
    ]
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with redis_server(tmp_path_factory.mktemp("redis")) as url, redis_py.Redis.from_url(url) as client:
        yield client


@pytest.fixture
def redis(server):
    server.flushall()
    return server


def features(user: str, items: list[str], seen: list[str] | None, factor: np.ndarray | None) -> dict:
    last = [{"item_id": item, "event_type": "view", "ts": ms(HOUR) - n} for n, item in enumerate(items)]
    return {
        "user_id": user,
        "last": last,
        "last_ts": ms(HOUR),
        "seen": seen,
        "features": OnlineFeatures(ms(DAY), 90, ms(HOUR), days=((1, len(items)),)).encode().decode(),
        "factor": None if factor is None else factor.tolist(),
    }


USERS = [
    features("ann", ["item-3", "item-13"], ["item-3", "item-13", "item-23"], SNAPSHOT.als_items[3]),
    features("bob", ["item-5"], ["item-5"], SNAPSHOT.als_items[44]),
    features("eve", ["item-8", "gone"], None, None),
    features("zoë {1}", ["item-9"], [], SNAPSHOT.als_items[9]),
]


def write_features(lake: Lake, rows: list[dict] = USERS, day: str = DAY) -> None:
    lake.write(ONLINE_FEATURES, day, pa.Table.from_pylist(rows, schema=FEATURES_SCHEMA))


def write_active(lake: Lake, *users: str) -> None:
    lake.write(ACTIVE_USERS, HOUR, pa.table({"user_id": pa.array(users, pa.string())}))


@pytest.fixture
def settings(settings):
    return settings.model_copy(update={"cache": settings.cache.model_copy(update={"batch_users": 2, "items": 10})})


def plan_of(lake: Lake, settings: Settings, snapshot: Snapshot = SNAPSHOT) -> CachePlan:
    return plan_caches(lake, HOUR, Pointer(snapshot.release_id, "", 0.0), settings, "a run")


def write_step(redis, lake: Lake, plan: CachePlan, step: int, settings: Settings) -> list[int]:
    """The shards that a step writes."""
    return [shard for shard, _ in write_shards(redis, lake, plan, step, SNAPSHOT, no_trend(), settings)]


def write_rec_cache(redis, lake: Lake, snapshot: Snapshot, trend: Trend, settings: Settings) -> WriteReport:
    """All steps, one after another."""
    plan = plan_of(lake, settings, snapshot)
    for step in range(plan.steps):
        for _ in write_shards(redis, lake, plan, step, snapshot, trend, settings):
            pass
    return finish_caches(lake, plan)


def in_steps(settings: Settings, steps: int) -> Settings:
    return settings.model_copy(update={"cache": settings.cache.model_copy(update={"parallel_steps": steps})})


def answer_of(redis, user: str) -> CachedAnswer:
    return CachedAnswer.decode(redis.get(recs_key(user)))


def ranked_for(records: list[UserRecord], settings, trend: Trend) -> list[list[tuple[str, float]]]:
    ranked = rank(SNAPSHOT, trend, users_of(SNAPSHOT, records, SNAPSHOT.ranking), settings.cache.items, SNAPSHOT.ranking)
    return [
        [(SNAPSHOT.item_ids[p], pytest.approx(float(s), abs=1e-6)) for p, s in zip(positions, scores, strict=True) if p >= 0]
        for positions, scores in zip(ranked.positions, ranked.scores, strict=True)
    ]


def no_trend() -> Trend:
    return Trend.of(SNAPSHOT, {})


def test_every_users_record_is_read_back_as_the_table_has_it(redis, lake, settings):
    write_features(lake)
    report = write_online_features(redis, lake, DAY, VERSION, settings)
    assert report.users == 4
    assert redis.dbsize() == 4
    for row, record in zip(USERS, read_records(redis, [row["user_id"] for row in USERS]), strict=True):
        assert record.last == tuple((a["item_id"], a["event_type"], a["ts"]) for a in row["last"])
        assert (record.last_ts, record.seen) == (row["last_ts"], tuple(row["seen"] or ()))
        assert record.features.encode().decode() == row["features"]
        if row["factor"] is None:
            assert (record.als, record.als_version) == (None, "")
        else:
            assert (record.als.tolist(), record.als_version) == (row["factor"], VERSION)


def test_what_is_written_expires(redis, lake, settings):
    write_features(lake)
    write_active(lake, "ann")
    write_online_features(redis, lake, DAY, VERSION, settings)
    write_rec_cache(redis, lake, SNAPSHOT, no_trend(), settings)
    write_trend(redis, TrendingValue(1, HOUR, {}), 60)
    week, day = settings.cache.feature_ttl_seconds, settings.cache.ttl_seconds
    assert (week, day) == (7 * 86_400, 86_400)
    assert week - 60 < redis.ttl(user_key("ann")) <= week
    assert day - 60 < redis.ttl(recs_key("ann")) <= day
    assert 0 < redis.ttl(TRENDING_KEY) <= 60


def test_records_of_a_day_are_refused_when_a_later_one_is_served_and_not_after_a_rollback():
    served = make_manifest(SNAPSHOT)
    check_day_of_records("2025-12-31", "older", None)
    check_day_of_records(served.day, "made again", served)
    check_day_of_records("2026-01-02", "newer", served)
    check_day_of_records("2025-12-31", SNAPSHOT.als_version, served)
    with pytest.raises(NewerRecords, match=f"release {served.release_id} is served; materialize {served.day} instead"):
        check_day_of_records("2025-12-31", "older", served)


def test_the_cached_answers_are_what_the_scoring_path_gives_for_the_records(redis, lake, settings):
    write_features(lake)
    names = [row["user_id"] for row in USERS]
    write_active(lake, *names, "nobody")
    write_online_features(redis, lake, DAY, VERSION, settings)
    trend = Trend.of(SNAPSHOT, {"item-40": 5.0})
    before = now_ms()
    report = write_rec_cache(redis, lake, SNAPSHOT, trend, settings)
    assert (report.users, report.empty) == (5, 0)
    expected = ranked_for(read_records(redis, names), settings, trend)
    for user, items in zip(names, expected, strict=True):
        answer = answer_of(redis, user)
        assert answer.items() == items
        assert len(items) == 10
        assert answer.release_id == SNAPSHOT.release_id
        assert before <= answer.computed_at <= now_ms()
        assert answer.acted == read_records(redis, [user])[0].last_ts > 0
    assert not {item for item, _ in answer_of(redis, "ann").items()} & {"item-3", "item-13", "item-23", "item-0", "item-7"}
    assert len({tuple(item for item, _ in answer_of(redis, user).items()) for user in names}) == 4


def test_a_heavy_user_gets_nothing_again_from_the_caches(redis, lake, settings):
    """The user had 220 of 260 items; a record names 50 of them."""
    release = make_snapshot(items=260, rank=4)
    had = [f"item-{at}" for at in range(220)]
    rows = [features("ann", had[:2], had, release.als_items[3]), features("bob", ["item-5"], ["item-5"], None)]
    write_features(lake, rows)
    write_active(lake, "ann", "bob")
    write_online_features(redis, lake, DAY, VERSION, settings)
    record, other = read_records(redis, ["ann", "bob"])
    assert (record.seen, record.items_had, other.items_had) == (tuple(had[:50]), 220, 1)
    write_rec_cache(redis, lake, release, Trend.of(release, {}), settings)
    answered = [item for item, _ in answer_of(redis, "ann").items()]
    assert len(answered) == 10
    assert not set(answered) & set(had)
    write_features(lake, [features("ann", had[:2], had[:3], None)])
    write_online_features(redis, lake, DAY, VERSION, settings)
    assert [record.items_had for record in read_records(redis, ["ann"])] == [3], "what left the window is forgotten"


def test_what_a_user_did_since_the_night_is_not_in_the_caches_and_the_next_night_takes_it_over(redis, lake, settings):
    release = make_snapshot(items=260, rank=4)
    end = ms(DAY) + DAY_MS
    today = [(f"item-{at}", "view", end + at) for at in range(3, 83, 2)]
    yesterday = [("item-1", "view", end - 1), ("item-2", "view", end - 2)]
    record = UserRecord(last=tuple(sorted([*today, *yesterday], key=lambda action: -action[2])), last_ts=today[-1][2])
    write_records(redis, [("ann", record)], 60)
    write_features(lake, [features("ann", ["item-1", "item-2"], ["item-1", "item-2"], release.als_items[3])])
    write_active(lake, "ann")
    write_online_features(redis, lake, DAY, VERSION, settings)
    [read] = read_records(redis, ["ann"])
    assert sorted(read.last) == sorted(today)
    write_rec_cache(redis, lake, release, Trend.of(release, {}), settings)
    answered = [item for item, _ in answer_of(redis, "ann").items()]
    assert len(answered) == 10
    assert not set(answered) & {item for item, _, _ in [*today, *yesterday]}
    had = [item for item, _, _ in reversed(today)]
    last = [dict(zip(("item_id", "event_type", "ts"), action, strict=True)) for action in reversed(today[-5:])]
    write_features(lake, [{**features("ann", [], had, None), "last": last}], NEXT_DAY)
    write_online_features(redis, lake, NEXT_DAY, VERSION, settings)
    [read] = read_records(redis, ["ann"])
    assert [item for item, _, _ in read.last] == had[:5]
    assert read.seen == tuple(had)


def test_a_release_with_a_user_tower_is_ranked_with_the_features_of_the_records(redis, lake, settings):
    towers, now = with_two_tower(SNAPSHOT), now_ms()
    recent = OnlineFeatures(now, 90, now - 1000, hours=((1, 5),), days=((1, 5),)).encode().decode()
    write_features(lake, [{**USERS[0], "features": recent}])
    write_active(lake, "ann")
    write_online_features(redis, lake, DAY, VERSION, settings)
    write_rec_cache(redis, lake, towers, Trend.of(towers, {}), settings)
    answer = answer_of(redis, "ann")

    def expected(features: bool) -> list[tuple[str, float]]:
        records = read_records(redis, ["ann"], features)
        state = users_of(towers, records, towers.ranking, user_ids=["ann"], now=answer.computed_at)
        ranked = rank(towers, Trend.of(towers, {}), state, settings.cache.items, towers.ranking)
        return [(towers.item_ids[p], float(s)) for p, s in zip(ranked.positions[0], ranked.scores[0], strict=True)]

    (whole,), (short,) = read_records(redis, ["ann"]), read_records(redis, ["ann"], features=False)
    assert (short.features, short.last, short.seen, short.als.tolist()) == (None, whole.last, whole.seen, whole.als.tolist())
    assert answer.items() == [(item, pytest.approx(score, abs=1e-6)) for item, score in expected(features=True)]
    assert answer.items() != [(item, pytest.approx(score, abs=1e-6)) for item, score in expected(features=False)]


def test_samples_show_the_last_items_beside_the_first_recommended(redis, lake, settings):
    write_features(lake)
    write_active(lake, "ann", "nobody")
    write_online_features(redis, lake, DAY, VERSION, settings)
    write_rec_cache(redis, lake, SNAPSHOT, no_trend(), settings)
    ann, nobody = read_samples(redis, lake, HOUR)
    assert (ann.user_id, ann.last) == ("ann", ("item-3", "item-13"))
    assert list(ann.recommended) == [item for item, _ in answer_of(redis, "ann").items()[:5]]
    assert (nobody.last, len(nobody.recommended)) == ((), 5)
    write_active(lake, *(f"guest-{n}" for n in range(20)))
    assert [(s.user_id, s.recommended) for s in read_samples(redis, lake, HOUR)] == [(f"guest-{n}", ()) for n in range(10)]


@pytest.mark.parametrize("known", [True, False], ids=["with a record", "without one"])
def test_a_user_who_is_forgotten_while_the_caches_are_made_is_not_in_them(redis, lake, settings, monkeypatch, known):
    write_active(lake, "ann", "bob")
    write_records(redis, [("ann", UserRecord(last_ts=1))] + [("bob", UserRecord(last_ts=1))] * known, 60)

    def forgotten_meanwhile(*args, **kwargs):
        ranked = rank(*args, **kwargs)
        TombstoneLog(lake).add(hash_of("bob"), now_ms())
        redis.delete(user_key("bob"))
        redis.delete(recs_key("bob"))
        return ranked

    monkeypatch.setattr("recsys_core.precompute.rank", forgotten_meanwhile)
    write_rec_cache(redis, lake, SNAPSHOT, no_trend(), settings)
    assert redis.exists(recs_key("ann"))
    assert not redis.exists(recs_key("bob"), user_key("bob"))


def test_an_older_answer_of_the_caches_does_not_replace_a_newer_one(redis, lake, settings):
    write_active(lake, "ann")
    newer = AnswerEncoder("now", SNAPSHOT.item_ids).encode(np.array([[5]]), np.ones((1, 1), np.float32), now_ms() + 30_000)
    write_answers(redis, [("ann", *newer)], 60)
    write_rec_cache(redis, lake, SNAPSHOT, no_trend(), settings)
    assert answer_of(redis, "ann").release_id == "now"


GUESTS = [f"guest-{n}" for n in range(60)]


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """Users in the order in which their answers are written. Once `limit` is set the writer dies beyond it."""
    found = Written()

    def write(redis, answers, ttl_seconds):
        answers = list(answers)
        if len(found) >= found.limit:
            raise ConnectionError("the pod was killed")
        found.extend(user for user, _ in answers)
        return write_answers(redis, answers, ttl_seconds)

    monkeypatch.setattr("recsys_core.precompute.write_answers", write)
    return found


class Written(list):
    limit = 1_000_000


def test_a_run_that_broke_off_goes_on_with_the_shards_that_were_not_done(redis, lake, settings, written):
    write_active(lake, *GUESTS)
    written.limit = 20
    with pytest.raises(ConnectionError):
        write_rec_cache(redis, lake, SNAPSHOT, no_trend(), settings)
    before = len(written)
    assert 20 <= before < 60
    done = shards_done(lake, read_plan(lake))
    assert 0 < len(done) < settings.cache.shards
    written.limit = 1_000_000
    report = write_rec_cache(redis, lake, SNAPSHOT, no_trend(), settings)
    assert report.users == 60
    assert set(written) == set(GUESTS)
    assert len(written) == before + 60 - sum(shard.users for shard in done.values())
    written.clear()
    assert write_rec_cache(redis, lake, SNAPSHOT, no_trend(), settings).users == 60
    assert len(written) == 60, "a run after a finished one does it all again"


@pytest.mark.parametrize("steps", [1, 2, 3, 100])
def test_steps_share_the_shards_and_write_every_user_once(redis, lake, settings, written, steps):
    write_active(lake, *GUESTS)
    plan = plan_of(lake, in_steps(settings, steps))
    assert plan.steps == min(steps, settings.cache.shards)
    of_steps = [write_step(redis, lake, plan, step, settings) for step in range(plan.steps)]
    assert sorted(shard for shards in of_steps for shard in shards) == list(range(settings.cache.shards))
    assert max(map(len, of_steps)) - min(map(len, of_steps)) <= 1
    assert sorted(written) == sorted(GUESTS)
    assert finish_caches(lake, plan).users == 60


def test_a_retried_step_does_the_rest_of_its_own_shards_and_no_other(redis, lake, settings, written):
    write_active(lake, *GUESTS)
    plan = plan_of(lake, in_steps(settings, 2))
    write_step(redis, lake, plan, 1, settings)
    of_other = len(written)
    written.limit = of_other + 10
    with pytest.raises(ConnectionError):
        write_step(redis, lake, plan, 0, settings)
    done = shards_done(lake, plan)
    assert {1, 3, 5, 7} < set(done) < set(range(8))
    with pytest.raises(UnfinishedCaches, match=f"caches of {HOUR}: shards .* of 8 were not written"):
        finish_caches(lake, plan)
    written.limit = 1_000_000
    assert write_step(redis, lake, plan, 0, settings) == sorted(set(range(8)) - set(done))
    assert shards_done(lake, plan).items() >= done.items()
    assert finish_caches(lake, plan).users == 60


@pytest.mark.parametrize("changed", ["users", "release"])
def test_nothing_of_a_broken_off_run_counts_for_other_users_or_another_release(redis, lake, settings, written, changed):
    write_active(lake, *GUESTS)
    plan = plan_of(lake, in_steps(settings, 2))
    write_step(redis, lake, plan, 0, settings)
    written.clear()
    if changed == "users":
        write_active(lake, *GUESTS[:-1])
    other = SNAPSHOT if changed == "users" else replace(SNAPSHOT, release_id="another")
    report = write_rec_cache(redis, lake, other, no_trend(), in_steps(settings, 2))
    assert report.users == len(written) == (59 if changed == "users" else 60)
    assert answer_of(redis, GUESTS[0]).release_id == other.release_id


def test_a_step_ends_where_another_plan_has_taken_the_place_of_its_own(redis, lake, settings, written):
    write_active(lake, *GUESTS)
    old = plan_of(lake, settings)
    shards = write_shards(redis, lake, old, 0, SNAPSHOT, no_trend(), settings)
    next(shards)
    plan_of(lake, settings, replace(SNAPSHOT, release_id="another"))
    before = len(written)
    assert list(shards) == []
    assert len(written) == before
    with pytest.raises(UnfinishedCaches):
        finish_caches(lake, old)


def test_the_rate_counts_the_time_in_which_any_step_wrote():
    assert _covered([(10, 12), (11, 13), (20, 21)]) == 4
    assert _covered([(11, 12), (10, 15)]) == 5
    assert _covered([]) == 0


def test_factors_of_another_fit_than_the_releases_are_not_used_with_it(redis, lake, settings):
    write_features(lake)
    write_active(lake, "bob")
    write_online_features(redis, lake, DAY, VERSION, settings)
    write_rec_cache(redis, lake, SNAPSHOT, no_trend(), settings)
    right = answer_of(redis, "bob").items()
    write_online_features(redis, lake, DAY, "factors-2", settings)
    write_rec_cache(redis, lake, SNAPSHOT, no_trend(), settings)
    (record,) = read_records(redis, ["bob"])
    assert record.als_version == "factors-2"
    without = UserRecord(record.last, record.last_ts, record.seen)
    assert [answer_of(redis, "bob").items()] == ranked_for([without], settings, no_trend())
    assert answer_of(redis, "bob").items() != right


def test_a_factor_that_was_not_renewed_keeps_the_version_it_was_made_with(redis, lake, settings):
    write_features(lake)
    write_online_features(redis, lake, DAY, VERSION, settings)
    write_features(lake, [{**USERS[0], "factor": None}])
    write_online_features(redis, lake, DAY, "factors-2", settings)
    (record,) = read_records(redis, ["ann"])
    assert record.als_version == VERSION


def test_an_active_user_without_a_record_gets_what_is_popular(redis, lake, settings):
    write_active(lake, "nobody")
    write_rec_cache(redis, lake, SNAPSHOT, no_trend(), settings)
    popular = [SNAPSHOT.item_ids[p] for p in SNAPSHOT.by_popularity[:10]]
    assert [item for item, _ in answer_of(redis, "nobody").items()] == popular
    assert "item-0" not in popular


def test_users_for_whom_nothing_is_left_get_an_empty_answer_and_are_counted(redis, lake, settings):
    everything = make_snapshot(items=12, rank=4, unavailable=tuple(range(12)))
    write_active(lake, "ann", "bob", "eve")
    report = write_rec_cache(redis, lake, everything, Trend.of(everything, {}), settings)
    assert (report.users, report.empty) == (3, 3)
    assert answer_of(redis, "eve").items() == []


def test_no_active_user_writes_nothing_and_a_missing_table_is_named(redis, lake, settings):
    with pytest.raises(MissingPartition, match=f"'active_users' .* {HOUR}"):
        write_rec_cache(redis, lake, SNAPSHOT, no_trend(), settings)
    lake.publish_staged(ACTIVE_USERS, lake.stage(ACTIVE_USERS), "none", {HOUR: (0, "empty")})
    assert write_rec_cache(redis, lake, SNAPSHOT, no_trend(), settings).users == 0
    assert redis.dbsize() == 0


def test_what_is_summed_up_late_does_not_take_the_place_of_a_newer_plan(redis, lake, settings):
    write_active(lake, "nobody")
    old = plan_of(lake, settings)
    write_step(redis, lake, old, 0, settings)
    new = plan_of(lake, settings, replace(SNAPSHOT, release_id="another"))
    assert finish_caches(lake, old).users == 1
    assert read_plan(lake) == new


def test_trending_items_reach_serving_as_the_table_has_them(redis, lake):
    rows = [
        {"item_id": "b", "score": 2.5, "events": 3, "scores": [2.5, 1.0]},
        {"item_id": "ä", "score": 1.0, "events": 1, "scores": [1.0, 0.5]},
    ]
    lake.write(TRENDING_ITEMS, HOUR, pa.Table.from_pylist(rows, schema=TRENDS_SCHEMA))
    write_trend(redis, read_trend(lake, HOUR), 60)
    found = TrendingValue.decode(redis.get(TRENDING_KEY))
    assert (found.hour, list(found.scores.items())) == (HOUR, [("b", (2.5, 1.0)), ("ä", (1.0, 0.5))])
    lake.write(TRENDING_ITEMS, HOUR, TRENDS_SCHEMA.empty_table())
    assert read_trend(lake, HOUR).scores == {}


# -- one bad record among good ones -------------------------------------------------------------------------------------

MANY = [f"u{n}" for n in range(40)]
SOUND = [features(user, [f"item-{n}"], [f"item-{n}"], SNAPSHOT.als_items[n]) for n, user in enumerate(MANY)]


def break_last(redis, key: str) -> None:
    redis.hset(key, "last", "{")


def break_last_ts(redis, key: str) -> None:
    redis.hset(key, "last_ts", "soon")


def far_future(redis, key: str) -> None:
    redis.hset(key, "last_ts", "9" * 400)


def other_type(redis, key: str) -> None:
    redis.delete(key)
    redis.set(key, "x")


def odd_action(redis, key: str) -> None:
    redis.hset(key, "last", '[["item-3","view",1e300]]')


def cut_factor(redis, key: str) -> None:
    redis.hset(key, "als", VERSION.encode() + b"\0abc")


BREAKS = [break_last, break_last_ts, far_future, other_type, odd_action, cut_factor]


@pytest.mark.parametrize("broken", BREAKS)
def test_one_unreadable_record_is_left_out_and_named_and_the_rest_go_on(redis, lake, settings, caplog, broken):
    write_features(lake, SOUND)
    write_active(lake, *MANY)
    write_online_features(redis, lake, DAY, VERSION, settings)
    broken(redis, user_key("u7"))
    report = write_rec_cache(redis, lake, SNAPSHOT, no_trend(), settings)
    assert (report.users, sum(report.left_out.values())) == (39, 1)
    assert {key.decode() for key in redis.scan_iter("recs:*")} == {recs_key(user) for user in MANY if user != "u7"}
    assert "user 'u7' is left out: user record" in caplog.text
    assert "u7" not in str(report)
    assert ("u7", ()) in [(s.user_id, s.recommended) for s in read_samples(redis, lake, HOUR)]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_a_factor_that_is_not_finite_is_none(redis, lake, settings, value):
    write_features(lake, SOUND)
    write_active(lake, *MANY)
    write_online_features(redis, lake, DAY, VERSION, settings)
    redis.hset(user_key("u7"), "als", VERSION.encode() + b"\0" + np.array([value, 1, 1, 1], "<f4").tobytes())
    (record,) = read_records(redis, ["u7"])
    assert (record.als, record.als_version) == (None, "")
    report = write_rec_cache(redis, lake, SNAPSHOT, no_trend(), settings)
    assert (report.users, report.left_out) == (40, {})
    assert answer_of(redis, "u7").items() == ranked_for([record], settings, no_trend())[0]


CHOSEN = st.dictionaries(st.sampled_from(MANY), st.sampled_from(BREAKS), max_size=12)


@property_settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CHOSEN, st.integers(1, 50))
def test_whichever_records_are_broken_the_others_get_what_they_would_have_got(server, settings, tmp_path_factory, chosen, size):
    server.flushall()
    lake = Lake(str(tmp_path_factory.mktemp("lake")))
    settings = settings.model_copy(update={"cache": settings.cache.model_copy(update={"batch_users": size})})
    write_features(lake, SOUND)
    write_active(lake, *MANY)
    write_online_features(server, lake, DAY, VERSION, settings)
    records = read_records(server, MANY)
    for user, broken in chosen.items():
        broken(server, user_key(user))
    report = write_rec_cache(server, lake, SNAPSHOT, no_trend(), settings)
    assert (report.users, sum(report.left_out.values())) == (40 - len(chosen), len(chosen))
    expected = dict(zip(MANY, ranked_for(records, settings, no_trend()), strict=True))
    assert {user: answer_of(server, user).items() for user in MANY if server.exists(recs_key(user))} == {
        user: answer for user, answer in expected.items() if user not in chosen
    }


def test_a_user_for_whom_ranking_fails_is_left_out_alone(redis, lake, settings, monkeypatch):
    """As by a value that no check foresaw."""
    write_features(lake, SOUND)
    write_active(lake, *MANY)
    write_online_features(redis, lake, DAY, VERSION, settings)

    def users(snapshot, records, *args, user_ids, **more):
        if "u7" in user_ids:
            raise OverflowError("Python int too large to convert to C long")
        return users_of(snapshot, records, *args, user_ids=user_ids, **more)

    monkeypatch.setattr("recsys_core.precompute.users_of", users)
    report = write_rec_cache(redis, lake, SNAPSHOT, no_trend(), settings)
    assert (report.users, report.left_out) == (39, {"Python int too large to convert to C long": 1})


def test_ranking_that_fails_for_everybody_is_an_error(redis, lake, settings, monkeypatch):
    write_active(lake, *MANY)
    monkeypatch.setattr("recsys_core.precompute.rank", lambda *_: int("broken release"))
    with pytest.raises(ValueError, match="broken release"):
        write_rec_cache(redis, lake, SNAPSHOT, no_trend(), settings)


def test_redis_that_refuses_all_reads_is_an_error_and_no_bad_record(redis, lake, settings):
    write_active(lake, *MANY)
    redis.execute_command("ACL", "SETUSER", "reader", "on", "nopass", "~*", "+@all", "-hmget")
    where = {name: redis.connection_pool.connection_kwargs[name] for name in ("host", "port")}
    refused = redis_py.Redis(**where, username="reader", password="any")
    with pytest.raises(redis_py.ResponseError, match="no permissions"):
        write_rec_cache(refused, lake, SNAPSHOT, no_trend(), settings)


def test_a_bad_row_of_a_night_is_left_out_and_a_key_that_holds_no_record_becomes_one(redis, lake, settings, caplog):
    bad = [{**SOUND[0], "user_id": "bad", "features": "{"}, {**SOUND[0], "user_id": "nan", "factor": [np.nan] * 4}]
    write_features(lake, [*SOUND, *bad])
    redis.set(user_key("u3"), "a string")
    report = write_online_features(redis, lake, DAY, VERSION, settings)
    assert (report.users, sum(report.left_out.values())) == (41, 1)
    assert "user 'bad' is left out" in caplog.text
    u3, nan = read_records(redis, ["u3", "nan"])
    assert (u3.last[0][0], nan.als) == ("item-3", None)


def test_bad_scores_of_a_trending_item_are_left_out_alone(lake):
    rows = [("a", [1.0, 2.0]), ("b", [float("nan"), 1.0]), ("c", [3.0, float("inf")]), ("d", [4.0, 5.0])]
    table = [{"item_id": item, "score": 1.0, "events": 1, "scores": scores} for item, scores in rows]
    lake.write(TRENDING_ITEMS, HOUR, pa.Table.from_pylist(table, schema=TRENDS_SCHEMA))
    sound = {"a": (1.0, 2.0), "d": (4.0, 5.0)}
    assert read_trend(lake, HOUR).scores == sound
    value = b'{"computed_at": 1, "hour": "h", "items": [["a",1,2],["b",null,1],["c","x",1],[7,1,1],["e",1],"f",[],["d",4,5]]}'
    assert TrendingValue.decode(value).scores == sound


def test_a_shard_that_an_older_plan_wrote_late_is_noted_by_the_newer_one(redis, lake, settings):
    """The older run notes a shard while the newer one works on it; the newer one still ends whole."""
    write_active(lake, *MANY)
    older = plan_of(lake, settings)
    newer = plan_caches(lake, HOUR, Pointer("another", "", 0.0), settings, "another run")
    steps = write_shards(redis, lake, newer, 0, SNAPSHOT, no_trend(), settings)
    assert write_step(redis, lake, older, 0, settings) == [], "the older run stops"
    for step in range(newer.steps):
        for _ in steps if step == 0 else write_shards(redis, lake, newer, step, SNAPSHOT, no_trend(), settings):
            pass
    assert finish_caches(lake, newer).users == 40
    assert read_plan(lake).finished
