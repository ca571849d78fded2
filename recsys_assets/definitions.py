"""The code location: every asset, check, job, schedule and sensor, and the resources of this installation."""

from __future__ import annotations

import dagster as dg

from recsys_assets import checks, feature_checks, features, gate, ingestion, models, retrieval, serving, stream_checks
from recsys_assets.isolation import executor, isolated
from recsys_assets.resources import Platform
from recsys_core.settings import Settings, load_settings
from recsys_sensors.automation import automated
from recsys_sensors.compaction import compact_job, compact_schedule
from recsys_sensors.freshness import with_deadline
from recsys_sensors.jobs import JOBS
from recsys_sensors.pruning import prune_job, prune_schedule
from recsys_sensors.schedules import schedules
from recsys_sensors.sensors import sensors


def build_definitions(settings: Settings) -> dg.Definitions:
    """The code location for an installation."""
    running = settings.dagster.automation
    rooms = [ingestion, features, models, retrieval, serving]
    loaded = [
        a for a in dg.load_assets_from_modules(rooms, include_specs=True) if isinstance(a, dg.AssetsDefinition | dg.AssetSpec)
    ]
    assets = dg.map_asset_specs(lambda spec: automated(with_deadline(spec)), loaded)
    keys = [key for asset in assets if isinstance(asset, dg.AssetsDefinition) for key in asset.keys]
    judged = [
        *checks.asset_checks(keys),
        *dg.load_asset_checks_from_modules([checks, feature_checks, gate, stream_checks]),
    ]
    placed = isolated([*assets, *judged], settings)
    return dg.Definitions(
        assets=[a for a in placed if not isinstance(a, dg.AssetChecksDefinition)],
        asset_checks=[a for a in placed if isinstance(a, dg.AssetChecksDefinition)],
        jobs=[*JOBS, compact_job, prune_job],
        schedules=[*schedules(running), compact_schedule(running), prune_schedule(running)],
        sensors=sensors(running),
        resources={"platform": Platform(settings)},
        executor=executor(settings),
    )


@dg.definitions
def defs() -> dg.Definitions:
    return build_definitions(load_settings())
