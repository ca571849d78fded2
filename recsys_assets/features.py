"""Features: what users did with items, weighted, in a sliding window."""

import dagster as dg

from recsys_assets.ingestion import clicks_hourly
from recsys_assets.partitions import daily, window_of_days
from recsys_assets.reports import schema
from recsys_assets.resources import PlatformResource
from recsys_core.settings import load_settings
from recsys_core.tables import build_interactions

GROUP = "features"
OWNERS = ["team:data-engineering"]


@dg.asset(
    deps=[dg.AssetDep(clicks_hourly, partition_mapping=window_of_days(load_settings().interactions.window_days))],
    partitions_def=daily,
    backfill_policy=dg.BackfillPolicy.single_run(),
    group_name=GROUP,
    owners=OWNERS,
    kinds={"spark", "parquet"},
    pool="spark",
    metadata={
        "dagster/column_schema": schema(
            {
                "user_id": "string",
                "item_id": "string",
                "weight": "float",
                "n_events": "int32",
                "first_ts": "int64",
                "last_ts": "int64",
            }
        )
    },
)
def interactions(context: dg.AssetExecutionContext, platform: PlatformResource) -> dg.MaterializeResult:
    """One row a user–item pair of the window that ends with the day: event weights with exponential time decay."""
    settings = platform.settings
    days = list(context.partition_keys)
    made = build_interactions(platform.spark(), platform.lake, days, settings.events, settings.interactions)
    return dg.MaterializeResult(
        metadata={
            "dagster/row_count": sum(p.rows for p in made),
            "days": len(made),
            "window days": settings.interactions.window_days,
            "half-life days": settings.interactions.half_life_days,
            "bytes": sum(p.bytes for p in made),
        },
        data_version=dg.DataVersion(made[0].data_version) if len(made) == 1 else None,
    )
