"""Late events: hours whose events landed after they had been made are made again, gapless stretches as one run."""

from __future__ import annotations

import json
import time

import dagster as dg

from recsys_assets.partitions import hourly
from recsys_assets.resources import Platform
from recsys_core.events import HOUR_MS, hour_keys, key_start_ms
from recsys_core.landing import was_read
from recsys_core.tables import CLICKS_HOURLY
from recsys_sensors.jobs import late_job
from recsys_sensors.runs import RANGE_END, RANGE_START, contiguous, is_active


def late_hours(context: dg.SensorEvaluationContext, platform: Platform) -> dg.SensorResult:
    """Hours of `clicks_hourly` that were made without a file of the landing zone which holds events of them.

    The cursor holds when the landing zone was looked at last, and how often and when last (seconds since 1970) hours were
    asked for that were not made again since.
    """
    settings, looked = platform.settings.dagster, time.time()
    state = json.loads(context.cursor or "{}")
    since = state.get("since", looked - settings.catch_up_hours * HOUR_MS / 1000)
    asked: dict[str, list[float]] = state.get("asked", {})
    arrivals = platform.landing.arrivals(since)
    platform.landing.note_arrivals()
    touched = {hour for arrival in arrivals for hour in arrival.hours if hourly.has_partition_key(hour)}
    made = platform.lake.find_all(CLICKS_HOURLY, sorted(touched | set(asked)))
    late = {h for a in arrivals for h in a.hours if h in touched and h in made and not was_read(made[h], a, since)}
    late |= {hour for hour, (_, when) in asked.items() if hour in made and made[hour].written_at < when}
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
