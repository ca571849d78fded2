"""A real Kafka broker on this machine: one KRaft node, run by the Java that Spark needs anyway.

Its jar files are fetched once, by the Apache Ivy that PySpark brings, from wherever Ivy is set up to look; Ivy verifies
them by their checksums. They are kept in the user's cache folder.
"""

from __future__ import annotations

import base64
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

from recsys_core.errors import UserError
from recsys_core.settings import KafkaSettings

KAFKA = ("org.apache.kafka", "kafka_2.13", "4.1.0")
LOGGER = ("org.slf4j", "slf4j-simple", "1.7.36")
CACHE_VARIABLE = "RECSYS_JARS"
FETCH_SECONDS = 600
DONE = "complete"
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


def cache_folder() -> Path:
    """Where fetched jar files are kept: RECSYS_JARS, else the user's cache folder."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    if sys.platform == "darwin" and not base:
        return Path.home() / "Library" / "Caches" / "recsys"
    return (Path(base) if base else Path.home() / ".cache") / "recsys"


def broker_jars(java_home: Path) -> Path:
    """The folder of the broker's jar files, fetched at the first use. Raises KafkaUnavailable."""
    return jars(java_home, KAFKA, LOGGER)


def jars(java_home: Path, *modules: tuple[str, str, str]) -> Path:
    """The folder of some modules' jar files and all that they need, named by the first. Raises KafkaUnavailable."""
    folder = cache_folder() / f"{modules[0][1]}-{modules[0][2]}"
    if (folder / DONE).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    fetched = Path(tempfile.mkdtemp(dir=folder.parent, prefix="fetching-"))
    try:
        for module in modules:
            _fetch(java_home, module, fetched)
        (fetched / DONE).touch()
        if not folder.exists():
            os.replace(fetched, folder)
    finally:
        shutil.rmtree(fetched, ignore_errors=True)
    return folder


def _fetch(java_home: Path, module: tuple[str, str, str], folder: Path) -> None:
    """Resolve a module with all it needs and copy the jar files into `folder`."""
    command = [str(java_home / "bin" / "java"), "-jar", str(_ivy())]
    command += ["-cache", str(cache_folder() / "ivy"), "-dependency", *module, "-confs", "default", "-types", "jar", "bundle"]
    command += ["-retrieve", f"{folder}/[artifact]-[revision].[ext]"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=FETCH_SECONDS, cwd=folder
        )
    except subprocess.TimeoutExpired:
        raise KafkaUnavailable(_advice(f"fetching {':'.join(module)} took longer than {FETCH_SECONDS} s")) from None
    named = list(folder.glob(f"{module[1]}-{module[2]}.jar"))
    if done.returncode or not named:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        said = "\n".join(f"  {line}" for line in lines[-8:])
        raise KafkaUnavailable(_advice(f"{':'.join(module)} can't be fetched; Ivy says:\n{said}"))


def _ivy() -> Path:
    package = importlib.util.find_spec("pyspark")
    folder = Path(package.origin).parent / "jars" if package and package.origin else Path()
    found = sorted(folder.glob("ivy-*.jar"))
    if not found:
        raise KafkaUnavailable(_advice(f"PySpark's jar files in {folder} have no Ivy to fetch Kafka with"))
    return found[-1]


def _advice(problem: str) -> str:
    return (
        f"no real Kafka here: {problem}\n"
        f"Copy the jar files of {KAFKA[1]} {KAFKA[2]} to {cache_folder()}/{KAFKA[1]}-{KAFKA[2]} with an empty file "
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
