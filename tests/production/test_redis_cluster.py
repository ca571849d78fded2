"""A Redis Cluster of three masters with a replica each, while one master is lost in every way."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from partition import PartitionedCluster, partitioned_cluster
from rig import Note
from speed_layer import READERS, SpeedLayer, lose, speed_layer
from stream_world import Broker
from waiting import eventually

from recsys_core.online import user_key

OPTIONS = ["--cluster-require-full-coverage", "no", "--cluster-node-timeout", "2000"]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[PartitionedCluster]:
    with partitioned_cluster(tmp_path, OPTIONS) as running:
        yield running


@pytest.fixture
def layer(broker: Broker, cluster: PartitionedCluster, here: Path) -> Iterator[SpeedLayer]:
    with speed_layer(broker, here, {"mode": "cluster", "nodes": cluster.nodes}) as running:
        yield running


Fault = Callable[[PartitionedCluster, str], None]


def is_killed(cluster: PartitionedCluster, master: str) -> None:
    cluster.kill(master)


def is_frozen(cluster: PartitionedCluster, master: str) -> None:
    cluster.signal(master, signal.SIGSTOP)


def is_cut_off(cluster: PartitionedCluster, master: str) -> None:
    """Its clients reach it, and it takes what they write until it finds itself alone."""
    cluster.cut_off(master)


HEALED: dict[Fault, Fault] = {
    is_killed: lambda cluster, master: cluster.start(master),
    is_frozen: lambda cluster, master: cluster.signal(master, signal.SIGCONT),
    is_cut_off: lambda cluster, master: cluster.mend(master),
}


@pytest.mark.parametrize("fault", HEALED)
def test_one_master_of_three_may_go(layer: SpeedLayer, cluster: PartitionedCluster, fault: Fault, note: Note) -> None:
    lost = cluster.master_of(user_key(READERS[0]))
    replica = cluster.replicas[cluster.nodes.index(lost)]

    others = {user for user in READERS if cluster.master_of(user_key(user)) != lost}

    def heal() -> None:
        HEALED[fault](cluster, lost)
        eventually(lambda: not is_master(cluster, lost))

    loss = lose(layer, lambda: fault(cluster, lost), lambda: is_master(cluster, replica), heal)
    assert loss.kept() >= 0.6
    assert loss.kept(others) >= 0.99
    name = fault.__name__.replace("_", " ")
    note(loss.drill("Redis Cluster, 3 masters + 3 replicas", f"a master {name}", layer.stream.sent))


def is_master(cluster: PartitionedCluster, address: str) -> bool:
    return bool(cluster.node(address).info("replication")["role"] == "master")
