"""Events into a topic of the embedded broker, seen by other processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import orjson
import pyarrow as pa
import pytest
from confluent_kafka import Consumer, Message

from recsys_core.events import EVENT_SCHEMA
from recsys_core.settings import KafkaSettings
from streaming import producer as producer_module
from streaming.broker import EmbeddedBroker
from streaming.producer import DeliveryError, produce


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker(tmp_path / "broker.address") as running:
        yield running


def events(count: int, users: int = 3) -> pa.Table:
    rows = [
        {"event_id": f"e{n}", "user_id": f"u{n % users}", "item_id": "i1", "event_type": "view", "ts": 1_772_000_000_000 + n}
        for n in range(count)
    ]
    return pa.Table.from_pylist(rows, schema=EVENT_SCHEMA)


def to(servers: str, topic: str) -> KafkaSettings:
    return KafkaSettings(bootstrap_servers=servers, topic=topic)


def consume(servers: str, topic: str, count: int) -> list[Message]:
    consumer = Consumer({"bootstrap.servers": servers, "group.id": "test", "auto.offset.reset": "earliest"})
    consumer.subscribe([topic])
    messages: list[Message] = []
    while len(messages) < count:
        found = consumer.consume(count - len(messages), timeout=20)
        assert found, f"only {len(messages)} of {count} messages came"
        messages += found
    consumer.close()
    return messages


def test_an_event_is_json_with_its_version_keyed_by_its_user(broker: EmbeddedBroker) -> None:
    produce([events(1)], to(broker.bootstrap_servers, "one"))
    [message] = consume(broker.bootstrap_servers, "one", 1)
    assert message.key() == b"u0"
    assert orjson.loads(message.value() or b"") == {
        "v": 1,
        "event_id": "e0",
        "user_id": "u0",
        "item_id": "i1",
        "event_type": "view",
        "ts": 1_772_000_000_000,
    }


def test_all_rows_arrive_and_those_of_one_user_in_order(broker: EmbeddedBroker) -> None:
    table = events(5000, users=50)
    done = produce([table.slice(0, 2000), *table.slice(2000).to_batches()], to(broker.bootstrap_servers, "many"))
    assert done.count == 5000
    of_user: dict[bytes, list[int]] = {}
    for message in consume(broker.bootstrap_servers, "many", 5000):
        of_user.setdefault(message.key() or b"", []).append(orjson.loads(message.value() or b"")["ts"])
    assert len(of_user) == 50
    assert all(times == sorted(times) and len(times) == 100 for times in of_user.values())


def test_a_set_rate_is_kept(broker: EmbeddedBroker) -> None:
    done = produce([events(200)], to(broker.bootstrap_servers, "slow"), rate=200)
    assert 0.95 <= done.seconds < 2.5


def test_a_full_queue_waits_instead_of_failing(broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(producer_module, "QUEUE_MESSAGES", 10)
    assert produce([events(500)], to(broker.bootstrap_servers, "narrow")).count == 500
    assert len(consume(broker.bootstrap_servers, "narrow", 500)) == 500


def test_an_unreachable_broker_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(producer_module, "DELIVERY_SECONDS", 1)
    with pytest.raises(DeliveryError, match=r"nowhere at 127\.0\.0\.1:1: "):
        produce([events(3)], to("127.0.0.1:1", "nowhere"))


OTHER_PROCESS = """
import json, sys
from confluent_kafka import Consumer, Producer
servers = open(sys.argv[1]).read()
consumer = Consumer({"bootstrap.servers": servers, "group.id": "other", "auto.offset.reset": "earliest"})
consumer.subscribe(["there"])
message = consumer.poll(20)
print(message.value().decode())
consumer.close()
producer = Producer({"bootstrap.servers": servers})
producer.produce("back", b"seen")
assert producer.flush(10) == 0
"""


def test_another_process_finds_the_broker_by_its_address_file(broker: EmbeddedBroker) -> None:
    assert broker.address_file is not None
    assert broker.address_file.read_text() == broker.bootstrap_servers
    produce([events(1)], to(broker.bootstrap_servers, "there"))
    other = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, str(broker.address_file)], capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(other.stdout)["event_id"] == "e0"
    assert consume(broker.bootstrap_servers, "back", 1)[0].value() == b"seen"


def test_a_stopped_broker_takes_its_address_file_away(tmp_path: Path) -> None:
    path = tmp_path / "address"
    with EmbeddedBroker(path):
        assert path.exists()
    assert not path.exists()


RUN_BROKER = """
from streaming.broker import run_broker
run_broker(lambda address: print(address, flush=True))
"""


def test_run_broker_announces_its_address_and_ends_on_sigterm() -> None:
    running = subprocess.Popen([sys.executable, "-c", RUN_BROKER], stdout=subprocess.PIPE, text=True)
    try:
        assert running.stdout is not None
        address = running.stdout.readline().strip()
        assert produce([events(10)], to(address, "run")).count == 10
        running.terminate()
        assert running.wait(20) == 0
    finally:
        running.kill()
