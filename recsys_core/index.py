"""Approximate nearest neighbours over item vectors: FAISS HNSW, with efSearch tuned to a recall target.

HNSW: Malkov & Yashunin 2018, "Efficient and robust approximate nearest neighbor search using hierarchical navigable
small world graphs". Inner products are searched in a graph built on inner products (Morozov & Babenko 2018,
"Non-metric similarity graphs for maximum inner product search"); docs/decisions.md has the comparison with the
reduction to Euclidean distance.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
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
ALIKE = 0.99
"""Where the shortest vector is such a share of the longest, a scan looks at all rows at once: it would end early nowhere."""
BLAS_FROM = 1024
"""Queries of so many values together are scanned by a matrix product, faster than one by one; FAISS asks for 128,000."""
GATHER_FROM = 8
"""With so many queries the vectors of a part are copied together before they are scanned; for fewer a copy costs more."""
SIMILAR = 50
"""Similar items that are kept for each."""
SIMILAR_BY_SCAN = 100_000
"""Up to so many items, the similar ones of all are found by comparing all with all."""
EXHAUSTIVE = 0
"""The efSearch of an index whose vectors are scanned, since its graph is slower or misses the recall target."""
SCAN_MS = 5.0
"""What a scan may take where the graph misses the recall target."""
SCANS_TIMED = 32


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


@dataclass(frozen=True, eq=False)
class Part:
    """The items that a search may return.

    Attributes:
        positions: int64 (m,), ascending.
        items: how many there are with those that are left out.
        tuned: the efSearch of the index was measured with these items, so that the graph may be asked for them.
    """

    positions: np.ndarray
    items: int
    tuned: bool = False

    @classmethod
    def of(cls, allowed: np.ndarray, tuned: bool = False) -> Part | None:
        """From a mask bool (n,); None when it leaves nothing out."""
        positions = np.flatnonzero(allowed)
        return None if len(positions) == len(allowed) else cls(positions, len(allowed), tuned)

    def __len__(self) -> int:
        return len(self.positions)

    @cached_property
    def selector(self) -> faiss.IDSelectorBitmap:
        """Lets the positions through; a bit for each item, where a set of them would take most of the search's time."""
        import faiss

        mask = np.zeros(self.items, bool)
        mask[self.positions] = True
        return faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))  # type: ignore[call-arg, arg-type]


class Searchable(Protocol):
    """Anything that finds the best positions for queries."""

    def search(self, queries: np.ndarray, k: int, allowed: Part | np.ndarray | None = None) -> np.ndarray: ...

    def scans(self, allowed: Part | None) -> bool:
        """Whether a search is exhaustive, and so exact to the last of the `k`."""


class ExactIndex:
    """Exhaustive search over item vectors float32 (n, d): for evaluation, which must not depend on an index."""

    def __init__(self, vectors: np.ndarray, metric: Metric) -> None:
        self.vectors = unit_rows(vectors) if metric == "cosine" else np.ascontiguousarray(vectors, np.float32)
        self.metric = metric

    def search(self, queries: np.ndarray, k: int, allowed: Part | np.ndarray | None = None) -> np.ndarray:
        """What `VectorIndex.search` approximates."""
        positions = _positions(allowed) if isinstance(allowed, np.ndarray) else None if allowed is None else allowed.positions
        return _padded(scan(_as_queries(queries, self.metric), self.vectors, self._lengths, k, positions), k)

    def scans(self, allowed: Part | None) -> bool:  # noqa: ARG002
        return True

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

    def search(self, queries: np.ndarray, k: int, allowed: Part | np.ndarray | None = None) -> np.ndarray:
        """The `k` best positions of each query.

        The graph finds few of the items that a filter leaves: it walks past those that are left out, and how far no efSearch
        can say that was measured without the filter. So it is asked for all items and for a part that it was tuned with.
        Anything else is scanned, exactly.

        Args:
            queries: float32 (b, dimension).
            k: neighbours wanted.
            allowed: positions that may be returned, None for all. They are filtered inside the search.

        Returns:
            int64 (b, k), best first, padded by -1.
        """
        part = Part(_positions(allowed), self.items) if isinstance(allowed, np.ndarray) else allowed
        queries = _as_queries(queries, self.metric)
        if self.scans(part):
            return _padded(scan(queries, self.vectors, self.lengths, k, None if part is None else part.positions), k)
        return _padded(self._walk(queries, k, part), k)

    def scans(self, allowed: Part | None) -> bool:
        """Whether a search is exhaustive, and so exact to the last of the `k`."""
        if self.ef_search == EXHAUSTIVE or self.items <= GRAPH_ABOVE:
            return True
        return allowed is not None and (not allowed.tuned or len(allowed) <= GRAPH_ABOVE)

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

    def search_graph(self, queries: np.ndarray, k: int, allowed: Part | None = None) -> np.ndarray:
        """`search` through the graph, however few items there are: what the tuning measures."""
        return _padded(self._walk(_as_queries(queries, self.metric), k, allowed), k)

    def _walk(self, queries: np.ndarray, k: int, allowed: Part | None) -> np.ndarray:
        import faiss

        selector = None if allowed is None else allowed.selector
        parameters = faiss.SearchParametersHNSW(efSearch=max(self.ef_search, k), sel=selector)  # type: ignore[attr-defined]
        _, positions = self.index.search(queries, min(k, self.items), params=parameters)
        return np.asarray(positions)

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


def longest_first(vectors: np.ndarray) -> np.ndarray:
    """What sorts vectors by falling length, equal ones as they stand: the order of items in a release.

    Long vectors are the neighbours of most users; a graph that takes them in first finds more of them (docs/decisions.md).
    """
    return np.argsort(-np.linalg.norm(vectors, axis=1), kind="stable")


def scan(
    queries: np.ndarray, vectors: np.ndarray, lengths: np.ndarray, k: int, positions: np.ndarray | None = None
) -> np.ndarray:
    """The rows of highest inner product with each query, int64 (b, min(k, m)), best first, exact.

    `positions` are the m rows that are looked at, ascending, None for all. `lengths` are those of `lengths_from`. Where rows
    stand by falling length, as in a release, the scan of a query ends where no further row can be among its best: an inner
    product is at most the product of the lengths. (Teflioudi, Gemulla & Mykytiuk 2015, "LEMP: Fast Retrieval of Large Entries
    in a Matrix Product", section 3.)
    """
    rows = len(vectors) if positions is None else len(positions)
    k = min(k, rows)
    if not k or not len(queries):
        return np.empty((len(queries), k), np.int64)
    ends_early = lengths[-1] < ALIKE * lengths[0]
    at = min(rows, max(SCAN_FIRST, 4 * k)) if ends_early else rows
    scores, found = _best_of(queries, vectors, positions, 0, at, k)
    reach = np.linalg.norm(queries, axis=1)
    while at < rows:
        open_ones = np.flatnonzero(reach * lengths[at if positions is None else positions[at]] >= scores[:, -1])
        if not len(open_ones):
            break
        end = min(rows, 2 * at)
        more, places = _best_of(queries[open_ones], vectors, positions, at, end, min(k, end - at))
        both = np.hstack([scores[open_ones], more])
        best = np.argsort(-both, axis=1, kind="stable")[:, :k]
        scores[open_ones] = np.take_along_axis(both, best, axis=1)
        found[open_ones] = np.take_along_axis(np.hstack([found[open_ones], places]), best, axis=1)
        at = end
    return found


def _best_of(
    queries: np.ndarray, vectors: np.ndarray, positions: np.ndarray | None, start: int, end: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows of the `k` best of a stretch of the rows, or of `positions`."""
    import faiss

    faiss.cvar.distance_compute_blas_threshold = BLAS_FROM
    if positions is None:
        scores, places = faiss.knn(queries, vectors[start:end], k, faiss.METRIC_INNER_PRODUCT)
        return scores, places + start
    some = positions[start:end]
    if len(queries) >= GATHER_FROM:
        scores, places = faiss.knn(queries, vectors[some], k, faiss.METRIC_INNER_PRODUCT)
        return scores, some[places]
    scores, found = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    sizes = vectors.shape[1], len(queries), len(vectors), len(some), k
    given, filled = (queries, vectors, some), (scores, found)
    faiss.knn_inner_products_by_idx(*map(faiss.swig_ptr, given), *sizes, *map(faiss.swig_ptr, filled), 0)  # type: ignore[attr-defined]
    return scores, found


def _as_queries(queries: np.ndarray, metric: Metric) -> np.ndarray:
    return unit_rows(queries) if metric == "cosine" else np.ascontiguousarray(queries, dtype=np.float32)


def _positions(allowed: np.ndarray) -> np.ndarray:
    """Positions as a scan takes them."""
    return np.sort(np.asarray(allowed, np.int64))


def _padded(found: np.ndarray, k: int) -> np.ndarray:
    """Found positions (b, <= k), padded by -1 to `k`."""
    return np.pad(found, ((0, 0), (0, k - found.shape[1])), constant_values=-1) if found.shape[1] < k else found


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, float32 (n, d); a row of zeros stays."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)


def build_index(
    vectors: np.ndarray,
    metric: Metric,
    settings: IndexSettings,
    queries: np.ndarray | None = None,
    seed: int = 0,
    allowed: Part | None = None,
) -> tuple[VectorIndex, IndexReport]:
    """Build HNSW over item vectors and raise efSearch until recall@50 reaches the target.

    Args:
        vectors: float32 (n, d), finite.
        metric: what is searched for.
        settings: HNSW parameters and the recall target.
        queries: float32 (q, d), a sample of what will be searched for; None: the item vectors with some noise.
        seed: of the samples.
        allowed: as in `tune_index`.
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
    sample = sample_queries(vectors if queries is None else queries, settings, seed, queries is None)
    return index, replace(tune_index(index, sample, settings, allowed), build_seconds=build_seconds)


def tune_index(index: VectorIndex, queries: np.ndarray, settings: IndexSettings, allowed: Part | None = None) -> IndexReport:
    """Raise efSearch until recall@50 of the queries reaches the target, or find that a scan does better.

    `allowed` are the items that will be searched, None for all. Where some are left out the graph needs a larger efSearch; up
    to GRAPH_ABOVE of them are scanned anyway. Of more items the search is exhaustive where a scan is faster than the graph, or
    where the graph misses the target and a scan takes no more than SCAN_MS.
    """
    if allowed is not None and len(allowed) <= GRAPH_ABOVE:
        allowed = None
    curve = _tune(index, queries, settings, allowed)
    best, reached = curve[-1], curve[-1].recall >= settings.recall_target
    index.ef_search = best.ef_search
    if not index.scans(allowed):
        milliseconds = _scan_milliseconds(index, queries, allowed)
        if milliseconds <= (best.milliseconds if reached else max(best.milliseconds, SCAN_MS)):
            index.ef_search, reached = EXHAUSTIVE, True
    return IndexReport(
        metric=index.metric,
        items=index.items,
        dimension=index.dimension,
        ef_search=index.ef_search,
        recall=1.0 if index.ef_search == EXHAUSTIVE else best.recall,
        reached_target=reached,
        build_seconds=0.0,
        curve=tuple(curve),
    )


def _scan_milliseconds(index: VectorIndex, queries: np.ndarray, allowed: Part | None) -> float:
    """What an exhaustive search takes for one query, the median of some."""
    scanned = VectorIndex(index.index, index.metric, EXHAUSTIVE)
    scanned.search(queries[:1], RECALL_AT, allowed)
    times = []
    with _one_thread():
        for query in queries[:SCANS_TIMED, None]:
            started = time.perf_counter()
            scanned.search(query, RECALL_AT, allowed)
            times.append(time.perf_counter() - started)
    return float(np.median(times)) * 1000


@contextmanager
def _one_thread() -> Iterator[None]:
    """FAISS computes on one thread, as it does for a call in serving."""
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


def sample_queries(pool: np.ndarray, settings: IndexSettings, seed: int = 0, noisy: bool = False) -> np.ndarray:
    """Some rows of `pool` to tune by; with some noise where these are the items themselves."""
    random = np.random.default_rng(seed)
    sampled = pool[random.choice(len(pool), size=min(settings.tuning_queries, len(pool)), replace=False)]
    if noisy:
        sampled = sampled + random.normal(scale=0.1 * sampled.std() + 1e-9, size=sampled.shape)
    return sampled.astype(np.float32)


def _tune(index: VectorIndex, queries: np.ndarray, settings: IndexSettings, allowed: Part | None) -> list[CurvePoint]:
    """Points of growing efSearch, the last is the first that reaches the target (or the largest allowed)."""
    vectors = index.vectors
    if allowed is None:
        exact = exact_neighbours(queries, vectors, index.metric, RECALL_AT)
    else:
        exact = allowed.positions[exact_neighbours(queries, vectors[allowed.positions], index.metric, RECALL_AT)]
    index.search_graph(queries[:8], RECALL_AT)
    curve: list[CurvePoint] = []
    ef = RECALL_AT
    with _one_thread():
        while not curve or (curve[-1].recall < settings.recall_target and curve[-1].ef_search < settings.max_ef_search):
            index.ef_search = ef
            started = time.perf_counter()
            found = index.search_graph(queries, exact.shape[1], allowed)
            milliseconds = (time.perf_counter() - started) * 1000 / len(queries)
            curve.append(CurvePoint(ef, recall(found, exact, queries, vectors, index.metric), milliseconds))
            ef = min(ef * 3 // 2, settings.max_ef_search)
    return curve


def similar_items(
    vectors: np.ndarray, k: int, index: Searchable, only: np.ndarray | None = None, allowed: Part | None = None
) -> np.ndarray:
    """The `k` nearest other items of every item by cosine, int32 (n, k), nearest first, padded by -1.

    `allowed` are the items that may be found, None for all. Up to SIMILAR_BY_SCAN all are compared with all, beyond that
    `index` is searched. Items without a direction have none, and those that are not in `only` (positions, None for all).
    """
    units = unit_rows(vectors)
    found = np.full((len(units), k), -1, np.int32)
    wanted = np.arange(len(units)) if only is None else only
    if len(units) <= SIMILAR_BY_SCAN:
        index = ExactIndex(units, "inner_product")
    step = 4096
    for at in progress.track(range(0, len(wanted), step), "similar items"):
        rows = wanted[at : at + step]
        queries = units[rows]
        nearest = index.search(queries, k + 1, allowed)
        itself = nearest == rows[:, None]
        others = np.take_along_axis(nearest, np.argsort(itself, axis=1, kind="stable"), axis=1)[:, :k]
        found[rows] = np.where(queries.any(axis=1, keepdims=True), others, -1)
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
