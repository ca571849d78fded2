"""Late events: hours whose events landed after they had been made are made again, gapless stretches as one run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable

import dagster as dg

from recsys_assets.partitions import hourly
from recsys_assets.resources import Platform
from recsys_core.events import HOUR_MS, hour_keys, key_start_ms
from recsys_sensors.jobs import late_job
from recsys_sensors.runs import RANGE_END, RANGE_START, contiguous, is_active

CLICKS = dg.AssetKey("clicks_hourly")
MATERIALIZED = dg.DagsterEventType.ASSET_MATERIALIZATION
HOURS_AT_ONCE = 1000


def late_hours(context: dg.SensorEvaluationContext, platform: Platform) -> dg.SensorResult:
    """Hours of `clicks_hourly` that a file touches which landed after the run that made them had begun.

    The cursor holds when the landing zone was looked at last, and how often and when last (seconds since 1970) hours were
    asked for that were not made again since.
    """
    settings, looked = platform.settings.dagster, time.time()
    state = json.loads(context.cursor or "{}")
    since = state.get("since", looked - settings.catch_up_hours * HOUR_MS / 1000)
    asked: dict[str, list[float]] = state.get("asked", {})
    touched = {hour for hour in platform.landing.touched_hours(since) if hourly.has_partition_key(hour)}
    starts = _run_starts(context.instance, touched | set(asked))
    late = set(_landed_after(platform, {h: max(starts[h], since) for h in touched & set(starts)}))
    late |= {hour for hour, (_, when) in asked.items() if starts.get(hour, when) < when}
    asked = {hour: asked.get(hour, [0, 0.0]) for hour in sorted(late)}
    busy = is_active(context.instance, late_job.name)
    wanted = [] if busy else [hour for hour, (times, _) in asked.items() if times < settings.attempts]
    asked |= {hour: [asked[hour][0] + 1, looked] for hour in wanted}
    kept = json.dumps({"since": looked, "asked": asked})
    if not wanted:
        reason = "late hours are being made" if busy else "no event landed after its hour was made"
        return dg.SensorResult(skip_reason=reason, cursor=kept)
    order = hour_keys(key_start_ms(wanted[0]), key_start_ms(wanted[-1]) + HOUR_MS)
    requests = [
        dg.RunRequest(
            run_key=f"{first}-{last}-{looked:.3f}",
            job_name=late_job.name,
            partition_key=first if first == last else None,
            tags={} if first == last else {RANGE_START: first, RANGE_END: last},
        )
        for first, last in contiguous(wanted, order)
    ]
    return dg.SensorResult(requests, cursor=kept)


def _run_starts(instance: dg.DagsterInstance, hours: Iterable[str]) -> dict[str, float]:
    """When the run that made an hour last had begun (seconds since 1970); hours that were never made are left out."""
    wanted = sorted(hours)
    starts: dict[str, float] = {}
    begun: dict[str, float] = {}
    for at in range(0, len(wanted), HOURS_AT_ONCE):
        some = set(wanted[at : at + HOURS_AT_ONCE])
        ids = list(instance.get_latest_storage_id_by_partition(CLICKS, MATERIALIZED, some).values())
        filter_ = dg.AssetRecordsFilter(asset_key=CLICKS, storage_ids=ids)
        for record in instance.fetch_materializations(filter_, limit=HOURS_AT_ONCE).records if ids else ():
            run_id = record.run_id
            if run_id not in begun:
                run = instance.get_run_record_by_id(run_id)
                begun[run_id] = run.start_time if run and run.start_time else record.timestamp
            if record.partition_key is not None:
                starts[record.partition_key] = begun[run_id]
    return starts


def _landed_after(platform: Platform, moments: dict[str, float]) -> list[str]:
    """Hours that a file touches which landed after the moment given for each."""
    late = []
    for moment in sorted(set(moments.values())):
        after = platform.landing.touched_hours(moment)
        late += [hour for hour, of_hour in moments.items() if of_hour == moment and hour in after]
    return late
