import numpy as np
import pytest
from builders import write_clicks, write_interactions

from recsys_core.als import Factors
from recsys_core.evaluation import (
    ALS,
    EVALUATION,
    POPULAR_RECENT,
    POPULAR_WINDOW,
    SERVED,
    BLEND,
    POPULAR_FAST,
    TWO_TOWER,
    evaluate_day,
    evaluate_snapshot,
    interval,
    resamples,
    write_evaluation,
)
from recsys_core.holdout import NothingToEvaluate, aligned, time_split
from recsys_core.lake import MissingPartition
from recsys_core.settings import Settings

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
    return time_split(lake, BEFORE, DAY, users, last)


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


def test_recent_items_are_the_users_newest_first_and_padded(lake):
    write_interactions(lake, BEFORE, [("ann", "a", 1.0), ("bob", "b", 1.0), ("ann", "c", 1.0), ("ann", "b", 1.0)])
    write_clicks(lake, [("ann", "d", f"{DAY}T01"), ("bob", "a", f"{DAY}T01"), ("bob", "c", f"{DAY}T02")])
    with pytest.raises(NothingToEvaluate):
        time_split(lake, BEFORE, "2026-03-03", 10, 2)
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


def test_an_evaluation_is_kept_with_its_metrics_or_with_the_reason_there_is_none(window, settings):
    write_clicks(window, [("bob", "a", f"{DAY}T10")])
    result = evaluate_day(window, DAY, small(settings), None, "implicit")
    written = write_evaluation(window, DAY, result)
    assert window.get(EVALUATION, DAY) == written
    assert (written.rows, written.extra["metrics"][POPULAR_WINDOW]["hit@1"]) == (1, 1.0)
    assert write_evaluation(window, DAY, None, "too early").extra == {"day": DAY, "metrics": {}, "reason": "too early"}
