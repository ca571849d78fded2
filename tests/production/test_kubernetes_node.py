"""The nodes of the rig do what a kubelet does: variables, files, tokens, users, restarts, probes, grace."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from control_plane import ControlPlane
from kube_api import Object
from node import Nodes, NodeSpec, nodes
from pod_images import PodImage
from rig import had
from waiting import eventually

PODS = "/api/v1/namespaces/default/pods"
TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount/token"
SERVE = "python -m http.server 8080 --bind 0.0.0.0"


@pytest.fixture(scope="module")
def running(plane: ControlPlane, images: dict[str, PodImage], open_folder: Path) -> Iterator[Nodes]:
    with had(nodes(plane, [NodeSpec("node")], images, open_folder)) as made:
        yield made


def start(running: Nodes, name: str, script: str, spec: dict[str, Any] | None = None, **container: Any) -> None:
    """A pod that runs a script of the shell once."""
    only = {"name": "only", "image": "recsys/code-location:0.1.0", "command": ["sh", "-c", script], **container}
    pod = {"restartPolicy": "Never", "containers": [only], **(spec or {})}
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}}, "spec": pod}
    running.plane.api.post(PODS, body)


def status(running: Nodes, name: str) -> Object:
    found: Object = running.plane.api.get(f"{PODS}/{name}")["status"]
    return found


def container(running: Nodes, name: str) -> Object:
    found: Object = (status(running, name).get("containerStatuses") or [{"state": {}, "restartCount": 0}])[0]
    return found


def ended(running: Nodes, name: str) -> Object:
    """How its container ended, once it has."""
    eventually(lambda: "terminated" in container(running, name)["state"])
    found: Object = container(running, name)["state"]["terminated"]
    return found


def test_a_container_has_what_its_pod_says(running: Nodes) -> None:
    api = running.plane.api
    for kind, data in (("secrets", {"stringData": {"WORD": "hidden"}}), ("configmaps", {"data": {"file.txt": "at 0.0.0.0"}})):
        api.post(f"/api/v1/namespaces/default/{kind}", {"metadata": {"name": "given"}, **data})
    mounts = [{"name": "files", "mountPath": "/etc/given"}, {"name": "own", "mountPath": "/scratch"}]
    start(
        running,
        "given",
        f"id -u; hostname; cat /etc/given/file.txt; echo; echo $WORD $ADDRESS $MEGABYTES $BOTH; cat {TOKEN} | wc -c; "
        "touch /scratch/x && echo written; touch /etc/x || echo refused; exit 3",
        {
            "securityContext": {"runAsUser": 1234, "fsGroup": 1234},
            "volumes": [{"name": "files", "configMap": {"name": "given"}}, {"name": "own", "emptyDir": {}}],
        },
        envFrom=[{"secretRef": {"name": "given"}}],
        env=[
            {"name": "ADDRESS", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "MEGABYTES", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1Mi"}}},
            {"name": "BOTH", "value": "$(WORD)-$(ADDRESS)-$(NOTHING)"},
        ],
        resources={"limits": {"memory": "64Mi"}},
        volumeMounts=mounts,
        securityContext={"readOnlyRootFilesystem": True},
    )
    found = ended(running, "given")
    assert (found["exitCode"], found["reason"], status(running, "given")["phase"]) == (3, "Error", "Failed")
    address = status(running, "given")["podIP"]
    lines = running.log("given").splitlines()
    assert lines[:4] == ["1234", "given", f"at {address}", f"hidden {address} 64 hidden-{address}-$(NOTHING)"]
    assert int(lines[4]) > 500
    assert "written" in lines
    assert "refused" in lines


def test_a_container_waits_for_what_it_is_given(running: Nodes) -> None:
    start(running, "early", "echo $WORD", envFrom=[{"secretRef": {"name": "late"}}])
    eventually(lambda: container(running, "early")["state"].get("waiting", {}).get("reason") == "CreateContainerConfigError")
    running.plane.api.post("/api/v1/namespaces/default/secrets", {"metadata": {"name": "late"}, "stringData": {"WORD": "come"}})
    assert ended(running, "early")["exitCode"] == 0
    assert running.log("early") == "come\n"


def test_init_containers_come_first_and_one_that_fails_ends_the_pod(running: Nodes) -> None:
    volume = {"volumes": [{"name": "own", "emptyDir": {}}]}
    mounts = [{"name": "own", "mountPath": "/scratch"}]

    def first(script: str) -> dict[str, Any]:
        init = {"name": "first", "image": "recsys/code-location:0.1.0", "command": ["sh", "-c", script], "volumeMounts": mounts}
        return {**volume, "initContainers": [init]}

    start(running, "after", "cat /scratch/left", first("echo left > /scratch/left"), volumeMounts=mounts)
    start(running, "never", "echo begun", first("exit 1"), volumeMounts=mounts)
    assert ended(running, "after")["exitCode"] == 0
    assert running.log("after") == "left\n"
    eventually(lambda: status(running, "never")["phase"] == "Failed")
    assert running.log("never") == ""


def test_a_container_that_fails_is_started_again_where_the_pod_says_so(running: Nodes) -> None:
    own = {"volumes": [{"name": "own", "emptyDir": {}}], "restartPolicy": "OnFailure"}
    start(
        running,
        "again",
        "test -e /scratch/x || { touch /scratch/x; exit 1; }",
        own,
        volumeMounts=[{"name": "own", "mountPath": "/scratch"}],
    )
    eventually(lambda: status(running, "again")["phase"] == "Succeeded")
    assert container(running, "again")["restartCount"] == 1


def test_an_image_that_there_is_not_is_said(running: Nodes) -> None:
    start(running, "unknown", "true", image="recsys/unknown:0.1.0")
    eventually(lambda: container(running, "unknown")["state"].get("waiting", {}).get("reason") == "ErrImagePull")


def test_a_pod_gets_its_grace_and_no_more(running: Nodes) -> None:
    start(running, "deaf", "trap '' TERM; echo up; while :; do sleep 0.1; done", {"terminationGracePeriodSeconds": 2})
    eventually(lambda: "up" in running.log("deaf"))
    began = time.monotonic()
    running.plane.api.delete(f"{PODS}/deaf")
    eventually(lambda: running.plane.api.found(f"{PODS}/deaf") is None)
    assert time.monotonic() - began > 2


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("http", {"httpGet": {"port": 8080, "path": "/"}}, {"httpGet": {"port": 8080, "path": "/nothing"}}),
        ("tcp", {"tcpSocket": {"port": 8080}}, {"tcpSocket": {"port": 8081}}),
        ("exec", {"exec": {"command": ["true"]}}, {"exec": {"command": ["false"]}}),
    ],
)
def test_only_a_pod_whose_probe_succeeds_is_ready_and_found_by_its_service(
    running: Nodes, kind: str, good: dict[str, Any], bad: dict[str, Any]
) -> None:
    for name, probe in ((f"{kind}-good", good), (f"{kind}-bad", bad)):
        start(running, name, SERVE, readinessProbe={**probe, "periodSeconds": 1, "timeoutSeconds": 5})
    eventually(lambda: container(running, f"{kind}-good").get("ready"))
    assert running.addresses(app=f"{kind}-good") == [status(running, f"{kind}-good")["podIP"]]
    assert not container(running, f"{kind}-bad").get("ready")
    assert running.addresses(app=f"{kind}-bad") == []


def test_a_container_whose_liveness_fails_is_started_again(running: Nodes) -> None:
    probe = {
        "exec": {"command": ["test", "-e", "/tmp/alive"]},
        "periodSeconds": 1,
        "failureThreshold": 2,
        "initialDelaySeconds": 2,
    }
    start(
        running,
        "mortal",
        "touch /tmp/alive; sleep 4; rm /tmp/alive; sleep 600",
        {"restartPolicy": "Always", "terminationGracePeriodSeconds": 1},
        livenessProbe=probe,
    )
    eventually(lambda: container(running, "mortal")["restartCount"] == 1)
    assert any("mortal" in killed for killed in running.killed)
