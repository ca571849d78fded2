"""What a search finds, and how long it takes, by what is left out of it: filters, unavailable items, what a user had.

    python benchmarks/filtered_search.py [--items 52000 200000] [--dimension 32]

Vectors lie in random directions, their lengths fall by a power of their rank, as those of ALS do. Popularity follows length.
Recall is the share of the 50 nearest allowed items that are among the candidates of a user, by the scoring path itself. The
milliseconds are those of ranking one user for 50 items, on one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from recsys_core.index import Part, VectorIndex, build_index, exact_neighbours, one_faiss_thread, tune_index
from recsys_core.ranking import Snapshot, Trend, Users, candidates, queries_of, rank
from recsys_core.settings import IndexSettings, RankingSettings

SETTINGS = RankingSettings()
USERS, TIMED, COUNT = 100, 300, 50


def falling(items: int, dimension: int, random: np.random.Generator) -> np.ndarray:
    vectors = random.normal(size=(items, dimension)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors * (np.arange(1, items + 1) ** -0.5).astype(np.float32)[:, None]


def release(vectors: np.ndarray, available: np.ndarray, index: VectorIndex) -> Snapshot:
    items = len(vectors)
    table = {"item_id": [f"i{at}" for at in range(items)], "available": available, "category": pa.nulls(items, pa.string())}
    return Snapshot(
        release_id="benchmark",
        items=pa.table(table),
        als_items=vectors,
        als_gram=vectors.T.astype(np.float64) @ vectors,
        als_version="",
        als_alpha=1.0,
        als_regularization=0.1,
        popular=np.linalg.norm(vectors, axis=1),
        similar=np.full((items, 1), -1, np.int32),
        indexes={"inner_product": index},
    )


def masks(items: int, random: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """Filters by name."""
    order = random.permutation(items)
    for share in (0.01, 0.1, 0.5, 0.9):
        for name, ranked in (("random", order), ("most popular", np.arange(items)), ("least popular", np.arange(items)[::-1])):
            mask = np.zeros(items, bool)
            mask[ranked[: int(items * share)]] = True
            yield f"filter: {name} {share:.0%}", mask


def measured(snapshot: Snapshot, users: Users, left: np.ndarray, allowed: np.ndarray | None) -> tuple[float, float, float]:
    """Recall, and median and 99th percentile of the milliseconds; `left` bool (u, items) is what each user may get."""
    trend = Trend.of(snapshot, {})
    queries = queries_of(snapshot, users, SETTINGS)
    found = candidates(snapshot, trend, users, queries, COUNT, SETTINGS, allowed)
    shares = []
    for row, own in enumerate(left):
        places = np.flatnonzero(own)
        nearest = exact_neighbours(queries.als[[row]], snapshot.als_items[places], "inner_product", 50)
        shares.append(np.isin(places[nearest[0]], found[row]).mean())
    times = []
    for at in range(TIMED):
        one = users.rows(slice(at % len(users), at % len(users) + 1))
        started = time.perf_counter()
        rank(snapshot, trend, one, COUNT, SETTINGS, allowed)
        times.append((time.perf_counter() - started) * 1000)
    return float(np.mean(shares)), float(np.median(times)), float(np.percentile(times, 99))


def cases(items: int, dimension: int) -> Iterator[tuple[str, tuple[float, float, float]]]:
    random = np.random.default_rng(1)
    vectors = falling(items, dimension, random)
    questions = random.normal(size=(USERS + 500, dimension)).astype(np.float32)
    index, _ = build_index(vectors, "inner_product", IndexSettings(), questions[USERS:])
    none = np.full((USERS, 1), -1)
    users, everything = Users(questions[:USERS], none, none), np.ones(items, bool)
    snapshot = release(vectors, everything, index)
    every = np.ones((USERS, items), bool)
    yield f"nothing, efSearch {index.ef_search}", measured(snapshot, users, every, None)
    for name, mask in masks(items, random):
        yield name, measured(snapshot, users, every & mask, mask)
    for share in (0.01, 0.5, 0.9, 0.97, 0.99):
        available = random.random(items) >= share
        own = VectorIndex(index.index, index.metric, index.ef_search)
        found = tune_index(own, questions[USERS:], IndexSettings(), Part.of(available, tuned=True))
        name = f"unavailable: {share:.0%}, efSearch {found.ef_search}"
        yield name, measured(release(vectors, available, own), users, every & available, None)
    for count in (200, 2_000, 10_000):
        had = exact_neighbours(users.als, vectors, "inner_product", count)
        left = every.copy()
        np.put_along_axis(left, had, False, axis=1)
        yield f"had the {count:,} nearest", measured(snapshot, replace(users, had=dict(enumerate(had))), left, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, nargs="+", default=[52_000, 200_000])
    parser.add_argument("--dimension", type=int, default=32)
    options = parser.parse_args()
    one_faiss_thread()
    for items in options.items:
        shown = Table("left out", "recall@50", "ms, median", "ms, p99", title=f"{items:,} items × {options.dimension}")
        for name, (recall, median, p99) in cases(items, options.dimension):
            shown.add_row(name, f"{recall:.3f}", f"{median:.2f}", f"{p99:.2f}")
        Console().print(shown)


if __name__ == "__main__":
    main()
