"""Events of schema v1 into a topic: JSON, keyed by user so that one user's events stay in order."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import orjson
import pyarrow as pa
from confluent_kafka import KafkaError, Message, Producer

from recsys_core.errors import UserError
from recsys_core.events import SCHEMA_VERSION, USER_ID
from recsys_core.kafka_config import client_config
from recsys_core.settings import KafkaSettings

DELIVERY_SECONDS = 30
QUEUE_MESSAGES = 100_000
SLICES_A_SECOND = 20
MAX_SLICE = 2_000


class DeliveryError(UserError, RuntimeError):
    """The broker did not take every event."""


@dataclass(frozen=True)
class Produced:
    """What was delivered, and how long it took."""

    count: int
    seconds: float


def encode(event: dict[str, object]) -> bytes:
    """The message of an event: a JSON object with the schema version `v` and the fields that are not null."""
    return orjson.dumps({"v": SCHEMA_VERSION, **{name: value for name, value in event.items() if value is not None}})


def produce(batches: Iterable[pa.RecordBatch | pa.Table], settings: KafkaSettings, rate: float | None = None) -> Produced:
    """Send all rows of `batches` (EVENT_SCHEMA), at most `rate` a second, and wait until the broker has them.

    At most QUEUE_MESSAGES wait for the broker; beyond that the call waits. Raises DeliveryError when an event was not
    taken within DELIVERY_SECONDS.
    """
    errors: list[KafkaError] = []

    def delivered(error: KafkaError | None, _: Message) -> None:
        if error is not None:
            errors.append(error)

    conf = client_config(
        settings,
        enable_idempotence=True,
        linger_ms=5,
        message_timeout_ms=DELIVERY_SECONDS * 1000,
        queue_buffering_max_messages=QUEUE_MESSAGES,
        delivery_report_only_error=True,
    )
    producer = Producer({**conf, "on_delivery": delivered})
    started = time.perf_counter()
    count = 0
    for rows in _slices(batches, rate):
        for event in rows.to_pylist():
            _send(producer, settings.topic, event)
        count += rows.num_rows
        producer.poll(0)
        _check(errors, settings)
        if rate:
            _wait_until(producer, started + count / rate)
    left = producer.flush(DELIVERY_SECONDS + 5)
    _check(errors, settings)
    if left:
        raise DeliveryError(f"{left} of {count} events were not delivered to {settings.topic} at {settings.bootstrap_servers}")
    return Produced(count, time.perf_counter() - started)


def _slices(batches: Iterable[pa.RecordBatch | pa.Table], rate: float | None) -> Iterator[pa.RecordBatch | pa.Table]:
    """The batches cut small enough that a set rate is kept within a twentieth of a second."""
    size = MAX_SLICE if rate is None else max(1, min(MAX_SLICE, int(rate / SLICES_A_SECOND)))
    for batch in batches:
        for at in range(0, batch.num_rows, size):
            yield batch.slice(at, size)


def _send(producer: Producer, topic: str, event: dict[str, object]) -> None:
    key, value = str(event[USER_ID]), encode(event)
    while True:
        try:
            producer.produce(topic, value, key)
        except BufferError:
            producer.poll(0.05)
        else:
            return


def _wait_until(producer: Producer, moment: float) -> None:
    while (left := moment - time.perf_counter()) > 0:
        producer.poll(left)


def _check(errors: list[KafkaError], settings: KafkaSettings) -> None:
    if errors:
        raise DeliveryError(
            f"{settings.topic} at {settings.bootstrap_servers}: {errors[0].str()} ({len(errors)} events so far)"
        )
