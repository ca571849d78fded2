"""Small made-up user towers for tests, with random weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recsys_core.tower import NUMBERS, TowerInputs, TowerSpec, UserTower, fingerprints

CONTEXT_WIDTH = 4


def make_tower(
    users: Sequence[str],
    items: Sequence[str],
    dimension: int = 8,
    hidden: Sequence[int] = (16, 8),
    seed: int = 0,
    item_bias: bool = False,
) -> UserTower:
    """A tower that knows `users` and `items`."""
    random = np.random.default_rng(seed)

    def weights(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    devices, countries, categories = ("desktop", "mobile"), ("DE", "FR"), ("books", "sports")
    sizes = {"hours": 24, "weekdays": 7, "devices": 3, "countries": 3, "categories": 3}
    layers = [*hidden, dimension] if hidden else []
    width = 3 * dimension + CONTEXT_WIDTH * len(sizes) + NUMBERS
    dense = []
    for units in layers:
        dense.append((weights(width, units) / np.float32(np.sqrt(width)), weights(units)))
        width = units
    spec = TowerSpec(
        dimension=dimension,
        history=50,
        recent=3,
        layers=len(layers),
        devices=devices,
        countries=countries,
        categories=categories,
        scales=(0.7, 1.0, 0.4),
        center=(0.5, 1.0, 2.0, 3.0),
        spread=(1.0, 1.5, 2.0, 1.0),
        item_bias=item_bias,
        version="made-up",
    )
    history = weights(len(items) + 1, dimension)
    history[0] = 0
    tables = {
        "user_ids": np.sort(fingerprints(users)),
        "item_ids": np.sort(fingerprints(items)),
        "users": weights(len(users) + 1, dimension),
        "history": history,
        **{name: weights(rows, CONTEXT_WIDTH) for name, rows in sizes.items()},
    }
    return UserTower(spec, tables, dense)


def random_inputs(users: Sequence[str], items: Sequence[str], count: int, seed: int = 0) -> TowerInputs:
    """`count` users as the online store may know them: some unknown, histories of any length, missing context."""
    random = np.random.default_rng(seed)
    known, wares = [*users, "nobody"], [*items, "no-such-item"]
    counts = random.lognormal(2, 2, size=(count, 4)).astype(np.float32)
    counts[random.random(count) < 0.3, 3] = np.nan
    return TowerInputs(
        user_ids=[known[k] for k in random.integers(0, len(known), count)],
        history=[[wares[k] for k in random.integers(0, len(wares), size)] for size in random.integers(0, 60, count)],
        ts_ms=random.integers(10**12, 2 * 10**12, count),
        device=[[None, "mobile", "desktop", "toaster"][k] for k in random.integers(0, 4, count)],
        country=[[None, "DE", "FR", "XX"][k] for k in random.integers(0, 4, count)],
        category=[[None, "books", "sports", "??"][k] for k in random.integers(0, 4, count)],
        counts=counts,
    )
