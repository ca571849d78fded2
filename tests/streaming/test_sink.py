"""A handful of events in one round trip, whatever happens to the connection and to Redis in between."""

from __future__ import annotations

import random
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import redis
from redis_cluster import redis_cluster

from recsys_core.events import EVENT_SCHEMA, now_ms
from recsys_core.live import LiveEvent
from recsys_core.recompute import Recomputation
from recsys_core.redis_client import CONNECT_SECONDS
from recsys_core.settings import RedisSettings, Settings
from streaming.connections import PinnedConnection, redis_for_writes
from streaming.progress import StateLost, advance, applied_key
from streaming.sink import RedisSink

NOW = now_ms()


def some_events(count: int, partition: int = 0) -> list[LiveEvent]:
    chance = random.Random(count)
    prefix = uuid.uuid4().hex
    return [
        LiveEvent(
            partition, at, f"{prefix}-{chance.randrange(5)}", f"i{chance.randrange(9)}", "view", NOW - chance.randrange(9)
        )
        for at in range(count)
    ]


def expected(settings: Settings, source: str, events: list[LiveEvent]) -> Recomputation:
    rows = [{**event._asdict(), "event_id": "e"} for event in events]
    table = pa.Table.from_pylist([{n: r.get(n) for n in EVENT_SCHEMA.names} for r in rows], schema=EVENT_SCHEMA)
    computed = Recomputation(settings)
    computed.add(table, source, [event.offset for event in events])
    return computed


@pytest.fixture
def connected(redis_url: str, settings: Settings) -> Callable[[], tuple[Settings, Any, RedisSink, dict[int, str]]]:
    def connect() -> tuple[Settings, Any, RedisSink, dict[int, str]]:
        own = settings.model_copy(update={"redis": settings.redis.model_copy(update={"url": redis_url})})
        store = redis.Redis.from_url(redis_url)
        sources = {0: f"{uuid.uuid4().hex[:8]}.0", 1: f"{uuid.uuid4().hex[:8]}.1"}
        advance(store, dict.fromkeys(sources.values(), 0), 60)
        return own, store, RedisSink(redis_for_writes(own, 5.0), own), sources

    return connect


def test_scripts_and_connections_that_are_gone_come_back(connected: Callable[[], Any]) -> None:
    settings, store, sink, sources = connected()
    events = some_events(60)
    known = {0: 0}
    store.script_flush()
    assert sink.apply_few(events[:20], sources, known, NOW) == 0
    assert sink.apply_few(events[20:40], sources, known, NOW) == 0
    store.client_kill_filter(_type="normal", skipme=True)
    with pytest.raises(redis.RedisError):
        sink.apply_few(events[40:50], sources, known, NOW)
    assert sink.apply_few(events[40:50], sources, known, NOW) == 0
    assert sink.apply_few(events[40:50], sources, known, NOW) > 0
    assert sink.apply_few(events[45:], sources, known, NOW) is None
    assert sink.apply_few(events[50:], sources, known, NOW) is not None
    assert expected(settings, sources[0], events).differences(store).different == []
    sink.close()


def test_a_redis_that_is_behind_is_left_as_it_is(connected: Callable[[], Any]) -> None:
    settings, store, sink, sources = connected()
    first, second = some_events(7, 0), some_events(9, 1)
    advance(store, {sources[0]: 100, sources[1]: 100}, 60)
    assert sink.apply_few([*first, *second], sources, {0: 100, 1: 100}, NOW) == 0
    store.delete(applied_key(sources[0]))
    later = [event._replace(offset=event.offset + 200) for event in first]
    with pytest.raises(StateLost, match="behind"):
        sink.apply_few(later, sources, {0: 100}, NOW)
    assert expected(settings, sources[0], first).differences(store).different == []
    assert expected(settings, sources[1], second).differences(store).different == []
    sink.close()


def test_an_interrupted_call_leaves_no_answer_to_the_next_one(
    connected: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, *_ = connected()
    pinned = PinnedConnection(redis_for_writes(settings, 5.0))
    assert pinned.run([("ECHO", "first")], []) == [b"first"]

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pinned._connection, "read_response", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pinned.run([("ECHO", "second")], [])
    monkeypatch.undo()
    assert pinned.run([("ECHO", "third")], []) == [b"third"]
    pinned.close()


def test_a_redis_that_takes_no_scripts_says_so(connected: Callable[[], Any]) -> None:
    settings, store, _, sources = connected()
    user = f"user-{uuid.uuid4().hex}"
    store.acl_setuser(user, enabled=True, nopass=True, keys="*", categories=["+@all"], commands=["-script"])
    store.script_flush()
    own = settings.model_copy(update={"redis": settings.redis.model_copy(update={"username": user})})
    sink = RedisSink(redis_for_writes(own, 5.0), own)
    with pytest.raises(redis.exceptions.NoPermissionError, match="script"):
        sink.apply_few(some_events(3), sources, {0: 0}, NOW)
    sink.close()
    store.acl_deluser(user)


def test_a_redis_that_does_not_even_connect_is_given_up_as_soon_as_one_that_does_not_answer(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf, ExitStack() as waiting:
        url = f"redis://127.0.0.1:{deaf.getsockname()[1]}/0"
        for _ in range(4):  # more than its queue takes: it does not hear of further ones
            caller = waiting.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(deaf.getsockname())
        own = settings.model_copy(update={"redis": settings.redis.model_copy(update={"url": url})})
        sink = RedisSink(redis_for_writes(own, 0.1), own)
        started = time.monotonic()
        with pytest.raises(redis.RedisError):
            sink.apply_few(some_events(3), {0: "source.0"}, {0: 0}, NOW)
        assert time.monotonic() - started < CONNECT_SECONDS / 2


def test_a_cluster_takes_a_handful_as_well_and_is_left_as_it_is_when_it_is_behind(tmp_path: Path, settings: Settings) -> None:
    with redis_cluster(tmp_path) as nodes:
        own = settings.model_copy(update={"redis": RedisSettings(mode="cluster", nodes=nodes)})
        store = redis_for_writes(own)
        sources = {0: "0abcdef0.0"}
        sink = RedisSink(store, own)
        events = some_events(60)
        advance(store, {sources[0]: 7}, 60)
        assert sink.apply_few(events[:40], sources, {0: 7}, NOW) == 0
        with pytest.raises(StateLost, match="up to offset 8"):
            sink.apply_few(events[40:], sources, {0: 8}, NOW)
        assert expected(own, sources[0], events[:40]).differences(store).different == []
        assert sink.apply_few(events[40:], sources, {0: 7}, NOW) == 0
        assert expected(own, sources[0], events).differences(store).different == []
        sink.close()
        store.close()
