"""What tests of the speed layer do: events in, workers that live and die, and the proof that nothing was lost or doubled."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest
from confluent_kafka import Consumer, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from recsys_cli.kafka import kafka_server
from recsys_core.events import MINUTE_MS, now_ms
from recsys_core.kafka_config import SILENT, client_config
from recsys_core.lake import Lake
from recsys_core.landing import Landing, offset_faults
from recsys_core.recompute import Recomputation
from recsys_core.redis_client import client
from recsys_core.settings import KafkaSettings, Settings, load_settings
from streaming import archive as archive_module
from streaming.decode import decode
from streaming.kafka import KafkaUnavailable
from streaming.progress import read_positions
from streaming.topics import find_topic, init_topics
from streaming.worker import Worker

TYPES = ("view", "click", "like", "cart", "purchase")
SECONDS = 60.0
PARTITIONS = 4


@dataclass
class Broker:
    """A broker that can be stopped and started again where it was."""

    home: Path
    port: int = 0
    address: str = ""
    _held: ExitStack = field(default_factory=ExitStack)

    def start(self) -> None:
        self.address = self._held.enter_context(kafka_server(self.home, self.port, KafkaSettings(max_message_bytes=12 << 20)))
        self.port = int(self.address.rpartition(":")[2])

    def stop(self) -> None:
        self._held.close()


@contextmanager
def broker_or_skip(home: Path) -> Iterator[Broker]:
    """A running broker. Skips the test where Kafka can't be had, and says why."""
    running = Broker(home)
    try:
        running.start()
    except KafkaUnavailable as error:
        pytest.skip(str(error))
    try:
        yield running
    finally:
        running.stop()


def wait_for(what: str, holds: Callable[[], bool], seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"after {seconds} s still not: {what}"
        time.sleep(0.02)


def _run_worker(settings: Settings, grace_ms: int, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    archive_module.GRACE_MS = grace_ms
    worker = Worker(settings)
    signal.signal(signal.SIGTERM, lambda *_: worker.stop())
    worker.run()


@contextmanager
def in_this_process(settings: Settings) -> Iterator[Worker]:
    worker = Worker(settings, "here")
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        yield worker
    finally:
        worker.stop()
        thread.join(SECONDS)
        assert not thread.is_alive()


def workers_context() -> ForkServerContext:
    """Workers are forked from a process that has everything imported, so that one starts in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stream_world", "streaming.worker", "redis.cluster"])
    return context


@dataclass
class World:
    """A topic with its group, its users in Redis and its lake. Workers get `environment`, which the process that they are
    forked from need not have."""

    settings: Settings
    redis: Any
    prefix: str
    producer: Producer
    workers: list[ForkServerProcess] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    sent: int = 0

    @classmethod
    def of(cls, settings: Settings) -> World:
        """The world of settings that name a Kafka, a Redis and a lake; the topics are made."""
        init_topics(settings.kafka)
        producer = Producer(client_config(settings.kafka, enable_idempotence=True, linger_ms=2))
        return cls(settings, client(settings.redis), uuid.uuid4().hex[:8], producer)

    @classmethod
    def make(cls, address: str, redis_url: str, home: Path, **sections: dict[str, Any]) -> World:
        name = uuid.uuid4().hex[:8]
        kafka: dict[str, Any] = {"bootstrap_servers": address, "topic": f"events-{name}", "dead_letter_topic": f"dead-{name}"}
        # Clients that outlive the broker would fill the screen.
        kafka |= {"partitions": PARTITIONS, "conf": {"log_level": str(SILENT)}}
        stream = {"group": f"group-{name}", "session_timeout_seconds": 1.5, "archive_rows": 500, "archive_seconds": 1}
        nothing = home / "empty.toml"
        nothing.touch()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RECSYS_CONFIG", str(nothing))
            settings = load_settings(
                home / "home",
                kafka={**kafka, **sections.pop("kafka", {})},
                stream={**stream, **sections.pop("stream", {})},
                redis={"url": redis_url, **sections.pop("redis", {})},
                **sections,
            )
        return cls.of(settings)

    # -- events -----------------------------------------------------------------------------------------------------

    def event(self, chance: random.Random, at: int | None = None, **other: object) -> dict[str, object]:
        """An event of one of a few users: most are new, some are late, some share a millisecond or an item."""
        ts = (now_ms() if at is None else at) - chance.choice([0, 0, 0, 1, 250, 40 * 60_000])
        self.sent += 1
        made: dict[str, object] = {
            "v": 1,
            "event_id": f"{self.prefix}-{self.sent}",
            "user_id": f"{self.prefix}-{chance.randrange(40)}",
            "item_id": f"item-{chance.randrange(30)}",
            "event_type": chance.choice(TYPES),
            "ts": ts,
        }
        return {**made, **other}

    def send(self, *events: dict[str, object], flush: bool = True) -> None:
        for event in events:
            self.send_raw(orjson.dumps(event), str(event["user_id"]).encode(), flush=False)
        if flush:
            self.flush()

    def send_raw(self, value: bytes | None, key: bytes | None = None, flush: bool = True) -> None:
        self.producer.produce(self.settings.kafka.topic, value, key)
        if flush:
            self.flush()

    def flush(self) -> None:
        assert self.producer.flush(SECONDS) == 0

    # -- workers ----------------------------------------------------------------------------------------------------

    def start(self, grace_ms: int = 300) -> ForkServerProcess:
        worker = workers_context().Process(target=_run_worker, args=(self.settings, grace_ms, self.environment), daemon=True)
        worker.start()
        self.workers.append(worker)
        return worker

    def kill(self, worker: ForkServerProcess, number: int = signal.SIGKILL) -> None:
        assert worker.pid is not None
        os.kill(worker.pid, number)
        if number in (signal.SIGKILL, signal.SIGTERM):
            worker.join(SECONDS)
            self.workers.remove(worker)

    def close(self) -> None:
        for worker in list(self.workers):
            self.kill(worker, signal.SIGCONT)
            self.kill(worker, signal.SIGKILL)
        self.redis.close()

    # -- what there is ----------------------------------------------------------------------------------------------

    @property
    def landing(self) -> Landing:
        return Landing(Lake(self.settings.lake_uri))

    def identity(self) -> str:
        topic = find_topic(AdminClient(client_config(self.settings.kafka)), self.settings.kafka.topic)
        assert topic is not None
        return topic.identity

    def ends(self) -> dict[int, int]:
        """The end of each partition."""
        consumer = Consumer(client_config(self.settings.kafka, group_id="ends"))
        topic = self.settings.kafka.topic
        numbers = consumer.list_topics(topic, timeout=SECONDS).topics[topic].partitions
        ends = {p: consumer.get_watermark_offsets(TopicPartition(topic, p), timeout=SECONDS)[1] for p in numbers}
        consumer.close()
        return ends

    def messages(self, topic: str | None = None) -> list[Message]:
        """Everything in a topic, by partition and offset."""
        topic = topic or self.settings.kafka.topic
        consumer = Consumer(client_config(self.settings.kafka, group_id="read", fetch_message_max_bytes=20 << 20))
        found: list[Message] = []
        for number in consumer.list_topics(topic, timeout=SECONDS).topics[topic].partitions:
            low, high = consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=SECONDS)
            consumer.assign([TopicPartition(topic, number, low)])
            left = high - low
            while left > 0:
                some = [m for m in consumer.consume(left, timeout=10) if m.error() is None]
                assert some
                found += some
                left = high - 1 - (some[-1].offset() or 0)
        consumer.close()
        return found

    # -- the proof --------------------------------------------------------------------------------------------------

    def settle(self, landing: bool = True, seconds: float = SECONDS, redis: bool = True) -> None:
        """Wait until Redis and the landing zone have the topic up to its end."""
        ends = self.ends()
        identity = self.identity()
        sources = {number: f"{identity}.{number}" for number in ends}

        def applied() -> bool:
            found = read_positions(self.redis, list(sources.values()))
            return all((found[sources[number]] or 0) >= end for number, end in ends.items())

        def landed() -> bool:
            held = [r for r in self.landing.archived(self.settings.kafka.topic) if r.identity == identity]
            return all(max((r.last + 1 for r in held if r.partition == p), default=0) >= end for p, end in ends.items())

        if redis:
            wait_for("everything is in Redis", applied, seconds)
        if landing:
            wait_for("everything is in the landing zone", landed, seconds)

    def prove(self, trends_since_ms: int = 0) -> None:
        """Redis equals a computation from the topic, one event after the other, and the landing zone has each offset once.
        Trends from before a moment may have expired."""
        messages = self.messages()
        values = [m.value() for m in messages]
        appended = np.array([m.timestamp()[1] for m in messages], np.int64)
        decoded = decode(values, self.settings.events, self.settings.kafka.max_message_bytes, appended)
        identity = self.identity()
        computed = Recomputation(self.settings)
        partitions = np.array([message.partition() for message in messages], np.int64)
        offsets = np.array([message.offset() for message in messages], np.int64)
        for number in np.unique(partitions).tolist():
            taken = np.flatnonzero(partitions[decoded.rows] == number)
            rows = decoded.rows[taken]
            computed.add(decoded.events.take(taken), f"{identity}.{number}", offsets[rows].tolist(), appended[rows].tolist())
        found = computed.differences(self.redis, trends_since_ms)
        assert (found.different, found.ahead) == ([], 0)
        length = self.settings.stream.bucket_minutes * MINUTE_MS
        assert found.compared == len(computed.users) + sum(at * length >= trends_since_ms for _, at in computed.buckets)
        self.prove_landing(messages, decoded.rows.tolist())

    def prove_landing(self, messages: list[Message], valid: list[int]) -> None:
        identity = self.identity()
        held = [r for r in self.landing.archived(self.settings.kafka.topic) if r.identity == identity]
        assert offset_faults(held) == [], [one.name for one in held]
        rows: Counter[tuple[int, int]] = Counter()
        for one in held:
            with self.landing.lake.fs.open(self.landing.lake.path("landing", one.topic, f"{one.name}.parquet"), "rb") as file:
                table = pq.read_table(file)
            offsets = table["offset"].to_pylist()
            assert all(one.first <= offset <= one.last for offset in offsets)
            rows.update((one.partition, offset) for offset in offsets)
        good = {(messages[row].partition(), messages[row].offset()) for row in valid}
        assert rows == Counter(good)
        refused = Counter(
            (int(row["origin"].rpartition("/")[2]), row["row"])
            for table in self.landing.quarantined()
            for row in table.to_pylist()
        )
        assert refused == Counter({(m.partition(), m.offset()) for m in messages} - good)


def produce_for(world: World, chance: random.Random, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        world.send(*(world.event(chance) for _ in range(chance.randrange(1, 60))), flush=False)
        world.producer.poll(chance.random() * 0.03)
    world.flush()


def disturb(world: World, chance: random.Random, seconds: float) -> Counter[str]:
    """Events all the time, while workers are killed, frozen past their session and thawed, added, and asked to end.

    Returns how often each was done.
    """
    done: Counter[str] = Counter()
    world.start()
    world.start()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        produce_for(world, chance, chance.uniform(0.05, 0.5))
        action = chance.choice(["kill", "kill", "freeze", "end", "add"])
        done[action] += 1
        if action == "add" and len(world.workers) < 3:
            world.start()
        elif world.workers and action != "add":
            worker = chance.choice(world.workers)
            if action == "freeze":
                world.kill(worker, signal.SIGSTOP)
                produce_for(world, chance, world.settings.stream.session_timeout_seconds + 0.5)
                world.kill(worker, signal.SIGCONT)
            else:
                world.kill(worker, signal.SIGKILL if action == "kill" else signal.SIGTERM)
        if not world.workers:
            world.start()
    produce_for(world, chance, 0.1)
    return done
