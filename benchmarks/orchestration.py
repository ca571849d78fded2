"""What two years of hourly partitions cost: loading the code location, sensor ticks, pages of the web UI.

    python benchmarks/orchestration.py [--hours 17520] [--pages]

Makes a home in a temporary folder whose Dagster instance (SQLite) has a materialization of every hour of `clicks_hourly`,
`trending_items` and `rec_cache`, then measures. `--pages` needs playwright and a Chromium.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests"), str(PROJECT / "docs")]

ASSETS = ("clicks_hourly", "trending_items", "rec_cache")
LOAD = "from recsys_assets.definitions import defs; defs().get_repository_def().load_all_definitions()"
EMPTY = "pass"
TICKS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=int, default=17_520)
    parser.add_argument("--pages", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        home.mkdir()
        prepare(home, options.hours)
        print(f"code location: {loading():.2f} s (best of 3, without the start of Python)")
        fill(options.hours)
        for name, seconds in ticks(home).items():
            print(f"{name}: {seconds * 1000:.0f} ms a tick")
        if options.pages:
            for name, seconds in pages(home, options.hours).items():
                print(f"{name}: {seconds:.1f} s until it is drawn")


def prepare(home: Path, hours: int) -> None:
    """An installation whose hourly partitions end now."""
    from recsys_cli.stack import dagster_environment
    from recsys_core.events import HOUR_MS, day_key, now_ms

    (home / "recsys.toml").write_text(f"[partitions]\nstart = {day_key(now_ms() - hours * HOUR_MS)}\n")
    os.environ |= {"RECSYS_HOME": str(home), **dagster_environment(home), "PYTHONWARNINGS": "ignore"}


def loading() -> float:
    def seconds(code: str) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT)
        return time.perf_counter() - started

    return min(seconds(LOAD) for _ in range(3)) - min(seconds(EMPTY) for _ in range(3))


def fill(hours: int) -> None:
    """A materialization of every hour that is over, stored as those of one run over all hours are."""
    import dagster as dg
    from dagster._core.events import DagsterEvent, DagsterEventBatchMetadata, StepMaterializationData

    from recsys_assets.partitions import hourly

    started = time.perf_counter()
    keys = hourly.get_partition_keys()[-hours:]
    with dg.DagsterInstance.get() as instance:
        for asset in ASSETS:
            run = instance.add_run(dg.DagsterRun(job_name="hourly", status=dg.DagsterRunStatus.SUCCESS))
            for key in keys:
                made = StepMaterializationData(dg.AssetMaterialization(asset, partition=key))
                event = DagsterEvent(
                    event_type_value=dg.DagsterEventType.ASSET_MATERIALIZATION.value,
                    job_name=run.job_name,
                    event_specific_data=made,
                )
                batch = DagsterEventBatchMetadata(run.run_id, is_end=key == keys[-1])
                instance.report_dagster_event(event, run.run_id, batch_metadata=batch)
    print(f"{len(keys) * len(ASSETS):,} materializations recorded in {time.perf_counter() - started:.0f} s")


def ticks(home: Path) -> dict[str, float]:
    """Median seconds of a tick of each sensor that reads partitions, after a first one."""
    import dagster as dg

    from recsys_assets.definitions import build_definitions
    from recsys_assets.resources import Platform
    from recsys_core.settings import load_settings
    from recsys_sensors.automation import AUTOMATED

    settings = load_settings(home)
    platform, definitions = Platform(settings), build_definitions(settings)
    repository = definitions.get_repository_def()
    found = {}
    with dg.DagsterInstance.get() as instance:
        for name in ("missed_hours", "missed_nights", "late_hours"):
            sensor, cursor = repository.get_sensor_def(name), None
            seconds = []
            for _ in range(TICKS + 1):
                with dg.build_sensor_context(
                    instance, cursor=cursor, repository_def=repository, resources={"platform": platform}
                ) as context:
                    started = time.perf_counter()
                    cursor = sensor.evaluate_tick(context).cursor
                    seconds.append(time.perf_counter() - started)
            found[name] = statistics.median(seconds[1:])
        state = None
        seconds = []
        for _ in range(TICKS + 1):
            started = time.perf_counter()
            state = dg.evaluate_automation_conditions(definitions, instance, asset_selection=AUTOMATED, cursor=state).cursor
            seconds.append(time.perf_counter() - started)
        found["automation"] = statistics.median(seconds[1:])
    return found


def pages(home: Path, hours: int) -> dict[str, float]:
    """Seconds until pages of the web UI show what they are about; the median of three."""
    from browser import open_page
    from make_images import web_ui

    found: dict[str, list[float]] = {}
    with web_ui(home) as url, open_page(1600, 1200, 120) as page:

        def drawn(name: str, path: str, shown: Callable[[], object]) -> None:
            started = time.perf_counter()
            page.goto(url + path, wait_until="domcontentloaded")
            shown()
            found.setdefault(name, []).append(time.perf_counter() - started)

        page.goto(url, wait_until="domcontentloaded")
        for _ in range(3):
            drawn("lineage", "/asset-groups", lambda: page.get_by_text("features").first.wait_for())
            drawn(
                "partitions of clicks_hourly",
                "/assets/clicks_hourly?view=partitions",
                lambda: page.get_by_text("Materialized (").first.wait_for(),
            )
            drawn("automation", "/automation", lambda: page.get_by_text("hourly_schedule").first.wait_for())
    assert hours
    return {name: statistics.median(seconds) for name, seconds in found.items()}


if __name__ == "__main__":
    main()
