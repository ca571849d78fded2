"""MLflow runs of the graph's trainings: which Dagster run made them, from which data, and the link back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import dagster as dg

from recsys_assets.resources import Platform
from recsys_core.registry import ASSET_TAG, PARTITION_TAG, RUN_TAG, RegistryRun


@contextmanager
def tracked(
    context: dg.AssetExecutionContext, platform: Platform, params: Mapping[str, Any], tables: tuple[str, ...]
) -> Iterator[RegistryRun]:
    """A run named as asset and partition, with `params` and the partition of each of `tables` as its datasets.

    The Dagster run and asset are its tags, so that a search in MLflow finds them; `link()` of the run goes into the metadata.
    """
    asset, day = context.asset_key.to_user_string(), context.partition_key
    tags = {RUN_TAG: context.run_id, ASSET_TAG: asset, PARTITION_TAG: day}
    with platform.registry.run(f"{asset} {day}", tags) as run:
        run.log_params(params)
        found = {table: platform.lake.find(table, day) for table in tables}
        sources = {name: {"partition": day, "data_version": part.data_version} for name, part in found.items() if part}
        run.log_inputs(sources, platform.lake.uri)
        yield run
