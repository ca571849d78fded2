"""What the archive of the topic proves before an hour made from it is used."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import dagster as dg
import pyarrow as pa

from recsys_assets.ingestion import clicks_hourly
from recsys_assets.resources import PlatformResource
from recsys_core.events import HOUR_MS, key_start_ms
from recsys_core.kafka_config import client_config, topic_identity
from recsys_core.landing import Landing, OffsetRange, offset_faults, ranges
from recsys_core.ledger import LandingFile
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
    files = files_behind(platform.landing, hours)
    held = list(files)
    faults = [*offset_faults(held), *count_faults(files)]
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


def files_behind(landing: Landing, hours: Iterable[str]) -> dict[OffsetRange, LandingFile]:
    """The archive files that hold events of the hours, and of each partition those between the first and last of them.

    They are in order. All of it is said by the ledger, no file is opened.
    """
    listing = landing.ledger.read()
    starts = [key_start_ms(hour) for hour in hours]
    covering = {file.path for start in starts for file in listing.covering(start, start + HOUR_MS)}
    spans: dict[str, tuple[int, int]] = {}
    for one in ranges(covering):
        first, last = spans.get(one.archive, (one.first, one.last))
        spans[one.archive] = (min(first, one.first), max(last, one.last))
    topics = {archive.rpartition("/")[0] for archive in spans}
    rows = pa.concat_tables([listing.rows(source=topic) for topic in topics]) if topics else listing.table.slice(0, 0)
    wanted = [_is_within(OffsetRange.parse(path), spans) for path in rows["path"].to_pylist()]
    found = listing.as_files(rows.filter(pa.array(wanted, pa.bool_())))
    return {held: file for file in found if (held := OffsetRange.parse(file.path))}


def _is_within(held: OffsetRange | None, spans: Mapping[str, tuple[int, int]]) -> bool:
    if held is None or held.archive not in spans:
        return False
    first, last = spans[held.archive]
    return held.last >= first and held.first <= last


def count_faults(files: Mapping[OffsetRange, LandingFile]) -> list[str]:
    """Files that hold fewer or more rows than the messages that were taken for them, but for users who were forgotten."""
    return [
        f"{one.name}: {file.messages} messages were taken, {file.rows} events and {file.rejected} rejected are held"
        for one, file in files.items()
        if file.rows + file.forgotten + file.rejected != file.messages
    ]


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
