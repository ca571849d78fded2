"""A Redis Cluster for tests, from the binary that they run a single Redis with."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis

from recsys_cli.processes import OWN_PORTS, free_port, wait_until
from recsys_cli.stack import redis_binary

MASTERS = 3
BUS = 10_000
"""So far is the port of a node's bus above its own."""


class Cluster:
    """Three masters on loopback, each with a replica or none; nodes can be killed, frozen and started again.

    Attributes:
        nodes: addresses of the masters as they were at the start.
        replicas: address of the replica of each.
    """

    def __init__(
        self,
        home: Path,
        replicated: bool = False,
        options: Sequence[str] = (),
        hosts: Sequence[str] = ("127.0.0.1",),
        reached_at: Callable[[str, int], int] | None = None,
    ) -> None:
        """`options` are further arguments of the nodes, which lie on `hosts` in turn. `reached_at` gives the port at which
        others reach the bus of a node, by its host and the port where it listens."""
        self._home = home
        self._options = options
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        count = 2 * MASTERS if replicated else MASTERS
        addresses = [f"{hosts[number % len(hosts)]}:{_free()}" for number in range(count)]
        self.nodes, self.replicas = addresses[:MASTERS], addresses[MASTERS:]
        self._buses = {address: self._bus(address, reached_at) for address in addresses}
        for address in addresses:
            self.start(address)

    def _bus(self, address: str, reached_at: Callable[[str, int], int] | None) -> int:
        host, _, port = address.rpartition(":")
        listens = int(port) + BUS
        return reached_at(host, listens) if reached_at else listens

    def start(self, address: str) -> None:
        """Start a node and wait until it answers."""
        host, _, port = address.rpartition(":")
        folder = self._home / port
        folder.mkdir(exist_ok=True)
        options = ["--cluster-enabled", "yes", "--cluster-config-file", str(folder / "nodes.conf"), "--save", ""]
        options += ["--cluster-announce-ip", host, "--cluster-announce-bus-port", str(self._buses[address]), *self._options]
        command = [str(redis_binary()), "--port", port, "--bind", host, "--dir", str(folder), *options]
        self._running[address] = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(lambda: _answers(self.node(address)), "a node", 20, lambda: None)

    def node(self, address: str) -> Any:
        """A client of one node alone."""
        host, _, port = address.rpartition(":")
        return redis.Redis(host, int(port))

    def join(self) -> None:
        """Make a cluster of the nodes."""
        masters, replicas = map(self.node, self.nodes), map(self.node, self.replicas)
        _join(list(masters), list(replicas), self.nodes[0], self._buses[self.nodes[0]])

    def master_of(self, key: str) -> str:
        """Address of the master that has a key."""
        slot = self.node(self.nodes[0]).execute_command("CLUSTER", "KEYSLOT", key)
        return self.nodes[slot // (16384 // MASTERS + 1)]

    def masters(self) -> list[str]:
        """Addresses of the nodes that are masters now."""
        return [address for address in self._running if self.node(address).info("replication")["role"] == "master"]

    def is_whole(self) -> bool:
        """Whether every node is there, three are masters, and each of these has a replica that follows it."""
        nodes = [self.node(address) for address in self._running]
        try:
            said = [node.info("replication") for node in nodes]
            states = {_info(node)["cluster_state"] for node in nodes}
        except redis.RedisError:
            return False
        replicated = [one["connected_slaves"] for one in said if one["role"] == "master"]
        linked = [one["master_link_status"] for one in said if one["role"] == "slave"]
        return replicated == [1] * MASTERS and linked == ["up"] * MASTERS and states == {"ok"}

    def signal(self, address: str, number: int) -> None:
        os.kill(self._running[address].pid, number)

    def kill(self, address: str) -> None:
        self.signal(address, signal.SIGKILL)
        self._running.pop(address).wait()

    def stop(self) -> None:
        for address in list(self._running):
            self.kill(address)


@contextmanager
def cluster(home: Path, replicated: bool = False, options: Sequence[str] = ()) -> Iterator[Cluster]:
    """A running cluster; `options` are further arguments of its nodes."""
    made = Cluster(home, replicated, options)
    try:
        made.join()
        yield made
    finally:
        made.stop()


@contextmanager
def redis_cluster(home: Path) -> Iterator[list[str]]:
    """Three masters on loopback; yields their addresses."""
    with cluster(home) as made:
        yield made.nodes


def _free() -> int:
    """A port whose bus is free as well."""
    while True:
        port = free_port()
        if port + BUS in OWN_PORTS and free_port(port + BUS) == port + BUS:
            return port


def _join(masters: list[Any], replicas: list[Any], first: str, bus: int) -> None:
    nodes = [*masters, *replicas]
    share = 16384 // len(masters) + 1
    for number, node in enumerate(nodes, 1):
        # As `redis-cli --cluster create` does: nodes of one epoch change it later, and a slot that moves just then may go back.
        node.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number)
        node.execute_command("CLUSTER", "MEET", *first.split(":"), bus)
    for at, node in enumerate(masters):
        node.execute_command("CLUSTER", "ADDSLOTS", *range(at * share, min((at + 1) * share, 16384)))
    count = str(len(nodes))
    wait_until(lambda: all(_info(node)["cluster_known_nodes"] == count for node in nodes), "the cluster", 30, lambda: None)
    for master, replica in zip(masters, replicas, strict=False):
        name = master.execute_command("CLUSTER", "MYID")
        wait_until(lambda replica=replica, name=name: _follows(replica, name), "a replica", 30, lambda: None)
    wait_until(lambda: all(_info(node)["cluster_state"] == "ok" for node in nodes), "the cluster", 30, lambda: None)
    wait_until(lambda: all(_linked(replica) for replica in replicas), "the replicas", 30, lambda: None)
    wait_until(lambda: all(_replicas(node) == len(replicas) for node in nodes), "the replicas", 30, lambda: None)


def _replicas(node: Any) -> int:
    """Replicas that a node has heard of."""
    return sum("slave" in other["flags"] for other in node.cluster("NODES").values())


def _follows(replica: Any, master: bytes) -> bool:
    """Whether a node has become the replica of a master; it must have heard of it before."""
    try:
        replica.execute_command("CLUSTER", "REPLICATE", master)
    except redis.ResponseError:
        return False
    return True


def _linked(replica: Any) -> bool:
    return bool(replica.info("replication").get("master_link_status") == "up")


def _info(node: Any) -> dict[str, str]:
    found: dict[str, str] = node.cluster("INFO")
    return found


def _answers(node: Any) -> bool:
    try:
        return bool(node.ping())
    except redis.RedisError:
        return False
