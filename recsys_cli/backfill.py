"""`recsys backfill`: a range of partitions of an asset from the terminal, recorded in the home's Dagster instance."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from rich.console import Console

from recsys_cli.console import showing_progress
from recsys_cli.java import ensure_java
from recsys_cli.processes import StackError, quiet, run_folder
from recsys_cli.stack import dagster_environment
from recsys_core.events import key_start_ms
from recsys_core.settings import HOME_VARIABLE, load_settings

if TYPE_CHECKING:
    import dagster as dg
    from dagster import DagsterInstance

PROCESS = "recsys/process"
"""Tag of a run with the machine and number of the process that it is in: `host:pid`."""


def run(home: Path, asset: str, first: str, last: str, console: Console) -> int:
    """Make partitions `first` to `last` of an asset: one run for tables, one run a partition for the others.

    Returns 1 when a run failed, else 0. Raises StackError for an unknown asset or partition.
    """
    import dagster as dg

    home = home.absolute()
    settings = load_settings(home)
    os.environ |= dagster_environment(home)
    os.environ[HOME_VARIABLE] = str(home)
    from recsys_assets.definitions import build_definitions
    from recsys_core.spark import stop_session

    definitions = build_definitions(settings)
    graph = definitions.resolve_asset_graph()
    key = dg.AssetKey(asset)
    if key not in graph.get_all_asset_keys() or graph.get(key).partitions_def is None:
        partitioned = sorted(k.to_user_string() for k in graph.get_all_asset_keys() if graph.get(k).partitions_def)
        raise StackError(f"no asset {asset!r} with partitions; there are {', '.join(partitioned)}")
    partitions = graph.get(key).partitions_def
    for wanted in (first, last):
        if partitions is None or not partitions.has_partition_key(wanted):
            raise StackError(f"{asset} has no partition {wanted!r}; [partitions] in recsys.toml says which there are")
    if key_start_ms(first) > key_start_ms(last):
        raise StackError(f"the first partition, {first}, is later than the last, {last}")
    keys = list(partitions.get_partition_keys_in_range(dg.PartitionKeyRange(first, last)))  # type: ignore[union-attr]
    os.environ["JAVA_HOME"] = str(ensure_java().path)
    policy = graph.get(key).backfill_policy
    single = policy is not None and policy.policy_type.value == "SINGLE_RUN" and len(keys) > 1
    # These have partitions of one kind, which a range of them is resolved by; the job of all assets has both.
    job = definitions.resolve_job_def("hourly" if isinstance(partitions, dg.HourlyPartitionsDefinition) else "nightly")
    pools = sorted(definitions.resolve_assets_def(key).node_def.pools)
    log = run_folder(home) / f"backfill-{asset}.log"
    failed = 0
    try:
        with quiet(log), showing_progress(console), dg.DagsterInstance.get() as instance:
            spans = [(first, last)] if single else [(one, one) for one in keys]
            for start, end in spans:
                for pool in pools:
                    tell_who_is_before(instance, pool, console)
                span = {"dagster/asset_partition_range_start": start, "dagster/asset_partition_range_end": end}
                done = job.execute_in_process(
                    instance=instance,
                    asset_selection=[key],
                    partition_key=None if start != end else start,
                    tags={PROCESS: f"{socket.gethostname()}:{os.getpid()}", **(span if start != end else {})},
                    raise_on_error=False,
                )
                failed += not done.success
                told = "made" if done.success else "FAILED"
                say(console, f"{asset} {start if start == end else f'{start} … {end}'}: {told}, run {done.run_id}")
                if not done.success:
                    for line in why_it_failed(done):
                        say(console, f"  {line}")
                    say(console, f"  the whole log: {log}")
    finally:
        stop_session()
    return 1 if failed else 0


def say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def why_it_failed(done: dg.ExecuteInProcessResult) -> list[str]:
    """The checks that failed with their reasons and what mends them, and the errors of steps."""
    checks = [e.asset_check_evaluation_data for e in done.all_events if e.event_type_value == "ASSET_CHECK_EVALUATION"]
    lines = []
    for check in checks:
        if not check.passed and check.severity.value == "ERROR":
            reason = check.metadata.get("reason") or check.metadata.get("faults") or check.metadata.get("first of them")
            lines.append(f"{check.check_name}: {reason.value if reason else 'see the web UI'}")
    if any(not check.passed and check.check_name == "window_is_sound" for check in checks):
        lines.append("mend these hours, or say that they are right: `recsys check clicks_hourly --accept`; then run this again")
    if any(not check.passed and check.check_name == "hours_are_all_there" for check in checks):
        lines.append("make them first: `recsys backfill clicks_hourly FIRST LAST`")
    for event in done.all_events:
        if event.is_step_failure and (error := event.step_failure_data.error) is not None and not lines:
            cause = error.cause or error
            lines.append(f"{event.step_key}: {cause.cls_name}: {cause.message.strip().splitlines()[-1]}")
    return lines


def tell_who_is_before(instance: DagsterInstance, pool: str, console: Console) -> None:
    """Say which runs hold the places of a pool that is full, and free those of runs that are over or whose process is gone."""
    storage = instance.event_log_storage
    if pool not in storage.get_concurrency_keys():
        return
    found = storage.get_concurrency_info(pool)
    if found.active_slot_count < found.slot_count:
        return
    for run_id in sorted(found.active_run_ids):
        run = instance.get_run_by_id(run_id)
        if run is not None and not run.is_finished and _is_gone(run.tags.get(PROCESS, "")):
            instance.report_run_failed(run, "its process is gone")
            run = None
        if run is None or run.is_finished:
            storage.free_concurrency_slots_for_run(run_id)
            console.print(f"run {run_id} was killed; its place in the pool {pool} is free again")
        else:
            console.print(
                f"waiting: run {run_id} ({run.job_name}) has the place in the pool {pool}; end it in the web UI if it hangs"
            )


def _is_gone(process: str) -> bool:
    """Whether a process of this machine, `host:pid`, has ended. Of other machines nobody here knows."""
    host, _, pid = process.rpartition(":")
    return host == socket.gethostname() and not psutil.pid_exists(int(pid))
