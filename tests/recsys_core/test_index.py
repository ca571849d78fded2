"""HNSW finds what exhaustive search finds, filters inside the search, and survives being written and read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pytest

from recsys_core import index as index_module
from recsys_core.index import (
    ExactIndex,
    Metric,
    VectorIndex,
    build_index,
    exact_neighbours,
    lengths_from,
    one_faiss_thread,
    recall,
    scan,
    similar_items,
    unit_rows,
)
from recsys_core.settings import IndexSettings

SETTINGS = IndexSettings(ef_construction=80, tuning_queries=100)
METRICS: tuple[Metric, ...] = ("inner_product", "cosine")


def clustered(items: int, dimension: int = 16, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    centers = random.normal(size=(20, dimension))
    vectors = centers[random.integers(0, 20, items)] + 0.5 * random.normal(size=(items, dimension))
    return (vectors * random.gamma(2, 0.5, size=(items, 1))).astype(np.float32)


@pytest.mark.parametrize("metric", METRICS)
def test_the_tuned_index_reaches_its_recall_target(metric: Metric) -> None:
    vectors, queries = np.split(clustered(3050), [3000])
    index, report = build_index(vectors, metric, SETTINGS)
    assert report.reached_target
    assert report.recall >= SETTINGS.recall_target
    assert index.ef_search == report.ef_search == report.curve[-1].ef_search
    exact = exact_neighbours(queries, vectors, metric, 50)
    assert recall(index.search_graph(queries, 50), exact, queries, vectors, metric) >= 0.97
    assert recall(index.search(queries, 50), exact, queries, vectors, metric) == 1.0


@pytest.mark.parametrize("metric", METRICS)
def test_exact_neighbours_are_those_of_a_full_sort(metric: Metric) -> None:
    vectors, queries = clustered(300), clustered(7, seed=1)
    scores = (unit_rows(queries) @ unit_rows(vectors).T) if metric == "cosine" else queries @ vectors.T
    np.testing.assert_array_equal(exact_neighbours(queries, vectors, metric, 10), np.argsort(-scores, axis=1)[:, :10])
    np.testing.assert_array_equal(ExactIndex(vectors, metric).search(queries, 10), np.argsort(-scores, axis=1)[:, :10])


@pytest.mark.parametrize("graph_above", [index_module.GRAPH_ABOVE, 0])
@pytest.mark.parametrize("allowed_items", [0, 5, 300, 4600, 5999])
def test_only_allowed_positions_are_found(allowed_items: int, graph_above: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "GRAPH_ABOVE", graph_above)
    vectors = clustered(6000)
    index, _ = build_index(vectors, "inner_product", SETTINGS)
    allowed = np.sort(np.random.default_rng(2).choice(6000, allowed_items, replace=False))
    queries = clustered(20, seed=1)
    found = index.search(queries, 50, allowed)
    assert found.shape == (20, 50)
    assert set(found[found >= 0].tolist()) <= set(allowed.tolist())
    np.testing.assert_array_equal((found >= 0).sum(axis=1), min(50, allowed_items))
    if allowed_items:
        exact = allowed[exact_neighbours(queries, vectors[allowed], "inner_product", 50)]
        assert recall(found, exact, queries, vectors, "inner_product") == 1.0


def test_similar_items_are_the_nearest_others_by_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = clustered(400)
    vectors[7] = 0
    index, _ = build_index(vectors, "cosine", SETTINGS)
    cosines = unit_rows(vectors) @ unit_rows(vectors).T
    np.fill_diagonal(cosines, -np.inf)
    expected = np.argsort(-cosines, axis=1)[:, :5]
    by_scan = similar_items(vectors, 5, index)
    monkeypatch.setattr(index_module, "SIMILAR_BY_SCAN", 0)
    for found in (by_scan, similar_items(vectors, 5, index)):
        assert (found[7] == -1).all()
        rest = np.arange(400) != 7
        np.testing.assert_array_equal(found[rest], expected[rest])


def test_an_item_alone_has_no_similar_ones() -> None:
    index, _ = build_index(clustered(1), "cosine", SETTINGS)
    assert similar_items(clustered(1), 5, index).tolist() == [[-1] * 5]


def test_recall_is_the_share_that_is_as_near_as_the_true_neighbours() -> None:
    vectors = np.array([[4.0], [3.0], [3.0], [1.0]], np.float32)
    query = np.ones((1, 1), np.float32)
    exact = exact_neighbours(query, vectors, "inner_product", 2)
    for found, share in (([0, 1], 1.0), ([0, 2], 1.0), ([0, 3], 0.5), ([0, -1], 0.5), ([3, -1], 0.0)):
        assert recall(np.array([found]), exact, query, vectors, "inner_product") == share


def test_more_neighbours_than_items_are_padded() -> None:
    index, _ = build_index(clustered(20), "cosine", SETTINGS)
    found = index.search(clustered(3, seed=1), 30)
    assert found.shape == (3, 30)
    assert (found[:, :20] >= 0).all()
    assert (found[:, 20:] == -1).all()


def test_a_query_finds_the_same_alone_and_among_others() -> None:
    index, _ = build_index(clustered(3000), "inner_product", SETTINGS)
    queries = clustered(40, seed=1)
    together = index.search(queries, 30)
    for row, query in enumerate(queries):
        np.testing.assert_array_equal(index.search(query[None], 30)[0], together[row])


def test_a_written_index_finds_what_the_built_one_finds() -> None:
    index, _ = build_index(clustered(1000), "cosine", SETTINGS)
    read = VectorIndex.deserialize(index.serialize(), "cosine", index.ef_search)
    queries = clustered(10, seed=1)
    np.testing.assert_array_equal(read.search(queries, 20), index.search(queries, 20))
    assert (read.items, read.dimension) == (1000, 16)


def test_what_is_no_hnsw_index_is_refused() -> None:
    import faiss

    flat = faiss.IndexFlatIP(4)
    with pytest.raises(ValueError, match="IndexFlat"):
        VectorIndex.deserialize(bytes(faiss.serialize_index(flat)), "cosine", 10)
    with pytest.raises(ValueError, match="not a FAISS index"):
        VectorIndex.deserialize(b"junk that is no index", "cosine", 10)


def test_vectors_that_are_not_finite_are_counted_in_the_error() -> None:
    vectors = clustered(10)
    vectors[3, 2] = np.nan
    with pytest.raises(ValueError, match="1 of 10 vectors are not finite"):
        build_index(vectors, "cosine", SETTINGS)


def test_no_vectors_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"shape \(n, d\)"):
        build_index(np.empty((0, 4), np.float32), "cosine", SETTINGS)


def test_a_row_of_zeros_stays_zero() -> None:
    np.testing.assert_allclose(unit_rows(np.array([[0.0, 0.0], [3.0, 4.0]])), [[0, 0], [0.6, 0.8]], rtol=1e-6)


@pytest.mark.parametrize("sorted_by_length", [True, False])
def test_a_scan_that_ends_early_finds_what_a_full_one_does(sorted_by_length: bool) -> None:
    random = np.random.default_rng(4)
    vectors = (random.normal(size=(20_000, 8)) * random.lognormal(0, 2, (20_000, 1))).astype(np.float32)
    if sorted_by_length:
        vectors = vectors[np.argsort(-np.linalg.norm(vectors, axis=1))]
    queries = np.vstack([random.normal(size=(40, 8)), np.zeros((1, 8))]).astype(np.float32)
    found = scan(queries, vectors, lengths_from(vectors), 30)
    np.testing.assert_array_equal(found[:40], exact_neighbours(queries[:40], vectors, "inner_product", 30))
    assert len(set(found[40].tolist())) == 30
    assert scan(queries[:0], vectors, lengths_from(vectors), 30).shape == (0, 30)


def test_the_number_of_faiss_threads_is_that_of_a_thread_alone() -> None:
    with (
        ThreadPoolExecutor(1, initializer=faiss.omp_set_num_threads, initargs=(3,)) as other,
        ThreadPoolExecutor(1, initializer=one_faiss_thread) as one,
    ):
        assert other.submit(faiss.omp_get_max_threads).result() == 3
        assert one.submit(faiss.omp_get_max_threads).result() == 1
        assert other.submit(faiss.omp_get_max_threads).result() == 3
