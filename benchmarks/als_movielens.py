"""ALS on MovieLens-1M, the NCF leave-one-out protocol (../shared/data/README.md): HR@10 and NDCG@10 of the engines.

    python benchmarks/als_movielens.py --engine numpy
    python benchmarks/als_movielens.py --engine numpy --set propensity_power=0.2 --validate --tilt 0.4

Each user's held-out item is ranked against 99 negatives; an equal score counts against it. Ratings become interactions
of weight 1. The fit is the product's own, through a lake in a temporary folder and a local Spark session. `--validate` takes
a random train item of each user out of the fit and ranks that one against 99 items that are not in the user's train: the
settings below were chosen by it. The protocol's test item is a user's newest, and newest items are rarer ones: in MovieLens
100k, which has all timestamps, they are as rare as if drawn with probability n^-0.4, n an item's interactions. `--tilt 0.4`
takes out such items.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from recsys_core.als import AlsReport, Factors, fit_als, read_factors
from recsys_core.lake import Lake
from recsys_core.settings import AlsSettings, SparkSettings, load_settings
from recsys_core.spark import session

DACREMA = {"HR@10": 0.7109, "NDCG@10": 0.4382}
"""iALS in Dacrema et al., TOIS 2021, supplement."""
RENDLE = {"HR@10": 0.7306, "NDCG@10": 0.4509}
"""iALS with frequency-scaled regularisation, d = 192, with the settings of Rendle et al. 2022."""
TARGETS = {"numpy": RENDLE, "implicit": DACREMA, "spark": DACREMA}
TARGET_SECONDS = {"numpy": 60.0, "implicit": 15.0}

SETTINGS = {
    "numpy": AlsSettings(
        engine="numpy",
        rank=320,
        iterations=8,
        alpha=1 / 0.3,
        base_preference=1.0,
        regularization=0.235,
        frequency_scaling=1.0,
        propensity_power=0.3,
    ),
    "implicit": AlsSettings(engine="implicit", rank=128, iterations=15, alpha=6.0, regularization=0.3, propensity_power=0.3),
    "spark": AlsSettings(engine="spark", rank=64, iterations=12, alpha=3.3, regularization=0.05, propensity_power=0.3),
}
FILES = ("train.tsv.gz", "test.tsv.gz", "test.negative.tsv.gz")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=[*SETTINGS, "all"], default="all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[7], help="one fit for each, with --validate one split too")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another value of a setting of [als]")
    parser.add_argument("--validate", action="store_true", help="a held-out train item of each user instead of the test items")
    parser.add_argument("--tilt", type=float, default=0.0, help="held-out items are drawn with probability n^-tilt")
    default_data = os.environ.get("RECSYS_DATA_DIR") or "../shared/data"
    parser.add_argument("--data", type=Path, default=Path(default_data), help=f"folder of ml-1m-ncf (default: {default_data})")
    arguments = parser.parse_args()
    console = Console()
    folder = arguments.data / "ml-1m-ncf"
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        console.print(f"No {', '.join(missing)} in {folder}: name the data folder by --data or RECSYS_DATA_DIR.")
        return 2
    train, test_users, candidates = read_protocol(folder)
    changes = dict(change.split("=", 1) for change in arguments.set)
    engines = list(SETTINGS) if arguments.engine == "all" else [arguments.engine]
    title = f"ALS, MovieLens-1M leave-one-out{', held-out train items' if arguments.validate else ''}"
    table = Table("engine", "seed", "HR@10", "NDCG@10", "fit seconds", "settings", "target", title=title)
    passed = True
    with tempfile.TemporaryDirectory() as home:
        for engine in engines:
            for seed in arguments.seeds:
                settings = AlsSettings.model_validate({**SETTINGS[engine].model_dump(), "seed": seed, **changes})
                protocol = held_out(train, seed, arguments.tilt) if arguments.validate else (train, test_users, candidates)
                report, metrics = measure(Path(home), *protocol, settings, engine)
                targets = {} if arguments.validate else TARGETS[engine]
                failed = [f"{name} < {least}" for name, least in targets.items() if metrics[name] < least]
                most = TARGET_SECONDS.get(engine)
                if most is not None and report.seconds > most:
                    failed.append(f"over {most:g} s")
                passed &= not failed
                table.add_row(
                    engine,
                    str(seed),
                    f"{metrics['HR@10']:.4f}",
                    f"{metrics['NDCG@10']:.4f}",
                    f"{report.seconds:.1f}",
                    f"rank {settings.rank}, {settings.iterations} sweeps, α {settings.alpha:.3g}, "
                    f"preference {settings.base_preference:g}, λ {settings.regularization:g}, "
                    f"scaling {settings.frequency_scaling:g}, propensity {settings.propensity_power:g}",
                    ", ".join(failed) or ("" if arguments.validate else "reached"),
                )
    console.print(table)
    told = {engine: ", ".join(f"{name} ≥ {least}" for name, least in TARGETS[engine].items()) for engine in engines}
    seconds = {engine: f", ≤ {most:g} s" for engine, most in TARGET_SECONDS.items()}
    console.print("Targets:", *(f"{engine}: {least}{seconds.get(engine, '')}." for engine, least in told.items()))
    return 0 if passed else 1


def read_protocol(folder: Path) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """The train split as interactions, test users (6040,), and their candidates (6040, 100), the held-out item first."""
    train = pd.read_csv(folder / FILES[0], sep="\t", header=None, names=["user", "item", "rating"], usecols=[0, 1, 2])
    test = pd.read_csv(folder / FILES[1], sep="\t", header=None).to_numpy()
    negatives = pd.read_csv(folder / FILES[2], sep="\t", header=None).to_numpy()
    if not (np.array_equal(negatives[:, :2], test[:, :2])):
        raise ValueError(f"{folder}: the lines of {FILES[1]} and {FILES[2]} don't name the same users and items")
    interactions = pa.table(
        {
            "user_id": pa.array(train["user"].astype(str), pa.string()),
            "item_id": pa.array(train["item"].astype(str), pa.string()),
            "weight": pa.array(np.ones(len(train), np.float32)),
            "n_events": pa.array(np.ones(len(train), np.int32)),
            "last_ts": pa.array(np.zeros(len(train), np.int64)),
        }
    )
    return interactions, negatives[:, 0], negatives[:, 1:]


def held_out(train: pa.Table, seed: int, tilt: float) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """The same of train alone: without an item of each user, the users, and that item before 99 others (users, 100).

    A user's item is drawn with probability in proportion to n^-tilt, n its interactions.
    """
    random = np.random.default_rng(seed)
    pairs = train.select(["user_id", "item_id"]).to_pandas().astype(np.int64).to_numpy()
    known, item, n = np.unique(pairs[:, 1], return_inverse=True, return_counts=True)
    shuffled = np.argsort(random.exponential(size=len(pairs)) * n[item] ** tilt)
    _, first = np.unique(pairs[shuffled, 0], return_index=True)
    out = shuffled[first]
    had = pd.Series(pairs[:, 1]).groupby(pairs[:, 0]).agg(set)
    candidates = np.empty((len(out), 100), np.int64)
    for row, (user, item) in enumerate(pairs[out]):
        others = random.permutation(known)[: 99 + len(had[user])]
        candidates[row] = [item, *[other for other in others if other not in had[user]][:99]]
    kept = np.ones(len(pairs), bool)
    kept[out] = False
    return train.filter(pa.array(kept)), pairs[out, 0], candidates


def measure(
    home: Path, train: pa.Table, test_users: np.ndarray, candidates: np.ndarray, als: AlsSettings, engine: str
) -> tuple[AlsReport, dict[str, float]]:
    """Fit through a lake at `home` and rank the candidates. Starting Spark isn't part of the fit's seconds."""
    lake = Lake(str(home / "lake"))
    key = "2003-02-28"
    lake.write("interactions", key, train)
    spark = None
    if engine == "spark":
        spark = session(load_settings(home=home, spark=SparkSettings(master="local[2]")))
    report = fit_als(
        lake, lake.files("interactions", [key]), "als_factors", key, als, (lambda: spark) if spark else None, engine
    )
    users = _by_number(read_factors(lake, "als_factors", key, "users"), test_users.max() + 1)
    items = _by_number(read_factors(lake, "als_factors", key, "items"), candidates.max() + 1)
    scores = np.einsum("ud,und->un", users[test_users], items[candidates])
    better = np.count_nonzero(scores[:, 1:] >= scores[:, :1], axis=1)
    hit = better < 10
    return report, {"HR@10": float(hit.mean()), "NDCG@10": float((hit / np.log2(better + 2)).mean())}


def _by_number(factors: Factors, size: int) -> np.ndarray:
    """Vectors at the place that their id names, zeros where there is none."""
    numbers = factors.ids.astype(np.int64)
    vectors = np.zeros((max(size, numbers.max() + 1), factors.vectors.shape[1]), np.float32)
    vectors[numbers] = factors.vectors
    return vectors


if __name__ == "__main__":
    sys.exit(main())
