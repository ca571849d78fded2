"""A dead letter can't fail: what a topic does not take never holds up the messages behind it."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable

import pytest
from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType
from stream_world import World, in_this_process

from recsys_core.kafka_config import SILENT, client_config
from recsys_core.settings import KafkaSettings
from streaming import archive as archive_module
from streaming import dead_letters as dead_letters_module
from streaming.dead_letters import MAX_KEY_BYTES, MAX_VALUE_BYTES, DeadLetter, DeadLetterQueue


@pytest.fixture(autouse=True)
def _this_machine_has_the_brokers_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "GRACE_MS", 300)


def limit(one: World, topic: str, max_bytes: int) -> None:
    entry = ConfigEntry("max.message.bytes", str(max_bytes), incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
    admin = AdminClient(client_config(one.settings.kafka))
    admin.incremental_alter_configs([resource])[resource].result()


def letter(offset: int, key: bytes | None, value: bytes | None) -> DeadLetter:
    return DeadLetter("events", 0, offset, "not JSON", key, value)


def test_a_key_of_a_megabyte_is_a_dead_letter_like_any_other(world: Callable[..., World]) -> None:
    one = world()
    chance = random.Random(1)
    limit(one, one.settings.kafka.topic, 3 << 20)
    swapped = Producer(client_config(one.settings.kafka, message_max_bytes=3 << 20))
    swapped.produce(one.settings.kafka.topic, b"x", b"k" * 1_010_000)
    swapped.produce(one.settings.kafka.topic, b"v" * 1_010_000, b"k" * 1_010_000)
    assert swapped.flush(30) == 0
    one.send(*(one.event(chance) for _ in range(50)))
    with in_this_process(one.settings) as worker:
        one.settle()
        one.prove()
        assert worker.metrics.dead_letters_refused._value.get() == 0
    first, second = sorted(one.messages(one.settings.kafka.dead_letter_topic), key=lambda found: len(found.value() or b""))
    assert (first.key(), first.value()) == (b"k" * MAX_KEY_BYTES, b"x")
    assert dict(first.headers() or [])["key_cut_from_bytes"] == b"1010000"
    assert (second.key(), second.value()) == (b"k" * MAX_KEY_BYTES, b"v" * MAX_VALUE_BYTES)
    assert dict(second.headers() or [])["cut_from_bytes"] == b"1010000"


def test_what_is_too_large_for_the_topic_goes_without_its_content(world: Callable[..., World]) -> None:
    one = world()
    topic = one.settings.kafka.dead_letter_topic
    limit(one, topic, 5_000)
    queue = DeadLetterQueue(one.settings.kafka)
    assert queue.send([letter(0, b"k", b"v" * 50_000), letter(1, b"k", b"small"), letter(2, None, b"v" * 50_000)]) == 0
    found = {(dict(m.headers() or []))["offset"]: m for m in one.messages(topic)}
    assert {offset: message.value() for offset, message in found.items()} == {b"0": b"", b"1": b"small", b"2": b""}
    assert dict(found[b"2"].headers() or [])["cut_from_bytes"] == b"50000"


def test_a_topic_that_refuses_for_good_is_told_once_and_holds_nothing_up(
    world: Callable[..., World], caplog: pytest.LogCaptureFixture
) -> None:
    one = world()
    chance = random.Random(2)
    topic = one.settings.kafka.dead_letter_topic
    limit(one, topic, 10)
    with in_this_process(one.settings) as worker:
        for round_ in range(2):
            one.send_raw(b"no event %d" % round_, b"k")
            one.send(*(one.event(chance) for _ in range(30)))
            one.settle(landing=False)
        one.settle()
        one.prove()
        assert worker.metrics.dead_letters_refused._value.get() == 2
        assert worker.metrics.dead_letters.labels("not JSON")._value.get() == 2
    [told] = [record.getMessage() for record in caplog.records if "refuses dead letters" in record.getMessage()]
    assert topic in told
    reasons = [row["reason"] for table in one.landing.quarantined() for row in table.to_pylist()]
    assert reasons == ["not JSON"] * 2


def test_letters_for_a_topic_that_is_not_there_are_given_up(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dead_letters_module, "METADATA_SECONDS", 0.5)
    settings = world().settings.kafka.model_copy(update={"dead_letter_topic": f"nowhere-{uuid.uuid4().hex[:8]}"})
    queue = DeadLetterQueue(settings)
    assert [queue.send([letter(at, b"k", b"v")]) for at in range(3)] == [1, 1, 1]
    assert len([record for record in caplog.records if "refuses dead letters" in record.getMessage()]) == 1


def test_brokers_that_are_away_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead_letters_module, "SEND_SECONDS", 0.5)
    nowhere = KafkaSettings(bootstrap_servers="127.0.0.1:1", conf={"log_level": str(SILENT)})
    queue = DeadLetterQueue(nowhere)
    for _ in range(2):
        with pytest.raises(KafkaException):
            queue.send([letter(0, b"k", b"v")])


@pytest.mark.parametrize("max_bytes", [1024, 20_000])
def test_any_message_fits_into_a_dead_letter_however_small_the_topic_is(world: Callable[..., World], max_bytes: int) -> None:
    name = uuid.uuid4().hex[:8]
    one = world(kafka={"max_message_bytes": max_bytes, "dead_letter_topic": f"small-{name}"})
    chance = random.Random(max_bytes)
    contents = [None, b"", *(chance.randbytes(chance.choice([1, 900, 5_000, 300_000])) for _ in range(12))]
    letters = [letter(at, chance.choice(contents), chance.choice(contents)) for at in range(40)]
    assert DeadLetterQueue(one.settings.kafka).send(letters) == 0
    assert len(one.messages(f"small-{name}")) == 40
