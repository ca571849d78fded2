"""The archive sink: a topic's partitions as Parquet files whose borders depend on the topic alone.

A file ends before an offset that is a multiple of `archive_rows`, and before a message whose broker time lies in a
later interval of `archive_seconds`, or in one so much earlier that the broker's clock was wrong. Messages carry both, so any
worker that starts at a border makes the same files. A file is also ended when its interval is over and the partition ends with
it: a later message has a later time then, and would have ended it as well.

The ledger of the landing zone says how far the archive of a partition has come, and a file counts from the commit that takes it
further. Of two workers that have one partition for a moment one is refused, and goes on with what the other did not write.

The end of a partition is where Kafka says that a reader is at it. That is beyond the last message where the end holds
none: a transaction's marker takes an offset, and so does what was aborted or deleted.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from recsys_core.landing import ARCHIVE_SCHEMA, OFFSET, QUARANTINE_SCHEMA, Landing, OffsetRange
from recsys_core.ledger import LedgerChanged
from recsys_core.settings import StreamSettings

GRACE_MS = 5_000
"""How far this machine's clock may be ahead of the broker's."""
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


@dataclass(frozen=True)
class _Closed:
    """A file that is complete."""

    held: OffsetRange
    offsets: list[np.ndarray]
    appended: list[np.ndarray]
    events: list[pa.Table]
    rejected: list[Rejected]


@dataclass
class _Open:
    """The file that a partition is in.

    Attributes:
        held: where it begins.
        next: before this offset everything was added.
        interval: of its messages, None while there are none.
        at_end: whether the partition ends at `next`.
        reached: when that was noted, ms.
        closed: files before it that are to be written.
    """

    held: OffsetRange
    next: int
    epoch: int
    interval: int | None = None
    at_end: bool = False
    reached: int = 0
    offsets: list[np.ndarray] = field(default_factory=list)
    appended: list[np.ndarray] = field(default_factory=list)
    events: list[pa.Table] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    closed: deque[_Closed] = field(default_factory=deque)


class Archive:
    """Archives the partitions that this worker has. One thread adds messages and writes files; the others may ask and drop."""

    def __init__(self, landing: Landing, topic: str, settings: StreamSettings) -> None:
        self._landing = landing
        self._topic = topic
        self._rows = settings.archive_rows
        self._interval_ms = settings.archive_seconds * 1000
        self._open: dict[int, _Open] = {}
        self._lock = threading.Lock()
        self.files = 0

    def landed(self, partition: int, identity: str) -> int | None:
        """Up to before which offset the partition is archived, None where it is not. `identity` see `incarnations`."""
        return self._landing.ledger.reached(OffsetRange(self._topic, identity, partition, 0, 0).archive)

    def start(self, partition: int, offset: int, epoch: int, identity: str) -> None:
        """Archive a partition from `offset` on. `epoch` is of its assignment, `identity` see `landed`."""
        held = OffsetRange(self._topic, identity, partition, offset, offset)
        with self._lock:
            self._open[partition] = _Open(held, offset, epoch)

    def drop(self, partitions: Sequence[int]) -> None:
        """Forget partitions that another worker has now; it starts at the last border that is written."""
        with self._lock:
            for partition in partitions:
                self._open.pop(partition, None)

    def next(self, partition: int) -> int | None:
        """The offset before which everything was added. None for a partition that is not archived here."""
        found = self._open.get(partition)
        return None if found is None else found.next

    def durable(self, partition: int) -> int | None:
        """Before this offset everything is in files. None for a partition that is not archived here."""
        with self._lock:
            found = self._open.get(partition)
            if found is None:
                return None
            return found.closed[0].held.first if found.closed else found.held.first

    def add(self, partition: int, messages: Messages, epoch: int) -> None:
        """Add the messages of a partition; those before its position were added before.

        Those of another assignment are left out: another worker has them, and the file would have a gap before them.
        """
        found = self._open.get(partition)
        if found is None or found.epoch != epoch:
            return
        offset, appended = messages.offset, messages.appended
        at = int(np.searchsorted(offset, found.next))
        while at < len(offset):
            end = self._border(found, offset, appended, at)
            if end > at:
                self._take(found, messages, at, end)
            if end < len(offset):
                self._close(found, self._before(found, int(offset[end])))
            at = end

    def reach(self, partition: int, end: int, now_ms: int) -> None:
        """Note that the partition ends before the offset `end`, and that all messages before it were added."""
        found = self._open.get(partition)
        if found is None or end < found.next:
            return
        if (border := end // self._rows * self._rows) > found.held.first:
            self._close(found, border)
        if not found.at_end:
            found.reached = now_ms
        found.next, found.at_end = max(end, found.next), True

    def cut(self, partition: int, first: int) -> None:
        """Go on at the offset `first`: the brokers do not have what is between, and no file says that it were nothing."""
        found = self._open.get(partition)
        if found is not None and first > found.next:
            self._close(found, found.next)
            self._begin(found, first)

    def tick(self, now_ms: int) -> None:
        """End the files whose interval is over where the partition ends with what they hold."""
        for found in list(self._open.values()):
            if not found.at_end or found.next == found.held.first:
                continue
            reached = found.reached // self._interval_ms
            # A broker's clock that was far ahead would keep the file open until then.
            interval = reached if found.interval is None or found.interval > reached + 1 else found.interval
            if now_ms > (interval + 1) * self._interval_ms + GRACE_MS:
                self._close(found, found.next)

    def write(self) -> bool:
        """Write the files that are complete, one after the other. Returns whether there were any.

        What the store raises goes on; the files that were not written stay, for another call.
        """
        wrote = False
        for partition, found in list(self._open.items()):
            while found.closed and self._open.get(partition) is found:
                self._write(found.closed[0])
                wrote = True
                with self._lock:
                    found.closed.popleft()
        return wrote

    def _border(self, found: _Open, offset: np.ndarray, appended: np.ndarray, at: int) -> int:
        """The position from `at` on whose message begins a new file; the number of messages when none does."""
        block = found.held.first // self._rows
        intervals = appended[at:] // self._interval_ms
        if found.interval is None:
            found.interval = int(intervals[0])
        ends = (offset[at:] // self._rows != block) | (intervals > found.interval) | (intervals < found.interval - 1)
        return at + (int(np.argmax(ends)) if ends.any() else len(ends))

    def _before(self, found: _Open, offset: int) -> int:
        """Where the file ends that the message at `offset` is not in: offsets without a message belong to the former."""
        border = offset // self._rows * self._rows
        return border if border > found.held.first else offset

    def _begin(self, found: _Open, first: int) -> None:
        held = found.held
        with self._lock:
            found.held = OffsetRange(held.topic, held.identity, held.partition, first, first)
            found.next, found.interval, found.at_end = first, None, False
            found.offsets, found.appended, found.events, found.rejected = [], [], [], []

    def _take(self, found: _Open, messages: Messages, at: int, end: int) -> None:
        offsets = messages.offset[at:end]
        first, last = int(offsets[0]), int(offsets[-1])
        start, stop = _within(messages.events[OFFSET].to_numpy(), first, last)
        if stop > start:
            found.events.append(messages.events.slice(start, stop - start))
        found.offsets.append(offsets)
        found.appended.append(messages.appended[at:end])
        found.rejected += [r for r in messages.rejected if first <= r.offset <= last]
        found.next, found.at_end = last + 1, False

    def _close(self, found: _Open, end: int) -> None:
        """Complete the file, up to before `end`, and begin the next one there."""
        held = found.held
        if end > held.first:
            whole = OffsetRange(held.topic, held.identity, held.partition, held.first, end - 1)
            with self._lock:
                found.closed.append(_Closed(whole, found.offsets, found.appended, found.events, found.rejected))
        self._begin(found, end)

    def _write(self, file: _Closed) -> None:
        """Write what is not there yet of a file: another worker may have gone on with the partition meanwhile."""
        first = file.held.first
        while first <= file.held.last:
            try:
                self._write_from(first, file)
                self.files += 1
                return
            except LedgerChanged:
                first = self.landed(file.held.partition, file.held.identity) or first

    def _write_from(self, first: int, file: _Closed) -> None:
        held = replace(file.held, first=first)
        table = pa.concat_tables(file.events) if file.events else ARCHIVE_SCHEMA.empty_table()
        taken = np.concatenate(file.offsets) if file.offsets else np.empty(0, np.int64)
        appended = np.concatenate(file.appended) if file.appended else np.empty(0, np.int64)
        some = table.slice(int(np.searchsorted(table[OFFSET].to_numpy(), first)))
        arrived = appended[np.searchsorted(taken, some[OFFSET].to_numpy())]
        refused = quarantine_rows(held.topic, [r for r in file.rejected if r.offset >= first])
        messages = len(taken) - int(np.searchsorted(taken, first))
        self._landing.write_archive(held, messages, some, refused, arrived)


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
