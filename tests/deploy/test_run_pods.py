"""What the launcher and the executor of the installed dagster-k8s make of the settings: the jobs of runs and of steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from certificates import make_certificates
from dagster._core.execution.api import create_execution_plan
from dagster._core.executor.init import InitExecutorContext
from dagster._core.executor.step_delegating import StepDelegatingExecutor
from dagster_k8s import K8sRunLauncher
from deployment import DEPLOY, assert_valid, instance_at, read_yaml, settings_of
from kubernetes.config import ConfigException, incluster_config
from run_jobs import job, steps_of

from recsys_assets.definitions import build_definitions
from recsys_core.settings import LakeSettings, ReleaseSettings


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """The production instance with its launcher, on sqlite."""
    config = read_yaml("dagster.yaml")
    config["storage"] = {"sqlite": {"base_dir": str(tmp_path / "storage")}}
    with instance_at(tmp_path / "dagster", config) as made:
        yield made


@pytest.fixture
def definitions(monkeypatch: pytest.MonkeyPatch) -> dg.Definitions:
    """The code location with the settings of Kubernetes, but for the object store, whose client is not installed here."""
    settings = settings_of(DEPLOY / "k8s" / "base" / "recsys.toml", monkeypatch)
    stores = {"lake": LakeSettings(uri="memory://lake"), "release": ReleaseSettings(uri="memory://releases")}
    return build_definitions(settings.model_copy(update=stores))


def pod_of(manifest: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    pod = manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return pod, container


def test_the_pod_of_a_run_is_valid_small_and_knows_the_settings(instance: dg.DagsterInstance) -> None:
    launcher = instance.run_launcher
    assert isinstance(launcher, K8sRunLauncher)
    manifest = job(launcher, None)
    assert_valid(manifest)
    pod, container = pod_of(manifest)
    assert pod["serviceAccountName"] == "dagster"
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["resources"]["limits"] == {"memory": "1Gi"}
    assert {source["secretRef"]["name"] for source in container["envFrom"]} == {"recsys-secrets"}
    environment = {variable["name"]: variable for variable in container["env"]}
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert str(Path(environment["RECSYS_CONFIG"]["value"]).parent) in mounts
    assert environment["DAGSTER_PG_PASSWORD"]["valueFrom"]["secretKeyRef"]["name"] == "dagster-postgresql-secret"
    # A variable that names others must come after them.
    assert list(environment).index("RECSYS_SPARK__CONF") > list(environment).index("POD_IP")


def test_the_pod_of_every_step_is_valid_and_has_what_isolation_gives_it(
    instance: dg.DagsterInstance, definitions: dg.Definitions
) -> None:
    launcher = instance.run_launcher
    assert isinstance(launcher, K8sRunLauncher)
    seen = {}
    for step in steps_of(definitions):
        manifest = job(launcher, step)
        assert_valid(manifest)
        seen[step.name] = pod_of(manifest)
    for name, (pod, container) in seen.items():
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"], name
        assert pod["automountServiceAccountToken"], f"{name}: see test_an_instance_in_the_cluster_is_opened_with_a_token"
        assert pod["serviceAccountName"] in ("recsys-spark", "recsys-step"), name
        assert pod["securityContext"]["runAsNonRoot"], name
    assert seen["als_factors"][1]["resources"]["limits"] == {"memory": "16Gi"}
    assert seen["interactions"][0]["serviceAccountName"] == "recsys-spark"
    assert seen["popular_items"][0]["serviceAccountName"] == "recsys-step"
    assert seen["rec_cache_plan"][0]["serviceAccountName"] == "recsys-spark"
    shards, container = seen["rec_cache_shards"]
    assert (shards["serviceAccountName"], container["resources"]["limits"]) == ("recsys-step", {"memory": "4Gi"})


def test_steps_that_share_the_shards_of_the_caches_are_pods_of_their_own_and_in_no_pool(
    instance: dg.DagsterInstance, definitions: dg.Definitions
) -> None:
    launcher = instance.run_launcher
    assert isinstance(launcher, K8sRunLauncher)
    plan = create_execution_plan(definitions.resolve_job_def("caches"))
    plan.resolve({"rec_cache.rec_cache_plan": {"result": ["0", "1"]}})
    shards = [plan.get_step_by_key(f"rec_cache.rec_cache_shards[{step}]") for step in (0, 1)]
    for step in shards:
        assert step.pool is None
        manifest = job(launcher, step)
        assert_valid(manifest)
        pod, container = pod_of(manifest)
        assert (pod["serviceAccountName"], container["resources"]["limits"]) == ("recsys-step", {"memory": "4Gi"})
    assert plan.get_step_by_key("rec_cache.rec_cache_plan").pool == "hourly"


def test_an_instance_in_the_cluster_is_opened_with_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each step does first, with the files that Kubernetes puts into a pod whose account's token is mounted."""
    config = read_yaml("dagster.yaml")
    config["storage"] = {"sqlite": {"base_dir": str(tmp_path / "storage")}}
    mounted = tmp_path / "serviceaccount"
    for name, file in (("TOKEN", "token"), ("CERT", "ca.crt")):
        monkeypatch.setattr(incluster_config, f"SERVICE_{name}_FILENAME", str(mounted / file))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "6443")
    folder = tmp_path / "dagster"
    folder.mkdir()
    (folder / "dagster.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigException, match="token file does not exist"), dg.DagsterInstance.from_config(str(folder)) as made:
        _ = made.run_launcher
    mounted.mkdir()
    (mounted / "token").write_text("a token")
    make_certificates(mounted)
    (mounted / "ca.pem").rename(mounted / "ca.crt")
    with dg.DagsterInstance.from_config(str(folder)) as made:
        assert isinstance(made.run_launcher, K8sRunLauncher)


@pytest.mark.parametrize("name", ["nightly", "hourly"])
def test_the_executor_of_the_jobs_starts_with_the_settings_of_the_launcher(
    instance: dg.DagsterInstance, definitions: dg.Definitions, name: str
) -> None:
    made = definitions.resolve_job_def(name)
    executor = made.executor_def
    assert executor.name == "k8s"
    config = {"retries": {"enabled": {}}, "per_step_k8s_config": {}, "load_incluster_config": False, "max_concurrent": 4}
    config["kubeconfig_file"] = instance.run_launcher.kubeconfig_file  # type: ignore[attr-defined]
    creation = executor.executor_creation_fn
    assert creation is not None
    started = creation(InitExecutorContext(dg.reconstructable(_nothing), executor, config, instance))
    assert isinstance(started, StepDelegatingExecutor)


@dg.job
def _nothing() -> None:
    """Stands for a job that a pod could load again."""
