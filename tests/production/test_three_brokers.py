"""The speed layer on a Kafka of three: whatever happens to one of them, each event is applied and archived once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from brokers import NODES, Brokers, three_brokers
from confluent_kafka.admin import AdminClient, ConfigResource, ResourceType
from load import clicks, passes, stalls
from rig import Drill, Note, had
from stream_world import World
from waiting import eventually

from recsys_cli.stack import redis_server

BEFORE, MEANWHILE, AFTER = 4.0, 25.0, 4.0
"""Seconds of clicks."""


@pytest.fixture(scope="module")
def brokers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Brokers]:
    with had(three_brokers(tmp_path_factory.mktemp("brokers"))) as running:
        yield running


@pytest.fixture
def world(brokers: Brokers, tmp_path: Path) -> Iterator[World]:
    """A topic of three copies, two workers with the default session, and a Redis."""
    with redis_server(tmp_path / "redis") as url:
        made = World.make(
            brokers.bootstrap_servers, url, tmp_path, kafka={"replication": 3}, stream={"session_timeout_seconds": 30.0}
        )
        made.start()
        made.start()
        yield made
        made.close()


def a_broker_is_killed(brokers: Brokers, topic: str) -> int:
    (victim, _), *_ = brokers.leaders(topic).most_common()
    brokers.kill(victim)
    return victim


def the_controller_is_killed(brokers: Brokers, _topic: str) -> int:
    victim = brokers.controller()
    brokers.kill(victim)
    return victim


def a_broker_is_frozen(brokers: Brokers, topic: str) -> int:
    (victim, _), *_ = brokers.leaders(topic).most_common()
    brokers.freeze(victim)
    return victim


@pytest.mark.parametrize("fault", [a_broker_is_killed, the_controller_is_killed, a_broker_is_frozen])
def test_one_of_three_may_go(world: World, brokers: Brokers, fault: Callable[[Brokers, str], int], note: Note) -> None:
    topic = world.settings.kafka.topic
    workers = list(world.workers)
    with clicks(world):
        passes(BEFORE)
        with stalls(world) as stall:
            victim = fault(brokers, topic)
            passes(MEANWHILE)
            eventually(lambda: victim not in brokers.leaders(topic))
            brokers.heal(victim)
            passes(AFTER)
    world.settle()
    world.prove()
    assert all(worker.is_alive() for worker in workers)
    eventually(lambda: brokers.in_sync(topic))
    note(_drill(fault.__name__.replace("_", " "), world, stall.seconds))


def test_all_are_restarted_one_after_the_other(world: World, brokers: Brokers, note: Note) -> None:
    topic = world.settings.kafka.topic
    workers = list(world.workers)
    with clicks(world):
        passes(BEFORE)
        with stalls(world) as stall:
            for node in NODES:
                brokers.stop(node)
                brokers.start(node)
                eventually(lambda: brokers.in_sync(topic))
        passes(AFTER)
    world.settle()
    world.prove()
    assert all(worker.is_alive() for worker in workers)
    note(_drill("a rolling restart", world, stall.seconds))


def _drill(fault: str, world: World, stall: float) -> Drill:
    lost = f"0 of {world.sent:,} events"
    return Drill("Kafka, 3 brokers", "two stream workers, archive", fault, lost, f"a click visible after {stall:.1f} s at most")


def test_an_acknowledged_click_is_on_two_brokers(world: World) -> None:
    admin = AdminClient({"bootstrap.servers": world.settings.kafka.bootstrap_servers})
    resource = ConfigResource(ResourceType.TOPIC, world.settings.kafka.topic)
    settings = admin.describe_configs([resource])[resource].result()
    assert settings["min.insync.replicas"].value == "2"
