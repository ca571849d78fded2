"""Samples of users that are the same for everyone who asks, and their ids as positions."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import scipy.sparse as sp

from recsys_core.events import DAY_MS, USER_ID

ENOUGH_USERS = 300
"""With fewer users, validation looks further back."""


def _returning(window: ds.Dataset, start: int, count: int) -> pa.Array:
    """Users with a pair that began before `start` and one since, sorted: those with the smallest hashes."""
    new = distinct_users(window, ds.field("first_ts") >= start, 8 * count)
    old = distinct_users(window, (ds.field("first_ts") < start) & ds.field(USER_ID).isin(new), 8 * count)
    users = smallest(old, count)
    return users.take(pc.sort_indices(users))


def validation_span(window: ds.Dataset, end: int, count: int) -> tuple[int, int, pa.Array]:
    """The first moment (ms), the days from it to `end`, and at most `count` users who were there before and took more since."""
    pairs = window.count_rows()
    best: tuple[int, int, pa.Array] = (end, 0, pa.array([], pa.string()))
    for days in (1, 2, 4, 8, 16, 32):
        start = end - days * DAY_MS
        if 2 * window.count_rows(filter=ds.field("first_ts") < start) < pairs:
            break
        pool = _returning(window, start, count)
        if len(pool) > len(best[2]):
            best = start, days, pool
        if len(pool) >= ENOUGH_USERS:
            break
    return best


def codes(values: pa.Array | pa.ChunkedArray, ordered: np.ndarray | pa.Array) -> np.ndarray:
    """Place of each value in `ordered`, int64, -1 where it is not in it."""
    found = pc.index_in(values, value_set=pa.array(ordered, pa.string()))
    return np.asarray(pc.fill_null(found, -1).to_numpy(), np.int64)


def most_recent(rows: np.ndarray, columns: np.ndarray, users: int, k: int) -> np.ndarray:
    """The first k columns of each row, int64 (users, k), from pairs that are sorted by recency."""
    recent = np.full((users, k), -1, np.int64)
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    place = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
    within = place < k
    recent[ordered[within], place[within]] = columns[order[within]]
    return recent


def by_recency(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> sp.csr_matrix:
    """CSR int32 from distinct pairs that are sorted by recency: 1 for the newest of a row, 2 for the next."""
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    place = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
    return sp.csr_matrix((place.astype(np.int32) + 1, (ordered, columns[order])), shape)


def distinct_users(source: ds.Dataset, only: ds.Expression | None, limit: int | None) -> pa.Array:
    """Distinct user ids; of more than `limit`, about half as many with the smallest hashes."""
    kept = pa.array([], pa.string())
    for batch in source.to_batches(columns=[USER_ID], filter=only):
        kept = pc.unique(pa.chunked_array([kept, pc.unique(batch[USER_ID])]))
        if limit is not None and len(kept) > limit:
            kept = smallest(kept, limit // 2)
    return kept


def smallest(ids: pa.Array, count: int) -> pa.Array:
    """The `count` ids with the smallest hashes, in the order of these."""
    hashes = pd.util.hash_array(ids.to_numpy(zero_copy_only=False), categorize=False)
    return ids.take(pa.array(np.argsort(hashes, kind="stable")[:count]))
