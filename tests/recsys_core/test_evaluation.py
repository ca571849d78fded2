import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import INTERACTIONS_SCHEMA, ms, write_clicks, write_interactions
from snapshots import make_snapshot, with_two_tower
from towers import make_tower

from recsys_core.als import Factors
from recsys_core.catalog import CATALOG_SCHEMA, merge_catalog
from recsys_core.evaluation import (
    ALS,
    BLEND,
    EVALUATION,
    POPULAR_FAST,
    POPULAR_RECENT,
    POPULAR_WINDOW,
    SERVED,
    TWO_TOWER,
    evaluate_day,
    evaluate_snapshot,
    interval,
    resamples,
    write_evaluation,
)
from recsys_core.events import DAY_MS, HOUR_MS
from recsys_core.features import OnlineFeatures, user_inputs
from recsys_core.holdout import (
    Models,
    NothingToEvaluate,
    Past,
    aligned,
    holdout_models,
    holdout_snapshot,
    records_then,
    time_split,
    validation_cases,
)
from recsys_core.index import unit_rows
from recsys_core.lake import MissingPartition
from recsys_core.samples import by_recency
from recsys_core.settings import EvaluationSettings, RankingSettings, Settings
from recsys_core.tower import npy_bytes

BEFORE, DAY = "2026-03-01", "2026-03-02"
DISCOUNT = 1 / np.log2(3)
"""What a hit at rank 2 gains."""


def small(settings: Settings, ks: tuple[int, ...] = (1, 2), **ranking) -> Settings:
    sections = {
        "als": settings.als.model_copy(update={"rank": 4}),
        "evaluation": settings.evaluation.model_copy(update={"ks": ks}),
        "ranking": settings.ranking.model_copy(update=ranking),
    }
    return settings.model_copy(update=sections)


@pytest.fixture
def window(lake):
    """Items a, b, c, d by falling popularity. ann had a and c, bob had b, eve had a and d."""
    rows = [("ann", "a", 5.0), ("eve", "a", 4.0), ("bob", "b", 6.0), ("zoe", "b", 1.0), ("ann", "c", 3.0), ("eve", "d", 1.0)]
    write_interactions(lake, BEFORE, rows)
    return lake


def split(lake, users: int = 100, last: int = 5):
    sections = {"evaluation": EvaluationSettings(max_users=users), "ranking": RankingSettings(last_items=last)}
    return time_split(lake, BEFORE, DAY, Settings(**sections))


def named(found, row: int, matrix) -> list[str]:
    return found.items[matrix[row].indices].tolist()


def test_the_split_knows_the_window_and_asks_for_what_is_new_to_the_user(window):
    rows = [("ann", "a"), ("ann", "b"), ("ann", "b"), ("ann", "new"), ("bob", "b"), ("bob", "d"), ("eve", "a"), ("guest", "a")]
    write_clicks(window, [(user, item, f"{DAY}T{hour:02}:00") for hour, (user, item) in enumerate(rows)])
    found = split(window)
    assert found.users.tolist() == ["ann", "bob"]
    assert found.items.tolist() == ["a", "b", "c", "d"]
    assert [sorted(named(found, row, found.seen)) for row in range(2)] == [["a", "c"], ["b"]]
    assert [named(found, row, found.relevant) for row in range(2)] == [["b"], ["d"]]
    assert found.popularity.tolist() == [9.0, 7.0, 3.0, 1.0]
    assert found.new_item_share == pytest.approx(1 / 6)


def test_events_outside_the_day_are_neither_asked_for_nor_known(window):
    write_clicks(window, [("ann", "b", "2026-03-01T23:59"), ("ann", "d", f"{DAY}T00:00"), ("ann", "b", "2026-03-03T00:00")])
    found = split(window)
    assert named(found, 0, found.relevant) == ["d"]


def test_only_what_can_be_served_is_asked_for_and_recommended(window, settings):
    """`b` can't be had: nobody is asked for it, and no model recommends it, though it is the second most popular."""
    items = [{"item_id": item, "available": item != "b"} for item in "abcd"]
    merge_catalog(window, pa.Table.from_pylist(items, schema=CATALOG_SCHEMA))
    write_clicks(
        window, [("ann", "b", f"{DAY}T01"), ("ann", "d", f"{DAY}T02"), ("eve", "b", f"{DAY}T03"), ("bob", "a", f"{DAY}T04")]
    )
    found = split(window)
    assert found.users.tolist() == ["ann", "bob"], "eve took nothing else"
    assert [named(found, row, found.relevant) for row in range(2)] == [["d"], ["a"]]
    recommended = evaluate_day(window, DAY, small(settings), None, "implicit").recommended
    for ranked in recommended.values():
        assert not (ranked == found.items.tolist().index("b")).any()
    assert recommended[POPULAR_WINDOW].tolist() == [[3, -1], [0, 2]]
    merge_catalog(
        window, pa.Table.from_pylist([{"item_id": item, "available": False} for item in "abcd"], schema=CATALOG_SCHEMA)
    )
    with pytest.raises(NothingToEvaluate, match="new to them, known to the window and available"):
        split(window)


def test_where_things_are_served_again_they_are_asked_for(window, settings):
    write_clicks(window, [("ann", "a", f"{DAY}T01"), ("ann", "b", f"{DAY}T02")])
    again = small(settings, exclude_consumed=False)
    found = time_split(window, BEFORE, DAY, again)
    assert sorted(named(found, 0, found.relevant)) == ["a", "b"]
    recommended = evaluate_day(window, DAY, again, None, "implicit").recommended
    assert recommended[POPULAR_WINDOW].tolist() == [[0, 1]]


def test_recent_items_are_the_users_newest_first_and_padded(lake):
    write_interactions(lake, BEFORE, [("ann", "a", 1.0), ("bob", "b", 1.0), ("ann", "c", 1.0), ("ann", "b", 1.0)])
    write_clicks(lake, [("ann", "d", f"{DAY}T01"), ("bob", "a", f"{DAY}T01"), ("bob", "c", f"{DAY}T02")])
    with pytest.raises(NothingToEvaluate):
        time_split(lake, BEFORE, "2026-03-03", Settings())
    found = split(lake, last=2)
    assert (found.users.tolist(), found.recent.tolist()) == (["bob"], [[1, -1]])
    write_clicks(lake, [("ann", "d", f"{DAY}T01"), ("ann", "a", f"{DAY}T02"), ("eve", "a", f"{DAY}T02")])
    write_interactions(lake, BEFORE, [("ann", "x", 1.0), ("eve", "a", 1.0), ("ann", "c", 1.0), ("ann", "b", 1.0)])
    found = split(lake, last=2)
    assert [found.items[i] for i in found.recent[0]] == ["b", "c"]


def test_users_are_sampled_by_their_ids_alone(lake):
    users = [f"user-{n}" for n in range(60)]
    write_interactions(lake, BEFORE, [(user, "a", 1.0) for user in users] + [("seed", "b", 1.0)])
    write_clicks(lake, [(user, "b", f"{DAY}T10") for user in users])
    sampled = split(lake, users=5).users.tolist()
    assert len(sampled) == 5
    assert sampled == sorted(sampled)
    assert set(sampled) < set(split(lake, users=10).users.tolist())
    write_clicks(lake, [(user, "b", f"{DAY}T10") for user in reversed([*users, "guest"])])
    assert split(lake, users=5).users.tolist() == sampled
    assert split(lake, users=1000).users.tolist() == sorted(users)


def test_a_day_that_has_nothing_to_evaluate_says_why(lake):
    with pytest.raises(MissingPartition, match=r"'interactions' .* has no partition 2026-03-01"):
        split(lake)
    lake.publish_staged("interactions", lake.stage("interactions"), "none", {BEFORE: (0, "empty")})
    with pytest.raises(NothingToEvaluate, match="the window that ends with 2026-03-01 has no interactions"):
        split(lake)
    write_interactions(lake, BEFORE, [("ann", "a", 1.0)])
    with pytest.raises(NothingToEvaluate, match="2026-03-02 has no events in clicks_hourly"):
        split(lake)
    write_clicks(lake, [("guest", "a", f"{DAY}T10")])
    with pytest.raises(NothingToEvaluate, match="no user with events on 2026-03-02 has any in the window"):
        split(lake)
    write_clicks(lake, [("ann", "a", f"{DAY}T10"), ("ann", "new", f"{DAY}T10")])
    with pytest.raises(NothingToEvaluate, match="no user had an item on 2026-03-02 that is new to them"):
        split(lake)


def test_factors_are_aligned_to_ids_with_zeros_for_those_without():
    factors = Factors(np.array(["c", "a", "x"], object), np.ones(3, np.int32), np.array([[3.0], [1.0], [9.0]], np.float32))
    assert aligned(factors, np.array(["a", "b", "c"], object)).tolist() == [[1.0], [0.0], [3.0]]
    nobody = Factors(np.empty(0, object), np.empty(0, np.int32), np.empty((0, 2), np.float32))
    assert aligned(nobody, np.array(["a"], object), 2).tolist() == [[0.0, 0.0]]


def test_the_popularity_baselines_have_the_metrics_worked_out_by_hand(window, settings):
    """ann is offered b, d; bob a, c; eve b, c. They take d, a and b."""
    write_clicks(window, [("ann", "d", f"{DAY}T10"), ("bob", "a", f"{DAY}T10"), ("eve", "b", f"{DAY}T11")])
    write_clicks(window, [(user, "a", "2026-03-01T17:59") for user in ("zoe", "bob", "eve")])
    write_clicks(window, [("zoe", "c", "2026-03-01T18:00"), ("zoe", "d", "2026-03-01T18:10"), ("bob", "d", "2026-03-01T18:30")])
    result = evaluate_day(window, DAY, small(settings), None, "implicit")
    assert (result.users, result.items, result.relevant, result.new_item_share) == (3, 4, 3, 0.0)
    popular = result.metrics[POPULAR_WINDOW]
    assert popular["hit@1"] == pytest.approx(2 / 3)
    assert popular["recall@2"] == 1.0
    assert popular["mrr@2"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert popular["ndcg@2"] == pytest.approx((DISCOUNT + 1 + 1) / 3)
    assert popular["coverage@1"] == 0.5
    assert popular["coverage@2"] == 1.0
    recent = result.metrics[POPULAR_RECENT]
    assert recent["hit@1"] == pytest.approx(1 / 3)
    assert recent["ndcg@2"] == pytest.approx((1 + 0 + DISCOUNT) / 3)
    assert set(result.metrics) == {POPULAR_WINDOW, POPULAR_RECENT, POPULAR_FAST, ALS, SERVED}


@pytest.fixture
def two_tastes(lake):
    """Users of two groups, each with twenty items of its own; the bigger group makes its items the popular ones.

    On the day everyone takes two more items of their group.
    """
    random = np.random.default_rng(3)
    rows, clicks = [], []
    for user in range(150):
        group = int(user < 50)
        items = random.permutation(20)
        rows += [(f"u{user}", f"g{group}-{item}", 1.0) for item in items[:8]]
        clicks += [(f"u{user}", f"g{group}-{item}", f"{DAY}T10") for item in items[8:10]]
    write_interactions(lake, BEFORE, rows)
    write_clicks(lake, clicks)
    return lake


def test_als_and_what_is_served_find_a_taste_that_popularity_does_not(two_tastes, settings):
    result = evaluate_day(two_tastes, DAY, small(settings, ks=(10,)), None, "implicit")
    ndcg = {name: metrics["ndcg@10"] for name, metrics in result.metrics.items()}
    assert result.users == 150
    assert ndcg[ALS] > 1.3 * ndcg[POPULAR_WINDOW]
    assert ndcg[SERVED] > 1.3 * ndcg[POPULAR_WINDOW]
    assert result.metrics[ALS]["coverage@10"] > result.metrics[POPULAR_WINDOW]["coverage@10"]


def test_what_a_user_had_is_ranked_by_no_model(lake, settings):
    """Whoever had all items but one is right about that one only when the others are left out."""
    items = [f"i{n}" for n in range(6)]
    rows = [(f"u{n}", item, 1.0 + m) for n, missing in enumerate(items) for m, item in enumerate(items) if item != missing]
    write_interactions(lake, BEFORE, rows)
    write_clicks(lake, [(f"u{n}", item, f"{DAY}T10") for n, item in enumerate(items)])
    result = evaluate_day(lake, DAY, small(settings, ks=(1,)), None, "implicit")
    assert {name: metrics["hit@1"] for name, metrics in result.metrics.items()} == dict.fromkeys(result.metrics, 1.0)


def test_the_same_day_evaluates_to_the_same_numbers(two_tastes, settings):
    first, second = (evaluate_day(two_tastes, DAY, small(settings, ks=(10,)), None, "implicit") for _ in range(2))
    assert first.metrics == second.metrics


def write_two_tower(lake, day: str, items: list[str], vectors: np.ndarray, tower) -> None:
    ids = io.BytesIO()
    pq.write_table(pa.table({"item_id": items}), ids)
    files = {"items.parquet": ids.getvalue(), "items.npy": npy_bytes(vectors), **tower.to_files()}
    lake.write_blobs("two_tower", day, files, len(items))


@pytest.fixture
def with_towers(two_tastes):
    """A two-tower model of the day before, without any sense, that lacks an item and knows one more."""
    items = [*[f"g{group}-{item}" for group in range(2) for item in range(20)][1:], "unheard-of"]
    tower = make_tower([f"u{n}" for n in range(20)], items)
    vectors = unit_rows(np.random.default_rng(0).normal(size=(len(items), tower.dimension)))
    write_two_tower(two_tastes, BEFORE, items, vectors, tower)
    return two_tastes


def test_a_two_tower_model_of_the_day_before_is_evaluated_alone_and_blended(with_towers, settings):
    result = evaluate_day(with_towers, DAY, small(settings, ks=(10,)), None, "implicit")
    assert set(result.metrics) == {POPULAR_WINDOW, POPULAR_RECENT, POPULAR_FAST, ALS, TWO_TOWER, BLEND, SERVED}
    assert result.two_tower == "made-up"
    ndcg = {name: metrics["ndcg@10"] for name, metrics in result.metrics.items()}
    assert ndcg[ALS] > ndcg[TWO_TOWER]
    assert set(result.blend_differences) == {POPULAR_WINDOW, ALS, TWO_TOWER}
    mean, low, high = result.blend_differences[TWO_TOWER]
    assert mean == pytest.approx(ndcg[BLEND] - ndcg[TWO_TOWER])
    assert low < mean < high


def test_a_two_tower_model_that_cannot_be_read_leaves_als_alone_and_says_why(two_tastes, settings):
    result = evaluate_day(two_tastes, DAY, small(settings, ks=(10,)), None, "implicit")
    assert result.two_tower == f"not evaluated: two_tower of {BEFORE} was not made"
    two_tastes.write_blobs("two_tower", BEFORE, {"tower.json": b"{}", "items.npy": b"", "items.parquet": b""}, 1)
    result = evaluate_day(two_tastes, DAY, small(settings, ks=(10,)), None, "implicit")
    assert "can't be read" in result.two_tower
    assert TWO_TOWER not in result.metrics


def test_intervals_hold_the_mean_and_pairs_are_tighter_than_their_parts():
    random = np.random.default_rng(0)
    first = random.uniform(0, 1, 400)
    second = first + 0.01 + random.normal(scale=0.02, size=400)
    drawn = resamples(400, 500)
    assert drawn.sum(axis=1).tolist() == [400.0] * 500
    one, other, difference = (interval(values, drawn) for values in (first, second, second - first))
    for mean, low, high in (one, other, difference):
        assert low < mean < high
    assert one[2] - one[1] == pytest.approx(2 * 1.96 * first.std() / 20, rel=0.15)
    assert difference[1] > 0, "each user gains, although the models' own intervals overlap"
    assert other[1] < one[2]


def test_segments_are_the_users_and_items_that_their_names_say(lake, settings):
    """ann and bob had one item each, eve four. `rare` has one user in the window, everything else has more."""
    rows = [("ann", "a", 1.0), ("bob", "b", 1.0), *[("eve", item, 1.0) for item in ("a", "b", "c", "rare")]]
    rows += [(f"z{n}", item, 1.0) for n in range(6) for item in ("a", "b", "c")]
    write_interactions(lake, BEFORE, rows)
    write_clicks(
        lake, [("ann", "rare", f"{DAY}T10"), ("bob", "a", f"{DAY}T10"), ("bob", "c", f"{DAY}T11"), ("zoe", "a", f"{DAY}T11")]
    )
    write_clicks(lake, [("z0", "rare", f"{DAY}T12")])
    options = small(settings)
    options = options.model_copy(update={"evaluation": options.evaluation.model_copy(update={"cold_user_items": 1})})
    found = evaluate_day(lake, DAY, options, None, "implicit").segments
    assert {name: values["users"] for name, values in found.items()} == {
        "all": 3,
        "cold users": 2,
        "light users": 2,
        "heavy users": 1,
        "cold items": 2,
    }
    assert found["cold items"][POPULAR_WINDOW] == 0.5, "only z0 has nothing more popular left"


def at(hour: int, day: str = BEFORE) -> int:
    return ms(f"{day}T{hour:02}:00")


def write_pairs(lake, rows: list[tuple[str, str, int, int]]) -> None:
    """Partition BEFORE of `interactions` from (user, item, first and last time in ms)."""
    table = [
        {"user_id": u, "item_id": i, "weight": 1.0, "n_events": 1 + (last > first), "first_ts": first, "last_ts": last}
        for u, i, first, last in rows
    ]
    lake.write("interactions", BEFORE, pa.Table.from_pylist(table, schema=INTERACTIONS_SCHEMA))


def test_validation_moments_know_nothing_of_what_came_after_them(lake, settings):
    old = ms("2026-02-20")
    crowd = [(f"z{n}", item, old, old) for n in range(4) for item in ("a", "b", "c")]
    ann = [("ann", "a", old, at(3)), ("ann", "b", at(7), at(20)), ("ann", "new", at(8), at(8)), ("ann", "c", at(13), at(13))]
    write_pairs(lake, [*crowd, *ann, ("bob", "new", at(5), at(5)), ("bob", "a", at(14), at(14)), ("late", "a", at(23), at(23))])
    write_clicks(lake, [("bob", "new", f"{BEFORE}T05:00"), ("ann", "b", f"{BEFORE}T07:00"), ("ann", "c", f"{BEFORE}T13:00")])
    *cases, day = validation_cases(lake, BEFORE, small(settings), None, "implicit")
    assert len(cases) == 2, "nobody who was there before did anything new in the other quarters of the day"
    morning, noon = cases

    def named(case, positions):
        return [case.snapshot.item_ids[at] for at in positions if at >= 0]

    def taken(case):
        return sorted(named(case, case.relevant.indices))

    assert (taken(morning), morning.outside.tolist()) == (["b", "new"], [0])
    assert named(morning, morning.users.excluded[0]) == ["a"]
    assert sorted(named(morning, np.flatnonzero(morning.snapshot.available))) == ["a", "b", "c", "new"]
    assert named(morning, morning.trend.order) == ["new"]
    assert taken(noon) == ["c"]
    assert len(noon.users) == 1, "bob was not there before the day"
    new = noon.snapshot.item_ids.position("new")
    assert not noon.snapshot.als_items[new].any(), "models know nothing of the day"
    assert named(noon, noon.users.last_items[0, :3]) == ["new", "b", "a"]
    assert (morning.whole, noon.whole, day.whole) == (False, False, True)
    assert (taken(day), day.outside.tolist(), len(day.users)) == (["b", "c"], [1], 1), "the day as seen from its first moment"
    assert named(day, day.users.excluded[0]) == ["a"]
    assert not day.snapshot.available[new]
    assert not len(day.trend.order)


def test_items_of_the_moment_itself_are_not_reachable(lake, settings):
    old = ms("2026-02-20")
    crowd = [*((f"z{n}", "a", old, old) for n in range(3)), ("z0", "b", old, old)]
    write_pairs(lake, [*crowd, ("ann", "a", old, old), ("ann", "new", at(7), at(7)), ("ann", "b", at(8), at(8))])
    write_clicks(lake, [("ann", "new", f"{BEFORE}T07:00")])
    case, _ = validation_cases(lake, BEFORE, small(settings), None, "implicit")
    assert [case.snapshot.item_ids[at] for at in case.relevant.indices] == ["b"]
    assert case.outside.tolist() == [1]


def test_where_few_come_back_on_a_day_more_days_are_looked_at(lake, settings):
    """Three users come back two days before the end, one on the last day."""
    old, lately = ms("2026-02-10"), ms("2026-02-28T13:00")
    crowd = [(f"z{n}", item, old, old) for n in range(4) for item in ("a", "b", "c")]
    write_pairs(lake, [*crowd, *((f"z{n}", "d", lately, lately) for n in range(3)), ("z3", "d", at(13), at(13))])
    write_clicks(lake, [("z0", "d", "2026-02-28T13:00")])
    *cases, days = validation_cases(lake, BEFORE, small(settings), None, "implicit")
    assert [len(case.users) for case in cases] == [3, 1], "of four moments, twelve hours apart, two have users"
    assert [case.outside.tolist() for case in cases] == [[1, 1, 1], [0]]
    assert days.outside.tolist() == [1, 1, 1, 1]


def test_a_window_without_a_day_before_its_last_has_no_validation(lake, settings):
    write_pairs(lake, [("ann", "a", at(1), at(1)), ("ann", "b", at(7), at(7))])
    assert validation_cases(lake, BEFORE, small(settings), None, "implicit") == []


def test_a_releases_own_answers_are_scored_like_the_served_ranking(two_tastes, settings):
    """A snapshot of the same models, in another order of positions and with one item more, has the same metrics."""
    options = small(settings, ks=(10,))
    result = evaluate_day(two_tastes, DAY, options, None, "implicit")
    split = time_split(two_tastes, BEFORE, DAY, options)
    models = holdout_models(two_tastes, BEFORE, DAY, split, result.als)
    order = np.random.default_rng(0).permutation(len(split.items))
    moved = Models(models.als, np.vstack([models.als_items[order], np.zeros((1, 4), np.float32)]), None, models.als_users, None)
    names = np.array([*split.items[order], "another"], object)
    popularity = np.append(split.popularity[order], 0.0)
    snapshot = holdout_snapshot(names, moved, popularity, np.arange(len(order)), options)
    ranking = RankingSettings.model_validate(result.ranking)
    snapshot = replace(snapshot, ranking=ranking, als_version="v1")
    for side in ("users", "items"):
        two_tastes.write(f"als_factors_{side}", BEFORE, two_tastes.read(f"holdout_als_{side}", DAY))
    fit = two_tastes.write_blobs("als_factors", BEFORE, {"fit.json": b"{}"}, 1)
    found = evaluate_snapshot(two_tastes, DAY, replace(snapshot, als_version=fit.data_version), options)
    assert found["ndcg@10"] == pytest.approx(result.metrics[SERVED]["ndcg@10"], abs=1e-6)
    folded = evaluate_snapshot(two_tastes, DAY, snapshot, options, split)
    assert folded["ndcg@10"] > result.metrics[POPULAR_WINDOW]["ndcg@10"]


def test_an_evaluation_is_kept_with_its_metrics_or_with_the_reason_there_is_none(window, settings):
    write_clicks(window, [("bob", "a", f"{DAY}T10")])
    result = evaluate_day(window, DAY, small(settings), None, "implicit")
    written = write_evaluation(window, DAY, result)
    assert window.get(EVALUATION, DAY) == written
    assert (written.rows, written.extra["metrics"][POPULAR_WINDOW]["hit@1"]) == (1, 1.0)
    assert write_evaluation(window, DAY, None, "too early").extra == {"day": DAY, "metrics": {}, "reason": "too early"}


def test_the_user_tower_is_given_what_was_known_at_the_moment_and_nothing_of_the_rest_of_its_day(lake):
    midnight = ms("2026-03-02T00:00")
    known = OnlineFeatures(midnight, 90, midnight - HOUR_MS, hours=((1, 4),), days=((1, 4),), category="books", device="phone")
    later = OnlineFeatures(midnight + DAY_MS, 90, midnight + DAY_MS - 1, hours=((1, 99),), days=((1, 99),), category="toys")
    for day, features in ((BEFORE, known), (DAY, later)):
        lake.write("user_features", day, pa.table({"user_id": ["ann"], "features": [features.encode().decode()]}))
    write_clicks(lake, [("ann", "a", f"{DAY}T02:00"), ("new", "a", f"{DAY}T05:00"), ("ann", "b", f"{DAY}T07:00")])
    write_clicks(lake, [("ann", "a", f"{DAY}T03:00")], kind="impression")
    names, items = np.array(["ann", "new"], object), np.array(["a", "b"], object)
    snapshot = with_two_tower(make_snapshot(items=20), ["ann"])
    seen = by_recency(np.array([0]), np.array([0]), (2, 2))

    def inputs(moment: int):
        past = Past(names, np.zeros((2, 16), np.float32), items, seen, moment)
        records = records_then(lake, snapshot, past, Settings(events={"weights": {"view": 1.0}}))
        return [user_inputs(r.last, r.seen, r.features or OnlineFeatures(0, 1), moment, 50) for r in records]

    ann, new = inputs(ms(f"{DAY}T06:00"))
    assert (ann.counts, new.counts) == ((5, 5, 5, 4), (1, 1, 1, 1))
    assert (ann.history, ann.category, ann.device) == (["a"], "books", "phone")
    assert (new.history, new.category, new.device) == (["a"], None, None)
    assert inputs(midnight)[0].counts == (4, 4, 4, 1)
