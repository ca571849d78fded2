"""Releases swapped under load, and the soak: failed calls, latency around the swaps, memory.

    python benchmarks/serving_swap.py [--items 40000] [--seconds 60] [--every 10] [--rate 500] [--processes 1]

The soak of ten minutes: --seconds 600 --every 30 --rate <half of the capacity>. Half of the calls are cache hits, half are
computed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import redis
from load import run_load, write_requests
from rich.console import Console
from rich.table import Table
from serving_latency import METHOD, REPOSITORY, SERVING, fill, process

from recsys_cli.stack import redis_server
from recsys_core.release import Releases
from recsys_core.settings import load_settings
from recsys_core.stores import open_filesystem
from serving import recsys_pb2 as pb

sys.path.insert(0, str(REPOSITORY / "tests"))
from snapshots import make_manifest, make_snapshot

NEAR_SECONDS = 2.0
"""After a promotion: within it a swap is seen, loaded and done."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=40_000)
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=500.0)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    console = Console()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(redis_server(folder))
        settings = load_settings(home=folder, redis={"url": url})
        with console.status("making releases"):
            snapshot = make_snapshot("2026-01-01.a", items=options.items, rank=64)
            releases = Releases(settings.releases_uri)
            open_filesystem(settings.releases_uri)[0].makedirs(releases.root, exist_ok=True)
            for name in ("2026-01-01.a", "2026-01-02.b"):
                named = replace(snapshot, release_id=name)
                releases.write(make_manifest(named), named)
            releases.promote("2026-01-01.a")
            fill(redis.Redis.from_url(url), snapshot, settings, options.users)
        env = {
            "RECSYS_HOME": str(folder),
            "RECSYS_REDIS__URL": url,
            "RECSYS_SERVING__PORT": "0",
            "RECSYS_SERVING__PROCESSES": str(options.processes),
            "PYTHONPATH": str(REPOSITORY),
        }
        address, server, _ = stack.enter_context(process(SERVING, folder, env))
        requests = []
        for i in range(options.users):
            here = {"context": {"current_item_id": snapshot.item_ids[i % 1000]}} if i % 2 else {}
            requests.append(pb.RecommendRequest(user_id=f"user-{i}", count=10, **here).SerializeToString())
        file = write_requests(folder / "calls", requests)

        swaps: list[float] = []
        memory: list[float] = []
        done = threading.Event()
        begin = time.perf_counter()

        def swap() -> None:
            number = 0
            while not done.wait(options.every):
                number += 1
                swaps.append(time.perf_counter() - begin)
                releases.promote(("2026-01-02.b", "2026-01-01.a")[number % 2 == 0])
                memory.append(sum(p.memory_full_info().uss for p in (server, *server.children(recursive=True))) / 2**20)

        swapping = threading.Thread(target=swap)
        swapping.start()
        load = run_load(address, METHOD, file, options.seconds, 1, server, rate=options.rate)
        done.set()
        swapping.join()

        near = np.zeros(len(load.started), bool)
        for at in swaps:
            near |= (load.started >= at - 0.5) & (load.started < at + NEAR_SECONDS)
        table = Table(
            "calls", "number", "p50 ms", "p99 ms", "slowest ms", title=f"{options.items} items, {os.cpu_count()} cores"
        )
        for name, chosen in (("steady", ~near), ("around a swap", near)):
            took = load.milliseconds[chosen]
            if len(took):
                p50, p99 = np.percentile(took, [50, 99])
                table.add_row(name, f"{len(took):,}", f"{p50:.2f}", f"{p99:.2f}", f"{took.max():.1f}")
        console.print(table)
        console.print(f"{len(swaps)} swaps, failed calls: {load.failed or 'none'}, {load.rate:,.0f} calls/s")
        if memory:
            console.print(f"private memory at the swaps, MB: {', '.join(f'{m:.0f}' for m in memory)}")


if __name__ == "__main__":
    main()
