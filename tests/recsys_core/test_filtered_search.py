"""Whatever is left out of a search, the nearest of what is left are found: filters, unavailable items, what a user had."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from snapshots import make_snapshot, with_two_tower

from recsys_core import index as index_module
from recsys_core.index import (
    EXHAUSTIVE,
    ExactIndex,
    Part,
    VectorIndex,
    build_index,
    exact_neighbours,
    similar_items,
    tune_index,
)
from recsys_core.ranking import Snapshot, Trend, Users, candidates, queries_of, rank
from recsys_core.settings import IndexSettings, RankingSettings

ITEMS, DIMENSION, QUERIES = 3_000, 16, 40
SETTINGS = IndexSettings(ef_construction=80, tuning_queries=60)
RANKING = RankingSettings()
RECALL = 0.99


def falling(items: int = ITEMS, dimension: int = DIMENSION, seed: int = 2) -> np.ndarray:
    """Clustered vectors of falling length, as those of ALS are."""
    random = np.random.default_rng(seed)
    centers = random.normal(size=(20, dimension))
    vectors = centers[random.integers(0, 20, items)] + 0.5 * random.normal(size=(items, dimension))
    return (vectors * np.sort(random.gamma(2, 0.5, size=(items, 1)), axis=0)[::-1]).astype(np.float32)


def questions(count: int = QUERIES, dimension: int = DIMENSION) -> np.ndarray:
    return np.random.default_rng(2).normal(size=(count, dimension)).astype(np.float32)


@pytest.fixture(scope="module")
def walked() -> VectorIndex:
    """An index whose graph is used, as in a large catalogue; the module's tests lower the bound for it."""
    return build_index(falling(), "inner_product", SETTINGS, questions(200))[0]


@pytest.fixture(autouse=True)
def _graphs_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a large catalogue: where the graph finds what it should, it is faster than a scan."""
    monkeypatch.setattr(index_module, "GRAPH_ABOVE", 1_000)
    monkeypatch.setattr(index_module, "_scan_milliseconds", lambda *_: index_module.SCAN_MS)


def some(kind: str, count: int, items: int = ITEMS, seed: int = 3) -> np.ndarray:
    """A mask that leaves `count` items: of a random choice, the shortest vectors or the longest."""
    order = np.random.default_rng(seed).permutation(items) if kind == "random" else np.arange(items)
    mask = np.zeros(items, bool)
    mask[order[-count:] if kind == "shortest" else order[:count]] = True
    return mask


def found_share(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.mean([np.isin(right, row).mean() for row, right in zip(found, exact, strict=True)]))


@pytest.mark.parametrize("kind", ["random", "shortest", "longest"])
@pytest.mark.parametrize("count", [1, 300, 1_500, 2_000, 2_990])
def test_a_search_under_any_filter_finds_the_nearest_that_it_leaves(walked: VectorIndex, kind: str, count: int) -> None:
    mask = some(kind, count)
    allowed = np.flatnonzero(mask)
    found = walked.search(questions(), 200, allowed)
    assert mask[found[found >= 0]].all()
    exact = allowed[exact_neighbours(questions(), walked.vectors[allowed], "inner_product", 50)]
    assert found_share(found[:, :50], exact) >= RECALL
    one_by_one = np.vstack([walked.search(query[None], 200, allowed) for query in questions(5)])
    np.testing.assert_array_equal(np.sort(one_by_one), np.sort(found[:5]))


@pytest.mark.parametrize("zeros", [0, 5_000])
def test_the_half_of_a_large_catalogue_that_is_least_popular_is_found_too(zeros: int) -> None:
    """Zeros are vectors of items that a model does not know."""
    random = np.random.default_rng(4)
    vectors = random.normal(size=(12_000, DIMENSION)).astype(np.float32)
    vectors *= (np.arange(1, 12_001) ** -0.5 / np.linalg.norm(vectors, axis=1)).astype(np.float32)[:, None]
    vectors[7_000 : 7_000 + zeros] = 0
    few = SETTINGS.model_copy(update={"m": 8, "ef_construction": 40})
    index, _ = build_index(vectors, "inner_product", few, questions(200))
    index.ef_search = 567
    allowed = random.permutation(np.arange(5_000, 12_000))
    exact = allowed[exact_neighbours(questions(), vectors[allowed], "inner_product", 50)]
    assert found_share(index.search(questions(), 200, allowed)[:, :50], exact) >= RECALL


@pytest.mark.parametrize("kind", ["random", "shortest", "longest"])
def test_a_graph_is_tuned_with_what_is_available_and_left_alone_where_that_does_not_help(
    walked: VectorIndex, kind: str
) -> None:
    part = Part.of(some(kind, 2_400), tuned=True)
    assert part is not None
    index = VectorIndex(walked.index, "inner_product", walked.ef_search)
    report = tune_index(index, questions(200)[100:], SETTINGS, part)
    assert report.reached_target
    assert report.recall >= SETTINGS.recall_target
    assert index.scans(part) == (index.ef_search == EXHAUSTIVE) == (kind == "shortest")
    exact = part.positions[exact_neighbours(questions(), index.vectors[part.positions], "inner_product", 50)]
    assert found_share(index.search(questions(), 200, part)[:, :50], exact) >= 0.98
    assert set(index.search(questions(), 200, part).ravel().tolist()) <= set(part.positions.tolist())


@pytest.mark.parametrize("by_scan", [0, 100_000])
def test_similar_items_are_the_nearest_of_those_that_are_available(by_scan: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "SIMILAR_BY_SCAN", by_scan)
    vectors = falling(2_000)
    index, _ = build_index(vectors, "cosine", SETTINGS)
    part = Part.of(some("random", 200, 2_000))
    assert part is not None
    found = similar_items(vectors, 20, index, allowed=part)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = units @ units[part.positions].T
    scores[part.positions, np.arange(200)] = -np.inf
    np.testing.assert_array_equal(found, part.positions[np.argsort(-scores, axis=1)[:, :20]])


# -- what is ranked -----------------------------------------------------------------------------------------------------


def release(
    vectors: np.ndarray, available: np.ndarray, exact: bool, base: Snapshot, towers: np.ndarray | None = None
) -> Snapshot:
    """A release of made-up vectors and popularity, searched exhaustively or through graphs that are tuned as a build does."""
    part = Part.of(available, tuned=True)

    def index(of: np.ndarray) -> ExactIndex | VectorIndex:
        if exact:
            return ExactIndex(of, "inner_product")
        return build_index(of, "inner_product", SETTINGS, questions(200, of.shape[1]), allowed=part)[0]

    items = len(vectors)
    table = base.items.take(np.arange(items) % base.items.num_rows)
    table = table.set_column(0, "item_id", [[f"i{at}" for at in range(items)]]).set_column(4, "available", [available])
    return replace(
        base,
        items=table,
        als_items=vectors,
        als_gram=vectors.T.astype(np.float64) @ vectors,
        popular=np.random.default_rng(5).pareto(1.2, items).astype(np.float32),
        similar=np.full((items, 50), -1, np.int32),
        indexes={"inner_product": index(vectors)},
        two_tower_items=None if towers is None else towers,
        two_tower_index=None if towers is None else index(towers),
        tower=None if towers is None else base.tower,
    )


def asking(vectors: np.ndarray, count: int = 20, towers: np.ndarray | None = None) -> Users:
    none = np.empty((count, 0), np.int64)
    two_tower = None if towers is None else questions(count, towers.shape[1])
    return Users(questions(count, vectors.shape[1]), none, none, two_tower)


def nearest(vectors: np.ndarray, queries: np.ndarray, allowed: np.ndarray, count: int = 50) -> np.ndarray:
    places = np.flatnonzero(allowed)
    return places[exact_neighbours(queries, vectors[places], "inner_product", count)]


BASE = with_two_tower(make_snapshot(items=400))
VECTORS = falling()
TOWERS = np.random.default_rng(8).normal(size=(ITEMS, 8)).astype(np.float32)
EXACT = release(VECTORS, np.ones(ITEMS, bool), True, BASE, TOWERS)


@pytest.mark.parametrize("unavailable", [0.0, 0.5, 0.9, 0.97, 0.99])
def test_the_users_best_available_items_are_candidates_however_few_are_available(unavailable: float) -> None:
    available = np.random.default_rng(6).random(ITEMS) >= unavailable
    snapshot = release(VECTORS, available, True, BASE)
    users = asking(VECTORS)
    queries = queries_of(snapshot, users, RANKING)
    expected = nearest(VECTORS, queries.als, available)
    for allowed in (None, np.ones(ITEMS, bool)):
        found = candidates(snapshot, Trend.of(snapshot, {}), users, queries, 10, RANKING, allowed)
        assert found_share(found, expected) == 1.0


@pytest.mark.parametrize("consumed", [200, 1_000, 2_000])
@pytest.mark.parametrize("apart", [False, True])
def test_one_who_had_all_the_nearest_gets_the_next_ones(consumed: int, apart: bool) -> None:
    users = asking(VECTORS, 1)
    queries = queries_of(EXACT, users, RANKING)
    had = nearest(VECTORS, queries.als, np.ones(ITEMS, bool), consumed)
    users = replace(users, had={0: had[0]}) if apart else replace(users, excluded=had)
    left = np.ones(ITEMS, bool)
    left[had] = False
    found = candidates(EXACT, Trend.of(EXACT, {}), users, queries, 10, RANKING)
    assert found_share(found, nearest(VECTORS, queries.als, left)) == 1.0
    assert left[found[found >= 0]].all()


def test_one_who_had_what_is_popular_and_trends_gets_what_comes_after_it() -> None:
    everything = np.argsort(-EXACT.popular)
    trend = Trend.of(EXACT, {f"i{at}": 10.0 for at in everything[:100].tolist()})
    nobody = Users(np.zeros((1, DIMENSION), np.float32), np.empty((1, 0), np.int64), everything[None, :150])
    ranked = rank(EXACT, trend, nobody, 60, RANKING)
    assert ranked.positions[0].tolist() == everything[150:210].tolist()


def test_of_the_similar_items_those_that_a_filter_leaves_are_taken() -> None:
    similar = np.full((ITEMS, 50), -1, np.int32)
    similar[7] = np.arange(100, 150)
    snapshot = replace(EXACT, similar=similar)
    users = Users(np.zeros((1, DIMENSION), np.float32), np.array([[7]]), np.empty((1, 0), np.int64))
    allowed = np.zeros(ITEMS, bool)
    allowed[130:150] = True
    queries = queries_of(snapshot, users, RANKING)
    queries = replace(queries, als=np.zeros_like(queries.als))
    found = candidates(snapshot, Trend.of(snapshot, {}), users, queries, 10, RANKING, allowed)
    assert set(found[0].tolist()) == set(range(130, 150))


GRAPHS: dict[float, Snapshot] = {}
ASKED = 32
"""Users; the recall of a graph is a mean, and a single query may find fewer."""


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    exact=st.booleans(),
    available=st.sampled_from([0.1, 0.5, 0.97, 1.0]),
    kind=st.sampled_from(["random", "shortest", "longest"]),
    share=st.sampled_from([None, 0.01, 0.1, 0.5, 0.9, 1.0]),
    consumed=st.sampled_from([0, 60, 200, 800, 2_000]),
    near=st.booleans(),
    seed=st.integers(0, 50),
)
def test_whatever_is_left_out_the_best_of_the_rest_are_candidates_and_nothing_else_is(
    exact: bool, available: float, kind: str, share: float | None, consumed: int, near: bool, seed: int
) -> None:
    """`near` says whether the user had the items that suit them best or any."""
    can_be_had = some("random", max(1, int(ITEMS * available)), ITEMS)
    snapshot = replace(EXACT, items=EXACT.items.set_column(4, "available", [can_be_had]))
    if not exact:
        if available not in GRAPHS:
            GRAPHS[available] = release(VECTORS, can_be_had, False, BASE, TOWERS)
        snapshot = GRAPHS[available]
    allowed = None if share is None else some(kind, max(1, int(ITEMS * share)), ITEMS, seed)
    users = asking(VECTORS, ASKED, TOWERS)
    queries = queries_of(snapshot, users, RANKING)
    everything = np.ones(ITEMS, bool)
    had = nearest(VECTORS, queries.als, everything, consumed) if near else np.zeros((ASKED, 0), np.int64)
    if not near:
        had = np.random.default_rng(seed).permuted(np.tile(np.arange(ITEMS), (ASKED, 1)), axis=1)[:, :consumed]
    users = replace(
        users,
        excluded=np.where(np.arange(ASKED)[:, None] < ASKED // 2, had, -1),
        had={row: had[row] for row in range(ASKED // 2, ASKED)},
    )
    found = candidates(snapshot, Trend.of(snapshot, {}), users, queries, 10, RANKING, allowed)
    shares = []
    for row in range(ASKED):
        left = can_be_had if allowed is None else can_be_had & allowed
        left = left.copy()
        left[had[row]] = False
        own = found[row][found[row] >= 0]
        assert left[own].all()
        assert len(own) >= min(10, np.count_nonzero(left))
        if left.any():
            one = slice(row, row + 1)
            shares += [np.isin(nearest(VECTORS, queries.als[one], left), own).mean()]
            shares += [np.isin(nearest(TOWERS, users.two_tower[one], left), own).mean()]
    if shares:
        assert np.mean(shares) >= RECALL
