"""The jobs: what one hour and one night are made of, and the parts of them that sensors ask for."""

from __future__ import annotations

import dagster as dg

ARRIVALS = dg.AssetSelection.assets("clickstream_landing", "item_catalog")
HOURLY = dg.AssetSelection.assets("clicks_hourly", "trending_items", "rec_cache")
NIGHTLY = dg.AssetSelection.assets(
    "interactions",
    "user_features",
    "item_features",
    "training_examples",
    "als_factors",
    "two_tower",
    "item_index",
    "popular_items",
    "evaluation",
    "release",
    "champion",
    "online_features",
)
CATALOGUE_CHECKS = dg.AssetSelection.checks_for_assets("item_catalog")
"""Part of the night: a catalogue that is not sound stops the release that would be made with it."""

WORK = "recsys/work"
"""Run tag that says what kind of work a run is: the run queue keeps places for each kind, so that none starves another."""

arrivals_job = dg.define_asset_job("arrivals", ARRIVALS, tags={WORK: "look"}, description="Look at what has landed.")
hourly_job = dg.define_asset_job(
    "hourly",
    HOURLY,
    tags={WORK: "hourly", "dagster/priority": "10"},
    description="The hour's clicks, trends and recommendation caches, ranked with the champion release.",
)
caches_job = dg.define_asset_job(
    "caches",
    dg.AssetSelection.assets("rec_cache"),
    tags={WORK: "hourly", "dagster/priority": "20"},
    description="The recommendation caches again, after another release was promoted.",
)
late_job = dg.define_asset_job(
    "late_hours",
    dg.AssetSelection.assets("clicks_hourly"),
    tags={WORK: "late"},
    description="Hours whose events arrived after they had been made, again.",
)
nightly_job = dg.define_asset_job(
    "nightly",
    NIGHTLY | CATALOGUE_CHECKS,
    tags={WORK: "nightly"},
    description="From the day's interactions to a release, through the gate to the champion, and fresh online features.",
)
JOBS = [arrivals_job, hourly_job, caches_job, late_job, nightly_job]
