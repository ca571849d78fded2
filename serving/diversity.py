"""Answers whose items differ: maximal marginal relevance and a limit for each category."""

from __future__ import annotations

import numpy as np

from recsys_core.index import unit_rows
from recsys_core.ranking import Ranked, Snapshot
from serving.filters import ItemFilters
from serving.validation import Diversity

POOL = 5
"""Ranked items for each item wanted, from which the answer is chosen."""


def diversified(snapshot: Snapshot, filters: ItemFilters, ranked: Ranked, wanted: Diversity, count: int) -> Ranked:
    """The `count` items of each row chosen one after the other; scores and parts stay those of the items.

    Each choice is the best of relevance · score − (1 − relevance) · cosine to the nearest item chosen before, scores scaled
    to [0, 1] over the row (Carbonell & Goldstein 1998, "The use of MMR"). Items of a category that is full are passed over.
    """
    rows = [
        _choose(snapshot, filters, ranked.positions[row], ranked.scores[row], wanted, count)
        for row in range(len(ranked.positions))
    ]
    width = ranked.positions.shape[1]
    order = np.full((len(rows), min(count, width)), -1, np.int64)
    for row, chosen in enumerate(rows):
        order[row, : len(chosen)] = chosen
    held = order >= 0
    return Ranked(
        np.where(held, np.take_along_axis(ranked.positions, order, axis=1), -1),
        np.where(held, np.take_along_axis(ranked.scores, order, axis=1), -np.inf).astype(np.float32),
        np.take_along_axis(ranked.parts, order[..., None], axis=1),
    )


def _choose(
    snapshot: Snapshot, filters: ItemFilters, positions: np.ndarray, scores: np.ndarray, wanted: Diversity, count: int
) -> list[int]:
    """Indices into one row, in the order of the choice."""
    held = int(np.count_nonzero(positions >= 0))
    positions, scores = positions[:held], scores[:held]
    if not held:
        return []
    spread = float(scores[0] - scores[-1])
    relevance = (scores - scores[-1]) / spread if spread > 0 else np.ones(held, np.float32)
    vectors = unit_rows(snapshot.als_items[positions])
    categories = filters.category_codes(positions)
    nearest = np.full(held, -1.0, np.float32)
    free = np.ones(held, bool)
    chosen: list[int] = []
    for _ in range(min(count, held)):
        value = wanted.relevance * relevance - (1 - wanted.relevance) * (nearest if chosen else 0)
        best = int(np.argmax(np.where(free, value, -np.inf)))
        if not free[best]:
            break
        chosen.append(best)
        free[best] = False
        nearest = np.maximum(nearest, vectors @ vectors[best])
        category = categories[best]
        limited = wanted.max_per_category and category >= 0
        if limited and np.count_nonzero(categories[chosen] == category) >= wanted.max_per_category:
            free &= categories != category
    return chosen
