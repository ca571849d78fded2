"""Where assets run: pools, the executor, and the pod that dagster-k8s makes of a step."""

from __future__ import annotations

import json
from typing import Any

import dagster as dg
import pytest
from dagster_k8s import k8s_job_executor

from recsys_assets.definitions import build_definitions
from recsys_core.settings import Settings

CLUSTER: dict[str, dict[str, Any]] = {
    "spark": {"master": "k8s://https://kubernetes.default.svc"},
    "dagster": {"executor": "k8s", "hourly_pool": "hourly"},
}


def changed(settings: Settings, sections: dict[str, dict[str, Any]]) -> Settings:
    sent = {name: type(getattr(settings, name)).model_validate(values) for name, values in sections.items()}
    return settings.model_copy(update=sent)


def operations(settings: Settings) -> dict[str, dg.OpDefinition]:
    """The operation behind each asset that can be materialized or observed."""
    assets = build_definitions(settings).get_repository_def().assets_defs_by_key
    return {key.to_user_string(): asset.op for key, asset in assets.items() if asset.is_executable}


def pod(operation: dg.OpDefinition) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(operation.tags["dagster-k8s/config"])
    return made


def test_on_one_machine_all_spark_assets_share_a_pool_and_steps_run_in_the_run(settings: Settings) -> None:
    pools = {name: operation.pool for name, operation in operations(settings).items()}
    assert pools["clicks_hourly"] == pools["interactions"] == pools["rec_cache"] == "spark"
    assert pools["als_factors"] == pools["item_index"] == "training"
    assert build_definitions(settings).executor is dg.in_process_executor


def test_on_a_cluster_the_hour_has_a_pool_of_its_own_and_steps_are_pods(settings: Settings) -> None:
    cluster = changed(settings, CLUSTER)
    pools = {name: operation.pool for name, operation in operations(cluster).items()}
    assert {name for name, pool in pools.items() if pool == "hourly"} >= {"clicks_hourly", "rec_cache"}
    assert pools["interactions"] == "spark"
    assert pools["als_factors"] == "training"
    assert build_definitions(cluster).executor is k8s_job_executor


def test_every_step_asks_for_cpu_and_memory_and_training_for_more(settings: Settings) -> None:
    pods = {name: pod(operation) for name, operation in operations(settings).items()}
    for name, asked in pods.items():
        resources = asked["container_config"]["resources"]
        assert set(resources["requests"]) >= {"cpu", "memory"}, name
        assert resources["limits"]["memory"] == resources["requests"]["memory"], name
        assert "cpu" not in resources["limits"], name

    def memory(name: str) -> int:
        return int(pods[name]["container_config"]["resources"]["limits"]["memory"].removesuffix("Gi"))

    assert memory("popular_items") < memory("interactions") < memory("als_factors")


def test_the_settings_give_one_asset_a_gpu_and_leave_its_memory(settings: Settings) -> None:
    before = pod(operations(settings)["als_factors"])["container_config"]["resources"]
    own = changed(
        settings, {"kubernetes": {"resources": {"als_factors": {"cpu": "8", "gpu": 2}}, "gpu_resource": "amd.com/gpu"}}
    )
    after = pod(operations(own)["als_factors"])["container_config"]["resources"]
    assert after["requests"] == {"cpu": "8", "memory": before["requests"]["memory"], "amd.com/gpu": "2"}
    assert after["limits"] == {"memory": before["limits"]["memory"], "amd.com/gpu": "2"}
    assert "amd.com/gpu" not in pod(operations(own)["item_index"])["container_config"]["resources"]["requests"]


def test_resources_of_an_asset_that_there_is_not_are_refused_by_name(settings: Settings) -> None:
    wrong = changed(settings, {"kubernetes": {"resources": {"als_factor": {"cpu": "8"}}}})
    with pytest.raises(ValueError, match="there is no asset als_factor"):
        build_definitions(wrong)


def test_only_spark_drivers_of_a_cluster_may_talk_to_kubernetes(settings: Settings) -> None:
    def accounts(of: Settings) -> dict[str, tuple[str, bool]]:
        specs = {name: pod(operation)["pod_spec_config"] for name, operation in operations(of).items()}
        return {n: (s["service_account_name"], s["automount_service_account_token"]) for n, s in specs.items()}

    assert set(accounts(settings).values()) == {("recsys-step", False)}
    on_cluster = accounts(changed(settings, CLUSTER))
    assert on_cluster["interactions"] == on_cluster["als_factors"] == ("recsys-spark", True)
    assert on_cluster["popular_items"] == on_cluster["release"] == ("recsys-step", False)


def test_placing_an_asset_leaves_everything_else_of_it_as_it_was(settings: Settings) -> None:
    from recsys_assets import ingestion, models

    graph = build_definitions(settings).get_repository_def().assets_defs_by_key
    for declared in (ingestion.clicks_hourly, models.als_factors):
        placed = graph[declared.key]
        assert placed.specs_by_key[declared.key].description == declared.specs_by_key[declared.key].description
        assert placed.partitions_def == declared.partitions_def
        assert placed.backfill_policy == declared.backfill_policy
        assert placed.op.retry_policy == declared.op.retry_policy
        assert placed.op.compute_fn is declared.op.compute_fn
        for upstream in declared.dependency_keys:
            assert placed.get_partition_mapping(upstream) == declared.get_partition_mapping(upstream)
