"""Features of users and items as of a moment: what each one means, once, for the tables and for the online record.

An event counts from the millisecond after its own: what happens at one moment does not see itself, nor anything else of
that moment. Windows begin on whole hours and days, so that counts by hour and day give the same numbers online:

    *_events_1d, *_events_7d   since 24 and 168 hours before the hour of the moment began
    *_events_window, history   since `window_days` days before the day of the moment began; the other two not earlier
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import orjson
import pyarrow as pa

from recsys_core.events import COUNTRY, DAY_MS, DEVICE, EVENT_TYPE, HOUR_MS, ITEM_ID, TS, USER_ID

USER_FEATURES = "user_features"
ITEM_FEATURES = "item_features"
TRAINING_EXAMPLES = "training_examples"

WEIGHT, WANTED, CATEGORY, PRICE = "weight", "wanted", "category", "price"
PRICE_BUCKETS = 64
UNKNOWN_PRICE = -1
WEIGHT_UNITS = 1 << 20
"""Weights are added up as whole multiples of 1 / WEIGHT_UNITS: the sum does not depend on the order."""

_TRIM = 4096

ACTIVITY_COLUMNS = ("events_1d", "events_7d", "events_window")


class Window(NamedTuple):
    """First milliseconds of what counts at a moment."""

    day: int
    week: int
    whole: int


@lru_cache(maxsize=1024)
def window_of_hour(hour: int, window_days: int) -> Window:
    """The window of the moments of an hour, numbered from 1970."""
    start = hour * HOUR_MS
    whole = start - start % DAY_MS - window_days * DAY_MS
    return Window(max(start - DAY_MS, whole), max(start - 7 * DAY_MS, whole), whole)


def window_at(ts: int, window_days: int) -> Window:
    """The window of a moment (ms)."""
    return window_of_hour(ts // HOUR_MS, window_days)


class Counts(NamedTuple):
    """Events before a moment, and the times (ms) of the first and the last of them in the window."""

    day: int
    week: int
    whole: int
    first: int | None
    last: int | None

    def recency_hours(self, ts: int) -> float | None:
        """Hours since the last event, None without one."""
        return None if self.last is None else (ts - self.last) / HOUR_MS

    def age_days(self, ts: int) -> float:
        """Days since the first event, 0 without one."""
        return 0.0 if self.first is None else (ts - self.first) / DAY_MS


class Activity:
    """Times of the events of one user or item. Moments are asked for, and events added, in the order of time."""

    def __init__(self, window_days: int) -> None:
        self._window_days = window_days
        self._times: list[int] = []
        self._day = self._week = self._whole = self._now = 0

    def add(self, ts: int) -> None:
        self._times.append(ts)

    def before(self, ts: int) -> Counts:
        """What happened before `ts` (ms)."""
        times, end = self._times, len(self._times)
        window = window_at(ts, self._window_days)
        now, day, week, whole = self._now, self._day, self._week, self._whole
        while now < end and times[now] < ts:
            now += 1
        while day < now and times[day] < window.day:
            day += 1
        while week < now and times[week] < window.week:
            week += 1
        while whole < now and times[whole] < window.whole:
            whole += 1
        held = now > whole
        found = Counts(now - day, now - week, now - whole, times[whole] if held else None, times[now - 1] if held else None)
        if whole > _TRIM:
            del times[:whole]
            now, day, week, whole = now - whole, day - whole, week - whole, 0
        self._now, self._day, self._week, self._whole = now, day, week, whole
        return found

    def times(self) -> list[int]:
        """Times in the window of the moment that was asked for last."""
        return self._times[self._whole : self._now]


class Event(NamedTuple):
    """An event as the state of a user takes it in; `top` is the first level of the item's category path."""

    item: str
    kind: str
    ts: int
    units: int
    top: str | None
    device: str | None
    country: str | None


class UserState:
    """What is known of one user. Moments are asked for, and events added, in the order of time.

    Memory is bounded by the events in the window: a few numbers each.
    """

    def __init__(self, window_days: int, items: int, actions: int) -> None:
        """Keep the `items` newest distinct items and the `actions` last events."""
        self._window_days, self._items = window_days, items
        self.activity = Activity(window_days)
        self._coming: deque[Event] = deque()
        self._recent: OrderedDict[str, int] = OrderedDict()
        self._actions: deque[Event] = deque(maxlen=actions)
        self._tastes: deque[tuple[int, str, int]] = deque()
        self._units: dict[str, list[int]] = {}
        self._category: str | None = None
        self._latest: dict[str, tuple[str, int]] = {}
        self._edge = 0

    def add(self, event: Event) -> None:
        """Take in an event; it counts for later moments only."""
        if self._coming and self._coming[-1].ts < event.ts:
            self._arrive(event.ts)
        self._coming.append(event)
        self.activity.add(event.ts)

    def move_to(self, ts: int) -> Counts:
        """Make everything below mean the state before `ts`, and give the counts."""
        self._arrive(ts)
        edge = self._edge = window_at(ts, self._window_days).whole
        while self._recent and next(iter(self._recent.values())) < edge:
            self._recent.popitem(last=False)
        while self._actions and self._actions[0].ts < edge:
            self._actions.popleft()
        self._forget_tastes(edge)
        return self.activity.before(ts)

    @property
    def category(self) -> str | None:
        """The first level of the category paths with the largest weight; of equal ones the most recent."""
        if self._category is None and self._units:
            self._category = max(self._units, key=self._rank)
        return self._category

    @property
    def actions(self) -> list[Event]:
        """The last events, newest first."""
        return list(reversed(self._actions))

    def history(self, n: int) -> list[str]:
        """The distinct items, newest first, at most `n`."""
        return list(islice(reversed(self._recent), n))

    def latest(self, name: str) -> str | None:
        """The latest known `device` or `country`."""
        value, ts = self._latest.get(name, (None, 0))
        return value if ts >= self._edge else None

    def _arrive(self, ts: int) -> None:
        while self._coming and self._coming[0].ts < ts:
            event = self._coming.popleft()
            self._recent[event.item] = event.ts
            self._recent.move_to_end(event.item)
            if len(self._recent) > self._items:
                self._recent.popitem(last=False)
            self._actions.append(event)
            if event.device:
                self._latest[DEVICE] = event.device, event.ts
            if event.country:
                self._latest[COUNTRY] = event.country, event.ts
            if event.top:
                self._like(event.top, event.units, event.ts)

    def _like(self, top: str, units: int, ts: int) -> None:
        self._tastes.append((ts, top, units))
        known = self._units.setdefault(top, [0, 0])
        known[0] += units
        known[1] = ts
        if self._category is not None and self._rank(top) > self._rank(self._category):
            self._category = top

    def _forget_tastes(self, edge: int) -> None:
        while self._tastes and self._tastes[0][0] < edge:
            _, top, units = self._tastes.popleft()
            known = self._units[top]
            known[0] -= units
            if not known[0]:
                del self._units[top]
            if top == self._category:
                self._category = None

    def _rank(self, top: str) -> tuple[int, int, str]:
        units, ts = self._units[top]
        return units, ts, top


def distinct(*newest_first: Iterable[str], n: int) -> list[str]:
    """The first `n` distinct items of lists that follow each other."""
    return list(islice(dict.fromkeys(chain(*newest_first)), n))


def top_of(category: str | None) -> str | None:
    """The first level of a category path, None where there is none."""
    return category.partition("/")[0] or None if category else None


def price_buckets(prices: np.ndarray) -> np.ndarray:
    """int8 (n,): two buckets for each doubling of 1 + price, so no currency or range is assumed; unknown, negative and
    infinite prices are UNKNOWN_PRICE.
    """
    known = np.isfinite(prices) & (prices >= 0)
    steps = np.floor(2 * np.log2(1 + np.where(known, prices, 0)))
    return np.where(known, np.minimum(steps, PRICE_BUCKETS - 1), UNKNOWN_PRICE).astype(np.int8)


def hours_of_day(ts: np.ndarray) -> np.ndarray:
    """int8 (n,): the hour (UTC) of times in ms."""
    return (ts % DAY_MS // HOUR_MS).astype(np.int8)


def weekdays(ts: np.ndarray) -> np.ndarray:
    """int8 (n,): the day of the week (UTC) of times in ms, 0 for Monday; 1970 began with a Thursday."""
    return ((ts // DAY_MS + 3) % 7).astype(np.int8)


# -- the online record ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnlineFeatures:
    """A user's batch features in the online record, from which the counts of any later moment follow.

    Attributes:
        at: the moment (ms) that they are as of.
        window_days: length of the window.
        last_ts: time of the last event before `at`, 0 without one.
        hours: (hours before `at` at which an hour began, events of it), for the hours of the last seven days with events.
        days: the same for the days of the window.
        category, device, country: as in `user_features`.
    """

    at: int
    window_days: int
    last_ts: int = 0
    hours: tuple[tuple[int, int], ...] = ()
    days: tuple[tuple[int, int], ...] = ()
    category: str | None = None
    device: str | None = None
    country: str | None = None

    @classmethod
    def of(cls, state: UserState, ts: int, window_days: int) -> OnlineFeatures:
        """Of a state that was moved to `ts`, the end of a day."""
        times = state.activity.times()
        hours = Counter((ts - t + t % HOUR_MS) // HOUR_MS for t in times if t >= ts - 7 * DAY_MS)
        days = Counter((ts - t + t % DAY_MS) // DAY_MS for t in times)
        return cls(
            at=ts,
            window_days=window_days,
            last_ts=times[-1] if times else 0,
            hours=tuple(sorted(hours.items())),
            days=tuple(sorted(days.items())),
            category=state.category,
            device=state.latest(DEVICE),
            country=state.latest(COUNTRY),
        )

    def encode(self) -> bytes:
        """JSON; values that are not there are left out."""
        return orjson.dumps({name: value for name, value in asdict(self).items() if value not in (None, ())})

    @classmethod
    def decode(cls, data: bytes | str) -> OnlineFeatures:
        """Raises ValueError or TypeError for anything that `encode` did not make."""
        raw = orjson.loads(data)
        if not isinstance(raw, dict):
            raise ValueError(f"features must be a JSON object, not {raw!r:.60}")
        hours, days = (tuple((int(ago), int(n)) for ago, n in raw.pop(name, ())) for name in ("hours", "days"))
        return cls(**raw, hours=hours, days=days)

    def counts(self, ts: int, live: Sequence[int] = ()) -> tuple[int, int, int, float]:
        """user_events_1d, _7d, _window and recency in hours (nan: none) at the moment `ts`, which is not before `at`.

        `live` are the times (ms) of the user's events since `at`; those not before `ts` do not count.
        """
        window = window_at(ts, self.window_days)
        since = [t for t in live if self.at <= t < ts]

        def count(edge: int, spans: tuple[tuple[int, int], ...], unit: int) -> int:
            return sum(n for ago, n in spans if self.at - ago * unit >= edge) + sum(t >= edge for t in since)

        last = max(since, default=self.last_ts)
        return (
            count(window.day, self.hours, HOUR_MS),
            count(window.week, self.hours, HOUR_MS),
            count(window.whole, self.days, DAY_MS),
            (ts - last) / HOUR_MS if last >= window.whole and last else float("nan"),
        )


class UserInputs(NamedTuple):
    """What the user tower takes of one user at a moment, in the columns of a training example.

    `counts` are user_events_1d, user_events_7d, user_events_window and user_recency_hours (nan: no earlier event).
    """

    history: list[str]
    category: str | None
    device: str | None
    country: str | None
    counts: tuple[int, int, int, float]


def user_inputs(
    last: Sequence[tuple[str, str, int]], seen: Sequence[str], features: OnlineFeatures, ts: int, history: int
) -> UserInputs:
    """From an online record, as of the moment `ts` (ms); `OnlineFeatures(0, window_days)` for a record without features.

    Equal to the training example of that moment as long as `last` holds all the user's actions since `features.at`, and the
    record keeps `online.LAST_ACTIONS` of them. The category is that of `features.at`; device and country are the latest
    known, in place of which a request puts its own.
    """
    before = [(item, at) for item, _, at in last if at < ts]
    counts = features.counts(ts, [at for _, at in before])
    items = distinct((item for item, _ in before), seen, n=history)
    return UserInputs(items, features.category, features.device, features.country, counts)


# -- over sorted rows -------------------------------------------------------------------------------------------


def with_item_features(batches: Iterable[pa.RecordBatch], window_days: int) -> Iterator[pa.RecordBatch]:
    """Add price_bucket, first_ts, item_age_days and item_events_* to rows sorted by item and time.

    Rows without a weight are moments that are asked for, not events. Only WANTED rows are asked for; the others get zeros.
    """
    item, activity = None, Activity(window_days)
    nothing = Counts(0, 0, 0, None, None)
    for batch in batches:
        found, times = [], batch[TS].to_pylist()
        for key, ts, wanted, weight in zip(
            batch[ITEM_ID].to_pylist(), times, batch[WANTED].to_pylist(), batch[WEIGHT].to_pylist(), strict=True
        ):
            if key != item:
                item, activity = key, Activity(window_days)
            found.append(activity.before(ts) if wanted else nothing)
            if weight is not None:
                activity.add(ts)
        prices = batch[PRICE].cast(pa.float64()).to_numpy(zero_copy_only=False)
        added = {
            "price_bucket": pa.array(price_buckets(prices)),
            "first_ts": pa.array([counts.first for counts in found], pa.int64()),
            "item_age_days": pa.array([c.age_days(ts) for c, ts in zip(found, times, strict=True)], pa.float32()),
            **_count_columns("item", found),
        }
        yield _extended(batch, added)


def user_examples(batches: Iterable[pa.RecordBatch], window_days: int, history: int) -> Iterator[pa.RecordBatch]:
    """The WANTED ones of rows sorted by user and time, with the user's features before each row's own time."""
    user, state = None, UserState(window_days, history, 0)
    for batch in batches:
        rows, histories, found, recency, categories = [], [], [], [], []
        columns = zip(batch[USER_ID].to_pylist(), batch[WANTED].to_pylist(), _events(batch), strict=True)
        for row, (key, wanted, event) in enumerate(columns):
            if key != user:
                user, state = key, UserState(window_days, history, 0)
            if wanted:
                counts = state.move_to(event.ts)
                rows.append(row)
                histories.append(state.history(history))
                found.append(counts)
                recency.append(counts.recency_hours(event.ts))
                categories.append(state.category)
            state.add(event)
        taken = batch.take(pa.array(rows, pa.int64()))
        moments = taken[TS].to_numpy()
        added = {
            "history": pa.array(histories, pa.list_(pa.string())),
            "hour": pa.array(hours_of_day(moments)),
            "weekday": pa.array(weekdays(moments)),
            **_count_columns("user", found),
            "user_recency_hours": pa.array(recency, pa.float32()),
            "user_category": pa.array(categories, pa.string()),
        }
        yield _extended(taken, added)


class Summary(NamedTuple):
    """A user's row of `user_features`."""

    user: str
    ts: int
    counts: Counts
    history: list[str]
    seen: list[str]
    last: list[Event]
    online: OnlineFeatures


def user_summaries(
    batches: Iterable[pa.RecordBatch], ends: Sequence[int], window_days: int, history: int, actions: int, seen: int
) -> Iterator[pa.RecordBatch]:
    """Of rows sorted by user and time, a row for each user and each of `ends` (ms, sorted) with an event in its window."""
    user, state, due = None, UserState(window_days, max(history, seen), actions), 0
    rows: list[Summary] = []

    def pass_ends(until: int | None) -> None:
        nonlocal due
        while user is not None and due < len(ends) and (until is None or ends[due] <= until):
            ts = ends[due]
            counts = state.move_to(ts)
            if counts.whole:
                online = OnlineFeatures.of(state, ts, window_days)
                rows.append(Summary(user, ts, counts, state.history(history), state.history(seen), state.actions, online))
            due += 1

    for batch in batches:
        for key, event in zip(batch[USER_ID].to_pylist(), _events(batch), strict=True):
            if key != user:
                pass_ends(None)
                user, state, due = key, UserState(window_days, max(history, seen), actions), 0
            pass_ends(event.ts)
            state.add(event)
        yield _summary_batch(rows)
        rows.clear()
    pass_ends(None)
    yield _summary_batch(rows)


ACTION = pa.struct([(ITEM_ID, pa.string()), (EVENT_TYPE, pa.string()), (TS, pa.int64())])


def _summary_batch(rows: Sequence[Summary]) -> pa.RecordBatch:
    last = [[{ITEM_ID: action.item, EVENT_TYPE: action.kind, TS: action.ts} for action in row.last] for row in rows]
    return pa.RecordBatch.from_pydict(
        {
            USER_ID: pa.array([row.user for row in rows], pa.string()),
            TS: pa.array([row.ts for row in rows], pa.int64()),
            "history": pa.array([row.history for row in rows], pa.list_(pa.string())),
            **_count_columns("user", [row.counts for row in rows]),
            "user_recency_hours": pa.array([row.counts.recency_hours(row.ts) for row in rows], pa.float32()),
            "user_category": pa.array([row.online.category for row in rows], pa.string()),
            "last": pa.array(last, pa.list_(ACTION)),
            "last_ts": pa.array([row.counts.last for row in rows], pa.int64()),
            DEVICE: pa.array([row.online.device for row in rows], pa.string()),
            COUNTRY: pa.array([row.online.country for row in rows], pa.string()),
            "seen": pa.array([row.seen for row in rows], pa.list_(pa.string())),
            "features": pa.array([row.online.encode().decode() for row in rows], pa.string()),
        }
    )


def _events(batch: pa.RecordBatch) -> Iterator[Event]:
    tops = {category: top_of(category) for category in batch[CATEGORY].unique().to_pylist()}
    names = (ITEM_ID, EVENT_TYPE, TS, WEIGHT, CATEGORY, DEVICE, COUNTRY)
    columns = zip(*(batch[name].to_pylist() for name in names), strict=True)
    for item, kind, ts, weight, category, device, country in columns:
        yield Event(item, kind, ts, round(weight * WEIGHT_UNITS), tops[category], device, country)


def _count_columns(of: str, found: Sequence[Counts]) -> dict[str, pa.Array]:
    names = [f"{of}_{name}" for name in ACTIVITY_COLUMNS]
    return {name: pa.array([counts[at] for counts in found], pa.int32()) for at, name in enumerate(names)}


def _extended(batch: pa.RecordBatch, added: dict[str, pa.Array]) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([*batch.columns, *added.values()], [*batch.schema.names, *added])
