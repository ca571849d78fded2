"""Small made-up releases for tests: clustered item vectors in a category tree, written as real releases."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
from towers import make_tower

from recsys_core.index import ExactIndex, Metric, VectorIndex, build_index, similar_items, unit_rows
from recsys_core.ranking import Snapshot
from recsys_core.release import Manifest
from recsys_core.settings import IndexSettings

CLUSTERS = 10
CATEGORIES = ("sports/shoes", "sports/balls", "books/novels", "books/comics", "sportswear")


def make_snapshot(
    release_id: str = "2026-01-01.a",
    items: int = 500,
    rank: int = 16,
    seed: int = 0,
    unavailable: tuple[int, ...] = (),
    als_version: str = "factors-1",
    length_spread: float = 0.0,
) -> Snapshot:
    """A release in memory. Item `item-<i>` is of cluster `i % CLUSTERS` and category `CATEGORIES[i % len(CATEGORIES)]`.

    With `length_spread` the vectors' lengths are log-normal with that deviation, falling, as in a release of ALS.
    """
    random = np.random.default_rng(seed)
    centers = random.normal(size=(CLUSTERS, rank))
    vectors = (centers[np.arange(items) % CLUSTERS] + 0.4 * random.normal(size=(items, rank))).astype(np.float32)
    if length_spread:
        lengths = np.sort(np.exp(length_spread * random.normal(size=items)))[::-1]
        vectors = np.ascontiguousarray(unit_rows(vectors) * lengths[:, None].astype(np.float32))
    available = np.ones(items, bool)
    available[list(unavailable)] = False
    table = pa.table(
        {
            "item_id": [f"item-{i}" for i in range(items)],
            "title": [f"Title {i}" if i % 7 else None for i in range(items)],
            "category": [CATEGORIES[i % len(CATEGORIES)] if i % 11 else None for i in range(items)],
            "price": random.uniform(1, 100, items),
            "available": available,
            "attributes": pa.nulls(items, pa.string()),
        }
    )
    indexes: dict[Metric, VectorIndex] = {}
    for metric in ("inner_product", "cosine"):
        indexes[metric], _ = build_index(vectors, metric, IndexSettings(ef_construction=64, tuning_queries=50))
    return Snapshot(
        release_id=release_id,
        items=table,
        als_items=vectors,
        als_gram=vectors.T.astype(np.float64) @ vectors,
        als_version=als_version,
        als_alpha=10.0,
        als_regularization=0.1,
        popular=np.round(1000 / np.arange(1, items + 1)).astype(np.float32),
        similar=similar_items(vectors, 50, indexes["cosine"]),
        indexes=indexes,
    )


def with_two_tower(snapshot: Snapshot, users: Sequence[str] = (), seed: int = 1) -> Snapshot:
    """The release with item vectors and a user tower that are made up; the tower knows `users` and all items."""
    random = np.random.default_rng(seed)
    tower = make_tower(["someone", *users], list(snapshot.item_ids), seed=seed)
    vectors = unit_rows(random.normal(size=(snapshot.items.num_rows, tower.dimension)))
    return replace(snapshot, two_tower_items=vectors, two_tower_index=ExactIndex(vectors, "inner_product"), tower=tower)


def make_manifest(snapshot: Snapshot) -> Manifest:
    """What the platform would say of the snapshot; `Releases.write` completes it."""
    als = {"version": snapshot.als_version, "rank": snapshot.als_items.shape[1]}
    return Manifest(
        release_id=snapshot.release_id,
        day="2026-01-01",
        created_at=time.time(),
        sources={"als_factors": {"partition": "2026-01-01", "data_version": "abc"}, "item_catalog": {"data_version": "def"}},
        models={
            "als": {**als, "alpha": snapshot.als_alpha, "regularization": snapshot.als_regularization},
            "two_tower": {"version": snapshot.tower.version} if snapshot.tower else None,
        },
        index={metric: {"ef_search": 64, "recall": 1.0} for metric in ("inner_product", "cosine")},
        ranking=snapshot.ranking.model_dump(mode="json"),
        metrics={"als": {"ndcg@10": 0.4}, "users": 100},
        run_ids={},
    )
