"""Random disturbances for as long as wanted: workers killed, frozen, added and ended, then the proof that nothing was lost.

    PYTHONPATH=.:tests/streaming python benchmarks/stream_chaos.py [--rounds 20] [--seconds 20] [--seed 1]

Each round has a topic, a group and users of its own on one real Kafka and one real Redis; it ends with Redis compared to
a computation event by event, and with each offset counted in the landing zone. The tests run short rounds of the same.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

from stream_world import World, broker_or_skip, disturb

from recsys_cli.stack import redis_server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, broker_or_skip(Path(folder) / "kafka") as broker:
        with redis_server(Path(folder)) as url:
            for seed in range(options.seed, options.seed + options.rounds):
                home = Path(folder) / str(seed)
                home.mkdir()
                world = World.make(broker.address, url, home)
                started = time.monotonic()
                actions = disturb(world, random.Random(seed), options.seconds)
                world.settle(seconds=300)
                world.prove()
                world.close()
                done = f"{world.sent:,} events, {dict(actions)}, {time.monotonic() - started:.0f} s"
                print(f"seed {seed}: {done}: equal, each offset once", flush=True)


if __name__ == "__main__":
    main()
