"""Serving: fallbacks and boosts, the release and its promotion, the online features and the hourly recommendation caches."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from recsys_assets.features import interactions, user_features
from recsys_assets.ingestion import clicks_hourly
from recsys_assets.models import als_factors, evaluation, two_tower
from recsys_assets.partitions import daily, hourly, window_of_hours
from recsys_assets.reports import recommendations_table, schema, table, weights_table
from recsys_assets.resources import Platform, PlatformResource
from recsys_assets.retrieval import item_index
from recsys_assets.tracking import tracked
from recsys_core.bundle import ALS_USERS, POPULAR_ITEMS, TRENDING_ITEMS, publish_release
from recsys_core.catalog import names_of
from recsys_core.evaluation import EVALUATION
from recsys_core.events import HOUR_MS, hour_keys, key_start_ms
from recsys_core.gate import read_verdict
from recsys_core.popularity import POPULAR_SCHEMA, TRENDS_SCHEMA
from recsys_core.popularity import popular_items as popularity_of
from recsys_core.popularity import trending_items as trends_of
from recsys_core.precompute import (
    CachePlan,
    NewerCaches,
    NewerRecords,
    WriteReport,
    check_day_of_records,
    finish_caches,
    plan_caches,
    read_plan,
    read_samples,
    read_trend,
    write_online_features,
    write_shards,
    write_trend,
)
from recsys_core.ranking import Trend
from recsys_core.registry import CHALLENGER, RegistryError, RegistryRun
from recsys_core.release import MANIFEST, Manifest, ReleaseError
from recsys_core.settings import load_settings
from recsys_core.tables import ACTIVE_USERS, CLICKS_HOURLY, INTERACTIONS, build_active_users, build_online_features

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
    deps=[als_factors, two_tower, item_index, popular_items, evaluation, "item_catalog"],
    partitions_def=daily,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"faiss", "parquet"},
)
def release(context: dg.AssetExecutionContext, platform: PlatformResource) -> dg.MaterializeResult:
    """One immutable bundle of everything serving needs, read back, verified and registered as `challenger`."""
    day, settings = context.partition_key, platform.settings
    with tracked(context, platform, {"gate": settings.gate.model_dump()}, (EVALUATION,)) as run:
        run_ids = {"release": context.run_id, **({"mlflow": run.run_id} if run.run_id else {})}
        manifest, snapshot = publish_release(platform.lake, platform.releases, day, settings, run_ids)
        run.log_inputs(manifest.sources, platform.lake.uri)
        run.log_metrics(manifest.metrics)
        run.log_text(f"release/{MANIFEST}", manifest.to_bytes().decode())
        registered = register_challenger(platform, manifest, run)
    sources = [[name, s["partition"], s["data_version"]] for name, s in manifest.sources.items()]
    files = [[name, f["bytes"], f["sha256"][:12]] for name, f in manifest.files.items()]
    two_tower = manifest.models.get("two_tower")
    return dg.MaterializeResult(
        metadata={
            **run.link(),
            **registered,
            "release_id": manifest.release_id,
            "items": snapshot.items.num_rows,
            "bytes": sum(f["bytes"] for f in manifest.files.values()),
            "two-tower model": two_tower["version"] if two_tower else manifest.notes["two_tower"],
            "weights": weights_table(manifest.ranking, platform.settings.trends.half_lives_hours),
            "made from": table(["asset", "partition", "data version"], sources),
            "files": table(["file", "bytes", "sha256"], files),
        },
        data_version=dg.DataVersion(manifest.release_id),
    )


def register_challenger(platform: Platform, manifest: Manifest, run: RegistryRun) -> dict[str, str]:
    """Register a release, and let the alias `champion` follow the pointer file where an earlier night was cut off in between.

    Returns what the metadata say of it; MLflow that is away is told and waited for by nobody.
    """
    try:
        platform.registry.follow(platform.releases)
        version = platform.registry.register(manifest, platform.release_uri(manifest.release_id), run)
    except (RegistryError, ReleaseError) as error:
        return {"not registered": str(error)}
    return {"registered as": f"version {version.version}, {CHALLENGER}"}


@dg.asset(
    deps=[release],
    partitions_def=daily,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"mlflow"},
)
def champion(context: dg.AssetExecutionContext, platform: PlatformResource) -> dg.MaterializeResult:
    """The release that serving reads. One that passed the gate takes the place of the champion that it was judged against.

    A verdict is used once: after another promotion or a rollback the release of the day has to be judged again.
    """
    day = context.partition_key
    verdict = read_verdict(platform.lake, day)
    if verdict is None or not verdict.passed:
        reason = verdict.reason if verdict else "no release of this day was judged: materialize `release` first"
        raise dg.Failure(f"the champion stays: {reason}", allow_retries=False)
    before = platform.releases.champion()
    if before is None or before.release_id != verdict.release_id:
        try:
            platform.releases.promote(verdict.release_id, verdict.reason, verdict.champion_sequence)
        except ReleaseError as error:
            raise dg.Failure(
                f"the champion stays: {error}; materialize `release` to judge it now", allow_retries=False
            ) from error
    aliased = {}
    try:
        version = platform.registry.follow(platform.releases)
        aliased["registry version"] = version.version if version else "none"
    except (RegistryError, ReleaseError) as error:
        aliased["MLflow trouble"] = str(error)
    return dg.MaterializeResult(
        metadata={
            "release_id": verdict.release_id,
            "took the place of": before.release_id if before else "none",
            "reason": verdict.reason,
            **aliased,
        },
        data_version=dg.DataVersion(verdict.release_id),
    )


@dg.asset(
    deps=[champion, user_features, als_factors],
    partitions_def=daily,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"spark", "redis"},
    pool="spark",
)
def online_features(context: dg.AssetExecutionContext, platform: PlatformResource) -> dg.MaterializeResult:
    """Users' factors, features, last items and what they had, in Redis."""
    day, settings = context.partition_key, platform.settings
    version, pointer = platform.lake.get("als_factors", day).data_version, platform.releases.champion()
    try:
        check_day_of_records(day, version, platform.releases.manifest(pointer.release_id) if pointer else None)
    except NewerRecords as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    part = build_online_features(platform.spark(), platform.lake, day, ALS_USERS)
    with platform.redis() as redis:
        report = write_online_features(redis, platform.lake, day, version, settings)
    return dg.MaterializeResult(
        metadata={
            "dagster/row_count": part.rows,
            "users written": report.users,
            **left_out(report),
            "users a second": round(report.users_per_second),
        },
        data_version=dg.DataVersion(part.data_version),
    )


CACHES_FROM = {
    "clicks_hourly": dg.AssetIn(partition_mapping=window_of_hours(_settings.cache.active_hours), dagster_type=dg.Nothing),
    "champion": dg.AssetIn(partition_mapping=dg.LastPartitionMapping(), dagster_type=dg.Nothing),
    "online_features": dg.AssetIn(partition_mapping=dg.LastPartitionMapping(), dagster_type=dg.Nothing),
    "trending_items": dg.AssetIn(dagster_type=dg.Nothing),
}


@dg.op(ins={name: dg.In(dg.Nothing) for name in CACHES_FROM}, out=dg.DynamicOut(dg.Nothing), pool="spark")
def rec_cache_plan(context: dg.OpExecutionContext, platform: PlatformResource) -> Iterator[dg.DynamicOutput[None]]:
    """The active users, the trend in Redis, and the plan by which each of the next steps finds its shards."""
    hour, settings = context.partition_key, platform.settings
    pointer = platform.releases.champion()
    if pointer is None:
        raise dg.Failure("no release has been promoted yet: materialize `release` and `champion` first")
    newest = platform.lake.latest(ACTIVE_USERS) or hour
    if hour < newest:
        context.log.info(f"the caches are those of {newest} already")
        return
    build_active_users(platform.spark(), platform.lake, hour, settings.cache.active_hours)
    try:
        plan = plan_caches(platform.lake, hour, pointer, settings, asked_by(context))
    except NewerCaches as error:
        context.log.info(str(error))
        return
    with platform.redis() as redis:
        write_trend(redis, read_trend(platform.lake, hour), settings.cache.ttl_seconds)
    for step in range(plan.steps):
        yield dg.DynamicOutput(None, mapping_key=str(step))


@dg.op(ins={"plan": dg.In(dg.Nothing)}, out=dg.Out(dg.Nothing), retry_policy=dg.RetryPolicy(max_retries=2, delay=2))
def rec_cache_shards(context: dg.OpExecutionContext, platform: PlatformResource) -> None:
    """The answers for some shards of the users. What another attempt has done of them is left as it is."""
    plan = own_plan(context, platform)
    if plan is None:
        context.log.info("another run makes newer caches")
        return
    step = int(context.get_mapping_key() or 0)
    snapshot = platform.snapshot(plan.release_id, plan.manifest_sha256)
    trend = Trend.of(snapshot, read_trend(platform.lake, plan.hour).scores)
    with platform.redis() as redis:
        for shard, done in write_shards(redis, platform.lake, plan, step, snapshot, trend, platform.settings):
            context.log.info(f"shard {shard} of {plan.shards}: {done.users} users in {done.ended - done.started:.1f} s")


@dg.op(ins={"shards": dg.In(dg.Nothing)}, out=dg.Out(dg.Nothing))
def rec_cache_report(context: dg.OpExecutionContext, platform: PlatformResource) -> dg.Output[None]:
    """What all steps have written, in numbers and by some users."""
    plan = own_plan(context, platform)
    if plan is None:
        newest = platform.lake.latest(ACTIVE_USERS)
        return dg.Output(None, metadata={"left to another run": f"the caches are those of {newest}"})
    report = finish_caches(platform.lake, plan)
    platform.releases.forget(platform.release_copies, {plan.release_id})
    with platform.redis() as redis:
        samples = read_samples(redis, platform.lake, plan.hour)
    return dg.Output(
        None,
        metadata={
            "active users": plan.active,
            "users written": report.users,
            "users without any item": report.empty,
            **left_out(report),
            "users a second": round(report.users_per_second),
            "release_id": plan.release_id,
            "samples": recommendations_table(platform.lake, samples),
        },
    )


@dg.graph_asset(
    ins=CACHES_FROM,
    partitions_def=hourly,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"redis", "spark"},
)
def rec_cache(clicks_hourly: Any, champion: Any, online_features: Any, trending_items: Any) -> Any:
    """The top items of every user active in the last hours, ranked with the champion release, in Redis.

    The users are taken in shards, over which [cache] parallel_steps work. An hour that is made up for later writes nothing
    over the caches of a newer one.
    """
    steps = rec_cache_plan(
        clicks_hourly=clicks_hourly, champion=champion, online_features=online_features, trending_items=trending_items
    )
    return rec_cache_report(steps.map(rec_cache_shards).collect())


def left_out(report: WriteReport) -> dict[str, Any]:
    """How many users were left out, and why. The log of the step names the first of them, which the metadata outlive."""
    count = sum(report.left_out.values())
    why = {"why they were left out": table(["reason", "users"], sorted(report.left_out.items()))} if count else {}
    return {"users left out": count, **why}


def asked_by(context: dg.OpExecutionContext) -> str:
    """The run, or the one that it executes again."""
    return context.run.root_run_id or context.run_id


def own_plan(context: dg.OpExecutionContext, platform: Platform) -> CachePlan | None:
    """The newest plan of the caches, None where another run has made one since."""
    plan = read_plan(platform.lake)
    return plan if plan is not None and (plan.hour, plan.run) == (context.partition_key, asked_by(context)) else None


def with_titles(platform: Platform, rows: list[dict]) -> list[list[object]]:
    """Rows of a ranked table with the item's title in place of its id where the catalogue has one."""
    names = names_of(platform.lake, [row["item_id"] for row in rows])
    return [[names[row["item_id"]], *list(row.values())[1:]] for row in rows]
