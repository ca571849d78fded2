"""Messages that are no event, into the dead-letter topic: with the reason and where they were in headers.

A dead letter is small enough for the topic, whatever the message was: of a long key or value the beginning is kept. What the
topic refuses all the same goes without both, and what it refuses even then is given up: the quarantine has its reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from recsys_core.kafka_config import client_config
from recsys_core.settings import KafkaSettings

log = logging.getLogger(__name__)

MAX_VALUE_BYTES = 100_000
"""Of a longer value the beginning is kept, with its size in a header."""
MAX_KEY_BYTES = 1_000
"""The same of a key."""
SEND_SECONDS = 30.0
METADATA_SECONDS = 5.0
"""How long a topic that the brokers do not know is looked for."""
PASSING = frozenset(
    {
        KafkaError._TRANSPORT,
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError._RESOLVE,
        KafkaError._TIMED_OUT,
        KafkaError._TIMED_OUT_QUEUE,
        KafkaError._MSG_TIMED_OUT,
        KafkaError._PURGE_QUEUE,
        KafkaError._PURGE_INFLIGHT,
        KafkaError._RETRY,
        KafkaError.BROKER_NOT_AVAILABLE,
        KafkaError.KAFKA_STORAGE_ERROR,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.NETWORK_EXCEPTION,
        KafkaError.NOT_ENOUGH_REPLICAS,
        KafkaError.NOT_ENOUGH_REPLICAS_AFTER_APPEND,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.REPLICA_NOT_AVAILABLE,
        KafkaError.REQUEST_TIMED_OUT,
        KafkaError.THROTTLING_QUOTA_EXCEEDED,
    }
)
"""Errors that end when the brokers are well again. Any other one comes again however often a letter is sent."""

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
        self._max_value = min(MAX_VALUE_BYTES, settings.max_message_bytes // 2)
        self._max_key = min(MAX_KEY_BYTES, settings.max_message_bytes // 4)
        self._told = False

    @cached_property
    def _producer(self) -> Producer:
        """Made for the first dead letter: most workers never have one."""
        conf = client_config(
            self._settings,
            # An idempotent one needs more rights, and ends for good where it lacks them. What is sent twice is a letter twice.
            enable_idempotence=False,
            linger_ms=5,
            message_max_bytes=self._settings.max_message_bytes,
            # The limit of a topic is for what is sent together.
            batch_size=self._settings.max_message_bytes,
            message_timeout_ms=int(SEND_SECONDS * 1000),
            topic_metadata_propagation_max_ms=int(METADATA_SECONDS * 1000),
        )
        return Producer(conf)

    def send(self, letters: Sequence[DeadLetter]) -> int:
        """Returns how many the topic refuses, now and whenever they come: these are given up.

        Raises KafkaException when the brokers did not take all of the others; send all of them again then.
        """
        given_up = []
        for letter, error in self._try(letters, self._max_key, self._max_value):
            if error.code() == KafkaError.MSG_SIZE_TOO_LARGE and not self._send_alone(letter):
                continue
            given_up.append(error)
            if not self._told:
                self._told = True
                log.error("%s refuses dead letters, which are given up: %s", self._topic, error.str())
        return len(given_up)

    def _send_alone(self, letter: DeadLetter) -> bool:
        """Send a letter that was too large, or was sent together with one that is. Returns whether it is refused even bare."""
        whole, bare = (self._max_key, self._max_value), (0, 0)
        return bool(self._try([letter], *whole) and self._try([letter], *bare))

    def _try(self, letters: Sequence[DeadLetter], max_key: int, max_value: int) -> list[tuple[DeadLetter, KafkaError]]:
        """Send letters. Returns those that the topic refuses. Raises KafkaException."""
        errors: list[tuple[DeadLetter, KafkaError]] = []

        def delivered(letter: DeadLetter, error: KafkaError | None, _: Message) -> None:
            if error is not None:
                errors.append((letter, error))

        offered = [(letter, self._offer(letter, max_key, max_value, partial(delivered, letter))) for letter in letters]
        errors.extend((letter, error) for letter, error in offered if error)
        left = self._producer.flush(SEND_SECONDS) if letters else 0
        for _, error in errors:
            if error.code() in PASSING:
                raise KafkaException(error)
        if left:
            self._producer.purge()
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT, f"{left} dead letters were not taken"))
        return errors

    def _offer(self, letter: DeadLetter, max_key: int, max_value: int, delivered: Delivered) -> KafkaError | None:
        """Hand a letter to the client. Returns why it takes none, when it does not."""
        headers = {
            "reason": letter.reason,
            "topic": letter.topic,
            "partition": str(letter.partition),
            "offset": str(letter.offset),
        }
        key, value = letter.key, letter.value
        if key is not None and len(key) > max_key:
            headers["key_cut_from_bytes"] = str(len(key))
            key = key[:max_key]
        if value is not None and len(value) > max_value:
            headers["cut_from_bytes"] = str(len(value))
            value = value[:max_value]
        while True:
            try:
                self._producer.produce(self._topic, value, key, headers=list(headers.items()), on_delivery=delivered)
            except BufferError:
                self._producer.poll(0.1)
            except KafkaException as error:
                refusal: KafkaError = error.args[0]
                return refusal
            else:
                return None
