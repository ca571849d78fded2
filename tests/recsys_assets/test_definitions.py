"""The code location: what it costs to load, and what every asset of the graph says of itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from recsys_assets.definitions import build_definitions
from recsys_assets.partitions import daily, hourly
from recsys_core.settings import DagsterSettings, Settings

PROJECT = Path(__file__).resolve().parents[2]
HEAVY = ("pyspark", "tensorflow", "faiss", "implicit", "matplotlib", "mlflow")
SECONDS_TO_LOAD = 3.0
"""Processor time: what an idle machine takes, whatever runs beside the tests."""

DATA_ENGINEERING, ML_ENGINEERING = ["team:data-engineering"], ["team:ml-engineering"]
GRAPH: dict[str, dict[str, object]] = {
    "clickstream_topic": {
        "group": "ingestion",
        "deps": [],
        "partitions": None,
        "owners": DATA_ENGINEERING,
        "kinds": ["kafka"],
        "checks": [],
    },
    "clickstream_landing": {
        "group": "ingestion",
        "deps": ["clickstream_topic"],
        "partitions": None,
        "owners": DATA_ENGINEERING,
        "kinds": ["parquet"],
        "checks": ["landed_rows_are_events", "landing_files_are_readable", "quarantined_rows_are_few"],
    },
    "item_catalog": {
        "group": "ingestion",
        "deps": [],
        "partitions": None,
        "owners": DATA_ENGINEERING,
        "kinds": ["parquet"],
        "checks": [
            "catalogue_categories_are_all_there",
            "catalogue_prices_are_as_usual",
            "catalogue_rows_are_items",
            "catalogue_size_is_as_usual",
        ],
    },
    "clicks_hourly": {
        "group": "ingestion",
        "deps": ["clickstream_landing"],
        "partitions": "hourly",
        "owners": DATA_ENGINEERING,
        "kinds": ["parquet", "spark"],
        "checks": [
            "categories_are_all_there",
            "event_ids_are_unique",
            "event_types_are_as_usual",
            "events_are_not_repeated",
            "events_lie_in_their_hour",
            "hours_lie_in_their_time_zone",
            "items_are_in_the_catalogue",
            "offsets_have_no_gap",
            "prices_are_as_usual",
            "rows_are_whole_events",
            "users_are_many",
            "volume_is_as_usual",
        ],
    },
    "interactions": {
        "group": "features",
        "deps": ["clicks_hourly"],
        "partitions": "daily",
        "owners": DATA_ENGINEERING,
        "kinds": ["parquet", "spark"],
        "checks": ["hours_are_all_there", "pairs_are_whole_and_single", "weights_are_positive_and_finite", "window_is_sound"],
    },
    "user_features": {
        "group": "features",
        "deps": ["clicks_hourly", "item_catalog"],
        "partitions": "daily",
        "owners": DATA_ENGINEERING,
        "kinds": ["parquet", "spark"],
        "checks": ["user_features_are_in_range"],
    },
    "item_features": {
        "group": "features",
        "deps": ["clicks_hourly", "item_catalog"],
        "partitions": "daily",
        "owners": DATA_ENGINEERING,
        "kinds": ["parquet", "spark"],
        "checks": ["item_features_are_in_range"],
    },
    "training_examples": {
        "group": "features",
        "deps": ["clicks_hourly", "item_catalog"],
        "partitions": "daily",
        "owners": DATA_ENGINEERING,
        "kinds": ["parquet", "spark"],
        "checks": ["examples_are_in_range", "examples_see_only_the_past"],
    },
    "als_factors": {
        "group": "models",
        "deps": ["interactions"],
        "partitions": "daily",
        "owners": ML_ENGINEERING,
        "kinds": ["numpy", "spark"],
        "checks": ["factors_are_finite_and_not_all_zero", "items_are_covered", "lengths_are_in_range"],
    },
    "two_tower": {
        "group": "models",
        "deps": ["item_features", "training_examples"],
        "partitions": "daily",
        "owners": ML_ENGINEERING,
        "kinds": ["tensorflow"],
        "checks": ["tower_directions_have_length_one", "tower_vectors_are_finite", "two_tower_is_trained"],
    },
    "evaluation": {
        "group": "models",
        "deps": ["clicks_hourly", "interactions", "item_catalog", "two_tower"],
        "partitions": "daily",
        "owners": ML_ENGINEERING,
        "kinds": ["numpy", "spark"],
        "checks": [],
    },
    "item_index": {
        "group": "retrieval",
        "deps": ["als_factors", "item_catalog"],
        "partitions": "daily",
        "owners": ML_ENGINEERING,
        "kinds": ["faiss"],
        "checks": ["index_is_of_the_same_factors", "recall_reaches_its_target"],
    },
    "popular_items": {
        "group": "serving",
        "deps": ["interactions"],
        "partitions": "daily",
        "owners": ML_ENGINEERING,
        "kinds": ["parquet"],
        "checks": [],
    },
    "trending_items": {
        "group": "serving",
        "deps": ["clicks_hourly"],
        "partitions": "hourly",
        "owners": ML_ENGINEERING,
        "kinds": ["parquet"],
        "checks": [],
    },
    "release": {
        "group": "serving",
        "deps": ["als_factors", "evaluation", "item_catalog", "item_index", "popular_items", "two_tower"],
        "partitions": "daily",
        "owners": ML_ENGINEERING,
        "kinds": ["faiss", "parquet"],
        "checks": [
            "challenger_beats_champion",
            "indexes_are_of_the_release",
            "releases_are_whole",
            "users_all_have_an_answer",
        ],
    },
    "champion": {
        "group": "serving",
        "deps": ["release"],
        "partitions": "daily",
        "owners": ML_ENGINEERING,
        "kinds": ["mlflow"],
        "checks": ["champion_verifies"],
    },
    "online_features": {
        "group": "serving",
        "deps": ["als_factors", "champion", "user_features"],
        "partitions": "daily",
        "owners": ML_ENGINEERING,
        "kinds": ["redis", "spark"],
        "checks": [],
    },
    "rec_cache": {
        "group": "serving",
        "deps": ["champion", "clicks_hourly", "online_features", "trending_items"],
        "partitions": "hourly",
        "owners": ML_ENGINEERING,
        "kinds": ["redis", "spark"],
        "checks": ["active_users_have_an_answer", "caches_are_as_many_as_active_users", "caches_are_of_the_champion"],
    },
}
BLOCKING = {
    "challenger_beats_champion",
    "examples_are_in_range",
    "examples_see_only_the_past",
    "offsets_have_no_gap",
    "catalogue_categories_are_all_there",
    "catalogue_prices_are_as_usual",
    "catalogue_rows_are_items",
    "catalogue_size_is_as_usual",
    "factors_are_finite_and_not_all_zero",
    "hours_are_all_there",
    "index_is_of_the_same_factors",
    "indexes_are_of_the_release",
    "pairs_are_whole_and_single",
    "releases_are_whole",
    "users_all_have_an_answer",
    "weights_are_positive_and_finite",
    "window_is_sound",
}

LOAD = """
import json, sys, time
started = time.process_time()
from recsys_assets.definitions import defs
defs().get_repository_def().load_all_definitions()
seconds = time.process_time() - started
print(json.dumps({"seconds": seconds, "modules": sorted(m for m in sys.modules if "." not in m)}))
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An installation of its own, with the default settings."""
    (tmp_path / "empty.toml").touch()
    own = {"RECSYS_HOME": str(tmp_path), "RECSYS_CONFIG": str(tmp_path / "empty.toml"), "DAGSTER_HOME": str(tmp_path)}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RECSYS_")}
    return {**kept, **own, "PYTHONWARNINGS": "ignore"}


@pytest.fixture
def definitions(settings: Settings) -> dg.Definitions:
    return build_definitions(settings)


def test_the_code_location_loads_quickly_and_without_any_heavy_import(environment: dict[str, str]) -> None:
    loads = []
    for _ in range(2):
        output = subprocess.run(
            [sys.executable, "-c", LOAD], env=environment, check=True, capture_output=True, text=True, timeout=120
        ).stdout
        loads.append(json.loads(output))
    assert [module for module in HEAVY if module in loads[0]["modules"]] == []
    assert min(load["seconds"] for load in loads) < SECONDS_TO_LOAD


def test_dagster_finds_the_workspace_valid(environment: dict[str, str]) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "dagster", "definitions", "validate", "-w", str(PROJECT / "workspace.yaml")],
        cwd=environment["RECSYS_HOME"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    output = found.stdout + found.stderr
    assert found.returncode == 0, output
    assert "Validation successful for code location recsys" in output
    assert "All code locations passed validation" in output


def test_the_graph_is_as_written_here(definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()
    kinds = {hourly: "hourly", daily: "daily", None: None}
    checks = {key: sorted(c.name for c in graph.asset_check_keys if c.asset_key == key) for key in graph.get_all_asset_keys()}
    found = {
        key.to_user_string(): {
            "group": graph.get(key).group_name,
            "deps": sorted(parent.to_user_string() for parent in graph.get(key).parent_keys),
            "partitions": kinds[graph.get(key).partitions_def],
            "owners": list(graph.get(key).owners),
            "kinds": sorted(graph.get(key).kinds),
            "checks": checks[key],
        }
        for key in graph.get_all_asset_keys()
    }
    assert found == GRAPH


def test_every_asset_says_what_it_is_whose_it_is_and_what_it_is_made_with(definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.description, key
        assert node.description.endswith("."), key
        assert node.owners, key
        assert node.kinds, key


def test_a_check_states_a_claim_and_the_blocking_ones_are_known(definitions: dg.Definitions) -> None:
    verbs = {"are", "beats", "have", "is", "lie", "reaches", "see", "verifies"}
    specs = [spec for checks in definitions.asset_checks or () for spec in checks.check_specs]
    for spec in specs:
        assert verbs & set(spec.name.split("_")), spec.name
        assert spec.description, spec.name
    assert {spec.name for spec in specs if spec.blocking} == BLOCKING


def test_the_jobs_are_the_hour_the_night_and_parts_of_them(definitions: dg.Definitions) -> None:
    names = ("arrivals", "hourly", "nightly", "caches", "late_hours")
    members = {
        job: {key.to_user_string() for key in definitions.resolve_job_def(job).asset_layer.executable_asset_keys}
        for job in names
    }
    assert members["arrivals"] == {"clickstream_landing", "item_catalog"}
    assert members["hourly"] == {"clicks_hourly", "trending_items", "rec_cache"}
    assert members["caches"] == {"rec_cache"}
    assert members["late_hours"] == {"clicks_hourly"}
    assert set().union(*members.values()) == set(GRAPH) - {"clickstream_topic"}


def test_the_night_runs_the_checks_of_the_catalogue_before_the_release(definitions: dg.Definitions) -> None:
    night = definitions.resolve_job_def("nightly")
    assert "item_catalog_quality" in {node.name for node in night.nodes}


def test_every_hour_and_day_has_a_deadline(definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()
    without = {key.to_user_string() for key in graph.get_all_asset_keys() if graph.get(key).freshness_policy is None}
    assert without == {"clickstream_topic", "clickstream_landing", "item_catalog"}


@pytest.mark.parametrize("automation", [False, True])
def test_schedules_and_sensors_run_by_themselves_only_when_the_setting_says_so(settings: Settings, automation: bool) -> None:
    chosen = settings.model_copy(update={"dagster": DagsterSettings(automation=automation)})
    repository = build_definitions(chosen).get_repository_def()
    assert {schedule.name: schedule.cron_schedule for schedule in repository.schedule_defs} == {
        "arrivals_schedule": "1 * * * *",
        "hourly_schedule": "5 * * * *",
        "nightly_schedule": "10 1 * * *",
        "compact_job_schedule": "10 3 * * *",
        "prune_job_schedule": "40 3 * * 0",
    }
    assert {sensor.name for sensor in repository.sensor_defs} == {
        "alerts",
        "automation",
        "champion_promoted",
        "late_hours",
        "missed_hours",
        "missed_nights",
        "stream_observed",
    }
    running = {dg.DefaultScheduleStatus.RUNNING, dg.DefaultSensorStatus.RUNNING}
    stopped = {dg.DefaultScheduleStatus.STOPPED, dg.DefaultSensorStatus.STOPPED}
    assert {d.default_status for d in (*repository.schedule_defs, *repository.sensor_defs)} == (
        running if automation else stopped
    )


def test_the_reference_names_every_asset_and_check_once() -> None:
    """An asset a row; checks in rows of which one without an asset goes on with that of the row above."""
    assets, checks = ((PROJECT / "docs" / "reference.md").read_text().split("\n## ")[number] for number in (1, 2))
    assert sorted(row[0] for row in cells(assets)) == sorted([name] for name in GRAPH)
    named: list[tuple[str, str]] = []
    on: list[str] = []
    for first, claims in cells(checks):
        on = first or on
        named += zip(on, claims, strict=True) if len(on) > 1 else [(on[0], claim) for claim in claims]
    assert sorted(named) == sorted((name, check) for name, asset in GRAPH.items() for check in asset["checks"])


def cells(section: str) -> list[list[list[str]]]:
    """The names in the first two columns of a section's table, row by row."""
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("|")]
    return [[re.findall(r"`(\w+)`", cell) for cell in row] for row in rows[2:]]
