"""Features as of a moment: what counts, and that the online record knows the same."""

from __future__ import annotations

import math

import numpy as np
import pytest
from builders import ms
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_core.events import DAY_MS, HOUR_MS, MINUTE_MS
from recsys_core.features import (
    Activity,
    Counts,
    Event,
    OnlineFeatures,
    UserState,
    distinct,
    hours_of_day,
    price_buckets,
    top_of,
    user_inputs,
    weekdays,
)

DAY = ms("2026-03-02")


def happened(item: str, ts: int, units: int = 1, top: str | None = None, device: str | None = None) -> Event:
    return Event(item, "view", ts, units, top, device, None)


def state_of(events: list[Event], window_days: int = 90, items: int = 50, actions: int = 5) -> UserState:
    state = UserState(window_days, items, actions)
    for event in events:
        state.add(event)
    return state


def test_an_event_counts_from_the_millisecond_after_its_own() -> None:
    activity = Activity(90)
    activity.add(DAY)
    activity.add(DAY)
    assert activity.before(DAY) == Counts(0, 0, 0, None, None)
    assert activity.before(DAY + 1) == Counts(2, 2, 2, DAY, DAY)


def test_windows_begin_on_the_hour_and_on_the_day() -> None:
    now = DAY + 10 * HOUR_MS + 59 * MINUTE_MS
    edges = [DAY - 2 * DAY_MS, DAY - 7 * DAY_MS + 10 * HOUR_MS, DAY - DAY_MS + 10 * HOUR_MS]
    activity = Activity(9)
    for ts in sorted([DAY - 9 * DAY_MS - 1, DAY - 9 * DAY_MS, *edges, *(edge - 1 for edge in edges)]):
        activity.add(ts)
    counts = activity.before(now)
    assert (counts.day, counts.week, counts.whole) == (1, 5, 7)
    assert counts.first == DAY - 9 * DAY_MS
    assert counts.last == edges[2]
    assert counts.age_days(now) == pytest.approx(9 + 10.983 / 24, abs=1e-3)


def test_the_short_windows_are_never_longer_than_the_whole() -> None:
    activity = Activity(2)
    activity.add(DAY - 3 * DAY_MS)
    activity.add(DAY - DAY_MS)
    assert activity.before(DAY + 1)[:3] == (1, 1, 1)


def test_a_long_activity_forgets_what_left_the_window() -> None:
    activity = Activity(1)
    for n in range(20_000):
        activity.add(n * MINUTE_MS)
        activity.before(n * MINUTE_MS)
    assert len(activity._times) < 10_000
    assert activity.before(20_000 * MINUTE_MS).whole == len(activity.times()) == 1440 + 20_000 % 1440


def test_history_holds_each_item_once_newest_first_within_the_window() -> None:
    events = [happened(item, DAY + n) for n, item in enumerate("abcab")]
    state = state_of([happened("old", DAY - 3 * DAY_MS), *events], window_days=2)
    state.move_to(DAY + 4)
    assert state.history(50) == ["a", "c", "b"]
    state.move_to(DAY + 5)
    assert state.history(2) == ["b", "a"]
    assert [action.item for action in state.actions] == ["b", "a", "c", "b", "a"]
    state.move_to(DAY + 10 * DAY_MS)
    assert (state.history(50), state.actions, state.category) == ([], [], None)


def test_of_one_moment_nothing_sees_anything_else() -> None:
    state = state_of([happened("a", DAY), happened("b", DAY)])
    assert state.move_to(DAY).whole == 0
    assert state.history(50) == []
    state.add(happened("c", DAY))
    state.move_to(DAY)
    assert state.history(50) == []
    state.move_to(DAY + 1)
    assert state.history(50) == ["c", "b", "a"]


def test_the_preferred_category_has_the_largest_weight_and_of_equal_ones_the_last() -> None:
    state = state_of([happened("a", DAY, 3, "shoes"), happened("b", DAY + 1, 1, "books"), happened("c", DAY + 2, 1, None)])
    state.move_to(DAY + 3)
    assert state.category == "shoes"
    state.add(happened("b", DAY + 3, 2, "books"))
    state.move_to(DAY + 4)
    assert state.category == "books"


def test_weights_that_leave_the_window_leave_the_preference() -> None:
    state = state_of([happened("a", DAY, 9, "shoes"), happened("b", DAY + DAY_MS, 1, "books")], window_days=1)
    state.move_to(DAY + DAY_MS + 1)
    assert state.category == "shoes"
    state.move_to(DAY + 2 * DAY_MS)
    assert state.category == "books"


def test_the_latest_known_device_stays_when_an_event_has_none() -> None:
    state = state_of([happened("a", DAY, device="tv"), happened("b", DAY + 1)], window_days=1)
    state.move_to(DAY + 2)
    assert (state.latest("device"), state.latest("country")) == ("tv", None)
    state.move_to(DAY + 2 * DAY_MS)
    assert state.latest("device") is None


def test_impossible_prices_are_unknown_and_others_fall_into_two_buckets_a_doubling() -> None:
    prices = np.array([np.nan, -1, np.inf, -np.inf, 0, 0.4, 1, 3, 7, 1e300])
    assert price_buckets(prices).tolist() == [-1, -1, -1, -1, 0, 0, 2, 4, 6, 63]
    assert price_buckets(prices).dtype == np.int8


def test_hours_and_weekdays_are_those_of_the_calendar_in_utc() -> None:
    moments = np.array([0, ms("2026-03-02T00:00"), ms("2026-03-01T23:59:59.999")])
    assert hours_of_day(moments).tolist() == [0, 0, 23]
    assert weekdays(moments).tolist() == [3, 0, 6]


@pytest.mark.parametrize(("path", "top"), [("a/b/c", "a"), ("a", "a"), ("", None), (None, None), ("/b", None)])
def test_the_top_of_a_category_is_its_first_level(path: str | None, top: str | None) -> None:
    assert top_of(path) == top


def test_distinct_items_keep_their_first_place() -> None:
    assert distinct(["b", "a"], ["a", "c", "b", "d"], n=3) == ["b", "a", "c"]


def test_online_features_are_read_as_they_were_written() -> None:
    full = OnlineFeatures(DAY, 90, DAY - 5, ((1, 2), (30, 1)), ((1, 2), (2, 1)), "home", "tv", "SE")
    for features in (full, OnlineFeatures(DAY, 7)):
        assert OnlineFeatures.decode(features.encode()) == features
    assert len(full.encode()) < 200


EVENTS = st.lists(
    st.tuples(st.integers(0, 12 * 24 * 4), st.sampled_from("abcdef"), st.integers(1, 3), st.sampled_from([None, "x", "y"])),
    max_size=60,
)


def brute_force(events: list[Event], ts: int, window_days: int) -> tuple:
    """What a user's state must say, from the definitions."""
    first = ts // DAY_MS * DAY_MS - window_days * DAY_MS
    hour = ts // HOUR_MS * HOUR_MS
    past = [event for event in events if first <= event.ts < ts][::-1]
    counts = [sum(e.ts >= start for e in past) for start in (hour - DAY_MS, hour - 7 * DAY_MS, first)]
    weights: dict[str, tuple[int, int]] = {}
    for event in past:
        if event.top:
            units, last = weights.get(event.top, (0, event.ts))
            weights[event.top] = units + event.units, last
    category = max(weights, key=lambda top: (*weights[top], top)) if weights else None
    recency = (ts - past[0].ts) / HOUR_MS if past else None
    return (*counts, recency, list(dict.fromkeys(e.item for e in past))[:4], category)


@settings(max_examples=150, deadline=None)
@given(EVENTS, st.lists(st.integers(0, 14 * 24 * 4), min_size=1, max_size=6), st.integers(1, 12))
def test_the_state_is_what_the_definitions_say_at_any_moment(made, moments, window_days) -> None:
    quarter = 15 * MINUTE_MS
    events = [happened(item, DAY + at * quarter, units, top) for at, item, units, top in sorted(made, key=lambda e: e[0])]
    state, coming = UserState(window_days, 4, 3), list(events)
    for ts in sorted(DAY + at * quarter for at in moments):
        while coming and coming[0].ts <= ts:
            state.add(coming.pop(0))
        counts = state.move_to(ts)
        found = (*counts[:3], counts.recency_hours(ts), state.history(4), state.category)
        assert found == brute_force(events, ts, window_days)


@settings(max_examples=150, deadline=None)
@given(EVENTS, st.integers(0, 12), st.integers(0, 5 * 24 * 60), st.integers(1, 12))
def test_the_online_record_gives_what_an_example_of_the_same_moment_has(made, night, minutes, window_days) -> None:
    """The record of the end of a day, and the actions since, at any later moment."""
    quarter = 15 * MINUTE_MS
    events = [
        happened(item, DAY + at * quarter, units, top) for at, item, units, top in sorted(made, key=lambda e: (e[0], e[1]))
    ]
    at = DAY + night * DAY_MS
    now = at + minutes * MINUTE_MS
    batch = UserState(window_days, 200, 5)
    for event in sorted((e for e in events if e.ts < at), key=lambda e: (e.ts, [-ord(c) for c in e.item])):
        batch.add(event)
    batch.move_to(at)
    features = OnlineFeatures.decode(OnlineFeatures.of(batch, at, window_days).encode())
    live = [e for e in events if e.ts >= at]
    last = [(e.item, e.kind, e.ts) for e in sorted(live, key=lambda e: (-e.ts, e.item))] + [
        (a.item, a.kind, a.ts) for a in batch.actions
    ]
    online = user_inputs(last, batch.history(200), features, now, 4)
    exact = UserState(window_days, 4, 5)
    for event in sorted((e for e in events if e.ts < now), key=lambda e: (e.ts, [-ord(c) for c in e.item])):
        exact.add(event)
    counts = exact.move_to(now)
    assert online.counts[:3] == counts[:3]
    recency = counts.recency_hours(now)
    assert online.counts[3] == recency if recency is not None else math.isnan(online.counts[3])
    if now - at < DAY_MS:  # within a day of the night nothing of the history leaves the window
        assert online.history == exact.history(4)
