"""How a worker is connected: Kafka clients whose failures are one exception, and Redis clients that hide no lost connection."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from confluent_kafka import KafkaException
from hiredis import pack_command
from redis.exceptions import NoScriptError, ResponseError

from recsys_core.kafka_config import client_config
from recsys_core.redis_client import CONNECT_SECONDS, Script, client
from recsys_core.settings import Settings

log = logging.getLogger("streaming.librdkafka")

REDIS_SECONDS = 10.0
SAME_LINE_SECONDS = 30.0


class BrokerFailure(Exception):
    """Kafka did not do what it was asked, for whatever reason: to be asked again, or to start over."""


@contextmanager
def asking_kafka(what: str) -> Iterator[None]:
    """Makes one exception of all that a Kafka client raises; RuntimeError is that of one that was closed."""
    try:
        yield
    except KafkaException as error:
        raise BrokerFailure(f"{what}: {error.args[0].str() if error.args else error}") from error
    except (RuntimeError, SystemError) as error:
        raise BrokerFailure(f"{what}: {error}") from error


class Kafka:
    """A Kafka client, each of whose methods raises BrokerFailure where the client's raises anything of its own.

    What a callback of the worker raises while it is called by one of them is passed on as it is.
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        def ask(*args: Any, **kwargs: Any) -> Any:
            with asking_kafka(name):
                return method(*args, **kwargs)

        self.__dict__[name] = ask
        return ask


class KafkaLog:
    """Where Kafka's clients say what they meet: the same line once in SAME_LINE_SECONDS, as librdkafka says each attempt to
    connect, and nothing once the worker is `stopping`, since the brokers may be stopped as well."""

    def __init__(self, stopping: threading.Event) -> None:
        self._stopping = stopping
        self._said: dict[str, float] = {}

    def log(self, level: int, message: str, *args: object) -> None:
        """What the clients call."""
        text = message % args if args else message
        line = text.partition("]: ")[2].partition(" (after ")[0] or text
        now = time.monotonic()
        if self._stopping.is_set() or self._said.get(line, -SAME_LINE_SECONDS) > now - SAME_LINE_SECONDS:
            return
        self._said = {one: at for one, at in self._said.items() if at > now - SAME_LINE_SECONDS}
        self._said[line] = now
        log.log(level, "%s", text)


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
            auto_offset_reset="error",
            enable_partition_eof=True,
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
