"""No neighbour ends a worker, stops it or blinds it: Kafka, the lake and Redis fail in every way and come back."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from moody import MoodyConsumer, MoodyLake, StoreError
from stream_world import World, in_this_process, produce_for, wait_for

from recsys_core.events import HOUR_MS, MINUTE_MS, now_ms
from recsys_core.heartbeat import read_heartbeats
from recsys_core.kafka_config import client_config
from recsys_core.lake import Lake
from recsys_core.landing import offset_faults
from recsys_core.online import read_records
from recsys_core.tombstones import TombstoneLog, Tombstones, hash_of
from streaming import archive as archive_module
from streaming import archiver as archiver_module
from streaming import forgotten as forgotten_module
from streaming import worker as worker_module


@pytest.fixture
def lake() -> Iterator[type[MoodyLake]]:
    MoodyLake.store.clear()
    MoodyLake.pseudo_dirs[:] = [""]
    MoodyLake.recover()
    yield MoodyLake
    MoodyLake.recover()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "GRACE_MS", 100)
    monkeypatch.setattr(archiver_module, "SETTLE_SECONDS", 0.5)
    monkeypatch.setattr(forgotten_module, "ASK_SECONDS", 0.5)


def fail(lake: type[MoodyLake], how: str) -> None:
    if how == "hangs":
        lake.answers.clear()
    else:
        lake.failure = {"odd": StoreError("no such host"), "refuses": ConnectionError("refused"), "full": OSError("full")}[how]


def beat_age_ms(one: World) -> int:
    return now_ms() - max((beat.at for beat in read_heartbeats(one.redis) if beat.worker == "here"), default=0)


@pytest.mark.parametrize("how", ["odd", "refuses", "full", "hangs"])
def test_a_lake_that_is_away_holds_nothing_up_and_gets_everything_when_it_is_back(
    world: Callable[..., World], lake: type[MoodyLake], how: str
) -> None:
    stream = {"heartbeat_seconds": 0.1, "archive_rows": 200, "batch_megabytes": 1}
    one = world(lake={"uri": f"moody://{how}"}, stream=stream)
    chance = random.Random(how)
    with in_this_process(one.settings) as worker:
        produce_for(one, chance, 0.5)
        one.settle()
        before = one.landing.archived()
        fail(lake, how)
        for _ in range(3):
            one.send(*(one.event(chance) for _ in range(3000)))
            one.settle(landing=False, seconds=10)
            produce_for(one, chance, 0.3)
            one.settle(landing=False, seconds=10)
            assert beat_age_ms(one) < 2000
        assert worker.metrics.restarts._metrics == {}
        lake.recover()
        one.settle()
        assert len(one.landing.archived()) > len(before)
        one.prove()


@pytest.mark.parametrize("how", ["odd", "hangs"])
def test_a_worker_starts_while_the_lake_is_away(world: Callable[..., World], lake: type[MoodyLake], how: str) -> None:
    one = world(lake={"uri": f"moody://start-{how}"}, stream={"archive_rows": 200})
    chance = random.Random(how)
    with in_this_process(one.settings):
        produce_for(one, chance, 0.3)
        one.settle()
        produce_for(one, chance, 0.2)
    fail(lake, how)
    with in_this_process(one.settings):
        produce_for(one, chance, 0.3)
        one.settle(landing=False, seconds=15)
    with in_this_process(one.settings):
        produce_for(one, chance, 0.2)
        lake.recover()
        one.settle()
        one.prove()


def test_offsets_that_the_brokers_no_longer_have_are_a_gap_of_the_archive_that_is_seen(
    world: Callable[..., World], lake: type[MoodyLake]
) -> None:
    one = world(lake={"uri": "moody://gap"}, kafka={"partitions": 1}, stream={"archive_rows": 100_000, "batch_megabytes": 1})
    chance = random.Random(1)
    topic = one.settings.kafka.topic
    with in_this_process(one.settings):
        one.send(*(one.event(chance) for _ in range(10)))
        one.settle()
        fail(lake, "odd")
        one.send(*(one.event(chance) for _ in range(40)))
        one.settle(landing=False)
    admin = AdminClient(client_config(one.settings.kafka))
    [deleted] = admin.delete_records([TopicPartition(topic, 0, 30)]).values()
    deleted.result(timeout=30)
    lake.recover()
    with in_this_process(one.settings):
        one.settle()
    [fault] = offset_faults(one.landing.archived())
    assert fault.endswith("partition 0: offsets 10 to 29 are missing")


@pytest.mark.parametrize("seed", range(3))
def test_no_error_of_kafka_ends_a_worker(world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(worker_module, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(archiver_module, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(worker_module, "Consumer", MoodyConsumer)
    monkeypatch.setattr(archiver_module, "Consumer", MoodyConsumer)
    monkeypatch.setattr(MoodyConsumer, "chance", random.Random(seed))
    monkeypatch.setattr(MoodyConsumer, "share", 1.0)
    monkeypatch.setattr(MoodyConsumer, "failures", 0)
    one = world()
    chance = random.Random(seed)
    with in_this_process(one.settings) as worker:
        wait_for("it failed", lambda: one.send(*(one.event(chance) for _ in range(300))) or MoodyConsumer.failures > 9, 30)
        MoodyConsumer.share = 0.0
        one.settle()
        assert worker.metrics.restarts.labels("BrokerFailure")._value.get() > 0
        one.prove()


def test_an_error_that_nothing_foresaw_is_told_and_the_worker_goes_on(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = world()
    chance = random.Random(5)
    prepare = worker_module._Session._prepare

    def broken(*_: Any) -> Any:
        monkeypatch.setattr(worker_module._Session, "_prepare", prepare)
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(worker_module._Session, "_prepare", broken)
    with in_this_process(one.settings) as worker, caplog.at_level(logging.ERROR, "streaming.worker"):
        one.send(*(one.event(chance) for _ in range(500)))
        one.settle()
        assert worker.metrics.restarts.labels("ZeroDivisionError")._value.get() == 1
        assert "a bug" in caplog.text
        one.prove()


def test_the_end_of_a_partition_is_archived_when_transactions_are_the_last_in_it(world: Callable[..., World]) -> None:
    one = world(kafka={"partitions": 1}, stream={"heartbeat_seconds": 0.1})
    chance = random.Random(2)
    sender = Producer(client_config(one.settings.kafka, transactional_id=one.prefix))
    sender.init_transactions()
    place = TopicPartition(one.settings.kafka.topic, 0)
    watcher = Consumer(client_config(one.settings.kafka, group_id=one.settings.stream.group))
    with in_this_process(one.settings) as worker:
        for commit, end in ((True, 6), (False, 10), (True, 14)):
            sender.begin_transaction()
            for event in [one.event(chance) for _ in range(3 if end > 6 else 5)]:
                sender.produce(one.settings.kafka.topic, orjson.dumps(event), b"k")
            sender.flush()
            (sender.commit_transaction if commit else sender.abort_transaction)()
            assert one.ends() == {0: end}
            one.settle(seconds=15)
            wait_for("no lag", lambda: [b.lag for b in read_heartbeats(one.redis) if b.worker == "here"] == [0], 15)
            wait_for("the group knows", lambda end=end: watcher.committed([place], timeout=9)[0].offset == end, 15)
        assert worker.metrics.events._value.get() == 8
        held = one.landing.archived(one.settings.kafka.topic)
        assert offset_faults(held) == []
        assert sum(one.landing.archive_facts(r)["events"] for r in held) == 8
    watcher.close()


def test_a_user_who_is_forgotten_is_not_taken_in_again_by_a_running_worker(
    world: Callable[..., World], lake: type[MoodyLake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forgotten_module, "REREAD_SECONDS", 0.1)
    one = world(lake={"uri": "moody://forgotten"})
    chance = random.Random(3)

    def seen(user: str) -> bool:
        return bool(read_records(one.redis, [user])[0].last)

    with in_this_process(one.settings):
        one.send(one.event(chance, user_id="ann"), one.event(chance, user_id="bob"))
        wait_for("both are there", lambda: seen("ann") and seen("bob"))
        one.redis.delete("user:{bob}")
        TombstoneLog(Lake(one.settings.lake_uri)).add(hash_of("bob"), now_ms())
        time.sleep(0.5)
        for how in ("well", "odd"):
            if how == "odd":
                fail(lake, how)
                time.sleep(0.3)
            late = [one.event(chance, user_id=user, ts=now_ms() - 60_000) for user in ("bob", "eve" + how)]
            one.send(*late)
            wait_for("the other is there", lambda how=how: seen("eve" + how))
            assert not seen("bob")
            one.send(*(one.event(chance, user_id="bob", ts=now_ms() - 60_000) for _ in range(300)))
            one.settle(landing=False)
            assert not seen("bob")
    assert Tombstones.read(Lake("moody://empty")) == Tombstones({})


def test_a_phone_whose_clock_is_ahead_makes_no_answer_stale(world: Callable[..., World]) -> None:
    one = world()
    chance = random.Random(4)
    with in_this_process(one.settings):
        for count in (1, 300):
            ahead = [one.event(chance, ts=now_ms() + 50 * MINUTE_MS - at, user_id=f"u{count}") for at in range(count)]
            one.send(
                *ahead, one.event(chance, user_id=f"u{count}"), one.event(chance, user_id=f"u{count}", ts=now_ms() - HOUR_MS)
            )
            one.settle(landing=False)
            [record] = read_records(one.redis, [f"u{count}"])
            assert record.last_ts <= now_ms()
            assert record.last[0][2] == max(event["ts"] for event in ahead)
        one.settle()
        one.prove()
