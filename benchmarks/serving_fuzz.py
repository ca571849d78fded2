"""Bad input by the ten thousand on the real port: statuses by number, and the server's memory before and after.

    python benchmarks/serving_fuzz.py [--calls 20000] [--seed 0]

Random bytes, and valid requests of every method with bytes changed, cut off and repeated. Exit code 1 on any other status than
OK, INVALID_ARGUMENT, NOT_FOUND and RESOURCE_EXHAUSTED, when the server has ended, and when its private memory has grown by more
than GROWTH_MB after a fifth of the calls.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import grpc
from rich.console import Console
from serving_latency import REPOSITORY, SERVING, process

from recsys_cli.stack import redis_server
from recsys_core.release import Releases
from recsys_core.settings import load_settings
from recsys_core.stores import open_filesystem
from serving import recsys_pb2 as pb

sys.path.insert(0, str(REPOSITORY / "tests"))
from snapshots import make_manifest, make_snapshot

ALLOWED = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"}
GROWTH_MB = 5
FILTER = {"min_price": 3, "max_price": 90, "attributes": [{"name": "colour", "values": ["red"]}]}
VALID = {
    "Recommend": pb.RecommendRequest(
        user_id="ann", count=10, categories=["sports"], exclude_item_ids=["item-1"], explain=True, filter=FILTER
    ),
    "RecommendBatch": pb.RecommendBatchRequest(user_ids=["ann", "bob"], context={"current_item_id": "item-7", "ts_ms": 5}),
    "RecommendStream": pb.RecommendRequest(user_id="ann", diversity={"relevance": 0.5, "max_per_category": 2}),
    "SimilarItems": pb.SimilarItemsRequest(item_id="item-1", same_category=True, filter=FILTER),
    "Trending": pb.TrendingRequest(count=5, categories=["books"]),
    "GetRelease": pb.GetReleaseRequest(),
}


def bad(valid: bytes, chance: random.Random) -> bytes:
    """Bytes that are seldom a request."""
    if chance.random() < 0.2:
        return chance.randbytes(chance.randrange(400))
    data = bytearray(valid)
    for _ in range(chance.randrange(1, 6)):
        at = chance.randrange(len(data) + 1)
        kind = chance.randrange(4)
        if kind == 0 and at < len(data):
            data[at] = chance.randrange(256)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = data * chance.randrange(1, 4)
        else:
            data[at:at] = chance.randbytes(chance.randrange(12))
    return bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    console = Console()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(redis_server(folder))
        settings = load_settings(home=folder)
        snapshot = make_snapshot()
        releases = Releases(settings.releases_uri)
        open_filesystem(settings.releases_uri)[0].makedirs(releases.root, exist_ok=True)
        releases.write(make_manifest(snapshot), snapshot)
        releases.promote(snapshot.release_id)
        env = {"RECSYS_HOME": str(folder), "RECSYS_REDIS__URL": url, "RECSYS_SERVING__PORT": "0", "PYTHONPATH": str(REPOSITORY)}
        address, server, _ = stack.enter_context(process(SERVING, folder, env))
        channel = stack.enter_context(grpc.insecure_channel(address))
        statuses: Counter[str] = Counter()
        memory = []
        for number in range(options.calls):
            if number in (options.calls // 5, options.calls - 1):
                memory.append(server.memory_full_info().uss / 2**20)
            method = chance.choice(sorted(VALID))
            data = bad(VALID[method].SerializeToString(), chance)
            path = f"/recsys.v1.Recommender/{method}"
            try:
                if method == "RecommendStream":
                    list(channel.stream_stream(path)(iter([data]), timeout=30))
                else:
                    channel.unary_unary(path)(data, timeout=30)
                statuses["OK"] += 1
            except grpc.RpcError as error:
                statuses[error.code().name] += 1
        console.print(dict(statuses), f"private memory after a fifth and at the end: {memory[0]:.0f}, {memory[1]:.0f} MB")
        if set(statuses) - ALLOWED or not server.is_running() or memory[1] - memory[0] > GROWTH_MB:
            sys.exit(1)


if __name__ == "__main__":
    main()
