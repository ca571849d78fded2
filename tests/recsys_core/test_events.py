import math

import pyarrow as pa
import pytest
from builders import event, event_table
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from recsys_core.events import (
    HOUR_MS,
    content_ids,
    day_key,
    day_keys,
    hour_key,
    hour_keys,
    invalid_reason,
    invalid_reasons,
    key_start_ms,
    now_ms,
)
from recsys_core.settings import EventSettings

START = 1_767_225_600_000
"""2026-01-01T00:00 UTC."""


def ids(*columns: list) -> list[str]:
    return content_ids([pa.array(column) for column in columns]).to_pylist()


def test_a_key_names_the_hour_or_day_from_its_first_to_its_last_millisecond():
    assert key_start_ms("2026-01-01") == key_start_ms("2026-01-01T00") == START
    assert [hour_key(START + ms) for ms in (0, HOUR_MS - 1, HOUR_MS)] == ["2026-01-01T00", "2026-01-01T00", "2026-01-01T01"]
    assert [day_key(START + ms) for ms in (-1, 0, 24 * HOUR_MS - 1)] == ["2025-12-31", "2026-01-01", "2026-01-01"]
    assert hour_key(-1) == "1969-12-31T23"


def test_keys_of_a_range_are_those_that_it_touches_and_its_end_is_not_in_it():
    assert hour_keys(START, START + HOUR_MS) == ["2026-01-01T00"]
    assert hour_keys(START + HOUR_MS - 1, START + HOUR_MS + 1) == ["2026-01-01T00", "2026-01-01T01"]
    assert day_keys(START - 1, START + 1) == ["2025-12-31", "2026-01-01"]
    assert hour_keys(START, START) == []
    assert len(hour_keys(key_start_ms("2024-02-28"), key_start_ms("2024-03-01"))) == 48


def test_equal_rows_get_equal_ids_and_every_difference_changes_the_id():
    rows = ids(["u", "u", "v", "u"], ["a", "a", "a", "b"], [1, 1, 1, 1])
    assert rows[0] == rows[1]
    assert len(set(rows)) == 3
    assert all(len(i) == 32 for i in rows)
    assert ids(["u"], ["a"], [2]) != ids(["u"], ["a"], [1])


def test_ids_are_the_same_on_every_machine_and_for_every_layout_in_memory():
    assert ids(["u", None], ["ä", ""]) == ["0bb5ce1474386bb55f930afa74515341", "c70ff03135e2c0b19530fcaebb85ee97"]
    chunked = content_ids([pa.chunked_array([["u"], [None]], pa.string()), pa.chunked_array([["ä", ""]]).dictionary_encode()])
    assert chunked.to_pylist() == ids(["u", None], ["ä", ""])


def test_null_and_empty_are_different_values_of_an_id():
    assert len({*ids(["", None]), *ids(["-1"]), *ids(["\0"])}) == 4


@pytest.mark.parametrize("pair", [("a:1", "b"), ("a", "1:b"), ("a:", "1:b"), ("1:a:1", "b"), ("", "a:1b"), ("a:1b", "")])
def test_a_value_with_the_separator_is_not_taken_for_two_values(pair):
    others = [("a", "b"), ("a:1", "b"), ("a", "1:b"), ("a:", "1:b"), ("1:a:1", "b"), ("", "a:1b"), ("a:1b", "")]
    same = [other for other in others if ids([pair[0]], [pair[1]]) == ids([other[0]], [other[1]])]
    assert same == [pair]


def test_ids_of_no_columns_are_refused_and_of_no_rows_are_none():
    with pytest.raises(ValueError, match="at least one column"):
        content_ids([])
    assert content_ids([pa.array([], pa.string())]).to_pylist() == []


NOW = key_start_ms("2026-03-02T10:00")
LONG = "é" * 129
RULES = [
    ({}, None),
    ({"user_id": None}, "missing user_id"),
    ({"user_id": ""}, "missing user_id"),
    ({"item_id": None}, "missing item_id"),
    ({"item_id": ""}, "missing item_id"),
    ({"event_id": None}, "missing event_id"),
    ({"event_id": ""}, "missing event_id"),
    ({"user_id": LONG}, "user_id longer than 256 bytes"),
    ({"item_id": LONG}, "item_id longer than 256 bytes"),
    ({"event_id": LONG}, "event_id longer than 256 bytes"),
    ({"session_id": LONG}, "session_id longer than 256 bytes"),
    ({"device": LONG}, "device longer than 256 bytes"),
    ({"country": LONG}, "country longer than 256 bytes"),
    ({"recommendation_id": LONG}, "recommendation_id longer than 256 bytes"),
    ({"user_id": "é" * 128}, None),
    ({"session_id": ""}, None),
    ({"event_type": "View"}, "unknown event_type"),
    ({"event_type": None}, "unknown event_type"),
    ({"event_type": "purchase"}, None),
    ({"ts": None}, "missing or unreadable ts"),
    ({"ts": 631_151_999_999}, "ts before 1990: wrong unit or broken clock"),
    ({"ts": 631_152_000_000}, None),
    ({"ts": NOW // 1000}, "ts before 1990: wrong unit or broken clock"),
    ({"ts": NOW + HOUR_MS}, None),
    ({"ts": NOW + HOUR_MS + 1}, "ts in the future"),
    ({"user_id": "", "item_id": "", "event_type": "?", "ts": 0}, "missing user_id"),
    ({"item_id": LONG, "event_id": "", "device": LONG}, "item_id longer than 256 bytes"),
    ({"event_type": "?", "ts": None}, "unknown event_type"),
    ({"item_id": "a\0b"}, "item_id holds a NUL character"),
    ({"country": "\0", "event_type": "?"}, "country holds a NUL character"),
    ({"event_type": "view\0"}, "unknown event_type"),
    ({"value": math.nan}, "value is not a finite number"),
    ({"value": -math.inf}, "value is not a finite number"),
    ({"value": 1.7e308}, None),
    ({"value": math.nan, "ts": 0}, "ts before 1990: wrong unit or broken clock"),
]


def test_every_rule_names_what_is_wrong_with_a_row_and_a_good_row_has_no_reason():
    rows = [{**event("e", "u", "i", "2026-03-02T09:00"), **change} for change, _ in RULES]
    expected = [reason for _, reason in RULES]
    table = event_table(*rows)
    assert invalid_reasons(table, EventSettings(), NOW).to_pylist() == expected
    assert invalid_reasons(table.to_batches()[0], EventSettings(), NOW).to_pylist() == expected
    assert invalid_reasons(pa.concat_tables([table, table]), EventSettings(), NOW).to_pylist() == expected * 2
    assert [invalid_reason(row, EventSettings(), NOW) for row in table.to_pylist()] == expected


TEXTS = st.one_of(
    st.none(), st.sampled_from(["", "a", LONG, "é" * 128, "view", "x" * 256, "x" * 257, "\0"]), st.text(max_size=3)
)
ROWS = st.fixed_dictionaries(
    dict.fromkeys(("event_id", "user_id", "item_id", "session_id", "device", "country", "recommendation_id"), TEXTS)
    | {
        "event_type": st.one_of(st.just("view"), TEXTS),
        "ts": st.one_of(
            st.none(), st.just(NOW), st.integers(NOW + HOUR_MS - 2, NOW + HOUR_MS + 2), st.integers(-(2**63), 2**63 - 1)
        ),
        "value": st.one_of(st.none(), st.floats()),
    }
)


@given(st.lists(ROWS, min_size=1, max_size=20))
@hypothesis_settings(deadline=None, max_examples=100)
def test_one_row_is_judged_as_it_is_among_others(rows):
    together = invalid_reasons(event_table(*rows), EventSettings(), NOW).to_pylist()
    assert together == [invalid_reason(row, EventSettings(), NOW) for row in rows]


def test_limits_and_types_come_from_the_settings_and_the_clock_is_that_of_now():
    settings = EventSettings(weights={"play": 1.0}, max_future_minutes=0, max_id_bytes=8)
    rows = [event("e", "u", "i", "2026-03-02T09:00", kind) for kind in ("play", "view")]
    rows += [{**rows[0], "user_id": "123456789"}, {**rows[0], "ts": now_ms() + 60_000}]
    expected = [None, "unknown event_type", "user_id longer than 8 bytes", "ts in the future"]
    assert invalid_reasons(event_table(*rows), settings).to_pylist() == expected
    assert [invalid_reason(row, settings, now_ms()) for row in event_table(*rows).to_pylist()] == expected
    assert invalid_reasons(event_table(), settings).to_pylist() == []
