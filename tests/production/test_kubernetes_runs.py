"""Runs of Dagster on Kubernetes: a pod for each run and for each step, on PostgreSQL, while pods are lost."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from control_plane import ControlPlane
from dagster_api import DagsterApi
from databases import PASSWORDS, Postgres, postgres_server
from deployment import read_yaml
from helm_chart import WEB_PORT
from installation import NAMESPACE, Installation
from kube_api import Object, Refused
from node import NodeSpec, nodes
from object_store import S3Server
from pod_images import PodImage
from rig import Drill, Note, had
from waiting import eventually

JOB = "arrivals"
RUN_SECONDS = 240
MONITORING = {"pollIntervalSeconds": 2}


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with had(postgres_server()) as server:
        yield server


@pytest.fixture(scope="module")
def installed(
    plane: ControlPlane, images: dict[str, PodImage], store: S3Server, postgres: Postgres, open_folder: Path
) -> Iterator[Installation]:
    """The small overlay and Dagster, on one node and under a quota; neither servers nor workers run."""
    with had(nodes(plane, [NodeSpec("node")], images, open_folder)) as running:
        made = Installation(plane, running, open_folder)
        password = {"postgresql-password": PASSWORDS["DAGSTER_PG_PASSWORD"]}
        runs = {"RECSYS_DAGSTER__AUTOMATION": "false", "RECSYS_KUBERNETES__CPU_LIMITS": "true"}
        made.prepare(store.environment, dagster_postgresql_secret=password, recsys_secrets=runs)
        made.apply("small", [none_of("Deployment", "serving"), none_of("StatefulSet", "stream"), NO_SCALING])
        made.install_dagster(values(postgres))
        made.kubectl("apply", "-f", "-", stdin=json.dumps(QUOTA))
        yield made


QUOTA = {
    "apiVersion": "v1",
    "kind": "ResourceQuota",
    "metadata": {"name": "all"},
    "spec": {"hard": {"requests.cpu": "64", "limits.cpu": "64", "limits.memory": "256Gi"}},
}
"""As of a shared cluster: it refuses a pod that does not say how much CPU it takes at most."""
NO_SCALING = {
    "apiVersion": "autoscaling/v2",
    "kind": "HorizontalPodAutoscaler",
    "metadata": {"name": "serving"},
    "$patch": "delete",
}


def none_of(kind: str, name: str) -> Object:
    """A patch by which a workload has no pods."""
    return {"apiVersion": "apps/v1", "kind": kind, "metadata": {"name": name}, "spec": {"replicas": 0}}


def values(postgres: Postgres) -> dict[str, Any]:
    """Those of the deployment with the database of the tests, one web server, and a limit of CPU for the pods of runs."""
    found: dict[str, Any] = read_yaml("k8s", "dagster-values.yaml")
    found["postgresql"] |= {"postgresqlHost": "127.0.0.1", "service": {"port": postgres.port}}
    found["dagsterWebserver"]["replicaCount"] = 1
    found["dagsterDaemon"]["runMonitoring"] |= MONITORING
    found["runLauncher"]["config"]["k8sRunLauncher"]["resources"]["limits"]["cpu"] = "1"
    return found


@pytest.fixture(scope="module")
def dagster(installed: Installation) -> DagsterApi:
    (address,) = installed.nodes.addresses(component="dagster-webserver")
    found = DagsterApi(f"http://{address}:{WEB_PORT}", "recsys")
    eventually(found.is_loaded)
    return found


def pods_of(installed: Installation, run: str) -> list[Object]:
    """Those of the run and of its steps."""
    return installed.items("pods", labelSelector=f"dagster/run-id={run}")


def component(installed: Installation, run: str, name: str) -> list[Object]:
    return [pod for pod in pods_of(installed, run) if pod["metadata"]["labels"]["app.kubernetes.io/component"] == name]


def running(pods: list[Object]) -> list[str]:
    return [pod["metadata"]["name"] for pod in pods if pod["status"]["phase"] == "Running"]


def phases(pods: list[Object]) -> set[str]:
    return {pod["status"]["phase"] for pod in pods}


def test_the_commands_after_an_installation_and_an_upgrade_work(installed: Installation) -> None:
    """What a person does by `kubectl exec` in the daemon's pod, and may do twice."""
    (daemon,) = [pod for pod in installed.items("pods") if pod["metadata"]["labels"].get("component") == "dagster-daemon"]
    name = daemon["metadata"]["name"]
    pools = "for pool in hourly spark training; do dagster instance concurrency set $pool 1; done"
    for command in (["sh", "-c", pools], ["dagster", "instance", "migrate"], ["dagster", "instance", "migrate"]):
        assert installed.nodes.run(name, command, 240), command


def test_a_run_and_its_steps_are_pods_of_their_own_and_within_the_quota(installed: Installation, dagster: DagsterApi) -> None:
    run = dagster.launch(JOB)
    dagster.succeeds(run, RUN_SECONDS)
    assert len(component(installed, run, "run_worker")) == 1
    steps = component(installed, run, "step_worker")
    assert len(steps) > 2
    assert {pod["spec"]["serviceAccountName"] for pod in steps} == {"recsys-step"}
    assert {pod["spec"]["imagePullSecrets"][0]["name"] for pod in pods_of(installed, run)} == {"recsys-registry"}
    assert all("cpu" in pod["spec"]["containers"][0]["resources"]["limits"] for pod in pods_of(installed, run))
    eventually(lambda: phases(pods_of(installed, run)) == {"Succeeded"})


def test_the_quota_refuses_a_pod_without_a_limit(installed: Installation) -> None:
    """The check of the check."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "any"},
        "spec": {"containers": [{"name": "a", "image": "a"}]},
    }
    with pytest.raises(Refused, match=r"must specify limits\.cpu"):
        installed.plane.api.post(f"/api/v1/namespaces/{NAMESPACE}/pods", pod, dryRun="All")


def test_only_pods_that_need_them_have_the_keys_of_the_stores(installed: Installation) -> None:
    having = {
        pod["metadata"]["labels"].get("component") or pod["metadata"]["labels"].get("app.kubernetes.io/component")
        for pod in installed.items("pods")
        if "recsys-secrets" in json.dumps(pod["spec"])
    }
    assert having == {"user-deployments", "run_worker", "step_worker"}


def test_a_run_whose_pod_is_lost_goes_on_in_a_new_one(installed: Installation, dagster: DagsterApi, note: Note) -> None:
    run = dagster.launch(JOB)
    eventually(lambda: running(component(installed, run, "step_worker")), RUN_SECONDS)
    (first,) = running(component(installed, run, "run_worker"))
    installed.nodes.signal(first, signal.SIGKILL)
    dagster.succeeds(run, RUN_SECONDS)
    eventually(lambda: phases(component(installed, run, "run_worker")) == {"Failed", "Succeeded"})
    note(_drill("the pod of the run is killed", "0 steps", "resumed in a new pod"))


def test_a_step_whose_pod_is_lost_is_made_again(installed: Installation, dagster: DagsterApi, note: Note) -> None:
    run = dagster.launch(JOB)
    (step, *_) = eventually(lambda: running(component(installed, run, "step_worker")), RUN_SECONDS)
    installed.nodes.signal(step, signal.SIGKILL)
    dagster.succeeds(run, RUN_SECONDS)
    assert [event["__typename"] for event in dagster.events(run)].count("ExecutionStepUpForRetryEvent") == 1
    note(_drill("the pod of a step is killed", "0 steps", "that step again in a new pod"))


def _drill(fault: str, lost: str, degraded: str) -> Drill:
    return Drill("Dagster on Kubernetes and PostgreSQL", f"the job {JOB}, a pod a step", fault, lost, degraded)
