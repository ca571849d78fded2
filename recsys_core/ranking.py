"""The scoring path: candidates, blend, boosts and rules, top-n, vectorised over users.

The hourly precompute calls it with many users, the online miss with one, so that the two can't drift apart.

Every candidate gets five parts on comparable scales and one weighted sum of them:

    als         û·y / max|y|, û the user's factor scaled to length 1, in [-1, 1]
    two_tower   the user tower's vector · the item tower's: their cosine, plus the item's bias in a model with such
    session     ŝ·ŷ, ŝ the decayed sum of the user's last items' unit vectors scaled to length 1, in [-1, 1]
    trend       Σ_h mix_h · log(1+trend_h) / log(1+max trend_h) over the half-lives h; the shares may be below 0
    popular     log(1+popularity) / log(1+max popularity), in [0, 1]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_core.cores import usable_cores
from recsys_core.fold_in import fold_in
from recsys_core.index import RECALL_AT, Metric, Part, Searchable, one_faiss_thread, unit_rows
from recsys_core.item_ids import ItemIds
from recsys_core.settings import RankingSettings
from recsys_core.tower import UserTower

PARTS = ("als", "two_tower", "session", "trend", "popular")
Scores = float | Sequence[float]
"""Trend of an item: one score, or one for each half-life."""

SPAN = 256
"""Users ranked at a time: enough for a matrix product, and several spans for the threads of a batch."""
GATHERED = 8
"""Users whose candidates' vectors are gathered at a time: they stay in the processor's cache until they are multiplied."""
SPANS_FOR_THREADS = 3
WALKED = 4
"""A graph is trusted for a user as long as no more than the fourth part of what it found is left out: those further away than
the RECALL_AT nearest are found less surely."""


@dataclass(frozen=True)
class Snapshot:
    """A release in memory. Item positions are row numbers of `items`, the same in all its arrays.

    Attributes:
        release_id: name of the release.
        items: `item_id` and catalogue columns (title, category, price, available, attributes), n rows.
        als_items: float32 (n, rank), the ALS item factors.
        als_gram: float64 (rank, rank), the factors' YᵀY.
        als_version: data version of the factors; user factors of another version are not used with them.
        als_alpha, als_base_preference: confidence and preference of an item in the fold-in.
        als_regularization, als_regularization_per_item: its ridge for a user of n items is the first + n × the second.
        als_item_weights: float32 (n,), what an interaction with each item weighed in the fit; None: all the same.
        popular: float32 (n,), popularity of the window, >= 0.
        similar: int32 (n, k), the nearest other available items of each by cosine, nearest first, padded by -1.
        indexes: HNSW by metric over `als_items`.
        ranking: the weights that the release was tuned to.
        two_tower_items: float32 (n, d), vectors of the item tower, zeros where it lacks an item; None: no model.
        two_tower_index: finds the highest inner products among them.
        tower: the user tower that belongs to them.
    """

    release_id: str
    items: pa.Table
    als_items: np.ndarray
    als_gram: np.ndarray
    als_version: str
    als_alpha: float
    als_regularization: float
    popular: np.ndarray
    similar: np.ndarray
    indexes: Mapping[Metric, Searchable]
    als_base_preference: float = 1.0
    als_regularization_per_item: float = 0.0
    als_item_weights: np.ndarray | None = None
    ranking: RankingSettings = field(default_factory=RankingSettings)
    two_tower_items: np.ndarray | None = None
    two_tower_index: Searchable | None = None
    tower: UserTower | None = None

    def __post_init__(self) -> None:
        held = {value is not None for value in (self.two_tower_items, self.two_tower_index, self.tower)}
        if len(held) > 1:
            raise ValueError("a two-tower model is item vectors, their index and the user tower; one of them is missing")
        _ = self.item_ids  # raises ValueError

    @cached_property
    def item_ids(self) -> ItemIds:
        """Item id of each position, and position of each id."""
        return ItemIds(self.items["item_id"])

    @cached_property
    def available(self) -> np.ndarray:
        """bool (n,): items that may be recommended."""
        return availability(self.items)

    @cached_property
    def servable(self) -> Part | None:
        """The available items as a part of all, None where all are; the indexes are tuned with it."""
        return Part.of(self.available, tuned=True)

    @cached_property
    def norms(self) -> np.ndarray:
        """float32 (n,): lengths of the item factors; 1 for a factor of zeros."""
        norms = np.sqrt(np.einsum("nd,nd->n", self.als_items, self.als_items))
        return np.where(norms > 0, norms, 1).astype(np.float32)

    @cached_property
    def longest(self) -> float:
        """Length of the longest item factor, 1 when all are zeros."""
        return float(self.norms.max(initial=0)) or 1.0

    @cached_property
    def popular_part(self) -> np.ndarray:
        """float32 (n,): the `popular` part of each item."""
        return relative_log(self.popular)

    @cached_property
    def by_popularity(self) -> np.ndarray:
        """int64: positions of the available items, most popular first."""
        order = np.argsort(-self.popular, kind="stable")
        return order[self.available[order]]

    @cached_property
    def categories(self) -> np.ndarray:
        """object (n,): category of each item, an empty string where it has none."""
        return np.asarray(pc.fill_null(self.items["category"], "").to_pylist(), dtype=object)

    def in_categories(self, wanted: Sequence[str]) -> np.ndarray:
        """bool (n,): items of any of the categories or of one below them (`sports` holds `sports/shoes`)."""
        mask = np.zeros(self.items.num_rows, bool)
        column = pc.fill_null(self.items["category"], "")
        for category in wanted:
            below = pc.starts_with(column, category.rstrip("/") + "/")
            mask |= np.asarray(pc.or_(pc.equal(column, category), below))
        return mask

    def positions_of(self, item_ids: Iterable[str]) -> np.ndarray:
        """int64: positions of those item ids that the release knows, in order."""
        positions = self.item_ids.positions(list(item_ids))
        return positions[positions >= 0]


def availability(items: pa.Table) -> np.ndarray:
    """bool (n,): catalogue rows that may be recommended; one that does not say may."""
    return np.asarray(pc.fill_null(items["available"], True).to_numpy(zero_copy_only=False), dtype=bool)


@dataclass(frozen=True)
class Trend:
    """What is trending now, as a dense part over the snapshot's items.

    Attributes:
        part: float32 (n,), the mixed trend.
        order: int64, positions with a trend, highest part first.
        by_half_life: float32 (n, half-lives), each in [0, 1].
    """

    part: np.ndarray
    order: np.ndarray
    by_half_life: np.ndarray = field(repr=False)

    @classmethod
    def of(cls, snapshot: Snapshot, scores: Mapping[str, Scores], mix: Sequence[float] | None = None) -> Trend:
        """From scores by item id, one or one a half-life; items that the release does not know are left out.

        `mix` are the shares of the half-lives, None: those of the release. Where there are not as many scores, the first
        one is the trend.
        """
        places = snapshot.item_ids.positions(list(scores))
        values = np.array(list(scores.values()), np.float32).reshape(len(scores), -1 if scores else 1)
        known = places >= 0
        return cls.at(snapshot, places[known], values[known], snapshot.ranking.trend_mix if mix is None else mix)

    @classmethod
    def at(cls, snapshot: Snapshot, places: np.ndarray, values: np.ndarray, mix: Sequence[float]) -> Trend:
        """From scores (k, half-lives) of the items at positions int64 (k,)."""
        dense = np.zeros((snapshot.items.num_rows, values.shape[1]), np.float32)
        dense[places] = values
        by_half_life = np.column_stack([relative_log(column) for column in dense.T])
        shares = np.asarray(mix if len(mix) == dense.shape[1] else [1.0] + [0.0] * (dense.shape[1] - 1), np.float32)
        part = by_half_life @ shares
        trending = np.flatnonzero(dense.any(axis=1) & snapshot.available)
        return cls(part, trending[np.argsort(-part[trending], kind="stable")], by_half_life)


@dataclass(frozen=True)
class Users:
    """The state of `b` users that is ranked for.

    Attributes:
        als: float32 (b, rank), user factors; a row of zeros where ALS does not know the user.
        last_items: int64 (b, k), positions of the last items, newest first, padded by -1.
        excluded: int64 (b, x), positions that may not be returned, padded by -1.
        two_tower: float32 (b, d), vectors of the user tower, a row of zeros where it knows nothing; None: no such model.
        had: by row, int64, further positions that may not be returned, for users that had very many items.
    """

    als: np.ndarray
    last_items: np.ndarray
    excluded: np.ndarray
    two_tower: np.ndarray | None = None
    had: Mapping[int, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.als)

    def rows(self, which: slice) -> Users:
        """Some of the users."""
        start, end, _ = which.indices(len(self))
        had = {row - start: self.had[row] for row in self.had if start <= row < end} if self.had else self.had
        two_tower = None if self.two_tower is None else self.two_tower[which]
        return Users(self.als[which], self.last_items[which], self.excluded[which], two_tower, had)

    def without_excluded(self, row: int, servable: np.ndarray) -> np.ndarray:
        """bool (items,): what of `servable` may be returned to a user."""
        own = servable.copy()
        own[self.excluded[row][self.excluded[row] >= 0]] = False
        if row in self.had:
            own[self.had[row]] = False
        return own


@dataclass(frozen=True)
class Ranked:
    """The answer for `b` users.

    Attributes:
        positions: int64 (b, n), best first, padded by -1.
        scores: float32 (b, n), -inf where padded.
        parts: float32 (b, n, len(PARTS)), the unweighted parts of each score.
    """

    positions: np.ndarray
    scores: np.ndarray
    parts: np.ndarray = field(repr=False)


def rank(
    snapshot: Snapshot, trend: Trend, users: Users, n: int, settings: RankingSettings, allowed: np.ndarray | None = None
) -> Ranked:
    """The `n` best items for each user.

    Args:
        snapshot: the release.
        trend: the trend of the moment.
        users: whom to rank for. Users without a factor but with last items get one by fold-in.
        n: items wanted.
        settings: weights and numbers of candidates.
        allowed: bool (items,), a filter on top of availability; None for no filter.
    """
    weights = part_weights(settings)

    def ranked(span: slice) -> Ranked:
        mine = users.rows(span)
        queries = queries_of(snapshot, mine, settings)
        positions = candidates(snapshot, trend, mine, queries, n, settings, allowed)
        parts = parts_of(snapshot, trend, queries, positions)
        weighted = np.einsum("bcp,p->bc", parts, weights)  # a BLAS would wake its threads, which spin for long after
        return _top(positions, np.where(positions >= 0, weighted, np.float32(-np.inf)), parts, n)

    return _joined(list(_each(ranked, _slices(len(users), SPAN))))


def _slices(length: int, size: int) -> list[slice]:
    return [slice(at, at + size) for at in range(0, max(length, 1), size)]


def _joined(answers: Sequence[Ranked]) -> Ranked:
    if len(answers) == 1:
        return answers[0]
    return Ranked(*(np.concatenate([getattr(answer, f.name) for answer in answers]) for f in fields(Ranked)))


def _each(work: Callable[[slice], Ranked], spans: Sequence[slice]) -> Iterable[Ranked]:
    """The spans' answers in their order, many spans on all cores: NumPy and FAISS let other threads run while they compute."""
    if len(spans) < SPANS_FOR_THREADS:
        return map(work, spans)
    with ThreadPoolExecutor(usable_cores(), "rank-span", initializer=one_faiss_thread) as threads:
        return threads.map(work, spans)


@dataclass(frozen=True)
class Queries:
    """What the items' vectors are multiplied with, for `b` users.

    Attributes:
        als: float32 (b, rank), unit factors, folded in where ALS has none.
        session: float32 (b, rank), see `session_vectors`.
        two_tower: float32 (b, d), None without the model.
    """

    als: np.ndarray
    session: np.ndarray
    two_tower: np.ndarray | None

    def rows(self, which: slice) -> Queries:
        """Some of the users."""
        return Queries(self.als[which], self.session[which], None if self.two_tower is None else self.two_tower[which])


def queries_of(snapshot: Snapshot, users: Users, settings: RankingSettings) -> Queries:
    """The query vectors of users."""
    two_tower = None if snapshot.two_tower_items is None else users.two_tower
    sessions = session_vectors(snapshot, users.last_items, settings.session_decay)
    return Queries(unit_rows(with_fold_in(snapshot, users)), sessions, two_tower)


def part_weights(settings: RankingSettings) -> np.ndarray:
    """float32 (len(PARTS),): the weight of each part."""
    return np.array([getattr(settings, f"{part}_weight") for part in PARTS], np.float32)


def with_fold_in(snapshot: Snapshot, users: Users) -> np.ndarray:
    """User factors float32 (b, rank), folded in from the last items where ALS has none."""
    unknown = np.flatnonzero(~users.als.any(axis=1) & (users.last_items >= 0).any(axis=1))
    if not len(unknown):
        return users.als
    last = users.last_items[unknown]
    held = (last >= 0).astype(np.float32)
    ridge = snapshot.als_regularization + snapshot.als_regularization_per_item * held.sum(axis=1)
    weights = held if snapshot.als_item_weights is None else held * snapshot.als_item_weights[last]
    factors = users.als.copy()
    vectors, alpha, preference = snapshot.als_items[last], snapshot.als_alpha, snapshot.als_base_preference
    factors[unknown] = fold_in(snapshot.als_gram, vectors, weights, alpha, preference, ridge)
    return factors


def session_vectors(snapshot: Snapshot, last_items: np.ndarray, decay: float) -> np.ndarray:
    """float32 (b, rank): decayed sums of the last items' unit vectors, length 1, zeros without last items."""
    held = last_items >= 0
    vectors = snapshot.als_items[last_items] / snapshot.norms[last_items][..., None]
    weights = np.where(held, decay ** np.arange(last_items.shape[1], dtype=np.float32), 0)
    return unit_rows(np.einsum("bkd,bk->bd", vectors, weights))


def relative_log(values: np.ndarray) -> np.ndarray:
    """log(1+v) / log(1+max), float32 in [0, 1]; zeros when all are."""
    top = float(values.max(initial=0))
    return (np.log1p(values) / np.log1p(top)).astype(np.float32) if top > 0 else np.zeros(len(values), np.float32)


def candidates(
    snapshot: Snapshot,
    trend: Trend,
    users: Users,
    queries: Queries,
    n: int,
    settings: RankingSettings,
    allowed: np.ndarray | None = None,
) -> np.ndarray:
    """Positions int64 (b, c) that are scored, each once, ascending, padded by -1 where a user has fewer.

    Neighbours of the user by ALS and by the two-tower model, items like the last ones, trending and popular items, without
    what is excluded or not available.

    What nobody may have is left out inside the searches. What one user may not have is left out of what was found, as long as
    enough of it is left; a user of whom too little is left gets searches and lists of their own.
    """
    proposed = _Proposed(snapshot, trend, users, queries, n, settings, allowed)
    return _replaced(proposed.found, {row: proposed.candidates_of_one(row) for row in proposed.crowded})


def proposals(
    snapshot: Snapshot, trend: Trend, user: Users, n: int, settings: RankingSettings, allowed: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Positions that each generator proposes for one user, by the name of the part that it goes by.

    Together they are the `candidates` that `rank` scores with the same arguments, and what is left out of these.
    """
    proposed = _Proposed(snapshot, trend, user, queries_of(snapshot, user, settings), n, settings, allowed)
    lists = proposed.of_one(0) if proposed.crowded else proposed.of_all(0)
    return {name: positions[positions >= 0] for name, positions in zip(proposed.names, lists, strict=True)}


class _Proposed:
    """What the generators propose: by searches for all users together, and by searches of its own for one.

    Attributes:
        found: `candidates` of all users, by the searches for all.
        crowded: rows of the users to whom these leave too little.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        trend: Trend,
        users: Users,
        queries: Queries,
        n: int,
        settings: RankingSettings,
        allowed: np.ndarray | None,
    ) -> None:
        self._snapshot, self._users, self._settings = snapshot, users, settings
        self._servable, self._part = snapshot.available, snapshot.servable
        self._trending, self._popular = trend.order, snapshot.by_popularity
        if allowed is not None:
            self._servable = servable = snapshot.available & allowed
            self._part = Part.of(servable)
            self._popular, self._trending = (order[servable[order]] for order in (self._popular, self._trending))
        self._searches = _searches(snapshot, queries)
        self._wanted, self._fill = max(settings.candidates, n), max(settings.popular, n)
        self._near = [_neighbours(index, vectors, self._wanted, self._part) for index, vectors in self._searches]
        servable_neighbours = None if allowed is None else self._servable  # those that are kept are available
        self._like = _like_the_last(snapshot, users.last_items, settings.session_neighbours, servable_neighbours)
        shared = np.concatenate([self._trending[: settings.trending], self._popular[: self._fill]])
        everybody = np.broadcast_to(shared, (len(users), len(shared)))
        self.found = _distinct(np.hstack([*self._near, self._like, everybody]), users.excluded, self._servable)
        bound = self._wanted - _least(self._wanted, all(index.scans(self._part) for index, _ in self._searches))
        self.crowded = _crowded(users, self.found, n, bound)

    @property
    def names(self) -> tuple[str, ...]:
        """The generators, in the order of the lists that `of_all` and `of_one` give."""
        return (*("als", "two_tower")[: len(self._searches)], "session", "trending", "popular")

    def of_all(self, row: int) -> list[np.ndarray]:
        """Positions by generator that the searches for all users found for one."""
        everybody = self._trending[: self._settings.trending], self._popular[: self._fill]
        return [*(found[row] for found in self._near), self._like[row], *everybody]

    def of_one(self, row: int) -> list[np.ndarray]:
        """Positions by generator for one user, by searches that leave out what the user may not have."""
        users, settings = self._users, self._settings
        own = users.without_excluded(row, self._servable)
        left_out = np.count_nonzero(users.excluded[row] >= 0) + len(users.had.get(row, ()))
        lists = [
            _enough(index, vectors[[row]], found[row], own, self._part)
            for (index, vectors), found in zip(self._searches, self._near, strict=True)
        ]
        lists.append(_like_the_last(self._snapshot, users.last_items[[row]], settings.session_neighbours, own)[0])
        for order, size in ((self._trending, settings.trending), (self._popular, self._fill)):
            first = order[: size + left_out]
            lists.append(first[own[first]][:size])
        return lists

    def candidates_of_one(self, row: int) -> np.ndarray:
        """The `candidates` of one user, by `of_one`."""
        positions = np.unique(np.concatenate(self.of_one(row)))
        return positions[positions >= 0]


def _crowded(users: Users, found: np.ndarray, n: int, bound: int) -> list[int]:
    """Rows of users that get searches of their own: more than `bound` items, or all but fewer than `n`, are left out."""
    short = found[:, n - 1] < 0 if found.shape[1] >= n else np.ones(len(found), bool)
    if not users.had and users.excluded.shape[1] <= bound and not short.any():
        return []
    left_out = np.count_nonzero(users.excluded >= 0, axis=1)
    crowded = (left_out > bound) | (short & (left_out > 0))
    crowded[list(users.had)] = True
    return np.flatnonzero(crowded).tolist()


def _searches(snapshot: Snapshot, queries: Queries) -> list[tuple[Searchable, np.ndarray]]:
    """The indexes that are searched, each with its query vectors."""
    searches = [(snapshot.indexes["inner_product"], queries.als)]
    if queries.two_tower is not None and snapshot.two_tower_index is not None:
        searches.append((snapshot.two_tower_index, queries.two_tower))
    return searches


def _like_the_last(snapshot: Snapshot, last_items: np.ndarray, each: int, servable: np.ndarray | None) -> np.ndarray:
    """int64 (b, k * each): the items most similar to each of the last k, -1 where there is none.

    With a mask `servable`, bool (items,), they are the first of those that are kept for an item.
    """
    similar = snapshot.similar[last_items, : None if servable is not None else each]
    if servable is not None:
        usable = (similar >= 0) & servable[similar]
        order = np.argsort(~usable, axis=2, kind="stable")[..., :each]
        similar = np.where(np.take_along_axis(usable, order, axis=2), np.take_along_axis(similar, order, axis=2), -1)
    found = np.where(last_items[..., None] >= 0, similar, -1)
    return found.reshape(len(last_items), similar.shape[1] * similar.shape[2]).astype(np.int64)


def _neighbours(index: Searchable, queries: np.ndarray, k: int, part: Part | None) -> np.ndarray:
    found = np.full((len(queries), k), -1, np.int64)
    known = np.flatnonzero(queries.any(axis=1))
    if len(known):
        found[known] = index.search(queries[known], k, part)
    return found


def _enough(index: Searchable, query: np.ndarray, found: np.ndarray, own: np.ndarray, part: Part | None) -> np.ndarray:
    """Neighbours of one user that `own`, bool (items,), allows: of those found in `part`, else by a search of its own."""
    kept = found[(found >= 0) & own[found]]
    exact = index.scans(part)
    if len(kept) >= _least(len(found), exact) or not query.any() or (exact and found[-1] < 0):
        return kept
    return index.search(query, len(found), Part.of(own))[0]


def _least(wanted: int, exact: bool) -> int:
    """How many of the neighbours found must be left for the nearest RECALL_AT of them to be the right ones."""
    return RECALL_AT if exact else wanted - wanted // WALKED


def _replaced(rows: np.ndarray, others: Mapping[int, np.ndarray]) -> np.ndarray:
    """Rows padded by -1 with others in the place of some."""
    if not others:
        return rows
    width = max(rows.shape[1], *map(len, others.values()))
    wide = np.full((len(rows), width), -1, np.int64)
    wide[:, : rows.shape[1]] = rows
    for row, positions in others.items():
        wide[row] = -1
        wide[row, : len(positions)] = positions
    return wide


def _distinct(candidates: np.ndarray, excluded: np.ndarray, servable: np.ndarray) -> np.ndarray:
    """Each row's servable positions that are not excluded, each once, ascending, padded by -1 to the longest row.

    The last bit tells candidates (1) from exclusions (0): after the sort an exclusion stands before the candidates of
    the same position, which then are repetitions of it.
    """
    keys = np.hstack([candidates * 2 + 1, excluded * 2]).astype(np.int32)  # half the bytes are sorted twice as fast
    keys.sort(axis=1)
    positions = keys >> 1
    kept = (keys & 1 == 1) & (keys >= 0) & servable[positions]
    kept[:, 1:] &= positions[:, 1:] != positions[:, :-1]
    counts = np.count_nonzero(kept, axis=1)
    distinct = np.full((len(keys), counts.max(initial=1)), -1, np.int64)
    distinct[np.arange(distinct.shape[1]) < counts[:, None]] = positions[kept]
    return distinct


def parts_of(snapshot: Snapshot, trend: Trend, queries: Queries, positions: np.ndarray) -> np.ndarray:
    """float32 (b, c, len(PARTS)) of positions (b, c); rows of position -1 hold numbers without meaning.

    Each part lies by itself in memory, where it is written and weighted faster than between the others.
    """
    products = _products(snapshot.als_items, positions, np.stack([queries.als, queries.session], axis=2))
    parts = np.zeros((len(PARTS), *positions.shape), np.float32)
    np.divide(products[..., 0], snapshot.longest, out=parts[0])
    if queries.two_tower is not None and snapshot.two_tower_items is not None:
        parts[1] = _products(snapshot.two_tower_items, positions, queries.two_tower[..., None])[..., 0]
    np.divide(products[..., 1], snapshot.norms[positions], out=parts[2])
    parts[3] = trend.part[positions]
    parts[4] = snapshot.popular_part[positions]
    return np.moveaxis(parts, 0, -1)


def _products(vectors: np.ndarray, positions: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Inner products float32 (b, c, q) of the vectors at positions (b, c) with each row's queries (b, d, q)."""
    products = np.empty((*positions.shape, queries.shape[2]), np.float32)
    room = np.empty((GATHERED, positions.shape[1], vectors.shape[1]), np.float32)
    for rows in _slices(len(positions), GATHERED):
        some = positions[rows]
        gathered = np.take(vectors, some, axis=0, out=room[: len(some)], mode="clip")  # any other mode takes a copy
        np.matmul(gathered, queries[rows], out=products[rows])
    return products


def _best(scores: np.ndarray, n: int) -> np.ndarray:
    """Columns of the n highest scores of each row, best first, equal scores in the order of columns."""
    width = scores.shape[1]
    if width <= 2 * n:
        return np.argsort(-scores, axis=1, kind="stable")[:, :n]
    bound = np.partition(scores, width - n, axis=1)[:, width - n, None]
    above, level = scores > bound, scores == bound
    taken = above | (level & (np.cumsum(level, axis=1) <= n - np.count_nonzero(above, axis=1)[:, None]))
    columns = np.nonzero(taken)[1].reshape(len(scores), n)
    return np.take_along_axis(columns, np.argsort(-np.take_along_axis(scores, columns, axis=1), axis=1, kind="stable"), axis=1)


def _top(positions: np.ndarray, scores: np.ndarray, parts: np.ndarray, n: int) -> Ranked:
    """The n best of each row; equal scores in the order of positions."""
    order = _best(scores, n)
    top_scores = np.take_along_axis(scores, order, axis=1)
    top_positions = np.where(np.isfinite(top_scores), np.take_along_axis(positions, order, axis=1), -1)
    top_parts = np.take_along_axis(parts, order[..., None], axis=1)
    short = n - order.shape[1]
    if short > 0:
        top_positions = np.pad(top_positions, ((0, 0), (0, short)), constant_values=-1)
        top_scores = np.pad(top_scores, ((0, 0), (0, short)), constant_values=-np.inf)
        top_parts = np.pad(top_parts, ((0, 0), (0, short), (0, 0)))
    return Ranked(top_positions, top_scores, top_parts)
