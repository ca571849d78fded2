"""Several processes on one port: all answer, one that dies is started again, their numbers are one, all end together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from snapshots import make_snapshot
from test_process import PROGRAM, environment
from worlds import World, eventually

from serving.client import RecsysClient


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Processes:
    """Two serving processes behind one address."""

    def __init__(self, world: World, folder: Path) -> None:
        self.metrics_port = free_port()
        ready = folder / "address"
        several = {"RECSYS_SERVING__PROCESSES": "2", "RECSYS_SERVING__METRICS_PORT": str(self.metrics_port)}
        self.supervisor = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(ready)],
            env={**os.environ, **environment(world, 0), **several},
            stderr=subprocess.PIPE,
            text=True,
        )
        eventually(ready.exists, seconds=120)
        self.address = ready.read_text()

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.supervisor.pid).children()

    def answers(self) -> None:
        """A new connection, which either process may get, has its answer."""
        with RecsysClient(self.address, timeout=60) as client:
            assert len(client.recommend("ann")) == 10

    def metric(self, start: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=60) as page:
            lines = page.read().decode().splitlines()
        return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(start)), 0.0)


@pytest.fixture
def processes(empty_world: World, tmp_path: Path) -> Iterator[Processes]:
    empty_world.promote(make_snapshot())
    made = Processes(empty_world, tmp_path)
    yield made
    for process in psutil.Process(made.supervisor.pid).children() if made.supervisor.poll() is None else []:
        process.kill()
    made.supervisor.kill()
    made.supervisor.communicate()


def test_they_share_a_port_are_replaced_when_they_die_counted_together_and_end_in_order(processes: Processes) -> None:
    for _ in range(20):
        processes.answers()
    eventually(lambda: processes.metric("recsys_processes") == 2)
    eventually(lambda: processes.metric('recsys_requests_total{method="Recommend",status="OK"}') == 20)

    killed = processes.workers()[0]
    killed.kill()
    eventually(lambda: len(processes.workers()) == 2 and killed not in processes.workers(), seconds=60)
    eventually(lambda: processes.metric("recsys_processes") == 2, seconds=60)
    for _ in range(20):
        processes.answers()

    workers = processes.workers()
    processes.supervisor.send_signal(signal.SIGTERM)
    _, said = processes.supervisor.communicate(timeout=60)
    assert processes.supervisor.returncode == 0, said
    assert "with 2 processes" in said
    assert "is started again" in said
    assert "Traceback" not in said
    assert not any(worker.is_running() for worker in workers)


def test_no_process_outlives_a_supervisor_that_is_killed(processes: Processes) -> None:
    workers = processes.workers()
    assert len(workers) == 2
    processes.supervisor.kill()
    eventually(lambda: not any(worker.is_running() for worker in workers), seconds=60)


def test_what_a_process_says_that_is_not_for_its_supervisor_is_logged(
    empty_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nif 'serving.worker' in sys.orig_argv:\n    print('hello')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    empty_world.promote(make_snapshot())
    made = Processes(empty_world, tmp_path)
    made.answers()
    made.supervisor.send_signal(signal.SIGTERM)
    _, said = made.supervisor.communicate(timeout=60)
    assert made.supervisor.returncode == 0
    assert said.count("hello") == 2
