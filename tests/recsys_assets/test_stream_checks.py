"""The check of the archive: holes, doubles and missing rows behind an hour stop what is made from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import dagster as dg
import pyarrow as pa
import pytest
import redis
from builders import archived_as, event, write_clicks

from recsys_assets.resources import Platform
from recsys_assets.stream_checks import BrokerEnds, broker_faults, files_behind, offsets_have_no_gap
from recsys_cli.stack import redis_server
from recsys_core.forget import Places, forget_user
from recsys_core.landing import ARCHIVE_SCHEMA, QUARANTINE_SCHEMA, OffsetRange
from recsys_core.settings import Settings

HOUR = "2026-03-02T10"
NOTHING = QUARANTINE_SCHEMA.empty_table()


@pytest.fixture
def platform(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Platform:
    """An hour made from the archive; no broker answers."""
    monkeypatch.setattr("recsys_assets.stream_checks.BROKER_SECONDS", 0.2)
    kafka = settings.kafka.model_copy(update={"bootstrap_servers": "127.0.0.1:1"})
    made = Platform(settings.model_copy(update={"kafka": kafka}))
    write_clicks(made.lake, [("u", "i", f"{HOUR}:05")])
    return made


def archive(platform: Platform, first: int, last: int, minute: str, missing: int = 0, partition: int = 0) -> OffsetRange:
    """An archive file whose rows lie in one minute."""
    held = OffsetRange("clickstream.events", "0abcdef0", partition, first, last)
    rows = [{**event(f"e{at}", "u", "i", minute), "offset": at} for at in range(first, last + 1 - missing)]
    table = pa.Table.from_pylist(
        [{name: row.get(name) for name in ARCHIVE_SCHEMA.names} for row in rows], schema=ARCHIVE_SCHEMA
    )
    platform.landing.write_archive(held, last + 1 - first, table, NOTHING)
    return held


def check(platform: Platform) -> dg.AssetCheckResult:
    result = offsets_have_no_gap(dg.build_asset_check_context(), platform)
    assert isinstance(result, dg.AssetCheckResult)
    return result


def faults(platform: Platform) -> list[str]:
    found = check(platform)
    assert bool(found.passed) == (not found.metadata["faults"].value)
    return list(found.metadata["faults"].value)  # type: ignore[arg-type]


def test_an_unbroken_archive_passes_and_says_what_it_looked_at(platform: Platform) -> None:
    archive(platform, 0, 9, f"{HOUR}:05")
    archive(platform, 10, 14, f"{HOUR}:30")
    archive(platform, 3, 4, f"{HOUR}:30", partition=1)
    found = check(platform)
    assert found.passed
    assert {name: value.value for name, value in found.metadata.items()} == {
        "archive files": 3,
        "offsets": 17,
        "partitions": 2,
        "compared with the brokers": False,
        "faults": [],
    }


def test_an_hour_from_files_that_no_topic_left_passes(platform: Platform) -> None:
    assert faults(platform) == []


def test_a_hole_between_files_of_the_hour_is_a_fault(platform: Platform) -> None:
    archive(platform, 0, 9, f"{HOUR}:05")
    archive(platform, 12, 14, f"{HOUR}:30")
    assert faults(platform) == ["clickstream.events (0abcdef0) partition 0: offsets 10 to 11 are missing"]


def test_a_file_of_another_hour_between_is_looked_at_too(platform: Platform) -> None:
    first = archive(platform, 0, 9, f"{HOUR}:05")
    other = archive(platform, 10, 12, "2026-03-02T08:00")
    late = archive(platform, 13, 14, f"{HOUR}:30")
    archive(platform, 15, 20, "2026-03-02T12:00")
    assert list(files_behind(platform.landing, [HOUR])) == [first, other, late]
    assert faults(platform) == []


def test_offsets_in_two_files_are_a_fault(platform: Platform) -> None:
    archive(platform, 0, 9, f"{HOUR}:05")
    before = archived_as(platform.landing, archive(platform, 10, 14, f"{HOUR}:30"))
    doubled = OffsetRange("clickstream.events", "0abcdef0", 0, 8, 14)
    path = platform.lake.path("landing", doubled.topic, f"{doubled.name}.parquet")
    platform.landing.ledger.commit([replace(before, path=path)], [before.path])
    assert faults(platform) == ["clickstream.events (0abcdef0) partition 0: offsets 8 to 9 are in two files"]


def test_fewer_rows_than_messages_are_a_fault(platform: Platform) -> None:
    held = archive(platform, 0, 9, f"{HOUR}:05", missing=2)
    assert faults(platform) == [f"{held.name}: 10 messages were taken, 8 events and 0 rejected are held"]


def test_an_archive_beyond_the_end_of_the_topic_is_a_fault() -> None:
    held = [OffsetRange("t", "0abcdef0", 0, 0, 9), OffsetRange("t", "11111111", 0, 0, 99)]
    assert broker_faults(held, BrokerEnds("0abcdef0", {0: (0, 10)}), "t") == []
    assert broker_faults(held, BrokerEnds("0abcdef0", {0: (0, 9)}), "t") == [
        "t partition 0: the archive holds offset 9, the brokers end at 9"
    ]


def test_late_events_touch_the_hour_that_they_belong_to(platform: Platform) -> None:
    archive(platform, 0, 9, f"{HOUR}:05")
    archive(platform, 10, 12, "2026-03-01T08:00")
    assert platform.landing.news(0) == {HOUR: 1, "2026-03-01T08": 2}
    assert platform.landing.news(2) == {}


def test_a_user_who_was_forgotten_leaves_no_gap(platform: Platform, tmp_path: Path) -> None:
    held = OffsetRange("clickstream.events", "0abcdef0", 0, 0, 9)
    rows = [{**event(f"e{at}", f"u{at % 3}", "i", f"{HOUR}:05"), "offset": at} for at in range(9)]
    table = pa.Table.from_pylist([{n: row.get(n) for n in ARCHIVE_SCHEMA.names} for row in rows], schema=ARCHIVE_SCHEMA)
    bad = pa.Table.from_pylist([{"origin": "t-0", "row": 9, "reason": "no item", "content": "u1"}], schema=QUARANTINE_SCHEMA)
    platform.landing.write_archive(held, 10, table, bad)
    archive(platform, 10, 14, f"{HOUR}:30")
    with redis_server(tmp_path) as url, redis.Redis.from_url(url) as client:
        for user in ("u1", "u2"):
            forget_user(Places(platform.lake, client, platform.releases, platform.registry), user)
    assert faults(platform) == []
    file = archived_as(platform.landing, held)
    assert (file.messages, file.rows, file.forgotten, file.rejected) == (10, 3, 6, 1)
    assert file.hours == {HOUR: 3}
    assert platform.landing.archived() == [held, OffsetRange("clickstream.events", "0abcdef0", 0, 10, 14)]
