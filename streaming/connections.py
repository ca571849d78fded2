"""How a worker is connected: its consumer, and a Redis client that hides no lost connection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hiredis import pack_command
from redis.exceptions import NoScriptError, ResponseError

from recsys_core.kafka_config import client_config
from recsys_core.redis_client import CONNECT_SECONDS, Script, client
from recsys_core.settings import Settings

REDIS_SECONDS = 30.0


def redis_for_writes(settings: Settings, seconds: float = REDIS_SECONDS) -> Any:
    """A client that shows every lost connection, since what is behind the next one may be another Redis.

    It waits `seconds` for an answer, and not longer than that for a connection.
    """
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    connect_seconds = min(seconds, CONNECT_SECONDS)
    return client(settings.redis, retry=Retry(NoBackoff(), 0), socket_timeout=seconds, socket_connect_timeout=connect_seconds)


class PinnedConnection:
    """A connection of a client that is no cluster's, kept by one thread for `redis_client.run_calls` of a handful of calls.

    A pipeline of redis-py borrows and examines a connection, and keeps a record of what it did, each time: as much work as
    the calls themselves.
    """

    def __init__(self, redis: Any) -> None:
        self._pool = redis.connection_pool
        self._connection: Any = None

    def run(self, calls: Sequence[tuple[object, ...]], scripts: Sequence[Script]) -> list[Any]:
        """The answers of the calls. Raises redis.RedisError; calls are then to be made again."""
        try:
            answers = self._ask(calls)
            if any(isinstance(answer, NoScriptError) for answer in answers):
                _raise_errors(self._ask([("SCRIPT", "LOAD", script.text) for script in scripts]))
                answers = self._ask(calls)
            _raise_errors(answers)
        except BaseException:
            self.close()
            raise
        return answers

    def close(self) -> None:
        """Give the connection up; the next call takes another one."""
        if self._connection is not None:
            self._connection.disconnect()
            self._pool.release(self._connection)
            self._connection = None

    def _ask(self, calls: Sequence[Any]) -> list[Any]:
        if self._connection is None:
            self._connection = self._pool.get_connection()
        connection = self._connection
        connection.send_packed_command([b"".join([pack_command(call) for call in calls])])
        answers: list[Any] = []
        for _ in calls:
            try:
                answers.append(connection.read_response())
            except ResponseError as error:
                answers.append(error)
        return answers


def _raise_errors(answers: Sequence[Any]) -> None:
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer


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
