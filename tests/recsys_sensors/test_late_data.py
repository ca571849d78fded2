"""Hours that were made without a file are made again, once, whatever the clocks say."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import dagster as dg
import pyarrow as pa
import pytest
from builders import event, event_table

from recsys_assets.resources import Platform
from recsys_core.events import EVENT_SCHEMA
from recsys_core.landing import what_was_read
from recsys_core.settings import Settings
from recsys_core.tables import CLICKS_HOURLY
from recsys_sensors.late_data import late_hours
from recsys_sensors.runs import RANGE_END, RANGE_START

HOURS = [f"2026-01-01T{hour:02}" for hour in range(24)]


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


@pytest.fixture
def platform(settings: Settings) -> Platform:
    start = settings.partitions.model_copy(update={"start": "2026-01-01"})
    return Platform(settings.model_copy(update={"partitions": start}))


def arrive(platform: Platform, name: str, *moments: str) -> str:
    rows = [event(f"{name}-{moment}", "u", "i", moment) for moment in moments]
    return platform.landing.write_events("app", name, event_table(*rows, schema=EVENT_SCHEMA))


def make(platform: Platform, *hours: str) -> None:
    """As the job does, without Spark: what matters is which files it has read."""
    listing = platform.landing.ledger.read()
    damaged = platform.landing.damaged(listing.files())
    platform.landing.note_damaged(damaged, hours)
    said = what_was_read(listing.version, map(platform.lake.below, damaged))
    for hour in hours:
        platform.lake.write(CLICKS_HOURLY, hour, pa.table({"n": [1]}), extra=said)


def look(platform: Platform, instance: dg.DagsterInstance, cursor: str | None) -> tuple[list[str], str | None]:
    """The hours that a tick of the sensor asks for, and its cursor."""
    result = late_hours(dg.build_sensor_context(instance=instance, cursor=cursor), platform)
    asked = [request.partition_key or str(request.tags) for request in result.run_requests or []]
    return asked, result.cursor


def test_what_the_hour_was_made_with_is_not_late(platform: Platform, instance: dg.DagsterInstance) -> None:
    arrive(platform, "a", f"{HOURS[3]}:10")
    make(platform, HOURS[3])
    cursor = None
    for _ in range(3):
        asked, cursor = look(platform, instance, cursor)
        assert asked == []


def test_an_hour_that_was_never_made_is_not_late(platform: Platform, instance: dg.DagsterInstance) -> None:
    make(platform, HOURS[4])
    arrive(platform, "a", f"{HOURS[3]}:10")
    assert look(platform, instance, None)[0] == []


def test_files_that_come_later_make_their_hours_again_as_gapless_stretches(
    platform: Platform, instance: dg.DagsterInstance
) -> None:
    make(platform, *HOURS)
    _, cursor = look(platform, instance, None)
    arrive(platform, "a", f"{HOURS[3]}:10", f"{HOURS[4]}:10", f"{HOURS[9]}:10")
    asked, cursor = look(platform, instance, cursor)
    assert len(asked) == 2
    assert all(hour in asked[0] for hour in (HOURS[3], HOURS[4]))
    assert asked[1] == HOURS[9]
    make(platform, *HOURS)
    assert look(platform, instance, cursor)[0] == []


def test_an_hour_is_asked_for_a_few_times_while_it_is_not_made(platform: Platform, instance: dg.DagsterInstance) -> None:
    make(platform, *HOURS)
    _, cursor = look(platform, instance, None)
    arrive(platform, "a", f"{HOURS[3]}:10")
    times = 0
    for _ in range(10):
        asked, cursor = look(platform, instance, cursor)
        times += asked == [HOURS[3]]
    assert times == platform.settings.dagster.attempts
    assert set(json.loads(cursor or "")["asked"]) == {HOURS[3]}


def test_a_file_is_late_whatever_the_clocks_say(
    platform: Platform, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrive(platform, "first", f"{HOURS[3]}:05")
    make(platform, *HOURS)
    asked, cursor = look(platform, instance, None)
    assert asked == []
    monkeypatch.setattr("recsys_core.landing.now_ms", lambda: 1_000)
    os.utime(arrive(platform, "second", f"{HOURS[3]}:10"), (1, 1))
    assert look(platform, instance, cursor)[0] == [HOURS[3]]
    assert look(platform, instance, None)[0] == [HOURS[3]], "also to one who looks for the first time"


def test_an_hour_that_was_made_meanwhile_is_not_asked_for(platform: Platform, instance: dg.DagsterInstance) -> None:
    make(platform, *HOURS)
    _, cursor = look(platform, instance, None)
    arrive(platform, "a", f"{HOURS[3]}:10")
    make(platform, HOURS[3])
    assert look(platform, instance, cursor)[0] == []


def test_a_lake_that_is_begun_anew_is_looked_at_from_its_beginning(platform: Platform, instance: dg.DagsterInstance) -> None:
    make(platform, *HOURS)
    arrive(platform, "a", f"{HOURS[3]}:10")
    assert look(platform, instance, '{"since": 1000}')[0] == [HOURS[3]]


def test_hours_that_were_made_without_a_damaged_file_are_made_again_once_it_can_be_read(
    platform: Platform, instance: dg.DagsterInstance
) -> None:
    path = arrive(platform, "half", f"{HOURS[5]}:10")
    whole = platform.lake.fs.cat_file(path)
    platform.lake.fs.pipe_file(path, whole[:-30])
    make(platform, HOURS[5])
    make(platform, HOURS[6])
    asked, cursor = look(platform, instance, None)
    assert asked == []
    assert list(platform.landing.unreadable()) == [path]
    platform.lake.fs.pipe_file(path, whole)
    asked, cursor = look(platform, instance, cursor)
    assert asked == [str({RANGE_START: HOURS[5], RANGE_END: HOURS[6]})], "both were made from what could be read"
    make(platform, HOURS[5], HOURS[6])
    assert look(platform, instance, cursor)[0] == []
    assert platform.landing.unreadable() == {}


def test_a_note_of_a_damaged_file_goes_once_no_hour_misses_it(
    platform: Platform, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = arrive(platform, "half", f"{HOURS[5]}:10")
    whole = platform.lake.fs.cat_file(path)
    platform.lake.fs.pipe_file(path, whole[:-30])
    make(platform, HOURS[5])
    platform.lake.fs.pipe_file(path, whole)
    make(platform, HOURS[5])
    look(platform, instance, None)
    assert len(platform.landing.noted()) == 1, "an hour that is being made now may miss it"
    monkeypatch.setattr("recsys_sensors.late_data.FRESH_SECONDS", -1)
    look(platform, instance, None)
    assert platform.landing.noted() == []
