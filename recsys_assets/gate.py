"""The gate: the blocking check between a release and its promotion to champion."""

from collections.abc import Sequence

import dagster as dg

from recsys_assets.reports import verdict_table
from recsys_assets.resources import PlatformResource
from recsys_assets.serving import release
from recsys_core.evaluation import EVALUATION
from recsys_core.gate import challenge
from recsys_core.release import ReleaseError


@dg.asset_check(asset=release, blocking=True)
def challenger_beats_champion(context: dg.AssetCheckExecutionContext, platform: PlatformResource) -> dg.AssetCheckResult:
    """The new release ranks as well as the champion for the same users on the same day, and keeps the guardrails."""
    try:
        verdicts = [challenge(platform.lake, platform.releases, day, platform.settings) for day in _days(context, platform)]
    except ReleaseError as error:
        return dg.AssetCheckResult(passed=False, metadata={"reason": str(error)})
    if not verdicts:
        return dg.AssetCheckResult(passed=False, metadata={"reason": "there is no release to judge"})
    verdict = next((v for v in verdicts if not v.passed), verdicts[-1])
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


def _days(context: dg.AssetCheckExecutionContext, platform: PlatformResource) -> Sequence[str]:
    """The days of the run, else the latest that was evaluated."""
    if context.has_partition_key or context.has_partition_key_range:
        return list(context.partition_keys)
    latest = platform.lake.latest(EVALUATION)
    return [latest] if latest else []
