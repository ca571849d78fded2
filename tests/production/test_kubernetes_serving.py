"""The servers of production on four nodes: placed by the real scheduler, probed, rolled out while they are called."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from control_plane import ControlPlane
from installation import NAMESPACE, Installation
from kube_api import Object
from node import NodeSpec, nodes
from object_store import BUCKET, S3Server
from pod_images import PodImage
from rig import Drill, Note, had
from snapshots import make_manifest, make_snapshot
from waiting import eventually
from worlds import RedisServer

from recsys_core.release import Releases

FOUR = [NodeSpec(f"node-{at}", "12", "48Gi", {"topology.kubernetes.io/zone": f"zone-{at % 2}"}) for at in range(4)]
REPLICAS = 4
STARTUP = {"periodSeconds": 2, "failureThreshold": 12}
"""A shorter patience than the manifest's, so that a probe that would kill does it while the test looks."""
LIVENESS = {"periodSeconds": 2}
CALLER = Path(__file__).with_name("caller.py")


def container(**fields: object) -> Object:
    """A patch of the servers' container."""
    spec = {"template": {"spec": {"containers": [{"name": "serving", **fields}]}}}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "serving"}, "spec": spec}


NO_STREAM = {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "stream"}, "spec": {"replicas": 0}}


@pytest.fixture(scope="module")
def installed(
    plane: ControlPlane,
    images: dict[str, PodImage],
    store: S3Server,
    open_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Installation]:
    """The overlay of production, without a release; its servers have one process each."""
    redis = RedisServer(tmp_path_factory.mktemp("redis"))
    redis.start()
    with had(nodes(plane, FOUR, images, open_folder)) as running:
        made = Installation(plane, running, open_folder)
        made.prepare({**store.environment, "RECSYS_REDIS__URL": redis.url})
        one_process = container(
            env=[{"name": "RECSYS_SERVING__PROCESSES", "value": "1"}], startupProbe=STARTUP, livenessProbe=LIVENESS
        )
        made.apply("production", [one_process, NO_STREAM])
        yield made
    redis.stop()


def test_servers_without_a_release_live_on_and_get_no_calls(installed: Installation, note: Note) -> None:
    """The autoscaler makes as many as it must, and the scheduler gives each a node of its own."""
    installed.wait_for(lambda: len(installed.of_workload("serving")) == REPLICAS, 60)
    installed.wait_for(lambda: installed.has_container("serving", started=True), 120)
    patience = STARTUP["periodSeconds"] * STARTUP["failureThreshold"]
    time.sleep(patience)
    assert installed.has_container("serving", started=True, ready=False, restartCount=0)
    assert installed.nodes.killed == []
    assert len({pod["spec"]["nodeName"] for pod in installed.of_workload("serving")}) == REPLICAS
    note(_drill("no release yet", "0 of 4 pods restarted", f"not ready; alive for {patience} s beyond their start"))


def test_the_first_release_makes_them_ready(installed: Installation) -> None:
    _promote("2026-01-01.a")
    assert "successfully rolled out" in installed.rolled_out("deployment/serving")
    assert installed.has_container("serving", ready=True, restartCount=0)


def test_a_rollout_under_load_comes_to_its_end_and_loses_no_answer(installed: Installation, note: Note) -> None:
    before = {pod["metadata"]["name"] for pod in installed.of_workload("serving")}
    _start_caller(installed)
    began = time.monotonic()
    installed.kubectl("rollout", "restart", "deployment/serving")
    assert "successfully rolled out" in installed.rolled_out("deployment/serving")
    seconds = time.monotonic() - began
    eventually(lambda: len(installed.of_workload("serving")) == REPLICAS)
    after = {pod["metadata"]["name"] for pod in installed.of_workload("serving")}
    assert not before & after
    found = _end_caller(installed)
    assert found["failures"] == {}
    assert found["answers"].keys() == {"2026-01-01.a"}
    assert found["answers"]["2026-01-01.a"] > 500
    calls = sum(found["answers"].values())
    note(
        _drill("rolled out under calls", f"0 of {calls} answers", f"{seconds:.0f} s for 4 pods, a retry of the client allowed")
    )


def test_a_server_that_hangs_is_taken_out_and_started_again(installed: Installation, note: Note) -> None:
    """Its process is frozen: it takes connections and answers no probe."""
    name = installed.of_workload("serving")[0]["metadata"]["name"]
    installed.nodes.signal(name, signal.SIGSTOP)
    began = time.monotonic()

    def status() -> Object:
        (one,) = [pod for pod in installed.of_workload("serving") if pod["metadata"]["name"] == name]
        found: Object = one["status"]["containerStatuses"][0]
        return found

    eventually(lambda: not status()["ready"], 30)
    out = time.monotonic() - began
    eventually(lambda: status()["restartCount"] == 1, 150)
    eventually(lambda: status()["ready"], 60)
    again = time.monotonic() - began
    assert any(name in killed and "liveness" in killed for killed in installed.nodes.killed)
    note(_drill("a server is frozen", "-", f"no calls to it after {out:.0f} s, started again, ready after {again:.0f} s"))


def _promote(release_id: str) -> None:
    releases = Releases(f"s3://{BUCKET}/releases")
    snapshot = make_snapshot(release_id)
    releases.write(make_manifest(snapshot), snapshot)
    releases.promote(release_id)


def _start_caller(installed: Installation) -> None:
    """A pod in the cluster that finds the servers by the name of their service."""
    installed.kubectl("create", "configmap", "caller", f"--from-file={CALLER}")
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "caller", "namespace": NAMESPACE},
        "spec": {
            "restartPolicy": "Never",
            "securityContext": {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
            "volumes": [{"name": "caller", "configMap": {"name": "caller"}}],
            "containers": [
                {
                    "name": "caller",
                    "image": "recsys/code-location:0.1.0",
                    "command": ["python", "/caller/caller.py", "dns:///serving.recsys:50051"],
                    "volumeMounts": [{"name": "caller", "mountPath": "/caller"}],
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                }
            ],
        },
    }
    installed.kubectl("apply", "-f", "-", stdin=json.dumps(pod))
    eventually(lambda: "calling" in installed.nodes.log("caller"))


def _end_caller(installed: Installation) -> dict[str, dict[str, int]]:
    """What it got."""
    installed.kubectl("delete", "pod", "caller", "--wait=true")
    found: dict[str, dict[str, int]] = json.loads(installed.nodes.log("caller").splitlines()[-1])
    return found


def _drill(fault: str, lost: str, degraded: str) -> Drill:
    return Drill("Kubernetes, 4 nodes", "4 servers of the production overlay", fault, lost, degraded)
