"""Approximate nearest neighbours over item vectors: FAISS HNSW, with efSearch tuned to a recall target.

HNSW: Malkov & Yashunin 2018, "Efficient and robust approximate nearest neighbor search using hierarchical navigable
small world graphs". Inner products are searched in a graph built on inner products (Morozov & Babenko 2018,
"Non-metric similarity graphs for maximum inner product search"); docs/decisions.md has the comparison with the
reduction to Euclidean distance.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from recsys_core import progress
from recsys_core.settings import IndexSettings

if TYPE_CHECKING:
    import faiss

# FAISS tells at INFO which builds of itself it did not find.
logging.getLogger("faiss.loader").setLevel(logging.WARNING)

Metric = Literal["inner_product", "cosine"]
RECALL_AT = 50
GRAPH_ABOVE = 50_000
"""With fewer items the vectors are scanned: as fast as the graph for one query, several times faster for many, and exact."""
SCAN_FIRST = 4096
"""Rows that a scan looks at before it asks whether further ones can be better."""
BLAS_FROM = 1024
"""Queries of so many values together are scanned by a matrix product, faster than one by one; FAISS asks for 128,000."""
SIMILAR_BY_SCAN = 100_000
"""Up to so many items, the similar ones of all are found by comparing all with all."""
EXACT_BELOW = 4096
"""Filters that leave fewer items are searched exhaustively: HNSW finds few of them, and this is as fast."""


@dataclass(frozen=True)
class CurvePoint:
    """What one efSearch gives: recall@50 against exact search, and milliseconds a query on one thread."""

    ef_search: int
    recall: float
    milliseconds: float


@dataclass(frozen=True)
class IndexReport:
    """How an index was built and tuned."""

    metric: Metric
    items: int
    dimension: int
    ef_search: int
    recall: float
    reached_target: bool
    build_seconds: float
    curve: tuple[CurvePoint, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Searchable(Protocol):
    """Anything that finds the best positions for queries."""

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> np.ndarray: ...


class ExactIndex:
    """Exhaustive search over item vectors float32 (n, d): for evaluation, which must not depend on an index."""

    def __init__(self, vectors: np.ndarray, metric: Metric) -> None:
        self.vectors = np.ascontiguousarray(vectors, np.float32)
        self.metric = metric

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> np.ndarray:
        """What `VectorIndex.search` approximates."""
        found = np.full((len(queries), k), -1, np.int64)
        if allowed is None and self.metric == "inner_product" and len(self.vectors) and len(queries):
            best = scan(np.ascontiguousarray(queries, np.float32), self.vectors, self._lengths, min(k, len(self.vectors)))
            found[:, : best.shape[1]] = best
            return found
        positions = np.arange(len(self.vectors)) if allowed is None else np.asarray(allowed, np.int64)
        if len(positions):
            best = exact_neighbours(queries, self.vectors if allowed is None else self.vectors[positions], self.metric, k)
            found[:, : best.shape[1]] = positions[best]
        return found

    @cached_property
    def _lengths(self) -> np.ndarray:
        return lengths_from(self.vectors)


class VectorIndex:
    """HNSW over `n` item vectors; positions are row numbers of the vectors it was built from."""

    def __init__(self, index: faiss.IndexHNSWFlat, metric: Metric, ef_search: int) -> None:
        self.index = index
        self.metric = metric
        self.ef_search = ef_search
        self._content: np.ndarray | None = None

    @property
    def items(self) -> int:
        return int(self.index.ntotal)

    @property
    def dimension(self) -> int:
        return int(self.index.d)

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> np.ndarray:
        """The `k` best positions of each query.

        Args:
            queries: float32 (b, dimension).
            k: neighbours wanted.
            allowed: positions that may be returned, int64 (m,), None for all. They are filtered inside the search.

        Returns:
            int64 (b, k), best first, padded by -1. Few items, or few allowed ones, are searched exhaustively.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if self.metric == "cosine":
            queries = unit_rows(queries)
        if allowed is not None and len(allowed) <= EXACT_BELOW:
            return self._search_exactly(queries, k, np.asarray(allowed, np.int64))
        return self._search(queries, k, allowed, through_graph=self.items > GRAPH_ABOVE)

    @cached_property
    def vectors(self) -> np.ndarray:
        """float32 (n, d): the vectors as they lie in the index."""
        import faiss

        stored = faiss.downcast_index(self.index.storage)
        found: np.ndarray = faiss.rev_swig_ptr(stored.get_xb(), self.items * self.dimension)  # type: ignore[attr-defined]
        return found.reshape(self.items, self.dimension)

    @cached_property
    def lengths(self) -> np.ndarray:
        """float32 (n,): upper bounds of the lengths of the vectors from each position on."""
        return lengths_from(self.vectors)

    def search_graph(self, queries: np.ndarray, k: int) -> np.ndarray:
        """`search` through the graph, however few items there are: what the tuning measures."""
        queries = unit_rows(queries) if self.metric == "cosine" else np.ascontiguousarray(queries, dtype=np.float32)
        return self._search(queries, k, None, through_graph=True)

    def _search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None, through_graph: bool) -> np.ndarray:
        import faiss

        selector = None if allowed is None else self._only(allowed)
        if through_graph:
            parameters = faiss.SearchParametersHNSW(efSearch=max(self.ef_search, k), sel=selector)  # type: ignore[attr-defined]
            _, positions = self.index.search(queries, min(k, self.items), params=parameters)
        elif selector is None and self.metric == "inner_product":
            positions = scan(queries, self.vectors, self.lengths, min(k, self.items))
        else:
            vectors = faiss.downcast_index(self.index.storage)
            _, positions = vectors.search(queries, min(k, self.items), params=faiss.SearchParameters(sel=selector))  # type: ignore[call-arg]
        if positions.shape[1] < k:
            positions = np.pad(positions, ((0, 0), (0, k - positions.shape[1])), constant_values=-1)
        return positions

    def _only(self, allowed: np.ndarray) -> faiss.IDSelectorBitmap:
        """Lets some positions through; a bit for each item, where a set of them would take most of the search's time."""
        import faiss

        mask = np.zeros(self.items, bool)
        mask[allowed] = True
        return faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))  # type: ignore[call-arg, arg-type]

    def _search_exactly(self, queries: np.ndarray, k: int, allowed: np.ndarray) -> np.ndarray:
        positions = np.full((len(queries), k), -1, np.int64)
        if len(allowed):
            best = ExactIndex(self.index.reconstruct_batch(allowed), self.metric).search(queries, k)
            positions[:] = np.where(best >= 0, allowed[best], -1)
        return positions

    def serialize(self) -> bytes:
        """The index as FAISS writes it."""
        import faiss

        return bytes(faiss.serialize_index(self.index))

    @classmethod
    def deserialize(cls, data: bytes | memoryview, metric: Metric, ef_search: int) -> VectorIndex:
        """Read what `serialize` made, over the memory of `data`. Raises ValueError when it is not an HNSW index."""
        import faiss

        content = np.frombuffer(data, dtype=np.uint8)
        try:
            index = faiss.read_index(faiss.ZeroCopyIOReader(faiss.swig_ptr(content), content.size))  # type: ignore[attr-defined]
        except RuntimeError as error:
            raise ValueError(f"not a FAISS index: {str(error).splitlines()[0]}") from error
        if not isinstance(index, faiss.IndexHNSWFlat):
            raise ValueError(f"a {type(index).__name__} is not an HNSW index")
        made = cls(index, metric, ef_search)
        made._content = content
        return made


def one_faiss_thread() -> None:
    """From now on searches of the calling thread use no other thread, so that one of a pool doesn't take all cores.

    OpenMP keeps its thread count for each thread.
    """
    import faiss

    faiss.omp_set_num_threads(1)


def lengths_from(vectors: np.ndarray) -> np.ndarray:
    """float32 (n,): the length of the longest vector from each row on, a little more for rounding."""
    lengths = np.linalg.norm(vectors, axis=1).astype(np.float32)
    return np.maximum.accumulate(lengths[::-1])[::-1] * np.float32(1 + 1e-5)


def scan(queries: np.ndarray, vectors: np.ndarray, lengths: np.ndarray, k: int) -> np.ndarray:
    """The `k` rows of highest inner product with each query, int64 (b, k), best first, exact.

    `lengths` are those of `lengths_from`. Where rows stand by falling length, as in a release, the scan of a query ends
    where no further row can be among its best: an inner product is at most the product of the lengths. (Teflioudi, Gemulla &
    Mykytiuk 2015, "LEMP: Fast Retrieval of Large Entries in a Matrix Product", section 3.)
    """
    import faiss

    faiss.cvar.distance_compute_blas_threshold = BLAS_FROM
    at = min(len(vectors), max(SCAN_FIRST, 4 * k))
    scores, found = faiss.knn(queries, vectors[:at], k, faiss.METRIC_INNER_PRODUCT)
    reach = np.linalg.norm(queries, axis=1)
    while at < len(vectors):
        open_ones = np.flatnonzero(reach * lengths[at] >= scores[:, -1])
        if not len(open_ones):
            break
        end = min(len(vectors), 2 * at)
        more, places = faiss.knn(queries[open_ones], vectors[at:end], min(k, end - at), faiss.METRIC_INNER_PRODUCT)
        both = np.hstack([scores[open_ones], more])
        best = np.argsort(-both, axis=1, kind="stable")[:, :k]
        scores[open_ones] = np.take_along_axis(both, best, axis=1)
        found[open_ones] = np.take_along_axis(np.hstack([found[open_ones], places + at]), best, axis=1)
        at = end
    return found


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, float32 (n, d); a row of zeros stays."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)


def build_index(
    vectors: np.ndarray, metric: Metric, settings: IndexSettings, queries: np.ndarray | None = None, seed: int = 0
) -> tuple[VectorIndex, IndexReport]:
    """Build HNSW over item vectors and raise efSearch until recall@50 reaches the target.

    Args:
        vectors: float32 (n, d), finite.
        metric: what is searched for.
        settings: HNSW parameters and the recall target.
        queries: float32 (q, d), a sample of what will be searched for; None: the item vectors with some noise.
        seed: of the samples.
    """
    import faiss

    if vectors.ndim != 2 or not len(vectors):
        raise ValueError(f"an index needs vectors of shape (n, d), got {vectors.shape}")
    if not np.isfinite(vectors).all():
        raise ValueError(f"{int((~np.isfinite(vectors)).any(axis=1).sum())} of {len(vectors)} vectors are not finite")
    stored = unit_rows(vectors) if metric == "cosine" else np.ascontiguousarray(vectors, dtype=np.float32)
    hnsw = faiss.IndexHNSWFlat(stored.shape[1], settings.m, faiss.METRIC_INNER_PRODUCT)
    hnsw.hnsw.efConstruction = settings.ef_construction
    started = time.perf_counter()
    step = max(1000, len(stored) // 50)
    for at in progress.track(range(0, len(stored), step), f"index ({metric.replace('_', ' ')})"):
        hnsw.add(stored[at : at + step])
    build_seconds = time.perf_counter() - started
    index = VectorIndex(hnsw, metric, settings.max_ef_search)
    curve = _tune(index, vectors, _sample(vectors if queries is None else queries, settings, seed, queries is None), settings)
    best = curve[-1]
    index.ef_search = best.ef_search
    return index, IndexReport(
        metric=metric,
        items=len(vectors),
        dimension=vectors.shape[1],
        ef_search=best.ef_search,
        recall=best.recall,
        reached_target=best.recall >= settings.recall_target,
        build_seconds=build_seconds,
        curve=tuple(curve),
    )


def _sample(pool: np.ndarray, settings: IndexSettings, seed: int, noisy: bool) -> np.ndarray:
    random = np.random.default_rng(seed)
    sampled = pool[random.choice(len(pool), size=min(settings.tuning_queries, len(pool)), replace=False)]
    if noisy:
        sampled = sampled + random.normal(scale=0.1 * sampled.std() + 1e-9, size=sampled.shape)
    return sampled.astype(np.float32)


def _tune(index: VectorIndex, vectors: np.ndarray, queries: np.ndarray, settings: IndexSettings) -> list[CurvePoint]:
    """Points of growing efSearch, the last is the first that reaches the target (or the largest allowed)."""
    import faiss

    exact = exact_neighbours(queries, vectors, index.metric, RECALL_AT)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    index.search_graph(queries[:8], RECALL_AT)
    curve = []
    try:
        ef = RECALL_AT
        while True:
            index.ef_search = ef
            started = time.perf_counter()
            found = index.search_graph(queries, exact.shape[1])
            milliseconds = (time.perf_counter() - started) * 1000 / len(queries)
            curve.append(CurvePoint(ef, recall(found, exact, queries, vectors, index.metric), milliseconds))
            if curve[-1].recall >= settings.recall_target or ef >= settings.max_ef_search:
                return curve
            ef = min(ef * 3 // 2, settings.max_ef_search)
    finally:
        faiss.omp_set_num_threads(threads)


def similar_items(vectors: np.ndarray, k: int, index: Searchable, only: np.ndarray | None = None) -> np.ndarray:
    """The `k` nearest other items of every item by cosine, int32 (n, k), nearest first, padded by -1.

    Up to SIMILAR_BY_SCAN all are compared with all, beyond that `index` is searched. Items without a direction have none,
    and those that are not in `only` (positions, None for all).
    """
    import faiss

    units = unit_rows(vectors)
    found = np.full((len(units), k), -1, np.int32)
    wanted = np.arange(len(units)) if only is None else only
    step = 4096
    for at in progress.track(range(0, len(wanted), step), "similar items"):
        rows = wanted[at : at + step]
        queries = units[rows]
        if len(units) <= SIMILAR_BY_SCAN:
            _, nearest = faiss.knn(queries, units, min(k + 1, len(units)), faiss.METRIC_INNER_PRODUCT)
        else:
            nearest = index.search(queries, k + 1)
        itself = nearest == rows[:, None]
        others = np.take_along_axis(nearest, np.argsort(itself, axis=1, kind="stable"), axis=1)[:, : nearest.shape[1] - 1]
        found[rows, : others.shape[1]] = np.where(queries.any(axis=1, keepdims=True), others, -1)
    return found


def exact_neighbours(queries: np.ndarray, vectors: np.ndarray, metric: Metric, k: int) -> np.ndarray:
    """The true `k` best positions by exhaustive search, int64 (b, min(k, n))."""
    if metric == "cosine":
        queries, vectors = unit_rows(queries), unit_rows(vectors)
    k = min(k, len(vectors))
    result = np.empty((len(queries), k), np.int64)
    for at in range(0, len(queries), 256):
        scores = queries[at : at + 256] @ vectors.T
        top = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(scores, top, axis=1), axis=1, kind="stable")
        result[at : at + 256] = np.take_along_axis(top, order, axis=1)
    return result


def recall(found: np.ndarray, exact: np.ndarray, queries: np.ndarray, vectors: np.ndarray, metric: Metric) -> float:
    """Share of the exact neighbours that were found; one as near as the last of them counts, since ties have no order.

    (Aumüller, Bernhardsson & Faithfull 2020, "ANN-Benchmarks", section 2.1, with the distance as the threshold.)
    """
    if metric == "cosine":
        queries, vectors = unit_rows(queries), unit_rows(vectors)
    worst = np.einsum("bd,bd->b", queries, vectors[exact[:, -1]])
    scores = np.einsum("bd,bkd->bk", queries, vectors[found])
    near = scores >= (worst - 1e-5 * np.abs(worst))[:, None]
    return float(np.count_nonzero(near & (found >= 0)) / exact.size)
