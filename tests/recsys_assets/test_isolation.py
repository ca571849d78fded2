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
    """The steps of all checks and of all assets that can be materialized or observed, by name: their own where there are
    several."""
    repository = build_definitions(settings).get_repository_def()
    definitions = [*repository.assets_defs_by_key.values(), *repository.asset_checks_defs_by_key.values()]
    made = {step.name: step for a in definitions if a.is_executable for step in a.node_def.iterate_op_defs()}
    assert {"popular_items", "rec_cache_plan", "rec_cache_shards", "rec_cache_report", "clicks_hourly_quality"} <= set(made)
    assert "rec_cache" not in made
    return made


def pod(operation: dg.OpDefinition) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(operation.tags["dagster-k8s/config"])
    return made


def test_on_one_machine_all_spark_assets_share_a_pool_and_steps_run_in_the_run(settings: Settings) -> None:
    pools = {name: operation.pool for name, operation in operations(settings).items()}
    assert pools["clicks_hourly"] == pools["interactions"] == pools["rec_cache_plan"] == "spark"
    assert pools["als_factors"] == pools["item_index"] == "training"
    assert build_definitions(settings).executor is dg.in_process_executor


def test_on_a_cluster_the_hour_has_a_pool_of_its_own_and_steps_are_pods(settings: Settings) -> None:
    cluster = changed(settings, CLUSTER)
    pools = {name: operation.pool for name, operation in operations(cluster).items()}
    assert {name for name, pool in pools.items() if pool == "hourly"} >= {"clicks_hourly", "rec_cache_plan"}
    assert pools["interactions"] == "spark"
    assert pools["als_factors"] == "training"
    assert build_definitions(cluster).executor is k8s_job_executor


@pytest.mark.parametrize(("sections", "pool"), [({}, "spark"), (CLUSTER, "hourly")])
def test_only_the_step_of_the_caches_that_runs_spark_holds_its_pool(
    settings: Settings, sections: dict[str, Any], pool: str
) -> None:
    steps = operations(changed(settings, sections))
    assert steps["rec_cache_plan"].pool == pool
    assert steps["rec_cache_shards"].pool is steps["rec_cache_report"].pool is None


def test_steps_are_processes_where_the_settings_say_so_and_as_many_at_a_time(settings: Settings) -> None:
    own = changed(settings, {"dagster": {"executor": "multiprocess", "max_processes": 3}})
    chosen = build_definitions(own).executor
    assert isinstance(chosen, dg.ExecutorDefinition)
    assert chosen.name == dg.multiprocess_executor.name
    job = build_definitions(own).resolve_job_def("caches")
    config = chosen.apply_config_mapping({"config": {}}).value["config"]
    assert (job.executor_def.name, config["max_concurrent"]) == ("multiprocess", 3)


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
    assert memory("rec_cache_report") < memory("rec_cache_shards") < memory("rec_cache_plan")
    assert memory("release") == memory("release_quality") == memory("release_challenger_beats_champion")


def test_where_a_quota_wants_it_every_step_is_limited_to_the_cpu_that_it_asks_for(settings: Settings) -> None:
    for name, step in operations(changed(settings, {"kubernetes": {"cpu_limits": True}})).items():
        resources = pod(step)["container_config"]["resources"]
        assert resources["limits"]["cpu"] == resources["requests"]["cpu"], name


def test_the_settings_give_one_asset_a_gpu_and_leave_its_memory(settings: Settings) -> None:
    before = pod(operations(settings)["als_factors"])["container_config"]["resources"]
    own = changed(
        settings, {"kubernetes": {"resources": {"als_factors": {"cpu": "8", "gpu": 2}}, "gpu_resource": "amd.com/gpu"}}
    )
    after = pod(operations(own)["als_factors"])["container_config"]["resources"]
    assert after["requests"] == {"cpu": "8", "memory": before["requests"]["memory"], "amd.com/gpu": "2"}
    assert after["limits"] == {"memory": before["limits"]["memory"], "amd.com/gpu": "2"}
    assert "amd.com/gpu" not in pod(operations(own)["item_index"])["container_config"]["resources"]["requests"]


def test_the_settings_of_an_asset_are_those_of_all_its_steps_and_a_steps_own_come_first(settings: Settings) -> None:
    resources = {"rec_cache": {"cpu": "3"}, "rec_cache_shards": {"cpu": "7", "memory": "12Gi"}}
    steps = operations(changed(settings, {"kubernetes": {"resources": resources}}))
    asked = {name: pod(step)["container_config"]["resources"]["requests"] for name, step in steps.items()}
    assert asked["rec_cache_plan"] == {"cpu": "3", "memory": "6Gi"}
    assert asked["rec_cache_shards"] == {"cpu": "7", "memory": "12Gi"}
    assert asked["rec_cache_report"]["cpu"] == "3"


def test_resources_of_an_asset_that_there_is_not_are_refused_by_name(settings: Settings) -> None:
    wrong = changed(settings, {"kubernetes": {"resources": {"als_factor": {"cpu": "8"}}}})
    with pytest.raises(ValueError, match="there is no asset and no step als_factor"):
        build_definitions(wrong)


def test_only_spark_drivers_of_a_cluster_may_talk_to_kubernetes(settings: Settings) -> None:
    def accounts(of: Settings) -> dict[str, str]:
        return {name: pod(step)["pod_spec_config"]["service_account_name"] for name, step in operations(of).items()}

    assert set(accounts(settings).values()) == {"recsys-step"}
    on_cluster = accounts(changed(settings, CLUSTER))
    drivers = {name for name, account in on_cluster.items() if account == "recsys-spark"}
    assert drivers >= {"clicks_hourly", "interactions", "als_factors", "evaluation", "online_features", "rec_cache_plan"}
    for name in ("two_tower", "item_index", "popular_items", "release", "rec_cache_shards", "rec_cache_report"):
        assert on_cluster[name] == "recsys-step", name


def test_placing_an_asset_leaves_everything_else_of_it_as_it_was(settings: Settings) -> None:
    from recsys_assets import ingestion, models, serving

    graph = build_definitions(settings).get_repository_def().assets_defs_by_key
    for declared in (ingestion.clicks_hourly, models.als_factors, serving.rec_cache):
        placed = graph[declared.key]
        assert placed.specs_by_key[declared.key].description == declared.specs_by_key[declared.key].description
        assert placed.partitions_def == declared.partitions_def
        assert placed.backfill_policy == declared.backfill_policy
        for step, before in zip(placed.node_def.iterate_op_defs(), declared.node_def.iterate_op_defs(), strict=True):
            assert step.retry_policy == before.retry_policy
            assert step.compute_fn is before.compute_fn
            assert step.output_dict.keys() == before.output_dict.keys()
        for upstream in declared.dependency_keys:
            assert placed.get_partition_mapping(upstream) == declared.get_partition_mapping(upstream)
