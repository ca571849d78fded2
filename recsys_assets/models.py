"""Models: ALS factors, and the evaluation of every model beside the popularity baselines."""

import dagster as dg

from recsys_assets.features import interactions
from recsys_assets.ingestion import clicks_hourly
from recsys_assets.partitions import daily, window_of_days
from recsys_assets.reports import evaluation_plot, evaluation_table, schema, segments_table, top_items_per_factor, weights_table
from recsys_assets.resources import PlatformResource
from recsys_core.bundle import fit_als_factors, item_factors
from recsys_core.catalog import read_catalog
from recsys_core.evaluation import ALS, POPULAR_WINDOW, NothingToEvaluate, evaluate_day, write_evaluation
from recsys_core.lake import MissingPartition

GROUP = "models"
OWNERS = ["team:ml-engineering"]


@dg.asset(
    deps=[interactions],
    partitions_def=daily,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"spark", "numpy"},
    pool="training",
    metadata={"dagster/column_schema": schema({"id": "string", "n": "int32", "factor": "list<float>"})},
)
def als_factors(context: dg.AssetExecutionContext, platform: PlatformResource) -> dg.MaterializeResult:
    """User and item factors of implicit-feedback ALS: Spark MLlib on a cluster, `implicit` on one machine."""
    day = context.partition_key
    report = fit_als_factors(platform.lake, day, platform.settings, platform.spark, platform.als_engine)
    items = item_factors(platform.lake, day)
    catalog = read_catalog(platform.lake)
    titles = dict(zip(catalog["item_id"].to_pylist(), catalog["title"].to_pylist(), strict=True))
    return dg.MaterializeResult(
        metadata={
            "engine": report.engine,
            "users": report.users,
            "items": report.items,
            "observations": report.observations,
            "rank": platform.settings.als.rank,
            "fit seconds": round(report.seconds, 1),
            "top items per factor": top_items_per_factor(items.ids, items.vectors, titles),
        },
        data_version=dg.DataVersion(platform.lake.get("als_factors", day).data_version),
    )


@dg.asset(
    deps=[dg.AssetDep(interactions, partition_mapping=window_of_days(2)), clicks_hourly],
    partitions_def=daily,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"numpy"},
    pool="training",
)
def evaluation(context: dg.AssetExecutionContext, platform: PlatformResource) -> dg.MaterializeResult:
    """The day predicted from the days before it: every model, the blend and the served ranking beside popularity."""
    day = context.partition_key
    try:
        result = evaluate_day(platform.lake, day, platform.settings, platform.spark, platform.als_engine)
    except (NothingToEvaluate, MissingPartition) as reason:
        write_evaluation(platform.lake, day, None, str(reason))
        return dg.MaterializeResult(metadata={"not evaluated": str(reason)})
    write_evaluation(platform.lake, day, result)
    lift = result.metrics[ALS]["ndcg@10"] / max(result.metrics[POPULAR_WINDOW]["ndcg@10"], 1e-9)
    return dg.MaterializeResult(
        metadata={
            "users": result.users,
            "items": result.items,
            "relevant pairs": result.relevant,
            "share of the day's pairs with items new that day": round(result.new_item_share, 4),
            "ALS over window popularity, NDCG@10": round(lift, 2),
            "models": evaluation_table(result),
            "segments": segments_table(result),
            "weights": weights_table(result.ranking, platform.settings.trends.half_lives_hours),
            "weights tuned on": result.tuning["note"]
            or f"{result.tuning['users']} users at {result.tuning['moments']} moments",
            "two-tower model": result.two_tower,
            "NDCG@10": evaluation_plot(result),
        }
    )
