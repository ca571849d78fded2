"""Fixtures of the serving tests: each has a redis-server, a home and a server of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from snapshots import make_snapshot
from worlds import RedisServer, World

from recsys_core.settings import Settings, load_settings


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def serving_settings(tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Deadlines that a busy test machine keeps, and a quick look at the pointer."""
    monkeypatch.delenv("RECSYS_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    return load_settings(
        home=tmp_path / "home",
        redis={"url": redis_server.url, "timeout_ms": 10_000},
        serving={"port": 0, "pointer_poll_seconds": 0.05, "rank_timeout_ms": 30_000, "batch_timeout_ms": 60_000},
    )


@pytest.fixture
def empty_world(serving_settings: Settings, redis_server: RedisServer) -> Iterator[World]:
    """Nothing promoted, nothing started."""
    world = World(serving_settings, redis_server)
    yield world
    world.stop()


@pytest.fixture
def hasty_world(serving_settings: Settings, redis_server: RedisServer) -> Iterator[World]:
    """`world` with deadlines that are missed on purpose."""
    settings = serving_settings.model_copy(
        update={
            "redis": serving_settings.redis.model_copy(update={"timeout_ms": 100}),
            "serving": serving_settings.serving.model_copy(update={"rank_timeout_ms": 100, "batch_timeout_ms": 100}),
        }
    )
    world = World(settings, redis_server)
    world.promote(make_snapshot(unavailable=(3, 4)))
    world.start()
    yield world
    world.stop()


@pytest.fixture
def world(empty_world: World) -> World:
    """A promoted release of 500 items, of which 3 and 4 are unavailable, behind a running server."""
    empty_world.promote(make_snapshot(unavailable=(3, 4)))
    empty_world.start()
    return empty_world
