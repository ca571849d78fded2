"""How a worker is connected: its consumer, and a Redis client that hides no lost connection."""

from __future__ import annotations

from typing import Any

from recsys_core.kafka_config import client_config
from recsys_core.redis_client import client
from recsys_core.settings import Settings

REDIS_SECONDS = 30.0


def redis_for_writes(settings: Settings) -> Any:
    """A client that shows every lost connection, since what is behind the next one may be another Redis."""
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    return client(settings.redis, retry=Retry(NoBackoff(), 0), socket_timeout=REDIS_SECONDS)


def consumer_config(settings: Settings, embedded: bool) -> dict[str, Any]:
    """librdkafka properties of a worker's consumer. The embedded broker answers a fetch only when its wait is over."""
    stream = settings.stream
    session_ms = int(stream.session_timeout_seconds * 1000)
    kilobytes = stream.batch_megabytes * 1024
    member = {"group.instance.id": stream.instance_id} if stream.instance_id else {}
    return {
        **client_config(
            settings.kafka,
            group_id=stream.group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            partition_assignment_strategy="cooperative-sticky",
            session_timeout_ms=session_ms,
            heartbeat_interval_ms=max(100, session_ms // 10),
            fetch_message_max_bytes=4 << 20,
            queued_max_messages_kbytes=kilobytes,
            queued_min_messages=2 * stream.batch_events,
            fetch_queue_backoff_ms=5,
            fetch_wait_max_ms=5 if embedded else 500,
            topic_metadata_refresh_interval_ms=5_000,
            socket_nagle_disable=True,
        ),
        **member,
    }
