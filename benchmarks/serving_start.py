"""Start of a serving process on a release of a million items: seconds to the first answer, memory, misses.

    python benchmarks/serving_start.py [--items 1000000] [--rank 64] [--folder FOLDER]

The release is made up: clustered vectors, a graph of the real size built quickly, random similar items. With --folder it is
kept there and used again. The first start brings and verifies the files, the second finds them verified.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
from load import run_load, write_requests
from rich.console import Console
from rich.table import Table
from serving_latency import METHOD, REPOSITORY, SERVING, process

from recsys_cli.stack import redis_server
from recsys_core.index import VectorIndex, unit_rows
from recsys_core.ranking import Snapshot
from recsys_core.release import Releases
from recsys_core.settings import load_settings
from serving import recsys_pb2 as pb
from serving.client import RecsysClient

sys.path.insert(0, str(REPOSITORY / "tests"))
from snapshots import CATEGORIES, make_manifest

RELEASE = "2026-01-01.large"


def made_up(items: int, rank: int, console: Console) -> Snapshot:
    """A snapshot of many items."""
    import faiss

    random = np.random.default_rng(0)
    centers = random.normal(size=(500, rank))
    vectors = (centers[np.arange(items) % 500] + 0.4 * random.normal(size=(items, rank))).astype(np.float32)
    indexes = {}
    for metric in ("inner_product", "cosine"):
        with console.status(f"graph of {items} items ({metric})"):
            graph = faiss.IndexHNSWFlat(rank, 32, faiss.METRIC_INNER_PRODUCT)
            graph.hnsw.efConstruction = 16
            graph.add(unit_rows(vectors) if metric == "cosine" else vectors)
            indexes[metric] = VectorIndex(graph, metric, 128)
    table = pa.table(
        {
            "item_id": [f"item-{i}" for i in range(items)],
            "title": [f"Title {i}" for i in range(items)],
            "category": [CATEGORIES[i % len(CATEGORIES)] for i in range(items)],
            "price": random.uniform(1, 100, items),
            "available": np.ones(items, bool),
            "attributes": pa.nulls(items, pa.string()),
        }
    )
    return Snapshot(
        release_id=RELEASE,
        items=table,
        als_items=vectors,
        als_gram=vectors.T.astype(np.float64) @ vectors,
        als_version="factors-1",
        als_alpha=10.0,
        als_regularization=0.1,
        popular=np.round(1e6 / np.arange(1, items + 1)).astype(np.float32),
        similar=random.integers(0, items, (items, 50)).astype(np.int32),
        indexes=indexes,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    console = Console()
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        settings = load_settings(home=folder)
        releases = Releases(settings.releases_uri)
        if not (Path(releases.root) / RELEASE / "manifest.json").exists():
            snapshot = made_up(options.items, options.rank, console)
            releases.write(make_manifest(snapshot), snapshot)
            releases.promote(RELEASE)
        url = stack.enter_context(redis_server(folder))
        env = {
            "RECSYS_HOME": str(folder),
            "RECSYS_REDIS__URL": url,
            "RECSYS_SERVING__PORT": "0",
            "PYTHONPATH": str(REPOSITORY),
        }
        table = Table("start", "first answer s", "processor s", "RSS MB", "of it private MB", "miss p50 ms", "p99 ms", "failed")
        for name in ("first", "second"):
            began = time.perf_counter()
            with process(SERVING, folder, env) as (address, server, _):
                with RecsysClient(address, timeout=30) as client:
                    client.recommend("nobody")
                ready = time.perf_counter() - began
                times, memory = server.cpu_times(), server.memory_full_info()
                requests = [
                    pb.RecommendRequest(user_id=f"u{i}", context={"current_item_id": f"item-{i * 7919 % options.items}"})
                    for i in range(2000)
                ]
                file = write_requests(folder / "misses", [r.SerializeToString() for r in requests])
                load = run_load(address, METHOD, file, options.seconds, 1, psutil.Process(server.pid), rate=100.0)
                after = server.memory_full_info()
                table.add_row(
                    name,
                    f"{ready:.2f}",
                    f"{times.user + times.system:.2f}",
                    f"{memory.rss / 2**20:.0f}, {after.rss / 2**20:.0f} after the load",
                    f"{memory.uss / 2**20:.0f}",
                    f"{load.percentile(50):.2f}",
                    f"{load.percentile(99):.2f}",
                    str(load.failed or ""),
                )
        console.print(table)


if __name__ == "__main__":
    main()
