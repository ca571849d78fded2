"""Training examples made again from the clicks, one by one and in the plainest way, to see whether any knows its future."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from recsys_core.events import DAY_MS, EVENT_TYPE, HOUR_MS, ITEM_ID, TS, USER_ID, hour_keys, key_start_ms
from recsys_core.features import TRAINING_EXAMPLES, WEIGHT, top_of
from recsys_core.lake import Lake
from recsys_core.settings import Settings
from recsys_core.tables import CLICKS_HOURLY

CHECKED = (
    "history",
    "hour",
    "weekday",
    "user_events_1d",
    "user_events_7d",
    "user_events_window",
    "user_recency_hours",
    "user_category",
    "item_age_days",
    "item_events_1d",
    "item_events_7d",
    "item_events_window",
)

Event = dict[str, Any]


def find_leaks(lake: Lake, day: str, categories: dict[str, str | None], settings: Settings) -> tuple[int, list[str]]:
    """How many examples of a day were made again, and what was different: one line a value.

    The first `features.checked_examples` rows of the partition's files are taken, which are in the order of a hash.
    """
    dataset = lake.dataset(TRAINING_EXAMPLES, [day])
    if dataset is None:
        return 0, []
    examples = dataset.head(settings.features.checked_examples)
    end = key_start_ms(day) + DAY_MS
    hours = hour_keys(end - 2 * settings.interactions.window_days * DAY_MS, end)
    clicks = lake.dataset(CLICKS_HOURLY, hours, missing_ok=True)
    wanted = ds.field(USER_ID).isin(examples[USER_ID].unique()) | ds.field(ITEM_ID).isin(examples[ITEM_ID].unique())
    columns = [USER_ID, ITEM_ID, EVENT_TYPE, TS]
    events = clicks.to_table(columns=columns, filter=wanted) if clicks is not None else pa.table({c: [] for c in columns})
    return examples.num_rows, leaks(examples, events, categories, settings)


def leaks(examples: pa.Table, events: pa.Table, categories: dict[str, str | None], settings: Settings) -> list[str]:
    """Every value of `examples` that is not what the `events` before it give, in words.

    Args:
        examples: rows of `training_examples`.
        events: at least all events (user_id, item_id, event_type, ts) of their users and items.
        categories: category path by item id.
        settings: window, history and weights.
    """
    known = events.filter(pc.is_in(events[EVENT_TYPE], pa.array(sorted(settings.events.weights), pa.string())))
    by_user = defaultdict(list)
    for event in known.filter(pc.is_in(known[USER_ID], examples[USER_ID].unique())).to_pylist():
        by_user[event[USER_ID]].append(event)
    times = _times_by_item(known.filter(pc.is_in(known[ITEM_ID], examples[ITEM_ID].unique())))
    wrong = []
    for example in examples.to_pylist():
        who = f"user {example[USER_ID]}, item {example[ITEM_ID]}, {np.datetime64(example[TS], 'ms')}"
        if not any(_same_event(example, event) for event in by_user[example[USER_ID]]):
            wrong.append(f"{who}: there is no such event")
            continue
        right = {
            **_user_values(example[TS], by_user[example[USER_ID]], categories, settings),
            **_item_values(example[TS], times[example[ITEM_ID]], settings.interactions.window_days),
        }
        wrong += [
            f"{who}: {name} is {example[name]}, its past says {right[name]}"
            for name in CHECKED
            if not _equal(example[name], right[name])
        ]
        if not _equal(example[WEIGHT], settings.events.weights[example[EVENT_TYPE]]):
            wrong.append(f"{who}: {WEIGHT} is {example[WEIGHT]}")
    return wrong


def _times_by_item(events: pa.Table) -> dict[str, np.ndarray]:
    """Times of the events of each item, in order. Items can have millions, so they stay in arrays."""
    grouped = events.select([ITEM_ID, TS]).group_by(ITEM_ID).aggregate([(TS, "list")])
    lists = zip(grouped[ITEM_ID].to_pylist(), grouped[f"{TS}_list"], strict=True)
    return {item: np.sort(found.values.to_numpy()) for item, found in lists}


def _same_event(example: Event, event: Event) -> bool:
    return all(example[name] == event[name] for name in (ITEM_ID, EVENT_TYPE, TS))


def _user_values(ts: int, events: Iterable[Event], categories: dict[str, str | None], settings: Settings) -> dict[str, Any]:
    first = ts // DAY_MS * DAY_MS - settings.interactions.window_days * DAY_MS
    past = sorted((e for e in events if first <= e[TS] < ts), key=lambda e: (-e[TS], e[ITEM_ID]))
    times = np.array([e[TS] for e in past], np.int64)
    liked: dict[str, tuple[float, int]] = {}
    for event in past:
        top = top_of(categories.get(event[ITEM_ID]))
        if top:
            weight, last = liked.get(top, (0.0, event[TS]))
            liked[top] = weight + settings.events.weights[event[EVENT_TYPE]], last
    moment = np.datetime64(ts, "ms").item()
    return {
        "history": list(dict.fromkeys(e[ITEM_ID] for e in past))[: settings.features.history],
        "hour": moment.hour,
        "weekday": moment.weekday(),
        **_counts("user", ts, times, first),
        "user_recency_hours": (ts - past[0][TS]) / HOUR_MS if past else None,
        "user_category": max(liked, key=lambda top: (round(liked[top][0], 6), liked[top][1], top)) if liked else None,
    }


def _item_values(ts: int, times: np.ndarray, window_days: int) -> dict[str, Any]:
    first = ts // DAY_MS * DAY_MS - window_days * DAY_MS
    past = times[(times >= first) & (times < ts)]
    return {"item_age_days": (ts - past[0]) / DAY_MS if len(past) else 0.0, **_counts("item", ts, past, first)}


def _counts(of: str, ts: int, past: np.ndarray, first: int) -> dict[str, int]:
    hour = ts // HOUR_MS * HOUR_MS
    starts = {"1d": hour - DAY_MS, "7d": hour - 7 * DAY_MS, "window": first}
    return {f"{of}_events_{name}": int((past >= start).sum()) for name, start in starts.items()}


def _equal(found: Any, right: Any) -> bool:
    if isinstance(right, float) and found is not None:
        return math.isclose(found, right, rel_tol=1e-6, abs_tol=1e-9)
    return bool(found == right)
