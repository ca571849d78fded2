"""The partitions of the graph: hours and days, UTC, from the first day that the settings name."""

from __future__ import annotations

import dagster as dg

from recsys_core.settings import load_settings

_partitions = load_settings().partitions
_end = _partitions.end.isoformat() if _partitions.end else None

HOUR_FORMAT = "%Y-%m-%dT%H"
DAY_FORMAT = "%Y-%m-%d"

hourly = dg.HourlyPartitionsDefinition(
    start_date=_partitions.start.strftime(HOUR_FORMAT), end_date=_end and f"{_end}T00", fmt=HOUR_FORMAT
)
daily = dg.DailyPartitionsDefinition(start_date=_partitions.start.isoformat(), end_date=_end, fmt=DAY_FORMAT)


def window_of_days(days: int) -> dg.TimeWindowPartitionMapping:
    """A day depends on the `days` days that end with it, as far as they are partitions."""
    return dg.TimeWindowPartitionMapping(start_offset=1 - days, end_offset=0, allow_nonexistent_upstream_partitions=True)


def window_of_hours(hours: int) -> dg.TimeWindowPartitionMapping:
    """An hour depends on the `hours` hours that end with it, as far as they are partitions."""
    return dg.TimeWindowPartitionMapping(start_offset=1 - hours, end_offset=0, allow_nonexistent_upstream_partitions=True)
