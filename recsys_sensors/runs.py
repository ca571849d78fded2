"""What sensors want to know of past runs: which partitions are there, which are being made, and what stopped a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import dagster as dg

PARTITION, RANGE_START, RANGE_END = (
    "dagster/partition",
    "dagster/asset_partition_range_start",
    "dagster/asset_partition_range_end",
)
ACTIVE = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def materialized(instance: dg.DagsterInstance, asset: str) -> set[str]:
    """The partitions of an asset that were made at least once."""
    return set(instance.get_materialized_partitions(dg.AssetKey(asset)))


def active_partitions(instance: dg.DagsterInstance, partitions: Iterable[str]) -> set[str]:
    """Those of `partitions` that a run is making now or waits to make."""
    wanted = set(partitions)
    if not wanted:
        return set()
    found = set()
    for record in instance.get_run_records(dg.RunsFilter(statuses=ACTIVE)):
        tags = record.dagster_run.tags
        if tags.get(PARTITION) in wanted:
            found.add(tags[PARTITION])
        if RANGE_START in tags and RANGE_END in tags:
            found |= {key for key in wanted if tags[RANGE_START] <= key <= tags[RANGE_END]}
    return found


def is_active(instance: dg.DagsterInstance, job: str) -> bool:
    """Whether a run of the job is under way or waits."""
    return bool(instance.get_run_records(dg.RunsFilter(job_name=job, statuses=ACTIVE), limit=1))


def last_failed(instance: dg.DagsterInstance, job: str, partition: str) -> dg.DagsterRun | None:
    """The last run of a job for a partition, when it failed."""
    last = instance.get_run_records(dg.RunsFilter(job_name=job, tags={PARTITION: partition}), limit=1)
    run = last[0].dagster_run if last else None
    return run if run and run.status == dg.DagsterRunStatus.FAILURE else None


def stopped_by(instance: dg.DagsterInstance, run_id: str) -> list[str]:
    """The blocking checks that failed in a run, as `asset: check`."""
    records = instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION).records
    evaluations = [
        record.event_log_entry.dagster_event.asset_check_evaluation_data
        for record in records
        if record.event_log_entry.dagster_event
    ]
    return [
        f"{e.asset_key.to_user_string()}: {e.check_name}"
        for e in evaluations
        if e.blocking and not e.passed and e.severity == dg.AssetCheckSeverity.ERROR
    ]


def remade_since(instance: dg.DagsterInstance, asset: str, run: dg.DagsterRun, until: str, limit: int = 500) -> bool:
    """Whether a partition of `asset` up to `until` was made after a run had begun."""
    began = instance.get_run_record_by_id(run.run_id)
    after = began.start_time if began and began.start_time else 0.0
    records = instance.fetch_materializations(
        dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), after_timestamp=after), limit=limit
    ).records
    return any((record.partition_key or "") <= until for record in records)


def contiguous(keys: Sequence[str], order: Sequence[str]) -> list[tuple[str, str]]:
    """First and last of each gapless stretch of `keys`, in the order of all keys that there are."""
    wanted, spans = set(keys), []
    begun: str | None = None
    last = ""
    for key in order:
        if key in wanted:
            begun, last = begun or key, key
        elif begun:
            spans.append((begun, last))
            begun = None
    return [*spans, (begun, last)] if begun else spans
