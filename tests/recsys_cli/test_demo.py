"""The demo as a person runs it: a command, its output, and nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from recsys_home import QUICK_SPARK_VARIABLE

COMMAND = (sys.executable, "-m", "recsys_cli.main", "demo")


@pytest.fixture
def clicks(tmp_path: Path) -> Path:
    """Five days of 40 users in two groups of taste, each with items of its own, as a CSV with foreign columns."""
    rows = ["user_id,item_id,event_type,ts"]
    start = 1_767_600_000_000
    for user in range(40):
        group = user % 2
        for click in range(25):
            item = 60 * group + (user * 7 + click * 11) % 60
            rows.append(f"u{user},i{item},view,{start + user * 61_000 + click * 17_000_000}")
    path = tmp_path / "clicks.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "demo"
    left = processes_of(tmp_path / "demo")
    for process in left:
        process.kill()


def left_behind(home: Path) -> list[psutil.Process]:
    """What still runs for this home when helpers that end by themselves, once their parent is gone, have had their time."""
    _, alive = psutil.wait_procs(processes_of(home), timeout=10)
    return alive


def processes_of(home: Path) -> list[psutil.Process]:
    """Everything that runs with this home in its command line or environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and (
                process.environ().get("RECSYS_HOME") == str(home) or str(home) in " ".join(process.cmdline())
            ):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def test_it_carries_a_file_of_clicks_to_answers_and_says_what_to_do_next(clicks: Path, home: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "--data", str(clicks), "--mapping", "recsys", "--home", str(home)],
        capture_output=True,
        text=True,
        timeout=840,
        env={**os.environ, **QUICK_SPARK_VARIABLE, "COLUMNS": "160"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for what in ("rows read", "events landed"):
        assert re.search(rf"{what}\W+1,000\b", done.stdout), done.stdout[:3000]
    for word in ("CACHE", "POPULAR", "someone-new", "ALS", "popularity, last 6 h", "What next:"):
        assert word in done.stdout, f"{word} is missing in:\n{done.stdout}"
    assert not left_behind(home)


def test_a_path_that_is_not_there_is_one_clear_line(home: Path) -> None:
    done = subprocess.run([*COMMAND, "--data", "nowhere.csv", "--home", str(home)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.strip() == "No such file or folder: nowhere.csv"


def test_a_folder_that_no_demo_made_is_left_alone(clicks: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / "lake").mkdir(parents=True)
    (folder / "lake" / "precious").write_text("kept")
    done = subprocess.run([*COMMAND, "--data", str(clicks), "--home", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "holds something that no demo made" in done.stderr
    assert (folder / "lake" / "precious").read_text() == "kept"


def test_ctrl_c_in_the_middle_leaves_no_process(clicks: Path, home: Path) -> None:
    demo = subprocess.Popen(
        [*COMMAND, "--data", str(clicks), "--mapping", "recsys", "--home", str(home)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as a script's & does
    )
    assert demo.stdout is not None
    for line in demo.stdout:
        if line.startswith("clicks_hourly"):
            break
    demo.send_signal(signal.SIGINT)
    demo.communicate(timeout=60)
    assert demo.returncode != 0
    deadline = time.monotonic() + 15
    while processes_of(home) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left_behind(home)
