"""All engines of a production at once: three brokers, a Redis Cluster with replicas, an S3 server, Spark's master and workers.
The platform is set up on them as docs/how-to.md, "Use a cluster", says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from brokers import Brokers, three_brokers
from object_store import BUCKET, S3Server, s3_server
from partition import PartitionedCluster, partitioned_cluster
from recsys_home import QUICK_SPARK
from spark_cluster import SparkCluster, executor_python, spark_cluster

from recsys_cli.java import ensure_java
from recsys_cli.processes import free_port, wait_until
from recsys_cli.stack import RECSYS, create_dagster_storage, dagster_environment, serving_health
from recsys_core.kafka_config import SILENT
from recsys_core.settings import CONFIG_VARIABLE, HOME_VARIABLE, Settings, load_settings

REDIS_OPTIONS = ["--cluster-require-full-coverage", "no", "--cluster-node-timeout", "2000"]
JOBS = Path(__file__).with_name("night_and_hour.py")
JOB_SECONDS, START_SECONDS = 900, 60
SETTINGS = """
[spark]
master = "{spark.master}"
shuffle_partitions = 4
[spark.conf]
"spark.pyspark.python" = "{python}"
"spark.driver.host" = "127.0.0.1"
"spark.executor.memory" = "700m"
{quick}
[lake]
uri = "s3://{bucket}/lake"
[release]
uri = "s3://{bucket}/releases"
[kafka]
bootstrap_servers = "{brokers.bootstrap_servers}"
replication = 3
partitions = 4
conf = {{ log_level = "{silent}" }}
[redis]
mode = "cluster"
nodes = {nodes}
timeout_ms = 100
[stream]
archive_rows = 2000
archive_seconds = 5
[cache]
shards = 2
active_hours = 48
[als]
rank = 16
iterations = 3
half_lives_days = [0, 1]
[partitions]
start = {start}
"""


class Server:
    """`recsys serve`, that can be killed and started again at its address."""

    def __init__(self, environment: Mapping[str, str], folder: Path) -> None:
        port, health = free_port(), free_port()
        self.address = f"127.0.0.1:{port}"
        self._health = f"127.0.0.1:{health}"
        self._log = folder / f"serving-{port}.log"
        own = {"HOST": "127.0.0.1", "PORT": str(port), "HEALTH_PORT": str(health)}
        self._environment = {**environment, **{f"RECSYS_SERVING__{name}": value for name, value in own.items()}}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it serves a release."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*RECSYS, "serve"],
                env=self._environment,
                cwd=self._log.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_until(lambda: serving_health(self._health) == "SERVING", "a server", START_SECONDS, self._check)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _check(self) -> None:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()[-3000:]


@dataclass(frozen=True)
class Everything:
    """What runs, and where it is set up.

    Attributes:
        environment: of a process that works with it.
    """

    home: Path
    brokers: Brokers
    redis: PartitionedCluster
    store: S3Server
    spark: SparkCluster
    environment: dict[str, str]

    def settings(self) -> Settings:
        """As a process that works with it reads them."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(CONFIG_VARIABLE, self.environment[CONFIG_VARIABLE])
            return load_settings(self.home)

    def recsys(self, *words: str) -> str:
        """What a command prints."""
        return self._run([*RECSYS, *words])

    def job(self, what: str, key: str) -> str:
        """What a night or an hour prints, see night_and_hour.py."""
        return self._run([sys.executable, str(JOBS), what, key])

    def _run(self, command: list[str]) -> str:
        """What a command prints. It works in the folder of the platform, and is ended when it takes too long."""
        log = self.home / "commands.log"
        with log.open("ab") as output:
            begin = output.tell()
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            ended = subprocess.run(command, env=self.environment, cwd=self.home, timeout=JOB_SECONDS, **streams)
        said = log.read_bytes()[begin:].decode()
        assert ended.returncode == 0, said[-6000:]
        return said


@contextmanager
def everything(home: Path, start: str) -> Iterator[Everything]:
    """All of it, for a history that begins on a day. Raises UserError where a part can't be had."""
    with ExitStack() as parts:
        folders = {name: home / name for name in ("kafka", "redis", "s3", "spark", "platform")}
        for folder in folders.values():
            folder.mkdir()
        brokers = parts.enter_context(three_brokers(folders["kafka"]))
        redis = parts.enter_context(partitioned_cluster(folders["redis"], REDIS_OPTIONS))
        store = parts.enter_context(s3_server(folders["s3"]))
        spark = parts.enter_context(spark_cluster(folders["spark"], store.environment))
        platform = folders["platform"]
        said = {"brokers": brokers, "spark": spark, "bucket": BUCKET, "python": executor_python(), "start": start}
        quick = "\n".join(f'"{name}" = "{value}"' for name, value in QUICK_SPARK.items())
        nodes = "[" + ", ".join(f'"{node}"' for node in redis.nodes) + "]"
        (platform / "recsys.toml").write_text(SETTINGS.format(**said, nodes=nodes, silent=SILENT, quick=quick))
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RECSYS_", "AWS_", "PYSPARK_"))},
            **store.environment,
            HOME_VARIABLE: str(platform),
            CONFIG_VARIABLE: str(platform / "recsys.toml"),
            "JAVA_HOME": str(ensure_java().path),
            **dagster_environment(platform),
        }
        create_dagster_storage(environment)
        yield Everything(platform, brokers, redis, store, spark, environment)
