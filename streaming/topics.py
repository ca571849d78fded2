"""The topics of the platform: made with their partitions and retention, and told from a topic that was made again."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ConfigSource,
    NewTopic,
    ResourceType,
)

from recsys_core.errors import UserError
from recsys_core.events import HOUR_MS
from recsys_core.kafka_config import SILENT, client_config, topic_identity
from recsys_core.settings import KafkaSettings

ADMIN_SECONDS = 15.0


class TopicError(UserError, RuntimeError):
    """A topic is not as it has to be; the message says what differs and what to do."""


@dataclass(frozen=True)
class Topic:
    """A topic as it is now. `identity` differs between a topic and one of the same name made after it was deleted."""

    name: str
    identity: str
    partitions: int
    replication: int = 1


def find_topic(admin: AdminClient, name: str, seconds: float = ADMIN_SECONDS) -> Topic | None:
    """The topic, None when there is none. Raises KafkaException when the brokers do not answer.

    The embedded broker has no topic ids, and its offsets start over with it: there the identity is made of the name and of what
    differs between two starts, where the broker lies in its memory and the port that it was given.
    """
    if is_embedded(admin):
        cluster = admin.list_topics(name, timeout=seconds)
        start = f"{cluster.cluster_id} {sorted(map(str, cluster.brokers.values()))} {name}"
        return Topic(name, blake2b(start.encode(), digest_size=4).hexdigest(), len(cluster.topics[name].partitions))
    try:
        found = admin.describe_topics(TopicCollection([name]), request_timeout=seconds)[name].result()
    except KafkaException as error:
        if error.args[0].code() in (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.UNKNOWN_TOPIC_ID):
            return None
        raise
    replication = min((len(partition.replicas) for partition in found.partitions), default=1)
    return Topic(name, topic_identity(found.topic_id.get_most_significant_bits()), len(found.partitions), replication)


@lru_cache(maxsize=8)
def is_embedded(admin: AdminClient) -> bool:
    """Whether the broker is librdkafka's mock, which has no topic ids and makes a topic when it is asked for one."""
    return str(admin.list_topics(timeout=ADMIN_SECONDS).cluster_id).startswith("mockCluster")


def init_topics(settings: KafkaSettings) -> list[Topic]:
    """Make the topics that are missing and bring retention and message size of the others up to date.

    Every other setting of a topic stays as it is. Where three or more copies are kept, two have to have a message before it
    counts as taken, unless the topic says otherwise.

    The broker's time of arrival becomes the time of a message, by which the archive is cut and the future is judged.
    Raises TopicError when a topic has another number of partitions: users would move to other partitions, and the order
    of one user's events would be lost while both are read.
    """
    # The client library keeps an admin client to the end of the process, also when the brokers end before it.
    admin = AdminClient({**client_config(settings), "log_level": SILENT})
    wanted = {
        "retention.ms": str(settings.retention_hours * HOUR_MS),
        "max.message.bytes": str(settings.max_message_bytes),
        "message.timestamp.type": "LogAppendTime",
    }
    made = []
    for name, partitions in ((settings.topic, settings.partitions), (settings.dead_letter_topic, 1)):
        found = find_topic(admin, name)
        if found is None:
            config = {**wanted, **_preferred(settings.replication)}
            _create(admin, NewTopic(name, partitions, settings.replication, config=config))
            found = _await_topic(admin, name)
        elif found.partitions != partitions and name == settings.topic:
            raise TopicError(
                f"{name} has {found.partitions} partitions and the settings say {partitions}: users would change their "
                "partition. Set kafka.partitions to what there is, or make a topic of another name and read both"
            )
        else:
            _alter(admin, name, wanted, _preferred(found.replication))
        made.append(found)
    return made


def _create(admin: AdminClient, topic: NewTopic) -> None:
    try:
        admin.create_topics([topic], request_timeout=ADMIN_SECONDS)[topic.topic].result()
    except KafkaException as error:
        if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
            raise TopicError(f"{topic.topic} can't be made: {error.args[0].str()}") from error


def _await_topic(admin: AdminClient, name: str) -> Topic:
    """A topic that was just made; the brokers hear of it a moment later."""
    deadline = time.monotonic() + ADMIN_SECONDS
    while time.monotonic() < deadline:
        if found := find_topic(admin, name):
            return found
        time.sleep(0.05)
    raise TopicError(f"{name} was made, and the brokers do not know it after {ADMIN_SECONDS:.0f} s")


def _preferred(replication: int) -> dict[str, str]:
    """Settings that a topic gets unless it has its own."""
    return {"min.insync.replicas": "2"} if replication >= 3 else {}


def _alter(admin: AdminClient, name: str, wanted: Mapping[str, str], preferred: Mapping[str, str]) -> None:
    resource = ConfigResource(ResourceType.TOPIC, name)
    current = admin.describe_configs([resource], request_timeout=ADMIN_SECONDS)[resource].result()
    own = {key for key, entry in current.items() if entry.source == ConfigSource.DYNAMIC_TOPIC_CONFIG.value}
    chosen = {**{key: value for key, value in preferred.items() if key not in own}, **wanted}
    changes = [
        ConfigEntry(key, value, incremental_operation=AlterConfigOpType.SET)
        for key, value in chosen.items()
        if key not in current or current[key].value != value
    ]
    if changes:
        changed = ConfigResource(ResourceType.TOPIC, name, incremental_configs=changes)
        admin.incremental_alter_configs([changed], request_timeout=ADMIN_SECONDS)[changed].result()
