"""What the archive of the topic proves before an hour made from it is used."""

from collections.abc import Iterable
from dataclasses import dataclass

import dagster as dg

from recsys_assets.ingestion import clicks_hourly
from recsys_assets.resources import PlatformResource
from recsys_core.events import HOUR_MS, key_start_ms
from recsys_core.kafka_config import client_config, topic_identity
from recsys_core.landing import Landing, OffsetRange, offset_faults
from recsys_core.settings import KafkaSettings
from recsys_core.tables import CLICKS_HOURLY

BROKER_SECONDS = 3.0
SHOWN = 20


@dataclass(frozen=True)
class BrokerEnds:
    """First offset that is kept and end of each partition of a topic, by the brokers."""

    identity: str
    partitions: dict[int, tuple[int, int]]


@dg.asset_check(asset=clicks_hourly, blocking=True)
def offsets_have_no_gap(context: dg.AssetCheckExecutionContext, platform: PlatformResource) -> dg.AssetCheckResult:
    """The archive files that an hour was made from hold each offset between them once, as many messages as were taken."""
    if context.has_partition_key or context.has_partition_key_range:
        hours = list(context.partition_keys)
    else:
        latest = platform.lake.latest(CLICKS_HOURLY)
        hours = [latest] if latest else []
    held = ranges_behind(platform.landing, hours)
    faults = [*offset_faults(held), *count_faults(platform.landing, held)]
    ends = broker_ends(platform.settings.kafka) if held else None
    if ends is not None:
        faults += broker_faults(held, ends, platform.settings.kafka.topic)
    return dg.AssetCheckResult(
        passed=not faults,
        metadata={
            "archive files": len(held),
            "offsets": sum(one.last - one.first + 1 for one in held),
            "partitions": len({(one.topic, one.identity, one.partition) for one in held}),
            "compared with the brokers": ends is not None,
            "faults": faults[:SHOWN],
        },
    )


def ranges_behind(landing: Landing, hours: Iterable[str]) -> list[OffsetRange]:
    """The archive files that hold events of the hours, and of each partition those between the first and last of them."""
    starts = [key_start_ms(hour) for hour in hours]
    covering: dict[tuple[str, str, int], list[OffsetRange]] = {}
    for start in starts:
        for file in landing.covering(start, start + HOUR_MS):
            if one := OffsetRange.parse(file.path):
                covering.setdefault((one.topic, one.identity, one.partition), []).append(one)
    spans = {key: (min(r.first for r in found), max(r.last for r in found)) for key, found in covering.items()}
    return [
        one
        for one in landing.archived()
        if (span := spans.get((one.topic, one.identity, one.partition))) and one.last >= span[0] and one.first <= span[1]
    ]


def count_faults(landing: Landing, held: Iterable[OffsetRange]) -> list[str]:
    """Files that hold fewer or more rows than the messages that were taken for them, but for users who were forgotten."""
    rows = {OffsetRange.parse(file.path): file.rows for file in landing.files()}
    faults = []
    for one in held:
        if one not in rows:
            faults.append(f"{one.name}: the file can't be read")
            continue
        facts = landing.archive_facts(one)
        told = facts["events"] + facts.get("forgotten", 0) + facts["rejected"]
        if facts["events"] != rows[one] or told != facts["messages"]:
            faults.append(
                f"{one.name}: {facts['messages']} messages were taken, "
                f"{rows[one]} events and {facts['rejected']} rejected are held"
            )
    return faults


def broker_faults(held: Iterable[OffsetRange], ends: BrokerEnds, topic: str) -> list[str]:
    """Where the archive and the brokers disagree on the topic as it is now."""
    faults = []
    last: dict[int, int] = {}
    for one in held:
        if one.topic == topic and one.identity == ends.identity:
            last[one.partition] = max(last.get(one.partition, -1), one.last)
    for partition, offset in sorted(last.items()):
        _low, high = ends.partitions.get(partition, (0, 0))
        if offset >= high:
            faults.append(f"{topic} partition {partition}: the archive holds offset {offset}, the brokers end at {high}")
    return faults


def broker_ends(settings: KafkaSettings) -> BrokerEnds | None:
    """What the brokers hold of the topic, None when they can't be asked."""
    from confluent_kafka import Consumer, KafkaException, TopicCollection, TopicPartition
    from confluent_kafka.admin import AdminClient

    try:
        admin = AdminClient(client_config(settings))
        described = admin.describe_topics(TopicCollection([settings.topic]), request_timeout=BROKER_SECONDS)
        topic = described[settings.topic].result()
        consumer = Consumer(client_config(settings, group_id="recsys-check"))
        try:
            ends = {
                p.id: consumer.get_watermark_offsets(TopicPartition(settings.topic, p.id), timeout=BROKER_SECONDS)
                for p in topic.partitions
            }
        finally:
            consumer.close()
    except KafkaException:
        return None
    return BrokerEnds(topic_identity(topic.topic_id.get_most_significant_bits()), ends)
