"""What goes from thread to thread of a worker: messages as they came, and batches ready to be written."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from confluent_kafka import Message

from recsys_core.landing import ARCHIVE_SCHEMA, OFFSET
from recsys_core.live import Batch
from recsys_core.tombstones import Tombstones
from streaming.archive import Messages, Rejected
from streaming.dead_letters import DeadLetter
from streaming.decode import Decoded
from streaming.sink import Prepared


@dataclass
class Position:
    """Where a partition is.

    Attributes:
        source: its name in Redis: the topic's identity and the partition.
        epoch: consumption that was taken before this assignment has a lower one.
        redis_from: offset from which events are applied to Redis; those before it had been.
        seen: the next offset to be taken from Kafka.
        end: where the partition ended when it was last taken to its end, -1 when it never was.
        told: the last such end that was passed on.
        applied: before it everything is in Redis.
        persisted: `applied` as Redis itself knows it.
        committed: what the group knows.
        lag: messages between `applied` and the end of the partition.
    """

    source: str
    epoch: int
    redis_from: int
    seen: int
    applied: int
    persisted: int
    committed: int = -1
    lag: int = 0
    end: int = -1
    told: int = -1


@dataclass(frozen=True)
class Taken:
    """Messages as they came."""

    epoch: int
    messages: list[Message]
    values: list[bytes | None]
    partition: np.ndarray
    offset: np.ndarray
    appended: np.ndarray


Row = tuple[int, int, int, bytes | None]
"""Partition, offset, the broker's time and the value of a message that took the fast path."""


def taken_rows(rows: Sequence[Row]) -> Taken:
    """Messages that took the fast path as one batch, for the archive: it needs neither Kafka's messages nor their epoch."""
    partition, offset, appended, values = zip(*rows, strict=True)
    return Taken(0, [], list(values), *(np.array(column, np.int64) for column in (partition, offset, appended)))


@dataclass(frozen=True)
class Work:
    """A batch ready to be written, without the events of those who were `forgotten` by then."""

    taken: Taken
    prepared: Prepared | None
    forgotten: Tombstones
    archive: dict[int, Messages]
    letters: list[DeadLetter]
    positions: dict[int, Position]
    events: int


def _set_event() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


@dataclass
class Pipeline:
    """What goes from thread to thread.

    `hungry` is set while the thread that prepares waits for messages, `idle` while nothing is on its way. `large` is the number
    of the last large batch, counted from 1.
    """

    taken: queue.Queue[Taken] = field(default_factory=lambda: queue.Queue(1))
    work: queue.Queue[Work] = field(default_factory=lambda: queue.Queue(1))
    hungry: threading.Event = field(default_factory=threading.Event)
    idle: threading.Event = field(default_factory=_set_event)
    large: int = 0
    offered: int = 0
    finished: int = 0
    events: int = 0
    failure: BaseException | None = None
    stopping: threading.Event = field(default_factory=threading.Event)

    def begin(self, large: bool) -> None:
        """A batch is on its way."""
        self.offered += 1
        if large:
            self.large = self.offered
        self.hungry.clear()
        self.idle.clear()

    def wait_for_room(self, seconds: float) -> None:
        """Wait until a batch that is taken now is not held up: behind a large one it is prepared while that is written."""
        (self.hungry if self.finished < self.large else self.idle).wait(seconds)

    def end(self) -> None:
        """A batch is done."""
        self.finished += 1
        if self.finished == self.offered:
            self.idle.set()

    @property
    def empty(self) -> bool:
        """Whether nothing is on its way."""
        return self.finished == self.offered


def by_partition(taken: Taken, decoded: Decoded, batch: Batch) -> dict[int, Messages]:
    """The messages of a batch for the archive, a partition at a time."""
    order = np.argsort(batch.partition, kind="stable")
    events = batch.events.append_column(ARCHIVE_SCHEMA.field(OFFSET), pa.array(batch.offset))
    if (order[1:] < order[:-1]).any():
        events = events.take(pa.array(order))
    sorted_partition = batch.partition[order]
    refused: dict[int, list[Rejected]] = {}
    for row, reason in decoded.rejected:
        number = int(taken.partition[row])
        refused.setdefault(number, []).append(Rejected(number, int(taken.offset[row]), reason, taken.values[row] or b""))
    found = {}
    for number in np.unique(taken.partition).tolist():
        own = taken.partition == number
        start, end = np.searchsorted(sorted_partition, [number, number + 1])
        some = events.slice(int(start), int(end - start))
        found[number] = Messages(taken.offset[own], taken.appended[own], some, refused.get(number, ()))
    return found
