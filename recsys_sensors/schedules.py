"""When the jobs run: a few minutes after each hour, and every night."""

from __future__ import annotations

from collections.abc import Sequence

import dagster as dg

from recsys_sensors.jobs import arrivals_job, hourly_job, nightly_job

MINUTE_OF_HOUR = 5
HOUR_OF_NIGHT = 1
MINUTE_OF_NIGHT = 2 * MINUTE_OF_HOUR


def schedules(running: bool) -> Sequence[dg.ScheduleDefinition | dg.UnresolvedPartitionedAssetScheduleDefinition]:
    """The schedules, started by themselves when `running` ([dagster] automation)."""
    status = dg.DefaultScheduleStatus.RUNNING if running else dg.DefaultScheduleStatus.STOPPED
    return [
        dg.ScheduleDefinition(job=arrivals_job, cron_schedule="1 * * * *", default_status=status),
        dg.build_schedule_from_partitioned_job(hourly_job, minute_of_hour=MINUTE_OF_HOUR, default_status=status),
        dg.build_schedule_from_partitioned_job(
            nightly_job, hour_of_day=HOUR_OF_NIGHT, minute_of_hour=MINUTE_OF_NIGHT, default_status=status
        ),
    ]
