"""The archive of the topic, joined to few files once a day."""

import dagster as dg

from recsys_assets.resources import PlatformResource
from recsys_core.compaction import compact
from recsys_core.events import now_ms

TIME = "10 3 * * *"


@dg.op
def join_archive_files(context: dg.OpExecutionContext, platform: PlatformResource) -> None:
    """Join the archive files of the days that are over, and say how many became how few."""
    done = compact(platform.landing, now_ms())
    context.add_output_metadata(
        {"small files that were joined": done.small, "large files": done.large, "files that went": done.gone}
    )


@dg.job(description="Join the archive files of the days that are over.")
def compact_job() -> None:
    join_archive_files()


def compact_schedule(running: bool) -> dg.ScheduleDefinition:
    """Once a day, at a quiet hour."""
    status = dg.DefaultScheduleStatus.RUNNING if running else dg.DefaultScheduleStatus.STOPPED
    return dg.ScheduleDefinition(job=compact_job, cron_schedule=TIME, default_status=status)
