"""What is told to people: failed runs, failed checks, overdue assets and a silent stream, each once.

The cursor holds up to where the event log was read and the ids of what was told last. It moves on only over what every
channel took: what could not be delivered waits for the next tick, what was delivered is not told again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import dagster as dg
from dagster._core.definitions.freshness import FreshnessState

from recsys_assets.resources import Platform
from recsys_core.alerts import Alert, Channel, NotDelivered, channels
from recsys_sensors.runs import PARTITION, RANGE_END, RANGE_START, stopped_by
from recsys_sensors.stream_health import stream_alerts

REMEMBERED = 1000
"""Ids of alerts that are kept."""
RUNS_A_TICK = 100
EVALUATIONS_A_TICK = 50


@dataclass
class Told:
    """What the cursor holds: where the logs were read up to, and `channel id` of what was delivered."""

    runs: str | None = None
    checks: int = -1
    standing: list[str] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, cursor: str | None) -> Told:
        return cls(**json.loads(cursor)) if cursor else cls()

    def cursor(self) -> str:
        return json.dumps({**self.__dict__, "sent": self.sent[-REMEMBERED:]})


def alerts(context: dg.SensorEvaluationContext, platform: Platform) -> dg.SensorResult:
    """Tells what went wrong since the last tick. The first tick only notes where the logs end."""
    first = context.cursor is None
    told = Told.of(context.cursor)
    after = Told(told.runs, told.checks, told.standing, list(told.sent))
    found = [*_failed_runs(context, after), *_failed_checks(context, after)]
    if first:
        return dg.SensorResult(skip_reason="alerts start from here", cursor=after.cursor())
    now_standing = list(stream_alerts(platform)) + list(_overdue(context))
    after.standing = [alert.id for alert in now_standing]
    found += [alert for alert in now_standing if alert.id not in told.standing]
    for id_ in told.standing:
        if id_ not in after.standing:
            found.append(Alert(f"{id_} over {len(told.sent)}", f"Right again: {id_}"))
    used = list(channels(platform.settings.alerts))
    try:
        delivered = _deliver(context, used, found, after)
    except NotDelivered as problem:
        waiting = Told(told.runs, told.checks, told.standing, after.sent)
        return dg.SensorResult(skip_reason=f"alerts wait for the next tick: {problem}", cursor=waiting.cursor())
    reason = f"{delivered} alerts told" if delivered else "nothing to tell"
    return dg.SensorResult(skip_reason=reason, cursor=after.cursor())


def _deliver(context: dg.SensorEvaluationContext, used: list[Channel], found: Iterable[Alert], told: Told) -> int:
    """Send what was not sent yet; `told.sent` grows with each delivery. Raises NotDelivered."""
    delivered = 0
    for alert in found:
        fresh = [channel for channel in used if f"{channel.name} {alert.id}" not in told.sent]
        for channel in fresh:
            channel.send(alert)
            told.sent.append(f"{channel.name} {alert.id}")
        if fresh or not used:
            context.log.warning(alert.text)
            delivered += 1
    return delivered


def _failed_runs(context: dg.SensorEvaluationContext, told: Told) -> Iterator[Alert]:
    """Runs that failed for another reason than a check (that is told by itself) and will not be retried."""
    if told.runs is None:
        last = context.instance.fetch_run_status_changes(dg.DagsterEventType.RUN_FAILURE, limit=1)
        told.runs = last.cursor
        return
    found = context.instance.fetch_run_status_changes(
        dg.DagsterEventType.RUN_FAILURE, limit=RUNS_A_TICK, cursor=told.runs, ascending=True
    )
    told.runs = found.cursor or told.runs
    for record in found.records:
        run = context.instance.get_run_by_id(record.run_id)
        if run is None or run.tags.get("dagster/will_retry") == "true" or stopped_by(context.instance, run.run_id):
            continue
        where = run.tags.get(PARTITION) or " … ".join(filter(None, (run.tags.get(RANGE_START), run.tags.get(RANGE_END))))
        event = record.event_log_entry.dagster_event
        reason = (event.message if event else "") or "the run's process ended"
        yield Alert(f"run {run.run_id}", f"Run of {run.job_name} {where} failed", f"{reason}\nrun {run.run_id}")


def _failed_checks(context: dg.SensorEvaluationContext, told: Told) -> Iterator[Alert]:
    """Evaluations with severity ERROR that failed; the same failure of the same rows is one alert."""
    storage = context.instance.event_log_storage
    keys = sorted(_check_keys(context))
    latest = storage.get_latest_asset_check_execution_by_key(keys)
    start, end = told.checks, max((record.id for record in latest.values()), default=told.checks)
    told.checks = max(end, start)
    if start < 0:
        told.checks = max(end, 0)
        return
    for key, record in latest.items():
        if record.id <= start:
            continue
        for past in reversed(storage.get_asset_check_execution_history(key, limit=EVALUATIONS_A_TICK)):
            evaluation = past.evaluation
            if past.id <= start or not isinstance(evaluation, dg.AssetCheckEvaluation) or evaluation.passed:
                continue
            if evaluation.severity != dg.AssetCheckSeverity.ERROR:
                continue
            name = f"{key.asset_key.to_user_string()}: {key.name}"
            metadata = {label: value.value for label, value in evaluation.metadata.items()}
            rows = str(metadata.get("failing rows", ""))
            details = "\n".join(str(part) for part in (metadata.get("reason"), rows) if part)
            yield Alert(f"check {name} {details}", f"Check failed: {name}", details or f"run {past.run_id}")


def _check_keys(context: dg.SensorEvaluationContext) -> Iterator[dg.AssetCheckKey]:
    repository = context.repository_def
    if repository is None:
        raise RuntimeError("the alerts sensor needs the repository that it runs in")
    yield from repository.asset_graph.asset_check_keys


def _overdue(context: dg.SensorEvaluationContext) -> Iterator[Alert]:
    """Assets whose freshness policy says that they are too old."""
    repository = context.repository_def
    if repository is None or not context.instance.freshness_enabled:
        return
    graph = repository.asset_graph
    with_policy = [key for key in sorted(graph.get_all_asset_keys()) if graph.get(key).freshness_policy is not None]
    for key, record in context.instance.get_freshness_state_records(with_policy).items():
        if record.freshness_state == FreshnessState.FAIL:
            name = key.to_user_string()
            yield Alert(f"overdue {name}", f"Overdue: {name}", "It was not made in the time that its freshness policy gives.")
