"""The thread that archives: it has positions of its own, and nobody waits for it.

The threads that serve Redis leave what they took in an `Intake` of bounded size. What does not fit, because the lake is
away or slow, is left out there and noted; the archiver then reads again from its own position, by a consumer of its own
without a part in the group, until it is where the intake goes on. A worker that starts does the same where the archive is
behind of Redis, and one whose other threads are held up by Redis or by the topic of dead letters.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from confluent_kafka import Consumer, KafkaError, Message, TopicPartition

from recsys_core.events import now_ms
from recsys_core.lake import Lake
from recsys_core.landing import Landing
from recsys_core.live import Batch
from recsys_core.settings import Settings
from streaming.archive import Archive, Messages
from streaming.arrival import Arrivals
from streaming.batches import Row, by_partition, taken_rows
from streaming.connections import BrokerFailure, Kafka, KafkaLog, consumer_config
from streaming.decode import decode
from streaming.topics import Topic

log = logging.getLogger(__name__)

GATHER_SECONDS = 0.25
"""How long messages are gathered before they are archived together: a column costs as much for one."""
MESSAGE_BYTES = 200
"""What a message takes beside its value while it waits."""
READ_SECONDS = 0.2
READ_MESSAGES = 20_000
"""Most messages that are read again at once."""
ASK_SECONDS = 10.0
RETRY_SECONDS = 0.5
MAX_RETRY_SECONDS = 5.0
STALL_SECONDS = 1.0
"""A worker that was not heard of for longer may have been frozen."""
SETTLE_SECONDS = 2.0
"""After that it hears within this time that others have its partitions, or what came meanwhile."""
CLOSE_SECONDS = 10.0
"""How long a lake that hangs is waited for at the end."""


@dataclass(frozen=True)
class Assigned:
    """A partition that this worker has.

    Attributes:
        epoch: of its assignment.
        identity: of its incarnation, in the names of its files.
        first: where the archive begins that has no file of it.
        low: the first offset that the brokers have.
        high: where the partition ended.
        start: from this offset on messages come through the intake.
    """

    epoch: int
    identity: str
    first: int
    low: int
    high: int
    start: int


@dataclass
class _Waiting:
    """Messages that wait, of one of three kinds: parsed ones, raw ones, or the ends of partitions."""

    bytes: int = 0
    parsed: Mapping[int, tuple[int, Messages]] | None = None
    rows: list[Row] | None = None
    ends: Mapping[int, int] | None = None


class Intake:
    """What waits to be archived, in the order of the topic; never waits itself.

    `missed` has for each partition the offset before which something was left out: the archive is to be there before it goes
    on with what waits.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._waiting: deque[_Waiting] = deque()
        self._bytes = 0
        self._upto: dict[int, int] = {}
        self._lock = threading.Lock()
        self.missed: dict[int, int] = {}
        self.filled = threading.Event()

    def offer_rows(self, rows: list[Row]) -> None:
        """Take a handful of messages as they came."""
        size = sum(MESSAGE_BYTES + len(value or b"") for *_, value in rows)
        with self._lock:
            self._upto.update((number, offset + 1) for number, offset, _, _ in rows)
            last = self._waiting[-1] if self._waiting else None
            if last is not None and last.rows is not None and self._bytes + size <= self._max_bytes:
                last.rows += rows
                last.bytes += size
                self._bytes += size
            else:
                self._put(_Waiting(size, rows=list(rows)))

    def offer_parsed(self, parsed: Mapping[int, tuple[int, Messages]], size: int) -> None:
        """Take a batch: for each partition the epoch of its assignment and its messages."""
        with self._lock:
            self._upto.update((number, int(messages.offset[-1]) + 1) for number, (_, messages) in parsed.items())
            self._put(_Waiting(size, parsed=parsed))
        self.filled.set()

    def offer_ends(self, ends: Mapping[int, int]) -> None:
        """Take the news that partitions end before these offsets."""
        with self._lock:
            self._upto.update(ends)
            self._put(_Waiting(MESSAGE_BYTES, ends=ends))

    def take(self) -> _Waiting | None:
        """What has waited longest, None when nothing does."""
        with self._lock:
            if not self._waiting:
                self.filled.clear()
                return None
            found = self._waiting.popleft()
            self._bytes -= found.bytes
            return found

    def miss(self, number: int, offset: int) -> None:
        """Note that something of a partition before an offset does not come here."""
        with self._lock:
            self.missed[number] = max(offset, self.missed.get(number, 0))

    def leave_out(self) -> None:
        """Give up all that was offered so far."""
        with self._lock:
            self._miss_all()

    def drop(self, numbers: Iterable[int]) -> None:
        """Forget partitions that another worker has now. Parsed messages and ends of theirs are told by their epoch."""
        gone = set(numbers)
        with self._lock:
            for number in gone:
                self.missed.pop(number, None)
                self._upto.pop(number, None)
            for some in self._waiting:
                if some.rows is not None:
                    some.rows = [row for row in some.rows if row[0] not in gone]
                elif some.ends is not None:
                    some.ends = {number: end for number, end in some.ends.items() if number not in gone}
                elif some.parsed is not None:
                    some.parsed = {number: found for number, found in some.parsed.items() if number not in gone}

    def _put(self, some: _Waiting) -> None:
        """With the lock. What waits is left out when it is too much with what comes; a single batch is never."""
        if self._waiting and self._bytes + some.bytes > self._max_bytes:
            self._miss_all()
            return
        self._waiting.append(some)
        self._bytes += some.bytes

    def _miss_all(self) -> None:
        for number, offset in self._upto.items():
            self.missed[number] = max(offset, self.missed.get(number, 0))
        self._waiting.clear()
        self._bytes = 0


class Archiver:
    """Archives what this worker's partitions bring, in a thread of its own."""

    def __init__(
        self, settings: Settings, topic: Topic, embedded: bool, lake: Lake, arrivals: Arrivals, kafka_log: KafkaLog
    ) -> None:
        self._settings = settings
        self._topic = topic
        self._arrivals = arrivals
        self._archive = Archive(Landing(lake), topic.name, settings.stream)
        self._intake = Intake(settings.stream.batch_megabytes << 20)
        self._reader = _Reader(settings, topic, embedded, kafka_log)
        self._assigned: dict[int, Assigned] = {}
        self._begun: dict[int, int] = {}
        self._lost: dict[int, int] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._seen_at, self._stalled_at = time.monotonic(), float("-inf")
        self._held_up = False
        self._thread = threading.Thread(target=self._run, name="archive", daemon=True)

    # -- for the threads that serve Redis ---------------------------------------------------------------------------

    @property
    def files(self) -> int:
        """Files written so far."""
        return self._archive.files

    def begin(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread. What is open is dropped, and so is a thread that the lake does not let go."""
        self._stopping.set()
        with self._lock:
            self._archive.drop(list(self._assigned))
        if self._thread.ident is not None:
            self._thread.join(CLOSE_SECONDS)
            if self._thread.is_alive():
                log.warning("the lake does not answer; what it was asked is left to itself")

    def assign(self, number: int, assigned: Assigned) -> None:
        """Archive a partition from where its files end."""
        with self._lock:
            self._assigned[number] = assigned
        self._intake.miss(number, assigned.start)

    def drop(self, numbers: Sequence[int]) -> None:
        """Forget partitions that another worker has now."""
        with self._lock:
            for number in numbers:
                self._assigned.pop(number, None)
                self._lost.pop(number, None)
        self._archive.drop(numbers)
        self._intake.drop(numbers)

    def offer_rows(self, rows: list[Row]) -> None:
        """Archive a handful of messages."""
        self._intake.offer_rows(rows)

    def offer_parsed(self, parsed: Mapping[int, Messages], epochs: Mapping[int, int]) -> None:
        """Archive a batch of partitions whose assignments have these epochs."""
        known = {number: (epochs[number], messages) for number, messages in parsed.items() if number in epochs}
        size = sum(m.events.nbytes + sum(MESSAGE_BYTES + len(r.value) for r in m.rejected) for _, m in known.values())
        self._intake.offer_parsed(known, size)

    def offer_ends(self, ends: Mapping[int, int]) -> None:
        """Note that partitions end before these offsets, and that all before was offered."""
        self._intake.offer_ends(ends)

    def durable(self, number: int) -> int:
        """Before this offset everything of a partition is in files; -1 while that is not known."""
        with self._lock:
            begun = number in self._assigned and self._begun.get(number) == self._assigned[number].epoch
        found = self._archive.durable(number) if begun else None
        return -1 if found is None else found

    def lost(self) -> list[tuple[int, int]]:
        """Partitions of which the brokers no longer have all that is archived, and up to before which offset that is."""
        with self._lock:
            return list(self._lost.items())

    def alive(self, held_up: bool = False) -> None:
        """The thread that hears of the group is at work, or `held_up`: it can't hand on messages. Called by it all the time."""
        self._held_up = held_up
        now = time.monotonic()
        if now - self._seen_at > STALL_SECONDS:
            self._stalled_at = now
        self._seen_at = now

    # -- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause = RETRY_SECONDS
        while not self._stopping.is_set():
            try:
                self._turn()
                pause = RETRY_SECONDS
            except Exception as error:  # noqa: BLE001 - a store raises what it likes; the topic keeps what it does not take
                log.warning("the archive waits and tries again (%s: %s)", type(error).__name__, error)
                self._stop_reading()
                self._stopping.wait(pause)
                pause = min(2 * pause, MAX_RETRY_SECONDS)
        self._stop_reading()

    def _turn(self) -> None:
        self._begin_new()
        self._archive.write()
        behind = self._behind()
        if behind:
            self._read_again(behind)
        elif (some := self._intake.take()) is not None:
            self._add_or_miss(some)
        elif self._held_up and (places := self._places()):
            self._read_again(places)
        else:
            self._stop_reading()
            self._intake.filled.wait(GATHER_SECONDS)
        if self._is_heard_of():
            self._archive.tick(now_ms())

    def _begin_new(self) -> None:
        """Find out how far the partitions are that were assigned. Until it is known, what they bring waits."""
        with self._lock:
            new = {n: a for n, a in self._assigned.items() if self._begun.get(n) != a.epoch}
        for number, assigned in new.items():
            landed = self._archive.landed(number, assigned.identity)
            had = landed or 0
            if had > assigned.high and had > self._reader.ends(number)[1]:
                with self._lock:
                    self._lost[number] = had
                continue
            first = max(assigned.low, landed) if landed is not None else assigned.first
            with self._lock:
                if self._assigned.get(number) is assigned:
                    self._archive.start(number, first, assigned.epoch, assigned.identity)
                    self._begun[number] = assigned.epoch

    def _places(self) -> dict[int, int]:
        """Where the archive is in each partition."""
        with self._lock:
            numbers = list(self._begun)
        return {number: at for number in numbers if (at := self._archive.next(number)) is not None}

    def _behind(self) -> dict[int, int]:
        """Where each partition has to be read again from."""
        found = {}
        for number, missed in list(self._intake.missed.items()):
            at = self._archive.next(number)
            if at is not None and at < missed:
                found[number] = at
        return found

    def _read_again(self, behind: Mapping[int, int]) -> None:
        rows: list[Row] = []
        for message in self._reader.read(behind):
            error, number, offset = message.error(), message.partition() or 0, message.offset() or 0
            if error is None:
                rows.append((number, offset, self._arrivals.of_one(message), message.value()))
            elif error.code() == KafkaError._PARTITION_EOF:
                self._add_rows(rows)
                rows = []
                self._archive.reach(number, offset, now_ms())
            elif error.code() == KafkaError._AUTO_OFFSET_RESET:
                self._add_rows(rows)
                rows = []
                self._skip_lost(number)
        self._add_rows(rows)

    def _stop_reading(self) -> None:
        """Whatever is read again after this begins where the archive is."""
        with suppress(BrokerFailure):
            self._reader.close()

    def _skip_lost(self, number: int) -> None:
        """Go on where the brokers have messages again; what is between is missing, and seen to be."""
        low, high = self._reader.ends(number)
        at = self._archive.next(number)
        log.error("%s/%d: the brokers have offsets %d to %d, the archive is at %s", self._topic.name, number, low, high, at)
        if at is not None:
            self._archive.cut(number, max(low, at) if at <= high else at)
        if at is not None and at > high:
            self._intake.missed.pop(number, None)
        self._stop_reading()

    def _add_or_miss(self, some: _Waiting) -> None:
        """Archive what waited. What fails, or comes before it is known how far its partition is, is read again."""
        try:
            if some.rows:
                self._add_rows(some.rows)
            for number, (epoch, messages) in (some.parsed or {}).items():
                self._add(number, messages, epoch)
            for number, end in (some.ends or {}).items():
                self._archive.reach(number, end, now_ms())
        except BaseException:
            self._intake.leave_out()
            raise

    def _add(self, number: int, messages: Messages, epoch: int | None) -> None:
        """Add messages of an assignment, None: of the one that there is."""
        with self._lock:
            assigned, begun = self._assigned.get(number), self._begun.get(number)
        if assigned is None or epoch not in (None, assigned.epoch):
            return
        if begun == assigned.epoch:
            self._archive.add(number, messages, assigned.epoch)
        else:
            self._intake.miss(number, int(messages.offset[-1]) + 1)

    def _add_rows(self, rows: list[Row]) -> None:
        if not rows:
            return
        taken = taken_rows(rows)
        decoded = decode(taken.values, self._settings.events, self._settings.kafka.max_message_bytes, taken.appended)
        batch = Batch(decoded.events, taken.partition[decoded.rows], taken.offset[decoded.rows])
        for number, messages in by_partition(taken, decoded, batch).items():
            self._add(number, messages, None)

    def _is_heard_of(self) -> bool:
        """Whether this worker would know if others had its partitions: one that was frozen does not, for a moment."""
        now = time.monotonic()
        return now - self._seen_at <= STALL_SECONDS and now - self._stalled_at >= SETTLE_SECONDS


class _Reader:
    """Reads partitions from given offsets on, without a part in the group."""

    def __init__(self, settings: Settings, topic: Topic, embedded: bool, kafka_log: KafkaLog) -> None:
        self._config = {**consumer_config(settings, embedded), "queued.min.messages": READ_MESSAGES}
        self._config.pop("group.instance.id", None)
        self._topic = topic
        self._log = kafka_log
        self._kafka: Any = None
        self._at: dict[int, int] = {}

    def read(self, places: Mapping[int, int]) -> list[Message]:
        """Some messages, ends and errors; a partition that was read before goes on where the last call ended."""
        self._connect()
        if self._at.keys() != places.keys():
            self._kafka.assign([TopicPartition(self._topic.name, number, offset) for number, offset in places.items()])
            self._at = dict(places)
        found: list[Message] = self._kafka.consume(READ_MESSAGES, READ_SECONDS)
        return found

    def ends(self, number: int) -> tuple[int, int]:
        """The first offset of a partition and its end, by the brokers, now."""
        self._connect()
        ends: tuple[int, int] = self._kafka.get_watermark_offsets(TopicPartition(self._topic.name, number), timeout=ASK_SECONDS)
        return ends

    def _connect(self) -> None:
        if self._kafka is None:
            self._kafka = Kafka(Consumer(self._config, logger=self._log))

    def close(self) -> None:
        """Give the connections up; the next call makes others."""
        if self._kafka is not None:
            kafka, self._kafka = self._kafka, None
            self._at = {}
            kafka.close()
