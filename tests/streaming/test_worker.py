"""What a worker tells of itself, and what it does while Redis, the archive or its topic keep it waiting."""

from __future__ import annotations

import random
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import redis
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient
from stream_world import SECONDS, World, in_this_process, wait_for

from recsys_cli.processes import free_port
from recsys_cli.stack import redis_server
from recsys_core.events import EVENT_SCHEMA
from recsys_core.heartbeat import HEARTBEATS_KEY, read_heartbeats
from recsys_core.kafka_config import SILENT, client_config
from recsys_core.lake import Lake
from recsys_core.landing import Landing
from recsys_core.online import read_records
from recsys_core.settings import Settings
from streaming import archive as archive_module
from streaming import worker as worker_module
from streaming.broker import EmbeddedBroker
from streaming.producer import produce
from streaming.topics import find_topic, is_embedded


def test_consumption_pauses_while_redis_is_slow_and_goes_on_after_it(
    world: Callable[..., World], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "PAUSE_SECONDS", 0.2)
    with redis_server(tmp_path) as url:
        one = world(redis={"url": url}, stream={"batch_events": 50})
        chance = random.Random(1)
        with in_this_process(one.settings) as worker:
            one.send(*(one.event(chance) for _ in range(100)))
            one.settle(landing=False)
            one.redis.client_pause(4000)
            one.send(*(one.event(chance) for _ in range(3000)))
            wait_for("consumption pauses", lambda: worker.metrics.paused._value.get() == 1)
            one.settle()
            wait_for("it goes on", lambda: worker.metrics.paused._value.get() == 0)
            one.prove()


def test_a_handful_takes_the_fast_path_and_comes_to_the_same(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_module, "GRACE_MS", 100)
    one = world(stream={"archive_rows": 50, "archive_seconds": 1})
    chance = random.Random(7)
    with in_this_process(one.settings) as worker:
        one.send(one.event(chance))
        one.settle(landing=False)
        for turn in range(60):
            one.send(*(one.event(chance) for _ in range(chance.randrange(1, 12))))
            if turn == 30:
                one.send(*(one.event(chance) for _ in range(2000)))
            if turn % 20 == 10:
                one.send_raw(b"junk", b"k")
        one.settle()
        quick = worker.metrics.quick._value.get()
        assert 0 < quick <= worker.metrics.messages._value.get() == one.sent + 3
        one.prove()


def test_nothing_is_finished_before_the_wanted_replicas_have_it(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "REDIS_SECONDS", 0.1)
    monkeypatch.setattr(worker_module, "DRAIN_SECONDS", 0.1)
    one = world(redis={"wait_replicas": 1})
    with in_this_process(one.settings) as worker:
        one.send(*(one.event(random.Random(9)) for _ in range(3)))
        wait_for("there is no replica", lambda: worker.metrics.redis_retries._value.get() >= 2)
        assert worker.metrics.messages._value.get() == 0


def test_a_worker_that_starts_over_does_not_wait_for_what_it_gave_up(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "DRAIN_SECONDS", 2 * SECONDS)
    one = world(stream={"batch_events": 200})
    chance = random.Random(8)
    prepare, keep_house = worker_module._Session._prepare, worker_module._Session._keep_house
    held = threading.Event()

    def hold_up(session: Any, taken: Any) -> Any:
        held.set()
        session._pipe.stopping.wait(SECONDS)
        return prepare(session, taken)

    def start_over(_: Any) -> None:
        monkeypatch.setattr(worker_module._Session, "_prepare", prepare)
        monkeypatch.setattr(worker_module._Session, "_keep_house", keep_house)
        raise worker_module.StartOver("a test wants it")

    monkeypatch.setattr(worker_module._Session, "_prepare", hold_up)
    with in_this_process(one.settings) as worker:
        one.send(*(one.event(chance) for _ in range(2000)))
        assert held.wait(SECONDS)
        monkeypatch.setattr(worker_module._Session, "_keep_house", start_over)
        one.settle()
        assert worker.metrics.restarts.labels("StartOver")._value.get() == 1
        one.prove()


def test_metrics_heartbeat_and_committed_offsets_follow(world: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "GRACE_MS", 100)
    port = free_port()
    one = world(stream={"metrics_port": port, "heartbeat_seconds": 0.2})
    chance = random.Random(2)
    one.send(*(one.event(chance) for _ in range(900)))
    one.send_raw(b"junk", b"k")
    with in_this_process(one.settings):
        one.settle()
        ends = one.ends()

        def beats() -> list[tuple[str, int, int]]:
            return [(b.worker, b.lag, b.events) for b in read_heartbeats(one.redis) if b.worker == "here"]

        wait_for("the heartbeat says so", lambda: beats() == [("here", 0, 900)])
        [beat] = [beat for beat in read_heartbeats(one.redis) if beat.worker == "here"]
        assert beat.partitions == {f"{one.settings.kafka.topic}/{number}": 0 for number in ends}
        assert one.redis.ttl(HEARTBEATS_KEY) > 0
        watcher = Consumer(client_config(one.settings.kafka, group_id=one.settings.stream.group))
        places = [TopicPartition(one.settings.kafka.topic, p) for p in ends]
        wait_for("the group knows", lambda: {p.partition: p.offset for p in watcher.committed(places, timeout=9)} == ends)
        watcher.close()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        text = opener.open(f"http://127.0.0.1:{port}/metrics", timeout=9).read().decode()
    assert "recsys_stream_messages_total 901.0" in text
    assert "recsys_stream_events_total 900.0" in text
    assert "recsys_stream_quick_total" in text
    assert 'recsys_stream_dead_letters_total{reason="not JSON"} 1.0' in text
    assert 'recsys_stream_visible_seconds_bucket{le="+Inf"} 901.0' in text
    assert not any(beat.worker == "here" for beat in read_heartbeats(one.redis))


def test_a_worker_that_starts_again_repeats_nothing(world: Callable[..., World]) -> None:
    one = world(stream={"archive_rows": 100_000, "archive_seconds": 3600})
    chance = random.Random(3)
    one.send(*(one.event(chance) for _ in range(500)))
    for taken in (500, 1):
        with in_this_process(one.settings) as worker:
            one.settle(landing=False)
            wait_for("all messages are taken", lambda taken=taken, worker=worker: worker.metrics.messages._value.get() == taken)
            assert worker.metrics.fence_hits._value.get() == 0
        one.send(one.event(chance))
    assert one.landing.archived() == []


def test_the_embedded_broker_will_do_for_trying_out(tmp_path: Path, redis_url: str) -> None:
    from test_producer import events

    with EmbeddedBroker() as broker, redis.Redis.from_url(redis_url) as store:
        settings = Settings(home=tmp_path, kafka={"bootstrap_servers": broker.bootstrap_servers}, redis={"url": redis_url})
        admin = AdminClient(client_config(settings.kafka))
        assert is_embedded(admin)
        assert find_topic(admin, settings.kafka.topic) == find_topic(admin, settings.kafka.topic)
        produce([events(50)], settings.kafka)
        with in_this_process(settings):
            wait_for("the events are there", lambda: len(read_records(store, ["u0"])[0].last) >= 5)


def test_an_embedded_broker_that_was_started_again_loses_no_event(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from test_producer import events

    monkeypatch.setattr(archive_module, "GRACE_MS", 100)
    identities = set()
    landed: list[str] = []

    def all_landed() -> bool:
        return sum(file.rows for file in Landing(Lake(str(tmp_path / "lake"))).files()) == len(landed)

    for users, count in ((["a0", "a1"], 300), (["b0", "b1"], 100)):
        with EmbeddedBroker() as broker, redis.Redis.from_url(redis_url) as store:
            kafka = {"bootstrap_servers": broker.bootstrap_servers, "conf": {"log_level": str(SILENT)}}
            settings = Settings(home=tmp_path, kafka=kafka, redis={"url": redis_url}, stream={"archive_seconds": 1})
            admin = AdminClient(client_config(settings.kafka))
            topic = find_topic(admin, settings.kafka.topic)
            assert topic is not None
            identities.add(topic.identity)
            made = [{**row, "user_id": users[at % 2]} for at, row in enumerate(events(count).to_pylist())]
            landed += [row["user_id"] for row in made]
            produce([pa.Table.from_pylist(made, schema=EVENT_SCHEMA)], settings.kafka)
            with in_this_process(settings):
                for user in users:
                    wait_for("the user is there", lambda user=user: len(read_records(store, [user])[0].last) >= 5)
                wait_for("the events have landed", all_landed)
    assert len(identities) == 2
    assert not [r for r in caplog.records if "producers' time" in r.getMessage()], "nobody could mend it there"
