"""Automation conditions on the real graph: what asks for what."""

from __future__ import annotations

import dagster as dg
import pytest

from recsys_assets.definitions import build_definitions
from recsys_core.events import HOUR_MS, hour_key, now_ms
from recsys_core.settings import Settings
from recsys_sensors.runs import contiguous

CLICKS, TRENDS = dg.AssetKey("clicks_hourly"), dg.AssetKey("trending_items")
LAST = hour_key(now_ms() - HOUR_MS)
LONG_AGO = hour_key(now_ms() - 30 * HOUR_MS)


def made(instance: dg.DagsterInstance, key: dg.AssetKey, *hours: str) -> None:
    for hour in hours:
        instance.report_runless_asset_event(dg.AssetMaterialization(key, partition=hour))


@pytest.fixture
def definitions(settings: Settings) -> dg.Definitions:
    return build_definitions(settings)


def asked(definitions: dg.Definitions, instance: dg.DagsterInstance, cursor: object = None) -> tuple[set[str], object]:
    found = dg.evaluate_automation_conditions(
        defs=definitions, instance=instance, asset_selection=dg.AssetSelection.assets(TRENDS), cursor=cursor
    )
    return set(found.get_requested_partitions(TRENDS)), found.cursor


def test_late_events_of_a_recent_hour_ask_for_its_trends_once(definitions: dg.Definitions) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        made(instance, CLICKS, LAST)
        made(instance, TRENDS, LAST)
        _, cursor = asked(definitions, instance)
        requested, cursor = asked(definitions, instance, cursor)
        assert requested == set()
        made(instance, CLICKS, LAST)
        requested, cursor = asked(definitions, instance, cursor)
        assert requested == {LAST}
        requested, _ = asked(definitions, instance, cursor)
        assert requested == set()


def test_an_hour_that_was_never_made_and_one_long_ago_are_not_asked_for(definitions: dg.Definitions) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        made(instance, TRENDS, LONG_AGO)
        _, cursor = asked(definitions, instance)
        made(instance, CLICKS, LAST, LONG_AGO)
        requested, _ = asked(definitions, instance, cursor)
        assert requested == set()


def test_gapless_stretches_of_hours_are_one_run_each() -> None:
    order = [f"2026-01-01T{n:02}" for n in range(10)]
    wanted = [order[1], order[2], order[3], order[6], order[9]]
    assert contiguous(wanted, order) == [(order[1], order[3]), (order[6], order[6]), (order[9], order[9])]
    assert contiguous([], order) == []
