"""The two-tower model on Gowalla, the LightGCN split (../shared/data/README.md): Recall@20 and NDCG@20.

    python benchmarks/two_tower_gowalla.py

Every check-in of the train split becomes an example whose history are the user's other check-ins, at most HISTORY of them at
random; the split has no times. The fit is the product's own, through a lake in a temporary folder; users are then scored by
the user tower that serving uses, with all their train items as the history. All items are ranked, train items are left out.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp
from rich.console import Console

from recsys_core.lake import Lake
from recsys_core.metrics import per_user, rank_all
from recsys_core.settings import TwoTowerSettings, load_settings
from recsys_core.tower import TowerInputs, UserTower
from recsys_core.two_tower import TWO_TOWER, TwoTowerReport, fit_two_tower
from recsys_core.two_tower_data import ITEM_FEATURES, TRAINING_EXAMPLES

DAY = "2010-11-01"
K = 20
HISTORY = 80
TARGETS = {"recall@20": 0.1754, "ndcg@20": 0.1473}
"""YoutubeDNN in the BARS leaderboard, Gowalla_m1."""
NEXT_TARGETS = {"recall@20": 0.1872, "ndcg@20": 0.1557}
"""SimpleX, there."""
TARGET_SECONDS = 20 * 60

SETTINGS = TwoTowerSettings(
    dimension=64,
    hidden=(),
    item_bias=True,
    user_ids=False,
    history=1000,
    history_dropout=0.5,
    recent=0,
    id_dropout=0.0,
    temperature=0.1,
    propensity_power=0.0,
    negatives=2048,
    batch_size=2048,
    learning_rate=0.005,
    final_learning_rate=0.02,
    epochs=22,
    validation_share=0.0,
    checkpoint_steps=0,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default_data = os.environ.get("RECSYS_DATA_DIR") or "../shared/data"
    parser.add_argument("--data", type=Path, default=Path(default_data), help=f"folder of gowalla-lightgcn ({default_data})")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings other than the benchmark's own")
    parser.add_argument("--users", type=int, default=0, help="evaluate on so many users at random; 0: all of them")
    arguments = parser.parse_args()
    console = Console()
    folder = arguments.data / "gowalla-lightgcn"
    if not (folder / "train.txt").is_file():
        console.print(f"No train.txt in {folder}: name the data folder by --data or RECSYS_DATA_DIR.")
        return 2
    changed = dict(pair.split("=", 1) for pair in arguments.set)
    settings = TwoTowerSettings.model_validate({**SETTINGS.model_dump(), **changed})
    train, test = read(folder / "train.txt"), read(folder / "test.txt")
    items = 1 + max(int(found.max(initial=0)) for found in (*train, *test))
    with tempfile.TemporaryDirectory() as home:
        started = time.perf_counter()
        lake = Lake(f"{home}/lake")
        write_tables(lake, train, items, settings.seed)
        console.print(f"tables written in {time.perf_counter() - started:.0f} s")
        metrics, report = measure(lake, home, settings, train, test, items, arguments.users, console)
        seconds = time.perf_counter() - started
    console.print(
        f"Gowalla, {settings.epochs} epochs of {report.examples:,} examples: recall@{K} {metrics['recall@20']:.4f}, "
        f"ndcg@{K} {metrics['ndcg@20']:.4f}; training {report.seconds:.0f} s wall, {report.examples_per_second:,.0f} a second, "
        f"everything {seconds:.0f} s wall, {time.process_time():.0f} s of processor time"
    )
    for name, wanted in (("targets", TARGETS), ("next bar", NEXT_TARGETS)):
        missed = [f"{metric} {metrics[metric]:.4f} < {least}" for metric, least in wanted.items() if metrics[metric] < least]
        console.print(f"{name}: {', '.join(missed) or 'reached'}")
    return 0 if all(metrics[m] >= least for m, least in TARGETS.items()) and seconds <= TARGET_SECONDS else 1


def read(path: Path) -> list[np.ndarray]:
    """The items of each user."""
    return [np.array(line.split()[1:], np.int64) for line in path.read_text().splitlines()]


def write_tables(lake: Lake, train: list[np.ndarray], items: int, seed: int) -> None:
    """`training_examples` and `item_features` of DAY, as the features' tables are; what the data lacks is null or zero."""
    names = pa.array([f"i{n}" for n in range(items)])
    batches = _examples(train, names, np.random.default_rng(seed))
    first = next(batches)

    def all_batches() -> Iterator[pa.RecordBatch]:
        yield first
        yield from batches

    lake.write(TRAINING_EXAMPLES, DAY, all_batches(), first.schema)
    lake.write(ITEM_FEATURES, DAY, pa.table({"item_id": names, **_item_columns(items)}))


def _examples(train: list[np.ndarray], names: pa.Array, random: np.random.Generator) -> Iterator[pa.RecordBatch]:
    for at in range(0, len(train), 500):
        users, histories = [], []
        for user in range(at, min(at + 500, len(train))):
            for n in range(len(train[user])):
                others = np.delete(train[user], n)
                histories.append(others if len(others) <= HISTORY else random.choice(others, HISTORY, replace=False))
                users.append(f"u{user}")
        rows = len(users)
        offsets = np.append(0, np.cumsum([len(history) for history in histories])).astype(np.int32)
        nothing = {name: pa.nulls(rows, pa.string()) for name in ("device", "country", "user_category")}
        zeros = {name: pa.array(np.zeros(rows, np.int8)) for name in ("hour", "weekday")}
        counts = {f"user_events_{span}": pa.array(np.zeros(rows, np.int32)) for span in ("1d", "7d", "window")}
        yield pa.record_batch(
            {
                "user_id": pa.array(users),
                "item_id": names.take(pa.array(np.concatenate(train[at : at + 500]))),
                "ts": pa.array(np.zeros(rows, np.int64)),
                "weight": pa.array(np.ones(rows, np.float32)),
                "history": pa.ListArray.from_arrays(pa.array(offsets), names.take(pa.array(np.concatenate(histories)))),
                "user_recency_hours": pa.nulls(rows, pa.float32()),
                **nothing,
                **zeros,
                **counts,
                **_item_columns(rows),
            }
        )


def _item_columns(rows: int) -> dict[str, pa.Array]:
    counts = {f"item_events_{span}": pa.array(np.zeros(rows, np.int32)) for span in ("1d", "7d", "window")}
    return {
        "category": pa.nulls(rows, pa.string()),
        "price_bucket": pa.array(np.full(rows, -1, np.int8)),
        "item_age_days": pa.array(np.zeros(rows, np.float32)),
        **counts,
    }


def measure(
    lake: Lake,
    home: str,
    settings: TwoTowerSettings,
    train: list[np.ndarray],
    test: list[np.ndarray],
    items: int,
    sample: int,
    console: Console,
) -> tuple[dict[str, float], TwoTowerReport]:
    """Fit, and rank all items for the users that have test items."""
    log_started = time.perf_counter()

    def log(metrics: dict[str, float], epoch: int) -> None:
        console.print(f"epoch {epoch}: loss {metrics['loss']:.4f}, {time.perf_counter() - log_started:.0f} s")

    report = fit_two_tower(lake, DAY, load_settings(home=home, two_tower=settings), log)
    files = {name: lake.read_blob(TWO_TOWER, DAY, name) for name in lake.get(TWO_TOWER, DAY).files}
    tower = UserTower.from_files(files)
    users = np.array([user for user, found in enumerate(test) if len(found)])
    if sample:
        users = np.sort(np.random.default_rng(1).permutation(users)[:sample])
    ids = pq.read_table(io.BytesIO(files["items.parquet"]))["item_id"].to_pylist()
    places = np.empty(items, np.int64)
    places[[int(name[1:]) for name in ids]] = np.arange(items)
    vectors = np.load(io.BytesIO(files["items.npy"]))
    inputs = TowerInputs(
        [f"u{user}" for user in users],
        [[f"i{n}" for n in train[user]] for user in users],
        np.zeros(len(users), np.int64),
        *([None] * len(users) for _ in range(3)),
        np.tile(np.array([0, 0, 0, np.nan], np.float32), (len(users), 1)),
    )
    seen, relevant = (_matrix([places[found[user]] for user in users], items) for found in (train, test))
    found = per_user(rank_all(tower.vectors(inputs), vectors, seen, K), relevant, [K])
    return {name: float(values.mean()) for name, values in found.items()}, report


def _matrix(rows: list[np.ndarray], columns: int) -> sp.csr_matrix:
    indptr = np.append(0, np.cumsum([len(row) for row in rows]))
    return sp.csr_matrix((np.ones(indptr[-1], np.float32), np.concatenate(rows), indptr), shape=(len(rows), columns))


if __name__ == "__main__":
    sys.exit(main())
