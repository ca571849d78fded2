"""The code location: every asset, check, job and schedule, and the resources of this installation."""

from __future__ import annotations

import dagster as dg

from recsys_assets import checks, features, ingestion, models, retrieval, serving
from recsys_assets.isolation import executor, isolated
from recsys_assets.resources import Platform
from recsys_core.settings import Settings, load_settings
from recsys_sensors.jobs import arrivals_job, hourly_job, nightly_job
from recsys_sensors.pruning import prune_job, prune_schedule
from recsys_sensors.schedules import schedules


def build_definitions(settings: Settings) -> dg.Definitions:
    """The code location for an installation."""
    rooms = [ingestion, features, models, retrieval, serving]
    return dg.Definitions(
        assets=isolated(dg.load_assets_from_modules(rooms, include_specs=True), settings),
        asset_checks=dg.load_asset_checks_from_modules([checks]),
        jobs=[arrivals_job, hourly_job, nightly_job, prune_job],
        schedules=[*schedules(settings.dagster.automation), prune_schedule(settings.dagster.automation)],
        resources={"platform": Platform(settings)},
        executor=executor(settings),
    )


@dg.definitions
def defs() -> dg.Definitions:
    return build_definitions(load_settings())
