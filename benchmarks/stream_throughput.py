"""Events a second of one worker of the speed layer: real Kafka, real Redis and the worker on the same cores, both sinks on.

    python benchmarks/stream_throughput.py [--events 2000000] [--users 100000] [--memory]

The topic is filled first, then a worker starts and takes it to its end. The clock runs from the first message that is
finished to the last. `--memory` also prints the worker's memory over time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import tempfile
import threading
import time
from contextlib import ExitStack
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psutil
import redis
from confluent_kafka import Producer

from recsys_cli.java import ensure_java
from recsys_cli.kafka import broker_server
from recsys_cli.stack import redis_server
from recsys_core.events import now_ms
from recsys_core.jars import Module, fetch_jars
from recsys_core.settings import Settings, load_settings
from streaming.kafka import KAFKA, LOGGER

QUIXSTREAMS_EVENTS = 200_000
"""Most events of its turn, which would last minutes otherwise."""
TYPES = ("view", "click", "like", "cart", "purchase")


def fill(settings: Settings, count: int, users: int, items: int, seed: int = 1) -> float:
    """Produce `count` events of the last ten minutes in order of time, users even, items by a Zipf law.

    Returns bytes an event.
    """
    chance = np.random.default_rng(seed)
    conf = {"linger.ms": 20, "batch.size": 500_000, "compression.type": "lz4", "queue.buffering.max.messages": 1_000_000}
    producer = Producer({"bootstrap.servers": settings.kafka.bootstrap_servers, **conf})
    size, began = 0, now_ms() - 600_000
    for start in range(0, count, 100_000):
        n = min(100_000, count - start)
        chosen = chance.integers(0, users, n).tolist()
        what = ((chance.zipf(1.2, n) - 1) % items).tolist()
        kinds = chance.choice(TYPES, n, p=[0.6, 0.25, 0.07, 0.05, 0.03]).tolist()
        ts = (began + (start + np.arange(n)) * 600_000 // count).tolist()
        for at in range(n):
            user = f"u{chosen[at]:06d}"
            event = {
                "v": 1,
                "event_id": f"e{start + at:012d}",
                "user_id": user,
                "item_id": f"i{what[at]:06d}",
                "event_type": kinds[at],
                "ts": ts[at],
                "session_id": f"s{chosen[at]:08d}",
                "device": "mobile",
                "country": "DE",
            }
            value = orjson.dumps(event)
            size += len(value)
            while True:
                try:
                    producer.produce(settings.kafka.topic, value, user)
                    break
                except BufferError:
                    producer.poll(0.1)
        producer.poll(0)
    producer.flush()
    return size / count


def work(settings: Settings, count: int, out: Queue[dict[str, Any]]) -> None:
    """Run a worker until it has finished `count` messages and report."""
    from streaming.worker import Worker

    worker = Worker(settings)
    thread = threading.Thread(target=worker.run)
    thread.start()
    me = psutil.Process()
    memory = []
    started = before = None
    while (done := worker.metrics.messages._value.get()) < count:
        if done and started is None:
            started, before = time.perf_counter(), done
        memory.append((done, me.memory_info().rss >> 20))
        time.sleep(0.02)
    seconds = time.perf_counter() - (started or 0)
    cpu = sum(me.cpu_times()[:2])
    report = {"rate": (count - (before or 0)) / seconds, "seconds": seconds, "cpu": cpu, "memory": memory}
    report["dead"] = sum(m.value for f in worker.metrics.dead_letters.collect() for m in f.samples)
    out.put(report)
    worker.stop()
    thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=2_000_000)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--items", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=1, help="fill and drain so many times with the same worker process")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--kafka-streams", action="store_true", help="the ratio to StreamsApp.java, with a JDK")
    parser.add_argument("--quixstreams", default="", help="a Python that has quixstreams: the ratio to quixstreams_app.py")
    options = parser.parse_args()
    with ExitStack() as held, tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        url = held.enter_context(redis_server(home))
        settings = load_settings(home, redis={"url": url})
        address = held.enter_context(broker_server(settings, or_embedded=False))
        settings = load_settings(home, redis={"url": url}, kafka={"bootstrap_servers": address})
        size = sum(fill(settings, options.events, options.users, options.items, seed) for seed in range(options.rounds))
        total = options.events * options.rounds
        print(f"{total:,} events of {size / options.rounds:.0f} bytes in {settings.kafka.partitions} partitions", flush=True)
        context = multiprocessing.get_context("spawn")
        out: Queue[dict[str, Any]] = context.Queue()
        process = context.Process(target=work, args=(settings, total, out))
        process.start()
        report = out.get()
        process.join()
        if options.quixstreams:
            count = min(total, QUIXSTREAMS_EVENTS)
            app = [options.quixstreams, str(Path(__file__).with_name("quixstreams_app.py")), address, settings.kafka.topic]
            said = subprocess.run([*app, str(count), str(home / "quixstreams")], check=True, capture_output=True, text=True)
            rate = float(said.stdout.split()[-1])
            print(f"quixstreams: {rate:,.0f} events/s over {count:,}; the worker takes {report['rate'] / rate:.1f} × as many")
        if options.kafka_streams:
            java = ensure_java().path
            libraries = fetch_jars(java, Module(KAFKA.group, "kafka-streams", KAFKA.version), LOGGER)
            app = [java / "bin/java", "-Dorg.slf4j.simpleLogger.defaultLogLevel=error", "-cp", f"{libraries}/*"]
            app += [Path(__file__).with_name("StreamsApp.java"), address, settings.kafka.topic, total, home / "kafka-streams"]
            said = subprocess.run([*map(str, app), str(os.cpu_count())], check=True, capture_output=True, text=True)
            rate = float(said.stdout.split()[-1])
            print(f"Kafka Streams: {rate:,.0f} events/s over {total:,}; the worker takes {report['rate'] / rate:.1f} × as many")
        client = redis.Redis.from_url(url)
        used = client.info("memory")
        sample = [client.memory_usage(key) for key in list(client.scan_iter("user:*", count=1000))[:1000]]
        cpu = client.info("cpu")
        redis_cpu = cpu["used_cpu_user"] + cpu["used_cpu_sys"]
        print(f"{report['rate']:,.0f} events/s for {report['seconds']:.1f} s")
        print(f"CPU an event: worker {1e6 * report['cpu'] / total:.1f} µs, Redis {1e6 * redis_cpu / total:.1f} µs")
        print(f"Redis: {used['used_memory'] >> 20} MB in all, {np.mean(sample):.0f} bytes a user's live record (MEMORY USAGE)")
        if options.memory:
            for done, megabytes in report["memory"][:: max(1, len(report["memory"]) // 20)]:
                print(f"  after {done:>12,.0f} messages: {megabytes} MB")
        print(f"worker memory at most {max(m for _, m in report['memory'])} MB", flush=True)


if __name__ == "__main__":
    main()
