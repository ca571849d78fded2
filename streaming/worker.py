"""A worker of the speed layer: Kafka to users' records and trends in Redis, and to the archive in the landing zone.

Three threads hand batches on: one takes messages from Kafka, one parses and sums them up, one writes. Each batch is as
large as what arrived while the one before it was on its way: a single event when the worker has caught up, tens of
thousands when it is behind. A handful takes the fast path: the thread that takes them writes them to Redis itself, and
the archive has them a moment later. Nothing is kept between batches but positions, so a worker that starts serves at once.

A worker is given its partitions by the consumer group, but starts where Redis and the archive are (`progress`, names of
archive files). The group's committed offset follows behind both and is for those who watch.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import AdminClient
from redis.exceptions import RedisError

from recsys_core.events import EVENT_TYPE, ITEM_ID, TS, USER_ID, now_ms
from recsys_core.heartbeat import HEARTBEATS_KEY, Heartbeat, forget_heartbeat, write_heartbeat
from recsys_core.kafka_config import client_config
from recsys_core.lake import Lake
from recsys_core.landing import Landing
from recsys_core.live import Batch, LiveEvent
from recsys_core.live_trends import announce_sources
from recsys_core.settings import Settings
from recsys_core.tombstones import Tombstones
from streaming.archive import Archive
from streaming.arrival import Arrivals
from streaming.batches import Pipeline, Position, Row, Taken, Work, by_partition, taken_rows
from streaming.connections import REDIS_SECONDS, consumer_config, redis_for_writes
from streaming.dead_letters import DeadLetter, DeadLetterQueue
from streaming.decode import FEW, decode, decode_one
from streaming.incarnations import add_cut, incarnation, read_cuts
from streaming.metrics import StreamMetrics
from streaming.progress import StateLost, advance, applied_key, check_kept, read_positions
from streaming.sink import RedisSink
from streaming.topics import Topic, find_topic, is_embedded

log = logging.getLogger(__name__)

HEARTBEATS_TTL_SECONDS = 7 * 24 * 3600
"""Longer than anyone leaves a dead worker unnoticed."""
POLL_SECONDS = 0.1
CAUGHT_UP = 1000
"""A batch of fewer messages was all there was."""
QUICK_SECONDS = 0.25
"""How long the thread that takes messages waits for Redis; then the other threads do, and are waited for."""
GATHER_SECONDS = 0.25
"""How long messages that took the fast path are gathered for the archive."""
MAX_UNARCHIVED = 20_000
"""Messages that the archive has not taken; no more take the fast path until it has."""
PAUSE_SECONDS = 5.0
"""How long a batch waits to be handed on before consumption is paused, which gives up what was fetched ahead."""
COMMIT_SECONDS = 1.0
TOPIC_SECONDS = 1.0
"""How often the topic's identity is looked at."""
CUT_MARGIN_MS = 5_000
"""Of a log that was cut, what came so shortly before the last position is read again: counted twice is better than never."""
DRAIN_SECONDS = 10.0
TICK_SECONDS = 0.5
END_SECONDS = 2.0
"""Deadline of asking for the end of a partition."""
RETRY_SECONDS = 0.2
MAX_RETRY_SECONDS = 5.0
SWITCH_SECONDS = 0.001
"""The interpreter's switch interval: with the default of 5 ms a batch waits that long for a thread that computes."""


class StartOver(Exception):
    """What the worker knew of the topic no longer holds; it starts from what Redis and the archive hold."""


class Worker:
    """Runs until it is stopped; starts over by itself when the topic or Redis is no longer what it was."""

    def __init__(self, settings: Settings, name: str = "") -> None:
        self.settings = settings
        self.name = name or f"{socket.gethostname()}-{os.getpid()}"
        self.metrics = StreamMetrics()
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Finish the batches under way and end `run`; safe in a signal handler."""
        self._stopping.set()

    def run(self) -> None:
        """Work until `stop`. Raises MetricsError when the port of the metrics can't be had."""
        sys.setswitchinterval(SWITCH_SECONDS)
        # What was imported stays: looking through all of it for garbage would hold up messages for a tenth of a second.
        gc.freeze()
        self.metrics.serve(self.settings.stream.metrics_host, self.settings.stream.metrics_port)
        while not self._stopping.is_set():
            found = self._wait_for_topic()
            if found is None:
                return
            session = _Session(self.settings, *found, self.metrics, self._stopping, self.name)
            try:
                session.run()
            except (StartOver, StateLost) as reason:
                self.metrics.restarts.labels(type(reason).__name__).inc()
                log.warning("starting over: %s", reason)
            finally:
                session.close()

    def _wait_for_topic(self) -> tuple[Topic, bool] | None:
        """The topic, and whether the broker is the embedded one. None when the worker was stopped before there was one."""
        admin = AdminClient(client_config(self.settings.kafka))
        name = self.settings.kafka.topic
        told = False
        while not self._stopping.is_set():
            try:
                topic = find_topic(admin, name)
                if topic is not None:
                    return topic, is_embedded(admin)
                if not told:
                    log.warning("there is no topic %s; `recsys kafka init` makes it", name)
                    told = True
            except KafkaException as error:
                log.warning("%s does not answer: %s", self.settings.kafka.bootstrap_servers, error.args[0].str())
            self._stopping.wait(TOPIC_SECONDS)
        return None


class _Session:
    """The work on one incarnation of the topic."""

    def __init__(
        self, settings: Settings, topic: Topic, embedded: bool, metrics: StreamMetrics, stopping: threading.Event, name: str
    ) -> None:
        self._settings = settings
        self._topic = topic
        self._metrics = metrics
        self._stopping = stopping
        self._name = name
        self._redis = redis_for_writes(settings)
        self._sink = RedisSink(self._redis, settings)
        self._quick_redis = redis_for_writes(settings, QUICK_SECONDS)
        self._quick_sink = RedisSink(self._quick_redis, settings)
        self._dead_letters = DeadLetterQueue(settings.kafka)
        self._arrivals = Arrivals(topic.name, told=embedded)
        self._admin = AdminClient(client_config(settings.kafka))
        self._lake = Lake(settings.lake_uri, settings.lake.keep_versions)
        self._tombstones = Tombstones({})
        self._archive: Archive | None = None
        if settings.stream.archive:
            self._archive = Archive(Landing(self._lake), topic.name, topic.identity, settings.stream)
        self._positions: dict[int, Position] = {}
        self._identities: dict[int, str] = {}
        self._lock = threading.Lock()
        self._epoch = 0
        self._pipe = Pipeline()
        self._unarchived: list[Row] = []
        self._held: list[Message] = []
        self._paused = False
        self._asked: Any = None
        self._due = {"commit": 0.0, "topic": 0.0, "heartbeat": 0.0, "progress": 0.0, "archive": 0.0, "gathered": 0.0}
        self._consumer = Consumer(consumer_config(settings, embedded), logger=log)
        self._threads = [
            threading.Thread(target=self._guarded, args=(step,), name=step.__name__, daemon=True)
            for step in (self._prepare_all, self._write_all)
        ]

    # -- taking messages --------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Take messages and hand them on. Raises what made it impossible.

        A worker that has caught up takes no batch that would be held up: messages would grow old in it, and those that come
        meanwhile would have to wait for the next one.
        """
        caught_up = True
        for thread in self._threads:
            thread.start()
        self._consumer.subscribe(
            [self._topic.name], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
        )
        while not self._stopping.is_set():
            self._check_failure()
            self._keep_house()
            if caught_up:
                self._pipe.wait_for_room(POLL_SECONDS)
            messages = self._take()
            caught_up = len(messages) < CAUGHT_UP
            if messages and not self._take_the_fast_path(messages):
                self._offer(self._taken(messages))
        self._drain()
        self._check_failure()

    def close(self) -> None:
        """End the threads, say how far the partitions are, and leave the group."""
        self._pipe.stopping.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        try:
            if self._pipe.failure is None:
                self._write_progress()
                self._commit(asynchronous=False)
                forget_heartbeat(self._redis, self._name)
        except (RedisError, KafkaException, StateLost) as error:
            log.warning("progress could not be written at the end, the next worker repeats some work: %s", error)
        with self._lock:
            self._positions.clear()
        self._consumer.close()
        if self._archive is not None:
            self._archive.close()
        self._quick_sink.close()
        self._quick_redis.close()
        self._redis.close()

    def _take(self) -> list[Message]:
        """What there is, at most a batch; waits a moment for a first message."""
        held, self._held = self._held, []
        first = self._consumer.poll(0 if held else POLL_SECONDS)
        messages = [*held, *([first] if first is not None else [])]
        if messages:
            messages += self._consumer.consume(self._settings.stream.batch_events, 0)
        return [message for message in messages if self._is_message(message)]

    def _is_message(self, message: Message) -> bool:
        error = message.error()
        if error is None:
            return True
        if error.fatal():
            raise KafkaException(error)
        if error.code() in (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.UNKNOWN_TOPIC_ID, KafkaError.OFFSET_OUT_OF_RANGE):
            self._due["topic"] = 0.0
        log.warning("Kafka: %s", error.str())
        return False

    def _taken(self, messages: list[Message]) -> Taken:
        n = len(messages)
        partition = np.fromiter([m.partition() for m in messages], np.int64, n)
        offset = np.fromiter([m.offset() for m in messages], np.int64, n)
        appended = self._arrivals.of(messages)
        for number in np.unique(partition).tolist():
            position = self._positions.get(number)
            if position is None:
                continue
            own = offset[partition == number]
            if int(own[0]) < position.seen:
                raise StartOver(f"{self._topic.name}/{number} went back from offset {position.seen} to {int(own[0])}")
            position.seen = int(own[-1]) + 1
        return Taken(self._epoch, messages, [m.value() for m in messages], partition, offset, appended)

    def _offer(self, taken: Taken) -> None:
        """Hand a batch on. While the threads behind are held up, the group is kept and Kafka is not asked for more."""
        self._pipe.begin(len(taken.values) >= CAUGHT_UP)
        while not self._stopping.is_set():
            try:
                self._pipe.taken.put(taken, timeout=POLL_SECONDS if self._paused else PAUSE_SECONDS)
                break
            except queue.Full:
                self._check_failure()
                self._pause()
                self._keep_house()
                message = self._consumer.poll(0)
                if message is not None and self._is_message(message):
                    self._held.append(message)
        else:
            self._pipe.offered -= 1
        self._resume()

    def _pause(self) -> None:
        if not self._paused:
            log.warning("Redis or the archive is slow; consumption pauses")
            self._consumer.pause(self._consumer.assignment())
            self._paused = True
            self._metrics.paused.set(1)

    def _resume(self) -> None:
        if self._paused:
            self._consumer.resume(self._consumer.assignment())
            self._paused = False
            self._metrics.paused.set(0)

    # -- the fast path ----------------------------------------------------------------------------------------------

    def _take_the_fast_path(self, messages: list[Message]) -> bool:
        """Apply a handful of messages in this thread when nothing is on its way. False: they have to go the long way.

        That is where every trouble is dealt with. What of them is in Redis already changes nothing there.
        """
        few = len(messages) <= FEW and len(self._unarchived) < MAX_UNARCHIVED
        if not few or not self._pipe.empty or self._settings.redis.wait_replicas:
            return False
        read = self._read_few(messages)
        if read is None:
            return False
        rows, events = read
        of = {event.partition: self._positions[event.partition] for event in events}
        sources = {number: position.source for number, position in of.items()}
        known = {number: position.persisted for number, position in of.items()}
        try:
            hits = self._quick_sink.apply_few(events, sources, known, now_ms()) if events else 0
        except RedisError as error:
            log.info("Redis did not take a handful at once: %s", error)
            return False
        if hits is None:
            return False
        self._metrics.fence_hits.inc(hits)
        self._finish_few(rows, sum(message.key() is None for message in messages))
        return True

    def _read_few(self, messages: list[Message]) -> tuple[list[Row], list[LiveEvent]] | None:
        """The messages, and the events among them that are to be applied. None when one of them is no event, or not ours."""
        rows: list[Row] = []
        events = []
        settings, max_bytes = self._settings.events, self._settings.kafka.max_message_bytes
        for message in messages:
            number, offset, value = message.partition(), message.offset(), message.value()
            appended = self._arrivals.of_one(message)
            position = None if number is None else self._positions.get(number)
            if number is None or offset is None or position is None or offset < position.seen:
                return None
            try:
                event = decode_one(value, settings, max_bytes, appended)
            except ValueError:
                return None
            rows.append((number, offset, appended, value))
            user, ts = event[USER_ID], event[TS]
            if offset >= position.redis_from and not self._tombstones.covers_one(user, ts):
                events.append(LiveEvent(number, offset, user, event[ITEM_ID], event[EVENT_TYPE], ts))
        return rows, events

    def _finish_few(self, rows: list[Row], unkeyed: int) -> None:
        """What was applied, into positions and metrics, and to where the archive takes it."""
        visible = now_ms()
        with self._lock:
            for number, offset, _, _ in rows:
                position = self._positions[number]
                position.seen = offset + 1
                position.applied = max(position.applied, offset + 1)
            if self._archive is not None:
                self._unarchived += rows
        self._metrics.latency.observe_few([max(visible - appended, 0) for _, _, appended, _ in rows])
        self._metrics.messages.inc(len(rows))
        self._metrics.quick.inc(len(rows))
        self._metrics.events.inc(len(rows))
        self._pipe.events += len(rows)
        self._metrics.batch.set(len(rows))
        if unkeyed:
            self._metrics.unkeyed.inc(unkeyed)

    # -- partitions -------------------------------------------------------------------------------------------------

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        numbers = [p.partition for p in partitions]
        cuts = self._patiently(lambda: read_cuts(self._redis, self._topic.identity, numbers))
        committed = {p.partition: p for p in consumer.committed(partitions, timeout=30)}
        # Only a replay brings back what a user did before being forgotten, and a replay begins here.
        self._tombstones = Tombstones.read(self._lake)
        self._epoch += 1
        starts = []
        for number in numbers:
            low, high = consumer.get_watermark_offsets(TopicPartition(self._topic.name, number), timeout=30)
            position, start = self._start(number, cuts[number], committed.get(number), low, high)
            with self._lock:
                self._positions[number] = position
            starts.append(TopicPartition(self._topic.name, number, start))
        kept = {position.source: position.redis_from for position in self._positions.values()}
        self._patiently(lambda: advance(self._redis, kept, self._settings.cache.feature_ttl_seconds))
        self._patiently(lambda: announce_sources(self._redis, list(kept), self._settings, now_ms()))
        consumer.incremental_assign(starts)
        log.info("has partitions %s", sorted(self._positions))

    def _start(self, number: int, cuts: list[int], group: TopicPartition | None, low: int, high: int) -> tuple[Position, int]:
        """Where a partition starts: where Redis is, or where the archive is if that is earlier.

        A committed offset counts only where nothing is archived, and only of this incarnation of the partition. Where the
        log ends before what Redis or the archive have of it, the partition goes on as another one.
        """
        one = incarnation(self._topic.identity, number, cuts)
        marker = self._patiently(lambda: read_positions(self._redis, [one.source]))[one.source]
        committed = -1
        if group is not None and group.offset >= 0 and group.metadata == one.identity:
            committed = group.offset
        if marker is None and committed >= 0:
            log.warning("Redis does not know of %s, which was read up to %d: applying all of it again", one.source, committed)
        landed, known = self._archive.landed(number, one.identity) if self._archive is not None else (None, [])
        had = max(marker or 0, landed or 0, *(held.last + 1 for held in known))
        if had > high:
            log.error("%s ends at offset %d and was read up to %d: the brokers lost messages", one.source, high, had)
            at = min(high, max(low, self._first_unread(number, one.source, marker)))
            longer = self._patiently(lambda: add_cut(self._redis, self._topic.identity, number, cuts, at))
            return self._start(number, longer, group, low, high)
        redis_from = max(low, one.start) if marker is None else max(low, marker)
        start = redis_from
        if self._archive is not None:
            archive_from = max(low, landed if landed is not None else max(committed, one.start))
            self._archive.start(number, archive_from, known, self._epoch, one.identity)
            start = min(start, archive_from)
        self._identities[number] = one.identity
        return Position(one.source, self._epoch, redis_from, start, redis_from, redis_from, committed), start

    def _first_unread(self, number: int, source: str, marker: int | None) -> int:
        """From which offset on the messages of a partition whose log was cut came after the last ones that were read.

        A position says by its expiry when it was written. Without one everything is read again.
        """
        if marker is None:
            return 0
        left_ms = self._patiently(lambda: self._redis.pttl(applied_key(source)))
        written = now_ms() - max(0, self._settings.cache.feature_ttl_seconds * 1000 - left_ms)
        [found] = self._consumer.offsets_for_times(
            [TopicPartition(self._topic.name, number, written - CUT_MARGIN_MS)], timeout=30
        )
        return int(found.offset) if found.offset >= 0 else np.iinfo(np.int64).max

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._drain()
        try:
            self._write_progress()
            self._commit(asynchronous=False)
        except (RedisError, KafkaException) as error:
            log.warning("progress could not be written before partitions went: %s", error)
        self._forget(partitions)
        consumer.incremental_unassign(partitions)

    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        log.warning("the group gave partitions %s to others", sorted(p.partition for p in partitions))
        self._forget(partitions)
        consumer.incremental_unassign(partitions)

    def _forget(self, partitions: Sequence[TopicPartition]) -> None:
        numbers = [p.partition for p in partitions]
        with self._lock:
            for number in numbers:
                self._positions.pop(number, None)
                self._metrics.lag.labels(str(number)).set(0)
            self._unarchived = [row for row in self._unarchived if row[0] not in numbers]
        if self._archive is not None:
            self._archive.drop(numbers)

    def _drain(self) -> None:
        """Wait until what was handed on is written, for a while; not for what the threads have been told to give up."""
        deadline = time.monotonic() + DRAIN_SECONDS
        while not self._pipe.empty and not self._pipe.stopping.is_set() and time.monotonic() < deadline:
            time.sleep(0.002)

    def _patiently(self, call: Callable[[], Any]) -> Any:
        """Do something with Redis, again and again while it is away."""
        for pause in _pauses():
            try:
                return call()
            except RedisError as error:
                if self._stopping.is_set():
                    raise
                log.warning("Redis: %s; trying again", error)
                self._metrics.redis_retries.inc()
                self._stopping.wait(pause)

    # -- the two threads behind -------------------------------------------------------------------------------------

    def _guarded(self, step: Callable[[], None]) -> None:
        try:
            step()
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that takes messages
            self._pipe.failure = error
            self._pipe.stopping.set()

    def _check_failure(self) -> None:
        if self._pipe.failure is not None:
            raise self._pipe.failure

    def _prepare_all(self) -> None:
        while not self._pipe.stopping.is_set():
            self._pipe.hungry.set()
            try:
                taken = self._pipe.taken.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            work = self._prepare(taken)
            while not self._pipe.stopping.is_set():
                try:
                    self._pipe.work.put(work, timeout=POLL_SECONDS)
                    break
                except queue.Full:
                    continue

    def _prepare(self, taken: Taken) -> Work:
        kafka = self._settings.kafka
        decoded = decode(taken.values, self._settings.events, kafka.max_message_bytes, taken.appended)
        with self._lock:
            positions = {n: p for n, p in self._positions.items() if p.epoch <= taken.epoch}
        batch = Batch(decoded.events, taken.partition[decoded.rows], taken.offset[decoded.rows])
        redis_from = np.full(max([*positions, int(taken.partition.max())]) + 1, np.iinfo(np.int64).max)
        for number, position in positions.items():
            redis_from[number] = position.redis_from
        new = (batch.offset >= redis_from[batch.partition]) & ~self._tombstones.covers(batch.events)
        sources = {number: position.source for number, position in positions.items()}
        prepared = self._sink.prepare(batch if new.all() else batch.take(new), sources, now_ms())
        letters = [
            self._letter(taken, row, reason)
            for row, reason in decoded.rejected
            if taken.offset[row] >= redis_from[taken.partition[row]]
        ]
        archive = by_partition(taken, decoded, batch) if self._archive is not None else {}
        return Work(taken, prepared, archive, letters, positions, batch.rows)

    def _letter(self, taken: Taken, row: int, reason: str) -> DeadLetter:
        message = taken.messages[row]
        where = int(taken.partition[row]), int(taken.offset[row])
        return DeadLetter(self._topic.name, *where, reason, message.key(), message.value())

    def _write_all(self) -> None:
        while not self._pipe.stopping.is_set():
            try:
                work = self._pipe.work.get(timeout=POLL_SECONDS)
            except queue.Empty:
                pass
            else:
                self._write(work)
                self._pipe.end()
            self._write_now_and_then()

    def _write(self, work: Work) -> None:
        """Redis, dead letters, archive: in this order, each repeated until it is done, then the positions."""
        self._to_redis(work)
        self._to_dead_letters(work.letters)
        if self._archive is not None:
            self._archive_gathered(self._archive)
            for number, messages in work.archive.items():
                if number in work.positions:
                    self._archive.add(number, messages, work.positions[number].epoch)
        taken = work.taken
        visible = now_ms()
        with self._lock:
            for number, position in work.positions.items():
                own = taken.offset[taken.partition == number]
                if len(own):
                    position.applied = max(position.applied, int(own[-1]) + 1)
        self._metrics.latency.observe(np.maximum(visible - taken.appended, 0))
        self._metrics.messages.inc(len(taken.values))
        self._metrics.events.inc(work.events)
        self._pipe.events += work.events
        self._metrics.batch.set(len(taken.values))
        if unkeyed := sum(message.key() is None for message in taken.messages):
            self._metrics.unkeyed.inc(unkeyed)

    def _archive_gathered(self, archive: Archive) -> None:
        """What took the fast path since the last time, many messages together: a column costs as much for one."""
        with self._lock:
            rows, self._unarchived = self._unarchived, []
            epochs = {number: position.epoch for number, position in self._positions.items()}
        if not rows:
            return
        taken = taken_rows(rows)
        decoded = decode(taken.values, self._settings.events, self._settings.kafka.max_message_bytes, taken.appended)
        batch = Batch(decoded.events, taken.partition[decoded.rows], taken.offset[decoded.rows])
        for number, messages in by_partition(taken, decoded, batch).items():
            archive.add(number, messages, epochs[number])

    def _to_redis(self, work: Work) -> None:
        if work.prepared is None:
            return
        sources = {number: position.source for number, position in work.positions.items()}
        known = {position.source: position.persisted for position in work.positions.values()}
        for pause in _pauses():
            try:
                check_kept(self._redis, known)
                hits = self._sink.apply(work.prepared, sources, now_ms())
                self._wait_for_replicas()
                self._metrics.fence_hits.inc(hits)
                return
            except RedisError as error:
                self._metrics.redis_retries.inc()
                log.warning("Redis did not take a batch, it is tried again: %s", error)
                self._pipe.stopping.wait(pause)
                if self._pipe.stopping.is_set():
                    raise StartOver("stopped while Redis was away") from error

    def _wait_for_replicas(self) -> None:
        wanted = self._settings.redis.wait_replicas
        if wanted and (have := self._redis.wait(wanted, int(REDIS_SECONDS * 1000))) < wanted:
            raise RedisError(f"{have} of {wanted} replicas have the batch")

    def _to_dead_letters(self, letters: list[DeadLetter]) -> None:
        for pause in _pauses():
            try:
                if letters:
                    self._metrics.dead_letters_refused.inc(self._dead_letters.send(letters))
                break
            except KafkaException as error:
                log.warning("dead letters were not taken and are sent again: %s", error.args[0].str())
                self._pipe.stopping.wait(pause)
                if self._pipe.stopping.is_set():
                    raise StartOver("stopped while the dead-letter topic was away") from error
        for letter in letters:
            self._metrics.dead_letters.labels(letter.reason).inc()

    def _write_now_and_then(self) -> None:
        """Positions, files whose time is over, and the heartbeat."""
        now = time.monotonic()
        if self._archive is not None and now >= self._due["gathered"]:
            self._due["gathered"] = now + GATHER_SECONDS
            self._archive_gathered(self._archive)
        if self._archive is not None and now >= self._due["archive"]:
            self._due["archive"] = now + TICK_SECONDS
            self._archive.tick(now_ms(), self._end_of)
            self._metrics.archive_files.set(self._archive.files)
        try:
            if now >= self._due["progress"]:
                self._due["progress"] = now + COMMIT_SECONDS
                self._write_progress()
            if now >= self._due["heartbeat"]:
                self._due["heartbeat"] = now + self._settings.stream.heartbeat_seconds
                self._heartbeat()
        except RedisError as error:
            log.warning("Redis does not take the worker's progress: %s", error)

    def _end_of(self, number: int) -> int:
        """End of a partition by the brokers, now; -1 while they do not answer."""
        try:
            place = TopicPartition(self._topic.name, number)
            return int(self._consumer.get_watermark_offsets(place, timeout=END_SECONDS)[1])
        except KafkaException as error:
            log.info("the brokers do not answer: %s", error.args[0].str())
            return -1

    def _write_progress(self) -> None:
        with self._lock:
            ahead = {p.source: p.applied for p in self._positions.values()}
            known = {p.source: p.persisted for p in self._positions.values()}
        if not ahead:
            return
        check_kept(self._redis, known)
        advance(self._redis, ahead, self._settings.cache.feature_ttl_seconds)
        with self._lock:
            for position in self._positions.values():
                position.persisted = max(position.persisted, ahead.get(position.source, -1))

    def _heartbeat(self) -> None:
        with self._lock:
            lags = {f"{self._topic.name}/{number}": position.lag for number, position in self._positions.items()}
            sources = [position.source for position in self._positions.values()]
        beat = Heartbeat(self._name, now_ms(), sum(lags.values()) if lags else -1, self._pipe.events, lags)
        write_heartbeat(self._redis, beat)
        self._redis.expire(HEARTBEATS_KEY, HEARTBEATS_TTL_SECONDS)
        announce_sources(self._redis, sources, self._settings, now_ms())

    # -- now and then -----------------------------------------------------------------------------------------------

    def _keep_house(self) -> None:
        """Commit, measure the lag, and look whether the topic is still the one that it was."""
        now = time.monotonic()
        if now >= self._due["commit"]:
            self._due["commit"] = now + COMMIT_SECONDS
            self._commit(asynchronous=True)
            self._measure_lag()
        if self._asked is not None and self._asked.done():
            asked, self._asked = self._asked, None
            self._check_topic(asked)
        elif self._asked is None and now >= self._due["topic"]:
            self._due["topic"] = now + TOPIC_SECONDS
            self._asked = _ask_in_background(self._admin, self._topic.name)

    def _check_topic(self, asked: Any) -> None:
        try:
            found = asked.result()
        except KafkaException as error:
            log.info("the brokers do not answer: %s", error.args[0].str())
            return
        if found is None:
            raise StartOver(f"the topic {self._topic.name} was deleted")
        if found.identity != self._topic.identity:
            raise StartOver(f"the topic {self._topic.name} was deleted and made again: its offsets start over")

    def _commit(self, asynchronous: bool) -> None:
        offsets = []
        with self._lock:
            for number, position in self._positions.items():
                durable = self._archive.durable(number) if self._archive is not None else None
                safe = position.persisted if durable is None else min(position.persisted, durable)
                if safe > position.committed:
                    position.committed = safe
                    offsets.append(TopicPartition(self._topic.name, number, safe, self._identities[number]))
        if offsets and asynchronous:
            self._consumer.commit(offsets=offsets, asynchronous=True)
        elif offsets:
            self._consumer.commit(offsets=offsets, asynchronous=False)

    def _measure_lag(self) -> None:
        with self._lock:
            for number, position in self._positions.items():
                _, high = self._consumer.get_watermark_offsets(TopicPartition(self._topic.name, number), cached=True)
                if high >= 0:
                    position.lag = max(0, high - position.applied)
                    self._metrics.lag.labels(str(number)).set(position.lag)


def _pauses() -> Iterator[float]:
    """Longer and longer, without an end."""
    pause = RETRY_SECONDS
    while True:
        yield pause
        pause = min(2 * pause, MAX_RETRY_SECONDS)


def _ask_in_background(admin: AdminClient, name: str) -> Any:
    answer: Future[Topic | None] = Future()

    def ask() -> None:
        try:
            answer.set_result(find_topic(admin, name))
        except KafkaException as error:
            answer.set_exception(error)

    threading.Thread(target=ask, name="topic", daemon=True).start()
    return answer
