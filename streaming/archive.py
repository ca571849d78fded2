"""The archive sink: a topic's partitions as Parquet files whose borders depend on the topic alone.

A file ends before an offset that is a multiple of `archive_rows`, and before a message whose broker time lies in a
later interval of `archive_seconds`. Messages carry both, so any worker that starts at a border makes the same files. A
file is also ended when its interval is over and the partition ends with it: a later message has a later time then, and
would have ended it as well. What the landing zone holds already is not written again.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from recsys_core.landing import ARCHIVE_SCHEMA, OFFSET, QUARANTINE_SCHEMA, Landing, OffsetRange
from recsys_core.settings import StreamSettings

log = logging.getLogger(__name__)

GRACE_MS = 5_000
"""How far this machine's clock may be ahead of the broker's."""
MAX_WRITES = 4
"""Files that wait to be written before `add` waits."""
RETRY_SECONDS = 1.0
MAX_CONTENT = 4096
"""Bytes of a rejected message that the quarantine keeps."""


@dataclass(frozen=True)
class Rejected:
    """A message that is no event."""

    partition: int
    offset: int
    reason: str
    value: bytes


@dataclass(frozen=True)
class Messages:
    """The messages of one partition of a batch, all of them, and the events and refusals among them.

    Attributes:
        offset: int64 (m,), ascending.
        appended: int64 (m,), the broker's time, ms.
        events: ARCHIVE_SCHEMA.
        rejected: in the order of their offsets.
    """

    offset: np.ndarray
    appended: np.ndarray
    events: pa.Table
    rejected: Sequence[Rejected]


@dataclass
class _Open:
    """The file that a partition is in: from offset `first`, so far up to before `next`."""

    held: OffsetRange
    next: int
    epoch: int
    interval: int | None = None
    offsets: list[np.ndarray] = field(default_factory=list)
    events: list[pa.Table] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    known: list[OffsetRange] = field(default_factory=list)
    writing: deque[tuple[int, Future[None]]] = field(default_factory=deque)


class Archive:
    """Archives the partitions that this worker has. Its methods are called by one thread; files are written by another."""

    def __init__(self, landing: Landing, topic: str, identity: str, settings: StreamSettings) -> None:
        self._landing = landing
        self._topic = topic
        self._identity = identity
        self._rows = settings.archive_rows
        self._interval_ms = settings.archive_seconds * 1000
        self._open: dict[int, _Open] = {}
        self._writer = ThreadPoolExecutor(1, "archive")
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self.files = 0

    def landed(self, partition: int, identity: str = "") -> tuple[int | None, list[OffsetRange]]:
        """Up to before which offset the partition is archived without a gap (None: nothing is), and files beyond a gap.

        `identity` is that of the partition, where it has another one than the topic.
        """
        ranges = [
            held
            for held in self._landing.archived(self._topic)
            if held.identity == (identity or self._identity) and held.partition == partition
        ]
        end: int | None = None
        for at, held in enumerate(ranges):
            if end is not None and held.first > end:
                return end, ranges[at:]
            end = max(end or 0, held.last + 1)
        return end, []

    def start(self, partition: int, offset: int, known: list[OffsetRange], epoch: int, identity: str = "") -> None:
        """Archive a partition from `offset` on, leaving out the ranges that are there already.

        `epoch` is of its assignment, `identity` see `landed`.
        """
        held = OffsetRange(self._topic, identity or self._identity, partition, offset, offset)
        with self._lock:
            self._open[partition] = _Open(held, offset, epoch, known=[r for r in known if r.first >= offset])

    def drop(self, partitions: Sequence[int]) -> None:
        """Forget partitions that another worker has now; it starts at the last border."""
        with self._lock:
            for partition in partitions:
                self._open.pop(partition, None)

    def durable(self, partition: int) -> int | None:
        """Before this offset everything is in files. None for a partition that is not archived here."""
        with self._lock:
            found = self._open.get(partition)
            if found is None:
                return None
            while found.writing and found.writing[0][1].done():
                found.writing.popleft()[1].result()
            return found.writing[0][0] if found.writing else found.held.first

    def add(self, partition: int, messages: Messages, epoch: int) -> None:
        """Add the messages of a partition; those before its position were added before. Waits while many files do.

        Those of another assignment are left out: another worker has them, and the file would have a gap before them.
        """
        found = self._open.get(partition)
        if found is None or found.epoch != epoch:
            return
        offset, appended = messages.offset, messages.appended
        at = int(np.searchsorted(offset, found.next))
        while at < len(offset):
            if found.known and offset[at] >= found.known[0].first:
                self._skip(found)
                at = int(np.searchsorted(offset, found.next))
                continue
            end = self._border(found, offset, appended, at)
            if end > at:
                self._take(found, messages, at, end)
            if end < len(offset):
                self._close(found, self._before(found, int(offset[end])))
            at = end

    def tick(self, now_ms: int, end_of: Callable[[int], int]) -> None:
        """End the files whose interval is over when nothing came after what they hold.

        `end_of` asks the brokers for the end of a partition, now: a worker that was frozen, and does not know yet that
        others went on, would end its file in the middle of an interval.
        """
        for partition, found in list(self._open.items()):
            if found.interval is None or found.next == found.held.first:
                continue
            over = now_ms > (found.interval + 1) * self._interval_ms + GRACE_MS
            if over and end_of(partition) == found.next:
                self._close(found, found.next)

    def close(self) -> None:
        """Finish the files that are being written; what is open is dropped."""
        self._stopping.set()
        self._writer.shutdown(wait=True)

    def _border(self, found: _Open, offset: np.ndarray, appended: np.ndarray, at: int) -> int:
        """The position from `at` on whose message begins a new file; the number of messages when none does."""
        block = found.held.first // self._rows
        intervals = appended[at:] // self._interval_ms
        if found.interval is None:
            found.interval = int(intervals[0])
        ends = (offset[at:] // self._rows != block) | (intervals > found.interval)
        if found.known:
            ends |= offset[at:] >= found.known[0].first
        return at + (int(np.argmax(ends)) if ends.any() else len(ends))

    def _before(self, found: _Open, offset: int) -> int:
        """Where the file ends that the message at `offset` is not in: offsets without a message belong to the former."""
        if found.known and offset >= found.known[0].first:
            return found.known[0].first
        border = offset // self._rows * self._rows
        return border if border > found.held.first else offset

    def _skip(self, found: _Open) -> None:
        known = found.known.pop(0)
        if known.first > found.held.first:
            self._close(found, known.first)
        self._begin(found, known.last + 1)

    def _begin(self, found: _Open, first: int) -> None:
        held = found.held
        with self._lock:
            found.held = OffsetRange(held.topic, held.identity, held.partition, first, first)
            found.next, found.interval = first, None
            found.offsets, found.events, found.rejected = [], [], []

    def _take(self, found: _Open, messages: Messages, at: int, end: int) -> None:
        offsets = messages.offset[at:end]
        first, last = int(offsets[0]), int(offsets[-1])
        start, stop = _within(messages.events[OFFSET].to_numpy(), first, last)
        if stop > start:
            found.events.append(messages.events.slice(start, stop - start))
        found.offsets.append(offsets)
        found.rejected += [r for r in messages.rejected if first <= r.offset <= last]
        found.next = last + 1

    def _close(self, found: _Open, end: int) -> None:
        """Write what the file holds, up to before `end`, and begin the next one there."""
        held = found.held
        if end > held.first:
            whole = OffsetRange(held.topic, held.identity, held.partition, held.first, end - 1)
            self._wait_for_writer()
            written = self._writer.submit(self._write, whole, found.offsets, found.events, found.rejected)
            with self._lock:
                found.writing.append((held.first, written))
        self._begin(found, end)

    def _wait_for_writer(self) -> None:
        with self._lock:
            writing = [future for found in self._open.values() for _, future in found.writing if not future.done()]
        if len(writing) >= MAX_WRITES:
            writing[0].result()

    def _write(self, held: OffsetRange, offsets: list[np.ndarray], events: list[pa.Table], rejected: list[Rejected]) -> None:
        """Write a file, again and again while the store does not take it: nothing is committed meanwhile.

        Only what is not there yet is written: a worker that was thought dead may have ended this file elsewhere.
        """
        table = pa.concat_tables(events) if events else ARCHIVE_SCHEMA.empty_table()
        taken = np.concatenate(offsets) if offsets else np.empty(0, np.int64)
        rows = table[OFFSET].to_numpy()
        while not self._stopping.is_set():
            try:
                for part in held.without(self._landing.archived(held.topic)):
                    start, end = _within(rows, part.first, part.last)
                    refused = [r for r in rejected if part.first <= r.offset <= part.last]
                    messages = _within(taken, part.first, part.last)
                    some = table.slice(start, end - start)
                    count = messages[1] - messages[0]
                    self._landing.write_archive(part, count, some, quarantine_rows(held.topic, refused))
                    self.files += 1
                return
            except OSError as error:
                log.warning("the archive of %s can't be written and is tried again: %s", held.name, error)
                self._stopping.wait(RETRY_SECONDS)
        raise InterruptedError(f"stopped before {held.name} was written")


def _within(sorted_offsets: np.ndarray, first: int, last: int) -> tuple[int, int]:
    """Where the offsets from `first` to `last` begin and end."""
    return int(np.searchsorted(sorted_offsets, first)), int(np.searchsorted(sorted_offsets, last, side="right"))


def quarantine_rows(topic: str, rejected: Sequence[Rejected]) -> pa.Table:
    """Rejected messages as QUARANTINE_SCHEMA."""
    rows = [
        {
            "origin": f"{topic}/{r.partition}",
            "row": r.offset,
            "reason": r.reason,
            "content": r.value[:MAX_CONTENT].decode(errors="replace"),
        }
        for r in rejected
    ]
    return pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA)
