"""A Redis master with two replicas under three Sentinels, while the master is lost."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis_sentinel import Watched, watched_redis
from rig import Note
from speed_layer import SpeedLayer, lose, speed_layer
from stream_world import Broker


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    with watched_redis(tmp_path, replicas=2, sentinels=3) as running:
        yield running


@pytest.fixture
def layer(broker: Broker, watched: Watched, here: Path) -> Iterator[SpeedLayer]:
    nodes = [f"127.0.0.1:{port}" for port in watched.sentinels]
    with speed_layer(broker, here, {"mode": "sentinel", "nodes": nodes}) as running:
        yield running


def is_killed(watched: Watched) -> None:
    watched.kill_master()


def is_frozen(watched: Watched) -> None:
    watched.signal(watched.master, signal.SIGSTOP)


@pytest.mark.parametrize("fault", [is_killed, is_frozen])
def test_the_master_may_go(layer: SpeedLayer, watched: Watched, fault: Callable[[Watched], None], note: Note) -> None:
    def taken_over() -> bool:
        return len(watched.masters()) == 1 and watched.master not in watched.masters()

    def heal() -> None:
        if fault is is_frozen:
            watched.signal(watched.master, signal.SIGCONT)

    loss = lose(layer, lambda: fault(watched), taken_over, heal)
    assert loss.kept() >= 0.5, "the answers of some seconds are below CACHE"
    name = fault.__name__.replace("_", " ")
    note(loss.drill("Redis under Sentinel, 1 master + 2 replicas, 3 sentinels", f"the master {name}", layer.stream.sent))
