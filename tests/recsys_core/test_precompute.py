import numpy as np
import pyarrow as pa
import pytest
import redis as redis_py
from builders import ms
from snapshots import make_snapshot

from recsys_cli.stack import redis_server
from recsys_core.bundle import TRENDING_ITEMS
from recsys_core.events import now_ms
from recsys_core.features import OnlineFeatures
from recsys_core.lake import Lake, MissingPartition
from recsys_core.online import (
    TRENDING_KEY,
    CachedAnswer,
    TrendingValue,
    UserRecord,
    read_records,
    recs_key,
    user_key,
    users_of,
    write_answers,
)
from recsys_core.popularity import TRENDS_SCHEMA
from recsys_core.precompute import read_trend, write_online_features, write_rec_cache, write_trend
from recsys_core.ranking import Trend, rank
from recsys_core.tables import ACTIVE_USERS, ONLINE_FEATURES

DAY, HOUR = "2026-03-02", "2026-03-02T10"
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


def write_features(lake: Lake, rows: list[dict] = USERS) -> None:
    lake.write(ONLINE_FEATURES, DAY, pa.Table.from_pylist(rows, schema=FEATURES_SCHEMA))


def write_active(lake: Lake, *users: str) -> None:
    lake.write(ACTIVE_USERS, HOUR, pa.table({"user_id": pa.array(users, pa.string())}))


@pytest.fixture
def settings(settings):
    return settings.model_copy(update={"cache": settings.cache.model_copy(update={"batch_users": 2, "items": 10})})


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
    write_rec_cache(redis, lake, HOUR, SNAPSHOT, no_trend(), settings)
    write_trend(redis, TrendingValue(1, HOUR, {}), 60)
    week, day = settings.cache.feature_ttl_seconds, settings.cache.ttl_seconds
    assert (week, day) == (7 * 86_400, 86_400)
    assert week - 60 < redis.ttl(user_key("ann")) <= week
    assert day - 60 < redis.ttl(recs_key("ann")) <= day
    assert 0 < redis.ttl(TRENDING_KEY) <= 60


def test_the_cached_answers_are_what_the_scoring_path_gives_for_the_records(redis, lake, settings):
    write_features(lake)
    names = [row["user_id"] for row in USERS]
    write_active(lake, *names, "nobody")
    write_online_features(redis, lake, DAY, VERSION, settings)
    trend = Trend.of(SNAPSHOT, {"item-40": 5.0})
    before = now_ms()
    report = write_rec_cache(redis, lake, HOUR, SNAPSHOT, trend, settings)
    assert (report.users, report.empty) == (5, 0)
    expected = ranked_for(read_records(redis, names), settings, trend)
    for user, items in zip(names, expected, strict=True):
        answer = answer_of(redis, user)
        assert answer.items() == items
        assert len(items) == 10
        assert answer.release_id == SNAPSHOT.release_id
        assert before <= answer.computed_at <= now_ms()
    assert not {item for item, _ in answer_of(redis, "ann").items()} & {"item-3", "item-13", "item-23", "item-0", "item-7"}
    assert len({tuple(item for item, _ in answer_of(redis, user).items()) for user in names}) == 4


def test_samples_show_the_last_items_beside_the_first_recommended(redis, lake, settings):
    write_features(lake)
    write_active(lake, "ann")
    write_online_features(redis, lake, DAY, VERSION, settings)
    (sample,) = write_rec_cache(redis, lake, HOUR, SNAPSHOT, no_trend(), settings).samples
    assert (sample.user_id, sample.last) == ("ann", (3, 13))
    assert [SNAPSHOT.item_ids[p] for p in sample.recommended] == [i for i, _ in answer_of(redis, "ann").items()[:5]]
    write_active(lake, *(f"guest-{n}" for n in range(20)))
    assert len(write_rec_cache(redis, lake, HOUR, SNAPSHOT, no_trend(), settings).samples) == 10


def test_a_run_that_broke_off_goes_on_with_the_shards_that_were_not_done(redis, lake, settings, monkeypatch):
    names = [f"guest-{n}" for n in range(60)]
    write_active(lake, *names)
    written: list[str] = []

    def breaks(redis, answers, ttl_seconds):
        answers = list(answers)
        if len(written) > 20 and not written_again:
            raise ConnectionError("the pod was killed")
        written.extend(user for user, _ in answers)
        return write_answers(redis, answers, ttl_seconds)

    written_again: list[bool] = []
    monkeypatch.setattr("recsys_core.precompute.write_answers", breaks)
    with pytest.raises(ConnectionError):
        write_rec_cache(redis, lake, HOUR, SNAPSHOT, no_trend(), settings)
    before = len(written)
    assert 0 < before < 60
    written_again.append(True)
    report = write_rec_cache(redis, lake, HOUR, SNAPSHOT, no_trend(), settings)
    assert report.users == 60
    assert set(written) == set(names)
    assert len(written) < before + 60
    written.clear()
    assert write_rec_cache(redis, lake, HOUR, SNAPSHOT, no_trend(), settings).users == 60
    assert len(written) == 60


def test_factors_of_another_fit_than_the_releases_are_not_used_with_it(redis, lake, settings):
    write_features(lake)
    write_active(lake, "bob")
    write_online_features(redis, lake, DAY, VERSION, settings)
    write_rec_cache(redis, lake, HOUR, SNAPSHOT, no_trend(), settings)
    right = answer_of(redis, "bob").items()
    write_online_features(redis, lake, DAY, "factors-2", settings)
    write_rec_cache(redis, lake, HOUR, SNAPSHOT, no_trend(), settings)
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
    write_rec_cache(redis, lake, HOUR, SNAPSHOT, no_trend(), settings)
    popular = [SNAPSHOT.item_ids[p] for p in SNAPSHOT.by_popularity[:10]]
    assert [item for item, _ in answer_of(redis, "nobody").items()] == popular
    assert "item-0" not in popular


def test_users_for_whom_nothing_is_left_get_an_empty_answer_and_are_counted(redis, lake, settings):
    everything = make_snapshot(items=12, rank=4, unavailable=tuple(range(12)))
    write_active(lake, "ann", "bob", "eve")
    report = write_rec_cache(redis, lake, HOUR, everything, Trend.of(everything, {}), settings)
    assert (report.users, report.empty) == (3, 3)
    assert answer_of(redis, "eve").items() == []


def test_no_active_user_writes_nothing_and_a_missing_table_is_named(redis, lake, settings):
    with pytest.raises(MissingPartition, match=f"'active_users' .* {HOUR}"):
        write_rec_cache(redis, lake, HOUR, SNAPSHOT, no_trend(), settings)
    lake.publish_staged(ACTIVE_USERS, lake.stage(ACTIVE_USERS), "none", {HOUR: (0, "empty")})
    assert write_rec_cache(redis, lake, HOUR, SNAPSHOT, no_trend(), settings).users == 0
    assert redis.dbsize() == 0


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
