"""Releases in an object store: taken over HTTP, followed, and done without while the store hangs or is gone."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from object_store import BUCKET, S3Server
from snapshots import make_snapshot
from worlds import RedisServer, World, eventually

from recsys_core.settings import Settings

OLD, NEW = "2026-01-01.a", "2026-01-02.b"


@pytest.fixture
def far_world(own_s3: S3Server, serving_settings: Settings, redis_server: RedisServer) -> Iterator[World]:
    """A server whose releases are in S3; one is promoted."""
    release = serving_settings.release.model_copy(update={"uri": f"s3://{BUCKET}/releases"})
    world = World(serving_settings.model_copy(update={"release": release}), redis_server)
    world.promote(make_snapshot(OLD))
    world.start()
    yield world
    own_s3.thaw()
    world.stop()


def served(world: World) -> str:
    answer = world.client.recommend("nobody", 10)
    assert len(answer) == 10
    return answer.release_id


def test_a_release_in_s3_is_served_and_followed(far_world: World) -> None:
    assert served(far_world) == OLD
    far_world.promote(make_snapshot(NEW, items=300))
    eventually(lambda: served(far_world) == NEW)
    far_world.releases.roll_back()
    eventually(lambda: served(far_world) == OLD)


def test_answers_go_on_while_s3_hangs_and_new_releases_come_once_it_answers(far_world: World, own_s3: S3Server) -> None:
    own_s3.freeze()
    until = time.monotonic() + 3
    while time.monotonic() < until:
        assert served(far_world) == OLD
    own_s3.thaw()
    far_world.promote(make_snapshot(NEW))
    eventually(lambda: served(far_world) == NEW)


def test_answers_go_on_when_s3_is_gone(far_world: World, own_s3: S3Server) -> None:
    own_s3.kill()
    eventually(lambda: far_world.server.metrics.events["release_store_failures"] > 0)
    assert served(far_world) == OLD
