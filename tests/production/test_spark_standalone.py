"""What Spark makes, made by executors that are no part of the driver: in S3, and on a disk while a worker is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from object_store import LOGIN
from recsys_home import default_settings
from rig import Drill, Note, had
from spark_cluster import SparkCluster, executor_python, spark_cluster

from recsys_core.lake import Lake
from recsys_core.landing import Landing
from recsys_core.simulate import Simulation, SimulationConfig
from recsys_core.stores import open_filesystem

STEPS = Path(__file__).with_name("spark_steps.py")
STEP_SECONDS = 400
SIZE = {"seed": 7, "users": 300, "items": 200, "days": 1, "events": 10_000}
QUIET = {"spark.log.level": "ERROR", "spark.executor.memory": "700m", "spark.driver.host": "127.0.0.1"}
FACTORS = "online_features/"
"""Tables that hold factors: Spark adds partial sums in the order in which tasks end, so they repeat to rounding only."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkCluster]:
    with had(spark_cluster(tmp_path_factory.mktemp("spark"), LOGIN)) as running:
        yield running


@pytest.fixture(scope="module")
def landed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lake with a clickstream in its landing zone, and nothing made of it."""
    folder = tmp_path_factory.mktemp("landed") / "lake"
    made = Simulation(SimulationConfig.model_validate(SIZE))
    lake = Lake(str(folder))
    made.write_catalog(lake)
    made.write_landing(Landing(lake))
    return folder


@pytest.fixture(scope="module")
def made_in_one_process(landed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process makes of it."""
    home = tmp_path_factory.mktemp("one-process")
    return versions(run(home, copied(landed, str(home / "lake")), "local[2]"))


def copied(landed: Path, uri: str) -> str:
    """The same landing zone as a lake elsewhere."""
    fs, inside = open_filesystem(uri)
    for file in sorted(path for path in landed.rglob("*") if path.is_file()):
        target = f"{inside}/{file.relative_to(landed)}"
        fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        fs.pipe_file(target, file.read_bytes())
    return uri


def start(home: Path, lake: str, master: str, conf: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """The steps in a process of their own, with settings as a user gives them."""
    default_settings(home)
    environment = {
        **os.environ,
        "RECSYS_HOME": str(home),
        "RECSYS_CONFIG": str(home / "empty.toml"),
        "RECSYS_LAKE__URI": lake,
        "RECSYS_SPARK__MASTER": master,
        "RECSYS_SPARK__CONF": json.dumps({**QUIET, **(conf or {})}),
        "RECSYS_SPARK__SHUFFLE_PARTITIONS": "4",
    }
    environment.pop("PYSPARK_PYTHON", None)
    return subprocess.Popen(
        [sys.executable, str(STEPS)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(home: Path, lake: str, master: str, conf: dict[str, str] | None = None) -> str:
    return ended(start(home, lake, master, conf))


def ended(process: subprocess.Popen[str]) -> str:
    """What a process printed, once it has ended well."""
    out, err = process.communicate(timeout=STEP_SECONDS)
    assert process.returncode == 0, out[-1500:] + err[-3000:]
    return out


def versions(printed: str) -> dict[str, str]:
    found = json.loads(printed.splitlines()[-1])
    return {name: version for name, version in found.items() if not name.startswith(FACTORS)}


def own_python() -> dict[str, str]:
    return {"spark.pyspark.python": str(executor_python())}


def test_executors_that_lack_a_package_are_refused_with_a_word_of_what_to_do(
    cluster: SparkCluster, landed: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    process = start(tmp_path, str(landed), cluster.master, {"spark.pyspark.python": str(bare / "bin" / "python")})
    _, err = process.communicate(timeout=STEP_SECONDS)
    assert process.returncode != 0
    assert "ModuleNotFoundError: No module named" in err, err[-3000:]
    assert "executors.txt" in err
    assert "spark.pyspark.python" in err


def test_executors_make_in_s3_what_one_process_makes(
    cluster: SparkCluster,
    landed: Path,
    made_in_one_process: dict[str, str],
    s3: str,
    tmp_path: Path,
    note: Note,
) -> None:
    made = versions(run(tmp_path, copied(landed, s3), cluster.master, own_python()))
    assert made == made_in_one_process
    note(_drill("none; the lake is in S3", len(made), "-"))


def test_a_worker_that_is_killed_costs_time_and_changes_nothing(
    cluster: SparkCluster, landed: Path, made_in_one_process: dict[str, str], tmp_path: Path, note: Note
) -> None:
    process = start(tmp_path, copied(landed, str(tmp_path / "lake")), cluster.master, own_python())
    assert process.stdout is not None
    struck = threading.Event()
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("interactions") and not struck.is_set():
            struck.set()
            cluster.kill_worker(0)
    assert process.stderr is not None
    assert process.wait(STEP_SECONDS) == 0, process.stderr.read()[-3000:]
    cluster.start_worker(0)
    assert struck.is_set()
    made = versions("".join(lines))
    assert made == made_in_one_process
    note(_drill("a worker is killed; the lake is on a disk", len(made), "its tasks ran again on the other"))


def _drill(fault: str, partitions: int, degraded: str) -> Drill:
    ran = "every Spark asset, ALS by MLlib"
    return Drill("Spark standalone, 2 workers", ran, fault, f"0 of {partitions} partitions differ from one process's", degraded)
