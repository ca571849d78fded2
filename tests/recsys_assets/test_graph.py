"""The whole line on a small made-up clickstream: real Spark, a real Redis, a real Dagster instance."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import redis
from line import FIRST_DAY, HOURS_AGAIN, LAST_DAY
from recsys_home import QUICK_SPARK_VARIABLE
from test_definitions import GRAPH

from recsys_cli.stack import prepare_dagster_home, redis_server
from recsys_core.lake import Lake
from recsys_core.online import CachedAnswer, recs_key
from recsys_core.release import Releases
from recsys_core.tables import ACTIVE_USERS

MADE = [name for name, asset in GRAPH.items() if asset["partitions"]]
DAILY = [name for name, asset in GRAPH.items() if asset["partitions"] == "daily"]


@dataclass(frozen=True)
class Line:
    """A home through which the line has run, its Redis and what Dagster recorded."""

    home: Path
    redis: redis.Redis
    instance: dg.DagsterInstance

    @property
    def lake(self) -> Lake:
        return Lake(str(self.home / "lake"))

    @cached_property
    def events(self) -> list[dg.DagsterEvent]:
        """All events of all runs, oldest first."""
        runs = reversed(self.instance.get_runs())
        logs = [entry for run in runs for entry in self.instance.all_logs(run.run_id)]
        return [entry.dagster_event for entry in logs if entry.dagster_event]

    def materializations(self, asset: str) -> list[dg.AssetMaterialization]:
        """Of an asset, oldest first."""
        of_asset = [e for e in self.events if e.is_step_materialization and e.asset_key == dg.AssetKey(asset)]
        return [event.step_materialization_data.materialization for event in of_asset]

    def metadata(self, asset: str, partition: str) -> dict[str, Any]:
        """Of the last materialization of a partition, by name."""
        found = [m for m in self.materializations(asset) if m.partition == partition][-1]
        return {name: value.value for name, value in found.metadata.items()}


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    home = tmp_path_factory.mktemp("graph") / "home"
    home.mkdir()
    (home / "empty.toml").touch()
    with redis_server(home) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAGSTER_HOME", str(prepare_dagster_home(home)))
        own = {
            "RECSYS_HOME": str(home),
            "RECSYS_CONFIG": str(home / "empty.toml"),
            "RECSYS_REDIS__URL": url,
            "RECSYS_PARTITIONS__START": FIRST_DAY,
            "RECSYS_PARTITIONS__END": "2026-01-04",
            "RECSYS_SPARK__SHUFFLE_PARTITIONS": "2",
            **QUICK_SPARK_VARIABLE,
        }
        ran = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("line.py")), str(home)],
            env={**os.environ, **own},
            capture_output=True,
            text=True,
            timeout=840,
        )
        assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-6000:]
        with redis.Redis.from_url(url) as client, dg.DagsterInstance.get() as instance:
            yield Line(home, client, instance)


def test_every_run_succeeds_and_every_asset_is_made_for_both_days(line: Line) -> None:
    assert {run.status for run in line.instance.get_runs()} == {dg.DagsterRunStatus.SUCCESS}
    assert {event.asset_key.to_user_string() for event in line.events if event.is_asset_observation} == {
        "clickstream_landing",
        "item_catalog",
    }
    for asset in MADE:
        partitions = {m.partition for m in line.materializations(asset)}
        ends = {FIRST_DAY, LAST_DAY} if asset in DAILY else {f"{FIRST_DAY}T23", f"{LAST_DAY}T23"}
        assert ends <= partitions, asset


def test_every_check_of_the_graph_ran_and_passed(line: Line) -> None:
    evaluations = [
        event.asset_check_evaluation_data for event in line.events if event.event_type_value == "ASSET_CHECK_EVALUATION"
    ]
    ran = {(e.asset_key.to_user_string(), e.check_name) for e in evaluations}
    assert ran == {(name, check) for name, asset in GRAPH.items() for check in asset["checks"]}
    assert [(e.check_name, e.metadata) for e in evaluations if not e.passed] == []


def test_a_range_of_hours_is_one_run_and_each_hour_has_its_own_numbers(line: Line) -> None:
    of_range = [m for m in line.materializations("clicks_hourly") if m.metadata["hours of the run"].value == 72]
    assert len(of_range) == 72
    assert {m.partition[:10] for m in of_range} == {"2026-01-01", "2026-01-02", "2026-01-03"}
    rows = {m.partition: m.metadata["dagster/row_count"].value for m in of_range}
    assert rows == {key: line.lake.get("clicks_hourly", key).rows for key in rows}
    assert 7000 < sum(rows.values()) < 9000


def test_a_range_of_days_gives_each_day_its_own_numbers(line: Line) -> None:
    for table in ("interactions", "user_features", "item_features", "training_examples"):
        told = {made.partition: made.metadata["dagster/row_count"].value for made in line.materializations(table)}
        assert len(told) > 1
        assert told == {day: line.lake.get(table, day).rows for day in told}, table


def test_no_metadata_name_a_user(line: Line) -> None:
    users = set(line.lake.read("user_features", LAST_DAY, ["user_id"])["user_id"].to_pylist())
    assert len(users) > 100
    told = " ".join(str(value.value) for e in line.events for value in metadata_of(e).values())
    assert len(told) > 10_000
    assert {user for user in users if user in told} == set()


def metadata_of(event: dg.DagsterEvent) -> Mapping[str, Any]:
    if event.event_type_value == "ASSET_CHECK_EVALUATION":
        return event.asset_check_evaluation_data.metadata
    return event.step_materialization_data.materialization.metadata if event.is_step_materialization else {}


def test_an_hour_made_again_has_the_same_data_version(line: Line) -> None:
    hour = f"{LAST_DAY}T12"
    versions = [m.tags["dagster/data_version"] for m in line.materializations("clicks_hourly") if m.partition == hour]
    again = versions[-HOURS_AGAIN:]
    assert len(set(again)) == 1
    assert again[0] == line.lake.get("clicks_hourly", hour).data_version


def test_the_metadata_of_the_last_day_tells_what_was_made(line: Line) -> None:
    factors = line.metadata("als_factors", LAST_DAY)
    assert factors["engine"] == "numpy"
    assert factors["users"] > 150
    assert factors["items"] > 100
    assert factors["top items per factor"].startswith("| factor | items |")
    index = line.metadata("item_index", LAST_DAY)
    assert index["items"] == factors["items"]
    assert index["lowest recall@50"] >= 0.99
    assert index["recall and latency"].startswith("![plot](data:image/png;base64,")
    evaluation = line.metadata("evaluation", LAST_DAY)
    assert evaluation["users"] > 50
    assert [row.split("|")[1].strip() for row in evaluation["models"].splitlines()[2:]] == [
        "popularity, window",
        "popularity, last 6 h",
        "popularity, half-life 1 h",
        "ALS",
        "two-tower",
        "blend",
        "served ranking",
    ]
    caches = line.metadata("rec_cache", f"{LAST_DAY}T23")
    assert caches["users written"] == caches["active users"] > 50
    assert caches["users without any item"] == 0


def test_a_history_of_one_day_is_not_evaluated_and_still_released(line: Line) -> None:
    assert set(line.metadata("evaluation", FIRST_DAY)) == {"not evaluated", "MLflow run"}
    assert line.metadata("release", FIRST_DAY)["release_id"].startswith(FIRST_DAY)


def test_the_last_release_is_the_champion_and_names_what_it_was_made_from(line: Line) -> None:
    releases = Releases(str(line.home / "releases"))
    champion = releases.champion()
    assert champion is not None
    assert champion.release_id == line.metadata("release", LAST_DAY)["release_id"]
    manifest, snapshot = releases.load(champion.release_id, champion.manifest_sha256)
    assert manifest.sources["als_factors"]["data_version"] == line.lake.get("als_factors", LAST_DAY).data_version
    assert snapshot.items.num_rows == line.metadata("release", LAST_DAY)["items"]


def test_every_active_user_has_a_cached_answer_of_the_champion(line: Line) -> None:
    champion = Releases(str(line.home / "releases")).champion()
    assert champion is not None
    users = line.lake.dataset(ACTIVE_USERS, [f"{LAST_DAY}T23"]).to_table(columns=["user_id"])["user_id"].to_pylist()
    answers = [CachedAnswer.decode(value) for value in line.redis.mget([recs_key(user) for user in users])]
    assert {answer.release_id for answer in answers} == {champion.release_id}
    for answer in answers:
        ids = [item for item, _ in answer.items()]
        assert len(ids) == len(set(ids)) >= 10
