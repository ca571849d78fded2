"""Trimming Dagster's own store: runs that made nothing which is kept go, with their events."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import dagster as dg
import pyarrow as pa
import pytest
from builders import event, event_table, ms

from recsys_assets.resources import Platform
from recsys_core.events import EVENT_SCHEMA
from recsys_core.settings import RetentionSettings, Settings
from recsys_sensors.pruning import prune_job, spent_runs

POLICY = RetentionSettings(hourly_days=100, daily_days=10, run_days=30)
END = ms("2026-06-01")
days = dg.DailyPartitionsDefinition("2026-01-01")


@dg.asset(partitions_def=days)
def by_day() -> None:
    """Has days."""


@dg.asset
def without_partitions() -> None:
    """Has none."""


@dg.asset(partitions_def=days)
def broken() -> None:
    """Fails."""
    raise RuntimeError("broken")


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as made:
        yield made


def run(instance: dg.DagsterInstance, asset: dg.AssetsDefinition, day: str | None = None) -> str:
    return dg.materialize([asset], partition_key=day, instance=instance, raise_on_error=False).run_id


def test_only_runs_that_made_nothing_kept_are_spent_and_only_when_they_are_old(instance: dg.DagsterInstance) -> None:
    of_a_day_that_is_gone = run(instance, by_day, "2026-01-05")
    failed = run(instance, broken, "2026-05-30")
    run(instance, by_day, "2026-05-30")
    run(instance, without_partitions)
    now = datetime.now(UTC)
    assert spent_runs(instance, POLICY, now, END) == []
    in_forty_days = now + timedelta(days=40)
    assert set(spent_runs(instance, POLICY, in_forty_days, END)) == {of_a_day_that_is_gone, failed}
    forever = POLICY.model_copy(update={"run_days": 0})
    assert spent_runs(instance, forever, in_forty_days, END) == []


def test_deleting_spent_runs_leaves_kept_partitions_materialized(instance: dg.DagsterInstance) -> None:
    run(instance, by_day, "2026-01-05")
    run(instance, by_day, "2026-05-30")
    for run_id in spent_runs(instance, POLICY, datetime.now(UTC) + timedelta(days=40), END):
        instance.delete_run(run_id)
    assert instance.get_materialized_partitions(by_day.key) == {"2026-05-30"}


def test_the_job_prunes_and_says_how_much(settings: Settings) -> None:
    platform = Platform(settings.model_copy(update={"retention": RetentionSettings(daily_days=10)}))
    platform.landing.write_events("t", "a", event_table(event("e", "ann", "tea", "2026-06-01"), schema=EVENT_SCHEMA))
    for key in ("2026-05-01", "2026-05-31"):
        platform.lake.write("als_factors", key, pa.table({"n": [1]}))
    result = prune_job.execute_in_process(resources={"platform": platform})
    assert result.success
    assert platform.lake.keys("als_factors") == ["2026-05-31"]
    (output,) = [e for e in result.all_events if e.event_type_value == "STEP_OUTPUT"]
    assert output.step_output_data.metadata["partition, count"].value == 1
