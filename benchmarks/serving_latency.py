"""Latency and throughput of the serving process against a bare grpc.aio echo server, on a made-up release.

    python benchmarks/serving_latency.py [--users 5000] [--items 40000] [--seconds 5]

Starts a Redis, a serving process and an echo process; calls them from this process over loopback.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import numpy as np
import psutil
import redis
from rich.console import Console
from rich.table import Table

from recsys_cli.stack import redis_server
from recsys_core.lake import open_filesystem
from recsys_core.online import AnswerEncoder, UserRecord, users_of, write_answers, write_records
from recsys_core.ranking import Snapshot, Trend, rank
from recsys_core.release import Releases
from recsys_core.settings import Settings, load_settings
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
sys.exit(main(load_settings(), lambda address: pathlib.Path(sys.argv[1]).write_text(address)))
"""
ECHO = """
import asyncio, pathlib, sys
import grpc, uvloop
async def echo(data, context):
    return data
async def main():
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    handler = grpc.unary_unary_rpc_method_handler(echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("recsys.v1.Recommender", {"Recommend": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    pathlib.Path(sys.argv[1]).write_text(f"127.0.0.1:{port}")
    await server.wait_for_termination()
uvloop.run(main())
"""

Call = Callable[[grpc.aio.Channel, int], Awaitable[bytes]]


@contextmanager
def process(program: str, folder: Path, env: dict[str, str]) -> Iterator[tuple[str, psutil.Process, float]]:
    """A child, the address it announces, and the seconds until then."""
    ready = folder / f"{time.time_ns()}.address"
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-c", program, str(ready)], env={**os.environ, **env}, cwd=folder)
    try:
        while not (ready.exists() and ready.read_text()):
            if child.poll() is not None:
                raise RuntimeError("the process has ended")
            time.sleep(0.005)
        yield ready.read_text(), psutil.Process(child.pid), time.perf_counter() - started
    finally:
        child.terminate()
        child.wait()


def fill(url: str, snapshot: Snapshot, settings: Settings, users: int) -> float:
    """Users `user-<i>` with a record and, for those of even number, a cached answer. Returns ranked users a second."""
    client = redis.Redis.from_url(url)
    random = np.random.default_rng(1)
    encoder = AnswerEncoder(snapshot.release_id, snapshot.item_ids)
    trend = Trend.of(snapshot, {})
    now = time.time_ns() // 1_000_000
    ids = [f"user-{i}" for i in range(users)]
    records = [
        UserRecord(
            tuple((snapshot.item_ids[i], "view", now - 60_000) for i in random.integers(0, len(snapshot.item_ids), 5)),
            now - 60_000,
            tuple(snapshot.item_ids[i] for i in random.integers(0, len(snapshot.item_ids), 50)),
            snapshot.als_version,
            snapshot.als_items[random.integers(0, len(snapshot.item_ids))] + random.normal(size=snapshot.als_items.shape[1]),
        )
        for _ in ids
    ]
    write_records(client, zip(ids, records, strict=True), 3600)
    started = time.perf_counter()
    ranked = rank(snapshot, trend, users_of(snapshot, records[::2], settings.ranking), settings.cache.items, settings.ranking)
    speed = len(records[::2]) / (time.perf_counter() - started)
    write_answers(client, zip(ids[::2], encoder.encode(ranked.positions, ranked.scores, now), strict=True), 3600)
    return speed


async def load(address: str, callers: int, seconds: float, call: Call) -> tuple[np.ndarray, float]:
    """Milliseconds of each call, and calls a second, from `callers` that each call one after the other."""
    took: list[float] = []
    async with grpc.aio.insecure_channel(address) as channel:
        await channel.channel_ready()
        end = time.perf_counter() + seconds

        async def caller(number: int) -> None:
            at = number
            while time.perf_counter() < end:
                started = time.perf_counter()
                await call(channel, at)
                took.append((time.perf_counter() - started) * 1000)
                at += callers

        started = time.perf_counter()
        await asyncio.gather(*(caller(i) for i in range(callers)))
        return np.array(took), len(took) / (time.perf_counter() - started)


def recommend(users: int, odd: int, **fields: object) -> Call:
    requests = [pb.RecommendRequest(user_id=f"user-{i}", count=10, **fields).SerializeToString() for i in range(odd, users, 2)]
    return lambda channel, at: channel.unary_unary(METHOD)(requests[at % len(requests)])


def batch(users: int, size: int) -> Call:
    ids = [f"user-{i}" for i in range(0, users, 2)]
    request = pb.RecommendBatchRequest(user_ids=(ids * (size // len(ids) + 1))[:size], count=10).SerializeToString()
    return lambda channel, _: channel.unary_unary(BATCH)(request)


def main() -> None:
    import uvloop

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=5000)
    parser.add_argument("--items", type=int, default=40_000)
    parser.add_argument("--seconds", type=float, default=5.0)
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
            speed = fill(url, snapshot, settings, options.users)
        env = {"RECSYS_HOME": str(folder), "RECSYS_REDIS__URL": url, "RECSYS_SERVING__PORT": "0"}
        serving, server, ready = stack.enter_context(process(SERVING, folder, env))
        echo, _, _ = stack.enter_context(process(ECHO, folder, {}))

        table = Table("calls", "callers", "p50 ms", "p99 ms", "calls/s", title=f"{options.items} items, {os.cpu_count()} cores")
        hit = recommend(options.users, 0)
        rows: list[tuple[str, str, int, Call]] = [
            ("bare echo", echo, 1, hit),
            ("cache hit", serving, 1, hit),
            ("computed (explain)", serving, 1, recommend(options.users, 1, explain=True)),
            ("batch of 1000, cache hits", serving, 1, batch(options.users, 1000)),
            ("bare echo", echo, 32, hit),
            ("cache hit", serving, 32, hit),
        ]
        for name, address, callers, call in rows:
            with console.status(name):
                took, rate = uvloop.run(load(address, callers, options.seconds, call))
            p50, p99 = np.percentile(took, [50, 99])
            table.add_row(name, str(callers), f"{p50:.2f}", f"{p99:.2f}", f"{rate:,.0f}")
        console.print(table)
        console.print(f"start to ready {ready:.2f} s, RSS {server.memory_info().rss / 2**20:.0f} MB, rank {speed:,.0f} users/s")


if __name__ == "__main__":
    main()
