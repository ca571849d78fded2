"""The scoring path: what an answer may hold, what its scores are made of, and that users don't affect each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from snapshots import make_snapshot, with_two_tower

from recsys_core.index import exact_neighbours, unit_rows
from recsys_core.ranking import (
    GATHERED,
    PARTS,
    SPAN,
    SPANS_FOR_THREADS,
    Ranked,
    Snapshot,
    Trend,
    Users,
    candidates,
    queries_of,
    rank,
    relative_log,
    session_vectors,
    with_fold_in,
)
from recsys_core.settings import RankingSettings

SETTINGS = RankingSettings()
ONLY_ALS = RankingSettings(session_weight=0, trend_weight=0, popular_weight=0, als_weight=1)
UNAVAILABLE = (3, 4, 77)


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    return make_snapshot(items=800, unavailable=UNAVAILABLE)


@pytest.fixture(scope="module")
def trend(snapshot: Snapshot) -> Trend:
    return Trend.of(snapshot, {"item-100": 9.0, "item-101": 4.0, "item-3": 50.0, "unheard-of": 7.0})


def users(snapshot: Snapshot, count: int, seed: int = 0, excluded: int = 30) -> Users:
    """Users with factors, with last items only, and with nothing, in turn."""
    random = np.random.default_rng(seed)
    items = snapshot.items.num_rows
    als = snapshot.als_items[random.integers(0, items, count)] + 0.1
    last = random.integers(0, items, (count, SETTINGS.last_items))
    als[1::3] = 0
    als[2::3] = 0
    last[2::3] = -1
    last[::2, 3:] = -1
    return Users(als.astype(np.float32), last, random.integers(-1, items, (count, excluded)))


def nobody(snapshot: Snapshot, count: int = 1) -> Users:
    none = np.empty((count, 0), np.int64)
    return Users(np.zeros((count, snapshot.als_items.shape[1]), np.float32), none, none)


@pytest.mark.parametrize("count", [2 * GATHERED + 3, SPANS_FOR_THREADS * SPAN + 9])
def test_one_user_and_many_users_are_the_same_call(snapshot: Snapshot, trend: Trend, count: int) -> None:
    everyone = users(snapshot, count)
    together = rank(snapshot, trend, everyone, 50, SETTINGS)
    assert together.positions.shape == (len(everyone), 50)
    for row in range(0, len(everyone), 5):
        alone = rank(snapshot, trend, everyone.rows(slice(row, row + 1)), 50, SETTINGS)
        np.testing.assert_array_equal(alone.positions[0], together.positions[row])
        np.testing.assert_allclose(alone.scores[0], together.scores[row], atol=1e-5)


def test_no_users_are_an_empty_answer(snapshot: Snapshot, trend: Trend) -> None:
    ranked = rank(snapshot, trend, users(snapshot, 0), 10, SETTINGS)
    assert ranked.positions.shape == (0, 10)


def held(ranked: Ranked, row: int) -> list[int]:
    return ranked.positions[row][ranked.positions[row] >= 0].tolist()


def test_answers_hold_no_item_twice_none_excluded_and_none_unavailable(snapshot: Snapshot, trend: Trend) -> None:
    everyone = users(snapshot, 60, excluded=200)
    ranked = rank(snapshot, trend, everyone, 100, SETTINGS)
    for row in range(60):
        items = held(ranked, row)
        assert len(items) == len(set(items))
        assert not set(items) & set(everyone.excluded[row].tolist())
        assert not set(items) & set(UNAVAILABLE)


def test_candidates_stand_together_each_once_and_ascending(snapshot: Snapshot, trend: Trend) -> None:
    everyone = users(snapshot, 60, excluded=200)
    found = candidates(snapshot, trend, everyone, queries_of(snapshot, everyone, SETTINGS), 50, SETTINGS)
    counts = (found >= 0).sum(axis=1)
    assert found.shape == (60, counts.max())
    for row, count in zip(found, counts, strict=True):
        assert (np.diff(row[:count]) > 0).all()
        assert (row[count:] == -1).all()


def test_scores_fall_and_are_the_weighted_sum_of_the_parts(snapshot: Snapshot, trend: Trend) -> None:
    ranked = rank(snapshot, trend, users(snapshot, 30), 50, SETTINGS)
    weights = [getattr(SETTINGS, f"{part}_weight") for part in PARTS]
    assert PARTS == ("als", "two_tower", "session", "trend", "popular")
    assert (np.diff(ranked.scores, axis=1) <= 0).all()
    np.testing.assert_allclose(ranked.parts @ np.array(weights), ranked.scores, atol=1e-5)


def test_each_part_is_what_the_module_says(snapshot: Snapshot, trend: Trend) -> None:
    everyone = users(snapshot, 1)
    ranked = rank(snapshot, trend, everyone, 50, SETTINGS)
    at = ranked.positions[0]
    factor = everyone.als[0] / np.linalg.norm(everyone.als[0])
    norms = np.linalg.norm(snapshot.als_items, axis=1)
    np.testing.assert_allclose(ranked.parts[0, :, 0], snapshot.als_items[at] @ factor / norms.max(), atol=1e-5)
    last = everyone.last_items[0][everyone.last_items[0] >= 0]
    session = sum(0.8**n * snapshot.als_items[item] / norms[item] for n, item in enumerate(last))
    cosine = snapshot.als_items[at] @ session / np.linalg.norm(session) / norms[at]
    np.testing.assert_allclose(ranked.parts[0, :, 2], cosine, atol=1e-5)
    np.testing.assert_allclose(ranked.parts[0, :, 3], trend.part[at])
    np.testing.assert_allclose(ranked.parts[0, :, 4], np.log1p(snapshot.popular[at]) / np.log1p(1000), atol=1e-6)


def test_with_als_alone_the_answer_is_the_exact_inner_product_search(snapshot: Snapshot) -> None:
    everyone = replace(users(snapshot, 1), excluded=np.array([[5]]))
    allowed = snapshot.available.copy()
    allowed[5] = False
    positions = np.flatnonzero(allowed)
    exact = positions[exact_neighbours(everyone.als, snapshot.als_items[positions], "inner_product", 20)]
    ranked = rank(snapshot, Trend.of(snapshot, {}), everyone, 20, ONLY_ALS)
    np.testing.assert_array_equal(ranked.positions, exact)


def test_a_user_of_whom_nothing_is_known_gets_trends_then_popularity(snapshot: Snapshot, trend: Trend) -> None:
    ranked = rank(snapshot, trend, nobody(snapshot), 6, SETTINGS)
    assert ranked.positions[0].tolist() == [100, 101, 0, 1, 2, 5]
    assert (ranked.parts[0, :, :3] == 0).all()


def test_a_filter_leaves_only_what_it_allows(snapshot: Snapshot, trend: Trend) -> None:
    allowed = snapshot.in_categories(["books"])
    ranked = rank(snapshot, trend, users(snapshot, 12), 300, SETTINGS, allowed)
    for row in range(12):
        items = held(ranked, row)
        assert len(items) > 200
        assert allowed[items].all()


def test_a_filter_that_allows_nothing_gives_nothing(snapshot: Snapshot, trend: Trend) -> None:
    nothing = np.zeros(snapshot.items.num_rows, bool)
    ranked = rank(snapshot, trend, users(snapshot, 3), 10, SETTINGS, nothing)
    assert (ranked.positions == -1).all()
    assert np.isneginf(ranked.scores).all()


def test_more_than_there_is_is_padded() -> None:
    small = make_snapshot(items=20)
    ranked = rank(small, Trend.of(small, {}), nobody(small), 50, SETTINGS)
    assert ranked.positions.shape == ranked.scores.shape == (1, 50)
    assert ranked.parts.shape == (1, 50, len(PARTS))
    assert sorted(held(ranked, 0)) == list(range(20))


def test_a_category_holds_what_is_below_it_and_not_what_begins_alike(snapshot: Snapshot) -> None:
    names = snapshot.categories
    np.testing.assert_array_equal(snapshot.in_categories(["sports"]), [n.startswith("sports/") for n in names])
    np.testing.assert_array_equal(snapshot.in_categories(["sports/"]), [n.startswith("sports/") for n in names])
    both = snapshot.in_categories(["sports/shoes", "sportswear"])
    np.testing.assert_array_equal(both, [n in ("sports/shoes", "sportswear") for n in names])
    assert not snapshot.in_categories([]).any()


def test_trends_leave_out_what_is_unknown_or_unavailable(trend: Trend) -> None:
    assert trend.order.tolist() == [100, 101]
    assert trend.part[100] == pytest.approx(np.log1p(9) / np.log1p(50))


@pytest.mark.parametrize("preference", [0.0, 1.0])
def test_users_without_factor_are_folded_in_and_others_keep_theirs(snapshot: Snapshot, preference: float) -> None:
    everyone = users(snapshot, 6)
    factors = with_fold_in(replace(snapshot, als_base_preference=preference), everyone)
    np.testing.assert_array_equal(factors[[0, 3]], everyone.als[[0, 3]])
    assert not factors[[2, 5]].any(), "nothing is known of these"
    last = everyone.last_items[1][everyone.last_items[1] >= 0]
    y = snapshot.als_items[last].astype(np.float64)
    left = snapshot.als_gram + snapshot.als_alpha * y.T @ y + snapshot.als_regularization * np.eye(y.shape[1])
    expected = np.linalg.solve(left, (preference + snapshot.als_alpha) * y.sum(axis=0))
    np.testing.assert_allclose(factors[1], expected, rtol=1e-3, atol=1e-5)


def test_users_are_folded_in_with_the_item_weights_of_the_fit(snapshot: Snapshot) -> None:
    everyone = users(snapshot, 6)
    last = everyone.last_items[1][everyone.last_items[1] >= 0]
    weights = np.linspace(0.2, 3, snapshot.items.num_rows, dtype=np.float32)
    factors = with_fold_in(replace(snapshot, als_item_weights=weights), everyone)
    y, w = snapshot.als_items[last].astype(np.float64), snapshot.als_alpha * weights[last].astype(np.float64)
    left = snapshot.als_gram + y.T @ (w[:, None] * y) + snapshot.als_regularization * np.eye(y.shape[1])
    np.testing.assert_allclose(factors[1], np.linalg.solve(left, y.T @ (1 + w)), rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(factors[[0, 3]], everyone.als[[0, 3]])


def test_newer_items_weigh_more_in_the_session(snapshot: Snapshot) -> None:
    [vector, nothing] = session_vectors(snapshot, np.array([[10, 25, -1], [-1, -1, -1]]), decay=0.5)
    similarities = unit_rows(snapshot.als_items[[10, 25]]) @ vector
    assert similarities[0] > similarities[1]
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    assert not nothing.any()


def test_relative_log_is_zero_to_one() -> None:
    np.testing.assert_allclose(relative_log(np.array([0.0, 1.0, 3.0])), [0, 0.5, 1])
    assert not relative_log(np.zeros(3)).any()
    assert len(relative_log(np.empty(0))) == 0


def test_an_item_id_that_occurs_twice_is_an_error(snapshot: Snapshot) -> None:
    doubled = pa.array(["item-0", *list(snapshot.item_ids)[:-1]])
    with pytest.raises(ValueError, match="1 item ids occur more than once"):
        replace(snapshot, items=snapshot.items.set_column(0, "item_id", doubled))


@pytest.fixture(scope="module")
def towers(snapshot: Snapshot) -> Snapshot:
    return with_two_tower(snapshot)


def with_vectors(snapshot: Snapshot, everyone: Users, seed: int = 5) -> Users:
    """The users with vectors of the user tower; every fourth has none."""
    vectors = unit_rows(np.random.default_rng(seed).normal(size=(len(everyone), snapshot.tower.dimension)))
    vectors[::4] = 0
    return replace(everyone, two_tower=vectors)


def test_the_two_tower_part_is_the_product_of_the_towers(towers: Snapshot, trend: Trend) -> None:
    everyone = with_vectors(towers, users(towers, 9))
    ranked = rank(towers, trend, everyone, 30, SETTINGS)
    for row in range(9):
        expected = towers.two_tower_items[ranked.positions[row]] @ everyone.two_tower[row]
        np.testing.assert_allclose(ranked.parts[row, :, 1], expected, atol=1e-5)
    np.testing.assert_allclose(
        ranked.parts @ np.array([getattr(SETTINGS, f"{part}_weight") for part in PARTS]), ranked.scores, atol=1e-5
    )


def test_with_the_two_tower_model_alone_the_answer_is_the_exact_search(towers: Snapshot) -> None:
    only = RankingSettings(als_weight=0, two_tower_weight=1, session_weight=0, trend_weight=0, popular_weight=0)
    everyone = replace(with_vectors(towers, users(towers, 8)), excluded=np.full((8, 1), -1))
    positions = np.flatnonzero(towers.available)
    ranked = rank(towers, Trend.of(towers, {}), everyone, 20, only)
    for row in (1, 2, 3):
        exact = exact_neighbours(everyone.two_tower[[row]], towers.two_tower_items[positions], "inner_product", 20)
        np.testing.assert_array_equal(ranked.positions[row], positions[exact[0]])


def test_without_user_vectors_a_release_with_towers_answers_as_one_without(
    snapshot: Snapshot, towers: Snapshot, trend: Trend
) -> None:
    everyone = users(snapshot, 12)
    plain, silent = (rank(release, trend, everyone, 50, SETTINGS) for release in (snapshot, towers))
    np.testing.assert_array_equal(plain.positions, silent.positions)


def test_parts_of_a_two_tower_model_come_together_or_not_at_all(towers: Snapshot) -> None:
    with pytest.raises(ValueError, match="one of them is missing"):
        replace(towers, tower=None)


def test_the_trend_is_the_half_lives_by_their_shares(snapshot: Snapshot) -> None:
    scores = {"item-100": (9.0, 0.0, 1.0), "item-101": (4.0, 4.0, 0.0), "item-3": (50.0, 1.0, 9.0)}
    found = Trend.of(snapshot, scores, (0.5, 1.0, -0.25))
    expected = 0.5 * np.log1p(9) / np.log1p(50) - 0.25 * np.log1p(1) / np.log1p(9)
    assert found.part[100] == pytest.approx(expected)
    assert found.order.tolist() == [101, 100], "item 3 is unavailable"
    assert Trend.of(replace(snapshot, ranking=RankingSettings(trend_mix=(0.5, 1, -0.25))), scores).part[100] == found.part[100]


def test_where_shares_and_half_lives_differ_in_number_the_first_is_the_trend(snapshot: Snapshot) -> None:
    one = Trend.of(snapshot, {"item-100": 9.0, "item-101": 4.0})
    two = Trend.of(snapshot, {"item-100": (9.0, 1.0), "item-101": (4.0, 8.0)})
    np.testing.assert_array_equal(one.part, two.part)
