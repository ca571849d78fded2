"""Trimming by policy: files, partitions and releases, and the runs in Dagster's own store that made nothing which is kept."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import dagster as dg

from recsys_assets.resources import Platform, PlatformResource
from recsys_core.events import now_ms
from recsys_core.registry import RegistryError
from recsys_core.retention import data_end, is_kept, plan, prune_mlflow, remove, totals
from recsys_core.settings import RetentionSettings

PAGE = 500
FINISHED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
WEEKDAY_AND_TIME = "40 3 * * 0"


def spent_runs(instance: dg.DagsterInstance, policy: RetentionSettings, clock: datetime, end_ms: int) -> list[str]:
    """Ids of ended runs older than the policy's `run_days` that hold no materialization of a partition which is kept.

    With a run go its events: one that made a kept partition stays, or Dagster would take the partition for missing.
    """
    if not policy.run_days:
        return []
    before = clock - timedelta(days=policy.run_days)
    return [run.run_id for run in _ended(instance, before) if not _made_what_is_kept(instance, run.run_id, policy, end_ms)]


def _ended(instance: dg.DagsterInstance, before: datetime) -> Iterator[dg.DagsterRun]:
    cursor = None
    while True:
        page = instance.get_runs(dg.RunsFilter(statuses=FINISHED, created_before=before), cursor=cursor, limit=PAGE)
        yield from page
        if len(page) < PAGE:
            return
        cursor = page[-1].run_id


def _made_what_is_kept(instance: dg.DagsterInstance, run_id: str, policy: RetentionSettings, end_ms: int) -> bool:
    cursor = None
    while True:
        page = instance.get_records_for_run(run_id, cursor, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION, limit=PAGE)
        if any(r.partition_key is None or is_kept(r.partition_key, policy, end_ms) for r in page.records):
            return True
        if not page.has_more:
            return False
        cursor = page.cursor


def prune_runs(platform: Platform, instance: dg.DagsterInstance) -> int:
    """Delete the spent runs. Returns their number."""
    end_ms = data_end(platform.landing, now_ms())
    spent = spent_runs(instance, platform.settings.retention, datetime.now(UTC), end_ms)
    for run_id in spent:
        instance.delete_run(run_id)
    return len(spent)


@dg.op
def prune_by_policy(context: dg.OpExecutionContext, platform: PlatformResource) -> None:
    """Remove what [retention] lets go, and say how much."""
    end_ms = data_end(platform.landing, now_ms())
    planned = plan(platform.landing, platform.releases, platform.settings, now_ms())
    removals = remove(platform.landing, platform.releases, planned)
    runs = prune_runs(platform, context.instance)
    recorded: dict[str, int | str]
    try:
        recorded = dict(prune_mlflow(platform.registry, platform.releases, platform.settings, end_ms))
    except RegistryError as error:
        recorded = {"MLflow trouble": str(error)}
    removed = {f"{kind}, count": count for kind, (count, _) in totals(removals).items()}
    removed |= {f"{kind}, bytes": size for kind, (_, size) in totals(removals).items()}
    context.add_output_metadata({**removed, "runs of Dagster": runs, **recorded})


@dg.job(description="Trim files, partitions, releases and Dagster's runs by [retention].")
def prune_job() -> None:
    prune_by_policy()


def prune_schedule(running: bool) -> dg.ScheduleDefinition:
    """Once a week, at a quiet hour."""
    status = dg.DefaultScheduleStatus.RUNNING if running else dg.DefaultScheduleStatus.STOPPED
    return dg.ScheduleDefinition(job=prune_job, cron_schedule=WEEKDAY_AND_TIME, default_status=status)
