"""Several processes on one port: all answer, one that dies is started again, their numbers are one, all end together."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from snapshots import make_snapshot
from test_process import PROGRAM, environment
from worlds import World, eventually

from recsys_cli.processes import free_port
from serving.client import RecsysClient
from serving.metrics import Metrics
from serving.worker import NUMBERS_SECONDS, Reports


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


@contextmanager
def ended_in_the_end(made: Processes) -> Iterator[Processes]:
    try:
        yield made
    finally:
        for process in psutil.Process(made.supervisor.pid).children() if made.supervisor.poll() is None else []:
            process.kill()
        made.supervisor.kill()
        made.supervisor.communicate()


@pytest.fixture
def processes(empty_world: World, tmp_path: Path) -> Iterator[Processes]:
    empty_world.promote(make_snapshot())
    with ended_in_the_end(Processes(empty_world, tmp_path)) as made:
        yield made


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


SMALL_PIPE = """
import socket, sys
if "serving.worker" in sys.orig_argv:
    report = socket.socket(fileno=1)
    report.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    report.detach()
"""


def test_a_supervisor_that_is_stopped_holds_no_process_up(
    empty_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads no reports then. Their pipes are made so small that some reports fill them."""
    (tmp_path / "sitecustomize.py").write_text(SMALL_PIPE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    empty_world.promote(make_snapshot())
    with ended_in_the_end(Processes(empty_world, tmp_path)) as processes:
        workers = processes.workers()
        processes.supervisor.send_signal(signal.SIGSTOP)
        time.sleep(5 * NUMBERS_SECONDS)
        for _ in range(20):
            processes.answers()
        processes.supervisor.send_signal(signal.SIGCONT)
        eventually(lambda: processes.metric('recsys_requests_total{method="Recommend",status="OK"}') == 20, seconds=60)
        assert processes.metric("recsys_dropped_reports_total") > 0
        assert processes.workers() == workers


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


@given(st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 9000)), min_size=1, max_size=40))
def test_reports_are_whole_lines_whenever_and_however_slowly_they_are_read(steps: list[tuple[int, int]]) -> None:
    """A step sends a report of some length and then reads some bytes."""
    out, pipe = os.pipe()
    try:
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096)
        os.set_blocking(out, False)
        metrics = Metrics()
        reports = Reports(pipe, metrics)
        read = b""
        for number, (length, taken) in enumerate(steps):
            reports.send({"number": number, "text": "x" * length})
            with suppress(BlockingIOError):
                read += os.read(out, taken) if taken else b""
        for _ in range(10):
            reports.send({"number": -1})
            with suppress(BlockingIOError):
                read += os.read(out, 1 << 16)
        numbers = [json.loads(line)["number"] for line in read.splitlines()]
        sent = [number for number in numbers if number >= 0]
        assert sent == sorted(set(sent))
        assert numbers[-1] == -1, "once somebody reads, reports come again"
        assert len(numbers) + metrics.events["dropped_reports"] == len(steps) + 10
    finally:
        os.close(out)
        os.close(pipe)
