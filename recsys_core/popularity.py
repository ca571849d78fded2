"""What is popular in the window of the interactions, and what is trending in the last hours.

Sums run over batches of rows in their order on one thread: the same input gives the same scores to the bit, and ties
go by item id.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from recsys_core.events import EVENT_TYPE, HOUR_MS, ITEM_ID, TS

READ_ROWS = 1 << 20

POPULAR_SCHEMA = pa.schema([pa.field(ITEM_ID, pa.string()), pa.field("score", pa.float64()), pa.field("users", pa.int64())])
TRENDING_SCHEMA = pa.schema([pa.field(ITEM_ID, pa.string()), pa.field("score", pa.float64()), pa.field("events", pa.int64())])
TRENDS_SCHEMA = TRENDING_SCHEMA.append(pa.field("scores", pa.list_(pa.float64())))


def popular_items(interactions: ds.Dataset) -> pa.Table:
    """Popularity of every item in the window: POPULAR_SCHEMA, highest score first.

    `interactions` has the columns item_id and weight, one row for a user-item pair. `score` is the sum of the weights,
    `users` the number of pairs. Memory holds the items and one batch.
    """

    def sums() -> Iterator[pa.Table]:
        for batch in interactions.to_batches(columns=[ITEM_ID, "weight"], batch_size=READ_ROWS):
            ones = pa.array(np.ones(batch.num_rows, np.int64))
            yield pa.table([batch[ITEM_ID], batch["weight"].cast(pa.float64()), ones], schema=POPULAR_SCHEMA)

    return _ranked(_total(sums(), POPULAR_SCHEMA))


def popular_by_category(popular: pa.Table, catalog: pa.Table, top: int) -> pa.Table:
    """The `top` items of each category: category string, then the columns of `popular`, by category, highest score first.

    `popular` is the answer of `popular_items`, `catalog` has the columns item_id (unique) and category. Items without
    a category, or that the catalogue doesn't have, are in none.
    """
    joined = popular.join(catalog.select([ITEM_ID, "category"]), ITEM_ID, join_type="inner", use_threads=False)
    joined = joined.filter(pc.is_valid(joined["category"]))
    joined = joined.sort_by([("category", "ascending"), ("score", "descending"), (ITEM_ID, "ascending")])
    _, codes = np.unique(joined["category"].to_numpy(), return_inverse=True)
    starts = np.searchsorted(codes, codes)
    kept = joined.filter(pa.array(np.arange(len(codes)) - starts < top))
    return kept.select(["category", *popular.column_names])


def trend_scores(
    ts: npt.NDArray[np.int64],
    weights: npt.NDArray[np.floating],
    items: npt.NDArray[np.integer],
    now_ms: int,
    half_life_hours: float,
    n_items: int,
) -> npt.NDArray[np.float64]:
    """Σ weight · 2^(−age / half-life) for each item, float64 (n_items,).

    `ts` (n,) are event times in milliseconds, `weights` (n,) theirs, `items` (n,) indices below `n_items`. An event
    later than `now_ms` counts nothing.
    """
    age = (now_ms - np.asarray(ts, np.int64)) / (half_life_hours * HOUR_MS)
    decayed = np.where(age >= 0, weights * np.exp2(-np.maximum(age, 0.0)), 0.0)
    return np.bincount(items, decayed, minlength=n_items).astype(np.float64, copy=False)


def trending_items(
    clicks: ds.Dataset, now_ms: int, event_weights: Mapping[str, float], half_lives_hours: Sequence[float], top: int
) -> pa.Table:
    """The items that are among the `top` by `trend_scores` of any half-life: TRENDS_SCHEMA, highest score first.

    `clicks` has the columns item_id, event_type and ts (ms). `scores` has one for each half-life, `score` is the first.
    Events later than `now_ms`, and of types that `event_weights` doesn't name, are left out. Memory holds the items and
    one batch.
    """
    names = pa.array(list(event_weights), pa.string())
    values = np.array(list(event_weights.values()), np.float64)
    counted = (ds.field(TS) <= now_ms) & ds.field(EVENT_TYPE).isin(names)
    columns = [f"score_{n}" for n in range(len(half_lives_hours))]
    summed = pa.schema([(ITEM_ID, pa.string()), *((name, pa.float64()) for name in columns), ("events", pa.int64())])

    def sums() -> Iterator[pa.Table]:
        for batch in clicks.to_batches(columns=[ITEM_ID, EVENT_TYPE, TS], filter=counted, batch_size=READ_ROWS):
            encoded = batch[ITEM_ID].dictionary_encode()
            items = encoded.indices.to_numpy()
            n = len(encoded.dictionary)
            weights = values[pc.index_in(batch[EVENT_TYPE], names).to_numpy()]
            ts = batch[TS].to_numpy()
            scores = [pa.array(trend_scores(ts, weights, items, now_ms, half_life, n)) for half_life in half_lives_hours]
            yield pa.table([encoded.dictionary, *scores, pa.array(np.bincount(items, minlength=n))], schema=summed)

    total = _total(sums(), summed)
    scores = np.column_stack([total[name].to_numpy() for name in columns])
    ranks = np.argsort(np.argsort(-scores, axis=0, kind="stable"), axis=0, kind="stable").min(axis=1, initial=len(scores))
    kept = np.flatnonzero(ranks < top)
    lists = pa.ListArray.from_arrays(np.arange(0, (len(kept) + 1) * len(columns), len(columns)), scores[kept].ravel())
    some = total.take(kept)
    return _ranked(pa.table([some[ITEM_ID], some["score_0"], some["events"], lists], schema=TRENDS_SCHEMA))


def last_hours_popularity(clicks: ds.Dataset, start_ms: int, end_ms: int) -> pa.Table:
    """Events of each item in [start_ms, end_ms), the baseline that models have to beat: TRENDING_SCHEMA, score = events."""
    window = (ds.field(TS) >= start_ms) & (ds.field(TS) < end_ms)

    def sums() -> Iterator[pa.Table]:
        for batch in clicks.to_batches(columns=[ITEM_ID], filter=window, batch_size=READ_ROWS):
            ones = np.ones(batch.num_rows, np.int64)
            yield pa.table([batch[ITEM_ID], pa.array(ones, pa.float64()), pa.array(ones)], schema=TRENDING_SCHEMA)

    return _ranked(_total(sums(), TRENDING_SCHEMA))


def _total(parts: Iterator[pa.Table], schema: pa.Schema) -> pa.Table:
    """Add up tables of (item_id, sum, sum), one row for an item."""
    total = schema.empty_table()
    sums: list[Any] = [(name, "sum") for name in schema.names[1:]]
    for part in parts:
        merged = pa.concat_tables([total, part]).group_by(ITEM_ID, use_threads=False).aggregate(sums)
        total = merged.select([ITEM_ID, *(f"{name}_sum" for name in schema.names[1:])]).rename_columns(schema.names)
    return total


def _ranked(table: pa.Table) -> pa.Table:
    return table.sort_by([("score", "descending"), (ITEM_ID, "ascending")])
