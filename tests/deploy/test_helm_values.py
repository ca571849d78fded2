"""The values of Dagster's Helm chart: names that the chart knows, and the same instance as deploy/dagster.yaml.

The names and how the chart writes them into its instance's ConfigMap were read in the chart's own schema and templates
(helm/dagster/schema, helm/dagster/templates/helpers/instance); the chart itself can't be fetched by these tests.
"""

from __future__ import annotations

from typing import Any

import pytest
from deployment import DEPLOY, read_yaml
from helm_chart import instance_of

TOP = """global dagsterWebserver dagster-user-deployments postgresql generatePostgresqlPasswordSecret generateCeleryConfigSecret
    rabbitmq redis flower ingress imagePullSecrets computeLogManager scheduler runLauncher pythonLogs dagsterDaemon busybox
    migrate telemetry serviceAccount retention concurrency additionalInstanceConfig"""
POD = """image env envConfigMaps envSecrets deploymentLabels labels nodeSelector affinity tolerations podSecurityContext
    securityContext resources livenessProbe readinessProbe startupProbe annotations schedulerName volumeMounts volumes"""
KNOWN = {
    "": TOP,
    "dagsterWebserver": f"{POD} replicaCount nameOverride pathPrefix service workspace enableReadOnly dbStatementTimeout "
    "dbPoolRecycle logLevel",
    "dagsterDaemon": f"{POD} enabled runCoordinator heartbeatTolerance runMonitoring runRetries sensors schedules",
    "dagsterDaemon.runMonitoring": "enabled startTimeoutSeconds cancelTimeoutSeconds maxResumeRunAttempts pollIntervalSeconds "
    "freeSlotsAfterRunEndSeconds",
    "dagsterDaemon.runRetries": "enabled maxRetries",
    "dagsterDaemon.sensors": "useThreads numWorkers numSubmitWorkers",
    "dagsterDaemon.schedules": "useThreads numWorkers numSubmitWorkers",
    "concurrency": "enabled pools runs",
    "concurrency.pools": "defaultLimit granularity opGranularityRunBuffer",
    "concurrency.runs": "maxConcurrentRuns tagConcurrencyLimits",
    "postgresql": "postgresqlScheme image enabled postgresqlHost postgresqlUsername postgresqlPassword postgresqlDatabase "
    "postgresqlParams service",
    "runLauncher.config.k8sRunLauncher": "image imagePullPolicy jobNamespace loadInclusterConfig kubeconfigFile envConfigMaps "
    "envSecrets envVars volumeMounts volumes labels failPodOnRunFailure resources schedulerName securityContext runK8sConfig",
    "runLauncher.config.k8sRunLauncher.runK8sConfig": "containerConfig podSpecConfig podTemplateSpecMetadata jobSpecConfig "
    "jobMetadata",
    "retention": "enabled sensor schedule autoMaterialize",
    "dagster-user-deployments": "enabled enableSubchart imagePullSecrets deployments",
}
DEPLOYMENT = f"{POD} name dagsterApiGrpcArgs codeServerArgs includeConfigInLaunchedRuns port"
TICKS = {"skipped", "success", "failure", "started"}


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    found: dict[str, Any] = read_yaml("k8s", "dagster-values.yaml")
    return found


def at(values: dict[str, Any], path: str) -> dict[str, Any]:
    for name in filter(None, path.split(".")):
        values = values[name]
    return values


@pytest.mark.parametrize("section", KNOWN)
def test_the_chart_knows_every_name(values: dict[str, Any], section: str) -> None:
    assert set(at(values, section)) - set(KNOWN[section].split()) == set()


def test_the_chart_knows_every_name_of_the_code_location(values: dict[str, Any]) -> None:
    (location,) = values["dagster-user-deployments"]["deployments"]
    assert set(location) - set(DEPLOYMENT.split()) == set()


def test_the_chart_writes_the_instance_of_production(values: dict[str, Any]) -> None:
    instance = read_yaml("dagster.yaml")
    assert instance.pop("compute_logs")["class"] == values["computeLogManager"]["type"]
    database = instance.pop("storage")["postgres"]["postgres_db"]
    assert values["postgresql"]["postgresqlScheme"] == database["scheme"]
    assert instance_of(values) == instance


def test_limits_are_said_once_and_ticks_are_trimmed_by_kind(values: dict[str, Any]) -> None:
    assert values["concurrency"]["enabled"]
    assert values["dagsterDaemon"]["runCoordinator"]["config"]["queuedRunCoordinator"] == {}
    for trimmed in (values["retention"]["sensor"], values["retention"]["autoMaterialize"]):
        assert set(trimmed["purgeAfterDays"]) == TICKS


def test_the_database_is_outside_and_its_password_in_no_file(values: dict[str, Any]) -> None:
    assert not values["postgresql"]["enabled"]
    assert not values["generatePostgresqlPasswordSecret"]
    assert "postgresqlPassword:" not in (DEPLOY / "k8s" / "dagster-values.yaml").read_text()


def test_the_code_location_serves_the_definitions_and_leaves_runs_to_the_launcher(values: dict[str, Any]) -> None:
    (location,) = values["dagster-user-deployments"]["deployments"]
    module = location["dagsterApiGrpcArgs"][location["dagsterApiGrpcArgs"].index("-m") + 1]
    __import__(module)
    assert not location["includeConfigInLaunchedRuns"]["enabled"]
