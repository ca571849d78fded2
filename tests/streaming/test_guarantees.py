"""Whatever happens to workers, brokers and Redis: state equals the topic's events applied once, the archive has each once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from confluent_kafka import Message
from stream_world import Broker, World, disturb, produce_for

from recsys_cli.processes import free_port, running, wait_until
from recsys_cli.stack import redis_answers, redis_command
from recsys_core.events import EVENT_SCHEMA, now_ms
from recsys_core.live import Batch
from recsys_core.recompute import Recomputation
from streaming.decode import decode
from streaming.progress import applied_key
from streaming.sink import RedisSink


def test_a_worker_applies_and_archives_everything(world: Callable[..., World]) -> None:
    one = world()
    chance = random.Random(0)
    one.send(*(one.event(chance) for _ in range(3000)))
    one.start()
    one.settle()
    one.prove()


SCHEDULES = 24
LANES = 3


@pytest.mark.parametrize("lane", range(LANES))
def test_no_schedule_of_kills_loses_or_doubles_an_event(world: Callable[..., World], lane: int) -> None:
    """Several schedules at a time, each with a topic, a group and users of its own."""
    seeds = range(lane, SCHEDULES, LANES)
    worlds = [world() for _ in seeds]
    with ThreadPoolExecutor(len(worlds)) as threads:
        for done in [threads.submit(disturb, w, random.Random(s), 2.0) for w, s in zip(worlds, seeds, strict=True)]:
            done.result()
    for seed, one in zip(seeds, worlds, strict=True):
        one.settle()
        print(f"seed {seed}: {one.sent} events")
        one.prove()


def test_a_batch_that_comes_again_changes_nothing(world: Callable[..., World]) -> None:
    one = world()
    chance = random.Random(1)
    one.send(*(one.event(chance) for _ in range(2000)))
    worker = one.start()
    one.settle()
    one.kill(worker)
    for source in range(4):
        one.redis.set(applied_key(f"{one.identity()}.{source}"), 100)
    one.start()
    one.settle()
    one.prove()


def test_a_zombie_that_writes_late_changes_nothing(world: Callable[..., World]) -> None:
    one = world()
    chance = random.Random(2)
    events = [one.event(chance) for _ in range(600)]
    one.send(*events)
    one.start()
    one.settle()
    messages = one.messages()
    appended = np.array([m.timestamp()[1] for m in messages], np.int64)
    decoded = decode([m.value() for m in messages], one.settings.events, 1 << 20, appended)
    where = [np.array([int(f(m)) for m in messages], np.int64) for f in (Message.partition, Message.offset)]
    late = Batch(decoded.events, where[0], where[1])
    sink = RedisSink(one.redis, one.settings)
    sources = {number: f"{one.identity()}.{number}" for number in range(4)}
    for some in (late, late.take(late.offset < 60), late.take(late.offset > 20)):
        prepared = sink.prepare(some, sources, now_ms())
        assert prepared is not None
        hits = sink.apply(prepared, sources, now_ms())
        assert hits == len(prepared.users.users) + len(prepared.counts)
    one.prove()


def test_a_batch_of_which_the_beginning_is_known_is_applied_in_part(world: Callable[..., World]) -> None:
    one = world()
    chance = random.Random(3)
    sources = {0: "feedbeef.0"}
    events = pa.Table.from_pylist([{k: v for k, v in one.event(chance).items() if k != "v"} for _ in range(400)], EVENT_SCHEMA)
    whole = Batch(events, np.zeros(400, np.int64), np.arange(400, dtype=np.int64))
    sink = RedisSink(one.redis, one.settings)
    computed = Recomputation(one.settings)
    computed.add(events, "feedbeef.0", list(range(400)))
    for end in (150, 151, 400):
        prepared = sink.prepare(whole.take(whole.offset < end), sources, now_ms())
        assert prepared is not None
        sink.apply(prepared, sources, now_ms())
    assert computed.differences(one.redis).different == []


def test_the_broker_may_go_and_come_back(world: Callable[..., World], broker: Broker) -> None:
    one = world()
    chance = random.Random(4)
    one.start()
    produce_for(one, chance, 1.0)
    broker.stop()
    for _ in range(300):
        one.send(one.event(chance), flush=False)
    broker.start()
    one.flush()
    produce_for(one, chance, 1.0)
    one.settle()
    one.prove()


def test_redis_may_go_and_come_back_with_its_log(world: Callable[..., World], tmp_path: Path) -> None:
    with ExitStack() as first:
        url = first.enter_context(redis_with_log(tmp_path, 0))
        one = world(redis={"url": url})
        chance = random.Random(5)
        one.start()
        produce_for(one, chance, 1.0)
    for _ in range(300):
        one.send(one.event(chance), flush=False)
    one.flush()
    with redis_with_log(tmp_path, int(url.split(":")[2].partition("/")[0])):
        produce_for(one, chance, 0.5)
        one.settle()
        one.prove()


def test_a_redis_that_lost_its_data_is_filled_again_from_the_topic(world: Callable[..., World], tmp_path: Path) -> None:
    with redis_with_log(tmp_path, 0) as url:
        one = world(redis={"url": url})
        chance = random.Random(6)
        one.start()
        produce_for(one, chance, 1.0)
        one.settle(landing=False)
        one.redis.flushall()
        produce_for(one, chance, 0.5)
        one.settle()
        one.prove()


@contextmanager
def redis_with_log(home: Path, port: int) -> Iterator[str]:
    """A Redis that keeps every command over a restart."""
    port = free_port(port)
    command = [*redis_command(home, port), "--appendonly", "yes", "--save", ""]
    url = f"redis://127.0.0.1:{port}/0"
    with running("redis", home, command) as check:
        wait_until(lambda: redis_answers(url), "redis", 20, check)
        yield url
