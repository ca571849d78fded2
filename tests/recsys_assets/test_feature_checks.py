"""A planted leak stops the line: what depends on the examples is not made."""

from __future__ import annotations

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from builders import event, event_table

from recsys_assets.feature_checks import examples_see_only_the_past
from recsys_assets.features import training_examples
from recsys_assets.partitions import daily
from recsys_assets.resources import Platform
from recsys_core.features import TRAINING_EXAMPLES
from recsys_core.leaks import CHECKED
from recsys_core.tables import CLICKS_HOURLY

DAY = "2026-01-02"
EXAMPLES = {
    "user_id": ["u", "u"],
    "item_id": ["i", "j"],
    "event_type": ["view", "cart"],
    "ts": [],
    "weight": [1.0, 4.0],
    "history": [[], ["i"]],
    "hour": [10, 11],
    "weekday": [4, 4],
    "user_events_1d": [0, 1],
    "user_events_7d": [0, 1],
    "user_events_window": [0, 1],
    "user_recency_hours": [None, 1.0],
    "user_category": [None, None],
    "item_age_days": [0.0, 0.0],
    "item_events_1d": [0, 0],
    "item_events_7d": [0, 0],
    "item_events_window": [0, 0],
}


@pytest.fixture
def platform(settings) -> Platform:
    """Two clicks of a user, and their examples as they must be."""
    platform = Platform(settings)
    clicks = [event("1", "u", "i", f"{DAY}T10:00"), event("2", "u", "j", f"{DAY}T11:00", "cart")]
    for row in clicks:
        hour = f"{DAY}T{10 if row['event_id'] == '1' else 11}"
        platform.lake.write(CLICKS_HOURLY, hour, event_table(row))
    platform.lake.write(TRAINING_EXAMPLES, DAY, pa.table({**EXAMPLES, "ts": [row["ts"] for row in clicks]}))
    return platform


def made_after_the_check(platform: Platform) -> tuple[bool, dict, bool]:
    """Whether the check passed, its metadata, and whether an asset that depends on the examples was made."""

    @dg.asset(name="training_examples", partitions_def=daily)
    def examples_of_the_lake() -> dg.MaterializeResult:
        return dg.MaterializeResult()

    @dg.asset(deps=[training_examples], partitions_def=daily)
    def model() -> dg.MaterializeResult:
        return dg.MaterializeResult()

    result = dg.materialize(
        [examples_of_the_lake, examples_see_only_the_past, model],
        resources={"platform": platform},
        partition_key=DAY,
        raise_on_error=False,
        instance=dg.DagsterInstance.ephemeral(),
    )
    (evaluation,) = result.get_asset_check_evaluations()
    made = {event.asset_key.to_user_string() for event in result.get_asset_materialization_events()}
    return evaluation.passed, {name: value.value for name, value in evaluation.metadata.items()}, "model" in made


def test_examples_that_know_their_past_alone_pass(platform: Platform) -> None:
    passed, metadata, model = made_after_the_check(platform)
    assert passed, metadata
    assert metadata["examples made again"] == 2
    assert model


@pytest.mark.parametrize("column", ["history", "user_events_window", "item_events_1d"])
def test_a_planted_leak_keeps_every_model_from_being_made(platform: Platform, column: str) -> None:
    table = platform.lake.read(TRAINING_EXAMPLES, DAY)
    leaked = pa.array([[], ["j", "i"]]) if column == "history" else pc.add(table[column], 1)
    at = table.schema.get_field_index(column)
    platform.lake.write(TRAINING_EXAMPLES, DAY, table.set_column(at, column, leaked))
    passed, metadata, model = made_after_the_check(platform)
    assert not passed
    assert any(column in line and DAY in line for line in metadata["first of them"])
    assert not model


def test_the_check_looks_at_every_feature_that_time_decides() -> None:
    assert set(CHECKED) == set(EXAMPLES) - {"user_id", "item_id", "event_type", "ts", "weight"}
