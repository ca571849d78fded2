"""A night or an hour of the graph by the job that its schedule starts, as one run, recorded in the home's Dagster.

    python night_and_hour.py history 2026-01-03       the hours of what has landed, and the night of that day
    python night_and_hour.py nightly 2026-01-03
    python night_and_hour.py hourly 2026-01-03T12

The settings are those that the process finds. A process of its own, because the partitions are read when the graph is imported.
"""

from __future__ import annotations

import sys

import dagster as dg

from recsys_assets.definitions import build_definitions
from recsys_assets.resources import Platform
from recsys_core.events import hour_key
from recsys_core.landing import Landing
from recsys_core.settings import load_settings
from recsys_core.spark import stop_session
from recsys_sensors.runs import RANGE_END, RANGE_START


def main(what: str, key: str) -> None:
    settings = load_settings()
    definitions = build_definitions(settings)
    with dg.DagsterInstance.get() as instance:

        def run(job: str, first: str, last: str, assets: list[str] | None = None) -> None:
            """Make partitions, by all of a job's assets or by some."""
            span = {RANGE_START: first, RANGE_END: last}
            definitions.resolve_job_def(job).execute_in_process(
                instance=instance,
                asset_selection=assets and [dg.AssetKey(name) for name in assets],
                partition_key=first if first == last else None,
                tags={} if first == last else span,
            )

        if what == "history":
            begin, end = Landing(Platform(settings).lake).extent() or (0, 0)
            definitions.resolve_job_def("arrivals").execute_in_process(instance=instance)
            run("hourly", hour_key(begin), hour_key(end), ["clicks_hourly"])
        job = "hourly" if what == "hourly" else "nightly"
        run(job, key, key)
    stop_session()


if __name__ == "__main__":
    main(*sys.argv[1:])
