"""Latency and throughput of the serving process against a bare grpc.aio echo server, on a made-up release.

    python benchmarks/serving_latency.py [--users 100000] [--items 40000] [--seconds 5] [--rounds 5] [--processes 1] [--ghz G]

Starts a Redis, the serving processes and as many echo processes on one port; the load comes from processes of their own, or
from `ghz` (ghz.sh) where its path is given. Echo and server take turns, `rounds` each: the table has the medians, and the
share of the echo's rate is the median of the rounds' shares. `cpu ms` is what the server's processes spend on a call: unlike
the rates it hardly depends on what else runs, and its inverse is what one core could do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import redis
from load import Load, cpu_seconds, run_load, write_requests
from rich.console import Console
from rich.table import Table

from recsys_cli.stack import redis_server
from recsys_core.online import AnswerEncoder, UserRecord, users_of, write_answers, write_records
from recsys_core.ranking import Snapshot, Trend, rank
from recsys_core.release import Releases
from recsys_core.settings import Settings, load_settings
from recsys_core.stores import open_filesystem
from serving import recsys_pb2 as pb

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))
from snapshots import make_manifest, make_snapshot  # noqa: E402

METHOD = "/recsys.v1.Recommender/Recommend"
BATCH = "/recsys.v1.Recommender/RecommendBatch"
SERVING = """
import pathlib, sys
from recsys_core.settings import load_settings
from serving.server import main
def announce(address):
    pathlib.Path(sys.argv[1]).with_suffix(".tmp").write_text(address)
    pathlib.Path(sys.argv[1]).with_suffix(".tmp").rename(sys.argv[1])
sys.exit(main(load_settings(), announce))
"""
ECHO = """
import asyncio, os, pathlib, sys
import grpc, uvloop
async def echo(data, context):
    return data
async def main(port, on_ready):
    server = grpc.aio.server(options=[("grpc.so_reuseport", 1)])
    handler = grpc.unary_unary_rpc_method_handler(echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("recsys.v1.Recommender", {"Recommend": handler}),))
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    on_ready(bound)
    await server.wait_for_termination()
def child(port):
    uvloop.run(main(port, lambda _: None))
if __name__ == "__main__":
    import socket, subprocess
    if len(sys.argv) > 2:
        child(int(sys.argv[2]))
    else:
        with socket.socket() as held:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            held.bind(("127.0.0.1", 0))
            port = held.getsockname()[1]
            program = os.environ["ECHO_PROGRAM"]
            count = int(os.environ["ECHO_PROCESSES"])
            children = [subprocess.Popen([sys.executable, "-c", program, "-", str(port)]) for _ in range(count)]
            import time
            time.sleep(2)
            pathlib.Path(sys.argv[1]).write_text(f"127.0.0.1:{port}")
            import signal
            signal.signal(signal.SIGTERM, lambda *_: None)
            signal.pause()
            for process in children:
                process.terminate()
"""


@contextmanager
def process(program: str, folder: Path, env: dict[str, str]) -> Iterator[tuple[str, psutil.Process, float]]:
    """A child, the address it announces, and the seconds until then."""
    ready = folder / f"{time.time_ns()}.address"
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-c", program, str(ready)], env={**os.environ, **env}, cwd=folder)
    try:
        while not ready.exists() or not ready.read_text():
            if child.poll() is not None:
                raise RuntimeError("the process has ended")
            time.sleep(0.005)
        yield ready.read_text(), psutil.Process(child.pid), time.perf_counter() - started
    finally:
        child.terminate()
        child.wait()


def fill(client: Any, snapshot: Snapshot, settings: Settings, users: int) -> None:
    """Users `user-<i>` with a record and, for those of even number, a cached answer."""
    random = np.random.default_rng(1)
    encoder = AnswerEncoder(snapshot.release_id, snapshot.item_ids)
    trend = Trend.of(snapshot, {})
    now = time.time_ns() // 1_000_000
    items, rank_ = snapshot.als_items.shape
    for at in range(0, users, 5000):
        ids = [f"user-{i}" for i in range(at, min(at + 5000, users))]
        records = [
            UserRecord(
                tuple((snapshot.item_ids[i], "view", now - 60_000) for i in random.integers(0, items, 5)),
                now - 60_000,
                tuple(snapshot.item_ids[i] for i in random.integers(0, items, 50)),
                snapshot.als_version,
                snapshot.als_items[random.integers(0, items)] + random.normal(size=rank_).astype(np.float32),
            )
            for _ in ids
        ]
        write_records(client, zip(ids, records, strict=True), 3600)
        users_ = users_of(snapshot, records[::2], settings.ranking)
        ranked = rank(snapshot, trend, users_, settings.cache.items, settings.ranking)
        write_answers(client, zip(ids[::2], encoder.encode(ranked.positions, ranked.scores, now), strict=True), 3600)


def of_ghz(ghz: str, address: str, data: Path, callers: int, seconds: float, server: psutil.Process) -> Load:
    """The load of `ghz` on Recommend."""
    before = cpu_seconds(server)
    command = [
        ghz,
        "--insecure",
        "--proto",
        str(REPOSITORY / "serving/recsys.proto"),
        "--call",
        "recsys.v1.Recommender.Recommend",
    ]
    command += ["--data-file", str(data), "--concurrency", str(callers), "--connections", str(min(callers, 8)), "--cpus", "1"]
    command += ["--duration", f"{seconds}s", "--duration-stop", "wait", "--format", "json", "--lb-strategy=", address]
    said = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    spent = cpu_seconds(server) - before
    took = np.array([d["latency"] / 1e6 for d in said["details"] if d["status"] == "OK"])
    failed = {status: count for status, count in said["statusCodeDistribution"].items() if status != "OK"}
    return Load(took, np.zeros(len(took)), failed, said["rps"], spent * 1000 / max(said["count"], 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--items", type=int, default=40_000)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--ghz", default="")
    options = parser.parse_args()
    console = Console()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(redis_server(folder))
        settings = load_settings(home=folder, redis={"url": url})
        with console.status(f"making a release of {options.items} items"):
            snapshot = make_snapshot(items=options.items, rank=64)
            releases = Releases(settings.releases_uri)
            open_filesystem(settings.releases_uri)[0].makedirs(releases.root, exist_ok=True)
            releases.write(make_manifest(snapshot), snapshot)
            releases.promote(snapshot.release_id)
            fill(redis.Redis.from_url(url), snapshot, settings, options.users)
        env = {
            "RECSYS_HOME": str(folder),
            "RECSYS_REDIS__URL": url,
            "RECSYS_SERVING__PORT": "0",
            "RECSYS_SERVING__PROCESSES": str(options.processes),
            "PYTHONPATH": str(REPOSITORY),
            "ECHO_PROGRAM": ECHO,
            "ECHO_PROCESSES": str(options.processes),
        }
        serving, server, ready = stack.enter_context(process(SERVING, folder, env))
        echo, echo_server, _ = stack.enter_context(process(ECHO, folder, env))

        hits = [pb.RecommendRequest(user_id=f"user-{i}", count=10) for i in range(0, options.users, 2)]
        hit = write_requests(folder / "hits", [r.SerializeToString() for r in hits])
        data, echoed = folder / "hits.json", folder / "echoed.json"
        data.write_text(json.dumps([{"user_id": r.user_id, "count": 10} for r in hits[:5000]]))
        # ghz reads what comes back as a RecommendResponse: the id as an item of it, the count as its tier.
        as_item = [f"\n{chr(len(r.user_id))}{r.user_id}" for r in hits[:5000]]
        echoed.write_text(json.dumps([{"user_id": user_id, "count": 3} for user_id in as_item]))
        misses = [
            pb.RecommendRequest(user_id=f"user-{i}", count=10, context={"current_item_id": snapshot.item_ids[i % 1000]})
            for i in range(1, options.users, 2)
        ]
        miss = write_requests(folder / "misses", [r.SerializeToString() for r in misses])
        ids = [r.user_id for r in hits]
        sizes = [pb.RecommendBatchRequest(user_ids=ids[at : at + 1000], count=10) for at in range(0, len(ids), 1000)]
        batch = write_requests(folder / "batches", [r.SerializeToString() for r in sizes])

        table = Table("calls", "callers", "p50 ms", "p99 ms", "calls/s", "of the echo's", "cpu ms", "failed")
        table.title = f"{options.items} items, {options.users} users, {options.processes} processes, {os.cpu_count()} cores"

        def row(name: str, callers: int, loads: list[Load], share: str = "") -> None:
            numbers = np.median([[load.percentile(50), load.percentile(99), load.rate, load.cpu_ms] for load in loads], axis=0)
            p50, p99, rate, cpu_ms = numbers.tolist()
            failed = sum((Counter(load.failed) for load in loads), Counter())
            said = ", ".join(f"{count} {status}" for status, count in failed.items())
            table.add_row(name, str(callers), f"{p50:.2f}", f"{p99:.2f}", f"{rate:,.0f}", share, f"{cpu_ms:.3f}", said)

        def load_on(address: str, server_: psutil.Process, callers: int) -> Load:
            if options.ghz:
                sent = echoed if address == echo else data
                return of_ghz(options.ghz, address, sent, callers, options.seconds, server_)
            return run_load(address, METHOD, hit, options.seconds, callers, server_)

        for callers in (1, 32):
            of_echo, of_hits = [], []
            for at in range(options.rounds):
                with console.status(f"{callers} callers, round {at + 1} of {options.rounds}"):
                    of_echo.append(load_on(echo, echo_server, callers))
                    of_hits.append(load_on(serving, server, callers))
            share = np.median([hits_.rate / echo_.rate for echo_, hits_ in zip(of_echo, of_hits, strict=True)])
            row("bare echo", callers, of_echo)
            row("cache hit", callers, of_hits, f"{share:.0%}")
        with console.status("batches"):
            row("batch of 1000, cache hits", 1, [run_load(serving, BATCH, batch, options.seconds, 1, server)])
        with console.status("misses"):
            load = run_load(serving, METHOD, miss, options.seconds, 1, server, rate=100.0)
            row("miss, 100 calls/s", 1, [load])
        console.print(table)
        rss = sum(p.memory_info().rss for p in (server, *server.children(recursive=True))) / 2**20
        console.print(f"start to ready {ready:.2f} s, RSS {rss:.0f} MB")


if __name__ == "__main__":
    main()
