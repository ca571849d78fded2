"""Time of one user's vector from the embedded user tower, with random weights of the default sizes.

    OPENBLAS_NUM_THREADS=1 python benchmarks/two_tower_user.py

Histories are drawn by a power law, as clicks are. Other work on the machine disturbs the median and the processor time least.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from rich.console import Console

from recsys_core.settings import TwoTowerSettings
from recsys_core.tower import COUNTS, NUMBERS, TowerInputs, TowerSpec, UserTower, fingerprints

USERS, ITEMS, CALLS = 50_000, 100_000, 5_000
WARM_UP = 20_000
"""Users before: a process that has served for a minute remembers the places of most ids that are asked for."""
CONTEXT_ROWS = {"hours": 24, "weekdays": 7, "devices": 3, "countries": 3, "categories": 3}
CONTEXT_WIDTH = 8
TARGET_MS = 0.1


def main() -> int:
    tower = make_tower(TwoTowerSettings())
    random = np.random.default_rng(1)
    for _ in range(WARM_UP):
        tower.vectors(one_user(random, tower.spec.history))
    users = [one_user(random, tower.spec.history) for _ in range(CALLS)]
    wall = np.empty(CALLS)
    processor = time.process_time()
    for n, inputs in enumerate(users):
        started = time.perf_counter()
        tower.vectors(inputs)
        wall[n] = time.perf_counter() - started
    processor = (time.process_time() - processor) / CALLS * 1e3
    median, slow = np.percentile(wall, [50, 99]) * 1e3
    Console().print(f"one user: median {median:.3f} ms, p99 {slow:.3f} ms, processor time {processor:.3f} ms a call")
    return 0 if median <= TARGET_MS else 1


def make_tower(settings: TwoTowerSettings) -> UserTower:
    """Random weights for USERS users and ITEMS items."""
    random = np.random.default_rng(0)

    def weights(*shape: int) -> np.ndarray:
        return (0.1 * random.normal(size=shape)).astype(np.float32)

    d = settings.dimension
    dense, width = [], 3 * d + CONTEXT_WIDTH * len(CONTEXT_ROWS) + NUMBERS
    for units in (*settings.hidden, d):
        dense.append((weights(width, units), weights(units)))
        width = units
    spec = TowerSpec(
        d,
        settings.history,
        settings.recent,
        len(dense),
        ("desktop", "mobile"),
        ("DE", "FR"),
        ("a", "b"),
        (1.0, 1.0, 1.0),
        (0.0,) * len(COUNTS),
        (1.0,) * len(COUNTS),
    )
    history = weights(ITEMS + 1, d)
    history[0] = 0
    tables = {
        "user_ids": np.sort(fingerprints([f"u{n:06d}" for n in range(USERS)])),
        "item_ids": np.sort(fingerprints([f"i{n:06d}" for n in range(ITEMS)])),
        "users": weights(USERS + 1, d),
        "history": history,
        **{name: weights(rows, CONTEXT_WIDTH) for name, rows in CONTEXT_ROWS.items()},
    }
    return UserTower(spec, tables, dense)


def one_user(random: np.random.Generator, history: int) -> TowerInputs:
    items = (random.random(history) ** 4 * ITEMS).astype(int)
    return TowerInputs(
        [f"u{random.integers(0, USERS):06d}"],
        [[f"i{n:06d}" for n in items]],
        np.array([1_790_000_000_000]),
        ["mobile"],
        ["DE"],
        ["a"],
        random.random((1, len(COUNTS)), np.float32),
    )


if __name__ == "__main__":
    sys.exit(main())
