"""Validation by Great Expectations: reports, samples, and suites over rows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from builders import event, event_table

from recsys_core.quality import (
    SAMPLE,
    Expectation,
    Suite,
    clicks_suite,
    interactions_suite,
    landing_suite,
    readable,
    sample_rows,
    training_examples_suite,
    usual_suite,
    validate,
)
from recsys_core.settings import EventSettings

PROJECT = Path(__file__).parents[2]
HOUR = "2026-03-02T10"


def unexpected(report: object) -> dict[str, int]:
    return {f.expectation.split("(")[0]: f.unexpected for f in report.findings if not f.passed}  # type: ignore[attr-defined]


def test_a_process_without_a_main_file_can_validate() -> None:
    """Dagster's run processes are such; Spark Connect, which Great Expectations looks for, would end them."""
    code = (
        "import pandas as pd; from recsys_core.quality import usual_suite, validate; "
        "print(validate(usual_suite('c'), pd.DataFrame({'value': [1.0], 'least': [2.0], 'most': [3.0]})).passed)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=200)
    assert ran.stdout.strip() == "False", ran.stderr


def test_bounds_that_are_missing_are_not_judged() -> None:
    frame = pd.DataFrame(
        {
            "hour": ["a", "b", "c"],
            "what": "events",
            "value": [1.0, 5.0, 9.0],
            "least": [0.5, 6.0, None],
            "most": [2.0, None, 8.0],
        }
    )
    report = validate(usual_suite("volume_is_as_usual"), frame)
    assert [row["hour"] for row in report.sample] == ["b", "c"]
    assert not report.passed
    assert report.reason == "b: events 5, expected 6 … any and 1 more"
    assert [readable(value) for value in (None, float("nan"), 0.123456, 999.6, 14628.0)] == [
        "any",
        "any",
        "0.1235",
        "999.6",
        "14,628",
    ]


def test_a_frame_without_rows_has_nothing_wrong() -> None:
    report = validate(usual_suite("x"), pd.DataFrame({"value": [], "least": [], "most": []}))
    assert (report.passed, report.rows, report.reason) == (True, 0, "")


def test_an_expectation_about_a_column_that_is_not_there_is_an_error_and_no_failure() -> None:
    suite = Suite("x", (Expectation("expect_column_values_to_not_be_null", {"column": "gone"}),))
    with pytest.raises(RuntimeError, match="gone"):
        validate(suite, pd.DataFrame({"here": [1]}))


def test_the_sample_of_failing_rows_is_bounded() -> None:
    suite = Suite("x", (Expectation("expect_column_values_to_not_be_null", {"column": "a"}),))
    report = validate(suite, pd.DataFrame({"a": [None] * 100, "n": range(100)}))
    assert len(report.sample) == SAMPLE
    assert report.findings[0].unexpected == 100


def test_landed_rows_may_hold_a_few_that_are_no_events_and_not_many() -> None:
    suite = landing_suite(EventSettings())
    good = [event(f"e{n}", "u", "i", HOUR) for n in range(99)]
    assert validate(suite, event_table(*good, event("x", None, "i", HOUR)).to_pandas()).passed
    bad = [event(f"x{n}", None, "i", HOUR, "unheard") for n in range(9)]
    found = unexpected(validate(suite, event_table(*good, *bad).to_pandas()))
    assert set(found) == {"column_values_to_not_be_null", "column_values_to_be_in_set"}


def test_clicks_without_an_id_or_of_an_unknown_type_are_found() -> None:
    rows = event_table(event("a", "u", "i", HOUR, session_id="s"), event("", "u", "i", HOUR, "unheard", session_id="s"))
    found = unexpected(validate(clicks_suite(EventSettings()), rows.to_pandas()))
    assert found == {"column_value_lengths_to_be_between": 1, "column_values_to_be_in_set": 1}


def test_pairs_that_occur_twice_or_end_before_they_begin_are_found() -> None:
    columns = ["partition", "user_id", "item_id", "weight", "n_events", "first_ts", "last_ts"]
    rows = [["d1", "u", "i", 1.0, 1, 1, 2], ["d1", "u", "i", 0.0, 1, 5, 4], ["d2", "u", "i", 1.0, 1, 1, 2]]
    rows = pd.DataFrame(rows, columns=columns)
    found = unexpected(validate(interactions_suite(), rows))
    assert found == {
        "column_values_to_be_between": 1,
        "compound_columns_to_be_unique": 2,
        "column_pair_values_a_to_be_greater_than_b": 1,
    }


def test_examples_whose_windows_do_not_nest_are_found() -> None:
    row = {"user_id": "u", "item_id": "i", "ts": 1, "event_type": "view", "weight": 1.0, "hour": 3, "weekday": 6}
    row |= {f"{side}_events_{span}": 2 for side in ("user", "item") for span in ("1d", "7d", "window")}
    row |= {"item_age_days": 0.5, "price_bucket": -1}
    suite = training_examples_suite(EventSettings())
    assert validate(suite, pd.DataFrame([row])).passed
    wrong = {**row, "item_events_7d": 1, "hour": 24}
    found = unexpected(validate(suite, pd.DataFrame([row, wrong])))
    assert set(found) == {"column_pair_values_a_to_be_greater_than_b", "column_values_to_be_between"}


def test_a_sample_is_spread_evenly_over_all_rows() -> None:
    dataset = ds.dataset(pa.table({"n": list(range(1000))}))
    rows = sample_rows(dataset, 100)
    assert rows["n"].tolist() == list(range(0, 1000, 10))
    assert sample_rows(dataset, 5000)["n"].tolist() == list(range(1000))
    assert len(sample_rows(None, 10, ["a"])) == 0
