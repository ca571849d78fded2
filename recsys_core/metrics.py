"""Ranking metrics with binary relevance, vectorised over users, and ranking of the full catalogue.

Of user u with the relevant items R, and h_r = 1 when the item at rank r (from 1) is in R:

    hit@k      1 when any h_r = 1, r ≤ k
    recall@k   Σ_{r≤k} h_r / |R|
    mrr@k      1 / (lowest r ≤ k with h_r = 1), 0 without one                           (Voorhees 1999, cut off at k)
    ndcg@k     Σ_{r≤k} h_r / log2(r + 1) over the same sum for min(|R|, k) hits on top   (Järvelin, Kekäläinen 2002)
    map@k      Σ_{r≤k} h_r · (hits up to r) / r over min(|R|, k), so that a perfect list has 1. (TREC divides by |R|.)

Of all users: coverage@k is the share of the catalogue that is in any top k (Ge, Delgado-Battenfeld, Jannach 2010),
novelty@k the mean of −log2(popularity share) over all recommended items (Zhou et al. 2010), in bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

IntArray = npt.NDArray[np.integer]
FloatArray = npt.NDArray[np.floating]

PADDING = -1
PER_USER = ("hit", "recall", "mrr", "ndcg", "map")


def per_user(recommended: IntArray, relevant: sp.csr_matrix, ks: Sequence[int]) -> dict[str, npt.NDArray[np.float64]]:
    """`<metric>@<k>` -> float64 (users,) for the metrics in PER_USER and each k.

    `recommended` int (users, n) holds item indices, best first, padded by −1; `relevant` CSR (users, items) has a
    stored entry for each relevant item, its value is ignored. Raises ValueError when shapes differ, a k is not in
    1..n, an item is recommended twice to a user, or a user has nothing relevant (recall is undefined: leave them out).
    """
    users, length = recommended.shape
    sizes = np.diff(relevant.indptr)
    if relevant.shape[0] != users:
        raise ValueError(f"{users} lists of recommendations, but relevant items of {relevant.shape[0]} users")
    if not ks or min(ks) < 1 or max(ks) > length:
        raise ValueError(f"every k must be in 1..{length}, the length of the lists, got {list(ks)}")
    if not sizes.all():
        raise ValueError(f"{np.count_nonzero(sizes == 0)} users have no relevant item: leave them out of the evaluation")
    hits = _hits(recommended, relevant)
    ranks = np.arange(1, length + 1)
    discount = 1 / np.log2(ranks + 1)
    dcg = np.cumsum(hits * discount, axis=1)
    ideal = np.cumsum(discount)
    found = np.cumsum(hits, axis=1)
    precision = np.cumsum(hits * found / ranks, axis=1)
    reciprocal = np.maximum.accumulate(hits / ranks, axis=1)
    result = {}
    for k in ks:
        best = np.minimum(sizes, k)
        result[f"hit@{k}"] = (found[:, k - 1] > 0).astype(np.float64)
        result[f"recall@{k}"] = found[:, k - 1] / sizes
        result[f"mrr@{k}"] = reciprocal[:, k - 1]
        result[f"ndcg@{k}"] = dcg[:, k - 1] / ideal[best - 1]
        result[f"map@{k}"] = precision[:, k - 1] / best
    return result


def _hits(recommended: IntArray, relevant: sp.csr_matrix) -> npt.NDArray[np.bool_]:
    """Whether each recommended item is relevant to its user, bool (users, n)."""
    users, items = relevant.shape
    if recommended.max(initial=PADDING) >= items or recommended.min(initial=PADDING) < PADDING:
        raise ValueError(f"recommended items must be indices below {items}, or {PADDING} for padding")
    offsets = np.arange(users, dtype=np.int64) * items
    present = recommended != PADDING
    pairs = recommended + offsets[:, None]
    listed = np.sort(pairs[present])
    if (listed[1:] == listed[:-1]).any():
        raise ValueError("an item is recommended twice to the same user")
    wanted = relevant.indices + np.repeat(offsets, np.diff(relevant.indptr))
    return np.isin(pairs, wanted) & present


def evaluate(
    recommended: IntArray, relevant: sp.csr_matrix, ks: Sequence[int], item_popularity: FloatArray | IntArray, n_items: int
) -> dict[str, float]:
    """Means of `per_user`, and `coverage@<k>` and `novelty@<k>`.

    `item_popularity` (n_items,) holds the observations of each item in the training data; an item without any counts
    as one with 1. Arguments and errors are otherwise those of `per_user`. No users: every mean is 0.
    """
    result = {
        name: float(values.mean()) if len(values) else 0.0 for name, values in per_user(recommended, relevant, ks).items()
    }
    popularity = np.maximum(np.asarray(item_popularity, np.float64), 1.0)
    information = np.log2(popularity.sum()) - np.log2(popularity)
    for k in ks:
        shown = recommended[:, :k]
        shown = shown[shown != PADDING]
        result[f"coverage@{k}"] = len(np.unique(shown)) / n_items
        result[f"novelty@{k}"] = float(information[shown].mean()) if shown.size else 0.0
    return result


def top_k(scores: npt.NDArray[np.float32], k: int, mask: sp.csr_matrix | None = None) -> npt.NDArray[np.int64]:
    """Indices of the k highest scores of each row, best first, int64 (rows, k).

    `scores` is float (rows, n); equal scores go by lower index. Stored entries of `mask` CSR (rows, n) and scores of
    −inf are left out; rows with fewer than k others end in −1. Raises ValueError for NaN.
    """
    if np.isnan(scores).any():
        raise ValueError("scores to rank contain NaN")
    rows, n = scores.shape
    if mask is not None:
        scores = scores.copy()
        scores[np.repeat(np.arange(rows), np.diff(mask.indptr)), mask.indices] = -np.inf
    width = min(k, n)
    ids = np.full((rows, k), PADDING, np.int64)
    if not width or not rows:
        return ids
    threshold = np.partition(scores, n - width, axis=1)[:, n - width, None]
    taken = scores >= threshold
    if np.count_nonzero(taken) > rows * width:
        above = scores > threshold
        tied = taken & ~above
        taken = above | (tied & (np.cumsum(tied, axis=1) <= width - np.count_nonzero(above, axis=1)[:, None]))
    best = np.nonzero(taken)[1].reshape(rows, width)
    values = np.take_along_axis(scores, best, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    best = np.take_along_axis(best, order, axis=1)
    ids[:, :width] = np.where(np.take_along_axis(values, order, axis=1) == -np.inf, PADDING, best)
    return ids


def rank_all(
    user_vectors: npt.NDArray[np.float32],
    item_vectors: npt.NDArray[np.float32],
    seen: sp.csr_matrix | None,
    k: int,
    batch: int = 512,
) -> npt.NDArray[np.int64]:
    """The k items of highest inner product for each user, int64 (users, k), padded by −1.

    `user_vectors` (users, d), `item_vectors` (items, d); stored entries of `seen` CSR (users, items) are left out.
    Holds `batch` × items scores at a time.
    """
    ids = np.empty((len(user_vectors), k), np.int64)
    for at in range(0, len(user_vectors), batch):
        rows = slice(at, at + batch)
        ids[rows] = top_k(user_vectors[rows] @ item_vectors.T, k, None if seen is None else seen[rows])
    return ids
