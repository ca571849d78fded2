"""Serving: fallbacks and boosts, the release, the online features and the hourly recommendation caches."""

import dagster as dg

from recsys_assets.features import interactions
from recsys_assets.ingestion import clicks_hourly
from recsys_assets.models import als_factors, evaluation
from recsys_assets.partitions import daily, hourly, window_of_hours
from recsys_assets.reports import recommendations_table, schema, table, weights_table
from recsys_assets.resources import PlatformResource
from recsys_assets.retrieval import item_index
from recsys_core.bundle import ALS_USERS, POPULAR_ITEMS, TRENDING_ITEMS, publish_release
from recsys_core.catalog import read_catalog
from recsys_core.events import HOUR_MS, hour_keys, key_start_ms
from recsys_core.popularity import POPULAR_SCHEMA, TRENDS_SCHEMA
from recsys_core.popularity import popular_items as popularity_of
from recsys_core.popularity import trending_items as trends_of
from recsys_core.precompute import read_trend, write_online_features, write_rec_cache, write_trend
from recsys_core.ranking import Trend
from recsys_core.settings import load_settings
from recsys_core.tables import CLICKS_HOURLY, INTERACTIONS, build_active_users, build_online_features

GROUP = "serving"
OWNERS = ["team:ml-engineering"]
_settings = load_settings()


@dg.asset(
    deps=[interactions],
    partitions_def=daily,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"parquet"},
    metadata={"dagster/column_schema": schema(POPULAR_SCHEMA)},
)
def popular_items(context: dg.AssetExecutionContext, platform: PlatformResource) -> dg.MaterializeResult:
    """Items by their weight in the window: the last fallback, and a part of every score."""
    window = platform.lake.dataset(INTERACTIONS, [context.partition_key])
    popular = popularity_of(window) if window else POPULAR_SCHEMA.empty_table()
    part = platform.lake.write(POPULAR_ITEMS, context.partition_key, popular)
    top = with_titles(platform, popular.slice(0, 10).to_pylist())
    return dg.MaterializeResult(
        metadata={"dagster/row_count": part.rows, "top": table(["item", "weight", "users"], top)},
        data_version=dg.DataVersion(part.data_version),
    )


@dg.asset(
    deps=[dg.AssetDep(clicks_hourly, partition_mapping=window_of_hours(_settings.trends.window_hours))],
    partitions_def=hourly,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"parquet"},
    metadata={"dagster/column_schema": schema(TRENDS_SCHEMA)},
)
def trending_items(context: dg.AssetExecutionContext, platform: PlatformResource) -> dg.MaterializeResult:
    """Items by their events of the last hours with exponential decay, as of the end of the hour."""
    hour, settings = context.partition_key, platform.settings
    end = key_start_ms(hour) + HOUR_MS
    clicks = platform.lake.dataset(CLICKS_HOURLY, hour_keys(end - settings.trends.window_hours * HOUR_MS, end), missing_ok=True)
    trends = TRENDS_SCHEMA.empty_table()
    if clicks is not None:
        trends = trends_of(clicks, end, settings.events.weights, settings.trends.half_lives_hours, settings.trends.top)
    part = platform.lake.write(TRENDING_ITEMS, hour, trends)
    top = with_titles(platform, trends.slice(0, 10).drop_columns("scores").to_pylist())
    return dg.MaterializeResult(
        metadata={"dagster/row_count": part.rows, "top": table(["item", "score", "events"], top)},
        data_version=dg.DataVersion(part.data_version),
    )


@dg.asset(
    deps=[als_factors, item_index, popular_items, evaluation, "item_catalog"],
    partitions_def=daily,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"faiss", "parquet"},
)
def release(context: dg.AssetExecutionContext, platform: PlatformResource) -> dg.MaterializeResult:
    """One immutable bundle of everything serving needs, read back and verified before it becomes the champion."""
    run_ids = {"release": context.run_id}
    manifest, snapshot = publish_release(platform.lake, platform.releases, context.partition_key, platform.settings, run_ids)
    sources = [[name, s["partition"], s["data_version"]] for name, s in manifest.sources.items()]
    files = [[name, f["bytes"], f["sha256"][:12]] for name, f in manifest.files.items()]
    return dg.MaterializeResult(
        metadata={
            "release_id": manifest.release_id,
            "items": snapshot.items.num_rows,
            "bytes": sum(f["bytes"] for f in manifest.files.values()),
            "two-tower model": manifest.notes.get("two_tower") or (manifest.models["two_tower"] or {}).get("version", ""),
            "weights": weights_table(manifest.ranking, platform.settings.trends.half_lives_hours),
            "made from": table(["asset", "partition", "data version"], sources),
            "files": table(["file", "bytes", "sha256"], files),
        },
        data_version=dg.DataVersion(manifest.release_id),
    )


@dg.asset(
    deps=[release, interactions, als_factors, clicks_hourly],
    partitions_def=daily,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"spark", "redis"},
    pool="spark",
)
def online_features(context: dg.AssetExecutionContext, platform: PlatformResource) -> dg.MaterializeResult:
    """Users' factors, last items and what they had, in Redis."""
    day, settings = context.partition_key, platform.settings
    part = build_online_features(
        platform.spark(), platform.lake, day, ALS_USERS, settings.ranking, settings.interactions.window_days
    )
    version = platform.lake.get("als_factors", day).data_version
    with platform.redis() as redis:
        report = write_online_features(redis, platform.lake, day, version, settings)
    return dg.MaterializeResult(
        metadata={
            "dagster/row_count": part.rows,
            "users written": report.users,
            "users a second": round(report.users_per_second),
        },
        data_version=dg.DataVersion(part.data_version),
    )


@dg.asset(
    deps=[
        dg.AssetDep(clicks_hourly, partition_mapping=window_of_hours(_settings.cache.active_hours)),
        dg.AssetDep(release, partition_mapping=dg.LastPartitionMapping()),
        dg.AssetDep(online_features, partition_mapping=dg.LastPartitionMapping()),
        trending_items,
    ],
    partitions_def=hourly,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"redis", "spark"},
    pool="spark",
)
def rec_cache(context: dg.AssetExecutionContext, platform: PlatformResource) -> dg.MaterializeResult:
    """The top items of every user active in the last hours, ranked with the champion release, in Redis."""
    hour, settings = context.partition_key, platform.settings
    champion = platform.releases.champion()
    if champion is None:
        raise dg.Failure("no release has been promoted yet: materialize `release` first")
    active = build_active_users(platform.spark(), platform.lake, hour, settings.cache.active_hours)
    _, snapshot = platform.releases.load(champion.release_id, champion.manifest_sha256)
    trending = read_trend(platform.lake, hour)
    with platform.redis() as redis:
        write_trend(redis, trending, settings.cache.ttl_seconds)
        trend = Trend.of(snapshot, trending.scores)
        report = write_rec_cache(redis, platform.lake, hour, snapshot, trend, settings)
    return dg.MaterializeResult(
        metadata={
            "active users": active.rows,
            "users written": report.users,
            "users without any item": report.empty,
            "users a second": round(report.users_per_second),
            "release_id": snapshot.release_id,
            "samples": recommendations_table(snapshot, report.samples),
        }
    )


def with_titles(platform: PlatformResource, rows: list[dict]) -> list[list[object]]:
    """Rows of a ranked table with the item's title in place of its id where the catalogue has one."""
    catalog = read_catalog(platform.lake)
    titles = dict(zip(catalog["item_id"].to_pylist(), catalog["title"].to_pylist(), strict=True))
    return [[titles.get(row["item_id"]) or row["item_id"], *list(row.values())[1:]] for row in rows]
