"""Where each asset runs and what it may use: its pool, the executor, and the CPU, memory and GPU of its pod.

Assets declare the pool they wait for. The rest is mapped over all of them here, so that a new asset is placed by its pool
and its partitions without being named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import dagster as dg

from recsys_core.settings import KubernetesSettings, PodResources, Settings
from recsys_core.spark import is_local

SPARK, TRAINING = "spark", "training"
K8S_CONFIG = "dagster-k8s/config"

LIGHT = PodResources()
BY_POOL: Mapping[str, PodResources] = {
    # The driver's heap ([spark] driver_memory) and half as much again for Python, Arrow and the JVM itself.
    SPARK: PodResources(cpu="2", memory="6Gi"),
    TRAINING: PodResources(cpu="4", memory="16Gi"),
}
BY_ASSET: Mapping[str, PodResources] = {
    "two_tower": PodResources(cpu="4", memory="16Gi", gpu=1),
    "rec_cache": PodResources(cpu="4", memory="8Gi"),
    # Both hold a whole release.
    "release": PodResources(cpu="1", memory="8Gi"),
    "champion": PodResources(cpu="1", memory="8Gi"),
}
"""What is not as its pool says."""

A = TypeVar("A")


def executor(settings: Settings) -> dg.ExecutorDefinition:
    """The executor of every job: [dagster] executor."""
    if settings.dagster.executor == "k8s":
        from dagster_k8s import k8s_job_executor

        return k8s_job_executor
    return dg.in_process_executor


def isolated(assets: Sequence[A], settings: Settings) -> list[A | dg.AssetsDefinition]:
    """The assets, each in its pool and with the pod that it gets under the Kubernetes executor.

    Raises ValueError when [kubernetes] resources names an asset that there is not.
    """
    own = settings.kubernetes.resources
    names = {key.to_user_string() for asset in assets if isinstance(asset, dg.AssetsDefinition) for key in asset.keys}
    if unknown := sorted(set(own) - names):
        raise ValueError(f"kubernetes.resources: there is no asset {', '.join(unknown)}")
    return [_placed(a, settings) if isinstance(a, dg.AssetsDefinition) and a.is_executable else a for a in assets]


def _placed(asset: dg.AssetsDefinition, settings: Settings) -> dg.AssetsDefinition:
    """The same asset with another operation: op tags and pool can't be changed on one that exists."""
    old = asset.op
    pool = _pool(asset, settings.dagster.hourly_pool)
    tags = {**old.tags, K8S_CONFIG: _pod(asset, settings)}
    new = dg.OpDefinition(
        compute_fn=old.compute_fn,
        name=old.name,
        ins=dict(old.ins),
        outs=dict(old.outs),
        description=old.description,
        config_schema=old.config_schema,
        required_resource_keys=set(old.required_resource_keys),
        tags=tags,
        code_version=old.version,
        retry_policy=old.retry_policy,
        pool=pool,
    )
    return dg.AssetsDefinition(**{**asset.get_attributes_dict(), "node_def": new})


def _pool(asset: dg.AssetsDefinition, hourly_pool: str) -> str | None:
    """The pool that the asset declares; of hourly Spark assets the one of the settings."""
    declared = asset.op.pool
    hourly = isinstance(asset.partitions_def, dg.HourlyPartitionsDefinition)
    return hourly_pool if hourly and declared == SPARK else declared


def _pod(asset: dg.AssetsDefinition, settings: Settings) -> dict[str, Any]:
    """What dagster-k8s merges into the job of the step."""
    declared = asset.op.pool
    wanted = BY_POOL.get(declared, LIGHT) if declared else LIGHT
    kubernetes = settings.kubernetes
    for name in sorted(key.to_user_string() for key in asset.keys):
        wanted = BY_ASSET.get(name, wanted)
        if name in kubernetes.resources:
            wanted = wanted.model_copy(update=kubernetes.resources[name].model_dump(exclude_unset=True))
    drives_spark = declared in BY_POOL and not is_local(settings.spark.master)
    return {
        "container_config": {"resources": _resources(wanted, kubernetes)},
        "pod_spec_config": {
            "service_account_name": kubernetes.spark_account if drives_spark else kubernetes.step_account,
            "automount_service_account_token": drives_spark,
        },
    }


def _resources(wanted: PodResources, kubernetes: KubernetesSettings) -> dict[str, dict[str, str]]:
    """CPU is asked for and not limited: a limit would stop a step that could use an idle core."""
    gpus = {kubernetes.gpu_resource: str(wanted.gpu)} if wanted.gpu else {}
    return {
        "requests": {"cpu": wanted.cpu, "memory": wanted.memory, **gpus},
        "limits": {"memory": wanted.memory, **gpus},
    }
