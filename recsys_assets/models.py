"""Models: ALS factors, the two-tower network, and the evaluation of every model. Each training is an MLflow run."""

from dataclasses import asdict

import dagster as dg

from recsys_assets.features import interactions, item_features, training_examples
from recsys_assets.ingestion import clicks_hourly
from recsys_assets.partitions import daily, window_of_days
from recsys_assets.reports import (
    epochs_table,
    evaluation_plot,
    evaluation_table,
    schema,
    segments_table,
    top_items_per_factor,
    weights_table,
)
from recsys_assets.resources import PlatformResource
from recsys_assets.tracking import tracked
from recsys_core.apart import ApartError, run_apart
from recsys_core.bundle import fit_als_factors, item_factors
from recsys_core.evaluation import ALS, EVALUATION, POPULAR_WINDOW, SERVED, NothingToEvaluate, evaluate_day, write_evaluation
from recsys_core.lake import MissingPartition
from recsys_core.tables import INTERACTIONS
from recsys_core.two_tower import fit_two_tower

GROUP = "models"
PLOTTED = ("ndcg@10", "recall@10", "coverage@10")
"""Numbers of the served ranking that the web UI plots over the days."""
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
    """User and item factors of implicit-feedback ALS: Spark MLlib on a cluster, NumPy on one machine."""
    day, als = context.partition_key, platform.settings.als.model_dump()
    with tracked(context, platform, {**als, "engine": platform.als_engine}, (INTERACTIONS,)) as run:
        report = fit_als_factors(platform.lake, day, platform.settings, platform.spark, platform.als_engine)
        items = item_factors(platform.lake, day)
        top = top_items_per_factor(platform.lake, items.ids, items.vectors)
        sizes = {"users": report.users, "items": report.items, "observations": report.observations}
        chosen = {"half_life_days": report.half_life_days, "regularization": report.regularization}
        fit = {"seconds": report.seconds, "ridge": report.ridge, **chosen}
        run.log_metrics({**sizes, **fit})
        run.log_text("top_items_per_factor.md", str(top.value))
    return dg.MaterializeResult(
        metadata={
            **run.link(),
            "engine": report.engine,
            **sizes,
            "rank": platform.settings.als.rank,
            "half-life days": report.half_life_days,
            "regularization": report.regularization,
            "fit seconds": round(report.seconds, 1),
            "top items per factor": top,
        },
        data_version=dg.DataVersion(platform.lake.get("als_factors", day).data_version),
    )


@dg.asset(
    deps=[training_examples, item_features],
    check_specs=[
        dg.AssetCheckSpec("two_tower_is_trained", asset="two_tower", description="The day has a two-tower model of its own.")
    ],
    partitions_def=daily,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"tensorflow"},
    pool="training",
)
def two_tower(context: dg.AssetExecutionContext, platform: PlatformResource) -> dg.MaterializeResult:
    """The two-tower network. Where it can't be trained the night goes on without one, and the check says why."""
    day, lake, settings = context.partition_key, platform.lake, platform.settings
    with tracked(context, platform, settings.two_tower.model_dump(), ("training_examples", "item_features")) as run:
        try:
            report = run_apart(fit_two_tower, lake, day, settings, log=run.log_metrics)
        except ApartError as error:
            run.close("FAILED")
            context.log.exception("no two-tower model")
            return dg.MaterializeResult(
                metadata={
                    **run.link(),
                    "not trained": str(error),
                    "what follows": "releases of the day are made from ALS alone",
                },
                check_results=[_is_trained(False, {"reason": str(error)})],
                data_version=dg.DataVersion("not trained"),
            )
        numbers = {name: value for name, value in asdict(report).items() if isinstance(value, int | float)}
        run.log_metrics(numbers)
    return dg.MaterializeResult(
        metadata={**run.link(), **numbers, "epochs": epochs_table(report.epochs)},
        check_results=[_is_trained(True, {"version": report.version})],
        data_version=dg.DataVersion(report.version),
    )


def _is_trained(passed: bool, metadata: dict[str, str]) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        check_name="two_tower_is_trained", passed=passed, severity=dg.AssetCheckSeverity.WARN, metadata=metadata
    )


@dg.asset(
    deps=[
        dg.AssetDep(interactions, partition_mapping=window_of_days(3)),
        dg.AssetDep(two_tower, partition_mapping=window_of_days(3)),
        clicks_hourly,
        "item_catalog",
    ],
    partitions_def=daily,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"spark", "numpy"},
    pool="training",
)
def evaluation(context: dg.AssetExecutionContext, platform: PlatformResource) -> dg.MaterializeResult:
    """The day predicted from the days before it: every model, the blend and the served ranking beside popularity."""
    day, settings = context.partition_key, platform.settings
    params = {"evaluation": settings.evaluation.model_dump(), "ranking": settings.ranking.model_dump()}
    with tracked(context, platform, params, (INTERACTIONS,)) as run:
        try:
            result = evaluate_day(platform.lake, day, settings, platform.spark, platform.als_engine)
        except (NothingToEvaluate, MissingPartition) as reason:
            write_evaluation(platform.lake, day, None, str(reason))
            run.set_tags({"not_evaluated": str(reason)})
            return dg.MaterializeResult(metadata={"not evaluated": str(reason), **run.link()})
        part = write_evaluation(platform.lake, day, result)
        run.log_metrics(part.extra["metrics"])
        run.log_text("evaluation.json", platform.lake.read_blob(EVALUATION, day, "evaluation.json").decode())
    lift = result.metrics[ALS]["ndcg@10"] / max(result.metrics[POPULAR_WINDOW]["ndcg@10"], 1e-9)
    return dg.MaterializeResult(
        metadata={
            **run.link(),
            "users": result.users,
            "items": result.items,
            "relevant pairs": result.relevant,
            **{f"served ranking, {name}": value for name, value in result.metrics.get(SERVED, {}).items() if name in PLOTTED},
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
