"""A Kafka of three nodes, each broker and controller, that can be killed, frozen and stopped one by one."""

from __future__ import annotations

import re
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, PartitionMetadata
from waiting import eventually

from recsys_cli.java import ensure_java
from recsys_cli.processes import free_port, wait_until
from recsys_core.kafka_config import SILENT
from streaming.kafka import broker_jars

NODES = (1, 2, 3)
CLUSTER = "CAAAAAAAAAAAAAAAAAAAAA"
START_SECONDS = 90
LEADS = re.compile(r"Completed transition to Leader\(.*?epoch=(\d+)")
"""What a node's log says when it has become the active controller."""


class Brokers:
    """Three nodes with the defaults of Kafka but for replication, which is 3 with 2 in sync.

    Attributes:
        bootstrap_servers: of all three.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._java = ensure_java().path
        self._jars = broker_jars(self._java)
        self._ports = {node: free_port() for node in NODES}
        self._controllers = {node: free_port() for node in NODES}
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self.bootstrap_servers = ",".join(f"127.0.0.1:{port}" for port in self._ports.values())
        # One client to the end: each that is made anew needs a broker that is just then there.
        patience = {"log_level": SILENT, "socket.timeout.ms": 3000}
        self._admin = AdminClient({"bootstrap.servers": self.bootstrap_servers, **patience})
        for node in NODES:
            self._prepare(node)
        for node in NODES:
            self.start(node)
        wait_until(lambda: self.alive() == set(NODES), "Kafka", START_SECONDS, self._check)

    def alive(self) -> set[int]:
        """The brokers that the others know."""
        try:
            return set(self._admin.list_topics(timeout=2).brokers)
        except KafkaException:
            return set()

    def leaders(self, topic: str) -> Counter[int]:
        """How many partitions of a topic each node leads."""
        partitions = eventually(lambda: self._partitions(topic))
        return Counter(partition.leader for partition in partitions.values())

    def in_sync(self, topic: str) -> bool:
        """Whether all nodes have all that a topic holds."""
        partitions = self._partitions(topic)
        return bool(partitions) and all(set(partition.isrs) == set(NODES) for partition in partitions.values())

    def _partitions(self, topic: str) -> dict[int, PartitionMetadata]:
        """The partitions of a topic, none when the broker that is asked does not answer."""
        try:
            found: dict[int, PartitionMetadata] = self._admin.list_topics(topic, timeout=4).topics[topic].partitions
        except KafkaException:
            return {}
        return found

    def controller(self) -> int:
        """The node whose controller is the active one."""
        epochs = {node: [int(epoch) for epoch in LEADS.findall(self._log(node).read_text())] for node in NODES}
        return max(NODES, key=lambda node: max(epochs[node], default=-1))

    def start(self, node: int) -> None:
        with open(self._log(node), "ab") as log:
            command = [*self._program(), "-Xmx256m", "-XX:+UseSerialGC", "kafka.Kafka", str(self._properties(node))]
            self._running[node] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self, node: int) -> None:
        self._running[node].kill()
        self._running.pop(node).wait()

    def stop(self, node: int) -> None:
        """Ask a node to hand its partitions over and to end."""
        self._running[node].terminate()
        self._running.pop(node).wait(START_SECONDS)

    def freeze(self, node: int) -> None:
        self._running[node].send_signal(signal.SIGSTOP)

    def heal(self, node: int) -> None:
        """Have a node that is frozen go on, and one that ended start again."""
        if node in self._running:
            self._running[node].send_signal(signal.SIGCONT)
        else:
            self.start(node)

    def close(self) -> None:
        for node in list(self._running):
            self.kill(node)

    def _check(self) -> None:
        for node, process in self._running.items():
            assert process.poll() is None, self._log(node).read_text()[-3000:]

    def _folder(self, node: int) -> Path:
        return self._home / f"node-{node}"

    def _log(self, node: int) -> Path:
        return self._folder(node) / "kafka.log"

    def _properties(self, node: int) -> Path:
        return self._folder(node) / "server.properties"

    def _program(self) -> list[str]:
        says = "-Dorg.slf4j.simpleLogger.log.org.apache.kafka.raft=info"
        java = [str(self._java / "bin" / "java"), "-cp", f"{self._jars}/*"]
        return [*java, "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", says]

    def _prepare(self, node: int) -> None:
        """Write a node's configuration and format its storage."""
        listeners = {"PLAINTEXT": self._ports[node], "CONTROLLER": self._controllers[node]}
        lines: dict[str, Any] = {
            "process.roles": "broker,controller",
            "node.id": node,
            "controller.quorum.voters": ",".join(f"{one}@127.0.0.1:{port}" for one, port in self._controllers.items()),
            "listeners": ",".join(f"{name}://127.0.0.1:{port}" for name, port in listeners.items()),
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{self._ports[node]}",
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
            "log.dirs": self._folder(node) / "data",
            "offsets.topic.replication.factor": 3,
            "offsets.topic.num.partitions": 4,
            "min.insync.replicas": 2,
            "default.replication.factor": 3,
            "auto.create.topics.enable": "false",
            "group.initial.rebalance.delay.ms": 0,
        }
        self._folder(node).mkdir()
        self._properties(node).write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
        command = [*self._program(), "kafka.tools.StorageTool", "format", "-t", CLUSTER, "-c", str(self._properties(node))]
        subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=START_SECONDS)


@contextmanager
def three_brokers(home: Path) -> Iterator[Brokers]:
    """A running Kafka of three nodes. Raises KafkaUnavailable and JavaMissing where it can't be had."""
    running = Brokers(home)
    try:
        yield running
    finally:
        running.close()
