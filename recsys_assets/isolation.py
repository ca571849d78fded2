"""Where each asset and each check runs and what it may use: its pool, the executor, and the CPU, memory and GPU of its pod.

Assets declare the pool they wait for; one that is made in several steps does so for each. The rest is mapped over all of them
and over the checks here, so that a new one is placed by its pool and its partitions without being named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import dagster as dg

from recsys_core.cores import usable_cores
from recsys_core.settings import KubernetesSettings, PodResources, Settings, SettingsError
from recsys_core.spark import is_local

SPARK, TRAINING = "spark", "training"
K8S_CONFIG = "dagster-k8s/config"

LIGHT = PodResources()
BY_POOL: Mapping[str, PodResources] = {
    # The driver's heap ([spark] driver_memory) and half as much again for Python, Arrow and the JVM itself.
    SPARK: PodResources(cpu="2", memory="6Gi"),
    TRAINING: PodResources(cpu="4", memory="16Gi"),
}
BY_STEP: Mapping[str, PodResources] = {
    # Maps a release into memory and holds some thousand users.
    "rec_cache_shards": PodResources(cpu="2", memory="4Gi"),
    # These hold a whole release.
    "release": PodResources(cpu="1", memory="8Gi"),
    "release_quality": PodResources(cpu="1", memory="8Gi"),
    "release_challenger_beats_champion": PodResources(cpu="1", memory="8Gi"),
    "champion": PodResources(cpu="1", memory="8Gi"),
    "champion_quality": PodResources(cpu="1", memory="8Gi"),
}
"""What is not as its pool says, by the name of the step: that of its asset, where it is the only one."""

AFTER_A_LOST_POD = dg.RetryPolicy(max_retries=1, delay=5)
"""A drained node takes a step's pod with it, which is no reason to make a whole night again. Dagster can't tell that from a
step that failed by itself, so such a one is repeated once as well."""

A = TypeVar("A")


def executor(settings: Settings) -> dg.ExecutorDefinition:
    """The executor of every job: [dagster] executor."""
    chosen = settings.dagster.executor
    if chosen == "k8s":
        from dagster_k8s import k8s_job_executor

        return k8s_job_executor
    if chosen == "multiprocess":
        return dg.multiprocess_executor.configured({"max_concurrent": settings.dagster.max_processes or usable_cores()})
    return dg.in_process_executor


def isolated(assets: Sequence[A], settings: Settings) -> list[A | dg.AssetsDefinition]:
    """The assets and checks, each step of them in its pool and with the pod that it gets under the Kubernetes executor.

    Raises SettingsError when [kubernetes] resources names an asset or a step that there is not.
    """
    made = [a for a in assets if isinstance(a, dg.AssetsDefinition)]
    names = {key.to_user_string() for asset in made for key in asset.keys}
    names |= {step.name for asset in made if asset.is_executable for step in asset.node_def.iterate_op_defs()}
    if unknown := sorted(set(settings.kubernetes.resources) - names):
        raise SettingsError(f"kubernetes.resources: there is no asset and no step {', '.join(unknown)}")
    return [_placed(a, settings) if isinstance(a, dg.AssetsDefinition) and a.is_executable else a for a in assets]


def _placed(asset: dg.AssetsDefinition, settings: Settings) -> dg.AssetsDefinition:
    """The same asset with other operations: op tags and pool can't be changed on one that exists."""
    placed = _placed_node(asset.node_def, asset, settings)
    if isinstance(asset, dg.AssetChecksDefinition):
        assert isinstance(placed, dg.OpDefinition)
        return dg.AssetChecksDefinition.create(
            keys_by_input_name=asset.keys_by_input_name,
            node_def=placed,
            check_specs_by_output_name=asset.check_specs_by_output_name,
            can_subset=asset.can_subset,
            resource_defs=asset.resource_defs,
        )
    return dg.AssetsDefinition(**{**asset.get_attributes_dict(), "node_def": placed})


def _placed_node(node: object, asset: dg.AssetsDefinition, settings: Settings) -> dg.GraphDefinition | dg.OpDefinition:
    if isinstance(node, dg.GraphDefinition):
        return dg.GraphDefinition(
            name=node.name,
            description=node.description,
            node_defs=[_placed_node(inner, asset, settings) for inner in node.node_defs],
            dependencies=node.dependencies,
            input_mappings=node.input_mappings,
            output_mappings=node.output_mappings,
            config=node.config_mapping,
            tags=node.tags,
        )
    assert isinstance(node, dg.OpDefinition)
    hourly = isinstance(asset.partitions_def, dg.HourlyPartitionsDefinition)
    return dg.OpDefinition(
        compute_fn=node.compute_fn,
        name=node.name,
        ins=dict(node.ins),
        outs=dict(node.outs),
        description=node.description,
        config_schema=node.config_schema,
        required_resource_keys=set(node.required_resource_keys),
        tags={**node.tags, K8S_CONFIG: _pod(node, asset, settings)},
        code_version=node.version,
        retry_policy=node.retry_policy or (AFTER_A_LOST_POD if settings.dagster.executor == "k8s" else None),
        # Of hourly Spark steps the pool of the settings.
        pool=settings.dagster.hourly_pool if hourly and node.pool == SPARK else node.pool,
    )


def _pod(step: dg.OpDefinition, asset: dg.AssetsDefinition, settings: Settings) -> dict[str, Any]:
    """What dagster-k8s merges into the job of the step."""
    declared = step.pool
    kubernetes = settings.kubernetes
    wanted = BY_STEP.get(step.name, BY_POOL.get(declared, LIGHT) if declared else LIGHT)
    for name in dict.fromkeys([*sorted(key.to_user_string() for key in asset.keys), step.name]):
        if name in kubernetes.resources:
            wanted = wanted.model_copy(update=kubernetes.resources[name].model_dump(exclude_unset=True))
    return {
        "container_config": {"resources": _resources(wanted, kubernetes)},
        "pod_spec_config": {
            **_nodes(wanted, kubernetes),
            "service_account_name": kubernetes.spark_account if _drives(step, asset, settings) else kubernetes.step_account,
            # Dagster's launcher, which every step makes with its instance, reads the token; what it allows is the account's.
            "automount_service_account_token": True,
        },
    }


def _drives(step: dg.OpDefinition, asset: dg.AssetsDefinition, settings: Settings) -> bool:
    """Whether a step starts executors: all that wait for Spark, and of those that train the ones whose asset says so."""
    if is_local(settings.spark.master):
        return False
    return step.pool == SPARK or (step.pool == TRAINING and any(SPARK in spec.kinds for spec in asset.specs))


def _nodes(wanted: PodResources, kubernetes: KubernetesSettings) -> dict[str, Any]:
    """Which nodes a pod may be on: those with its labels, and those that are kept for GPUs where it wants one."""
    found: dict[str, Any] = {"node_selector": wanted.nodes} if wanted.nodes else {}
    if wanted.gpu:
        found["tolerations"] = [{"key": kubernetes.gpu_resource, "operator": "Exists", "effect": "NoSchedule"}]
    return found


def _resources(wanted: PodResources, kubernetes: KubernetesSettings) -> dict[str, dict[str, str]]:
    """CPU is asked for and, unless the settings say so, not limited: a limit would stop a step that could use an idle core."""
    gpus = {kubernetes.gpu_resource: str(wanted.gpu)} if wanted.gpu else {}
    cpu = {"cpu": wanted.cpu} if kubernetes.cpu_limits else {}
    return {
        "requests": {"cpu": wanted.cpu, "memory": wanted.memory, **gpus},
        "limits": {**cpu, "memory": wanted.memory, **gpus},
    }
