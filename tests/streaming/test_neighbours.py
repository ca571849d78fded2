"""No neighbour ends a worker, stops it or blinds it: Kafka, the lake and Redis fail in every way and come back."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import orjson
import pytest
import redis
from builders import archived_as
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from moody import MoodyConsumer, MoodyLake, StoreError
from redis_cluster import redis_cluster
from stream_world import PARTITIONS, World, in_this_process, produce_for, wait_for
from test_producer import events

from recsys_cli.processes import free_port
from recsys_cli.stack import redis_answers, redis_binary, redis_command
from recsys_core.events import HOUR_MS, MINUTE_MS, now_ms
from recsys_core.heartbeat import HEARTBEATS_KEY, read_heartbeats
from recsys_core.kafka_config import client_config
from recsys_core.lake import Lake
from recsys_core.landing import offset_faults
from recsys_core.live_trends import SOURCES_KEY
from recsys_core.online import read_records, user_key
from recsys_core.settings import Settings
from recsys_core.tombstones import TombstoneLog, hash_of
from streaming import archive as archive_module
from streaming import archiver as archiver_module
from streaming import forgotten as forgotten_module
from streaming import progress as progress_module
from streaming import worker as worker_module
from streaming.broker import EmbeddedBroker
from streaming.connections import redis_for_writes
from streaming.dead_letters import DeadLetterQueue
from streaming.forgotten import ForgottenUsers
from streaming.producer import produce
from streaming.progress import applied_key


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
    monkeypatch.setattr(archiver_module, "CLOSE_SECONDS", 0.5)
    monkeypatch.setattr(forgotten_module, "ASK_SECONDS", 0.5)


def fail(lake: type[MoodyLake], how: str) -> None:
    if how == "hangs":
        lake.answers.clear()
    else:
        lake.failure = {"odd": StoreError, "refuses": ConnectionRefusedError}[how]


def beat_age_ms(one: World) -> int:
    return now_ms() - max((beat.at for beat in read_heartbeats(one.redis) if beat.worker == "here"), default=0)


@pytest.mark.parametrize("how", ["odd", "refuses", "hangs"])
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
        for _ in range(2):
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
        one.settle(landing=False)
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


@pytest.mark.parametrize("seed", range(2))
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
        wait_for("it failed", lambda: one.send(*(one.event(chance) for _ in range(300))) or MoodyConsumer.failures > 6, 30)
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
            wait_for("its marker is there", lambda end=end: one.ends() == {0: end})
            one.settle()
            wait_for("no lag", lambda: [b.lag for b in read_heartbeats(one.redis) if b.worker == "here"] == [0], 15)
            wait_for("the group knows", lambda end=end: watcher.committed([place], timeout=9)[0].offset == end, 15)
        assert worker.metrics.events._value.get() == 8
        held = one.landing.archived(one.settings.kafka.topic)
        assert offset_faults(held) == []
        assert sum(archived_as(one.landing, r).rows for r in held) == 8
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


def test_a_batch_that_waits_for_redis_brings_nobody_back_who_is_forgotten_meanwhile(
    world: Callable[..., World], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forgotten_module, "REREAD_SECONDS", 0.05)
    one = world(redis={"url": server.url})
    chance = random.Random(4)
    prepare, prepared = worker_module._Session._prepare, []
    made: list[ForgottenUsers] = []

    class Known(ForgottenUsers):
        def __init__(self, lake: Lake) -> None:
            super().__init__(lake)
            made.append(self)

    def noted(self: Any, taken: Any) -> Any:
        work = prepare(self, taken)
        prepared.extend(work.prepared.users.users)
        return work

    monkeypatch.setattr(worker_module, "ForgottenUsers", Known)
    monkeypatch.setattr(worker_module._Session, "_prepare", noted)
    with in_this_process(one.settings) as worker:
        one.send(one.event(chance, user_id="ann"))
        one.settle(landing=False)
        server.signal(signal.SIGSTOP)
        for user in ("eve", "bob"):
            one.send(one.event(chance, user_id=user))
            wait_for("it waits", lambda user=user: user in prepared)
        TombstoneLog(Lake(one.settings.lake_uri)).add(hash_of("bob"), now_ms())
        wait_for("the worker knows", lambda: hash_of("bob") in made[0].covered().moments)
        server.signal(signal.SIGCONT)
        one.send(one.event(chance, user_id="zed"))
        one.settle(landing=False)
        assert worker.metrics.restarts._metrics == {}
        assert [bool(one.redis.exists(user_key(user))) for user in ("ann", "eve", "bob", "zed")] == [True, True, False, True]


def test_values_of_other_kinds_under_the_names_of_a_worker_give_way(world: Callable[..., World]) -> None:
    one = world(stream={"heartbeat_seconds": 0.1})
    chance = random.Random(6)
    positions = [applied_key(f"{one.identity()}.{number}") for number in range(PARTITIONS)]
    one.send(*(one.event(chance) for _ in range(200)))
    with in_this_process(one.settings):
        one.settle()
    one.redis.delete(*positions, HEARTBEATS_KEY, SOURCES_KEY)
    one.redis.lpush(positions[0], "a")
    one.redis.set(positions[1], "soon")
    for key in (positions[2], HEARTBEATS_KEY, SOURCES_KEY):
        one.redis.set(key, "text")
    with in_this_process(one.settings) as worker:
        one.send(*(one.event(chance) for _ in range(200)))
        one.settle()
        wait_for("it was heard of", lambda: beat_age_ms(one) < 1000)
        for key in (positions[0], HEARTBEATS_KEY, SOURCES_KEY):
            one.redis.delete(key)
            one.redis.lpush(key, "a")
        wait_for("it was heard of again", lambda: one.redis.type(HEARTBEATS_KEY) == b"hash")
        one.send(*(one.event(chance) for _ in range(20)))
        one.settle()
        assert [reason for (reason,) in worker.metrics.restarts._metrics] == ["StateLost"]
        one.prove()


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


class Server:
    """A Redis that is killed and started again where it was; it keeps what it was told to save."""

    def __init__(self, port: int, command: Sequence[str]) -> None:
        self.port = port
        self.url = f"redis://127.0.0.1:{port}/0"
        self._command = [*command, "--save", ""]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        wait_for("redis is there", lambda: redis_answers(self.url))

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    port = free_port()
    one = Server(port, redis_command(tmp_path, port))
    one.start()
    yield one
    one.kill()


@pytest.mark.parametrize("count", [40, 600])
def test_a_redis_that_is_back_from_a_copy_of_a_moment_ago_gets_what_it_lost(
    world: Callable[..., World], server: Server, count: int
) -> None:
    one = world(redis={"url": server.url})
    chance = random.Random(count)
    with in_this_process(one.settings) as worker:
        one.send(*(one.event(chance) for _ in range(50)))
        one.settle(landing=False)
        time.sleep(1.2)  # the position that is written once a second is as far
        one.redis.save()
        one.send(*(one.event(chance) for _ in range(count)))
        wait_for("all is applied", lambda: worker.metrics.messages._value.get() == one.sent)
        server.kill()
        server.start()
        one.settle()
        one.prove()


def test_a_master_of_a_cluster_that_is_back_from_a_copy_of_a_moment_ago_gets_what_it_lost(
    world: Callable[..., World], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "TRAIL_SECONDS", 3.0)
    with redis_cluster(tmp_path) as nodes, ExitStack() as held:
        one = world(redis={"mode": "cluster", "nodes": nodes}, stream={"heartbeat_seconds": 0.2})
        one.redis = redis_for_writes(one.settings)
        chance = random.Random(6)
        with in_this_process(one.settings) as worker:
            produce_for(one, chance, 0.5)
            one.settle(landing=False)
            ports = [int(node.split(":")[1]) for node in nodes]
            [master] = [port for port in ports if redis.Redis(port=port).keys(f"user:{{{one.prefix}-7}}")]
            redis.Redis(port=master).save()
            one.send(*(one.event(chance) for _ in range(300)))
            wait_for("all is applied", lambda: worker.metrics.messages._value.get() == one.sent)
            os.kill(redis.Redis(port=master).info("server")["process_id"], signal.SIGKILL)
            folder = tmp_path / str(master)
            node = ["--cluster-enabled", "yes", "--cluster-config-file", str(folder / "nodes.conf"), "--dir", str(folder)]
            again = Server(master, [str(redis_binary()), "--port", str(master), "--bind", "127.0.0.1", *node])
            held.callback(again.kill)
            again.start()
            up = [redis.Redis(port=port) for port in ports]
            wait_for("the cluster is up", lambda: all(n.cluster("info")["cluster_state"] == "ok" for n in up))
            one.settle()
            one.prove()


@pytest.mark.parametrize("what", ["redis refuses", "dead letters are not taken"])
def test_the_archive_advances_while_redis_or_the_topic_of_dead_letters_is_away(
    world: Callable[..., World], server: Server, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(worker_module, "PAUSE_SECONDS", 0.3)
    one = world(redis={"url": server.url})
    chance = random.Random(what)
    send = DeadLetterQueue.send
    with in_this_process(one.settings) as worker:
        produce_for(one, chance, 0.3)
        one.settle()
        if what == "dead letters are not taken":
            one.send_raw(b"no event", b"k")

            def refused(*_: Any) -> int:
                raise KafkaException(KafkaError(KafkaError._TRANSPORT))

            monkeypatch.setattr(DeadLetterQueue, "send", refused)
        else:
            server.kill()
        for _ in range(2):
            produce_for(one, chance, 0.3)
            one.settle(redis=False)
        monkeypatch.setattr(DeadLetterQueue, "send", send)
        if what == "redis refuses":
            server.start()
        produce_for(one, chance, 0.3)
        one.settle()
        one.prove()
        assert worker.metrics.paused._value.get() == 0


def test_a_worker_whose_neighbours_are_stopped_with_it_ends_with_one_line(tmp_path: Path, server: Server) -> None:
    with ExitStack() as held, ExitStack() as brokers:
        kafka = {"bootstrap_servers": brokers.enter_context(EmbeddedBroker()).bootstrap_servers}
        code = (
            "import sys, pathlib, json; from recsys_core.settings import load_settings; from streaming.run import main\n"
            "home, sections = sys.argv[1:]; sys.exit(main(load_settings(pathlib.Path(home), **json.loads(sections))))"
        )
        sections = {"kafka": kafka, "redis": {"url": server.url}}
        command = [sys.executable, "-c", code, str(tmp_path / "home"), orjson.dumps(sections).decode()]
        said, nothing = tmp_path / "said", tmp_path / "empty.toml"
        nothing.touch()
        with said.open("w") as out:
            worker = subprocess.Popen(command, stderr=out, env={**os.environ, "RECSYS_CONFIG": str(nothing)})
        held.callback(worker.kill)
        settings = Settings(home=tmp_path, kafka=kafka, redis={"url": server.url})
        produce([events(50)], settings.kafka)
        with redis.Redis.from_url(server.url) as store:
            wait_for("the events are there", lambda: len(read_records(store, ["u0"])[0].last) >= 5)
        before = len(said.read_text().splitlines())
        worker.send_signal(signal.SIGSTOP)
        worker.send_signal(signal.SIGTERM)
        server.kill()
        brokers.close()
        worker.send_signal(signal.SIGCONT)
        assert worker.wait(20) == 0
        lines = [line for line in said.read_text().splitlines()[before:] if " INFO " not in line]
        # Kafka's client may say that the connection is gone before the signal is heard.
        own = [line for line in lines if "streaming.librdkafka" not in line]
        assert (len(own), len(lines) <= 2) == (1, True), lines
        assert "the next worker repeats some work" in own[0]


def test_a_batch_counts_once_a_replica_has_it(
    world: Callable[..., World], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "REDIS_SECONDS", 0.1)
    monkeypatch.setattr(worker_module, "DRAIN_SECONDS", 0.1)
    port = free_port()
    replica = Server(port, [*redis_command(tmp_path / "replica", port), "--replicaof", "127.0.0.1", str(server.port)])
    one = world(redis={"url": server.url, "wait_replicas": 1}, stream={"archive": False})
    chance = random.Random(8)
    with in_this_process(one.settings) as worker, redis.Redis.from_url(replica.url) as copy:
        one.send(*(one.event(chance, user_id="ann") for _ in range(3)))
        wait_for("there is no replica", lambda: worker.metrics.redis_retries._value.get() >= 2)
        assert worker.metrics.messages._value.get() == 0
        replica.start()
        try:
            wait_for("it counts", lambda: worker.metrics.messages._value.get() == 3)
            assert read_records(copy, ["ann"])[0].last
        finally:
            replica.kill()
