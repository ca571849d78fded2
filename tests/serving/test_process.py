"""The server as a process of its own: light imports, an orderly end, and a clear word when the port is taken."""

from __future__ import annotations

import io
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from snapshots import make_snapshot
from worlds import World, eventually

from serving.background_log import BackgroundHandler
from serving.client import RecsysClient

PROGRAM = """
import pathlib, sys
from recsys_core.settings import load_settings
from serving.server import main
ready = pathlib.Path(sys.argv[1])
def announce(address):
    ready.with_suffix(".tmp").write_text(address)
    ready.with_suffix(".tmp").rename(ready)
sys.exit(main(load_settings(), announce))
"""


@pytest.fixture
def process(empty_world: World, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A serving process with a release, and its address."""
    empty_world.promote(make_snapshot())
    ready = tmp_path / "address"
    started = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(ready)],
        env={**os.environ, **environment(empty_world, 0)},
        stderr=subprocess.PIPE,
        text=True,
    )
    eventually(ready.exists, seconds=60)
    yield started, ready.read_text()
    started.kill()
    started.communicate()


def environment(world: World, port: int) -> dict[str, str]:
    return {
        "RECSYS_HOME": str(world.settings.home),
        "RECSYS_REDIS__URL": world.redis.url,
        "RECSYS_REDIS__TIMEOUT_MS": "10000",
        "RECSYS_SERVING__PORT": str(port),
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(process: tuple[subprocess.Popen[str], str], number: int) -> None:
    server, address = process
    with RecsysClient(address, timeout=60) as client:
        assert len(client.recommend("ann")) == 10
    server.send_signal(number)
    _, said = server.communicate(timeout=60)
    assert server.returncode == 0, said
    assert f"serving on {address}" in said
    assert "Traceback" not in said


def test_files_of_the_served_release_may_be_cut_short_and_overwritten(
    process: tuple[subprocess.Popen[str], str], empty_world: World
) -> None:
    """`cp` and `rsync --inplace` do that; a server that had them mapped was killed by SIGBUS."""
    server, address = process
    with RecsysClient(address, timeout=60) as client:
        before = client.similar_items("item-1").items
        for file in Path(empty_world.releases.root).rglob("*"):
            if file.is_file():
                with file.open("r+b") as written:
                    written.truncate(0)
        for at in range(500):
            assert len(client.recommend(f"user-{at}", current_item=f"item-{at}", explain=at % 7 == 0)) == 10
        assert client.similar_items("item-1").items == before
    assert server.poll() is None


def test_a_log_that_nobody_reads_holds_no_call_up(empty_world: World, tmp_path: Path) -> None:
    """A pipe takes 64 KiB; each call writes a line of some hundred bytes."""
    empty_world.promote(make_snapshot())
    ready = tmp_path / "address"
    server = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(ready)],
        env={**os.environ, **environment(empty_world, 0), "RECSYS_SERVING__LOG_SAMPLE": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        eventually(ready.exists, seconds=60)
        with RecsysClient(ready.read_text(), timeout=10) as client:
            for at in range(1500):
                client.recommend("ann", request_id=f"{at:0100}")
            server.send_signal(signal.SIGTERM)
            _, said = server.communicate(timeout=60)
        assert server.returncode == 0
        assert f"x-request-id={1499:0100}" in said, "what waited is written when somebody reads"
    finally:
        server.kill()
        server.communicate()


def test_a_taken_port_is_said_and_is_exit_code_1(empty_world: World, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        ended = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "never")],
            env={**os.environ, **environment(empty_world, other.getsockname()[1]), "RECSYS_SERVING__LINGER_SECONDS": "600"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert ended.returncode == 1
    assert "can't listen on 127.0.0.1:" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("name", ["metrics_port", "health_port"])
def test_a_taken_port_of_metrics_or_probes_is_said_with_its_setting(
    empty_world: World, tmp_path: Path, name: str, processes: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        ended = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "never")],
            env={
                **os.environ,
                **environment(empty_world, 0),
                f"RECSYS_SERVING__{name.upper()}": port,
                "RECSYS_SERVING__PROCESSES": processes,
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert ended.returncode == 1
    assert f"127.0.0.1:{port}" in ended.stderr
    assert f"serving.{name}" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, serving.server, serving.client\n"
        "heavy = {'tensorflow', 'dagster', 'mlflow', 'pyspark', 'implicit', 'great_expectations', 'matplotlib', 'typer'}\n"
        "heavy |= {'pandas', 'scipy', 'pyarrow.dataset'}\n"
        "print(*sorted(heavy & set(sys.modules)), end='')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_of_lines_that_nobody_reads_the_first_stay_and_the_rest_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.background_log.KEPT_LINES", 10)
    monkeypatch.setattr("serving.background_log.FLUSH_SECONDS", 0.1)
    go_on, written = threading.Event(), io.StringIO()

    class Reader(io.StringIO):
        def write(self, text: str) -> int:
            go_on.wait(60)
            return written.write(text)

    monkeypatch.setattr(sys, "stderr", Reader())
    handler = BackgroundHandler()
    for at in range(100):
        handler.emit(logging.LogRecord("a", logging.INFO, "a.py", 1, f"line {at}", None, None))
    handler.flush()
    go_on.set()
    eventually(lambda: "dropped" in written.getvalue() and "line 9\n" in written.getvalue())
    lines = written.getvalue().splitlines()
    kept = [line for line in lines if line.startswith("line ")]
    assert kept == [f"line {at}" for at in range(len(kept))]
    assert f"{100 - len(kept)} lines of this log were dropped: nobody read it" in lines
