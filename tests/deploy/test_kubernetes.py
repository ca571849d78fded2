"""The manifests: valid against the Kubernetes schemas as they are and as overlays, and at one with settings and images."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from deployment import DEPLOY, assert_valid, is_setting, label, program, read_yaml, settings_of

from recsys_core.settings import load_settings
from recsys_core.spark import spark_conf
from recsys_core.spark_s3 import CREDENTIALS
from serving.server import LIVE

K8S = DEPLOY / "k8s"
OVERLAYS = ("production", "small")
SECRETS = {"serving": "recsys-serving-secrets", "stream": "recsys-stream-secrets"}
"""Of each workload its own: what applications reach must not hold the keys of what writes."""
WORKLOADS = {"Deployment", "StatefulSet"}
NOT_MANIFESTS = {"kustomization.yaml", "executor.yaml"}


def documents(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document]


def written() -> list[dict[str, Any]]:
    """The manifests of the base, as they are in the files."""
    files = sorted((K8S / "base").glob("*.yaml"))
    return [d for file in files if file.name not in NOT_MANIFESTS for d in documents(file.read_text())]


def rendered(folder: Path) -> list[dict[str, Any]]:
    """What kustomize makes of a folder."""
    if kustomize := program("kustomize"):
        command = [kustomize, "build", str(folder)]
    elif kubectl := program("kubectl"):
        command = [kubectl, "kustomize", str(folder)]
    else:
        pytest.skip("no kustomize and no kubectl here: go install sigs.k8s.io/kustomize/kustomize/v5@latest")
    made = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert made.returncode == 0, made.stderr
    assert "Warning" not in made.stderr, made.stderr
    return documents(made.stdout)


def named(manifests: list[dict[str, Any]], wanted: str) -> dict[str, Any]:
    (found,) = [manifest for manifest in manifests if label(manifest) == wanted]
    return found


def of_kind(manifests: list[dict[str, Any]], *kinds: str) -> Iterator[dict[str, Any]]:
    return (manifest for manifest in manifests if manifest["kind"] in kinds)


def container(workload: dict[str, Any]) -> dict[str, Any]:
    (only,) = workload["spec"]["template"]["spec"]["containers"]
    found: dict[str, Any] = only
    return found


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return rendered(K8S / "overlays" / request.param)


# -- every manifest ----------------------------------------------------------------------------------------------------


def test_what_is_written_is_valid() -> None:
    manifests = written()
    assert {m["kind"] for m in manifests} >= WORKLOADS | {"Service", "HorizontalPodAutoscaler", "PodDisruptionBudget"}
    for manifest in manifests:
        assert_valid(manifest)


def test_the_schemas_refuse_a_name_that_kubernetes_does_not_know() -> None:
    wrong = named(written(), "Deployment/serving")
    container(wrong)["redinessProbe"] = container(wrong).pop("readinessProbe")
    with pytest.raises(pytest.fail.Exception, match="redinessProbe"):
        assert_valid(wrong)


def test_an_overlay_is_valid_and_whole(overlay: list[dict[str, Any]]) -> None:
    for manifest in overlay:
        assert_valid(manifest)
        assert manifest["metadata"]["labels"]["app.kubernetes.io/part-of"] == "recsys", label(manifest)
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"]["namespace"] == "recsys", label(manifest)
    assert {label(m) for m in written()} <= {label(m) for m in overlay}


def test_what_a_pod_mounts_and_reads_is_there(overlay: list[dict[str, Any]]) -> None:
    there = {label(m) for m in overlay}
    for workload in of_kind(overlay, *WORKLOADS):
        pod = workload["spec"]["template"]["spec"]
        assert f"ServiceAccount/{pod['serviceAccountName']}" in there
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in container(workload)["volumeMounts"]} == set(volumes)
        for volume in volumes.values():
            if "configMap" in volume:
                assert f"ConfigMap/{volume['configMap']['name']}" in there
        assert [source["secretRef"]["name"] for source in container(workload)["envFrom"]] == [
            SECRETS[workload["metadata"]["name"]]
        ]
        for variable in container(workload).get("env", ()):
            assert not variable["name"].startswith("RECSYS_") or is_setting(variable["name"]), variable


def test_selectors_reach_the_pods_they_mean(overlay: list[dict[str, Any]]) -> None:
    pods = {m["metadata"]["name"]: m["spec"]["template"]["metadata"]["labels"] for m in of_kind(overlay, *WORKLOADS)}
    ports = {m["metadata"]["name"]: {p["name"] for p in container(m)["ports"]} for m in of_kind(overlay, *WORKLOADS)}
    for workload in of_kind(overlay, *WORKLOADS):
        assert workload["spec"]["selector"]["matchLabels"].items() <= pods[workload["metadata"]["name"]].items()
    for service in of_kind(overlay, "Service"):
        if "selector" in service["spec"]:
            name = service["metadata"]["name"]
            assert service["spec"]["selector"].items() <= pods[name].items(), name
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports[name]
    for budget in of_kind(overlay, "PodDisruptionBudget"):
        assert budget["spec"]["selector"]["matchLabels"].items() <= pods[budget["metadata"]["name"]].items()
    for scaler in of_kind(overlay, "HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        assert "replicas" not in named(overlay, f"{target['kind']}/{target['name']}")["spec"]


def test_a_new_pod_finds_a_node_before_an_old_one_goes(overlay: list[dict[str, Any]]) -> None:
    """On as many nodes as there are replicas, one that may not share a node with another would wait for ever."""
    for workload in of_kind(overlay, "Deployment"):
        if workload["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0:
            affinity = workload["spec"]["template"]["spec"].get("affinity", {}).get("podAntiAffinity", {})
            assert not affinity.get("requiredDuringSchedulingIgnoredDuringExecution"), label(workload)


def test_no_pod_is_root_or_may_become_it_or_writes_to_its_image(overlay: list[dict[str, Any]]) -> None:
    for workload in of_kind(overlay, *WORKLOADS):
        pod, only = workload["spec"]["template"]["spec"], container(workload)
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not pod["automountServiceAccountToken"]
        assert only["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert only["resources"]["requests"]["cpu"]
        assert only["resources"]["limits"]["memory"]
        assert re.search(r":\d+\.\d+\.\d+", only["image"]), only["image"]


# -- serving -----------------------------------------------------------------------------------------------------------


def test_a_server_takes_calls_once_it_says_serving_and_is_not_restarted_for_lack_of_a_release() -> None:
    server = container(named(written(), "Deployment/serving"))
    asked = {probe: server[f"{probe}Probe"]["grpc"] for probe in ("startup", "readiness", "liveness")}
    port = int(next(v["value"] for v in server["env"] if v["name"] == "RECSYS_SERVING__HEALTH_PORT"))
    assert {probe: how["port"] for probe, how in asked.items()} == dict.fromkeys(asked, port)
    assert asked["readiness"].get("service", "") == "", "the whole server, which needs a release"
    assert asked["startup"]["service"] == asked["liveness"]["service"] == LIVE, "the process, which does not"
    assert port in [p["containerPort"] for p in server["ports"]]
    deployment = named(written(), "Deployment/serving")["spec"]
    assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


def test_production_has_a_process_for_each_core_that_a_server_asks_for_and_scales_far() -> None:
    manifests = rendered(K8S / "overlays" / "production")
    server = container(named(manifests, "Deployment/serving"))
    processes = [variable["value"] for variable in server["env"] if variable["name"] == "RECSYS_SERVING__PROCESSES"]
    assert processes == [server["resources"]["requests"]["cpu"]]
    scaler = named(manifests, "HorizontalPodAutoscaler/serving")["spec"]
    assert scaler["minReplicas"] >= 3
    assert scaler["maxReplicas"] > scaler["minReplicas"]


def test_the_small_overlay_fits_a_node_without_a_gpu() -> None:
    manifests = rendered(K8S / "overlays" / "small")
    assert "nvidia.com/gpu" not in yaml.safe_dump_all(manifests)
    assert named(manifests, "HorizontalPodAutoscaler/serving")["spec"]["minReplicas"] == 1


# -- stream ------------------------------------------------------------------------------------------------------------


def test_a_worker_keeps_its_name_so_that_a_restart_moves_no_partition() -> None:
    stream = named(written(), "StatefulSet/stream")
    assert stream["spec"]["podManagementPolicy"] == "Parallel"
    (name,) = [variable for variable in container(stream)["env"] if variable["name"] == "RECSYS_STREAM__INSTANCE_ID"]
    assert name["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"
    service = named(written(), f"Service/{stream['spec']['serviceName']}")
    assert service["spec"]["clusterIP"] == "None"


# -- settings, accounts, network ---------------------------------------------------------------------------------------


def test_the_settings_are_known_and_name_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(K8S / "base" / "recsys.toml", monkeypatch)
    manifests = written()
    assert settings.dagster.executor == "k8s"
    assert settings.dagster.automation
    accounts = {m["metadata"]["name"] for m in of_kind(manifests, "ServiceAccount")}
    conf = settings.spark.conf
    used = {conf["spark.kubernetes.authenticate.executor.serviceAccountName"]}
    assert {settings.kubernetes.step_account, settings.kubernetes.spark_account} | used <= accounts
    host = settings.kafka.bootstrap_servers.partition(":")[0]
    assert named(manifests, f"Service/{host}")["spec"]["type"] == "ExternalName"
    assert conf["spark.kubernetes.namespace"] == named(manifests, "Namespace/recsys")["metadata"]["name"]
    assert settings.serving.port == container(named(manifests, "Deployment/serving"))["ports"][0]["containerPort"]


def test_what_a_run_knows_of_its_pod_is_added_to_the_spark_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = read_yaml("dagster.yaml")["run_launcher"]["config"]["run_k8s_config"]["container_config"]["env"]
    (conf,) = [variable["value"] for variable in environment if variable["name"] == "RECSYS_SPARK__CONF"]
    before = settings_of(K8S / "base" / "recsys.toml", monkeypatch)
    monkeypatch.setenv("RECSYS_SPARK__CONF", conf.replace("$(POD_IP)", "10.0.0.7").replace("$(POD_NAME)", "step-1"))
    added = {"spark.driver.host": "10.0.0.7", "spark.kubernetes.driver.pod.name": "step-1"}
    assert load_settings().spark.conf == {**before.spark.conf, **added}


def test_spark_logs_in_to_the_store_by_the_whole_chain_so_that_workload_identity_does(monkeypatch: pytest.MonkeyPatch) -> None:
    conf = spark_conf(settings_of(K8S / "base" / "recsys.toml", monkeypatch))
    assert conf["spark.hadoop.fs.s3a.aws.credentials.provider"] == CREDENTIALS


def test_the_pod_of_an_executor_is_valid_and_is_reached_by_its_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    (template,) = documents((K8S / "base" / "executor.yaml").read_text())
    template["metadata"]["name"] = "made-by-spark"
    assert_valid(template)
    conf = settings_of(K8S / "base" / "recsys.toml", monkeypatch).spark.conf
    assert conf["spark.kubernetes.executor.podTemplateFile"] == "/etc/recsys/executor.yaml"
    assert conf["spark.kubernetes.container.image"] == template["spec"]["containers"][0]["image"]
    policy = named(written(), "NetworkPolicy/spark-executor")
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()


def test_only_spark_drivers_have_rights_and_only_over_what_spark_makes() -> None:
    manifests = written()
    (binding,) = of_kind(manifests, "RoleBinding")
    assert [subject["name"] for subject in binding["subjects"]] == ["recsys-spark"]
    assert not list(of_kind(manifests, "ClusterRole", "ClusterRoleBinding"))
    for rule in named(manifests, f"Role/{binding['roleRef']['name']}")["rules"]:
        assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"]
        assert set(rule["resources"]) <= {"pods", "configmaps", "persistentvolumeclaims"}
    for account in of_kind(manifests, "ServiceAccount"):
        assert account.get("automountServiceAccountToken", True) == (account["metadata"]["name"] == "recsys-spark")


def test_the_network_lets_through_the_ports_that_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(K8S / "base" / "recsys.toml", monkeypatch)
    kafka = int(settings.kafka.bootstrap_servers.rpartition(":")[2])

    def ports(policy: str, way: str) -> set[int]:
        rules = named(written(), f"NetworkPolicy/{policy}")["spec"][way]
        found = [port for rule in rules for port in rule.get("ports", ())]
        return {number for port in found for number in range(port["port"], port.get("endPort", port["port"]) + 1)}

    assert ports("serving", "ingress") == {50051, 9464}
    assert ports("serving", "egress") >= {53, 443, 6379}
    assert ports("stream", "egress") >= {53, 443, 6379, kafka}


def test_the_operators_alerts_are_those_of_prometheus_and_its_pods_have_the_port() -> None:
    monitoring = K8S / "components" / "monitoring"
    (rules,) = documents((monitoring / "rules.yaml").read_text())
    assert rules["spec"] == read_yaml("prometheus", "alerts.yaml")
    (pods,) = documents((monitoring / "pods.yaml").read_text())
    (endpoint,) = pods["spec"]["podMetricsEndpoints"]
    (chosen,) = pods["spec"]["selector"]["matchExpressions"]
    workloads = {m["metadata"]["name"]: container(m) for m in of_kind(written(), *WORKLOADS)}
    assert set(chosen["values"]) == set(workloads)
    assert all(endpoint["port"] in {port["name"] for port in found["ports"]} for found in workloads.values())


def test_no_secret_is_written_down() -> None:
    for file in K8S.rglob("*"):
        if file.is_file():
            text = file.read_text()
            assert "kind: Secret" not in text, file
            assert not re.search(r"(?i)(password|secret_access_key|[^t]token)['\"]?\s*[:=]\s*['\"]?[a-z0-9]", text), file
