"""The Kubernetes jobs that the installed dagster-k8s makes of runs and of their steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dagster as dg
import kubernetes
from dagster._core.execution.plan.step import IExecutionStep
from dagster._core.storage.dagster_run import DagsterRun
from dagster._core.utils import make_new_run_id
from dagster_k8s import K8sRunLauncher
from dagster_k8s.container_context import K8sContainerContext
from dagster_k8s.job import construct_dagster_k8s_job, get_user_defined_k8s_config

IMAGE = "registry.example.com/recsys/code-location:0.1.0"


def job(launcher: K8sRunLauncher, step: dg.OpDefinition | IExecutionStep | None, name: str = "dagster-job-0") -> dict[str, Any]:
    """The Kubernetes job of a run, or of one of its steps."""
    context = K8sContainerContext.create_for_run(
        DagsterRun(job_name="nightly", run_id=make_new_run_id()), launcher, include_run_tags=step is None
    )
    if step is not None:
        config = get_user_defined_k8s_config(step.tags or {})
        context = context.merge(K8sContainerContext(run_k8s_config=config))
    made = construct_dagster_k8s_job(
        context.get_k8s_job_config(IMAGE, launcher),
        args=["dagster", "api", "execute_step" if step else "execute_run"],
        job_name=name,
        user_defined_k8s_config=context.run_k8s_config,
        component="step_worker" if step else "run_worker",
    )
    manifest: dict[str, Any] = kubernetes.client.ApiClient().sanitize_for_serialization(made)
    return {"apiVersion": "batch/v1", "kind": "Job", **manifest}


def steps_of(definitions: dg.Definitions) -> Iterator[dg.OpDefinition]:
    """Every step of every asset and check."""
    repository = definitions.get_repository_def()
    for asset in (*repository.assets_defs_by_key.values(), *repository.asset_checks_defs_by_key.values()):
        yield from asset.node_def.iterate_op_defs() if asset.is_executable else ()
