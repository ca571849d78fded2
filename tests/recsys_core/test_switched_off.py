"""No check passes because what it looks at is not a number, is null, or is not there."""

from __future__ import annotations

import math

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_core.catalog import CATALOG_KEY, CATALOG_SCHEMA, CATALOG_TABLE
from recsys_core.events import DAY_MS, hour_keys, key_start_ms
from recsys_core.gate import judge as judge_gate
from recsys_core.lake import Lake
from recsys_core.model_quality import factor_measures, report_of, vector_measures, weight_measures
from recsys_core.profiles import Measure, Profiles, judge, judge_catalogue
from recsys_core.quality import (
    Report,
    Suite,
    catalogue_suite,
    clicks_suite,
    interactions_suite,
    item_features_suite,
    training_examples_suite,
    user_features_suite,
    validate,
)
from recsys_core.settings import EventSettings, GateSettings, QualitySettings
from recsys_core.tables import CLICKS_HOURLY, INTERACTIONS

EVENTS = EventSettings()
COUNTS = {f"{side}_events_{span}": 2.0 for side in ("user", "item") for span in ("1d", "7d", "window")}
ITEM = {"item_id": "i", "item_age_days": 0.5, "price_bucket": 1.0}
GOOD: dict[str, tuple[Suite, dict[str, object]]] = {
    suite.claim: (suite, row)
    for suite, row in (
        (
            clicks_suite(EVENTS),
            {"event_id": "e", "user_id": "u", "item_id": "i", "ts": 1.0, "session_id": "s", "event_type": "view", "value": 1.0},
        ),
        (
            interactions_suite(),
            {
                "partition": "d",
                "user_id": "u",
                "item_id": "i",
                "weight": 1.0,
                "n_events": 1.0,
                "first_ts": 1.0,
                "last_ts": 2.0,
            },
        ),
        (catalogue_suite(), {"item_id": "i", "available": True, "price": 1.0, "category": "a/b"}),
        (user_features_suite(), {"user_id": "u", **{n: v for n, v in COUNTS.items() if n.startswith("user")}}),
        (item_features_suite(), {**ITEM, **{n: v for n, v in COUNTS.items() if n.startswith("item")}}),
        (
            training_examples_suite(EVENTS),
            {"user_id": "u", "ts": 1.0, "event_type": "view", "weight": 1.0, "hour": 3.0, "weekday": 6.0, **COUNTS, **ITEM},
        ),
    )
}
MAY_BE_NULL = {
    ("rows_are_whole_events", "value"),
    ("catalogue_rows_are_items", "price"),
    ("catalogue_rows_are_items", "category"),
}
"""Nulls of these are no fault; that a value is NaN is found by the claims on prices, below."""
MAY_BE_LARGE = {"ts", "first_ts", "last_ts", "n_events", "price_bucket", *COUNTS}
"""Stored as integers, which have no infinity."""
CASES = [
    (claim, column, bad)
    for claim, (suite, row) in GOOD.items()
    for column in row
    for bad in ((None,) if isinstance(row[column], str | bool) else (None, math.nan, math.inf))
    if column != "partition" and (claim, column) not in MAY_BE_NULL and not (bad == math.inf and column in MAY_BE_LARGE)
]


@pytest.mark.parametrize("claim", GOOD)
def test_one_good_row_passes_and_none_is_not_made(claim: str) -> None:
    suite, row = GOOD[claim]
    assert validate(suite, pd.DataFrame([row])).passed
    nothing = validate(suite, pd.DataFrame(columns=list(row)))
    assert not nothing.made


@pytest.mark.parametrize(("claim", "column", "bad"), CASES)
def test_a_column_that_is_null_or_no_number_fails(claim: str, column: str, bad: object) -> None:
    suite, row = GOOD[claim]
    other = {**row, "user_id": "v", "item_id": "j", "event_id": "f"}
    some = pd.DataFrame([row, {**{name: other[name] for name in row}, column: bad}])
    assert not validate(suite, some).passed


@pytest.mark.parametrize("claim", GOOD)
def test_a_column_that_is_not_there_is_an_error(claim: str) -> None:
    suite, row = GOOD[claim]
    for column in {c for e in suite.expectations for c in e.columns}:
        with pytest.raises(RuntimeError, match=column):
            validate(suite, pd.DataFrame([{name: value for name, value in row.items() if name != column}]))


# -- measures -----------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.floats(-1e6, 1e6), st.sampled_from([math.nan, math.inf, -math.inf, 0.0]))
BOUNDS = st.one_of(st.none(), NUMBERS)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.builds(Measure, st.just("h"), st.just("x"), NUMBERS, BOUNDS, BOUNDS), min_size=1, max_size=5))
def test_a_report_passes_exactly_where_all_numbers_are_finite_and_in_their_range(measures: list[Measure]) -> None:
    def holds(m: Measure) -> bool:
        given_numbers = [n for n in (m.value, m.least, m.most) if n is not None]
        within = (m.least is None or m.value >= m.least) and (m.most is None or m.value <= m.most)
        return all(map(math.isfinite, given_numbers)) and within

    report = report_of("x", measures)
    assert report.passed == all(map(holds, measures))
    assert report.passed == (not any(m.unusual for m in measures))
    assert bool(report.reason) != report.passed


def test_a_value_that_was_stored_as_null_is_no_number() -> None:
    assert not report_of("x", [Measure("h", "recall", None, least=0.9)]).passed  # type: ignore[arg-type]


# -- hours --------------------------------------------------------------------------------------------------------

END = key_start_ms("2026-03-06")
HOURS = hour_keys(END - 3 * DAY_MS, END)
SETTINGS = QualitySettings()


def write_day(lake: Lake, hours: list[str], bad: object = 1.0, factor: float = 1.0) -> None:
    """Hours of 120 events with a value each; one of an hour is `bad`, all others are `factor` times the usual."""
    for hour in hours:
        start = key_start_ms(hour)
        values = [bad if n == 0 and bad != 1.0 else factor * (10.0 + n % 7) for n in range(120)]
        rows = {
            "event_id": [f"{hour}-{n}" for n in range(120)],
            "user_id": [f"u{n * 7 % 90}" for n in range(120)],
            "item_id": [f"i{n % 40}" for n in range(120)],
            "event_type": ["view"] * 120,
            "ts": [start + n * 20_000 + start // 3_600_000 % 997 for n in range(120)],
            "value": pa.array(values, pa.float64()),
        }
        lake.write(CLICKS_HOURLY, hour, pa.table(rows))


def prices_of(lake: Lake, hours: list[str]) -> Report:
    return judge(Profiles(lake, SETTINGS), hours)["prices_are_as_usual"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("factor", [1.0, 10.0])
def test_a_value_that_is_no_number_does_not_switch_the_price_check_off(lake: Lake, bad: float, factor: float) -> None:
    write_day(lake, HOURS[:48])
    assert prices_of(lake, HOURS[:48]).passed
    write_day(lake, HOURS[48:], bad, factor)
    report = prices_of(lake, HOURS[48:])
    assert not report.passed
    told = " ".join(str(row["what"]) for row in report.sample)
    assert "not finite" in told
    assert ("median" in told) == (factor != 1.0)
    again = prices_of(lake, HOURS[48:])
    assert [row["what"] for row in again.sample] == [row["what"] for row in report.sample], "from what was stored"


def test_a_null_value_is_none(lake: Lake) -> None:
    write_day(lake, HOURS[:48])
    assert prices_of(lake, HOURS[:48]).passed
    write_day(lake, HOURS[48:], None)
    assert prices_of(lake, HOURS[48:]).passed


# -- catalogue ----------------------------------------------------------------------------------------------------


def catalogue(lake: Lake, prices: list[float | None]) -> dict[str, Report]:
    items = [{"item_id": f"i{n}", "category": "a/b", "price": p, "available": True} for n, p in enumerate(prices)]
    rows = [{**dict.fromkeys(CATALOG_SCHEMA.names), **item} for item in items]
    lake.write(CATALOG_TABLE, CATALOG_KEY, pa.Table.from_pylist(rows, schema=CATALOG_SCHEMA))
    frame = pd.DataFrame(items, columns=["item_id", "category", "price", "available"])
    report = validate(catalogue_suite(), frame)
    return {report.claim: report, **judge_catalogue(lake, report)}


CATALOGUES: dict[str, list[float | None]] = {
    "one NaN": [math.nan, *([10.0] * 59)],
    "one infinity": [math.inf, *([10.0] * 59)],
    "ten times the prices and one NaN": [math.nan, *([100.0] * 59)],
    "all NaN": [math.nan] * 60,
    "no prices": [None] * 60,
    "one item": [10.0],
    "no items": [],
}


@pytest.mark.parametrize("case", CATALOGUES)
def test_a_catalogue_without_what_it_had_is_found(case: str, lake: Lake) -> None:
    assert all(report.passed for report in catalogue(lake, [10.0] * 60).values())
    assert not all(report.passed for report in catalogue(lake, CATALOGUES[case]).values())
    assert all(report.passed for report in catalogue(lake, [10.0] * 60).values())


def test_a_first_catalogue_with_a_price_that_is_no_number_is_found(lake: Lake) -> None:
    assert not catalogue(lake, [math.nan, 1.0])["catalogue_prices_are_as_usual"].passed


# -- models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[math.nan], [math.inf], [0.0], [None], [1.0, None], []])
def test_weights_that_can_not_be_fitted_are_found(lake: Lake, weights: list[float | None]) -> None:
    rows = pa.table({"user_id": ["u"] * len(weights), "weight": pa.array(weights, pa.float64())})
    lake.write(INTERACTIONS, "2026-03-02", rows)
    assert not report_of("weights", weight_measures(lake, "2026-03-02")).passed


@pytest.mark.parametrize("vectors", [[], [[math.nan, 1.0]], [[math.inf, 1.0]], [[0.0, 0.0]], [[1.0, 1.0], [math.nan, 0.0]]])
def test_vectors_that_can_not_serve_are_found(vectors: list[list[float]]) -> None:
    import numpy as np

    finite, _ = vector_measures("x", [np.array(vectors, np.float32).reshape(-1, 2)])
    assert not report_of("x", finite).passed


def test_a_day_without_factors_is_found(lake: Lake) -> None:
    try:
        found = factor_measures(lake, "2026-03-02")
    except LookupError:
        return
    assert not report_of("x", found["factors_are_finite_and_not_all_zero"]).passed


@pytest.mark.parametrize("name", ["ndcg@10", "coverage@10", "latency_ms", "ndcg@10 of cold users"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_does_not_pass_the_gate(name: str, bad: float) -> None:
    good = {"ndcg@10": 0.2, "coverage@10": 0.1, "latency_ms": 1.0, "ndcg@10 of cold users": 0.1, "users of cold users": 900.0}
    assert judge_gate(good, good, GateSettings()).passed
    assert not judge_gate({**good, name: bad}, good, GateSettings()).passed


def test_a_segment_whose_size_is_no_number_is_judged() -> None:
    good = {"ndcg@10": 0.2, "coverage@10": 0.1, "latency_ms": 1.0, "ndcg@10 of cold users": 0.1}
    worse = {**good, "ndcg@10 of cold users": 0.01, "users of cold users": math.nan}
    assert not judge_gate(worse, good, GateSettings()).passed
