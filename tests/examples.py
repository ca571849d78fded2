"""Training examples and item features for tests of the two-tower model, written as the features' tables are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from recsys_core.events import DAY_MS, HOUR_MS, key_start_ms
from recsys_core.lake import Lake
from recsys_core.two_tower_data import ITEM_FEATURES, TRAINING_EXAMPLES

DAY = "2026-03-10"
CLUSTERS = 6
"""Clusters of the planted shop; item `i<n>` is of cluster n % CLUSTERS, category `top<cluster % 2>/sub<cluster>`."""

EXAMPLES_SCHEMA = pa.schema(
    [
        ("user_id", pa.string()), ("item_id", pa.string()), ("event_type", pa.string()), ("ts", pa.int64()),
        ("weight", pa.float32()), ("history", pa.list_(pa.string())), ("hour", pa.int8()), ("weekday", pa.int8()),
        ("device", pa.string()), ("country", pa.string()), ("user_events_1d", pa.int32()), ("user_events_7d", pa.int32()),
        ("user_events_window", pa.int32()), ("user_recency_hours", pa.float32()), ("user_category", pa.string()),
        ("category", pa.string()), ("price_bucket", pa.int8()), ("item_age_days", pa.float32()),
        ("item_events_1d", pa.int32()), ("item_events_7d", pa.int32()), ("item_events_window", pa.int32()),
    ]
)  # fmt: skip
ITEMS_SCHEMA = pa.schema(
    [
        ("item_id", pa.string()), ("category", pa.string()), ("price", pa.float64()), ("price_bucket", pa.int8()),
        ("item_age_days", pa.float32()), ("item_events_1d", pa.int32()), ("item_events_7d", pa.int32()),
        ("item_events_window", pa.int32()),
    ]
)  # fmt: skip


def example(user: str, item: str, ts: int, history: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    """A row of `training_examples`."""
    counts = {f"user_events_{span}": len(history) for span in ("1d", "7d", "window")}
    row = {"user_id": user, "item_id": item, "event_type": "view", "ts": ts, "weight": 1.0, "history": list(history), **counts}
    row |= {"hour": ts // HOUR_MS % 24, "weekday": (ts // DAY_MS + 3) % 7, "price_bucket": 2, "item_age_days": 5.0}
    return {**row, "item_events_1d": 1, "item_events_7d": 3, "item_events_window": 6, **more}


def item(item_id: str, category: str | None = None, **more: Any) -> dict[str, Any]:
    """A row of `item_features`."""
    counts = {"item_events_1d": 1, "item_events_7d": 3, "item_events_window": 6}
    return {"item_id": item_id, "category": category, "price": 9.5, "price_bucket": 2, "item_age_days": 5.0, **counts, **more}


def write_examples(
    lake: Lake, examples: Sequence[Mapping[str, Any]], items: Sequence[Mapping[str, Any]], day: str = DAY
) -> None:
    """Both tables of a day."""
    full = [{name: row.get(name) for name in EXAMPLES_SCHEMA.names} for row in examples]
    lake.write(TRAINING_EXAMPLES, day, pa.Table.from_pylist(full, schema=EXAMPLES_SCHEMA))
    lake.write(ITEM_FEATURES, day, pa.Table.from_pylist([dict(row) for row in items], schema=ITEMS_SCHEMA))


def category_of(number: int) -> str:
    cluster = number % CLUSTERS
    return f"top{cluster % 2}/sub{cluster}"


def planted_shop(
    users: int = 120, items: int = 90, events: int = 20, seed: int = 0, unseen_items: int = 0, categories: bool = True
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Examples and items of users who stay in one cluster: user `u<n>` in n % CLUSTERS, with one event in ten elsewhere.

    The last `unseen_items` items are in no event: they were published at the end.
    """
    random = np.random.default_rng(seed)
    start = key_start_ms(DAY) - 5 * DAY_MS
    seen = items - unseen_items
    moments = random.integers(0, 6 * DAY_MS, users * events)
    owners = np.repeat(np.arange(users), events)
    histories: dict[int, list[str]] = {user: [] for user in range(users)}
    past: dict[int, list[int]] = {n: [] for n in range(items)}
    rows = []
    for at in np.argsort(moments, kind="stable").tolist():
        user, ts = int(owners[at]), start + int(moments[at])
        cluster = user % CLUSTERS if random.random() > 0.1 else int(random.integers(0, CLUSTERS))
        number = int(random.choice(np.arange(cluster, seen, CLUSTERS)))
        context = {"device": "mobile" if user % 2 else None, "category": category_of(number) if categories else None}
        rows.append(example(f"u{user}", f"i{number}", ts, histories[user][:50], **context, **_item_past(past[number], ts)))
        histories[user] = [f"i{number}", *(h for h in histories[user] if h != f"i{number}")]
        past[number].append(ts)
    end = key_start_ms(DAY) + DAY_MS
    table = [item(f"i{n}", category_of(n) if categories else None, **_item_past(past[n], end)) for n in range(items)]
    return rows, table


def _item_past(times: Sequence[int], now: int) -> dict[str, Any]:
    """Age and counts of an item before `now`."""
    counts = {name: sum(ts >= now - days * DAY_MS for ts in times) for name, days in (("1d", 1), ("7d", 7), ("window", 90))}
    return {"item_age_days": (now - times[0]) / DAY_MS if times else 0.0, **{f"item_events_{k}": v for k, v in counts.items()}}


def planted_news(
    days: int = 8, items_a_day: int = 12, users: int = 400, seed: int = 0
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Examples and items of news: item `n<day>-<k>` is clicked on its day alone, by anyone; nobody prefers anything."""
    random = np.random.default_rng(seed)
    start = key_start_ms(DAY) - (days - 1) * DAY_MS
    moments = np.sort(random.integers(0, days * DAY_MS, days * users * 3))
    past: dict[str, list[int]] = {f"n{day}-{k}": [] for day in range(days) for k in range(items_a_day)}
    histories: dict[int, list[str]] = {user: [] for user in range(users)}
    rows = []
    for moment in moments.tolist():
        user, name = int(random.integers(users)), f"n{moment // DAY_MS}-{random.integers(items_a_day)}"
        ts = start + moment
        rows.append(example(f"u{user}", name, ts, histories[user][:50], **_item_past(past[name], ts)))
        histories[user] = [name, *(h for h in histories[user] if h != name)]
        past[name].append(ts)
    end = key_start_ms(DAY) + DAY_MS
    return rows, [item(name, **_item_past(times, end)) for name, times in past.items()]
