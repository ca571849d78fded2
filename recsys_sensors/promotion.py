"""Another champion, by the night or by a person who rolls back: the caches are made again with it."""

from __future__ import annotations

import dagster as dg

from recsys_assets.resources import Platform
from recsys_core.bundle import TRENDING_ITEMS
from recsys_sensors.jobs import caches_job


def champion_promoted(context: dg.SensorEvaluationContext, platform: Platform) -> dg.SensorResult:
    """Follows the pointer file that serving follows, and asks for the caches of the last hour when it changes."""
    champion = platform.releases.champion()
    if champion is None:
        return dg.SensorResult(skip_reason="no release has been promoted yet")
    promoted = f"{champion.release_id} {champion.promoted_at}"
    if promoted == context.cursor:
        return dg.SensorResult(skip_reason=f"{champion.release_id} is still the champion", cursor=promoted)
    hour = platform.lake.latest(TRENDING_ITEMS)
    if hour is None:
        return dg.SensorResult(skip_reason="no hour was made yet")
    request = dg.RunRequest(run_key=promoted, job_name=caches_job.name, partition_key=hour)
    return dg.SensorResult([request], cursor=promoted)
