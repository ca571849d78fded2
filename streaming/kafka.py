"""A real Kafka broker on this machine: one KRaft node, run by the Java that Spark needs anyway."""

from __future__ import annotations

import base64
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path

from recsys_core.errors import UserError
from recsys_core.jars import DONE, JarsUnavailable, Module, fetch_jars, folder_of
from recsys_core.settings import KafkaSettings

KAFKA = Module("org.apache.kafka", "kafka_2.13", "4.1.0")
LOGGER = Module("org.slf4j", "slf4j-simple", "1.7.36")
HEAP = "512m"


class KafkaUnavailable(UserError, RuntimeError):
    """No real Kafka can be run here; the message says why and what else there is."""


@dataclass(frozen=True)
class BrokerPlan:
    """A broker that can be started.

    Attributes:
        command: runs it in the foreground.
        bootstrap_servers: where it listens.
        folder: of its data.
    """

    command: list[str]
    bootstrap_servers: str
    folder: Path


def broker_jars(java_home: Path) -> Path:
    """The folder of the broker's jar files, fetched at the first use. Raises KafkaUnavailable."""
    try:
        return fetch_jars(java_home, KAFKA, LOGGER)
    except JarsUnavailable as error:
        raise KafkaUnavailable(_advice(str(error))) from error


def _advice(problem: str) -> str:
    return (
        f"no real Kafka here: {problem}\n"
        f"Copy the jar files of {KAFKA.name} {KAFKA.version} to {folder_of(KAFKA)} with an empty file "
        f"'{DONE}', or run Kafka by deploy/compose, or set kafka.bootstrap_servers to one that runs; "
        "`recsys broker` is the embedded one for trying out"
    )


def plan_broker(folder: Path, java_home: Path, port: int, controller_port: int, settings: KafkaSettings) -> BrokerPlan:
    """Prepare a broker with its data in `folder`, listening on loopback. Raises KafkaUnavailable."""
    jars = broker_jars(java_home)
    folder.mkdir(parents=True, exist_ok=True)
    address = f"127.0.0.1:{port}"
    properties = folder / "server.properties"
    lines = {**_properties(folder, port, controller_port), "message.max.bytes": settings.max_message_bytes}
    properties.write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
    java = [str(java_home / "bin" / "java"), "-cp", f"{jars}/*", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"]
    if not (folder / "data" / "meta.properties").is_file():
        # Its tool takes what begins with a dash for an option.
        cluster = "C" + base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")[1:]
        format_command = [*java, "kafka.tools.StorageTool", "format", "-t", cluster, "-c", str(properties)]
        done = subprocess.run(format_command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise KafkaUnavailable(_advice(f"its storage can't be prepared:\n{(done.stdout + done.stderr)[-2000:]}"))
    run = [*java, f"-Xmx{HEAP}", f"-Xms{HEAP}", "-XX:+UseG1GC", "kafka.Kafka", str(properties)]
    return BrokerPlan(run, address, folder)


def _properties(folder: Path, port: int, controller_port: int) -> dict[str, object]:
    """One node that is broker and controller. Internal topics have one copy, and a group starts without a delay."""
    return {
        "process.roles": "broker,controller",
        "node.id": 1,
        "controller.quorum.voters": f"1@127.0.0.1:{controller_port}",
        "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}",
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}",
        "controller.listener.names": "CONTROLLER",
        "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
        "log.dirs": folder / "data",
        "offsets.topic.replication.factor": 1,
        "offsets.topic.num.partitions": 4,
        "transaction.state.log.replication.factor": 1,
        "transaction.state.log.min.isr": 1,
        "transaction.state.log.num.partitions": 4,
        "share.coordinator.state.topic.replication.factor": 1,
        "share.coordinator.state.topic.min.isr": 1,
        "group.initial.rebalance.delay.ms": 0,
        "group.min.session.timeout.ms": 1000,
        "auto.create.topics.enable": "false",
    }
