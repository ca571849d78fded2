"""The production instances of Dagster: a real PostgreSQL, the launcher of Kubernetes, pools that keep each other free."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import psycopg2
import pytest
import yaml
from builders import write_interactions
from dagster._core.instance.config import PoolGranularity
from dagster._core.run_coordinator import QueuedRunCoordinator
from databases import Postgres
from deployment import DEPLOY, PROJECT, instance_at, read_yaml

from recsys_assets.definitions import build_definitions
from recsys_core.lake import Lake
from recsys_core.settings import Settings

DAY = "2026-03-02"
INSTANCES = ("dagster.yaml", "compose/dagster.yaml")


@pytest.fixture(params=INSTANCES)
def instance(
    request: pytest.FixtureRequest, tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dg.DagsterInstance]:
    """The instance of a file below deploy/, over the PostgreSQL of the tests."""
    for name, value in postgres.environment().items():
        monkeypatch.setenv(name, value)
    with instance_at(tmp_path / "dagster", read_yaml(request.param)) as made:
        yield made


def test_a_materialization_is_kept_in_postgres(instance: dg.DagsterInstance, settings: Settings, postgres: Postgres) -> None:
    write_interactions(Lake(settings.lake_uri), DAY, [("ann", "tea", 2.0), ("bob", "tea", 1.0), ("bob", "cup", 1.0)])
    definitions = build_definitions(settings)
    result = dg.materialize(
        [definitions.get_assets_def("popular_items"), *definitions.get_assets_def("interactions").to_source_assets()],
        selection="popular_items",
        partition_key=DAY,
        resources=dict(definitions.resources or {}),
        instance=instance,
    )
    assert result.success
    with postgres.connect("dagster", "dagster") as connection, connection.cursor() as cursor:
        of_run = "where run_id = %s and dagster_event_type = 'ASSET_MATERIALIZATION'"
        cursor.execute(f"select partition from event_logs {of_run}", (result.run_id,))
        assert cursor.fetchall() == [(DAY,)]
        cursor.execute("select status from runs where run_id = %s", (result.run_id,))
        assert cursor.fetchall() == [("SUCCESS",)]


def test_nothing_of_the_night_keeps_the_hourly_pool_from_working(instance: dg.DagsterInstance, settings: Settings) -> None:
    production = settings.model_copy(
        update={"dagster": settings.dagster.model_copy(update={"executor": "k8s", "hourly_pool": "hourly"})}
    )
    assets = build_definitions(production).get_repository_def().assets_defs_by_key
    steps = [step for asset in assets.values() if asset.is_executable for step in asset.node_def.iterate_op_defs()]
    pools = {step.name: step.pool for step in steps}
    assert {pools["clicks_hourly"], pools["rec_cache_plan"]} == {"hourly"}
    assert {pools["interactions"], pools["als_factors"]} == {"spark", "training"}
    storage = instance.event_log_storage
    for pool in ("hourly", "spark", "training"):
        storage.set_concurrency_slots(pool, 1)
    for asset in ("interactions", "als_factors", "evaluation"):
        storage.claim_concurrency_slot(pools[asset], "the-night", asset)
    try:
        assert not storage.claim_concurrency_slot("spark", "a-backfill", "interactions").is_claimed
        assert storage.claim_concurrency_slot("hourly", "the-hour", "rec_cache_plan").is_claimed
    finally:
        for run in ("the-night", "a-backfill", "the-hour"):
            storage.free_concurrency_slots_for_run(run)


def test_runs_queue_within_limits_and_lost_ones_are_retried(instance: dg.DagsterInstance) -> None:
    assert isinstance(instance.run_coordinator, QueuedRunCoordinator)
    queue = instance.get_concurrency_config().run_queue_config
    assert queue is not None
    limits = {limit["key"]: limit["limit"] for limit in queue.tag_concurrency_limits}
    assert 0 < limits["dagster/backfill"] < queue.max_concurrent_runs
    assert limits["dagster/schedule_name"] < queue.max_concurrent_runs
    assert instance.run_monitoring_enabled
    assert instance.run_retries_enabled
    assert instance.run_retries_max_retries > 0
    assert not instance.telemetry_enabled


def test_only_kubernetes_resumes_a_run_whose_pod_is_gone(instance: dg.DagsterInstance) -> None:
    launcher = type(instance.run_launcher).__name__
    assert launcher in ("K8sRunLauncher", "DefaultRunLauncher")
    assert (instance.run_monitoring_max_resume_run_attempts > 0) == (launcher == "K8sRunLauncher")
    assert instance.run_launcher.supports_resume_run == (launcher == "K8sRunLauncher")


def test_dagster_and_mlflow_have_a_database_each_and_none_of_the_other(postgres: Postgres) -> None:
    for role, other in (("dagster", "mlflow"), ("mlflow", "dagster")):
        postgres.connect(role, role).close()
        with pytest.raises(psycopg2.OperationalError, match="permission denied for database"):
            postgres.connect(role, other)


def test_the_storage_service_of_compose_makes_tables_and_pools(postgres: Postgres, tmp_path: Path) -> None:
    (tmp_path / "dagster.yaml").write_text((DEPLOY / "compose" / "dagster.yaml").read_text())
    script = read_yaml("compose.yaml")["services"]["storage"]["command"][-1].replace("$$", "$")
    script = script.replace("in hourly spark training;", "in hourly;")  # a start of Dagster's command line for each
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, **postgres.environment(), "DAGSTER_HOME": str(tmp_path), "PATH": path}
    ended = subprocess.run(["sh", "-ec", script], env=environment, capture_output=True, text=True, timeout=180)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    with postgres.connect("dagster", "dagster") as connection, connection.cursor() as cursor:
        cursor.execute('select concurrency_key, "limit" from concurrency_limits')
        assert dict(cursor.fetchall())["hourly"] == 1


@pytest.mark.parametrize("name", INSTANCES)
def test_no_password_is_written_down(name: str) -> None:
    database = read_yaml(name)["storage"]["postgres"]["postgres_db"]
    assert all(list(value) == ["env"] for key, value in database.items() if key != "scheme")


def test_the_local_instance_is_still_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    (tmp_path / "dagster.yaml").write_text((PROJECT / "dagster.yaml").read_text())
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        instance.get_runs_count()
        assert (tmp_path / "history" / "runs.db").is_file()
        pools = instance.get_concurrency_config().pool_config
        assert (pools.default_pool_limit, pools.pool_granularity) == (1, PoolGranularity.OP)


def test_every_instance_of_the_project_trims_its_ticks() -> None:
    for file in (PROJECT / "dagster.yaml", *(DEPLOY / name for name in INSTANCES)):
        retention = yaml.safe_load(file.read_text())["retention"]
        assert retention["schedule"]["purge_after_days"] <= 30, file
        assert retention["sensor"]["purge_after_days"]["skipped"] <= 7, file
