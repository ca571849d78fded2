"""From an event's send to its being visible in a user's record in Redis, at a steady rate.

    python benchmarks/stream_latency.py [--rate 5000] [--seconds 20]

A producer, Kafka, the worker, Redis and the probe share the machine. Twice: as the worker counts it (from the broker's
time of a message to the end of its batch, whole ms), and by a probe that sends events of its own users and polls Redis.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import threading
import time
from contextlib import ExitStack
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import redis
from confluent_kafka import Producer

from recsys_cli.kafka import broker_server
from recsys_cli.stack import redis_server
from recsys_core.events import now_ms
from recsys_core.online import user_key
from recsys_core.settings import Settings, load_settings

PROBE_SECONDS = 0.0003
"""Between two looks of the probe: what it adds to a time at most, instead of a core that it would take from the others."""


def message(user: str, number: int) -> bytes:
    event = {"v": 1, "event_id": f"{user}-{number}", "user_id": user, "item_id": f"i{number % 5000}", "event_type": "view"}
    return orjson.dumps({**event, "ts": now_ms() + number % 7})


def load(settings: Settings, rate: int, seconds: float) -> None:
    """Send `rate` events a second of 100,000 users, in slices of 2 ms."""
    producer = Producer({"bootstrap.servers": settings.kafka.bootstrap_servers, "linger.ms": 1})
    chance = np.random.default_rng(3)
    started = time.perf_counter()
    sent = 0
    while (now := time.perf_counter() - started) < seconds:
        while sent < now * rate:
            user = f"u{chance.integers(100_000)}"
            producer.produce(settings.kafka.topic, message(user, sent), user)
            sent += 1
        producer.poll(0.002)
    producer.flush()


def work(settings: Settings, begin: Any, stop: Any, out: Queue[Any]) -> None:
    """Run a worker; `out` gets what its histogram counted between `begin` and `stop`: (upper edge in s, messages)."""
    from streaming.worker import Worker

    worker = Worker(settings)

    def counted() -> dict[str, float]:
        samples = (s for f in worker.metrics.latency.collect() for s in f.samples if s.name.endswith("_bucket"))
        return {s.labels["le"]: s.value for s in samples}

    thread = threading.Thread(target=worker.run)
    thread.start()
    begin.wait()
    before = counted()
    stop.wait()
    out.put([(edge, n - before[edge]) for edge, n in counted().items()])
    worker.stop()
    thread.join()


def probe(settings: Settings, seconds: float) -> np.ndarray:
    """Seconds from handing an event to the producer to its time being in the user's record, one event at a time."""
    client = redis.Redis.from_url(settings.redis.url)
    producer = Producer({"bootstrap.servers": settings.kafka.bootstrap_servers, "linger.ms": 0})
    found = []
    deadline = time.perf_counter() + seconds
    number = 0
    while time.perf_counter() < deadline:
        number += 1
        user = f"probe{number}"
        started = time.perf_counter()
        producer.produce(settings.kafka.topic, message(user, number), user)
        producer.poll(0)
        while not client.exists(user_key(user)):
            time.sleep(PROBE_SECONDS)
        found.append(time.perf_counter() - started)
        time.sleep(0.01)
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--warm-up", type=float, default=30.0, help="seconds before it; a new broker compiles its own code")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with ExitStack() as held, tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        url = held.enter_context(redis_server(home))
        settings = load_settings(home, redis={"url": url})
        address = held.enter_context(broker_server(settings, or_embedded=False))
        settings = load_settings(home, redis={"url": url}, kafka={"bootstrap_servers": address})
        begin, stop, out = context.Event(), context.Event(), context.Queue()
        worker = context.Process(target=work, args=(settings, begin, stop, out))
        worker.start()
        sender = context.Process(target=load, args=(settings, options.rate, options.warm_up + options.seconds + 1))
        sender.start()
        time.sleep(options.warm_up)
        begin.set()
        seen = 1000 * probe(settings, options.seconds)
        stop.set()
        buckets = out.get()
        worker.join()
        sender.join()
    quantiles = ", ".join(f"p{q:g} {np.percentile(seen, q):.1f} ms" for q in (50, 90, 99, 99.9))
    print(f"probe at {options.rate:,} events/s, {len(seen)} events: {quantiles}")
    total = buckets[-1][1]
    print("worker:", ", ".join(f"≤ {1000 * float(edge):g} ms {100 * n / total:.2f} %" for edge, n in buckets[:10]))


if __name__ == "__main__":
    main()
