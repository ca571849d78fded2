"""Offline evaluation of a day: models fitted on the window before it, full ranking, beside the popularity baselines.

Time split: everything before the day is known, the day is predicted. Ranked for are users seen before, with every
item of the window; what a user had before is masked. Relevant are the user's items of the day that the window knows
and the user had not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import orjson
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import scipy.sparse as sp

from recsys_core import progress
from recsys_core.als import AlsReport, Factors, fit_als, gram, read_factors
from recsys_core.events import DAY_MS, HOUR_MS, ITEM_ID, USER_ID, day_key, hour_keys, key_start_ms
from recsys_core.index import ExactIndex, similar_items
from recsys_core.lake import Lake, Partition
from recsys_core.metrics import evaluate, rank_all
from recsys_core.popularity import last_hours_popularity, popular_items, trending_items
from recsys_core.ranking import Snapshot, Trend, Users, rank
from recsys_core.settings import Settings
from recsys_core.tables import CLICKS_HOURLY, INTERACTIONS

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

EVALUATION = "evaluation"
HOLDOUT = "holdout_als"
RECENT_HOURS = 6

POPULAR_WINDOW = "popularity, window"
POPULAR_RECENT = f"popularity, last {RECENT_HOURS} h"
ALS = "ALS"
SERVED = "served ranking"


class NothingToEvaluate(Exception):
    """The day or the window before it has too little data; the message says which."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics by model, and how many users, items and relevant pairs they are the means of."""

    day: str
    users: int
    items: int
    relevant: int
    new_item_share: float
    metrics: dict[str, dict[str, float]]
    als: AlsReport


@dataclass(frozen=True)
class Split:
    """The time split as positions: rows are users, columns the items of the window.

    Attributes:
        users: object (u,), sampled user ids, sorted.
        items: object (n,), item ids of the window, sorted.
        seen: CSR bool (u, n), what each user had in the window.
        recent: int64 (u, k), the user's last items of the window, newest first, padded by -1.
        relevant: CSR bool (u, n).
        popularity: float64 (n,), summed weights of the window, with time decay.
        users_of_item: int64 (n,), users that had each item in the window.
        new_item_share: share of the day's pairs whose item the window does not know.
    """

    users: np.ndarray
    items: np.ndarray
    seen: sp.csr_matrix
    recent: np.ndarray
    relevant: sp.csr_matrix
    popularity: np.ndarray
    users_of_item: np.ndarray
    new_item_share: float


def evaluate_day(lake: Lake, day: str, settings: Settings, spark: Callable[[], SparkSession] | None, engine: str) -> Evaluation:
    """Evaluate `day` against models of the day before. Raises NothingToEvaluate, MissingPartition."""
    start = key_start_ms(day)
    before = day_key(start - DAY_MS)
    split = time_split(lake, before, day, settings.evaluation.max_users, settings.ranking.last_items)
    report = fit_als(lake, lake.files(INTERACTIONS, [before]), HOLDOUT, day, settings.als, spark, engine)
    with progress.task(f"evaluation ({day})", 4) as bar:
        depth = max(settings.evaluation.ks)
        recommended = {POPULAR_WINDOW: _by_score(split, split.users_of_item, depth)}
        bar.update(1)
        hours = hour_keys(start - settings.trends.window_hours * HOUR_MS, start)
        clicks = lake.dataset(CLICKS_HOURLY, hours, missing_ok=True)
        recent = _scores(clicks and last_hours_popularity(clicks, start - RECENT_HOURS * HOUR_MS, start), split.items)
        recommended[POPULAR_RECENT] = _by_score(split, recent, depth)
        bar.update(2)
        item_vectors = aligned(read_factors(lake, HOLDOUT, day, "items"), split.items)
        user_vectors = aligned(read_factors(lake, HOLDOUT, day, "users", split.users), split.users, item_vectors.shape[1])
        recommended[ALS] = rank_all(user_vectors, item_vectors, split.seen, depth)
        bar.update(3)
        trends = clicks and trending_items(
            clicks, start, settings.events.weights, settings.trends.half_life_hours, settings.trends.top
        )
        recommended[SERVED] = _served(split, item_vectors, user_vectors, trends, depth, settings, report)
        bar.update(4)
    metrics = {
        name: evaluate(ranked, split.relevant, settings.evaluation.ks, split.users_of_item, len(split.items))
        for name, ranked in recommended.items()
    }
    return Evaluation(day, len(split.users), len(split.items), split.relevant.nnz, split.new_item_share, metrics, report)


def evaluate_snapshot(
    lake: Lake, day: str, snapshot: Snapshot, settings: Settings, split: Split | None = None
) -> dict[str, float]:
    """Metrics of a release's served ranking on `day`, for the users and items of the day's split. Raises as `evaluate_day`."""
    start = key_start_ms(day)
    if split is None:
        split = time_split(lake, day_key(start - DAY_MS), day, settings.evaluation.max_users, settings.ranking.last_items)
    users = np.zeros((len(split.users), snapshot.als_items.shape[1]), np.float32)
    for key in reversed(lake.keys("als_factors")):
        if lake.get("als_factors", key).data_version == snapshot.als_version:
            users = aligned(read_factors(lake, "als_factors", key, "users", split.users), split.users, users.shape[1])
            break
    hours = hour_keys(start - settings.trends.window_hours * HOUR_MS, start)
    clicks = lake.dataset(CLICKS_HOURLY, hours, missing_ok=True)
    trends = clicks and trending_items(
        clicks, start, settings.events.weights, settings.trends.half_life_hours, settings.trends.top
    )
    columns = _codes(snapshot.items[ITEM_ID], split.items)
    ranked = _rank_split(snapshot, split, columns, users, trends, max(settings.evaluation.ks), settings)
    return evaluate(ranked, split.relevant, settings.evaluation.ks, split.users_of_item, len(split.items))


def write_evaluation(lake: Lake, day: str, evaluation: Evaluation | None, reason: str = "") -> Partition:
    """Replace partition `day` of `evaluation`; without one, `reason` says why the day was not evaluated."""
    content = asdict(evaluation) if evaluation else {"day": day, "metrics": {}, "reason": reason}
    users = evaluation.users if evaluation else 0
    return lake.write_blobs(EVALUATION, day, {"evaluation.json": orjson.dumps(content)}, users, content)


def time_split(lake: Lake, before: str, day: str, max_users: int, last_items: int) -> Split:
    """What was known before `day` and what happened on it, for at most `max_users` users."""
    window = lake.dataset(INTERACTIONS, [before])
    if window is None:
        raise NothingToEvaluate(f"the window that ends with {before} has no interactions; evaluate a later day")
    start = key_start_ms(day)
    clicks = lake.dataset(CLICKS_HOURLY, hour_keys(start, start + DAY_MS), missing_ok=True)
    if clicks is None:
        raise NothingToEvaluate(f"{day} has no events in {CLICKS_HOURLY}")
    sampled = _sample_users(clicks, window, max_users)
    if not len(sampled):
        raise NothingToEvaluate(f"no user with events on {day} has any in the window before")
    popular = popular_items(window)
    items = pc.sort_indices(popular[ITEM_ID])
    item_ids = popular[ITEM_ID].take(items).to_numpy()
    mine = ds.field(USER_ID).isin(sampled)
    had = window.to_table(columns=[USER_ID, ITEM_ID, "last_ts"], filter=mine).sort_by(
        [("last_ts", "descending"), (ITEM_ID, "ascending")]
    )
    shape = (len(sampled), len(item_ids))
    rows, columns = _codes(had[USER_ID], sampled), _codes(had[ITEM_ID], item_ids)
    seen = sp.csr_matrix((np.ones(len(rows), bool), (rows, columns)), shape)
    day_pairs = clicks.to_table(columns=[USER_ID, ITEM_ID], filter=mine).group_by([USER_ID, ITEM_ID]).aggregate([])
    users, clicked = _codes(day_pairs[USER_ID], sampled), _codes(day_pairs[ITEM_ID], item_ids)
    known = clicked >= 0
    happened = sp.csr_matrix((np.ones(int(known.sum()), bool), (users[known], clicked[known])), shape)
    relevant = sp.csr_matrix(happened > seen.multiply(happened))
    some = np.flatnonzero(np.diff(relevant.indptr))
    if not len(some):
        raise NothingToEvaluate(f"no user had an item on {day} that is new to them and known to the window")
    return Split(
        users=sampled.to_numpy(zero_copy_only=False)[some],
        items=item_ids,
        seen=seen[some],
        recent=_most_recent(rows, columns, len(sampled), last_items)[some],
        relevant=relevant[some],
        popularity=popular["score"].take(items).to_numpy(),
        users_of_item=popular["users"].take(items).to_numpy(),
        new_item_share=float(1 - known.mean()),
    )


def aligned(factors: Factors, ids: np.ndarray, rank: int | None = None) -> np.ndarray:
    """float32 (len(ids), rank): the factors in the order of the sorted `ids`, zeros for those that have none."""
    vectors = np.zeros((len(ids), rank or factors.vectors.shape[1]), np.float32)
    codes = _codes(pa.array(factors.ids, pa.string()), ids)
    vectors[codes[codes >= 0]] = factors.vectors[codes >= 0]
    return vectors


def _sample_users(clicks: ds.Dataset, window: ds.Dataset, max_users: int) -> pa.Array:
    """Users of the day that the window knows: those with the smallest hashes, sorted. Memory holds twice `max_users`."""

    def distinct(source: ds.Dataset, keep: pa.Array | None = None) -> pa.Array:
        only = None if keep is None else ds.field(USER_ID).isin(keep)
        kept = pa.array([], pa.string())
        for batch in source.to_batches(columns=[USER_ID], filter=only):
            kept = pc.unique(pa.chunked_array([kept, pc.unique(batch[USER_ID])]))
            if keep is None and len(kept) > 8 * max_users:
                kept = _smallest(kept, 4 * max_users)
        return kept

    pool = _smallest(distinct(clicks), 4 * max_users)
    users = _smallest(distinct(window, pool), max_users)
    return users.take(pc.sort_indices(users))


def _smallest(ids: pa.Array, count: int) -> pa.Array:
    hashes = pd.util.hash_array(ids.to_numpy(zero_copy_only=False), categorize=False)
    return ids.take(pa.array(np.argsort(hashes, kind="stable")[:count]))


def _codes(values: pa.Array | pa.ChunkedArray, ordered: np.ndarray | pa.Array) -> np.ndarray:
    """Place of each value in `ordered`, int64, -1 where it is not in it."""
    found = pc.index_in(values, value_set=pa.array(ordered, pa.string()))
    return np.asarray(pc.fill_null(found, -1).to_numpy(), np.int64)


def _most_recent(rows: np.ndarray, columns: np.ndarray, users: int, k: int) -> np.ndarray:
    """The first k columns of each row, int64 (users, k), from pairs that are sorted by recency."""
    recent = np.full((users, k), -1, np.int64)
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    place = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
    within = place < k
    recent[ordered[within], place[within]] = columns[order[within]]
    return recent


def _scores(table: pa.Table | None, items: np.ndarray) -> np.ndarray:
    """Scores of a (item_id, score) table as float64 (n,), 0 where it has none."""
    scores = np.zeros(len(items))
    if table is not None:
        codes = _codes(table[ITEM_ID], items)
        scores[codes[codes >= 0]] = table["score"].to_numpy()[codes >= 0]
    return scores


def _by_score(split: Split, scores: np.ndarray, k: int) -> np.ndarray:
    everyone = np.ones((len(split.users), 1), np.float32)
    return rank_all(everyone, scores.astype(np.float32)[:, None], split.seen, k)


def _served(
    split: Split,
    item_vectors: np.ndarray,
    user_vectors: np.ndarray,
    trends: pa.Table | None,
    k: int,
    settings: Settings,
    report: AlsReport,
) -> np.ndarray:
    snapshot = Snapshot(
        release_id="holdout",
        items=pa.table(
            {
                ITEM_ID: pa.array(split.items, pa.string()),
                "available": np.ones(len(split.items), bool),
                "category": pa.nulls(len(split.items), pa.string()),
            }
        ),
        als_items=item_vectors,
        als_gram=gram(item_vectors),
        als_version="holdout",
        als_alpha=settings.als.alpha,
        als_regularization=report.ridge,
        als_regularization_per_item=report.ridge_per_observation,
        popular=split.popularity.astype(np.float32),
        similar=similar_items(item_vectors, settings.ranking.session_neighbours, ExactIndex(item_vectors, "cosine")),
        indexes={"inner_product": ExactIndex(item_vectors, "inner_product"), "cosine": ExactIndex(item_vectors, "cosine")},
    )
    return _rank_split(snapshot, split, np.arange(len(split.items)), user_vectors, trends, k, settings)


def _rank_split(
    snapshot: Snapshot,
    split: Split,
    columns: np.ndarray,
    user_vectors: np.ndarray,
    trends: pa.Table | None,
    k: int,
    settings: Settings,
) -> np.ndarray:
    """The scoring path of serving on the state of the moment before the day: columns of `split`, int64 (users, k).

    `columns` (items of the snapshot,) are the columns of its items, -1 for one that the split does not know.
    """
    scores = dict(zip(trends[ITEM_ID].to_pylist(), trends["score"].to_pylist(), strict=True)) if trends is not None else {}
    trend = Trend.of(snapshot, scores)
    positions = np.full(len(split.items) + 1, -1, np.int64)
    positions[columns] = np.arange(len(columns))
    positions[-1] = -1
    ranked = np.full((len(split.users), k), -1, np.int64)
    for at in range(0, len(split.users), 512):
        rows = slice(at, at + 512)
        seen = split.seen[rows]
        width = int(np.diff(seen.indptr).max(initial=0))
        excluded = _most_recent(np.repeat(np.arange(seen.shape[0]), np.diff(seen.indptr)), seen.indices, seen.shape[0], width)
        users = Users(user_vectors[rows], positions[split.recent[rows]], positions[excluded])
        found = rank(snapshot, trend, users, k, settings.ranking).positions
        ranked[rows] = np.where(found >= 0, columns[found], -1)
    return ranked
