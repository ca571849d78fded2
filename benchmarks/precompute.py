"""Users a second of the hourly precompute, Redis included, by the number of processes that share the shards.

    python benchmarks/precompute.py [--users 60000] [--items 40000] [--steps 1 2] [--rounds 3] [--two-tower]

A made-up release (64 factors, lengths log-normal as after ALS) and a record for every user lie in a lake and a Redis of
their own. The processes do what the steps of `rec_cache` do: load the release, read the plan, write their shards. The rate
counts the time in which at least one of them wrote, not their start. At last one process does it again and says on what its
own processor time is spent.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from recsys_assets.resources import Platform
from recsys_cli.stack import redis_server
from recsys_core import precompute
from recsys_core.bundle import TRENDING_ITEMS
from recsys_core.events import HOUR_MS, hour_key, now_ms
from recsys_core.features import OnlineFeatures
from recsys_core.online import AnswerEncoder, UserRecord, write_records
from recsys_core.popularity import TRENDS_SCHEMA
from recsys_core.ranking import Snapshot, Trend
from recsys_core.settings import Settings, load_settings
from recsys_core.tables import ACTIVE_USERS

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))
from snapshots import make_manifest, make_snapshot, with_two_tower  # noqa: E402

PARTS = ("read_each_record", "users_of", "rank", "write_answers")
SEEN = 50


def settings_of(home: Path, url: str, steps: int = 1) -> Settings:
    return load_settings(home=home, redis={"url": url}, cache={"parallel_steps": steps, "shards": 8})


def fill(platform: Platform, hour: str, snapshot: Snapshot, users: int) -> None:
    """The release as champion, a trend, active users `user-<i>` and a record for each; popular items are had more often."""
    platform.releases.fs.makedirs(platform.releases.root, exist_ok=True)
    platform.releases.write(make_manifest(snapshot), snapshot)
    platform.releases.promote(snapshot.release_id)
    random = np.random.default_rng(1)
    ids, (items, rank) = snapshot.item_ids, snapshot.als_items.shape
    scores = [9.0 / (1 + i) for i in range(min(500, items))]
    trends = [{"item_id": ids[i], "score": score, "events": 9, "scores": [score] * 3} for i, score in enumerate(scores)]
    platform.lake.write(TRENDING_ITEMS, hour, pa.Table.from_pylist(trends, schema=TRENDS_SCHEMA))
    names = [f"user-{i:09}" for i in range(users)]
    platform.lake.write(ACTIVE_USERS, hour, pa.table({"user_id": names}))
    now = now_ms()
    hours, days = tuple((3 * i, 2) for i in range(1, 8)), tuple((i, 3) for i in range(1, 20))
    features = OnlineFeatures(now, 90, now - 60_000, hours, days, "sports", "phone", "de")
    with platform.redis() as redis:
        for at in range(0, users, 5000):
            had = (items * random.random((5000, SEEN)) ** 3).astype(int)
            factors = snapshot.als_items[had[:, 0]] + 0.1 * random.normal(size=(5000, rank)).astype(np.float32)
            records = (
                (name, UserRecord(
                    tuple((ids[i], "view", now - 60_000 * n) for n, i in enumerate(row[:5], start=1)),
                    now - 60_000, tuple(ids[i] for i in row), snapshot.als_version, factor, features,
                ))
                for name, row, factor in zip(names[at : at + 5000], had, factors, strict=False)
            )  # fmt: skip
            write_records(redis, records, 86_400)


def work(home: Path, url: str, hour: str, step: int, of: int) -> None:
    """What the op `rec_cache_shards` does."""
    platform = Platform(settings_of(home, url, of))
    plan = precompute.read_plan(platform.lake)
    assert plan is not None
    snapshot = platform.snapshot(plan.release_id, plan.manifest_sha256)
    trend = Trend.of(snapshot, precompute.read_trend(platform.lake, hour).scores)
    with platform.redis() as redis:
        for _ in precompute.write_shards(redis, platform.lake, plan, step, snapshot, trend, platform.settings):
            pass


def measure(home: Path, url: str, hour: str, steps: int, server: psutil.Process) -> tuple[float, float, float]:
    """Users a second, and wall time and Redis's processor time in µs a user."""
    platform = Platform(settings_of(home, url, steps))
    champion = platform.releases.champion()
    assert champion is not None
    plan = precompute.plan_caches(platform.lake, hour, champion, platform.settings, "benchmark")
    before = sum(server.cpu_times()[:2])
    started = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(home, url, hour, step, steps)) for step in range(plan.steps)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    wall = time.perf_counter() - started
    report = precompute.finish_caches(platform.lake, plan)
    spent = sum(server.cpu_times()[:2]) - before
    return report.users_per_second, wall * 1e6 / report.users, spent * 1e6 / report.users


def parts(home: Path, url: str, hour: str, users: int) -> dict[str, float]:
    """Processor time of this process, all its threads, in µs a user.

    Answers are written by a thread of its own: its time is told apart, and is in what goes on beside it too.
    """
    spent: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        clock = time.thread_time if name == "write_answers" else time.process_time

        def call(*arguments: Any, **named: Any) -> Any:
            before = clock()
            try:
                return function(*arguments, **named)
            finally:
                spent[name] = spent.get(name, 0.0) + clock() - before

        return call

    for name in PARTS:
        setattr(precompute, name, timed(name, getattr(precompute, name)))
    AnswerEncoder.encode = timed("encode", AnswerEncoder.encode)  # type: ignore[method-assign]
    platform = Platform(settings_of(home, url))
    champion = platform.releases.champion()
    assert champion is not None
    precompute.plan_caches(platform.lake, hour, champion, platform.settings, "benchmark")
    before = time.process_time()
    work(home, url, hour, 0, 1)
    spent["all, with loading the release"] = time.process_time() - before
    return {name: seconds * 1e6 / users for name, seconds in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=60_000)
    parser.add_argument("--items", type=int, default=40_000)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--two-tower", action="store_true")
    options = parser.parse_args()
    console = Console()
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(redis_server(home))
        hour = hour_key(now_ms() - HOUR_MS)
        platform = Platform(settings_of(home, url))
        with console.status("making a release and users"):
            snapshot = make_snapshot(items=options.items, rank=64, length_spread=1.0)
            snapshot = with_two_tower(snapshot) if options.two_tower else snapshot
            fill(platform, hour, snapshot, options.users)
        with platform.redis() as redis:
            server = psutil.Process(redis.info("server")["process_id"])
        shown = Table("processes", "users/s, median", "lowest", "highest", "wall µs a user, with start", "Redis µs a user")
        found: dict[int, list[tuple[float, float, float]]] = {steps: [] for steps in options.steps}
        for _ in range(options.rounds):
            for steps in options.steps:
                found[steps].append(measure(home, url, hour, steps, server))
        for steps, runs in found.items():
            rates, walls, redis_ = zip(*runs, strict=True)
            row = (statistics.median(rates), min(rates), max(rates), statistics.median(walls), statistics.median(redis_))
            shown.add_row(str(steps), *(f"{value:,.0f}" for value in row))
        console.print(shown)
        shown = Table("processor time of one process", "µs a user")
        for name, value in parts(home, url, hour, options.users).items():
            shown.add_row(name, f"{value:.1f}")
        console.print(shown)


if __name__ == "__main__":
    main()
