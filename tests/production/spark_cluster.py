"""Spark standalone: a master and two workers, processes of their own with a Python of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha1
from pathlib import Path

import pyspark

from recsys_cli.java import ensure_java
from recsys_cli.processes import accepts_connections, free_port, wait_until
from recsys_core.jars import DONE, cache_folder

PROJECT = Path(__file__).parents[2]
LIST, LOCK = PROJECT / "deploy" / "requirements" / "executors.txt", PROJECT / "requirements.lock"
SPARK_HOME = Path(pyspark.__file__).parent
WORKERS = 2
START_SECONDS = 60
PIP_SECONDS = 600


def executor_python() -> Path:
    """The Python of an environment that has what executors need and nothing else; made once, kept in the cache folder."""
    wanted = sha1(LIST.read_bytes() + LOCK.read_bytes() + sys.version.encode(), usedforsecurity=False).hexdigest()[:12]
    folder = cache_folder() / f"executors-{wanted}"
    python = folder / "bin" / "python"
    if not (folder / DONE).exists():
        venv.create(folder, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "-q", "-r", str(LIST), "-c", str(LOCK)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, timeout=PIP_SECONDS)
        (folder / DONE).touch()
    return python


class SparkCluster:
    """A running cluster of WORKERS workers with one core each; a worker can be killed and started again.

    Attributes:
        master: its address, for `spark.master`.
    """

    def __init__(self, home: Path, login: Mapping[str, str]) -> None:
        self._home = home
        self._login = login
        self._port = free_port()
        self.master = f"spark://127.0.0.1:{self._port}"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._start("master", "Master", "--port", str(self._port), "--webui-port", str(free_port()))
        wait_until(lambda: accepts_connections("127.0.0.1", self._port), "the master", START_SECONDS, self._check)
        for number in range(WORKERS):
            self.start_worker(number)

    def start_worker(self, number: int) -> None:
        """Start a worker and wait until the master knows it."""
        name = f"worker-{number}"
        self._start(name, "Worker", "--cores", "1", "--memory", "1g", "--webui-port", str(free_port()), self.master)
        log = self._home / f"{name}.log"
        wait_until(lambda: "Successfully registered" in log.read_text(), name, START_SECONDS, self._check)

    def kill_worker(self, number: int) -> None:
        """Its executors end with it."""
        process = self._processes.pop(f"worker-{number}")
        process.kill()
        process.wait()

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()

    def _start(self, name: str, what: str, *options: str) -> None:
        command = [str(SPARK_HOME / "bin" / "spark-class"), f"org.apache.spark.deploy.{what.lower()}.{what}"]
        command += ["--host", "127.0.0.1", *options]
        # Of this process's environment executors shall have nothing: no packages, no settings, no secrets but their own.
        environment = {
            **self._login,
            "SPARK_HOME": str(SPARK_HOME),
            "JAVA_HOME": str(ensure_java().path),
            "PATH": os.defpath,
            "SPARK_WORKER_DIR": str(self._home / f"{name}-work"),
            "SPARK_DAEMON_MEMORY": "512m",
            "SPARK_LOCAL_IP": "127.0.0.1",
        }
        with open(self._home / f"{name}.log", "wb") as log:
            self._processes[name] = subprocess.Popen(
                command, env=environment, cwd=self._home, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _check(self) -> None:
        for name, process in self._processes.items():
            assert process.poll() is None, (self._home / f"{name}.log").read_text()[-3000:]


@contextmanager
def spark_cluster(home: Path, login: Mapping[str, str]) -> Iterator[SparkCluster]:
    """A running cluster whose workers have the variables of a login. Raises JavaMissing where it can't be had."""
    running = SparkCluster(home, login)
    try:
        yield running
    finally:
        running.close()
