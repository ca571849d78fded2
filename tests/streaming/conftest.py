"""A real Kafka and a real Redis that the tests of the speed layer share, and worlds of topics in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from stream_world import Broker, World, broker_or_skip

from recsys_cli.stack import redis_server


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A single-node Kafka; skipped where its jar files can't be had."""
    with broker_or_skip(tmp_path_factory.mktemp("kafka")) as running:
        yield running


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def world(broker: Broker, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., World]]:
    """Makes worlds: a topic, a group, users and a lake of their own in the shared broker and Redis."""
    made: list[World] = []

    def make(**sections: dict[str, object]) -> World:
        made.append(World.make(broker.address, redis_url, tmp_path_factory.mktemp("world"), **sections))
        return made[-1]

    yield make
    for one in made:
        one.close()
