"""The jobs: what one hour and one night are made of."""

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
    "item_index",
    "popular_items",
    "evaluation",
    "release",
    "online_features",
)

arrivals_job = dg.define_asset_job("arrivals", ARRIVALS, description="Look at what has landed.")
hourly_job = dg.define_asset_job(
    "hourly",
    HOURLY,
    description="The hour's clicks, trends and recommendation caches, ranked with the champion release.",
)
nightly_job = dg.define_asset_job(
    "nightly",
    NIGHTLY,
    description="From the day's interactions to a verified and promoted release and fresh online features.",
)
