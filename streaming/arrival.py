"""When a message arrived, by which the future is judged and the archive is cut.

On a topic with LogAppendTime that is the brokers' time of the message, the same whenever it is read. Elsewhere the message has
the clock of its producer, or none. It arrives when it is taken then: who takes it again judges by a later moment, and what was
in the future at first may be in the past by then. Nothing else of an event's verdict depends on its arrival.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain

import numpy as np
from confluent_kafka import TIMESTAMP_LOG_APPEND_TIME, Message

from recsys_core.events import now_ms

log = logging.getLogger(__name__)


class Arrivals:
    """Arrivals of the messages of a topic. It says once when they are not the brokers', unless `told`."""

    def __init__(self, topic: str, told: bool = False) -> None:
        self._topic = topic
        self._told = told

    def of(self, messages: Sequence[Message]) -> np.ndarray:
        """Arrivals of messages that are taken now, ms, int64 (n,)."""
        stamps = (message.timestamp() for message in messages)
        flat = np.fromiter(chain.from_iterable(stamps), np.int64, 2 * len(messages))
        kinds, appended = flat[::2], flat[1::2].copy()
        others = kinds != TIMESTAMP_LOG_APPEND_TIME
        if others.any():
            appended[others] = self._taken_now()
        return appended

    def of_one(self, message: Message) -> int:
        """`of` one message."""
        kind, appended = message.timestamp()
        return appended if kind == TIMESTAMP_LOG_APPEND_TIME else self._taken_now()

    def _taken_now(self) -> int:
        if not self._told:
            self._told = True
            log.warning(
                "messages of %s have their producers' time (message.timestamp.type is not LogAppendTime): they count as "
                "arrived when they are taken; `recsys kafka init` sets the brokers' time",
                self._topic,
            )
        return now_ms()
