"""What images and containers run, run: with the files, programs and packages of the image and real neighbours."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import redis
import requests
from deployment import DEPLOY, read_yaml
from image import Image
from object_store import BUCKET, S3Server

from recsys_cli.kafka import kafka_server
from recsys_cli.processes import free_port, wait_until
from recsys_cli.stack import redis_server
from recsys_core.heartbeat import HEARTBEATS_KEY
from recsys_core.stores import open_filesystem
from streaming.kafka import KafkaUnavailable

GRACE_SECONDS = 10
"""What Docker gives a container between asking it to end and ending it."""


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a broker; skipped where its jar files can't be had."""
    try:
        with kafka_server(tmp_path_factory.mktemp("kafka")) as address:
            yield address
    except KafkaUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def topic(tmp_path: Path, kafka: str) -> dict[str, str]:
    """The variables of a home, a broker and a topic that nobody else uses."""
    name = f"events-{uuid.uuid4().hex[:8]}"
    return {"RECSYS_HOME": str(tmp_path / "home"), "RECSYS_KAFKA__BOOTSTRAP_SERVERS": kafka, "RECSYS_KAFKA__TOPIC": name}


def compose_command(service: str) -> list[str]:
    found: list[str] = read_yaml("compose.yaml")["services"][service]["command"]
    return found


def run(image: Image, command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, as a container does."""
    shell = ["sh", "-c", 'exec "$@"', "sh", *command]
    return subprocess.run(
        shell, cwd=image.folder, env=image.environment(environment), capture_output=True, text=True, timeout=120
    )


@contextmanager
def started(image: Image, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """The image's own command, as long as the block lasts; its output is shown when the test fails."""
    process = subprocess.Popen(
        ["sh", "-c", 'exec "$@"', "sh", *image.command],
        cwd=image.folder,
        env=image.environment(environment),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(process: subprocess.Popen[bytes], ready: Any, what: str) -> None:
    def alive() -> None:
        assert process.poll() is None, f"{what} has ended with {process.returncode}"

    wait_until(ready, what, 120, alive)


def test_what_an_image_has_not_is_not_found(tmp_path: Path) -> None:
    """The check of the checks: a program of this machine, a package of another image and a file of no image are missing."""
    image = Image("streaming", tmp_path)
    assert run(image, ["recsys", "--help"], {}).returncode == 127
    for code, missing in (("import dagster", "dagster is not in the image"), ("import recsys_assets", "recsys_assets")):
        ended = run(image, ["python", "-c", code], {})
        assert ended.returncode != 0
        assert missing in ended.stderr
    assert run(image, ["python", "-c", "import streaming.worker, s3fs"], {}).returncode == 0


def test_the_service_that_makes_the_topics_makes_them(tmp_path: Path, topic: dict[str, str]) -> None:
    image = Image("streaming", tmp_path)
    ended = run(image, compose_command("topics"), topic)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert topic["RECSYS_KAFKA__TOPIC"] in ended.stdout


def test_the_streaming_image_works_on_the_topic(tmp_path: Path, topic: dict[str, str]) -> None:
    image = Image("streaming", tmp_path)
    with redis_server(tmp_path / "redis") as url:
        environment = {**topic, "RECSYS_REDIS__URL": url, "RECSYS_STREAM__METRICS_PORT": "0"}
        assert run(image, compose_command("topics"), topic).returncode == 0
        with started(image, environment) as worker, redis.Redis.from_url(url) as client:
            wait_for(worker, lambda: bool(client.hlen(HEARTBEATS_KEY)), "the worker's heartbeat")


def test_the_serving_image_is_live_without_a_release(tmp_path: Path) -> None:
    image = Image("serving", tmp_path)
    ports = {name: str(free_port()) for name in ("PORT", "HEALTH_PORT")}
    environment = {f"RECSYS_SERVING__{name}": port for name, port in ports.items()} | {"RECSYS_HOME": str(tmp_path / "home")}
    asked = [sys.executable, str(DEPLOY / "health.py"), "grpc", f"127.0.0.1:{ports['HEALTH_PORT']}", "live"]
    with started(image, environment) as server:
        wait_for(server, lambda: subprocess.run(asked, capture_output=True).returncode == 0, "the server")


def test_the_model_registry_keeps_artifacts_in_s3(tmp_path: Path, own_s3: S3Server) -> None:
    """The server stores what clients upload; the client knows neither the bucket nor its secrets."""
    image = Image("mlflow", tmp_path)
    image.command[-1] = port = str(free_port())
    environment = {
        **own_s3.environment,
        "MLFLOW_S3_ENDPOINT_URL": own_s3.url,
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{BUCKET}/artifacts",
        "MLFLOW_WORKERS": "1",
    }
    url = f"http://127.0.0.1:{port}"
    with started(image, environment) as server:
        wait_for(server, lambda: _is_ok(f"{url}/health"), "the model registry")
        requests.put(f"{url}/api/2.0/mlflow-artifacts/artifacts/run/model.json", data=b"{}", timeout=60).raise_for_status()
        listed = requests.get(f"{url}/api/2.0/mlflow-artifacts/artifacts", params={"path": "run"}, timeout=60)
    assert [file["path"] for file in json.loads(listed.text)["files"]] == ["model.json"]
    fs, path = open_filesystem(f"s3://{BUCKET}/artifacts/run/model.json")
    assert fs.cat_file(path) == b"{}"


def _is_ok(url: str) -> bool:
    try:
        return requests.get(url, timeout=1).ok
    except requests.RequestException:
        return False
