"""Data quality: suites of Great Expectations as code, each named as the claim it makes, and the report of a validation.

A suite is a list of expectations over one frame. There are two kinds of frames: samples of a table's rows, and
measures beside the range that is usual for them (recsys_core/profiles.py), one row an hour and measure. Frames are
bounded: what a validation costs does not depend on the size of the table.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from recsys_core.errors import UserError
from recsys_core.events import EARLIEST_TS, EVENT_ID, EVENT_TYPE, ITEM_ID, MINUTE_MS, TS, USER_ID, VALUE, now_ms
from recsys_core.lake import Lake
from recsys_core.settings import EventSettings

if TYPE_CHECKING:
    import pandas as pd

VALUE_COLUMN, LEAST, MOST = "value", "least", "most"
"""Columns of a frame of measures: the value, and the range that is usual."""


class NotJudged(UserError, RuntimeError):
    """An expectation could not be evaluated, such as one about a column that is not there."""


@dataclass(frozen=True)
class Expectation:
    """An expectation of Great Expectations by its name (`expect_column_values_to_be_unique`) and its arguments."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it looks at."""
        named = [self.arguments[k] for k in ("column", "column_A", "column_B") if k in self.arguments]
        return (*named, *self.arguments.get("column_list", ()))

    def __str__(self) -> str:
        told = {k: v for k, v in self.arguments.items() if k not in ("mostly", "ignore_row_if")}
        shown = ", ".join(f"{k}={_short(v)}" for k, v in told.items())
        return f"{self.name.removeprefix('expect_')}({shown})"


@dataclass(frozen=True)
class Suite:
    """Expectations over one frame. `claim` is the name of the check that they make up."""

    claim: str
    expectations: tuple[Expectation, ...]


@dataclass(frozen=True)
class Finding:
    """What one expectation found: how many of the rows it looked at are unexpected."""

    expectation: str
    passed: bool
    unexpected: int
    observed: Any = None


@dataclass(frozen=True)
class Report:
    """The outcome of a suite.

    Attributes:
        claim: name of the suite.
        rows: rows of the frame.
        findings: one for each expectation.
        sample: up to `SAMPLE` of the rows that are not as expected.
    """

    claim: str
    rows: int
    findings: tuple[Finding, ...] = ()
    sample: tuple[dict[str, Any], ...] = ()

    @property
    def passed(self) -> bool:
        return all(finding.passed for finding in self.findings)

    @property
    def made(self) -> bool:
        """Whether anything was looked at; a report on nothing neither passes nor fails."""
        return bool(self.rows or self.findings)

    @property
    def reason(self) -> str:
        """One line that says what failed; empty when nothing did."""
        if self.passed:
            return ""
        if self.sample and {"what", VALUE_COLUMN, LEAST, MOST} <= set(self.sample[0]):
            more = f" and {len(self.sample) - 1} more" if len(self.sample) > 1 else ""
            return _told(self.sample[0]) + more
        if self.sample and {"hour", "reason"} <= set(self.sample[0]):
            told = "; ".join(f"{row['hour']} {row['reason']}" for row in self.sample[:TOLD])
            count = sum(f.unexpected for f in self.findings)
            return told + (f"; and {count - TOLD} more" if count > TOLD else "")
        return "; ".join(f"{f.expectation}: {f.unexpected} of {self.rows} rows" for f in self.findings if not f.passed)


def _told(row: Mapping[str, Any]) -> str:
    """A measure out of its range in words."""
    least, most = (readable(row[column]) for column in (LEAST, MOST))
    value = readable(row[VALUE_COLUMN]) if row[VALUE_COLUMN] == row[VALUE_COLUMN] else "not a number"
    beside = f" ({row['beside']})" if row.get("beside") else ""
    return f"{row.get('hour', '')}: {row['what']} {value}, expected {least} … {most}{beside}"


def readable(value: float | None) -> str:
    """A number as people read it, four digits below 1,000; `any` where there is no bound."""
    if value is None or value != value:
        return "any"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


SAMPLE, TOLD = 20, 3
LARGEST = 1e300
"""Above every number that is measured; infinity is not below it."""
SPARK_CONNECT = "pyspark.sql.connect"
PARTITION = "partition"
"""Column that `samples_of` adds."""


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def validate(suite: Suite, frame: pd.DataFrame) -> Report:
    """Hold a frame against a suite. Of a frame without rows nothing is found, and the report says that none was made.

    Raises NotJudged when an expectation could not be evaluated, such as for a column that is not there.
    """
    if not len(frame):
        return Report(suite.claim, 0)
    gx = _great_expectations()
    from great_expectations.expectations.registry import get_expectation_impl

    frame = frame.reset_index(drop=True)
    # Columns of other widths than 64 bits are compared value by value in Python.
    frame = frame.astype({c: "float64" for c in frame.columns if frame[c].dtype.kind == "f"})
    frame = frame.astype({c: "int64" for c in frame.columns if frame[c].dtype.kind in "iu"})
    # Results come in an order of their own; `meta` says which expectation each belongs to.
    expectations = [get_expectation_impl(e.name)(**e.arguments, meta={"at": at}) for at, e in enumerate(suite.expectations)]
    batch = _batch_definition().get_batch({"dataframe": frame})
    found = batch.validate(gx.ExpectationSuite(suite.claim, expectations), result_format={"result_format": "COMPLETE"})
    findings = []
    bad_rows: set[int] = set()
    results = sorted(found.results, key=lambda r: r.expectation_config.meta["at"])
    for expectation, result in zip(suite.expectations, results, strict=True):
        _raise_if_not_evaluated(suite, expectation, result)
        places = result.result.get("unexpected_index_list") or ()
        findings.append(_finding(expectation, result, len(frame)))
        if not result.success:
            bad_rows.update(places[:SAMPLE])
    sample = frame.iloc[sorted(bad_rows)[:SAMPLE]].astype(object).to_dict("records")
    return Report(suite.claim, len(frame), tuple(findings), tuple(sample))


def _finding(expectation: Expectation, result: Any, rows: int) -> Finding:
    unexpected = result.result.get("unexpected_count")
    count = int(unexpected) if unexpected is not None else (0 if result.success else rows)
    return Finding(str(expectation), bool(result.success), count, result.result.get("observed_value"))


def _raise_if_not_evaluated(suite: Suite, expectation: Expectation, result: Any) -> None:
    raised = [e for e in _exceptions(result.exception_info) if e.get("raised_exception")]
    if raised:
        raise NotJudged(f"{suite.claim}: {expectation} could not be evaluated: {raised[0].get('exception_message')}")


def _exceptions(info: Any) -> list[Mapping[str, Any]]:
    """Great Expectations reports either one exception or one for each metric."""
    if not info:
        return []
    return [info] if "raised_exception" in info else [e for e in info.values() if isinstance(e, Mapping)]


def _great_expectations() -> Any:
    """The package, imported without Spark Connect.

    Great Expectations tries whether Spark Connect is there, and that ends a process whose main module has no file, which
    Dagster's run processes are: it takes them for doctests.
    """
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    hidden = SPARK_CONNECT not in sys.modules
    if hidden:
        sys.modules[SPARK_CONNECT] = None  # type: ignore[assignment]
    try:
        import great_expectations
    finally:
        if hidden:
            del sys.modules[SPARK_CONNECT]
    return great_expectations


@cache
def _batch_definition() -> Any:
    """Where frames are handed to Great Expectations; one a process, nothing of it is stored."""
    gx = _great_expectations()
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False, metric_calculations=False)
    asset = context.data_sources.add_pandas("frames").add_dataframe_asset("frame")
    return asset.add_batch_definition_whole_dataframe("whole")


# -- frames -----------------------------------------------------------------------------------------------------


def sample_rows(dataset: ds.Dataset | None, limit: int, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """At most about `limit` rows, evenly spread over a dataset that is read in a stream."""
    import pandas as pd

    if dataset is None:
        return pd.DataFrame(columns=list(columns or ()))
    step = max(1, -(-dataset.count_rows() // limit))
    at, kept = 0, []
    for batch in dataset.to_batches(columns=list(columns) if columns else None):
        picked = np.arange(-at % step, batch.num_rows, step)
        at += batch.num_rows
        if len(picked):
            kept.append(batch.take(pa.array(picked)))
    table = pa.Table.from_batches(kept, kept[0].schema) if kept else dataset.schema.empty_table()
    return table.to_pandas()


def sample_of(lake: Lake, table: str, keys: Iterable[str], limit: int) -> pd.DataFrame:
    """`sample_rows` of some partitions of a table, those that exist."""
    return sample_rows(lake.dataset(table, keys, missing_ok=True), limit)


def samples_of(lake: Lake, table: str, keys: Sequence[str], limit: int) -> pd.DataFrame:
    """Samples of some partitions as one frame, `limit` rows in all, with the key of each row in the column `partition`."""
    import pandas as pd

    each = max(1, limit // max(len(keys), 1))
    frames = [sample_of(lake, table, [key], each).assign(**{PARTITION: key}) for key in keys]
    return pd.concat([frame for frame in frames if len(frame)] or [pd.DataFrame()], ignore_index=True)


# -- suites over rows -------------------------------------------------------------------------------------------


def _present(*columns: str) -> list[Expectation]:
    return [Expectation("expect_column_values_to_not_be_null", {"column": column}) for column in columns]


def _between(column: str, least: float | None, most: float | None = None, **more: Any) -> Expectation:
    return Expectation("expect_column_values_to_be_between", {"column": column, "min_value": least, "max_value": most, **more})


def _one_of(column: str, values: Iterable[Any]) -> Expectation:
    return Expectation("expect_column_values_to_be_in_set", {"column": column, "value_set": sorted(values)})


def _id_lengths(columns: Sequence[str], most: int) -> list[Expectation]:
    return [
        Expectation("expect_column_value_lengths_to_be_between", {"column": c, "min_value": 1, "max_value": most})
        for c in columns
    ]


def landing_suite(settings: EventSettings) -> Suite:
    """Rows that landed can be events. A few that can't are the business of the quarantine."""
    latest = now_ms() + settings.max_future_minutes * MINUTE_MS
    mostly = {"mostly": 0.98}
    ids = [EVENT_ID, USER_ID, ITEM_ID]
    rules = [*_present(*ids, EVENT_TYPE, TS), _between(TS, EARLIEST_TS, latest), _one_of(EVENT_TYPE, settings.weights)]
    rules += _id_lengths(ids, settings.max_id_bytes)
    return Suite("landed_rows_are_events", tuple(Expectation(r.name, {**r.arguments, **mostly}) for r in rules))


def clicks_suite(settings: EventSettings) -> Suite:
    """Rows of `clicks_hourly` are whole events."""
    ids = [EVENT_ID, USER_ID, ITEM_ID]
    return Suite(
        "rows_are_whole_events",
        (
            *_present(*ids, EVENT_TYPE, TS, "session_id"),
            *_id_lengths(ids, settings.max_id_bytes),
            _one_of(EVENT_TYPE, settings.weights),
            _between(VALUE, -1e12, 1e12),
        ),
    )


def interactions_suite() -> Suite:
    """Rows of `interactions` can be fitted: one a pair, counted, with ordered times."""
    return Suite(
        "pairs_are_whole_and_single",
        (
            *_present(USER_ID, ITEM_ID, "weight", "n_events", "first_ts", "last_ts"),
            _between("weight", 0, 1e30, strict_min=True),
            _between("n_events", 1),
            Expectation("expect_compound_columns_to_be_unique", {"column_list": [PARTITION, USER_ID, ITEM_ID]}),
            Expectation(
                "expect_column_pair_values_a_to_be_greater_than_b",
                {"column_A": "last_ts", "column_B": "first_ts", "or_equal": True},
            ),
        ),
    )


def catalogue_suite() -> Suite:
    """Rows of the catalogue are items: an id each, prices that can be paid, categories that are paths."""
    return Suite(
        "catalogue_rows_are_items",
        (
            *_present(ITEM_ID, "available"),
            Expectation("expect_column_values_to_be_unique", {"column": ITEM_ID}),
            _between("price", 0, 1e9),
            Expectation("expect_column_values_to_match_regex", {"column": "category", "regex": r"^[^/]+(?:/[^/]+)*$"}),
        ),
    )


def user_features_suite() -> Suite:
    """Counts of a user's events are nested windows of one another."""
    return Suite("user_features_are_in_range", (*_present(USER_ID), *_activity_rules("user")))


def item_features_suite() -> Suite:
    """Counts of an item's events are nested windows of one another."""
    return Suite(
        "item_features_are_in_range",
        (*_present(ITEM_ID), *_activity_rules("item"), *_item_rules()),
    )


def training_examples_suite(settings: EventSettings) -> Suite:
    """Training examples can be learned from: a weight each, histories of the past, features in range."""
    return Suite(
        "examples_are_in_range",
        (
            *_present(USER_ID, ITEM_ID, TS, EVENT_TYPE, "weight", "hour", "weekday"),
            _one_of(EVENT_TYPE, settings.weights),
            _between("weight", 0, 1e6, strict_min=True),
            _between("hour", 0, 23),
            _between("weekday", 0, 6),
            *_activity_rules("user"),
            *_activity_rules("item"),
            *_item_rules(),
        ),
    )


def _item_rules() -> list[Expectation]:
    return [
        *_present("item_age_days", "price_bucket"),
        _between("item_age_days", 0, LARGEST),
        _between("price_bucket", -1),
    ]


def _activity_rules(side: str) -> list[Expectation]:
    day, week, window = (f"{side}_events_{span}" for span in ("1d", "7d", "window"))
    rules = [*_present(day, week, window), _between(day, 0)]
    for more, less in ((week, day), (window, week)):
        pair = {"column_A": more, "column_B": less, "or_equal": True}
        rules.append(Expectation("expect_column_pair_values_a_to_be_greater_than_b", pair))
    return rules


def usual_suite(claim: str) -> Suite:
    """Over a frame of measures: every value is a finite number in its usual range; a side that is null is not judged."""
    return Suite(
        claim,
        (
            *_present(VALUE_COLUMN),
            _between(VALUE_COLUMN, -LARGEST, LARGEST),
            *(
                Expectation(
                    "expect_column_pair_values_a_to_be_greater_than_b",
                    {"column_A": high, "column_B": low, "or_equal": True, "ignore_row_if": "either_value_is_missing"},
                )
                for high, low in ((VALUE_COLUMN, LEAST), (MOST, VALUE_COLUMN))
            ),
        ),
    )
