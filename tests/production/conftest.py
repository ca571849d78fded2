"""Engines as production has them, on one machine; at the end tables of what was done to them and what it cost."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import pytest
from control_plane import ControlPlane, NoControlPlane, control_plane, kube
from object_store import S3Server, s3_server, use_here
from pod_images import PodImage, pod_images
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rig import Drill, Note, had
from stream_world import Broker
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

pytest.register_assert_rewrite("speed_layer")
DRILL = "drill"
KUBERNETES_SECONDS = 4500
"""Of a test: the first one may wait for the build, and a night takes its time."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, default=5.0, help="how long the soak lasts")
    parser.addoption("--seed", type=int, default=1, help="of the soak's faults")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(DrillTables())
    if getattr(config.option, "numprocesses", None):
        # The whole rig: before the workers begin, because a build beside it would take the time of what is measured.
        with suppress(NoControlPlane):  # the tests that need it say why it can't be had
            kube()


class Lanes(LoadFileScheduling):
    """A file's tests are for one worker, and so are those of all files of Kubernetes, whose nodes have the same addresses."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "kubernetes" if _is_of_kubernetes(Path(file)) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Lanes:
    return Lanes(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Kubernetes comes first, which takes longest; last comes the soak, which bears little else on this machine."""
    items.sort(key=lambda item: (not _is_of_kubernetes(item.path), item.path.name == "test_everything.py"))
    for item in items:
        if _is_of_kubernetes(item.path):
            item.add_marker(pytest.mark.timeout(KUBERNETES_SECONDS))


def _is_of_kubernetes(file: Path) -> bool:
    return file.name.startswith("test_kubernetes")


class DrillTables:
    """The drills that tests noted, in whichever process they ran, as tables at the end."""

    def __init__(self) -> None:
        self._drills: list[Drill] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            self._drills += [Drill(**said) for name, said in report.user_properties if name == DRILL]

    def pytest_terminal_summary(self) -> None:
        def of(drill: Drill) -> str:
            return f"{drill.engine}: {drill.ran}"

        for title, drills in groupby(sorted(self._drills, key=of), of):
            table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE, expand=True)
            for name in ("fault", "lost or doubled", "degraded"):
                table.add_column(name, ratio=1)
            for drill in drills:
                table.add_row(drill.fault, drill.lost, drill.degraded)
            Console().print(table)


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Note:
    """Adds a line to a table."""
    return lambda drill: request.node.user_properties.append((DRILL, asdict(drill)))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without any settings, in which the test works."""
    monkeypatch.delenv("RECSYS_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def _one_broker(home: Path) -> Iterator[Broker]:
    broker = Broker(home)
    broker.start()
    try:
        yield broker
    finally:
        broker.stop()


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A Kafka of one node, for what is about something else."""
    with had(_one_broker(tmp_path_factory.mktemp("kafka"))) as running:
        yield running


@pytest.fixture(scope="module")
def open_folder() -> Iterator[Path]:
    """A folder that every user of this machine may enter, as the users of pods are others."""
    with tempfile.TemporaryDirectory(prefix="recsys-kube-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(scope="module")
def plane(open_folder: Path) -> Iterator[ControlPlane]:
    """A control plane of Kubernetes, without nodes."""
    home = open_folder / "plane"
    home.mkdir()
    with had(control_plane(home)) as running:
        yield running


@pytest.fixture(scope="module")
def images(open_folder: Path) -> dict[str, PodImage]:
    """What images hold, found on this machine."""
    folder = open_folder / "images"
    folder.mkdir()
    return pod_images(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server, which this process finds as well."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        use_here(server, patch)
        yield server
