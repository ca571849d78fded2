"""The speed layer as a pod: its probe, and what it costs when the worker hangs or is rolled out."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from control_plane import ControlPlane
from installation import Installation
from kube_api import Object
from load import clicks, passes
from node import NodeSpec, nodes
from object_store import BUCKET, S3Server
from pod_images import PodImage
from rig import Drill, Note, had
from stream_world import Broker, World
from waiting import eventually
from worlds import RedisServer

SETTLE_SECONDS = 180.0
LIVENESS = {"periodSeconds": 2, "timeoutSeconds": 2, "failureThreshold": 3}
"""Shorter than the manifest's."""
ARCHIVE = {"archive_rows": 5000, "archive_seconds": 10}
NO_SERVERS = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "serving"}, "spec": {"replicas": 0}}
NO_SCALING = {
    "apiVersion": "autoscaling/v2",
    "kind": "HorizontalPodAutoscaler",
    "metadata": {"name": "serving"},
    "$patch": "delete",
}
WORKER = {
    "apiVersion": "apps/v1",
    "kind": "StatefulSet",
    "metadata": {"name": "stream"},
    "spec": {
        "template": {
            "spec": {
                "terminationGracePeriodSeconds": 10,
                "containers": [{"name": "stream", "livenessProbe": LIVENESS}],
            }
        }
    },
}


@dataclass(frozen=True)
class Site:
    """A worker as a pod, and the topic, Redis and lake that it works on."""

    installed: Installation
    stream: World

    def status(self) -> Object:
        """Of the worker's container."""
        (pod,) = self.installed.of_workload("stream")
        (found,) = pod["status"].get("containerStatuses", [{}])
        status: Object = found
        return status

    def settle(self) -> str:
        """Wait until everything that was sent is in Redis and in the lake. How long that took."""
        began = time.monotonic()
        try:
            self.stream.settle(seconds=SETTLE_SECONDS)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.installed.nodes.log('stream-0')[-6000:]}") from None
        return f"all in the lake {time.monotonic() - began:.0f} s after the last click"


@pytest.fixture(scope="module")
def site(
    plane: ControlPlane,
    images: dict[str, PodImage],
    broker: Broker,
    store: S3Server,
    open_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Site]:
    redis = RedisServer(tmp_path_factory.mktemp("redis"))
    redis.start()
    stream = World.make(
        broker.address, redis.url, tmp_path_factory.mktemp("stream"), lake={"uri": f"s3://{BUCKET}/lake"}, stream=ARCHIVE
    )
    kafka, group = stream.settings.kafka, stream.settings.stream
    variables = {
        "RECSYS_REDIS__URL": redis.url,
        "RECSYS_KAFKA__BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
        "RECSYS_KAFKA__TOPIC": kafka.topic,
        "RECSYS_KAFKA__DEAD_LETTER_TOPIC": kafka.dead_letter_topic,
        "RECSYS_STREAM__GROUP": group.group,
        "RECSYS_STREAM__ARCHIVE_ROWS": str(group.archive_rows),
        "RECSYS_STREAM__ARCHIVE_SECONDS": str(group.archive_seconds),
    }
    with had(nodes(plane, [NodeSpec("node")], images, open_folder)) as running:
        installed = Installation(plane, running, open_folder)
        installed.prepare(store.environment, recsys_stream_secrets=variables)
        installed.apply("small", [NO_SERVERS, NO_SCALING, WORKER])
        yield Site(installed, stream)
    stream.close()
    redis.stop()


def test_a_worker_that_hangs_is_started_again_and_loses_nothing(site: Site, note: Note) -> None:
    site.installed.wait_for(lambda: site.status().get("ready"), 120, "stream")
    with clicks(site.stream, per_second=200):
        passes(3)
        site.installed.nodes.signal("stream-0", signal.SIGSTOP)
        began = time.monotonic()
        eventually(lambda: site.status()["restartCount"] == 1 and site.status()["ready"], 180)
        seconds = time.monotonic() - began
        passes(3)
    assert "liveness" in site.installed.nodes.killed[0]
    settled = site.settle()
    site.stream.prove()
    note(_drill("a worker is frozen", site.stream.sent, f"started again and alive after {seconds:.0f} s; {settled}"))


def test_a_rollout_loses_nothing(site: Site, note: Note) -> None:
    with clicks(site.stream, per_second=200, seed=2):
        passes(2)
        site.installed.kubectl("rollout", "restart", "statefulset/stream")
        began = time.monotonic()
        assert "roll" in site.installed.rolled_out("statefulset/stream")
        seconds = time.monotonic() - began
        passes(2)
    settled = site.settle()
    site.stream.prove()
    note(_drill("the workers are rolled out", site.stream.sent, f"{seconds:.0f} s for one worker; {settled}"))


def _drill(fault: str, sent: int, degraded: str) -> Drill:
    return Drill("Kubernetes, Kafka, Redis, S3", "a worker of the stream", fault, f"0 of {sent:,} events", degraded)
