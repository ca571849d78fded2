"""Features: what users did with items, users and items at the end of a day, and examples of what users did next."""

import dagster as dg

from recsys_assets.ingestion import clicks_hourly
from recsys_assets.partitions import daily, window_of_days
from recsys_assets.reports import schema, table, tell_by_partition
from recsys_assets.resources import PlatformResource
from recsys_core.feature_tables import build_item_features, build_training_examples, build_user_features
from recsys_core.features import ITEM_FEATURES, TRAINING_EXAMPLES, USER_FEATURES
from recsys_core.lake import Partition
from recsys_core.settings import load_settings
from recsys_core.tables import build_interactions

GROUP = "features"
OWNERS = ["team:data-engineering"]
WINDOW_DAYS = load_settings().interactions.window_days


@dg.asset(
    deps=[dg.AssetDep(clicks_hourly, partition_mapping=window_of_days(WINDOW_DAYS))],
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
    tell_by_partition(context, made)
    return dg.MaterializeResult(
        metadata={
            "days of the run": len(made),
            "window days": settings.interactions.window_days,
            "half-life days": settings.interactions.half_life_days,
        },
        data_version=dg.DataVersion(made[0].data_version) if len(made) == 1 else None,
    )


COUNTS = {"events_1d": "int32", "events_7d": "int32", "events_window": "int32"}
USER_COLUMNS = {f"user_{name}": kind for name, kind in COUNTS.items()} | {
    "user_recency_hours": "float",
    "user_category": "string",
}
ITEM_COLUMNS = {"category": "string", "price_bucket": "int8", "item_age_days": "float"} | {
    f"item_{name}": kind for name, kind in COUNTS.items()
}


@dg.asset(
    deps=[dg.AssetDep(clicks_hourly, partition_mapping=window_of_days(WINDOW_DAYS)), "item_catalog"],
    partitions_def=daily,
    backfill_policy=dg.BackfillPolicy.single_run(),
    group_name=GROUP,
    owners=OWNERS,
    kinds={"spark", "parquet"},
    pool="spark",
    metadata={
        "dagster/column_schema": schema(
            {"user_id": "string", "history": "list<string>"}
            | USER_COLUMNS
            | {
                "last": "list<struct<item_id: string, event_type: string, ts: int64>>",
                "last_ts": "int64",
                "device": "string",
                "country": "string",
                "seen": "list<string>",
                "features": "string",
            }
        )
    },
)
def user_features(context: dg.AssetExecutionContext, platform: PlatformResource) -> dg.MaterializeResult:
    """One row a user with an event in the window, as of the end of the day: activity, taste, last items and context."""
    days = list(context.partition_keys)
    made = build_user_features(platform.spark(), platform.lake, days, platform.settings)
    shown = ["user_events_1d", "user_events_window", "user_category", "device", "history"]
    return _made(context, platform, USER_FEATURES, made, shown)


@dg.asset(
    deps=[dg.AssetDep(clicks_hourly, partition_mapping=window_of_days(WINDOW_DAYS)), "item_catalog"],
    partitions_def=daily,
    backfill_policy=dg.BackfillPolicy.single_run(),
    group_name=GROUP,
    owners=OWNERS,
    kinds={"spark", "parquet"},
    pool="spark",
    metadata={
        "dagster/column_schema": schema(
            {"item_id": "string", "title": "string", "price": "double", "first_ts": "int64"} | ITEM_COLUMNS
        )
    },
)
def item_features(context: dg.AssetExecutionContext, platform: PlatformResource) -> dg.MaterializeResult:
    """One row an item of the catalogue or of the window, as of the end of the day: category, price, age, popularity."""
    days = list(context.partition_keys)
    made = build_item_features(platform.spark(), platform.lake, days, platform.settings)
    shown = ["item_id", "title", "category", "price_bucket", "item_age_days", "item_events_1d", "item_events_window"]
    return _made(context, platform, ITEM_FEATURES, made, shown)


@dg.asset(
    deps=[dg.AssetDep(clicks_hourly, partition_mapping=window_of_days(2 * WINDOW_DAYS)), "item_catalog"],
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
                "event_type": "string",
                "ts": "int64",
                "weight": "float",
                "history": "list<string>",
                "hour": "int8",
                "weekday": "int8",
                "device": "string",
                "country": "string",
            }
            | USER_COLUMNS
            | ITEM_COLUMNS
        )
    },
)
def training_examples(context: dg.AssetExecutionContext, platform: PlatformResource) -> dg.MaterializeResult:
    """One row an event of the window, with the features of its user and its item as they were just before it."""
    days = list(context.partition_keys)
    made = build_training_examples(platform.spark(), platform.lake, days, platform.settings)
    shown = ["item_id", "event_type", "ts", "user_events_window", "user_category", "item_events_1d", "history"]
    return _made(context, platform, TRAINING_EXAMPLES, made, shown)


SAMPLE_ROWS = 5
SAMPLE_ITEMS = 5


def _made(
    context: dg.AssetExecutionContext, platform: PlatformResource, name: str, made: list[Partition], shown: list[str]
) -> dg.MaterializeResult:
    """Rows and bytes of each day, and some rows of the last one to look at. Who they are of is kept out of Dagster's store."""
    dataset = platform.lake.dataset(name, [made[-1].key])
    rows = dataset.head(SAMPLE_ROWS, columns=shown).to_pylist() if dataset else []
    sample = [[", ".join(v[:SAMPLE_ITEMS]) if isinstance(v, list) else v for v in row.values()] for row in rows]
    tell_by_partition(context, made, {made[-1].key: {"sample": table(shown, sample)}})
    return dg.MaterializeResult(
        metadata={"days of the run": len(made)},
        data_version=dg.DataVersion(made[0].data_version) if len(made) == 1 else None,
    )
