"""What a hit costs the serving process on a Redis Cluster of three masters, beside a standalone Redis, in turns.

    python benchmarks/serving_cluster.py [--users 20000] [--items 40000] [--seconds 5] [--rounds 5]

Two servers of one release and the same cached answers; `run_load` asks one after the other, `rounds` times each. The ratio is
the median of the rounds' ratios of processor time a call.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from load import Load, run_load, write_requests
from rich.console import Console
from rich.table import Table
from serving_latency import BATCH, METHOD, REPOSITORY, SERVING, fill, process

from recsys_cli.stack import redis_server
from recsys_core.redis_client import client
from recsys_core.release import Releases
from recsys_core.settings import Settings, load_settings
from recsys_core.stores import open_filesystem
from serving import recsys_pb2 as pb

sys.path.insert(0, str(REPOSITORY / "tests"))
from redis_cluster import redis_cluster
from snapshots import make_manifest, make_snapshot

KINDS = ("standalone", "cluster")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--items", type=int, default=40_000)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    console = Console()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(redis_server(folder))
        nodes = stack.enter_context(redis_cluster(folder))
        of_kind: dict[str, Settings] = {
            "standalone": load_settings(home=folder, redis={"url": url}),
            "cluster": load_settings(home=folder, redis={"mode": "cluster", "nodes": nodes}),
        }
        snapshot = make_snapshot(items=options.items, rank=64)
        releases = Releases(of_kind["standalone"].releases_uri)
        open_filesystem(releases.uri)[0].makedirs(releases.root, exist_ok=True)
        releases.write(make_manifest(snapshot), snapshot)
        releases.promote(snapshot.release_id)
        servers = {}
        for kind, settings in of_kind.items():
            with console.status(f"filling the {kind} Redis"):
                connected = client(settings.redis)
                fill(connected, snapshot, settings, options.users)
                connected.close()
            env = {
                "RECSYS_HOME": str(folder),
                "RECSYS_REDIS__URL": url,
                "RECSYS_REDIS__MODE": settings.redis.mode,
                "RECSYS_REDIS__NODES": f'["{nodes[0]}"]',
                "RECSYS_SERVING__PORT": "0",
                "PYTHONPATH": str(REPOSITORY),
            }
            servers[kind] = stack.enter_context(process(SERVING, folder, env))
        ids = [f"user-{number}" for number in range(0, options.users, 2)]
        hits = [pb.RecommendRequest(user_id=user_id, count=10).SerializeToString() for user_id in ids]
        batches = [
            pb.RecommendBatchRequest(user_ids=ids[at : at + 1000], count=10).SerializeToString()
            for at in range(0, len(ids), 1000)
        ]
        asked = [
            ("cache hit", METHOD, write_requests(folder / "hits", hits), 1),
            ("cache hit", METHOD, folder / "hits", 32),
            ("batch of 1000", BATCH, write_requests(folder / "batches", batches), 1),
        ]
        table = Table("calls", "callers", *(f"{kind}: p50 ms, calls/s, cpu ms" for kind in KINDS), "cpu, cluster / standalone")
        for name, method, requests, callers in asked:
            loads: dict[str, list[Load]] = {kind: [] for kind in KINDS}
            for at in range(options.rounds):
                for kind in KINDS:
                    with console.status(f"{name}, {callers} callers, round {at + 1} of {options.rounds}: {kind}"):
                        address, server, _ = servers[kind]
                        loads[kind].append(run_load(address, method, requests, options.seconds, callers, server))
            assert not any(load.failed for some in loads.values() for load in some)
            ratio = np.median([c.cpu_ms / s.cpu_ms for s, c in zip(loads["standalone"], loads["cluster"], strict=True)])
            table.add_row(name, str(callers), *(_figures(loads[kind]) for kind in KINDS), f"{ratio:.2f}")
        console.print(table)


def _figures(loads: list[Load]) -> str:
    p50, rate, cpu_ms = np.median([[load.percentile(50), load.rate, load.cpu_ms] for load in loads], axis=0).tolist()
    return f"{p50:.2f}, {rate:,.0f}, {cpu_ms:.3f}"


if __name__ == "__main__":
    main()
