"""What Dagster's Helm chart makes of its values, written down from its own templates, since it can't be fetched here.

Left out: init containers that wait for the database and for the code location.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

RELEASE = "dagster"
NAME = "dagster"
USER = "dagster-dagster-user-deployments"
WEBSERVER = "dagster-dagster-webserver"
WEB_PORT = 80
RULES = [
    {"apiGroups": ["batch"], "resources": ["jobs", "jobs/status"], "verbs": ["*"]},
    {"apiGroups": [""], "resources": ["pods", "pods/log", "pods/status", "events"], "verbs": ["*"]},
]

Manifest = dict[str, Any]


def snake(name: str) -> str:
    return re.sub(r"([A-Z])", lambda capital: f"_{capital.group(1).lower()}", name)


def snaked(section: Mapping[str, Any]) -> dict[str, Any]:
    return {snake(name): value for name, value in section.items()}


def instance_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The instance that the chart writes, but for its storage."""
    daemon, launcher = values["dagsterDaemon"], values["runLauncher"]["config"]["k8sRunLauncher"]
    config = snaked({name: value for name, value in launcher.items() if name != "runK8sConfig"})
    config |= {
        "env_secrets": [secret["name"] for secret in launcher["envSecrets"]],
        "run_k8s_config": snaked(launcher["runK8sConfig"]),
        "service_account_name": values["serviceAccount"]["name"],
        "instance_config_map": f"{NAME}-instance",
        "postgres_password_secret": values["global"]["postgresqlSecretName"],
        "dagster_home": values["global"]["dagsterHome"],
        **({"image_pull_secrets": values["imagePullSecrets"]} if values.get("imagePullSecrets") else {}),
    }
    concurrency = values["concurrency"]
    retention = {snake(n): snaked(v) for n, v in values["retention"].items() if n != "enabled"}
    return {
        "run_launcher": {"module": "dagster_k8s", "class": values["runLauncher"]["type"], "config": config},
        "concurrency": {"pools": snaked(concurrency["pools"]), "runs": snaked(concurrency["runs"])},
        "run_monitoring": snaked(daemon["runMonitoring"]),
        "schedules": snaked(daemon["schedules"]),
        "sensors": snaked(daemon["sensors"]),
        "retention": retention,
        "telemetry": values["telemetry"],
        **values["additionalInstanceConfig"],
    }


def manifests_of(values: Mapping[str, Any]) -> list[Manifest]:
    """What `helm install dagster dagster/dagster` applies."""
    postgres = values["postgresql"]
    database = {
        "username": postgres["postgresqlUsername"],
        "password": {"env": "DAGSTER_PG_PASSWORD"},
        "hostname": postgres["postgresqlHost"],
        "db_name": postgres["postgresqlDatabase"],
        "port": postgres["service"]["port"],
        "scheme": postgres["postgresqlScheme"],
    }
    manager = values["computeLogManager"]["type"]
    instance = {
        "storage": {"postgres": {"postgres_db": database}},
        "run_coordinator": {
            "module": "dagster.core.run_coordinator",
            "class": values["dagsterDaemon"]["runCoordinator"]["type"],
        },
        "compute_logs": {"module": "dagster.core.storage.noop_compute_log_manager", "class": manager},
        **instance_of(values),
    }
    locations = values["dagster-user-deployments"]["deployments"]
    servers = [{"grpc_server": {"host": one["name"], "port": one["port"], "location_name": one["name"]}} for one in locations]
    home = {"DAGSTER_HOME": values["global"]["dagsterHome"]}
    found = [
        *_account(values["serviceAccount"]["name"], NAME),
        *_account(f"{USER}-user-deployments", USER),
        _config(f"{NAME}-instance", {"dagster.yaml": yaml.safe_dump(instance)}),
        _config(f"{NAME}-workspace-yaml", {"workspace.yaml": yaml.safe_dump({"load_from": servers})}),
        _config(f"{NAME}-webserver-env", home),
        _config(f"{NAME}-daemon-env", home),
        _config(f"{USER}-shared-env", home),
        _service(WEBSERVER, WEB_PORT, {"component": "dagster-webserver"}, "http"),
        _webserver(values),
        _daemon(values),
    ]
    for one in locations:
        found += [_service(one["name"], one["port"], {"deployment": one["name"]}, "grpc"), _location(values, one)]
    return found


def _account(name: str, role: str) -> list[Manifest]:
    subject = {"kind": "ServiceAccount", "name": name}
    group = "rbac.authorization.k8s.io"
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}},
        {"apiVersion": f"{group}/v1", "kind": "Role", "metadata": {"name": f"{role}-role"}, "rules": RULES},
        {
            "apiVersion": f"{group}/v1",
            "kind": "RoleBinding",
            "metadata": {"name": f"{role}-rolebinding"},
            "subjects": [subject],
            "roleRef": {"kind": "Role", "name": f"{role}-role", "apiGroup": group},
        },
    ]


def _config(name: str, data: Mapping[str, str]) -> Manifest:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": dict(data)}


def _labels(more: Mapping[str, str]) -> dict[str, str]:
    return {"app.kubernetes.io/name": NAME, "app.kubernetes.io/instance": RELEASE, **more}


def _service(name: str, port: int, labels: Mapping[str, str], port_name: str) -> Manifest:
    spec = {"type": "ClusterIP", "selector": _labels(labels), "ports": [{"port": port, "protocol": "TCP", "name": port_name}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def _image(section: Mapping[str, Any]) -> str:
    return f"{section['image']['repository']}:{section['image']['tag']}"


def _password(values: Mapping[str, Any]) -> Manifest:
    key = {"name": values["global"]["postgresqlSecretName"], "key": "postgresql-password"}
    return {"name": "DAGSTER_PG_PASSWORD", "valueFrom": {"secretKeyRef": key}}


def _deployment(
    name: str,
    replicas: int,
    labels: Mapping[str, str],
    account: str,
    section: Mapping[str, Any],
    container: Manifest,
    **pod: Any,
) -> Manifest:
    container = {
        "name": name,
        "image": _image(section),
        "imagePullPolicy": section["image"]["pullPolicy"],
        "securityContext": section["securityContext"],
        "resources": section["resources"],
        **container,
    }
    spec = {
        "serviceAccountName": account,
        "automountServiceAccountToken": True,
        "securityContext": section["podSecurityContext"],
        "containers": [container],
        **pod,
    }
    template = {"metadata": {"labels": _labels(labels)}, "spec": spec}
    deployment = {"replicas": replicas, "selector": {"matchLabels": _labels(labels)}, "template": template}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": deployment}


def _of_dagster(values: Mapping[str, Any], environment: str) -> tuple[Manifest, dict[str, Any]]:
    """What the containers of the web server and of the daemon have in common, and their pods."""
    home = values["global"]["dagsterHome"]
    mounts = [
        {"name": "dagster-instance", "mountPath": f"{home}/dagster.yaml", "subPath": "dagster.yaml"},
        {"name": "dagster-workspace-yaml", "mountPath": "/dagster-workspace/"},
    ]
    volumes = [
        {"name": "dagster-instance", "configMap": {"name": f"{NAME}-instance"}},
        {"name": "dagster-workspace-yaml", "configMap": {"name": f"{NAME}-workspace-yaml"}},
    ]
    container = {"env": [_password(values)], "envFrom": [{"configMapRef": {"name": environment}}], "volumeMounts": mounts}
    return container, {"volumes": volumes, "imagePullSecrets": _pull_secrets(values)}


def _pull_secrets(values: Mapping[str, Any]) -> Sequence[Manifest]:
    found: Sequence[Manifest] = values.get("imagePullSecrets", [])
    return found


def _webserver(values: Mapping[str, Any]) -> Manifest:
    section = values["dagsterWebserver"]
    container, pod = _of_dagster(values, f"{NAME}-webserver-env")
    command = f"dagster-webserver -h 0.0.0.0 -p {WEB_PORT} -w /dagster-workspace/workspace.yaml"
    container |= {
        "command": ["/bin/bash", "-c", command],
        "ports": [{"name": "http", "containerPort": WEB_PORT, "protocol": "TCP"}],
        "readinessProbe": {
            "httpGet": {"path": "/server_info", "port": WEB_PORT},
            "periodSeconds": 20,
            "timeoutSeconds": 10,
            "successThreshold": 1,
            "failureThreshold": 3,
        },
    }
    labels = {"component": "dagster-webserver"}
    return _deployment(WEBSERVER, section["replicaCount"], labels, values["serviceAccount"]["name"], section, container, **pod)


def _daemon(values: Mapping[str, Any]) -> Manifest:
    container, pod = _of_dagster(values, f"{NAME}-daemon-env")
    command = "dagster-daemon run -w /dagster-workspace/workspace.yaml"
    container |= {"command": ["/bin/bash", "-c", command]}
    labels = {"component": "dagster-daemon", "deployment": "daemon"}
    return _deployment(f"{NAME}-daemon", 1, labels, values["serviceAccount"]["name"], values["dagsterDaemon"], container, **pod)


def _location(values: Mapping[str, Any], one: Mapping[str, Any]) -> Manifest:
    port = str(one["port"])
    probe = {name: value for name, value in one["readinessProbe"].items() if name != "enabled"}
    sources = [{"configMapRef": {"name": f"{USER}-shared-env"}}, *({"secretRef": secret} for secret in one["envSecrets"])]
    container = {
        "args": ["dagster", "api", "grpc", "-h", "0.0.0.0", "-p", port, *one["dagsterApiGrpcArgs"]],
        "env": [{"name": "DAGSTER_CURRENT_IMAGE", "value": _image(one)}, _password(values), *one["env"]],
        "envFrom": sources,
        "volumeMounts": one["volumeMounts"],
        "readinessProbe": {"exec": {"command": ["dagster", "api", "grpc-health-check", "-p", port]}, **probe},
    }
    pod = {"volumes": one["volumes"], "imagePullSecrets": values["dagster-user-deployments"].get("imagePullSecrets", [])}
    labels = {"component": "user-deployments", "deployment": one["name"]}
    return _deployment(f"{USER}-{one['name']}", 1, labels, f"{USER}-user-deployments", one, container, **pod)
