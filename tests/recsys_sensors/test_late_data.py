"""Which hours count as late is found with a few queries, however many hours a file touches."""

from __future__ import annotations

from collections.abc import Iterator

import dagster as dg
import pytest

from recsys_sensors import late_data
from recsys_sensors.late_data import CLICKS, _run_starts

HOURS = [f"2026-01-01T{hour:02}" for hour in range(24)]
hourly = dg.HourlyPartitionsDefinition("2026-01-01T00", fmt="%Y-%m-%dT%H")


@dg.asset(partitions_def=hourly)
def clicks_hourly() -> None:
    """By the hour."""


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as made:
        yield made


def made(instance: dg.DagsterInstance, hour: str) -> float:
    """Make an hour in a run of its own. Returns when that had begun."""
    run_id = dg.materialize([clicks_hourly], partition_key=hour, instance=instance).run_id
    record = instance.get_run_record_by_id(run_id)
    assert record is not None
    assert record.start_time is not None
    return record.start_time


@pytest.mark.parametrize("at_once", [1000, 2])
def test_an_hour_began_with_the_last_run_that_made_it(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(late_data, "HOURS_AT_ONCE", at_once)
    first, second, third = HOURS[:3]
    made(instance, first)
    begun = {second: made(instance, second), first: made(instance, first), third: made(instance, third)}
    assert _run_starts(instance, HOURS) == begun
    assert _run_starts(instance, [second]) == {second: begun[second]}
    assert _run_starts(instance, []) == _run_starts(instance, HOURS[5:]) == {}


def test_an_hour_that_was_recorded_without_a_run_began_when_it_was(instance: dg.DagsterInstance) -> None:
    instance.report_runless_asset_event(dg.AssetMaterialization(CLICKS, partition=HOURS[0]))
    (record,) = instance.fetch_materializations(CLICKS, limit=1).records
    assert _run_starts(instance, HOURS) == {HOURS[0]: record.timestamp}


def test_a_day_of_hours_is_two_queries(instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    for hour in HOURS:
        instance.report_runless_asset_event(dg.AssetMaterialization(CLICKS, partition=hour))
    asked: list[str] = []
    for name in ("get_latest_storage_id_by_partition", "fetch_materializations"):
        query = getattr(dg.DagsterInstance, name)
        counted = lambda *args, _name=name, _query=query, **kwargs: (asked.append(_name), _query(*args, **kwargs))[1]  # noqa: E731
        monkeypatch.setattr(dg.DagsterInstance, name, counted)
    assert set(_run_starts(instance, HOURS)) == set(HOURS)
    assert asked == ["get_latest_storage_id_by_partition", "fetch_materializations"]
