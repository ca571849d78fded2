"""Events of a run of many partitions are stored in batches, and what is stored is what Dagster's own SQLite storage has."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from recsys_cli.event_log import BatchedSqliteEventLog
from recsys_cli.stack import dagster_environment

HOURS = 20
MATERIALIZED, PLANNED = "ASSET_MATERIALIZATION", "ASSET_MATERIALIZATION_PLANNED"
hourly = dg.HourlyPartitionsDefinition("2026-01-01-00:00", fmt="%Y-%m-%d-%H:%M")


@dg.asset(partitions_def=hourly, backfill_policy=dg.BackfillPolicy.single_run(), code_version="1")
def table() -> dg.MaterializeResult:
    """Made by the hour."""
    return dg.MaterializeResult(metadata={"rows": 3}, data_version=dg.DataVersion("abc"))


@dg.asset_check(asset=table)
def rows_are_there() -> dg.AssetCheckResult:
    """A claim."""
    return dg.AssetCheckResult(passed=True)


JOB = dg.Definitions([table], jobs=[dg.define_asset_job("all", "*")], asset_checks=[rows_are_there]).resolve_job_def("all")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The DAGSTER_HOME of an installation, with what its processes get."""
    monkeypatch.delenv("DAGSTER_EVENT_BATCH_SIZE", raising=False)
    for name, value in dagster_environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    return tmp_path / "dagster"


@pytest.fixture
def instance(home: Path) -> Iterator[dg.DagsterInstance]:
    assert (home / "dagster.yaml").is_file()
    with dg.DagsterInstance.get() as made:
        yield made


def make(instance: dg.DagsterInstance, hours: int = HOURS) -> str:
    """The first `hours` hours as one run. Returns its id."""
    keys = hourly.get_partition_keys()[:hours]
    tags = {"dagster/asset_partition_range_start": keys[0], "dagster/asset_partition_range_end": keys[-1]}
    done = JOB.execute_in_process(
        instance=instance, tags=tags if hours > 1 else {}, partition_key=keys[0] if hours == 1 else None
    )
    assert done.success
    return done.run_id


def rows(folder: Path, database: str, query: str) -> Counter[tuple[object, ...]]:
    with sqlite3.connect(folder / "history" / "runs" / f"{database}.db") as connection:
        return Counter(connection.execute(query).fetchall())


def stored(folder: Path, run_id: str) -> dict[str, Counter[tuple[object, ...]]]:
    """What two runs of the same have in common, in the database of the run and in that of all runs."""
    events = "select dagster_event_type, step_key, asset_key, partition from event_logs"
    tags = "select e.dagster_event_type, e.partition, t.asset_key, t.key, t.value from asset_event_tags t join event_logs e"
    return {
        "run": rows(folder, run_id, events),
        "all": rows(folder, "index", events),
        "tags": rows(folder, "index", f"{tags} on e.id = t.event_id and e.timestamp = t.event_timestamp"),
        "assets": rows(folder, "index", "select asset_key, last_materialization is null from asset_keys"),
        "checks": rows(folder, "index", "select check_name, execution_status, partition from asset_check_executions"),
    }


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Counter[tuple[object, ...]]]:
    """What a run leaves in Dagster's own storage."""
    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch, dg.DagsterInstance.local_temp(str(folder)) as plain:
        patch.delenv("DAGSTER_EVENT_BATCH_SIZE", raising=False)
        return stored(folder, make(plain))


@pytest.mark.parametrize("batch", ["1000", "7", "0"])
def test_the_databases_hold_what_storing_events_one_by_one_leaves(
    instance: dg.DagsterInstance,
    home: Path,
    one_by_one: dict[str, Counter[tuple[object, ...]]],
    monkeypatch: pytest.MonkeyPatch,
    batch: str,
) -> None:
    monkeypatch.setenv("DAGSTER_EVENT_BATCH_SIZE", batch)
    in_batches = stored(home, make(instance))
    assert in_batches == one_by_one
    assert sum(count for row, count in in_batches["all"].items() if row[0] == MATERIALIZED) == HOURS
    assert sum(count for row, count in in_batches["run"].items() if row[0] == PLANNED) == HOURS
    assert sum(in_batches["tags"].values()) >= HOURS


def test_every_partition_is_known_with_its_metadata_and_data_version(instance: dg.DagsterInstance) -> None:
    run_id = make(instance)
    found = instance.fetch_materializations(dg.AssetKey("table"), limit=HOURS + 1).records
    assert [record.partition_key for record in reversed(found)] == list(hourly.get_partition_keys()[:HOURS])
    for record in found:
        made = record.asset_materialization
        assert made is not None
        assert (record.run_id, made.metadata["rows"].value, made.tags["dagster/data_version"]) == (run_id, 3, "abc")
    last = instance.get_latest_materialization_event(dg.AssetKey("table"))
    assert last is not None
    assert last.asset_materialization == found[0].asset_materialization
    versions = instance.event_log_storage.get_latest_tags_by_partition(
        dg.AssetKey("table"), dg.DagsterEventType.ASSET_MATERIALIZATION, ["dagster/data_version"]
    )
    assert versions == {record.partition_key: {"dagster/data_version": "abc"} for record in found}


def test_a_run_of_many_partitions_opens_the_databases_hardly_more_often_than_one_of_one(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    connect = BatchedSqliteEventLog._connect
    monkeypatch.setattr(BatchedSqliteEventLog, "_connect", lambda log, shard: (opened.append(shard), connect(log, shard))[1])
    make(instance, 1)
    of_one = len(opened)
    opened.clear()
    make(instance)
    assert of_one > 0
    assert len(opened) < of_one + 10


@pytest.mark.parametrize("database", ["of all runs", "of the run"])
def test_a_batch_that_can_not_be_written_leaves_each_event_once(
    instance: dg.DagsterInstance, home: Path, monkeypatch: pytest.MonkeyPatch, database: str
) -> None:
    """The second database fails after the first one was written."""
    name = {"of all runs": "_store_asset_event", "of the run": "run_connection"}[database]
    together, write = BatchedSqliteEventLog._store_together, getattr(BatchedSqliteEventLog, name)
    failures = iter([True])

    def fails_once(*args: object) -> object:
        if next(failures, False):
            raise sqlite3.OperationalError("database is locked")
        return write(*args)

    def store(log: BatchedSqliteEventLog, run_id: str, events: list[dg.EventLogEntry]) -> None:
        with monkeypatch.context() as patch:
            if events[0].dagster_event_type == dg.DagsterEventType.ASSET_MATERIALIZATION:
                patch.setattr(BatchedSqliteEventLog, name, fails_once)
            together(log, run_id, events)

    monkeypatch.setattr(BatchedSqliteEventLog, "_store_together", store)
    found = stored(home, make(instance))
    assert next(failures, None) is None, "it did fail"
    for where in ("run", "all"):
        assert {count for row, count in found[where].items() if row[0] == MATERIALIZED} == {1}, where
        assert sum(row[0] == MATERIALIZED for row in found[where]) == HOURS, where
    assert set(found["tags"].values()) == {1}
    query = "select count(*) from asset_event_tags where event_id not in (select id from event_logs)"
    assert rows(home, "index", query) == {(0,): 1}
