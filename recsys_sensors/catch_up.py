"""What was missed is made without a person: hours after an outage or a crash, and nights, with limits.

Each sensor asks for what is due, not there and not under way, oldest first, a few at a time. It remembers in its cursor
how often it asked for a partition and when, doubles the pause each time, and gives up after `[dagster] attempts`.
"""

from __future__ import annotations

import json

import dagster as dg

from recsys_assets.partitions import daily, hourly
from recsys_assets.resources import Platform
from recsys_core.events import DAY_MS, HOUR_MS, MINUTE_MS, day_key, hour_key, hour_keys, key_start_ms
from recsys_sensors.jobs import hourly_job, nightly_job
from recsys_sensors.runs import active_partitions, last_failed, materialized, remade_since, stopped_by
from recsys_sensors.schedules import HOUR_OF_NIGHT, MINUTE_OF_HOUR, MINUTE_OF_NIGHT

GRACE_MS = 15 * MINUTE_MS
"""The schedule goes first."""
HOUR_ASSETS = ("clicks_hourly", "trending_items", "rec_cache")
NIGHT_ASSETS = ("release", "online_features")
FIRST_PAUSE_MINUTES = 10


class Attempts:
    """How often a partition was asked for, and when; kept in a sensor's cursor."""

    def __init__(self, cursor: str | None) -> None:
        self._of: dict[str, tuple[int, int]] = {key: (n, at) for key, (n, at) in json.loads(cursor or "{}").items()}

    def may(self, key: str, now: int, most: int) -> bool:
        """Whether one more attempt is left, and the pause since the last is over."""
        count, at = self._of.get(key, (0, 0))
        return count < most and (not count or now - at >= FIRST_PAUSE_MINUTES * MINUTE_MS * 2 ** (count - 1))

    def count(self, key: str, now: int) -> int:
        """Note an attempt; returns how many there were."""
        count = self._of.get(key, (0, 0))[0] + 1
        self._of[key] = (count, now)
        return count

    def cursor(self, keep_from: str) -> str:
        """What is kept: keys from `keep_from` on."""
        return json.dumps({key: value for key, value in sorted(self._of.items()) if key >= keep_from})


def missed_hours(context: dg.SensorEvaluationContext, platform: Platform) -> dg.SensorResult:
    """Hours that are due and lack `clicks_hourly`, `trending_items` or `rec_cache`, each from its first that was ever made."""
    settings, now = platform.settings.dagster, platform.now_ms()
    there = {asset: materialized(context.instance, asset) for asset in HOUR_ASSETS}
    first = {asset: min(made) for asset, made in there.items() if made}
    if "clicks_hourly" not in first:
        return dg.SensorResult(skip_reason="no hour was made yet: materialize `clicks_hourly` for the history first")
    start = max(now - settings.catch_up_hours * HOUR_MS, key_start_ms(first["clicks_hourly"]))
    last_due = now - HOUR_MS - MINUTE_OF_HOUR * MINUTE_MS - GRACE_MS
    due = [hour for hour in hour_keys(start, last_due + 1) if hourly.has_partition_key(hour)]
    lacking = {hour: [a for a in first if hour >= first[a] and hour not in there[a]] for hour in due}
    attempts = Attempts(context.cursor)
    wanted = [hour for hour in due if lacking[hour] and attempts.may(hour, now, settings.attempts)]
    active = active_partitions(context.instance, wanted)
    wanted = [hour for hour in wanted if hour not in active][: settings.hours_per_tick]
    requests = [
        dg.RunRequest(
            run_key=f"{hour}-{attempts.count(hour, now)}",
            job_name=hourly_job.name,
            partition_key=hour,
            asset_selection=[dg.AssetKey(asset) for asset in _with_followers(lacking[hour], hour, first)],
        )
        for hour in wanted
    ]
    reason = None if requests else "every due hour is there, under way, or was tried"
    return dg.SensorResult(requests, reason, cursor=attempts.cursor(hour_key(start)))


def _with_followers(lacking: list[str], hour: str, first: dict[str, str]) -> list[str]:
    """What is made again is followed by what is made from it, where the history has that."""
    followers = HOUR_ASSETS[HOUR_ASSETS.index(lacking[0]) :]
    return [asset for asset in followers if asset in first and hour >= first[asset]]


def missed_nights(context: dg.SensorEvaluationContext, platform: Platform) -> dg.SensorResult:
    """The last day, when its night is over due and brought no release.

    A night that a blocking check stopped would be stopped again: it is asked for once hours up to its day were made again.
    """
    settings, now = platform.settings.dagster, platform.now_ms()
    due_after = HOUR_OF_NIGHT * HOUR_MS + MINUTE_OF_NIGHT * MINUTE_MS + GRACE_MS
    day = day_key(now - DAY_MS - due_after)
    attempts = Attempts(context.cursor)
    keep = day_key(key_start_ms(day) - 7 * DAY_MS)
    clicks = materialized(context.instance, "clicks_hourly")
    if not clicks or day < min(clicks)[:10] or not daily.has_partition_key(day):
        return dg.SensorResult(skip_reason=f"{day} is not part of the history", cursor=attempts.cursor(keep))
    if all(day in materialized(context.instance, asset) for asset in NIGHT_ASSETS):
        return dg.SensorResult(skip_reason=f"the night of {day} is done", cursor=attempts.cursor(keep))
    if active_partitions(context.instance, [day]) or not attempts.may(day, now, settings.attempts):
        return dg.SensorResult(skip_reason=f"the night of {day} is under way, or was tried", cursor=attempts.cursor(keep))
    failed = last_failed(context.instance, nightly_job.name, day)
    checks = stopped_by(context.instance, failed.run_id) if failed else []
    if failed and checks and not remade_since(context.instance, "clicks_hourly", failed, f"{day}T23"):
        reason = f"the night of {day} was stopped by {', '.join(checks)}, and no hour was made again since"
        return dg.SensorResult(skip_reason=reason, cursor=attempts.cursor(keep))
    request = dg.RunRequest(run_key=f"{day}-{attempts.count(day, now)}", job_name=nightly_job.name, partition_key=day)
    return dg.SensorResult([request], cursor=attempts.cursor(keep))
