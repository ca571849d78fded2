"""Retrieval: the vector index over the items."""

import dagster as dg

from recsys_assets.models import als_factors
from recsys_assets.partitions import daily
from recsys_assets.reports import recall_plot, table
from recsys_assets.resources import PlatformResource
from recsys_core.bundle import build_item_index


@dg.asset(
    deps=[als_factors, "item_catalog"],
    partitions_def=daily,
    group_name="retrieval",
    owners=["team:ml-engineering"],
    kinds={"faiss"},
    pool="training",
)
def item_index(context: dg.AssetExecutionContext, platform: PlatformResource) -> dg.MaterializeResult:
    """FAISS HNSW over the item factors, by inner product and by cosine, tuned to the recall target on available items."""
    part, reports = build_item_index(platform.lake, context.partition_key, platform.settings)
    rows = [[r.metric, r.ef_search, r.recall, r.curve[-1].milliseconds, r.build_seconds] for r in reports]
    return dg.MaterializeResult(
        metadata={
            "items": part.rows,
            "dimension": reports[0].dimension,
            "bytes": part.bytes,
            "lowest recall@50": round(min(r.recall for r in reports), 4),
            "indexes": table(["metric", "efSearch", "recall@50", "ms a query", "build seconds"], rows),
            "recall and latency": recall_plot(reports, platform.settings.index.recall_target),
        },
        data_version=dg.DataVersion(part.data_version),
    )
