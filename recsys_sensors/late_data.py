"""Late events: hours whose events landed after they had been made are made again, gapless stretches as one run."""

from __future__ import annotations

import json
import time

import dagster as dg

from recsys_assets.partitions import hourly
from recsys_assets.resources import Platform
from recsys_core.events import HOUR_MS, hour_keys, key_start_ms
from recsys_core.landing import LOOKED, WITHOUT
from recsys_core.tables import CLICKS_HOURLY
from recsys_sensors.jobs import late_job
from recsys_sensors.runs import RANGE_END, RANGE_START, contiguous, is_active

FRESH_SECONDS = 86_400
"""The hours that a younger note of a damaged file names may not be made yet."""


def late_hours(context: dg.SensorEvaluationContext, platform: Platform) -> dg.SensorResult:
    """Hours of `clicks_hourly` that were made without a file of the landing zone which holds events of them.

    The cursor holds the commit of the ledger up to which was looked, and how often and when last (seconds since 1970) hours
    were asked for that were not made again since.
    """
    settings, asked_at = platform.settings.dagster, time.time()
    state = json.loads(context.cursor or "{}")
    asked: dict[str, list[float]] = state.get("asked", {})
    looked = platform.landing.ledger.version()
    since = state.get("since", 0)
    # A ledger that has not come so far is another one: the lake was begun anew.
    news = platform.landing.news(since if since <= looked else 0)
    damages = platform.landing.noted()
    touched = {hour for hour in news if hourly.has_partition_key(hour)} | {h for damage in damages for h in damage.hours}
    made = platform.lake.find_all(CLICKS_HOURLY, sorted(touched | set(asked)))
    late = {hour for hour in made if hour in news and made[hour].extra.get(LOOKED, 0) < news[hour]}
    late |= {hour for hour, (_, when) in asked.items() if hour in made and made[hour].written_at < when}
    for damage in damages:
        left_out = {hour for hour in damage.hours if hour in made and damage.path in made[hour].extra.get(WITHOUT, ())}
        if damage.reason:
            continue
        late |= left_out
        if not left_out and damage.note.written_at < asked_at - FRESH_SECONDS:
            platform.lake.remove(damage.note)
    asked = {hour: asked.get(hour, [0, 0.0]) for hour in sorted(late)}
    busy = is_active(context.instance, late_job.name)
    wanted = [] if busy else [hour for hour, (times, _) in asked.items() if times < settings.attempts]
    asked |= {hour: [asked[hour][0] + 1, asked_at] for hour in wanted}
    kept = json.dumps({"since": looked, "asked": asked})
    if not wanted:
        reason = "late hours are being made" if busy else "no event landed after its hour was made"
        return dg.SensorResult(skip_reason=reason, cursor=kept)
    order = hour_keys(key_start_ms(wanted[0]), key_start_ms(wanted[-1]) + HOUR_MS)
    requests = [
        dg.RunRequest(
            run_key=f"{first}-{last}-{asked_at:.3f}",
            job_name=late_job.name,
            partition_key=first if first == last else None,
            tags={} if first == last else {RANGE_START: first, RANGE_END: last},
        )
        for first, last in contiguous(wanted, order)
    ]
    return dg.SensorResult(requests, cursor=kept)
