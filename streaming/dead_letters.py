"""Messages that are no event, into the dead-letter topic: unchanged, with the reason and where they were in headers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from recsys_core.kafka_config import client_config
from recsys_core.settings import KafkaSettings

MAX_VALUE_BYTES = 100_000
"""Of a longer value the beginning is kept, with its size in a header; the topic's limit is for both."""
SEND_SECONDS = 30.0

Delivered = Callable[[KafkaError | None, Message], None]


@dataclass(frozen=True)
class DeadLetter:
    """A message that is no event."""

    topic: str
    partition: int
    offset: int
    reason: str
    key: bytes | None
    value: bytes | None


class DeadLetterQueue:
    """Sends dead letters and waits until the brokers have them."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        self._topic = settings.dead_letter_topic

    @cached_property
    def _producer(self) -> Producer:
        """Made for the first dead letter: most workers never have one."""
        return Producer(client_config(self._settings, enable_idempotence=True, linger_ms=5))

    def send(self, letters: Sequence[DeadLetter]) -> None:
        """Raises KafkaException when the brokers did not take all of them; send them again then."""
        errors: list[KafkaError] = []

        def delivered(error: KafkaError | None, _: Message) -> None:
            if error is not None:
                errors.append(error)

        for letter in letters:
            while not self._offer(letter, delivered):
                self._producer.poll(0.1)
        left = self._producer.flush(SEND_SECONDS)
        if errors:
            raise KafkaException(errors[0])
        if left:
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT, f"{left} dead letters were not taken"))

    def _offer(self, letter: DeadLetter, delivered: Delivered) -> bool:
        value = letter.value
        headers = {
            "reason": letter.reason,
            "topic": letter.topic,
            "partition": str(letter.partition),
            "offset": str(letter.offset),
        }
        if value is not None and len(value) > MAX_VALUE_BYTES:
            headers["cut_from_bytes"] = str(len(value))
            value = value[:MAX_VALUE_BYTES]
        try:
            self._producer.produce(self._topic, value, letter.key, headers=list(headers.items()), on_delivery=delivered)
        except BufferError:
            return False
        return True
