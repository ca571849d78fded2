"""What a run of hours says of itself stays small: Dagster keeps a copy of it with each of its partitions."""

from __future__ import annotations

import pytest

from recsys_assets.ingestion import _events_by_span
from recsys_core.events import HOUR_MS, hour_keys, key_start_ms
from recsys_core.lake import Partition

START = key_start_ms("2026-01-01T00")


def made(hours: int) -> list[Partition]:
    """So many hours with 2 events each."""
    keys = hour_keys(START, START + hours * HOUR_MS)
    return [Partition("clicks_hourly", key, "v", (), 2, 0, "d", 0.0) for key in keys]


def test_a_month_is_shown_by_day() -> None:
    (name, shown), *more = _events_by_span(made(31 * 24)).items()
    assert (name, more) == ("events by day", [])
    lines = str(shown.value).splitlines()
    assert lines[2] == "| 2026-01-01 | 48 |"
    assert len(lines) == 2 + 31


@pytest.mark.parametrize("days", [32, 365])
def test_more_days_are_shown_by_month(days: int) -> None:
    ((name, shown),) = _events_by_span(made(days * 24)).items()
    assert name == "events by month"
    rows = [line.strip("| ").split(" | ") for line in str(shown.value).splitlines()[2:]]
    assert rows[0] == ["2026-01", str(31 * 48)]
    assert sum(int(events) for _, events in rows) == days * 48
    assert len(str(shown.value)) < 400
