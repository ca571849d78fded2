"""Carries a small clickstream through the whole graph twice, as the demo does: when it is one day old, and on its third day.

python line.py HOME, with the variables of tests/recsys_assets/test_graph.py. A process of its own, because the partitions are
read from the settings when the graph is imported.
"""

from __future__ import annotations

import sys
from pathlib import Path

import dagster as dg
from rich.console import Console

from recsys_assets.definitions import build_definitions
from recsys_cli.demo import Steps, materialize_line
from recsys_core.events import hour_key, key_start_ms
from recsys_core.lake import Lake
from recsys_core.landing import Landing
from recsys_core.settings import load_settings
from recsys_core.simulate import SOURCE, Simulation, SimulationConfig

FIRST_DAY, LAST_DAY = "2026-01-01", "2026-01-03"
HOURS_AGAIN = 2


def main(home: Path) -> None:
    settings = load_settings(home)
    lake = Lake(settings.lake_uri, settings.lake.keep_versions)
    made = Simulation(SimulationConfig(users=200, items=120, days=3, events=8000, end=key_start_ms("2026-01-04")))
    made.write_catalog(lake)
    batches = list(made.batches())
    steps = Steps(Console())
    for day, arrived in ((FIRST_DAY, batches[:24]), (LAST_DAY, batches[24:])):
        for batch in arrived:
            Landing(lake).write_events(SOURCE, hour_key(batch.arrival_ms), batch.events)
        materialize_line(home, day, steps)
    with dg.DagsterInstance.get() as instance:
        hourly = build_definitions(settings).resolve_job_def("hourly")
        for _ in range(HOURS_AGAIN):
            hourly.execute_in_process(
                instance=instance, asset_selection=[dg.AssetKey("clicks_hourly")], partition_key=f"{LAST_DAY}T12"
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
