"""Asset checks, each named as the claim it makes."""

import dagster as dg
import numpy as np
import pyarrow.dataset as ds

from recsys_assets.features import interactions
from recsys_assets.ingestion import clicks_hourly
from recsys_assets.models import als_factors
from recsys_assets.reports import verdict_table
from recsys_assets.resources import PlatformResource
from recsys_assets.retrieval import item_index
from recsys_assets.serving import champion, rec_cache, release
from recsys_core.als import iter_factors
from recsys_core.bundle import ALS_FACTORS, ITEM_INDEX, METRICS
from recsys_core.evaluation import EVALUATION
from recsys_core.events import HOUR_MS, TS, key_start_ms
from recsys_core.gate import challenge
from recsys_core.online import CachedAnswer, recs_key
from recsys_core.popularity import READ_ROWS
from recsys_core.release import ReleaseError
from recsys_core.tables import ACTIVE_USERS, CLICKS_HOURLY, INTERACTIONS


def _partitions(context: dg.AssetCheckExecutionContext, latest: str | None) -> list[str]:
    """The partitions of the run, else the latest that exists."""
    if context.has_partition_key or context.has_partition_key_range:
        return list(context.partition_keys)
    return [latest] if latest else []


@dg.asset_check(asset=clicks_hourly)
def event_ids_are_unique(context: dg.AssetCheckExecutionContext, platform: PlatformResource) -> dg.AssetCheckResult:
    """No event is counted twice within its hour."""
    repeated, rows = {}, 0
    for hour in _partitions(context, platform.lake.latest(CLICKS_HOURLY)):
        dataset = platform.lake.dataset(CLICKS_HOURLY, [hour])
        ids = dataset.to_table(columns=["event_id"])["event_id"] if dataset else None
        if ids is not None:
            rows += len(ids)
            twice = len(ids) - len(ids.unique())
            if twice:
                repeated[hour] = twice
    return dg.AssetCheckResult(passed=not repeated, metadata={"rows": rows, "repeated ids by hour": repeated})


@dg.asset_check(asset=clicks_hourly)
def events_lie_in_their_hour(context: dg.AssetCheckExecutionContext, platform: PlatformResource) -> dg.AssetCheckResult:
    """The time of every event is inside its partition."""
    outside = {}
    for hour in _partitions(context, platform.lake.latest(CLICKS_HOURLY)):
        dataset = platform.lake.dataset(CLICKS_HOURLY, [hour])
        if dataset is not None:
            start = key_start_ms(hour)
            count = dataset.count_rows(filter=(ds.field(TS) < start) | (ds.field(TS) >= start + HOUR_MS))
            if count:
                outside[hour] = count
    return dg.AssetCheckResult(passed=not outside, metadata={"events outside by hour": outside})


@dg.asset_check(asset=interactions, blocking=True)
def weights_are_positive_and_finite(context: dg.AssetCheckExecutionContext, platform: PlatformResource) -> dg.AssetCheckResult:
    """Every weight is a finite number above zero, so that a model can be fitted."""
    bad = rows = 0
    for day in _partitions(context, platform.lake.latest(INTERACTIONS)):
        dataset = platform.lake.dataset(INTERACTIONS, [day])
        for batch in dataset.to_batches(columns=["weight"], batch_size=READ_ROWS) if dataset else ():
            weights = batch["weight"].to_numpy(zero_copy_only=False)
            rows += len(weights)
            bad += int(np.count_nonzero(~(np.isfinite(weights) & (weights > 0))))
    return dg.AssetCheckResult(passed=rows > 0 and bad == 0, metadata={"rows": rows, "bad weights": bad})


@dg.asset_check(asset=als_factors, blocking=True)
def factors_are_finite_and_not_all_zero(
    context: dg.AssetCheckExecutionContext, platform: PlatformResource
) -> dg.AssetCheckResult:
    """Users and items have usable vectors."""
    counts = {"vectors": 0, "not finite": 0, "zero": 0}
    for day in _partitions(context, platform.lake.latest(ALS_FACTORS)):
        for side in ("users", "items"):
            for part in iter_factors(platform.lake, ALS_FACTORS, day, side):
                counts["vectors"] += len(part.ids)
                counts["not finite"] += int((~np.isfinite(part.vectors)).any(axis=1).sum())
                counts["zero"] += int((~part.vectors.any(axis=1)).sum())
    passed = counts["not finite"] == 0 and counts["zero"] < counts["vectors"]
    return dg.AssetCheckResult(passed=passed, metadata={**counts})


@dg.asset_check(asset=item_index)
def recall_reaches_its_target(context: dg.AssetCheckExecutionContext, platform: PlatformResource) -> dg.AssetCheckResult:
    """recall@50 of each index is at least the target."""
    target = platform.settings.index.recall_target
    short: dict[str, float] = {}
    for day in _partitions(context, platform.lake.latest(ITEM_INDEX)):
        extra = platform.lake.get(ITEM_INDEX, day).extra
        short |= {f"{day} {m}": extra[m]["recall"] for m in METRICS if extra[m]["recall"] < target}
    return dg.AssetCheckResult(
        passed=not short, severity=dg.AssetCheckSeverity.WARN, metadata={"target": target, "below it": short}
    )


@dg.asset_check(asset=release, blocking=True)
def challenger_beats_champion(context: dg.AssetCheckExecutionContext, platform: PlatformResource) -> dg.AssetCheckResult:
    """The new release ranks as well as the champion for the same users on the same day, and keeps the guardrails."""
    days = _partitions(context, platform.lake.latest(EVALUATION))
    try:
        verdicts = [challenge(platform.lake, platform.releases, day, platform.settings) for day in days]
    except ReleaseError as error:
        return dg.AssetCheckResult(passed=False, metadata={"reason": str(error)})
    if not verdicts:
        return dg.AssetCheckResult(passed=False, metadata={"reason": "there is no release to judge"})
    verdict = verdicts[-1]
    return dg.AssetCheckResult(
        passed=all(v.passed for v in verdicts),
        description=verdict.reason,
        metadata={
            "reason": verdict.reason,
            "challenger": verdict.release_id,
            "champion": verdict.champion_id or "none",
            "scores": verdict_table(verdict),
        },
    )


@dg.asset_check(asset=champion)
def champion_verifies(platform: PlatformResource) -> dg.AssetCheckResult:
    """The release that serving reads is complete and unchanged."""
    try:
        pointer = platform.releases.champion()
        if pointer is None:
            return dg.AssetCheckResult(passed=False, metadata={"reason": "no release has been promoted"})
        platform.releases.load(pointer.release_id, pointer.manifest_sha256)
    except ReleaseError as error:
        return dg.AssetCheckResult(passed=False, metadata={"reason": str(error)})
    return dg.AssetCheckResult(passed=True, metadata={"release_id": pointer.release_id})


@dg.asset_check(asset=rec_cache)
def active_users_have_an_answer(context: dg.AssetCheckExecutionContext, platform: PlatformResource) -> dg.AssetCheckResult:
    """Of the users active in the last hours, those sampled have a cached answer with items."""
    missing, looked_at = [], 0
    for hour in _partitions(context, platform.lake.latest(ACTIVE_USERS)):
        dataset = platform.lake.dataset(ACTIVE_USERS, [hour])
        users = dataset.head(1000, columns=["user_id"])["user_id"].to_pylist() if dataset else []
        looked_at += len(users)
        with platform.redis() as redis:
            values = redis.mget([recs_key(user) for user in users]) if users else []
        missing += [u for u, v in zip(users, values, strict=True) if v is None or not len(CachedAnswer.decode(v).ends)]
    return dg.AssetCheckResult(passed=not missing, metadata={"users looked at": looked_at, "without an answer": missing[:20]})
