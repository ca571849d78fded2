"""Parts that tests of every room share: settings and a lake in a temporary folder, and one Spark session."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from object_store import BUCKET, S3Server, s3_server, use_here
from pyspark.sql import SparkSession
from recsys_home import QUICK_SPARK, default_settings

from recsys_cli.processes import heed_interrupts
from recsys_core.lake import Lake
from recsys_core.registry import Registry
from recsys_core.settings import Settings
from recsys_core.spark import session

heed_interrupts()
# The same examples in every run. `pytest --hypothesis-profile=search` looks among others.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.load_profile("same")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """The defaults, with everything that is written under a temporary folder."""
    return default_settings(tmp_path / "home")


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(str(tmp_path / "lake"))


@pytest.fixture(scope="session")
def shared_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server; starting one takes some seconds."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(shared_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of a place in S3 where nothing is."""
    use_here(shared_s3, monkeypatch)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def own_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """An S3 server that the test may freeze and kill."""
    with s3_server(tmp_path) as server:
        use_here(server, monkeypatch)
        yield server


@pytest.fixture(params=["local", "memory", "s3"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URI of a place where nothing is, in a store of each kind."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3"))
    return str(tmp_path / "anywhere") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def migrated_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without any run; migrating one takes seconds, copying it does not."""
    settings = default_settings(tmp_path_factory.mktemp("mlflow-home"))
    Registry(settings).call(lambda client: client.search_experiments())
    return settings.home / "mlflow.db"


@pytest.fixture
def mlflow_settings(settings: Settings, migrated_mlflow: Path) -> Settings:
    """The settings of a home that has an MLflow database."""
    shutil.copy(migrated_mlflow, settings.home / "mlflow.db")
    return settings


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    """The local session of the whole test run; starting one takes some seconds."""
    local = {"master": "local[2]", "shuffle_partitions": 2, "conf": QUICK_SPARK}
    started = session(default_settings(tmp_path_factory.mktemp("spark-home"), spark=local))
    yield started
    started.stop()
