"""The check of the training examples, named as the claim it makes."""

import dagster as dg

from recsys_assets.features import training_examples
from recsys_assets.resources import PlatformResource
from recsys_core.catalog import read_catalog
from recsys_core.features import TRAINING_EXAMPLES
from recsys_core.leaks import find_leaks


@dg.asset_check(asset=training_examples, blocking=True)
def examples_see_only_the_past(context: dg.AssetCheckExecutionContext, platform: PlatformResource) -> dg.AssetCheckResult:
    """Sampled examples, made again from the clicks before them, come out the same, so that no model learns from its future."""
    latest = platform.lake.latest(TRAINING_EXAMPLES)
    whole_run = context.has_partition_key or context.has_partition_key_range
    days = list(context.partition_keys) if whole_run else [latest] if latest else []
    catalog = read_catalog(platform.lake)
    categories = dict(zip(catalog["item_id"].to_pylist(), catalog["category"].to_pylist(), strict=True))
    checked, wrong = 0, []
    for day in days:
        rows, found = find_leaks(platform.lake, day, categories, platform.settings)
        checked += rows
        wrong += [f"{day}, {line}" for line in found]
    # Of examples that are there, none made again is no proof.
    return dg.AssetCheckResult(
        passed=not wrong and (checked > 0 or not days),
        metadata={"examples made again": checked, "differences": len(wrong), "first of them": wrong[:10]},
    )
