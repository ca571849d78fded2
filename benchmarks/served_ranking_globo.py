"""The served ranking on a news clickstream: what the scoring path of serving finds, its weights tuned by the evaluation.

    python benchmarks/served_ranking_globo.py FOLDER [--users 4000] [--engine implicit] [--output FILE]

FOLDER holds the Globo clicks by the hour (clicks_hour_000.csv.gz …). Hours 0–215 are known, hours 216–221 and 216–239 are
predicted, for sampled users seen before, with every known item ranked and what a user clicked before left out. Everything is
the product's: ALS, the tuning on moments of the last known day, the ranking and the metrics; pandas takes the place of
Spark in making the tables.

Two means are printed. `NDCG@10` counts users with something reachable, and what is reachable of theirs, as the evaluation of
the product does. `strict` counts every sampled user, and clicks on items that nobody had clicked before as missed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from recsys_core.evaluation import SERVED, Evaluation, compare, interval, resamples
from recsys_core.events import DAY_MS, HOUR_MS, day_key, hour_key, key_start_ms
from recsys_core.holdout import Split, fit_holdout, time_split, validation_cases
from recsys_core.lake import Lake
from recsys_core.metrics import per_user
from recsys_core.settings import Settings, load_settings
from recsys_core.tables import CLICKS_HOURLY, INTERACTIONS
from recsys_core.tuning import tune

COLUMNS = {"user_id": "user_id", "click_article_id": "item_id", "click_timestamp": "ts"}
FIRST_MS = key_start_ms("2017-10-01")
LAST_HOUR = 240
DAY = "2017-10-10"


def read_clicks(folder: Path) -> pd.DataFrame:
    """user_id, item_id and ts (ms), int64, of the first LAST_HOUR hours, in the order of time, each event once."""
    frames = [pd.read_csv(path, usecols=list(COLUMNS)) for path in sorted(folder.glob("clicks_hour_*.csv.gz"))]
    clicks = pd.concat(frames).rename(columns=COLUMNS).astype(np.int64).drop_duplicates()
    clicks = clicks[(clicks.ts >= FIRST_MS) & (clicks.ts < FIRST_MS + LAST_HOUR * HOUR_MS)]
    return clicks.sort_values("ts", kind="stable")


def write_tables(lake: Lake, clicks: pd.DataFrame, day: str, settings: Settings) -> None:
    """`clicks_hourly`, and the partition `day` of `interactions`, as the Spark tables have them."""
    table = pa.table(
        {
            "user_id": text(clicks.user_id.to_numpy()),
            "item_id": text(clicks.item_id.to_numpy()),
            "event_type": pa.array(["click"] * len(clicks)),
            "ts": clicks.ts.to_numpy(),
        }
    )
    hours = clicks.ts.to_numpy() // HOUR_MS
    for hour in np.unique(hours):
        first, end = np.searchsorted(hours, [hour, hour + 1])
        lake.write(CLICKS_HOURLY, hour_key(int(hour) * HOUR_MS), table.slice(first, end - first))
    end_ms = key_start_ms(day) + DAY_MS
    known = clicks[clicks.ts < end_ms]
    key = known.user_id.to_numpy() << 32 | known.item_id.to_numpy()
    pairs, first, code, count = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
    ts = known.ts.to_numpy()
    last = np.empty(len(pairs), np.int64)
    last[code] = ts
    weight = np.bincount(code, np.exp2((ts - end_ms) / (settings.interactions.half_life_days * DAY_MS)))
    rows = {
        "user_id": text(pairs >> 32),
        "item_id": text(pairs & 0xFFFFFFFF),
        "weight": weight.astype(np.float32),
        "n_events": count.astype(np.int32),
        "first_ts": ts[first],
        "last_ts": last,
    }
    lake.write(INTERACTIONS, day, pa.table(rows))


def text(numbers: np.ndarray) -> pa.Array:
    """Numbers as strings."""
    return pa.array(numbers).cast(pa.string())


def strict(split: Split, recommended: np.ndarray, k: int = 10) -> np.ndarray:
    """NDCG@k of every sampled user, clicks on items that the window does not know being in the ideal list."""
    discounts = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, k + 2)))])
    known = np.diff(split.relevant.indptr)
    values = per_user(recommended, split.relevant, [k])[f"ndcg@{k}"]
    values = values * discounts[np.minimum(known, k)] / discounts[np.minimum(known + split.outside, k)]
    return np.concatenate([values, np.zeros(split.unreachable)])


def report(name: str, split: Split, found: Evaluation, seconds: float) -> dict:
    """Print the models of one horizon side by side and return what was printed."""
    print(f"\n{name}: {found.users} users, {found.items} items, {seconds:.0f} s, tuned in {found.tuning['seconds']:.1f} s")
    print(f"  {'model':28}{'NDCG@10':>9}  {'95 %':17}{'served gains':>14}  {'95 %':20}{'strict':>8}")
    rows = {}
    drawn = resamples(found.users + split.unreachable, 1000)
    for model, metrics in found.metrics.items():
        low, high = found.intervals[model]
        gain = found.differences.get(model)
        tight = interval(strict(split, found.recommended[model]), drawn)
        gained = "" if gain is None else f"{gain[0]:+14.4f}  [{gain[1]:+.4f}, {gain[2]:+.4f}]"
        print(f"  {model:28}{metrics['ndcg@10']:9.4f}  [{low:.4f}, {high:.4f}]{gained:>36}{tight[0]:9.4f}")
        rows[model] = {"ndcg@10": metrics["ndcg@10"], "interval": [low, high], "served gains": gain, "strict": tight}
    ranking = {key: value for key, value in found.ranking.items() if key.endswith(("weight", "mix"))}
    print(f"  weights: {ranking}")
    print(f"  validation NDCG@10: {found.tuning['configured']:.4f} configured, {found.tuning['ndcg']:.4f} tuned")
    return {"users": found.users, "models": rows, "ranking": ranking, "tuning": found.tuning, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--users", type=int, default=4000)
    parser.add_argument("--engine", choices=["numpy", "implicit"], default="numpy", help="of ALS; numpy is that of one machine")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    settings = load_settings()
    settings = settings.model_copy(update={"evaluation": settings.evaluation.model_copy(update={"max_users": arguments.users})})
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        lake = Lake(folder)
        started = time.perf_counter()
        before = day_key(key_start_ms(DAY) - DAY_MS)
        write_tables(lake, read_clicks(arguments.folder), before, settings)
        print(f"tables: {time.perf_counter() - started:.0f} s", flush=True)
        started = time.perf_counter()
        fitted = fit_holdout(lake, before, DAY, settings, None, arguments.engine)
        print(f"ALS: {time.perf_counter() - started:.0f} s", flush=True)
        started = time.perf_counter()
        tuned = tune(validation_cases(lake, before, settings, None, arguments.engine), settings.ranking)
        print(f"validation models and tuning: {time.perf_counter() - started:.0f} s", flush=True)
        for name, hours in (("next 6 hours", 6), ("next day", 24)):
            started = time.perf_counter()
            split = time_split(lake, before, DAY, settings, hours)
            found = compare(lake, DAY, split, fitted, tuned, settings)
            results[name] = report(name, split, found, time.perf_counter() - started)
    assert all(SERVED in result["models"] for result in results.values())
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
