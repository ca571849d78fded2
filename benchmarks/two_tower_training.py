"""Two-tower training on many synthetic examples: examples a second and the peak of memory.

    python benchmarks/two_tower_training.py --examples 10000000

Examples are written as a Parquet table in batches, as the features' table is; the training streams them in a process of its
own, whose memory is the figure. Users click in clusters; histories have the length HISTORY.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from rich.console import Console

from recsys_core.lake import Lake
from recsys_core.settings import TwoTowerSettings, load_settings
from recsys_core.two_tower import fit_two_tower
from recsys_core.two_tower_data import ITEM_FEATURES, TRAINING_EXAMPLES

DAY = "2026-01-01"
HISTORY = 20
CLUSTERS = 100
BATCH = 100_000
TARGET_BYTES = 4 << 30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=10_000_000)
    parser.add_argument("--users", type=int, default=500_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings other than the defaults")
    parser.add_argument("--home", help="train on the tables that are there, and print the figures (used by the benchmark)")
    arguments = parser.parse_args()
    if arguments.home:
        return train(arguments.home, arguments.epochs, arguments.set)
    with tempfile.TemporaryDirectory() as home:
        started = time.perf_counter()
        write_tables(Lake(f"{home}/lake"), arguments.examples, arguments.users, arguments.items)
        Console().print(f"{arguments.examples:,} examples written in {time.perf_counter() - started:.0f} s")
        command = [sys.executable, __file__, "--home", home, "--epochs", str(arguments.epochs), "--set", *arguments.set]
        return subprocess.run(command, check=False).returncode


def train(home: str, epochs: int, changed: list[str]) -> int:
    """Train, and print what it took. Exit code 1 over TARGET_BYTES."""
    values = dict(pair.split("=", 1) for pair in changed)
    settings = TwoTowerSettings.model_validate({**TwoTowerSettings().model_dump(), "epochs": epochs, **values})
    report = fit_two_tower(Lake(f"{home}/lake"), DAY, load_settings(home=home, two_tower=settings))
    # Linux gives kilobytes, macOS bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    Console().print(
        f"{report.examples:,} examples, {report.parameters:,} parameters, {len(report.epochs)} epochs: "
        f"{report.seconds:.0f} s wall, "
        f"{time.process_time():.0f} s of processor time, {report.examples_per_second:,.0f} examples/s in the passes, "
        f"peak {peak / (1 << 30):.2f} GiB"
    )
    return 0 if peak <= TARGET_BYTES else 1


def write_tables(lake: Lake, examples: int, users: int, items: int) -> None:
    """`training_examples` and `item_features` of DAY."""
    names = pa.array([f"item-{n:07d}" for n in range(items)])
    categories = pa.array([f"top{n % CLUSTERS % 10}/sub{n % CLUSTERS}" for n in range(items)])
    batches = _examples(examples, users, items, names, categories)
    first = next(batches)

    def all_batches() -> Iterator[pa.RecordBatch]:
        yield first
        yield from batches

    lake.write(TRAINING_EXAMPLES, DAY, all_batches(), first.schema)
    numbers = _numbers(np.random.default_rng(1), items)
    lake.write(ITEM_FEATURES, DAY, pa.table({"item_id": names, "category": categories, **numbers}))


def _examples(examples: int, users: int, items: int, names: pa.Array, categories: pa.Array) -> Iterator[pa.RecordBatch]:
    random = np.random.default_rng(0)
    for at in range(0, examples, BATCH):
        rows = min(BATCH, examples - at)
        user = random.integers(0, users, rows)
        # A power of a uniform number: few items are frequent, as in real clicks.
        drawn = (random.random((rows, HISTORY + 1)) ** 3 * (items // CLUSTERS)).astype(np.int64) * CLUSTERS
        drawn += user[:, None] % CLUSTERS
        ts = 1_767_000_000_000 + (at + np.arange(rows)) * 86_400_000 // max(1, examples)
        history = pa.ListArray.from_arrays(
            pa.array(np.arange(0, rows * HISTORY + 1, HISTORY, dtype=np.int32)), names.take(pa.array(drawn[:, 1:].ravel()))
        )
        counts = {f"user_events_{span}": pa.array(random.integers(0, 50, rows), pa.int32()) for span in ("1d", "7d", "window")}
        yield pa.record_batch(
            {
                "user_id": pa.array(np.char.mod("user-%07d", user)),
                "item_id": names.take(pa.array(drawn[:, 0])),
                "ts": pa.array(ts),
                "weight": pa.array(np.ones(rows, np.float32)),
                "history": history,
                "hour": pa.array((ts // 3_600_000 % 24).astype(np.int8)),
                "weekday": pa.array(np.full(rows, 3, np.int8)),
                "device": pa.array(["mobile", "desktop"]).take(pa.array(user % 2)),
                "country": pa.array(["DE", "FR", "GB"]).take(pa.array(user % 3)),
                "user_recency_hours": pa.array(random.exponential(24, rows), pa.float32()),
                "user_category": pa.array([f"top{n}" for n in range(10)]).take(pa.array(user % CLUSTERS % 10)),
                "category": categories.take(pa.array(drawn[:, 0])),
                **counts,
                **_numbers(random, rows),
            }
        )


def _numbers(random: np.random.Generator, rows: int) -> dict[str, pa.Array]:
    counts = {f"item_events_{span}": pa.array(random.integers(0, 1000, rows), pa.int32()) for span in ("1d", "7d", "window")}
    return {
        "price_bucket": pa.array(random.integers(0, 8, rows), pa.int8()),
        "item_age_days": pa.array(random.exponential(30, rows), pa.float32()),
        **counts,
    }


if __name__ == "__main__":
    sys.exit(main())
