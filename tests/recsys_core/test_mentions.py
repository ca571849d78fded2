"""Whose a text is: by what its fields mean, not by which characters stand in it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys_core.mentions import Named

IDS = st.one_of(
    st.text(min_size=1, max_size=12),
    st.integers(0, 10**16).map(str),
    st.sampled_from(["5", "a.b", "a*", "a|b", '"', "\\", "\\u0041", "jürgen", "x%", "[x]", "{x}", "😀", "a\nb", "nan"]),
)
OTHERS = ["item_id", "event_type", "ts", "value", "session_id", "device", "country", "price", "user_country"]


@given(
    IDS, st.sampled_from(["user_id", "userId", "uid", "visitorid", "CUSTOMER-ID", "user_id:token", "mine"]), st.booleans(), IDS
)
def test_a_field_of_a_user_is_found_however_json_escapes_it(user: str, field: str, ascii_only: bool, other: str) -> None:
    row = json.dumps({"item_id": other, field: user, "ts": "x"}, ensure_ascii=ascii_only)
    named = Named(user, ["mine"])
    assert named.is_of(row)
    assert named.in_fields(row)
    assert Named(user, ["mine"]).is_of(row[: row.index('"ts"')]), "a text that was cut"


@given(IDS, st.sampled_from(OTHERS), IDS, st.booleans())
def test_another_field_that_holds_the_same_is_not_the_user(user: str, field: str, somebody: str, ascii_only: bool) -> None:
    if user == somebody:
        return
    row = json.dumps({"user_id": somebody, field: user}, ensure_ascii=ascii_only)
    assert not Named(user).is_of(row)
    assert not Named(user).in_fields(row)


@pytest.mark.parametrize(
    "row",
    [
        '{"user_id":"6","item_id":"5","ts":"x"}',
        '{"user_id":"8","value":5,"ts":"x"}',
        '{"user_id":"55"}',
        '{"item_id":"5"}',
        '{"users": 5, "items": "5"}',
        "6,5,view,2026",
        '{"user_id":"6","item_id":"5","ts":',
        "",
        "5",
        "[5]",
        '{"user_id": null}',
    ],
)
def test_a_row_in_which_five_is_no_user_is_not_that_of_user_five(row: str) -> None:
    assert not Named("5").is_of(row)


@pytest.mark.parametrize(
    "row",
    [
        '{"user_id":"5","item_id":"6"}',
        '{"user_id":5}',
        '{"user": {"id": "7"}, "event": {"user_id": "5"}}',
        '{"users": ["4", "5"]}',
        '{"kunde": "5", "item_id": "7"}',
        '{"ts": 1, "user_id": "5", "item_id": "\ufffd',
        '{"user_id" : "\\u0035"}',
    ],
)
def test_a_row_that_is_that_of_user_five(row: str) -> None:
    assert Named("5").is_of(row)


def test_a_field_of_unknown_meaning_counts_only_for_rejected_rows() -> None:
    assert not Named("5").in_fields('{"rank": 5, "alpha": "5"}')


@pytest.mark.parametrize(
    ("text", "mentioned"),
    [
        ("| bob-1 | 0.3 |", True),
        ("bob-1", True),
        ("user bob-1, item 7", True),
        ("user=bob-1", True),
        ("bob-12", False),
        ("x-bob-1", False),
        ("bobb-1", False),
        ("", False),
    ],
)
def test_a_mention_is_a_word_of_its_own(text: str, mentioned: bool) -> None:
    assert Named("bob-1").mentioned(text) is mentioned
