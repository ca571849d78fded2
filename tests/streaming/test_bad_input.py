"""Bad input is told, counted and kept, and nothing else waits for it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import orjson
import pytest
from builders import archived_as
from confluent_kafka import Producer
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ConfigSource,
    NewPartitions,
    NewTopic,
    ResourceType,
)
from stream_world import World, in_this_process, wait_for
from test_decode import ODD
from waiting import eventually

from recsys_core.events import DAY_MS, now_ms
from recsys_core.kafka_config import client_config
from recsys_core.online import read_records
from recsys_core.settings import KafkaSettings
from streaming import archive as archive_module
from streaming import topics as topics_module
from streaming.dead_letters import MAX_VALUE_BYTES
from streaming.progress import applied_key
from streaming.rebuild import rebuild
from streaming.topics import Topic, TopicError, find_topic, init_topics


def test_every_kind_of_bad_message_is_a_dead_letter_and_the_line_goes_on(world: Callable[..., World]) -> None:
    one = world(kafka={"max_message_bytes": 12 << 20})
    limited = one.settings.kafka.model_copy(update={"max_message_bytes": 1 << 20})
    one.settings = one.settings.model_copy(update={"kafka": limited})
    chance = random.Random(1)
    big = Producer(client_config(one.settings.kafka, message_max_bytes=12 << 20))
    bad: list[tuple[bytes | None, str]] = [
        (b"\x00\xff\xfe\x80 binary", "not JSON"),
        (None, "no value"),
        (b"", "no value"),
        (b'"text"', "not a JSON object"),
        (b'{"v": 1}', "missing user_id"),
        (orjson.dumps(one.event(chance)) * 2, "not JSON"),
        (orjson.dumps(one.event(chance, v=2)), "schema version is not 1"),
        (orjson.dumps(one.event(chance, ts="1772000000000")), "ts is not an integer"),
        (orjson.dumps(one.event(chance, user_id=17)), "user_id is not a string"),
        (orjson.dumps(one.event(chance, user_id=None)), "missing user_id"),
        (orjson.dumps(one.event(chance, ts=now_ms() // 1000)), "ts before 1990: wrong unit or broken clock"),
        (orjson.dumps(one.event(chance, ts=now_ms() + 400 * DAY_MS)), "ts in the future"),
        (orjson.dumps(one.event(chance, event_type="stare")), "unknown event_type"),
        (orjson.dumps(one.event(chance, item_id="i" * 300)), "item_id longer than 256 bytes"),
        (b'{"x": "' + b"y" * (10 << 20) + b'"}', f"value longer than {1 << 20} bytes"),
    ]
    for value, _ in bad:
        one.send(*(one.event(chance) for _ in range(20)))
        big.produce(one.settings.kafka.topic, value, b"a key")
        assert big.flush(30) == 0
    one.start()
    one.settle()
    one.prove()
    letters = one.messages(one.settings.kafka.dead_letter_topic)
    found = [dict(letter.headers() or []) for letter in letters]
    assert sorted(h["reason"].decode() for h in found) == sorted(reason for _, reason in bad)
    originals = {(m.partition(), m.offset()): m for m in one.messages()}
    for letter, headers in zip(letters, found, strict=True):
        original = originals[int(headers["partition"]), int(headers["offset"])]
        assert headers["topic"].decode() == one.settings.kafka.topic
        assert letter.key() == b"a key"
        value = original.value()
        assert letter.value() == (value if value is None else value[:MAX_VALUE_BYTES])
        assert headers.get("cut_from_bytes") == (str(len(value)).encode() if len(value or b"") > MAX_VALUE_BYTES else None)


def test_odd_json_means_the_same_live_in_a_replay_and_in_a_rebuild(world: Callable[..., World]) -> None:
    one = world(kafka={"partitions": 1})
    chance = random.Random(15)
    values = [
        orjson.dumps(one.event(chance))[:-1] + b',"%b":%b}' % (name, token) for token in ODD for name in (b"value", b"unknown")
    ]
    one.start()
    for value in values:
        one.send_raw(value, b"k", flush=chance.random() < 0.3)
    one.send(one.event(chance))
    one.settle()
    one.prove()
    accepted = sum(archived_as(one.landing, held).rows for held in one.landing.archived(one.settings.kafka.topic))
    assert len(values) / 4 < accepted < len(values)
    one.kill(one.workers[0])
    source = f"{one.identity()}.0"
    one.redis.delete(applied_key(source), *one.redis.scan_iter(match=f"user:{{{one.prefix}-*"))
    one.redis.delete(*one.redis.scan_iter(match=f"trend:{{{source}}}:*"))
    one.send(*(one.event(chance) for _ in range(3000)))
    one.start()
    one.settle()
    one.prove()
    rebuilt = rebuild(one.settings, 0)
    assert (rebuilt.events, rebuilt.differences.different) == (accepted + 3000, [])


def test_an_event_without_a_message_key_counts(world: Callable[..., World]) -> None:
    one = world()
    chance = random.Random(2)
    for _ in range(200):
        one.send_raw(orjson.dumps(one.event(chance)), flush=False)
    one.flush()
    one.start()
    one.settle()
    users = [f"{one.prefix}-{n}" for n in range(40)]
    assert sum(bool(record.last) for record in read_records(one.redis, users)) > 30


def test_partitions_that_were_added_are_found_and_lose_nothing(world: Callable[..., World]) -> None:
    one = world(kafka={"conf": {"topic.metadata.refresh.interval.ms": "500"}})
    chance = random.Random(3)
    one.start()
    one.send(*(one.event(chance) for _ in range(500)))
    one.settle()
    admin = AdminClient(client_config(one.settings.kafka))
    admin.create_partitions([NewPartitions(one.settings.kafka.topic, 6)])[one.settings.kafka.topic].result()
    wait_for("the topic has six partitions", lambda: len(one.ends()) == 6)
    one.producer = Producer(client_config(one.settings.kafka))
    wait_for(
        "the producer knows",
        lambda: len(one.producer.list_topics(one.settings.kafka.topic).topics.popitem()[1].partitions) == 6,
    )
    one.send(*(one.event(chance) for _ in range(500)))
    assert one.ends()[5] > 0
    one.settle()
    assert sum(r.last - r.first + 1 for r in one.landing.archived()) == 1000


def test_a_changed_partition_count_is_refused(world: Callable[..., World]) -> None:
    settings: KafkaSettings = world().settings.kafka.model_copy(update={"partitions": 9})
    with pytest.raises(TopicError, match="has 4 partitions and the settings say 9"):
        init_topics(settings)


def test_init_brings_retention_up_to_date_and_may_be_repeated(world: Callable[..., World]) -> None:
    settings: KafkaSettings = world().settings.kafka
    assert init_topics(settings) == init_topics(settings.model_copy(update={"retention_hours": 3}))


def own_settings(admin: AdminClient, topic: str) -> dict[str, str]:
    """What is set on the topic itself."""
    resource = ConfigResource(ResourceType.TOPIC, topic)
    found = admin.describe_configs([resource])[resource].result()
    return {name: entry.value for name, entry in found.items() if entry.source == ConfigSource.DYNAMIC_TOPIC_CONFIG.value}


def set_on(admin: AdminClient, topic: str, settings: dict[str, str]) -> None:
    """Set it and wait until the broker, which hears of it from its controller, says so."""
    entries = [ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET) for name, value in settings.items()]
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=entries)
    admin.incremental_alter_configs([resource])[resource].result()
    eventually(lambda: settings.items() <= own_settings(admin, topic).items())


def test_init_leaves_what_an_operator_has_set_on_the_topics(world: Callable[..., World]) -> None:
    settings: KafkaSettings = world().settings.kafka
    admin = AdminClient(client_config(settings))
    theirs = {"min.insync.replicas": "1", "compression.type": "lz4", "retention.bytes": "123456789", "segment.ms": "3600000"}
    for topic in (settings.topic, settings.dead_letter_topic):
        set_on(admin, topic, {**theirs, "message.timestamp.type": "CreateTime"})
    init_topics(settings.model_copy(update={"retention_hours": 3, "max_message_bytes": 1 << 21}))
    ours = {"retention.ms": "10800000", "max.message.bytes": str(1 << 21), "message.timestamp.type": "LogAppendTime"}
    for topic in (settings.topic, settings.dead_letter_topic):
        eventually(lambda name=topic: own_settings(admin, name) == theirs | ours)


def test_two_of_three_copies_have_a_message_before_it_counts_unless_the_topic_says_otherwise(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: KafkaSettings = world().settings.kafka
    admin = AdminClient(client_config(settings))
    init_topics(settings)
    assert "min.insync.replicas" not in own_settings(admin, settings.topic)
    find = topics_module.find_topic
    monkeypatch.setattr(
        topics_module, "find_topic", lambda *asked: replace(found, replication=3) if (found := find(*asked)) else None
    )
    set_on(admin, settings.dead_letter_topic, {"min.insync.replicas": "1"})
    init_topics(settings)
    eventually(lambda: own_settings(admin, settings.topic).get("min.insync.replicas") == "2")
    assert own_settings(admin, settings.dead_letter_topic)["min.insync.replicas"] == "1"
    asked: list[NewTopic] = []
    monkeypatch.setattr(topics_module, "_create", lambda _, topic: asked.append(topic))
    monkeypatch.setattr(topics_module, "find_topic", lambda *_: None)
    monkeypatch.setattr(topics_module, "_await_topic", lambda _, name: Topic(name, "0", 4))
    init_topics(settings.model_copy(update={"replication": 3}))
    assert [topic.config["min.insync.replicas"] for topic in asked] == ["2", "2"]


def test_on_a_topic_with_the_producers_time_a_message_arrives_when_it_is_taken(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(archive_module, "GRACE_MS", 300)
    one = world(kafka={"partitions": 1})
    chance = random.Random(14)
    topic = one.settings.kafka.topic
    kept = {"message.timestamp.type": "CreateTime", "message.timestamp.after.max.ms": str(2**63 - 1)}
    admin = AdminClient(client_config(one.settings.kafka))
    set_on(admin, topic, kept)
    year_2106 = 4_300_000_000_000
    with in_this_process(one.settings):
        for stamp in (1, now_ms() - 3 * 3600_000, year_2106):
            for _ in range(5):
                event = one.event(chance)
                one.producer.produce(topic, orjson.dumps(event), str(event["user_id"]), timestamp=stamp)
            one.send(one.event(chance, ts=now_ms() + DAY_MS))
        one.settle()
    letters = one.messages(one.settings.kafka.dead_letter_topic)
    assert [dict(letter.headers() or [])["reason"] for letter in letters] == [b"ts in the future"] * 3
    held = [archived_as(one.landing, file) for file in one.landing.archived(topic)]
    assert (sum(f.rows for f in held), sum(f.rejected for f in held)) == (15, 3)
    [told] = [record.getMessage() for record in caplog.records if "producers' time" in record.getMessage()]
    assert topic in told
    assert "`recsys kafka init`" in told
    rebuilt = rebuild(one.settings, 0)
    assert (rebuilt.events, rebuilt.differences.different) == (15, [])


def test_a_topic_that_was_deleted_and_made_again_is_read_from_its_start(world: Callable[..., World]) -> None:
    one = world()
    chance = random.Random(4)
    one.start()
    one.send(*(one.event(chance) for _ in range(800)))
    one.settle()
    before = one.identity()
    admin = AdminClient(client_config(one.settings.kafka))
    topic = one.settings.kafka.topic
    admin.delete_topics([topic])[topic].result()
    wait_for("the topic is gone", lambda: find_topic(admin, topic) is None)
    init_topics(one.settings.kafka)
    assert one.identity() != before
    one.prefix = f"{one.prefix}-again"
    one.producer = Producer(client_config(one.settings.kafka))
    one.send(*(one.event(chance) for _ in range(300)))
    one.settle()
    one.prove()
