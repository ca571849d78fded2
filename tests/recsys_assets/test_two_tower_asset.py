"""A two-tower model that can't be trained is told and never stops the night."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import dagster as dg
import pytest
from examples import DAY, planted_shop, write_examples
from mlflow import MlflowClient
from nights import GOOD, prepare_night, small

from recsys_assets import models
from recsys_assets.definitions import build_definitions
from recsys_core.lake import Lake
from recsys_core.registry import Registry
from recsys_core.release import Releases
from recsys_core.settings import Settings

NIGHT = [dg.AssetKey(name) for name in ("two_tower", "release", "champion")]


def is_killed(*_: Any, log: Callable[..., None]) -> None:
    """What the kernel does to a training that takes too much memory."""
    log({"loss": 1.0}, 1)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def night(mlflow_settings: Settings) -> Iterator[Callable[..., dg.ExecuteInProcessResult]]:
    """Runs steps of the nightly job over a day that has everything but training examples."""
    settings = small(mlflow_settings)
    tower = {"dimension": 8, "hidden": (8,), "epochs": 2, "batch_size": 64}
    settings = settings.model_copy(update={"two_tower": settings.two_tower.model_copy(update=tower)})
    prepare_night(Lake(settings.lake_uri), DAY, settings, GOOD)
    with dg.DagsterInstance.ephemeral() as instance:

        def run(*assets: dg.AssetKey) -> dg.ExecuteInProcessResult:
            job = build_definitions(settings).resolve_job_def("nightly")
            return job.execute_in_process(
                instance=instance, asset_selection=list(assets) or NIGHT, partition_key=DAY, raise_on_error=False
            )

        yield run


def is_trained(result: dg.ExecuteInProcessResult) -> dg.AssetCheckEvaluation:
    return next(e for e in result.get_asset_check_evaluations() if e.check_name == "two_tower_is_trained")


def made(result: dg.ExecuteInProcessResult, asset: str) -> dict[str, Any]:
    found = [e for e in result.get_asset_materialization_events() if e.asset_key == dg.AssetKey(asset)]
    return {name: value.value for name, value in found[-1].materialization.metadata.items()}


def assert_released_from_als_alone(result: dg.ExecuteInProcessResult, settings: Settings, reason: str) -> None:
    assert result.success
    check = is_trained(result)
    assert (check.passed, check.blocking, check.severity) == (False, False, dg.AssetCheckSeverity.WARN)
    assert reason in check.metadata["reason"].value
    assert "ALS alone" in made(result, "two_tower")["what follows"]
    assert "ALS alone" in made(result, "release")["two-tower model"]
    pointer = Releases(settings.releases_uri).champion()
    assert pointer is not None
    assert pointer.release_id == made(result, "release")["release_id"]
    assert Lake(settings.lake_uri).find("two_tower", DAY) is None


def test_without_training_examples_the_release_is_made_from_als_alone(night: Callable, mlflow_settings: Settings) -> None:
    result = night()
    assert_released_from_als_alone(result, mlflow_settings, "training_examples")
    run_id = made(result, "two_tower")["MLflow run"].split(" in ")[0]
    assert MlflowClient(Registry(mlflow_settings).uri).get_run(run_id).info.status == "FAILED"


def test_a_training_that_the_kernel_kills_leaves_the_night_alive(
    night: Callable, mlflow_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "fit_two_tower", is_killed)
    assert_released_from_als_alone(night(), mlflow_settings, "died (exit code -9)")


def test_a_training_is_an_mlflow_run_with_the_metrics_of_each_epoch(night: Callable, mlflow_settings: Settings) -> None:
    lake = Lake(mlflow_settings.lake_uri)
    write_examples(lake, *planted_shop())
    result = night(dg.AssetKey("two_tower"))
    assert result.success
    assert is_trained(result).passed
    run_id = made(result, "two_tower")["MLflow run"].split(" in ")[0]
    client = MlflowClient(Registry(mlflow_settings).uri)
    run = client.get_run(run_id)
    assert run.data.tags["dagster.run_id"] == result.run_id
    assert run.data.params["dimension"] == "8"
    assert [m.step for m in client.get_metric_history(run_id, "loss")] == [1, 2]
    assert {given.dataset.name for given in run.inputs.dataset_inputs} == {f"training_examples/{DAY}", f"item_features/{DAY}"}
    assert lake.get("two_tower", DAY).extra["report"]["version"] == is_trained(result).metadata["version"].value
