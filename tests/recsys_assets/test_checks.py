"""The asset checks in real jobs: what a planted fault stops, and what a check shows."""

from __future__ import annotations

from collections.abc import Callable

import dagster as dg
import numpy as np
import pyarrow as pa
import pytest
from builders import event, event_table, ms, write_clicks, write_interactions
from typer.testing import CliRunner, Result

from recsys_assets.checks import GROUPS
from recsys_assets.definitions import build_definitions
from recsys_assets.resources import Platform
from recsys_cli.backfill import why_it_failed
from recsys_cli.main import app
from recsys_core.bundle import ALS_FACTORS, ALS_ITEMS, ITEM_INDEX, build_item_index, fit_als_factors
from recsys_core.catalog import CATALOG_KEY, CATALOG_SCHEMA, CATALOG_TABLE, merge_catalog, read_catalog
from recsys_core.evaluation import write_evaluation
from recsys_core.events import DAY_MS, EVENT_SCHEMA, HOUR_MS, hour_key
from recsys_core.lake import Lake
from recsys_core.landing import QUARANTINE_SCHEMA
from recsys_core.settings import Settings
from recsys_core.tables import CLICKS_HOURLY

DAY, BEFORE = "2026-03-02", "2026-03-01"
NOW_S = ms(DAY) // 1000
NIGHT = ("popular_items", "release")
"""Made in these tests; the checks of all that stands before them run as in the nightly job."""
CHECKED = ("interactions", "als_factors", "item_index", "item_catalog")


@pytest.fixture
def settings(settings: Settings) -> Settings:
    als = settings.als.model_copy(update={"rank": 4, "iterations": 2, "regularization": 0.1})
    window = settings.interactions.model_copy(update={"window_days": 2})
    return settings.model_copy(update={"als": als, "interactions": window})


@pytest.fixture
def platform(settings: Settings) -> Platform:
    """An installation whose day is ready for the night: tables, factors and index, made without Spark."""
    platform = Platform(settings)
    lake = platform.lake
    hours = [hour_key(at) for at in range(ms(BEFORE), ms(DAY) + DAY_MS, HOUR_MS)]
    write_clicks(lake, [(f"u{n % 50}", f"i{n % 60}", f"{hour}:{n % 60:02}") for hour in hours for n in range(3)])
    for day in (BEFORE, DAY):
        write_interactions(lake, day, [(f"u{u}", f"i{(u + n) % 60}", 1.0 + n) for u in range(90) for n in range(5)])
    items = [{"item_id": f"i{n}", "category": "a/b", "price": 10.0 + n, "available": True} for n in range(60)]
    merge_catalog(
        lake, pa.Table.from_pylist([{**dict.fromkeys(CATALOG_SCHEMA.names), **i} for i in items], schema=CATALOG_SCHEMA)
    )
    refit(platform, DAY)
    write_evaluation(lake, DAY, None, "not evaluated in this test")
    judged = next(group for group in GROUPS if group.asset == CATALOG_TABLE).reports(platform)
    assert all(report.passed for _, report in judged)
    return platform


def refit(platform: Platform, day: str) -> None:
    fit_als_factors(platform.lake, day, platform.settings, None, "implicit")
    build_item_index(platform.lake, day, platform.settings)


def night(platform: Platform) -> dg.ExecuteInProcessResult:
    """The end of the night with all checks before it."""
    selection = dg.AssetSelection.assets(*NIGHT) | dg.AssetSelection.checks_for_assets(*CHECKED)
    definitions = dg.Definitions.merge(
        build_definitions(platform.settings), dg.Definitions(jobs=[dg.define_asset_job("end_of_night", selection)])
    )
    with dg.DagsterInstance.ephemeral() as instance:
        return definitions.resolve_job_def("end_of_night").execute_in_process(
            instance=instance, partition_key=DAY, raise_on_error=False
        )


def run_the_night(platform: Platform) -> tuple[set[str], dict[str, dg.AssetCheckEvaluation]]:
    """Run the end of the night. Returns what was made and the checks that failed."""
    done = night(platform)
    evaluations = [e.asset_check_evaluation_data for e in done.all_events if e.event_type_value == "ASSET_CHECK_EVALUATION"]
    made = {e.asset_key.to_user_string() for e in done.all_events if e.is_step_materialization and e.asset_key}
    assert done.success == (made == set(NIGHT))
    return made, {e.check_name: e for e in evaluations if not e.passed}


def a_bot(platform: Platform) -> None:
    write_clicks(platform.lake, [("bot", f"i{n % 60}", f"{DAY}T15:{n // 10:02}:{n % 10:02}") for n in range(300)])


def an_hour_missing(platform: Platform) -> None:
    assert platform.lake.remove(platform.lake.get(CLICKS_HOURLY, f"{DAY}T07"))


def nan_factors(platform: Platform) -> None:
    lake: Lake = platform.lake
    table = lake.read(ALS_ITEMS, DAY)
    factors = table["factor"].to_pylist()
    factors[3] = [float("nan")] * len(factors[3])
    at = table.schema.get_field_index("factor")
    bad = table.set_column(at, table.schema.field(at), pa.array(factors, table.schema.field(at).type))
    part = lake.get(ALS_ITEMS, DAY)
    lake.replace_rows(part, bad.to_batches(), bad.schema)


def an_index_of_another_release(platform: Platform) -> None:
    lake = platform.lake
    right = lake.get(ITEM_INDEX, DAY)
    write_interactions(lake, BEFORE, [(f"u{u}", f"i{(u * 7 + n) % 60}", 1.0) for u in range(90) for n in range(5)])
    refit(platform, BEFORE)
    other = lake.get(ITEM_INDEX, BEFORE)
    blobs = {name: lake.read_blob(ITEM_INDEX, BEFORE, name) for name in other.files}
    lake.write_blobs(ITEM_INDEX, DAY, blobs, other.rows, right.extra)


def prices_times_100(platform: Platform) -> None:
    rows = read_catalog(platform.lake)
    prices = pa.array(np.asarray(rows["price"].to_numpy()) * 100)
    platform.lake.write(
        CATALOG_TABLE, CATALOG_KEY, rows.set_column(rows.schema.get_field_index("price"), CATALOG_SCHEMA.field("price"), prices)
    )


def a_weight_of_nan(platform: Platform) -> None:
    write_interactions(platform.lake, DAY, [("u1", "i1", float("nan")), ("u2", "i2", 1.0)])


FAULTS: dict[str, tuple[Callable[[Platform], None], str]] = {
    "a bot": (a_bot, "window_is_sound"),
    "an hour that was never made": (an_hour_missing, "hours_are_all_there"),
    "a weight that is no number": (a_weight_of_nan, "weights_are_positive_and_finite"),
    "vectors with NaN": (nan_factors, "factors_are_finite_and_not_all_zero"),
    "an index of another release": (an_index_of_another_release, "index_is_of_the_same_factors"),
    "catalogue prices × 100": (prices_times_100, "catalogue_prices_are_as_usual"),
}


def test_a_sound_day_becomes_a_release(platform: Platform) -> None:
    made, failed = run_the_night(platform)
    assert failed == {}
    assert made == set(NIGHT)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_stopped_by_the_check_that_names_it_before_the_release(fault: str, platform: Platform) -> None:
    plant, claim = FAULTS[fault]
    plant(platform)
    made, failed = run_the_night(platform)
    assert claim in failed
    assert failed[claim].blocking
    assert "release" not in made
    assert platform.releases.list() == []
    assert platform.releases.champion() is None


def test_a_failing_check_shows_its_report_and_the_rows_that_fail(platform: Platform) -> None:
    a_bot(platform)
    _, failed = run_the_night(platform)
    shown = {name: value.value for name, value in failed["window_is_sound"].metadata.items()}
    assert f"{DAY}T15" in shown["failing rows"]
    assert "users_are_many" in shown["failing rows"]
    assert shown["report"].startswith("| holds | expectation |")
    assert shown["rows judged"] == 48


def test_a_failed_run_tells_which_check_failed_why_and_what_to_do(platform: Platform) -> None:
    a_bot(platform)
    told = "\n".join(why_it_failed(night(platform)))
    assert f"window_is_sound: {DAY}T15 users_are_many: share of the most active user" in told
    assert "`recsys check clicks_hourly --accept`" in told


def test_a_failed_run_names_the_hours_to_make(platform: Platform) -> None:
    an_hour_missing(platform)
    told = "\n".join(why_it_failed(night(platform)))
    assert f"hours_are_all_there: {DAY}T07 was never made" in told
    assert "`recsys backfill clicks_hourly" in told


# -- recsys check -------------------------------------------------------------------------------------------------


def check(platform: Platform, *arguments: str) -> Result:
    home = str(platform.settings.home)
    return CliRunner().invoke(app, ["check", *arguments, "--home", home], env={"COLUMNS": "80"})


def outcomes(result: Result) -> dict[str, str]:
    rows = [[cell.strip() for cell in line.split("│")] for line in result.stdout.splitlines() if line.startswith("│")]
    return {row[1]: row[3] for row in rows if row[1]}


def test_check_says_what_it_judged_and_what_is_not_there(platform: Platform) -> None:
    for hour in platform.lake.keys(CLICKS_HOURLY):
        rows = platform.lake.read(CLICKS_HOURLY, hour)
        rows = rows.append_column("session_id", pa.array(["s"] * rows.num_rows))
        platform.lake.write(CLICKS_HOURLY, hour, rows.append_column("value", pa.nulls(rows.num_rows, pa.float64())))
    found = check(platform)
    assert found.exit_code == 0, found.output
    assert set(outcomes(found).values()) == {"passed", "not made"}
    assert outcomes(found)["pairs_are_whole_and_single"] == "passed"
    assert DAY in found.stdout
    absent = next(line for line in found.stdout.splitlines() if line.startswith("Not there yet"))
    assert "release" in absent
    assert "rec_cache" in absent
    assert "offsets_have_no_gap" in found.stdout
    assert max(map(len, [line for line in found.stdout.splitlines() if line.startswith(("│", "┃"))])) <= 80


def test_what_can_not_be_judged_is_an_error_and_the_other_checks_are_made(platform: Platform) -> None:
    """Hours of another version lack a column."""
    found = check(platform)
    assert found.exit_code == 1
    assert outcomes(found)["all of them"] == "FAILED"
    assert "could not be judged: rows_are_whole_events" in found.stdout
    assert "session_id" in found.stdout
    assert outcomes(found)["pairs_are_whole_and_single"] == "passed"


def test_check_tells_a_reason_once(platform: Platform) -> None:
    a_bot(platform)
    found = check(platform, "interactions")
    assert found.exit_code == 1
    assert outcomes(found)["window_is_sound"] == "FAILED"
    assert found.stdout.count("share of the most active user") == 1


def test_check_of_a_partition_that_is_not_there_names_the_latest(platform: Platform) -> None:
    found = check(platform, "interactions", "--partition", "2020-01-01")
    assert found.exit_code == 2
    assert found.stderr.strip() == f"interactions has no partition 2020-01-01: it was never made; the latest is {DAY}"
    assert check(platform, "item_catalog", "--partition", DAY).stderr.strip() == "item_catalog has no partitions"


def test_an_hour_that_is_not_there_can_not_be_accepted(platform: Platform) -> None:
    found = check(platform, "clicks_hourly", "--accept", "--partition", "2020-01-01T00")
    assert found.exit_code == 2
    assert "2020-01-01T00" in found.stderr


def test_every_claim_of_a_group_is_judged_and_described() -> None:
    names = [claim.name for group in GROUPS for claim in group.claims]
    assert len(names) == len(set(names))
    assert all(claim.description.endswith(".") for group in GROUPS for claim in group.claims)
    assert not [claim.name for group in GROUPS for claim in group.claims if claim.blocking and claim.warning]


def test_the_factors_that_an_index_is_held_against_are_those_of_the_day(platform: Platform) -> None:
    refit(platform, DAY)
    fit_als_factors(
        platform.lake,
        DAY,
        platform.settings.model_copy(update={"als": platform.settings.als.model_copy(update={"seed": 99})}),
        None,
        "implicit",
    )
    assert platform.lake.get(ITEM_INDEX, DAY).extra["factors_version"] != platform.lake.get(ALS_FACTORS, DAY).data_version
    _, failed = run_the_night(platform)
    assert "index_is_of_the_same_factors" in failed


def test_a_rejected_day_is_seen_behind_a_long_history_and_an_old_one_is_over(settings: Settings) -> None:
    def arrive(name: str, days_ago: int, landed: int, rejected: int) -> None:
        events = [event(f"{name}-{n}", f"u{n}", "i", f"{DAY}T09") for n in range(landed)]
        rows = [{"origin": "a.csv", "row": n, "reason": "missing item", "content": "x"} for n in range(rejected)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("recsys_core.landing.now_ms", lambda: int(NOW_S - days_ago * 86_400) * 1000)
            if events:
                platform.landing.write_events("test", name, event_table(*events, schema=EVENT_SCHEMA))
            if rows:
                platform.landing.write_quarantine("test", name, pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA))

    platform = Platform(settings)
    group = next(group for group in GROUPS if group.asset == "clickstream_landing")
    passes = lambda: {c.name: r.passed for c, r in group.reports(platform)}["quarantined_rows_are_few"]  # noqa: E731
    arrive("old", 9, 100, 900)
    assert not passes()
    arrive("history", 5, 5000, 0)
    assert passes(), "what was rejected long ago is no news"
    arrive("odd", 4, 0, 3)
    assert passes(), "three rows of a day are no fault"
    arrive("broken", 1, 20, 300)
    assert not passes()


def test_a_landing_zone_in_which_nothing_is_yet_passes(settings: Settings) -> None:
    (landing,) = [group for group in GROUPS if group.asset == "clickstream_landing"]
    reports = landing.reports(Platform(settings))
    assert [claim.name for claim, report in reports if not report.passed] == []
    assert len(reports) == 3
