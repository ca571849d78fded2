"""The served ranking where taste rules more than the hour: the same tuner on films and on a company's articles.

    python benchmarks/served_ranking_days.py FOLDER [--engine implicit]

FOLDER holds `ml-100k/ml-100k.inter` and `deskdrop/users_interactions.csv.gz`; one that is missing is left out. Each of the last
four times four weeks of MovieLens-100k and the last week of Deskdrop are predicted from everything before, by the evaluation's
own path: ALS, weights tuned on the days before, ranking and metrics. Every event counts the same. What the factor models are
worth is said by the same weights without theirs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
from served_ranking_globo import report, write_tables

from recsys_core.evaluation import SERVED, compare
from recsys_core.events import DAY_MS, day_key, key_start_ms
from recsys_core.holdout import fit_holdout, time_split, validation_cases
from recsys_core.lake import Lake
from recsys_core.settings import Settings, load_settings
from recsys_core.tuning import tune

NO_FACTORS = {"als_weight": 0.0, "two_tower_weight": 0.0, "session_weight": 0.0}


def movielens(folder: Path) -> pd.DataFrame:
    found = pd.read_csv(folder / "ml-100k" / "ml-100k.inter", sep="\t")
    return found.set_axis(["user_id", "item_id", "rating", "ts"], axis=1)


def deskdrop(folder: Path) -> pd.DataFrame:
    found = pd.read_csv(folder / "deskdrop" / "users_interactions.csv.gz")
    return found.rename(columns={"personId": "user_id", "contentId": "item_id", "timestamp": "ts"})


def clicks_of(rows: pd.DataFrame) -> pd.DataFrame:
    """user_id and item_id as small numbers, ts in ms, int64, in the order of time."""
    numbered = {name: pd.factorize(rows[name])[0] for name in ("user_id", "item_id")}
    clicks = pd.DataFrame({**numbered, "ts": (rows.ts * 1000).to_numpy()}).astype("int64")
    return clicks.drop_duplicates().sort_values("ts", kind="stable")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--engine", choices=["numpy", "implicit"], default="numpy", help="of ALS; numpy is that of one machine")
    arguments = parser.parse_args()
    settings = load_settings()
    for name, read, days, times in (("MovieLens-100k", movielens, 28, 4), ("Deskdrop", deskdrop, 7, 1)):
        try:
            clicks = clicks_of(read(arguments.folder))
        except FileNotFoundError as error:
            print(f"{name} left out: {error}")
            continue
        for back in range(times):
            end = int(clicks.ts.max()) - back * days * DAY_MS
            predict(name, clicks[clicks.ts <= end], days, settings, arguments.engine)


def predict(name: str, clicks: pd.DataFrame, days: int, settings: Settings, engine: str) -> None:
    """Print how the last `days` of the clicks are ranked from those before."""
    day = day_key(int(clicks.ts.max()) - (days - 1) * DAY_MS)
    before = day_key(key_start_ms(day) - DAY_MS)
    with tempfile.TemporaryDirectory() as home:
        lake = Lake(home)
        write_tables(lake, clicks, before, settings)
        started = time.perf_counter()
        split = time_split(lake, before, day, settings, 24 * days)
        fitted = fit_holdout(lake, before, day, settings, None, engine)
        tuned = tune(validation_cases(lake, before, settings, None, engine), settings.ranking)
        found = compare(lake, day, split, fitted, tuned, settings)
        report(f"{name}, {days} days from {day}", split, found, time.perf_counter() - started)
        without = replace(tuned, ranking=tuned.ranking.model_copy(update=NO_FACTORS))
        rest = compare(lake, day, split, fitted, without, settings).metrics[SERVED]["ndcg@10"]
        print(f"  {'served without factor models':28}{rest:9.4f}")
        print(f"  tuned on {tuned.users} users at {tuned.moments} moments {tuned.note}")


if __name__ == "__main__":
    main()
