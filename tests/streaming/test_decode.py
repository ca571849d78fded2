"""A message is judged alike whether it comes alone, with a handful or with thousands."""

from __future__ import annotations

import math

import numpy as np
import orjson
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from recsys_core.events import EVENT_SCHEMA, now_ms
from recsys_core.settings import EventSettings
from streaming.decode import FEW, MAX_DEPTH, decode, decode_one

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
LONGEST = 10_000
ODD = [
    b"NaN",
    b"-NaN",
    b"Infinity",
    b"-Infinity",
    b"Inf",
    b"nan",
    b"-0",
    b"-0.0",
    b"1.0",
    b"1e3",
    b"01",
    b"1.",
    b"1.8e308",
    b"1e0000400",
    b"-1e400",
    b"1e-400",
    b"9" * 400,
    b"0." + b"0" * 400 + b"1",
    b"9" * 25,
    b"true",
    b"null",
    b"[]",
    b"{}",
    b'{"v": NaN}',
    b"[1, NaN]",
    b"[" * MAX_DEPTH + b"]" * MAX_DEPTH,
    b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1),
    b"[" * 3000 + b"]" * 3000,
    b'{"a":' * MAX_DEPTH + b"1" + b"}" * MAX_DEPTH,
    b'"NaN"',
    b'"x: NaN, y"',
    b'"Infinity-War"',
    b'"a\\"NaN,\\""',
    b'"\\u0041"',
    b'"\\ud800"',
    b'"\\u0000"',
    b'"\\x41"',
    b'"tab\t"',
    b'"\xed\xa0\x80"',
    b'"\xef\xbb\xbf"',
    b'"a" /* comment */',
]
"""What stands where a value does in JSON, or in what is taken for it."""
TOKENS = st.one_of(
    st.sampled_from(ODD),
    st.integers().map(lambda number: str(number).encode()),
    st.floats(allow_nan=False, allow_infinity=False).map(lambda number: repr(number).encode()),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6).map(orjson.dumps),
)
NAMES = [*GOOD, "value", "session_id", "device", "price", "", "Value"]


@st.composite
def odd_message(draw: st.DrawFn) -> bytes:
    """A message of the right form with odd values, odd blanks, or the same name twice."""
    fields = {name: orjson.dumps(value) for name, value in GOOD.items()}
    pairs = [*fields.items(), *draw(st.lists(st.tuples(st.sampled_from(NAMES), TOKENS), max_size=3))]
    once = draw(st.booleans())
    kept = dict(pairs).items() if once else pairs
    blank = draw(st.sampled_from([b"", b"", b" ", b"\t", b"\r", b"\n", b"\x0c"]))
    inside = (b"," + blank).join(orjson.dumps(name) + blank + b":" + blank + token for name, token in kept)
    around = draw(st.sampled_from([b"%b", b"%b", b"%b", b" %b", b"%b ", b"\xef\xbb\xbf%b", b"[%b]", b"%b,", b"%b{}", b"%b%b"]))
    return around.replace(b"%b", b"{" + blank + inside + blank + b"}")


@st.composite
def broken_message(draw: st.DrawFn) -> list[bytes]:
    """A good message with some bytes changed, or cut in two."""
    data = bytearray(orjson.dumps({**GOOD, "device": "d\u00fc", "value": 2.5, "more": {"of": ["it", None]}}))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data) - 1))
        size = draw(st.integers(0, 3))
        data[at : at + size] = draw(
            st.one_of(st.sampled_from([b"", b"}", b"{", b"]", b"[", b'"', b"\\", b",", b":", b"\n"]), st.binary(max_size=3))
        )
    at = draw(st.integers(0, len(data)))
    return [bytes(data[:at]), bytes(data[at:])] if draw(st.booleans()) else [bytes(data)]


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


def judged(values: list[bytes | None]) -> list[str]:
    """What is made of each message of a batch: its event or why it is none, to the sign of a zero."""
    found = decode(values, SETTINGS, LONGEST, np.full(len(values), NOW))
    verdicts = dict(found.rejected) | dict(zip(found.rows.tolist(), map(repr, found.events.to_pylist()), strict=True))
    return [verdicts[at] for at in range(len(values))]


def judged_alone(value: bytes | None) -> str:
    try:
        event = decode_one(value, SETTINGS, LONGEST, NOW)
    except ValueError as error:
        return str(error)
    return repr({name: event[name] for name in EVENT_SCHEMA.names})


MANY: list[bytes | None] = [orjson.dumps(GOOD)] * (FEW + 1)


@given(st.lists(st.one_of(odd_message().map(lambda message: [message]), broken_message()), min_size=1, max_size=3))
@example([[b'{"v":1,"x":', b"{}}"], [b'{"v":1}{"v":1}']])
@example([[b'{"v":1,"x":[{}', b"{}]}"]])
@hypothesis_settings(deadline=None, max_examples=300)
def test_what_a_message_means_does_not_depend_on_those_that_come_with_it(parts: list[list[bytes]]) -> None:
    messages: list[bytes | None] = [message for part in parts for message in part]
    alone = [judged_alone(message) for message in messages]
    assert [judged([message])[0] for message in messages] == alone
    assert judged([*MANY[:3], *messages, *MANY])[3 : 3 + len(messages)] == alone


@pytest.mark.parametrize("token", ODD, ids=lambda token: token[:20].decode(errors="replace"))
@pytest.mark.parametrize("name", ["value", "ts", "user_id", "nobody_reads_it"])
def test_an_odd_value_is_judged_alike_alone_and_among_many(name: str, token: bytes) -> None:
    message = b'{"v":1,"event_id":"e","item_id":"i","event_type":"view"'
    for field, value in {"user_id": b'"u"', "ts": b"%d" % NOW, name: token}.items():
        message += b',"%b":%b' % (field.encode(), value)
    message += b"}"
    assert judged([message, *MANY])[0] == judged_alone(message) == judged([message])[0]


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (b',"value":NaN', "not JSON"),
        (b',"price":-Infinity', "not JSON"),
        (b',"value":1.8e308', "value is not a finite number"),
        (b',"value":"2"', "value is not a finite number"),
        (b',"ts":' + b"9" * 400, "ts is not an integer"),
        (b',"price":' + b"9" * 400, ""),
        (b',"price":' + b"[" * 3000 + b"]" * 3000, "not JSON"),
    ],
)
def test_a_number_that_is_none_makes_no_event_and_a_long_one_that_nobody_reads_does_no_harm(
    change: bytes, verdict: str
) -> None:
    message = orjson.dumps(GOOD)[:-1] + change + b"}"
    for values in ([message], [message, *MANY]):
        rejected = decode(values, SETTINGS, LONGEST, np.full(len(values), NOW)).rejected
        assert rejected == ([(0, verdict)] if verdict else [])
