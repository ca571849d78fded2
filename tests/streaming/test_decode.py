"""A message is judged alike whether it comes alone, with a handful or with thousands."""

from __future__ import annotations

import math

import numpy as np
import orjson
import pytest

from recsys_core.events import EVENT_SCHEMA, now_ms
from recsys_core.settings import EventSettings
from streaming.decode import FEW, decode, decode_one

SETTINGS = EventSettings()
NOW = now_ms()
GOOD = {"v": 1, "event_id": "e", "user_id": "u", "item_id": "i", "event_type": "view", "ts": NOW}
MESSAGES: list[bytes | None] = [
    *(
        orjson.dumps({**GOOD, **change})
        for change in (
            {},
            {"value": 2},
            {"value": 2.5},
            {"value": 2**53 + 1},
            {"value": -(2**63)},
            {"value": 2**63},
            {"value": True},
            {"value": "2"},
            {"value": None, "session_id": None, "device": "d", "country": "DE", "recommendation_id": "r"},
            {"ts": 2**63},
            {"ts": -(2**63)},
            {"ts": float(NOW)},
            {"ts": NOW // 1000},
            {"ts": NOW + 2 * 3600_000},
            {"ts": None},
            {"v": 2},
            {"v": None},
            {"v": True},
            {"user_id": 7},
            {"user_id": ""},
            {"user_id": "\u00fc" * 129},
            {"item_id": "nul\0"},
            {"item_id": '["\\n],['},
            {"event_type": "stare"},
            {"device": ["d"]},
            {"more": {"of": ["it"]}},
        )
    ),
    b"",
    None,
    b"\xff",
    b"[]",
    b'{"v": 1}{}',
    b'{"user_id": "\\ud800"}',
    b"x" * 2000,
]


def outcome(value: bytes | None) -> tuple[dict[str, object] | None, str]:
    try:
        found = decode_one(value, SETTINGS, 1000, NOW)
    except ValueError as error:
        return None, str(error)
    return {name: found[name] for name in EVENT_SCHEMA.names}, ""


@pytest.mark.parametrize("more", [0, FEW, 5000])
def test_one_by_one_and_together_come_to_the_same(more: int) -> None:
    values = [*MESSAGES, *[orjson.dumps(GOOD)] * more]
    together = decode(values, SETTINGS, 1000, np.full(len(values), NOW))
    alone = [outcome(value) for value in MESSAGES]
    reasons = dict(together.rejected)
    assert [reasons.get(at, "") for at in range(len(MESSAGES))] == [reason for _, reason in alone]
    events = dict(zip(together.rows.tolist(), together.events.to_pylist(), strict=True))
    assert [events.get(at) for at in range(len(MESSAGES))] == [event for event, _ in alone]
    assert sum(event is not None for event, _ in alone) == 9


@pytest.mark.parametrize("value", [2**53 + 1, 2**62 + 1, 1e300])
def test_a_value_is_the_nearest_double_however_it_is_read(value: float) -> None:
    message = orjson.dumps({**GOOD, "value": value})
    for count in (1, FEW + 1):
        found = decode([message] * count, SETTINGS, 1000, np.full(count, NOW)).events["value"].to_pylist()
        assert all(math.isclose(one, value, rel_tol=1e-16) for one in found)
