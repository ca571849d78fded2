"""What is told to people: failed runs, failed checks, overdue assets and a silent stream, each once.

The cursor holds up to where the event log was read, the ids of what was told last, and what a channel did not take yet. Neither
a part of the platform that can't be looked at nor a channel that is away keeps the rest from being told: the first is an alert
itself, what waits for the second is sent at the next tick.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import dagster as dg
from dagster._core.definitions.freshness import FreshnessState

from recsys_assets.resources import Platform
from recsys_core.alerts import Alert, Channel, NotDelivered, channels
from recsys_core.masking import masked_text
from recsys_sensors.runs import PARTITION, RANGE_END, RANGE_START, stopped_by
from recsys_sensors.stream_health import stream_alerts

REMEMBERED = 1000
"""Ids of alerts that are kept."""
WAITING = 100
"""Alerts that are kept for a channel that is away, the newest."""
DETAILS = 2000
"""Characters of its details that an alert has."""
RUNS_A_TICK = 100
EVALUATIONS_A_TICK = 50
UNSEEN = "unseen: "


@dataclass
class Told:
    """What the cursor holds.

    Attributes:
        runs, checks: where the logs were read up to.
        standing: ids of what is wrong for as long as it lasts.
        sent: ids of what was told.
        waiting: by channel, what it did not take yet, oldest first.
    """

    runs: str | None = None
    checks: int = -1
    standing: list[str] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)
    waiting: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    @classmethod
    def of(cls, cursor: str | None) -> Told:
        """What a cursor says; what another version has put into it besides is left out."""
        raw = json.loads(cursor) if cursor else {}
        return cls(**{name: raw[name] for name in cls.__dataclass_fields__ if name in raw})

    def cursor(self) -> str:
        return json.dumps({**self.__dict__, "sent": self.sent[-REMEMBERED:]})


def alerts(context: dg.SensorEvaluationContext, platform: Platform) -> dg.SensorResult:
    """Tells what went wrong since the last tick. The first tick only notes where the logs end."""
    first = context.cursor is None
    told = Told.of(context.cursor)
    found = list(_happened(context, told))
    if first:
        return dg.SensorResult(skip_reason="alerts start from here", cursor=replace(told, standing=[]).cursor())
    found += _standing(context, platform, told)
    for alert in found:
        context.log.warning(masked_text(alert.text))
    problems = _deliver(context, list(channels(platform.settings.alerts)), found, told)
    reason = f"{len(found)} alerts told" if found else "nothing to tell"
    if problems:
        reason = f"alerts wait for the next tick: {'; '.join(problems)}"
    return dg.SensorResult(skip_reason=reason, cursor=told.cursor())


def _happened(context: dg.SensorEvaluationContext, told: Told) -> Iterator[Alert]:
    """What happened since the last tick and was not told before. Logs that can't be read are read from the same place again."""
    for what, find in (("failed runs", _failed_runs), ("failed checks", _failed_checks)):
        looked = replace(told)
        found, problem = _seen(context, what, partial(find, context, looked))
        if problem is None:
            told.runs, told.checks = looked.runs, looked.checks
        yield from _changed(told, f"{UNSEEN}{what}", [] if problem is None else [problem])
        for alert in found:
            if alert.id not in told.sent:
                told.sent.append(alert.id)
                yield alert


def _standing(context: dg.SensorEvaluationContext, platform: Platform, told: Told) -> Iterator[Alert]:
    """What is wrong since this tick, and what is right again. What can't be looked at stays as it was."""
    sources: tuple[tuple[str, str, Callable[[], Iterable[Alert]]], ...] = (
        ("the stream's health", "stream ", lambda: stream_alerts(platform)),
        ("overdue assets", "overdue ", lambda: _overdue(context)),
    )
    for what, prefix, find in sources:
        found, problem = _seen(context, what, find)
        yield from _changed(told, f"{UNSEEN}{what}", [] if problem is None else [problem])
        if problem is None:
            yield from _changed(told, prefix, found)


def _changed(told: Told, prefix: str, now: list[Alert]) -> Iterator[Alert]:
    """Of the standing alerts whose ids begin with `prefix` those that are new, and those that are over."""
    before = [id_ for id_ in told.standing if id_.startswith(prefix)]
    ids = [alert.id for alert in now]
    told.standing = [id_ for id_ in told.standing if id_ not in before] + ids
    yield from (alert for alert in now if alert.id not in before)
    yield from (Alert(f"{id_} is over", f"Right again: {id_}") for id_ in before if id_ not in ids)


def _seen(
    context: dg.SensorEvaluationContext, what: str, find: Callable[[], Iterable[Alert]]
) -> tuple[list[Alert], Alert | None]:
    """What `find` finds, or the alert that it can't be looked at."""
    try:
        return list(find()), None
    except Exception as error:
        context.log.exception(f"alerts can't look at {what}")
        return [], Alert(f"{UNSEEN}{what}", f"Alerts can't look at {what}", masked_text(f"{type(error).__name__}: {error}"))


def _deliver(context: dg.SensorEvaluationContext, used: list[Channel], found: Iterable[Alert], told: Told) -> list[str]:
    """Send what is new and what waits on every channel. Returns why channels did not take it all; the rest is in `waiting`."""
    new = [{name: masked_text(text)[:DETAILS] for name, text in asdict(alert).items()} for alert in found]
    problems, waiting = [], {}
    for channel in used:
        left = [*told.waiting.get(channel.name, []), *new]
        while left:
            try:
                channel.send(Alert(**left[0]))
            except Exception as error:
                if isinstance(error, NotDelivered) and not error.for_good:
                    problems.append(str(error))
                    break
                context.log.exception(f"{channel.name} refuses an alert, which is passed over: {left[0]['title']}")
            left = left[1:]
        if left:
            waiting[channel.name] = _newest(left)
    told.waiting = waiting
    return problems


def _newest(left: list[dict[str, str]]) -> list[dict[str, str]]:
    """The newest WAITING alerts; of others only that they were."""
    if len(left) <= WAITING:
        return left
    lost = len(left) - WAITING + 1 - (left[0]["id"] == "lost")
    before = int(left[0]["details"]) if left[0]["id"] == "lost" else 0
    first = Alert("lost", "So many older alerts could not be delivered here", str(before + lost))
    return [asdict(first), *left[1 - WAITING :]]


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
