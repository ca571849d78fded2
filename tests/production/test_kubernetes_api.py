"""The manifests and the pods of runs, before a real API server: what it takes, what it warns of, and who may do what."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from control_plane import ControlPlane, fetched
from dagster_k8s import K8sRunLauncher
from deployment import DEPLOY, instance_at, read_yaml, settings_of
from helm_chart import RULES, manifests_of
from kube_api import Refused
from run_jobs import job, steps_of

from recsys_assets.definitions import build_definitions
from recsys_core.settings import LakeSettings, ReleaseSettings

NAMESPACE = "recsys"
OPERATOR = "github.com/prometheus-operator/prometheus-operator@v0.85.0"
OVERLAYS = ("production", "small")
OF_EVERYBODY = {"authentication.k8s.io", "authorization.k8s.io"}
"""Groups in which every account may ask who it is and what it may do."""


@pytest.fixture(scope="module")
def definitions() -> dg.Definitions:
    """The code location with the settings of Kubernetes, but for its stores."""
    with pytest.MonkeyPatch.context() as patch:
        settings = settings_of(DEPLOY / "k8s" / "base" / "recsys.toml", patch)
    stores = {"lake": LakeSettings(uri="memory://lake"), "release": ReleaseSettings(uri="memory://releases")}
    return build_definitions(settings.model_copy(update=stores))


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[K8sRunLauncher]:
    """That of the production instance."""
    config = read_yaml("dagster.yaml")
    config["storage"] = {"sqlite": {"base_dir": str(tmp_path / "storage")}}
    with instance_at(tmp_path / "dagster", config) as made:
        assert isinstance(made.run_launcher, K8sRunLauncher)
        yield made.run_launcher


@pytest.fixture(scope="module")
def applied(plane: ControlPlane) -> ControlPlane:
    """With the overlay of production and what Dagster's chart makes of the values."""
    said(plane, "apply", "--kustomize", str(DEPLOY / "k8s" / "overlays" / "production"))
    chart = yaml.safe_dump_all(manifests_of(read_yaml("k8s", "dagster-values.yaml")))
    said(plane, "apply", "--namespace", NAMESPACE, "--validate=strict", "--filename", "-", stdin=chart)
    return plane


def said(plane: ControlPlane, *words: str, stdin: str | None = None) -> str:
    """What kubectl prints of a command that ends well and warns of nothing."""
    done = plane.kubectl(*words, stdin=stdin)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_applied_without_a_warning(plane: ControlPlane, overlay: str) -> None:
    printed = said(plane, "apply", "--validate=strict", "--kustomize", str(DEPLOY / "k8s" / "overlays" / overlay))
    assert "deployment.apps/serving" in printed
    assert "statefulset.apps/stream" in printed


def test_an_overlay_with_monitoring_is_what_the_prometheus_operator_knows(plane: ControlPlane, tmp_path: Path) -> None:
    """Held against the operator's own definitions."""
    for kind in ("podmonitors", "prometheusrules"):
        definition = fetched(OPERATOR) / "example" / "prometheus-operator-crd" / f"monitoring.coreos.com_{kind}.yaml"
        said(plane, "create", "--filename", str(definition))
        said(plane, "wait", "--for=condition=established", f"crd/{kind}.monitoring.coreos.com")
    shutil.copytree(DEPLOY / "k8s", tmp_path / "k8s")
    overlay = tmp_path / "k8s" / "overlays" / "production"
    with open(overlay / "kustomization.yaml", "a") as written:
        written.write("components: [../../components/monitoring]\n")
    printed = said(plane, "apply", "--validate=strict", "--kustomize", str(overlay))
    assert "podmonitor.monitoring.coreos.com/recsys created" in printed
    assert "prometheusrule.monitoring.coreos.com/recsys created" in printed


def test_the_api_server_warns_of_a_pod_that_is_not_restricted(applied: ControlPlane) -> None:
    """The check of the check: the namespace's labels work."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "careless"},
        "spec": {"containers": [{"name": "it", "image": "it"}]},
    }
    careless = applied.kubectl("create", "-n", NAMESPACE, "--dry-run=server", "-f", "-", stdin=yaml.safe_dump(pod))
    assert careless.returncode == 0
    assert "would violate PodSecurity" in careless.stderr
    pod["spec"]["hostNetwork"] = True  # type: ignore[index]
    refused = applied.kubectl("create", "-n", NAMESPACE, "--dry-run=server", "-f", "-", stdin=yaml.safe_dump(pod))
    assert refused.returncode != 0


def test_the_jobs_and_pods_of_runs_and_of_all_steps_are_taken(
    applied: ControlPlane, launcher: K8sRunLauncher, definitions: dg.Definitions
) -> None:
    jobs = [job(launcher, None, "run")]
    jobs += [job(launcher, step, f"step-{number}") for number, step in enumerate(steps_of(definitions))]
    assert len(jobs) > 30
    said(applied, *DRY_RUN, stdin=yaml.safe_dump_all(jobs))
    said(applied, *DRY_RUN, stdin=yaml.safe_dump_all(pod_of(one) for one in jobs))


DRY_RUN = ("create", "--namespace", NAMESPACE, "--dry-run=server", "--validate=strict", "--filename", "-")


def pod_of(made: dict[str, Any]) -> dict[str, Any]:
    template = made["spec"]["template"]
    name = made["metadata"]["name"]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {**template["metadata"], "name": name}, "spec": template["spec"]}


def rights(plane: ControlPlane, account: str) -> set[tuple[str, str]]:
    """(resource, verb) of all that an account may do in the namespace, by its own word and token."""
    asked = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview", "spec": {"namespace": NAMESPACE}}
    path = "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews"
    rules = plane.as_account(NAMESPACE, account).post(path, asked)["status"]["resourceRules"]
    own = [rule for rule in rules if not set(rule["apiGroups"]) & OF_EVERYBODY]
    return {(resource, verb) for rule in own for resource in rule["resources"] for verb in rule["verbs"]}


@pytest.mark.parametrize("account", ["recsys-step", "recsys-serving", "recsys-stream"])
def test_steps_servers_and_workers_may_do_nothing(applied: ControlPlane, account: str) -> None:
    assert rights(applied, account) == set()
    with pytest.raises(Refused, match="cannot list resource"):
        applied.as_account(NAMESPACE, account).get(f"/api/v1/namespaces/{NAMESPACE}/pods")


def test_a_spark_driver_may_only_make_what_executors_need(applied: ControlPlane) -> None:
    may = rights(applied, "recsys-spark")
    assert {resource for resource, _ in may} == {"pods", "configmaps", "persistentvolumeclaims"}
    driver = applied.as_account(NAMESPACE, "recsys-spark")
    assert driver.items(f"/api/v1/namespaces/{NAMESPACE}/configmaps")
    for path in (f"/api/v1/namespaces/{NAMESPACE}/secrets", "/api/v1/namespaces/default/pods", "/api/v1/nodes"):
        with pytest.raises(Refused, match="forbidden"):
            driver.get(path)


def test_dagster_may_only_work_with_jobs_pods_and_events(applied: ControlPlane) -> None:
    assert rights(applied, "dagster") == {
        (what, verb) for rule in RULES for what in rule["resources"] for verb in rule["verbs"]
    }
    with pytest.raises(Refused, match="forbidden"):
        applied.as_account(NAMESPACE, "dagster").get(f"/api/v1/namespaces/{NAMESPACE}/secrets")
