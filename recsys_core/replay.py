"""What would have been recommended on a past day: models of the data before it, the moment's trend, users as they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from recsys_core.als import read_factors
from recsys_core.bundle import ALS_FACTORS, ITEM_INDEX, POPULAR_ITEMS, assemble, build_item_index, fit_als_factors
from recsys_core.events import DAY_MS, EVENT_TYPE, HOUR_MS, ITEM_ID, TS, USER_ID, day_key, hour_keys, key_start_ms
from recsys_core.lake import Lake, MissingPartition
from recsys_core.online import UserRecord, users_of
from recsys_core.popularity import POPULAR_SCHEMA, popular_items, trending_items
from recsys_core.ranking import Snapshot, Trend, rank
from recsys_core.settings import Settings
from recsys_core.tables import CLICKS_HOURLY, INTERACTIONS, build_interactions

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@dataclass(frozen=True)
class Replayed:
    """One user: the last items before the day, what would have been recommended, and what of it they then had."""

    user_id: str
    last: tuple[str, ...]
    recommended: tuple[str, ...]
    had: tuple[str, ...]

    @property
    def hits(self) -> tuple[str, ...]:
        return tuple(item for item in self.recommended if item in self.had)


@dataclass(frozen=True)
class Replay:
    """A replayed day: the snapshot, what had to be made for it, what it lacks and why (by model), and the users."""

    day: str
    snapshot: Snapshot
    made: tuple[str, ...]
    notes: dict[str, str]
    users: tuple[Replayed, ...]


def replay_day(
    lake: Lake,
    day: str,
    settings: Settings,
    spark: Callable[[], SparkSession],
    engine: str,
    users: Sequence[str] = (),
    count: int = 10,
) -> Replay:
    """Rank as the platform would have at the start of `day`, for `users` or else for some who were active on it.

    Partitions of the day before that are missing are made; no release is written and nothing is promoted. Raises
    MissingPartition when there were no clicks before the day.
    """
    before, start = day_key(key_start_ms(day) - DAY_MS), key_start_ms(day)
    made = _make_missing(lake, before, settings, spark, engine)
    bundle = assemble(lake, before, f"replay-{day}", settings)
    snapshot = bundle.snapshot
    hours = hour_keys(start - settings.trends.window_hours * HOUR_MS, start)
    recent = lake.dataset(CLICKS_HOURLY, hours, missing_ok=True)
    trend = Trend.of(snapshot, _trend(recent, start, settings))
    on_the_day = lake.dataset(CLICKS_HOURLY, hour_keys(start, start + DAY_MS), missing_ok=True)
    wanted = list(users) or _some_users(on_the_day, count)
    records = _records(lake, before, start, wanted, snapshot, settings)
    state = users_of(snapshot, records, snapshot.ranking, user_ids=wanted, now=start)
    ranked = rank(snapshot, trend, state, count, snapshot.ranking)
    had = _items_of(on_the_day, wanted)
    rows = [
        Replayed(
            user,
            tuple(item for item, _, _ in record.last),
            tuple(snapshot.item_ids[p] for p in positions if p >= 0),
            tuple(had.get(user, ())),
        )
        for user, record, positions in zip(wanted, records, ranked.positions, strict=True)
    ]
    return Replay(day, snapshot, tuple(made), bundle.notes, tuple(rows))


def _make_missing(lake: Lake, before: str, settings: Settings, spark: Callable[[], SparkSession], engine: str) -> list[str]:
    made = []
    nothing = MissingPartition(f"no clicks in the window that ends with {before}: there is nothing to replay from")
    if lake.find(INTERACTIONS, before) is None:
        end = key_start_ms(before) + DAY_MS
        if (
            lake.dataset(CLICKS_HOURLY, hour_keys(end - settings.interactions.window_days * DAY_MS, end), missing_ok=True)
            is None
        ):
            raise nothing
        build_interactions(spark(), lake, [before], settings.events, settings.interactions)
        made.append(INTERACTIONS)
    if not lake.get(INTERACTIONS, before).rows:
        raise nothing
    if lake.find(ALS_FACTORS, before) is None:
        fit_als_factors(lake, before, settings, spark, engine)
        made.append(ALS_FACTORS)
    if lake.find(ITEM_INDEX, before) is None:
        build_item_index(lake, before, settings)
        made.append(ITEM_INDEX)
    if lake.find(POPULAR_ITEMS, before) is None:
        window = lake.dataset(INTERACTIONS, [before])
        lake.write(POPULAR_ITEMS, before, popular_items(window) if window else POPULAR_SCHEMA.empty_table())
        made.append(POPULAR_ITEMS)
    return made


def _trend(clicks: ds.Dataset | None, now: int, settings: Settings) -> dict[str, Sequence[float]]:
    if clicks is None:
        return {}
    trends = trending_items(clicks, now, settings.events.weights, settings.trends.half_lives_hours, settings.trends.top)
    return dict(zip(trends[ITEM_ID].to_pylist(), trends["scores"].to_pylist(), strict=True))


def _some_users(clicks: ds.Dataset | None, count: int) -> list[str]:
    found: list[str] = []
    for batch in clicks.to_batches(columns=[USER_ID]) if clicks else ():
        found = sorted({*found, *pc.unique(batch[USER_ID]).to_pylist()})[:count]
    return found


def _records(
    lake: Lake, before: str, start: int, users: Sequence[str], snapshot: Snapshot, settings: Settings
) -> list[UserRecord]:
    """The users' records as they would have been: last actions, what they had, and their factor."""
    mine = ds.field(USER_ID).isin(pa.array(users, pa.string()))
    window = hour_keys(start - settings.interactions.window_days * DAY_MS, start)
    clicks = lake.dataset(CLICKS_HOURLY, window, missing_ok=True)
    pairs = lake.dataset(INTERACTIONS, [before])
    last: dict[str, list[tuple[str, str, int]]] = {}
    if clicks is not None:
        table = clicks.to_table(columns=[USER_ID, ITEM_ID, EVENT_TYPE, TS], filter=mine)
        for row in table.sort_by([(TS, "descending")]).to_pylist():
            last.setdefault(row[USER_ID], []).append((row[ITEM_ID], row[EVENT_TYPE], row[TS]))
    seen = _ordered_items(pairs, mine)
    factors = read_factors(lake, ALS_FACTORS, before, "users", np.array(users, dtype=object))
    of_user = dict(zip(factors.ids.tolist(), factors.vectors, strict=True))
    return [
        UserRecord.with_items(
            seen.get(user, ()),
            settings.features.history,
            settings.ranking.max_consumed,
            last=tuple(last.get(user, ())[: settings.ranking.last_items]),
            last_ts=last[user][0][2] if user in last else 0,
            als_version=snapshot.als_version,
            als=of_user.get(user),
        )
        for user in users
    ]


def _ordered_items(pairs: ds.Dataset | None, mine: ds.Expression) -> dict[str, list[str]]:
    seen: dict[str, list[str]] = {}
    if pairs is not None:
        table = pairs.to_table(columns=[USER_ID, ITEM_ID, "last_ts"], filter=mine)
        for row in table.sort_by([("last_ts", "descending"), (ITEM_ID, "ascending")]).to_pylist():
            seen.setdefault(row[USER_ID], []).append(row[ITEM_ID])
    return seen


def _items_of(clicks: ds.Dataset | None, users: Sequence[str]) -> dict[str, list[str]]:
    had: dict[str, list[str]] = {}
    if clicks is not None:
        mine = ds.field(USER_ID).isin(pa.array(users, pa.string()))
        for row in clicks.to_table(columns=[USER_ID, ITEM_ID], filter=mine).to_pylist():
            items = had.setdefault(row[USER_ID], [])
            if row[ITEM_ID] not in items:
                items.append(row[ITEM_ID])
    return had
