"""A worker of the speed layer: Kafka to users' records and trends in Redis, and to the archive in the landing zone.

Three threads hand batches on: one takes messages from Kafka, one parses and sums them up, one writes to Redis. Each batch is
as large as what arrived while the one before it was on its way: a single event when the worker has caught up, tens of
thousands when it is behind. A handful takes the fast path: the thread that takes them writes them to Redis itself.
Nothing is kept between batches but positions, so a worker that starts serves at once. The archive is a thread that nobody
waits for (`archiver`).

A worker is given its partitions by the consumer group, but starts where Redis is (`progress`), as the archive does where its
files end. The group's committed offset follows behind both and is for those who watch.

No neighbour ends a worker: what Kafka or Redis raise, it waits out or starts over from.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from recsys_core.live import Batch, LiveEvent
from recsys_core.live_trends import announce_sources
from recsys_core.settings import Settings
from streaming.archiver import Archiver, Assigned
from streaming.arrival import Arrivals
from streaming.batches import Pipeline, Position, Row, Taken, Work, by_partition
from streaming.connections import (
    REDIS_SECONDS,
    BrokerFailure,
    Kafka,
    KafkaLog,
    asking_kafka,
    consumer_config,
    redis_for_writes,
)
from streaming.dead_letters import DeadLetter, DeadLetterQueue
from streaming.decode import FEW, decode, decode_one
from streaming.forgotten import ForgottenUsers
from streaming.incarnations import add_cut, incarnation, read_cuts
from streaming.metrics import StreamMetrics
from streaming.progress import StateLost, Trail, advance, applied_key, check_kept, read_positions
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
PAUSE_SECONDS = 5.0
"""How long a batch waits to be handed on before consumption is paused, which gives up what was fetched ahead."""
COMMIT_SECONDS = 1.0
TOPIC_SECONDS = 1.0
"""How often the topic's identity is looked at."""
CUT_MARGIN_MS = 5_000
"""Of a log that was cut, what came so shortly before the last position is read again: counted twice is better than never."""
DRAIN_SECONDS = 10.0
END_SECONDS = 0.5
"""How often the end of a partition is passed on once it is reached."""
ASK_SECONDS = 30.0
"""Deadline of a question to the brokers when partitions are assigned."""
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
        self._kafka_log = KafkaLog(self._stopping)

    def stop(self) -> None:
        """Finish the batches under way and end `run`; safe in a signal handler."""
        self._stopping.set()

    def run(self) -> None:
        """Work until `stop`. Raises MetricsError when the port of the metrics can't be had, and what the clients say of wrong
        settings."""
        sys.setswitchinterval(SWITCH_SECONDS)
        # What was imported stays: looking through all of it for garbage would hold up messages for a tenth of a second.
        gc.freeze()
        self.metrics.serve(self.settings.stream.metrics_host, self.settings.stream.metrics_port)
        admin = AdminClient(client_config(self.settings.kafka), logger=self._kafka_log)
        lake = Lake(self.settings.lake_uri, self.settings.lake.keep_versions)
        forgotten = ForgottenUsers(lake)
        forgotten.begin()
        pauses = _pauses()
        while not self._stopping.is_set():
            self.metrics.alive()
            started = time.monotonic()
            try:
                self._work(admin, lake, forgotten)
            except (StartOver, StateLost) as reason:
                self._say(reason)
            except (BrokerFailure, RedisError) as reason:
                self._say(reason)
                self._stopping.wait(next(pauses))
            except Exception as reason:
                self.metrics.restarts.labels(type(reason).__name__).inc()
                log.exception("starting over after a failure that nothing foresaw")
                self._stopping.wait(next(pauses))
            if time.monotonic() - started > MAX_RETRY_SECONDS:
                pauses = _pauses()
        forgotten.close()

    def _say(self, reason: Exception) -> None:
        if self._stopping.is_set():
            log.warning("stopped while a neighbour was away, the next worker repeats some work: %s", reason)
        else:
            self.metrics.restarts.labels(type(reason).__name__).inc()
            log.warning("starting over: %s", reason)

    def _work(self, admin: AdminClient, lake: Lake, forgotten: ForgottenUsers) -> None:
        """Work on the topic that there is until that is no longer possible. Raises what made it so."""
        found = self._wait_for_topic(admin)
        if found is None:
            return
        session = _Session(self.settings, *found, self.metrics, self._stopping, self.name, lake, forgotten, self._kafka_log)
        try:
            session.run()
        finally:
            session.close()

    def _wait_for_topic(self, admin: AdminClient) -> tuple[Topic, bool] | None:
        """The topic, and whether the broker is the embedded one. None when the worker was stopped before there was one."""
        name = self.settings.kafka.topic
        told = False
        while not self._stopping.is_set():
            self.metrics.alive()
            try:
                with asking_kafka(self.settings.kafka.bootstrap_servers):
                    topic = find_topic(admin, name)
                    if topic is not None:
                        return topic, is_embedded(admin)
                if not told:
                    log.warning("there is no topic %s; `recsys kafka init` makes it", name)
                    told = True
            except BrokerFailure as error:
                log.warning("the brokers do not answer: %s", error)
            self._stopping.wait(TOPIC_SECONDS)
        return None


class _Session:
    """The work on one incarnation of the topic."""

    def __init__(
        self,
        settings: Settings,
        topic: Topic,
        embedded: bool,
        metrics: StreamMetrics,
        stopping: threading.Event,
        name: str,
        lake: Lake,
        forgotten: ForgottenUsers,
        kafka_log: KafkaLog,
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
        self._trail = None if self._sink.follows else Trail(self._redis)
        self._dead_letters = DeadLetterQueue(settings.kafka)
        self._arrivals = Arrivals(topic.name, told=embedded)
        self._admin = AdminClient(client_config(settings.kafka), logger=kafka_log)
        self._forgotten = forgotten
        self._kafka_log = kafka_log
        self._archiver: Archiver | None = None
        if settings.stream.archive:
            self._archiver = Archiver(settings, topic, embedded, lake, self._arrivals, kafka_log)
        self._positions: dict[int, Position] = {}
        self._identities: dict[int, str] = {}
        self._lock = threading.Lock()
        self._epoch = 0
        self._pipe = Pipeline()
        self._held: list[Message] = []
        self._paused = False
        self._asked: Any = None
        self._done, self._moved = 0, time.monotonic()
        self._due = {"commit": 0.0, "topic": 0.0, "heartbeat": 0.0, "progress": 0.0, "ends": 0.0}
        config = {**consumer_config(settings, embedded), "on_commit": self._on_commit}
        self._consumer = Kafka(Consumer(config, logger=kafka_log))
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
        if self._archiver is not None:
            self._archiver.begin()
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
                if self._stopping.is_set():  # one that starts over and does not come back is missed
                    forget_heartbeat(self._redis, self._name)
        except (RedisError, BrokerFailure, StateLost) as error:
            log.warning("progress could not be written at the end, the next worker repeats some work: %s", error)
        with self._lock:
            for number in self._positions:
                self._metrics.lag.labels(str(number)).set(0)
            self._positions.clear()
        self._metrics.paused.set(0)
        try:
            self._consumer.close()
        except BrokerFailure as error:
            log.info("the group is left to find out: %s", error)
        finally:
            if self._archiver is not None:
                self._archiver.close()
            self._sink.close()
            self._quick_sink.close()
            self._quick_redis.close()
            self._redis.close()

    def _take(self) -> list[Message]:
        """What there is, at most a batch; waits a moment for a first message."""
        held, self._held = self._held, []
        first = self._consumer.poll(0 if held else POLL_SECONDS)
        messages = [*held, *([first] if first is not None and self._is_message(first) else [])]
        if messages:
            more = self._consumer.consume(self._settings.stream.batch_events, 0)
            messages += [message for message in more if self._is_message(message)]
        return messages

    def _is_message(self, message: Message) -> bool:
        error = message.error()
        if error is None:
            return True
        if error.code() == KafkaError._PARTITION_EOF:
            self._note_end(message.partition(), message.offset())
            return False
        if error.fatal() or error.code() == KafkaError._AUTO_OFFSET_RESET:
            raise BrokerFailure(f"{self._topic.name}/{message.partition()}: {error.str()}")
        if error.code() in (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.UNKNOWN_TOPIC_ID, KafkaError.OFFSET_OUT_OF_RANGE):
            self._due["topic"] = 0.0
        self._kafka_log.log(logging.WARNING, "Kafka: %s", error.str())
        return False

    def _note_end(self, number: int | None, offset: int | None) -> None:
        """A partition ends before an offset, and what was taken of it until now is all before that."""
        with self._lock:
            position = None if number is None else self._positions.get(number)
            if position is not None and offset is not None:
                position.end = offset

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
            log.warning("Redis is slow; consumption pauses")
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
        if len(messages) > FEW or not self._pipe.empty or self._settings.redis.wait_replicas:
            return False
        read = self._read_few(messages)
        if read is None:
            return False
        rows, events = read
        of = {event.partition: self._positions[event.partition] for event in events}
        sources = {number: position.source for number, position in of.items()}
        known = {number: position.persisted for number, position in of.items()}
        upto = {number: offset + 1 for number, offset, _, _ in rows if number in of}
        try:
            hits = self._quick_sink.apply_few(events, sources, known, now_ms(), upto) if events else 0
        except RedisError as error:
            log.info("Redis did not take a handful at once: %s", error)
            return False
        if hits is None:
            return False
        if self._quick_sink.follows:
            self._keep(upto)
        self._metrics.fence_hits.inc(hits)
        self._finish_few(rows, sum(message.key() is None for message in messages))
        return True

    def _read_few(self, messages: list[Message]) -> tuple[list[Row], list[LiveEvent]] | None:
        """The messages, and the events among them that are to be applied. None when one of them is no event, or not ours."""
        rows: list[Row] = []
        events = []
        forgotten = self._forgotten.covered()
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
            if offset >= position.redis_from and not forgotten.covers_one(user, min(ts, appended)):
                events.append(LiveEvent(number, offset, user, event[ITEM_ID], event[EVENT_TYPE], ts, appended))
        return rows, events

    def _finish_few(self, rows: list[Row], unkeyed: int) -> None:
        """What was applied, into positions and metrics, and to where the archive takes it."""
        visible = now_ms()
        with self._lock:
            for number, offset, _, _ in rows:
                position = self._positions[number]
                position.seen = offset + 1
                position.applied = max(position.applied, offset + 1)
        if self._archiver is not None:
            self._archiver.offer_rows(rows)
        self._metrics.latency.observe_few([max(visible - appended, 0) for _, _, appended, _ in rows])
        self._metrics.messages.inc(len(rows))
        self._metrics.quick.inc(len(rows))
        self._metrics.events.inc(len(rows))
        self._pipe.events += len(rows)
        self._metrics.batch.set(len(rows))
        if unkeyed:
            self._metrics.unkeyed.inc(unkeyed)

    def _keep(self, positions: Mapping[int, int]) -> None:
        """Redis has these positions."""
        with self._lock:
            for number, offset in positions.items():
                if (position := self._positions.get(number)) is not None:
                    position.persisted = max(position.persisted, offset)

    # -- partitions -------------------------------------------------------------------------------------------------

    def _on_assign(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        numbers = [p.partition for p in partitions]
        cuts = self._patiently(lambda: read_cuts(self._redis, self._topic.identity, numbers))
        committed = {p.partition: p for p in self._consumer.committed(partitions, timeout=ASK_SECONDS)}
        # Only a replay brings back what a user did before being forgotten, and a replay begins here.
        self._forgotten.refresh()
        self._epoch += 1
        starts = []
        for number in numbers:
            place = TopicPartition(self._topic.name, number)
            low, high = self._consumer.get_watermark_offsets(place, timeout=ASK_SECONDS)
            position, start = self._start(number, cuts[number], committed.get(number), low, high)
            with self._lock:
                self._positions[number] = position
            starts.append(TopicPartition(self._topic.name, number, start))
        kept = {position.source: position.redis_from for position in self._positions.values()}
        self._patiently(lambda: advance(self._redis, kept, self._settings.cache.feature_ttl_seconds))
        self._patiently(lambda: announce_sources(self._redis, list(kept), self._settings, now_ms()))
        self._consumer.incremental_assign(starts)
        log.info("has partitions %s", sorted(self._positions))

    def _start(self, number: int, cuts: list[int], group: TopicPartition | None, low: int, high: int) -> tuple[Position, int]:
        """Where a partition starts: where Redis is. The archive reads by itself what it is behind.

        A committed offset counts only where nothing is archived, and only of this incarnation of the partition. Where the
        log ends before what Redis has of it, the partition goes on as another one.
        """
        one = incarnation(self._topic.identity, number, cuts)
        marker = self._patiently(lambda: read_positions(self._redis, [one.source]))[one.source]
        if marker is not None and marker > high:
            return self._start(number, self._cut(number, cuts, marker, low, high), group, low, high)
        committed = -1
        if group is not None and group.offset >= 0 and group.metadata == one.identity:
            committed = group.offset
        if marker is None and committed > 0:
            log.warning("Redis does not know of %s, which was read up to %d: applying all of it again", one.source, committed)
        redis_from = start = max(low, one.start) if marker is None else max(low, marker)
        if self._archiver is not None:
            archived_from = max(low, committed, one.start)
            self._archiver.assign(number, Assigned(self._epoch, one.identity, archived_from, low, high, start))
        self._identities[number] = one.identity
        return Position(one.source, self._epoch, redis_from, start, redis_from, redis_from, committed), start

    def _cut(self, number: int, cuts: list[int], had: int, low: int, high: int) -> list[int]:
        """Note that the brokers lost messages of a partition, of which Redis or the archive `had` more. Returns all cuts."""
        source = incarnation(self._topic.identity, number, cuts).source
        log.error("%s ends at offset %d and was read up to %d: the brokers lost messages", source, high, had)
        at = min(high, max(low, self._first_unread(number, source)))
        return list(self._patiently(lambda: add_cut(self._redis, self._topic.identity, number, cuts, at)))

    def _start_after_cut(self, number: int, had: int) -> None:
        """The archive has more of a partition than the brokers: it goes on as another one. Raises StartOver."""
        cuts = self._patiently(lambda: read_cuts(self._redis, self._topic.identity, [number]))[number]
        low, high = self._consumer.get_watermark_offsets(TopicPartition(self._topic.name, number), timeout=ASK_SECONDS)
        self._cut(number, cuts, had, low, high)
        raise StartOver(f"{self._topic.name}/{number} was archived up to {had} and ends at {high}")

    def _first_unread(self, number: int, source: str) -> int:
        """From which offset on the messages of a partition whose log was cut came after the last ones that were read.

        A position says by its expiry when it was written. Without one everything is read again.
        """
        left_ms = self._patiently(lambda: self._redis.pttl(applied_key(source)))
        if left_ms < 0:
            return 0
        written = now_ms() - max(0, self._settings.cache.feature_ttl_seconds * 1000 - left_ms)
        place = TopicPartition(self._topic.name, number, written - CUT_MARGIN_MS)
        [found] = self._consumer.offsets_for_times([place], timeout=ASK_SECONDS)
        return int(found.offset) if found.offset >= 0 else np.iinfo(np.int64).max

    def _on_revoke(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        self._drain()
        try:
            self._write_progress()
            self._commit(asynchronous=False)
        except (RedisError, BrokerFailure) as error:
            log.warning("progress could not be written before partitions went: %s", error)
        self._forget(partitions)
        self._consumer.incremental_unassign(partitions)

    def _on_lost(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        log.warning("the group gave partitions %s to others", sorted(p.partition for p in partitions))
        self._forget(partitions)
        self._consumer.incremental_unassign(partitions)

    def _on_commit(self, error: KafkaError | None, partitions: list[TopicPartition]) -> None:
        """What the group did not take is committed again."""
        with self._lock:
            for place in partitions:
                if (error or place.error) and place.partition in self._positions:
                    self._positions[place.partition].committed = -1

    def _forget(self, partitions: Sequence[TopicPartition]) -> None:
        numbers = [p.partition for p in partitions]
        with self._lock:
            for number in numbers:
                self._positions.pop(number, None)
                self._metrics.lag.labels(str(number)).set(0)
        if self._archiver is not None:
            self._archiver.drop(numbers)

    def _drain(self) -> None:
        """Wait until what was handed on is written, for a while; not for what the threads have been told to give up."""
        deadline = time.monotonic() + DRAIN_SECONDS
        while not self._pipe.empty and not self._pipe.stopping.is_set() and time.monotonic() < deadline:
            time.sleep(0.002)

    def _patiently(self, call: Callable[[], Any]) -> Any:
        """Do something with Redis, again and again while it is away."""
        for pause in _pauses():
            self._metrics.alive()
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
        rows = decoded.rows
        batch = Batch(decoded.events, taken.partition[rows], taken.offset[rows], taken.appended[rows])
        redis_from = np.full(max([*positions, int(taken.partition.max())]) + 1, np.iinfo(np.int64).max)
        for number, position in positions.items():
            redis_from[number] = position.redis_from
        forgotten = self._forgotten.covered()
        new = (batch.offset >= redis_from[batch.partition]) & ~forgotten.covers(batch.events, batch.arrived)
        sources = {number: position.source for number, position in positions.items()}
        prepared = self._sink.prepare(batch if new.all() else batch.take(new), sources, now_ms())
        letters = [
            self._letter(taken, row, reason)
            for row, reason in decoded.rejected
            if taken.offset[row] >= redis_from[taken.partition[row]]
        ]
        archive = by_partition(taken, decoded, batch) if self._archiver is not None else {}
        return Work(taken, prepared, forgotten, archive, letters, positions, batch.rows)

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
        """Dead letters, Redis, archive: in this order, the first two each repeated until it is done.

        Redis is last of those, since its position says that the dead letters are sent as well.
        """
        taken = work.taken
        ends = {number: taken.offset[taken.partition == number] for number in work.positions}
        upto = {number: int(own[-1]) + 1 for number, own in ends.items() if len(own)}
        self._to_dead_letters(work.letters)
        self._to_redis(work, upto)
        if self._archiver is not None:
            self._archiver.offer_parsed(work.archive, {number: position.epoch for number, position in work.positions.items()})
        visible = now_ms()
        with self._lock:
            for number, offset in upto.items():
                work.positions[number].applied = max(work.positions[number].applied, offset)
        self._metrics.latency.observe(np.maximum(visible - taken.appended, 0))
        self._metrics.messages.inc(len(taken.values))
        self._metrics.events.inc(work.events)
        self._pipe.events += work.events
        self._metrics.batch.set(len(taken.values))
        if unkeyed := sum(message.key() is None for message in taken.messages):
            self._metrics.unkeyed.inc(unkeyed)

    def _to_redis(self, work: Work, upto: Mapping[int, int]) -> None:
        prepared, forgotten = work.prepared, work.forgotten
        sources = {number: position.source for number, position in work.positions.items()}
        for pause in _pauses():
            if prepared is not None and forgotten is not (now_known := self._forgotten.covered()):
                forgotten, batch = now_known, prepared.batch
                left_out = forgotten.covers(batch.events, batch.arrived)
                prepared = self._sink.prepare(batch.take(~left_out), sources, now_ms()) if left_out.any() else prepared
            if prepared is None:
                return
            known = {number: position.persisted for number, position in work.positions.items()}
            try:
                hits = self._sink.apply(prepared, sources, now_ms(), known, upto)
                self._wait_for_replicas()
                self._metrics.fence_hits.inc(hits)
                if self._sink.follows:
                    self._keep(upto)
                return
            except RedisError as error:
                self._metrics.redis_retries.inc()
                log.warning("Redis did not take a batch, it is tried again: %s", error)
                self._pipe.stopping.wait(pause)
                if self._pipe.stopping.is_set():
                    raise StartOver("stopped while Redis was away") from error

    def _wait_for_replicas(self) -> None:
        wanted = self._settings.redis.wait_replicas
        if wanted and (have := self._sink.wait(wanted, REDIS_SECONDS)) < wanted:
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
        """Positions and the heartbeat."""
        now = time.monotonic()
        try:
            if now >= self._due["progress"]:
                self._due["progress"] = now + COMMIT_SECONDS
                self._write_progress()
            if now >= self._due["heartbeat"]:
                self._due["heartbeat"] = now + self._settings.stream.heartbeat_seconds
                self._heartbeat()
        except RedisError as error:
            if not self._stopping.is_set():
                log.warning("Redis does not take the worker's progress: %s", error)

    def _write_progress(self) -> None:
        with self._lock:
            ahead = {p.source: p.applied for p in self._positions.values()}
            known = {p.source: p.persisted for p in self._positions.values()}
        if not ahead:
            return
        if self._trail is not None:
            ahead = self._trail.follow(time.monotonic(), ahead)
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
        """Commit, measure the lag, pass ends on, and look whether the topic is still the one that it was."""
        self._metrics.alive()
        now = time.monotonic()
        if self._pipe.empty or self._pipe.finished != self._done:
            self._done, self._moved = self._pipe.finished, now
        if self._archiver is not None:
            self._archiver.alive(held_up=now - self._moved > PAUSE_SECONDS)
            for number, had in self._archiver.lost():
                self._start_after_cut(number, had)
        if now >= self._due["ends"]:
            self._due["ends"] = now + END_SECONDS
            self._pass_ends()
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

    def _pass_ends(self) -> None:
        """Ends of partitions, which may be beyond the last message, to positions and archive, once all before is applied."""
        if self._held:
            return
        with self._lock:
            reached = {n: p for n, p in self._positions.items() if p.end > p.told and p.end >= p.seen and p.applied >= p.seen}
            for position in reached.values():
                position.applied = max(position.applied, position.end)
                position.told = position.end
        if reached and self._archiver is not None:
            self._archiver.offer_ends({number: position.end for number, position in reached.items()})

    def _check_topic(self, asked: Any) -> None:
        try:
            found = asked.result()
        except BrokerFailure as error:
            log.info("the brokers do not answer: %s", error)
            return
        if found is None:
            raise StartOver(f"the topic {self._topic.name} was deleted")
        if found.identity != self._topic.identity:
            raise StartOver(f"the topic {self._topic.name} was deleted and made again: its offsets start over")

    def _commit(self, asynchronous: bool) -> None:
        offsets = []
        with self._lock:
            for number, position in self._positions.items():
                safe = position.persisted
                if self._archiver is not None:
                    safe = min(safe, self._archiver.durable(number))
                if safe > position.committed:
                    position.committed = safe
                    offsets.append(TopicPartition(self._topic.name, number, safe, self._identities[number]))
        if offsets:
            self._consumer.commit(offsets=offsets, asynchronous=asynchronous)

    def _measure_lag(self) -> None:
        if self._archiver is not None:
            self._metrics.archive_files.set(self._archiver.files)
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
            with asking_kafka(name):
                answer.set_result(find_topic(admin, name))
        except BaseException as error:  # noqa: BLE001 - raised again by whoever reads the answer
            answer.set_exception(error)

    threading.Thread(target=ask, name="topic", daemon=True).start()
    return answer
