"""The archive in an object store: every event once, and Redis served on while the store hangs."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from object_store import BUCKET, S3Server
from stream_world import World


@pytest.fixture
def far(world: Callable[..., World], own_s3: S3Server) -> World:
    """A world whose lake is in S3."""
    one = world(lake={"uri": f"s3://{BUCKET}/lake"})
    one.environment = own_s3.environment
    return one


def test_everything_is_archived_in_s3_and_redis_does_not_wait_for_it(far: World, own_s3: S3Server) -> None:
    chance = random.Random(0)
    far.send(*(far.event(chance) for _ in range(2000)))
    far.start()
    far.settle()
    own_s3.freeze()
    far.send(*(far.event(chance) for _ in range(2000)))
    far.settle(landing=False)
    own_s3.thaw()
    far.settle()
    far.prove()


def test_a_worker_that_is_killed_leaves_the_archive_in_s3_to_the_next(far: World) -> None:
    chance = random.Random(1)
    for _ in range(3):
        far.send(*(far.event(chance) for _ in range(1000)))
        worker = far.start()
        far.settle(landing=False)
        far.kill(worker)
    far.start()
    far.settle()
    far.prove()
