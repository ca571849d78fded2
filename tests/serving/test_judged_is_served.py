"""What the evaluation judged is what the server answers and what the caches hold, item by item."""

from __future__ import annotations

import io
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import INTERACTIONS_SCHEMA, ms, write_clicks
from towers import make_tower
from waiting import eventually
from worlds import World

from recsys_core.als import read_factors
from recsys_core.bundle import ALS_FACTORS, POPULAR_ITEMS, TRENDING_ITEMS, assemble, build_item_index, fit_als_factors
from recsys_core.catalog import CATALOG_SCHEMA, merge_catalog
from recsys_core.evaluation import SERVED, compare, evaluate_snapshot
from recsys_core.events import DAY_MS, HOUR_MS, MINUTE_MS, hour_keys
from recsys_core.features import USER_FEATURES, user_summaries
from recsys_core.holdout import TWO_TOWER, Past, Split, aligned, fit_holdout, time_split, trend_then, users_then
from recsys_core.index import unit_rows
from recsys_core.lake import Lake
from recsys_core.live import UPDATE, LiveEvent, UserWriter, few_user_updates
from recsys_core.online import LAST_ACTIONS, CachedAnswer, recs_key
from recsys_core.popularity import popular_items, trending_items
from recsys_core.precompute import plan_caches, read_trend, write_online_features, write_shards, write_trend
from recsys_core.ranking import Snapshot, Trend, rank
from recsys_core.redis_client import run_calls
from recsys_core.settings import RankingSettings, Settings
from recsys_core.tables import ACTIVE_USERS, CLICKS_HOURLY, INTERACTIONS, ONLINE_FEATURES
from recsys_core.tower import npy_bytes
from recsys_core.tuning import SEED_BLEND, Tuned
from serving import recsys_pb2 as pb
from serving.recsys_pb2_grpc import RecommenderStub

BEFORE, DAY, LAST_HOUR = "2026-03-01", "2026-03-02", "2026-03-01T23"
MIDNIGHT = ms(DAY)
USERS, ITEMS, HEAVY, KEPT = 40, 700, 8, 50
"""The first HEAVY users had several hundred items each, more than a record names."""
UNAVAILABLE = range(0, ITEMS, 3)


def item(number: int) -> str:
    return f"item-{number}"


def events() -> list[tuple[str, str, int]]:
    """User, item and time (ms), each time once: three days, in which users come back to items, and the day after them."""
    random = np.random.default_rng(7)
    found = []
    for user in range(USERS):
        taste = np.exp(-((np.arange(ITEMS) - ITEMS * user / USERS) ** 2) / (2 * 120.0**2)) + 0.02
        count = int(random.integers(260, 420)) if user < HEAVY else int(random.integers(2, 90))
        items = random.choice(ITEMS, count + 6, replace=False, p=taste / taste.sum())
        before = np.concatenate([items[:count], random.choice(items[:count], count // 4)])
        times = MIDNIGHT - 1 - random.choice(3 * DAY_MS, len(before), replace=False)
        found += [(f"u{user}", item(i), int(ts)) for i, ts in zip(before, times, strict=True)]
        found += [(f"u{user}", item(i), MIDNIGHT + 3 * HOUR_MS + user) for i in items[count:]]
    return found


def write_window(lake: Lake, rows: list[tuple[str, str, int]]) -> None:
    """`interactions` of the day before, as they are made of the clicks."""
    pairs: dict[tuple[str, str], list[int]] = {}
    for user, name, ts in sorted(rows, key=lambda row: row[2]):
        if ts < MIDNIGHT:
            pairs.setdefault((user, name), []).append(ts)
    table = [
        {
            "user_id": user,
            "item_id": name,
            "weight": sum(2 ** ((ts - MIDNIGHT) / (30 * DAY_MS)) for ts in times),
            "n_events": len(times),
            "first_ts": times[0],
            "last_ts": times[-1],
        }
        for (user, name), times in pairs.items()
    ]
    lake.write(INTERACTIONS, BEFORE, pa.Table.from_pylist(table, schema=INTERACTIONS_SCHEMA))


def write_users(lake: Lake, rows: list[tuple[str, str, int]], settings: Settings) -> None:
    """`user_features` and `online_features` of the day before, without Spark."""
    known = [row for row in sorted(rows, key=lambda row: (row[0], row[2])) if row[2] < MIDNIGHT]
    user_ids, items, times = map(list, zip(*known, strict=True))
    count, nothing = len(known), pa.nulls(len(known), pa.string())
    columns = {"user_id": user_ids, "item_id": items, "event_type": ["view"] * count, "ts": times, "weight": [1.0] * count}
    batch = pa.RecordBatch.from_pydict({**columns, "category": nothing, "device": nothing, "country": nothing})
    kept = settings.features.history, settings.ranking.last_items, settings.ranking.max_consumed
    summaries = pa.Table.from_batches(list(user_summaries([batch], [MIDNIGHT], settings.interactions.window_days, *kept)))
    lake.write(USER_FEATURES, BEFORE, summaries)
    factors = lake.read(f"{ALS_FACTORS}_users", BEFORE)
    of_user = dict(zip(factors["id"].to_pylist(), factors["factor"].to_pylist(), strict=True))
    factor = pa.array([of_user.get(user) for user in summaries["user_id"].to_pylist()], pa.list_(pa.float32()))
    wanted = summaries.select(["user_id", "last", "last_ts", "seen", "features"])
    lake.write(ONLINE_FEATURES, BEFORE, wanted.append_column("factor", factor))


def write_towers(lake: Lake) -> None:
    """A two-tower model of the day before, without any sense."""
    names = [item(number) for number in range(ITEMS)]
    tower = make_tower([f"u{user}" for user in range(0, USERS, 2)], names)
    vectors = unit_rows(np.random.default_rng(0).normal(size=(ITEMS, tower.dimension)))
    ids = io.BytesIO()
    pq.write_table(pa.table({"item_id": names}), ids)
    files = {"items.parquet": ids.getvalue(), "items.npy": npy_bytes(vectors), **tower.to_files()}
    lake.write_blobs(TWO_TOWER, BEFORE, files, ITEMS)


@dataclass
class Night:
    """A night after which the lake has been judged and its release can be served."""

    lake: Lake
    settings: Settings
    snapshot: Snapshot
    split: Split
    judged: dict[str, list[str]]
    metrics: dict[str, float]


ALS = {"rank": 8, "iterations": 3, "half_lives_days": [30.0], "relative_regularizations": [1e-3]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lake of a night, its users' tables and a two-tower model left out."""
    folder = tmp_path_factory.mktemp("night")
    lake, rows, settings = Lake(str(folder)), events(), Settings(als=ALS)
    write_clicks(lake, [(user, name, np.datetime64(ts, "ms").astype(str)) for user, name, ts in rows])
    write_window(lake, rows)
    catalogue = [{"item_id": item(n), "category": f"c{n % 5}", "available": n not in UNAVAILABLE} for n in range(ITEMS)]
    merge_catalog(lake, pa.Table.from_pylist(catalogue, schema=CATALOG_SCHEMA))
    fit_als_factors(lake, BEFORE, settings, None, "numpy")
    build_item_index(lake, BEFORE, settings)
    window = lake.dataset(INTERACTIONS, [BEFORE])
    assert window is not None
    lake.write(POPULAR_ITEMS, BEFORE, popular_items(window))
    clicks = lake.dataset(CLICKS_HOURLY, hour_keys(MIDNIGHT - DAY_MS, MIDNIGHT), missing_ok=True)
    assert clicks is not None
    trends = settings.trends
    lake.write(
        TRENDING_ITEMS,
        LAST_HOUR,
        trending_items(clicks, MIDNIGHT, settings.events.weights, trends.half_lives_hours, trends.top),
    )
    return folder


def night(made: Path, folder: Path, settings: Settings, towers: bool, **changes: object) -> Night:
    ranking = RankingSettings(als_weight=0.5, two_tower_weight=0.4, session_weight=0.3, trend_weight=0.2, **changes)
    settings = settings.model_copy(update={"ranking": ranking, "als": Settings(als=ALS).als})
    lake = Lake(str(shutil.copytree(made, folder / "lake")))
    write_users(lake, events(), settings)
    if towers:
        write_towers(lake)
    split = time_split(lake, BEFORE, DAY, settings)
    report = fit_holdout(lake, BEFORE, DAY, settings, None, "numpy")
    found = compare(lake, DAY, split, report, Tuned(ranking, 0.0, 0.0, SEED_BLEND, 0, 0, 0.0), settings)
    judged = {
        user: [split.items[at] for at in row if at >= 0]
        for user, row in zip(split.users.tolist(), found.recommended[SERVED], strict=True)
    }
    snapshot = replace(assemble(lake, BEFORE, "2026-03-01.a", settings).snapshot, ranking=ranking)
    return Night(lake, settings, snapshot, split, judged, found.metrics[SERVED])


def had(one: Night, user: str) -> set[str]:
    row = one.split.seen[one.split.users.tolist().index(user)]
    return {one.split.items[at] for at in row.indices}


def under_a_filter(one: Night, trend: Trend, category: str) -> dict[str, list[str]]:
    """What the evaluation would judge if every user asked for one category."""
    return ranked_then(one, trend, KEPT, one.snapshot.in_categories([category]))


def ranked_then(one: Night, trend: Trend, count: int, allowed: np.ndarray | None = None) -> dict[str, list[str]]:
    """What the release gives to the users as they were at midnight."""
    split, snapshot = one.split, one.snapshot
    factors = aligned(read_factors(one.lake, ALS_FACTORS, BEFORE, "users", split.users), split.users)
    past = Past(split.users, factors, split.items, split.seen, MIDNIGHT)
    users = users_then(one.lake, snapshot, past, snapshot.ranking, one.settings)
    ranked = rank(snapshot, trend, users, count, snapshot.ranking, allowed)
    return {
        user: [snapshot.item_ids[at] for at in row if at >= 0]
        for user, row in zip(split.users.tolist(), ranked.positions, strict=True)
    }


@pytest.mark.parametrize("towers", [False, True])
def test_the_server_and_the_caches_answer_what_the_evaluation_judged(
    made: Path, empty_world: World, tmp_path: Path, towers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = night(made, tmp_path, empty_world.settings, towers)
    heavy = [user for user in one.judged if len(had(one, user)) > 250]
    assert len(heavy) >= 5
    gone = {item(number) for number in UNAVAILABLE}
    for user, items in one.judged.items():
        assert len(items) == KEPT
        assert not set(items) & (had(one, user) | gone)
    redis, world = empty_world.redis.client, empty_world
    version = one.lake.get(ALS_FACTORS, BEFORE).data_version
    write_online_features(redis, one.lake, BEFORE, version, one.settings)
    trending = read_trend(one.lake, LAST_HOUR)
    write_trend(redis, trending, 3600)
    pointer = world.promote(one.snapshot)
    world.start()
    trend = Trend.of(one.snapshot, trending.scores)
    strongest = one.snapshot.item_ids[trend.order[0]]
    eventually(lambda: [found.item_id for found in world.client.trending(1)] == [strongest])
    tier = pb.REALTIME if towers else pb.REALTIME_ALS_ONLY
    with grpc.insecure_channel(world.address) as channel:
        recommender = RecommenderStub(channel)
        for user, items in one.judged.items():
            request = pb.RecommendRequest(user_id=user, count=KEPT, context=pb.Context(ts_ms=MIDNIGHT))
            answer = recommender.Recommend(request, timeout=60)
            assert answer.tier == tier
            assert [found.item_id for found in answer.items] == items
        for user, items in under_a_filter(one, trend, "c1").items():
            request = pb.RecommendRequest(user_id=user, count=KEPT, categories=["c1"], context=pb.Context(ts_ms=MIDNIGHT))
            answer = recommender.Recommend(request, timeout=60)
            assert [found.item_id for found in answer.items] == items
    one.lake.write(ACTIVE_USERS, LAST_HOUR, pa.table({"user_id": list(one.judged)}))
    monkeypatch.setattr("recsys_core.precompute.now_ms", lambda: MIDNIGHT)
    plan = plan_caches(one.lake, LAST_HOUR, pointer, one.settings, "a run")
    for step in range(plan.steps):
        list(write_shards(redis, one.lake, plan, step, one.snapshot, trend, one.settings))
    for user, items in one.judged.items():
        assert [name for name, _ in CachedAnswer.decode(redis.get(recs_key(user))).items()] == items


def test_the_first_items_are_judged_among_as_many_candidates_as_the_caches_have(made: Path, tmp_path: Path) -> None:
    settings = Settings(evaluation={"ks": (10,), "bootstrap": 10})
    one = night(made, tmp_path, settings, False, candidates=10, popular=5, trending=5)
    cached = ranked_then(one, trend_then(one.lake, one.snapshot, MIDNIGHT, settings), settings.cache.items)
    assert one.judged == {user: items[:10] for user, items in cached.items()}


def of_today(one: Night, user: int) -> list[tuple[str, int]]:
    """Item and time (ms) of what a user does in the first two hours of the day: each item twice, of half of the users forty."""
    random = np.random.default_rng(user)
    items = random.choice(one.split.items, 40 if user % 2 else 3, replace=False).tolist()
    times = np.sort(MIDNIGHT + random.choice(2 * HOUR_MS, 2 * len(items), replace=False)).tolist()
    return list(zip([name for name in items for _ in range(2)], times, strict=True))


def live(redis: Any, settings: Settings, events: list[LiveEvent]) -> None:
    updates = few_user_updates(events, LAST_ACTIONS, settings.events.session_gap_minutes * MINUTE_MS)
    calls = UserWriter(redis, settings).calls(updates, {0: "0abcdef0.0"}, MIDNIGHT)
    assert all(answer == [0] for answer in run_calls(redis, calls, [UPDATE]))


@pytest.mark.parametrize("towers", [False, True])
def test_within_a_day_the_server_and_the_caches_answer_what_would_be_judged_at_that_moment(
    made: Path, empty_world: World, tmp_path: Path, towers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of the day is done already when the night's tables are written, and many users do more than `last_items` actions."""
    one, moment = night(made, tmp_path, empty_world.settings, towers), MIDNIGHT + 2 * HOUR_MS
    today = {user: of_today(one, int(user[1:])) for user in one.judged}
    rows = [(user, name, np.datetime64(ts, "ms").astype(str)) for user, done in today.items() for name, ts in done]
    write_clicks(one.lake, rows)
    names, split = one.split.items.tolist(), one.split
    seen = split.seen.tolil()
    for row, user in enumerate(split.users.tolist()):
        done = list(dict.fromkeys(name for name, _ in reversed(today[user])))
        before = split.seen[row]
        items = [names[at] for at in before.indices[np.argsort(before.data)]]
        for place, name in enumerate(dict.fromkeys([*done, *items])):
            seen[row, names.index(name)] = place + 1
    factors = aligned(read_factors(one.lake, ALS_FACTORS, BEFORE, "users", split.users), split.users)
    trending = read_trend(one.lake, LAST_HOUR)
    trend, past = Trend.of(one.snapshot, trending.scores), Past(split.users, factors, split.items, seen.tocsr(), moment)
    users = users_then(one.lake, one.snapshot, past, one.snapshot.ranking, one.settings)
    ranked = rank(one.snapshot, trend, users, KEPT, one.snapshot.ranking)
    judged = {
        user: [one.snapshot.item_ids[at] for at in row if at >= 0]
        for user, row in zip(split.users.tolist(), ranked.positions, strict=True)
    }
    redis, world = empty_world.redis.client, empty_world
    done = sorted((ts, user, name) for user, actions in today.items() for name, ts in actions)
    events = [LiveEvent(0, at, user, name, "view", ts) for at, (ts, user, name) in enumerate(done)]
    live(redis, one.settings, events[: len(events) // 3])
    write_online_features(redis, one.lake, BEFORE, one.lake.get(ALS_FACTORS, BEFORE).data_version, one.settings)
    live(redis, one.settings, events[len(events) // 3 :])
    write_trend(redis, trending, 3600)
    pointer = world.promote(one.snapshot)
    world.start()
    strongest = one.snapshot.item_ids[trend.order[0]]
    eventually(lambda: [found.item_id for found in world.client.trending(1)] == [strongest])
    with grpc.insecure_channel(world.address) as channel:
        recommender = RecommenderStub(channel)
        for user, items in judged.items():
            assert len(items) == KEPT
            assert not {name for name, _ in today[user]} & set(items)
            request = pb.RecommendRequest(user_id=user, count=KEPT, context=pb.Context(ts_ms=moment))
            assert [found.item_id for found in recommender.Recommend(request, timeout=60).items] == items
    one.lake.write(ACTIVE_USERS, LAST_HOUR, pa.table({"user_id": list(judged)}))
    monkeypatch.setattr("recsys_core.precompute.now_ms", lambda: moment)
    plan = plan_caches(one.lake, LAST_HOUR, pointer, one.settings, "a run")
    for step in range(plan.steps):
        list(write_shards(redis, one.lake, plan, step, one.snapshot, trend, one.settings))
    for user, items in judged.items():
        assert [name for name, _ in CachedAnswer.decode(redis.get(recs_key(user))).items()] == items


@pytest.mark.parametrize("changes", [{}, {"exclude_consumed": False}, {"max_consumed": 100}, {"last_items": 12}])
def test_a_release_is_judged_as_the_models_that_it_was_made_of(
    made: Path, tmp_path: Path, settings: Settings, changes: dict
) -> None:
    """The gate's question of a champion and the evaluation of a night have one answer for the same models."""
    one = night(made, tmp_path, settings, towers=True, **changes)
    scores = evaluate_snapshot(one.lake, DAY, one.snapshot, one.settings)
    for name, value in one.metrics.items():
        assert scores[name] == pytest.approx(value, abs=1e-9), name
    consumed = max(len(set(items) & had(one, user)) for user, items in one.judged.items())
    assert (consumed > 0) == bool(changes.keys() & {"exclude_consumed", "max_consumed"})
