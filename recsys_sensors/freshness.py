"""By when each asset has to be made: the freshness policies of the whole graph, in one place."""

from __future__ import annotations

from datetime import timedelta

import dagster as dg

HOURLY = dg.FreshnessPolicy.time_window(fail_window=timedelta(hours=2, minutes=30), warn_window=timedelta(hours=1, minutes=30))
"""An hour is made a few minutes after it ends; two missed ones are an alert, and by then the caches are stale."""
NIGHTLY = dg.FreshnessPolicy.cron(deadline_cron="0 6 * * *", lower_bound_delta=timedelta(hours=5))
"""The night of a day is done by six in the morning (UTC)."""

OBSERVED_ONLY = frozenset({"clickstream_topic", "clickstream_landing", "item_catalog"})
"""Made elsewhere: the stream's alerts and the checks on the hours say when nothing arrives."""


def policy_of(spec: dg.AssetSpec) -> dg.FreshnessPolicy | None:
    """By its partitions: hours and days have a deadline."""
    if spec.key.to_user_string() in OBSERVED_ONLY or spec.partitions_def is None:
        return None
    return HOURLY if isinstance(spec.partitions_def, dg.HourlyPartitionsDefinition) else NIGHTLY


def with_deadline(spec: dg.AssetSpec) -> dg.AssetSpec:
    """The asset with its freshness policy."""
    policy = policy_of(spec)
    return dg.apply_freshness_policy(spec, policy) if policy else spec
