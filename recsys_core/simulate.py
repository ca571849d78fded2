"""A simulated shop: users with tastes over a category tree, whose sessions arrive as a stream of events.

A user likes a few categories. A session is about one of them; its views are drawn by popularity and by closeness of the
item's latent vector to the user's. Popularity is Zipfian and drifts from day to day, some items go viral for hours, views
lead to carts and purchases, volume follows the hour and the weekday, users and items join every day, some events arrive
late and some twice. Everything follows from the seed. Time is made in blocks of 24 hours, so memory is that of one day.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from recsys_core import progress
from recsys_core.catalog import CATALOG_SCHEMA, merge_catalog
from recsys_core.events import DAY_MS, EVENT_SCHEMA, HOUR_MS, hour_key, now_ms
from recsys_core.lake import Lake
from recsys_core.landing import Landing

SOURCE = "simulated"

TREE: dict[str, dict[str, tuple[str, ...]]] = {
    "sports": {
        "running": ("shoes", "jackets", "watches"),
        "cycling": ("helmets", "lights", "gloves"),
        "camping": ("tents", "stoves", "backpacks"),
    },
    "home": {
        "kitchen": ("knives", "pans", "kettles"),
        "bedroom": ("lamps", "pillows", "blankets"),
        "garden": ("chairs", "planters", "grills"),
    },
    "electronics": {
        "audio": ("headphones", "speakers", "turntables"),
        "photo": ("cameras", "lenses", "tripods"),
        "computing": ("keyboards", "monitors", "routers"),
    },
    "fashion": {
        "women": ("dresses", "boots", "coats"),
        "men": ("shirts", "sneakers", "belts"),
        "accessories": ("bags", "scarves", "sunglasses"),
    },
    "media": {
        "books": ("novels", "cookbooks", "comics"),
        "games": ("puzzles", "consoles", "boardgames"),
        "music": ("guitars", "records", "pianos"),
    },
    "family": {
        "baby": ("strollers", "bottles", "monitors"),
        "toys": ("trains", "dolls", "blocks"),
        "pets": ("leashes", "bowls", "beds"),
    },
}
TOP_SIZE = 9
"""Categories under each top of the tree."""
STYLES = (
    "Trail",
    "Urban",
    "Classic",
    "Nordic",
    "Compact",
    "Vintage",
    "Premium",
    "Light",
    "Alpine",
    "Studio",
    "Everyday",
    "Bold",
)
BRANDS = (
    "Aldane",
    "Bruvik",
    "Corvane",
    "Delmora",
    "Estrel",
    "Fjordan",
    "Galvex",
    "Halden",
    "Ivaro",
    "Jorvik",
    "Kestra",
    "Lumora",
)
DEVICES, DEVICE_SHARES = ("mobile", "desktop", "tablet"), (0.62, 0.31, 0.07)
COUNTRIES, COUNTRY_SHARES = ("DE", "FR", "GB", "ES", "IT", "PL"), (0.3, 0.2, 0.2, 0.12, 0.1, 0.08)

TYPES = ("view", "cart", "purchase", "like")
VIEW, CART, PURCHASE, LIKE = range(4)

HOUR_VOLUME = np.array([3, 2, 1, 1, 1, 2, 4, 7, 9, 10, 10, 11, 12, 11, 10, 10, 11, 13, 16, 19, 20, 18, 12, 6], dtype=float)
WEEKDAY_VOLUME = np.array([0.95, 0.9, 0.9, 0.95, 1.0, 1.25, 1.3])
"""Monday first. Both are relative; hours are UTC."""

DIMENSIONS = 12
FAVOURITES = 4
CANDIDATES = 4
"""Items drawn by popularity for one view, of which the user's taste picks one."""
MAX_LATE_HOURS = 10
MAX_REPEAT_MS = 5 * 60_000
MAX_PAUSE_MS = 10 * 60_000


class SimulationConfig(BaseModel):
    """What is simulated. Equal configurations give equal bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(7, ge=0)
    users: int = Field(5_000, ge=1, description="users on the first day")
    items: int = Field(3_000, ge=54, description="items on the first day; at least one for each category")
    days: int = Field(14, ge=1)
    events: int = Field(600_000, ge=1, description="expected number of events, without the duplicates")
    end: int = Field(
        default_factory=lambda: now_ms() // HOUR_MS * HOUR_MS,
        description="end (ms), cut to the hour; unset: the last full hour",
    )
    new_users_per_day: float = Field(0.01, ge=0, le=1, description="users that join on a day, as a fraction of `users`")
    new_items_per_day: float = Field(0.01, ge=0, le=1, description="items that appear on a day, as a fraction of `items`")
    late_rate: float = Field(0.01, ge=0, le=1, description="events that arrive one to ten hours late")
    duplicate_rate: float = Field(0.005, ge=0, le=1, description="events that arrive a second time")
    viral_items_per_day: int = Field(2, ge=0, description="items that go viral on a day")
    viral_share: float = Field(0.15, ge=0, le=1, description="share of all views that a viral item takes at its peak")
    cart_rate: float = Field(0.12, ge=0, le=1, description="views that lead to a cart")
    purchase_rate: float = Field(0.35, ge=0, le=1, description="carts that lead to a purchase")
    like_rate: float = Field(0.03, ge=0, le=1, description="views that lead to a like")
    views_per_session: float = Field(6.0, ge=1, description="mean of a geometric distribution")
    explore_rate: float = Field(0.15, ge=0, le=1, description="sessions about any category instead of a favourite one")
    zipf: float = Field(0.8, ge=0, description="exponent of the popularity of categories, and of items within one")
    drift: float = Field(0.1, ge=0, description="standard deviation of the daily change of log popularity")
    taste: float = Field(3.0, ge=0, description="how strongly the closeness of vectors decides among candidates")

    @property
    def end_ms(self) -> int:
        return self.end // HOUR_MS * HOUR_MS

    @property
    def start_ms(self) -> int:
        return self.end_ms - self.days * DAY_MS


@dataclass(frozen=True)
class EventBatch:
    """The events, EVENT_SCHEMA, that arrived within one hour, in the order of arrival. `arrival_ms` is the hour's start."""

    arrival_ms: int
    events: pa.Table


class Simulation:
    """One simulated history. `batches` may be called again and gives the same."""

    def __init__(self, config: SimulationConfig) -> None:
        self.config = config
        rng = np.random.default_rng([config.seed, 0])
        self._make_categories(rng)
        self._make_items(rng)
        self._make_users(rng)
        self._make_bursts(rng)

    # -- the world --------------------------------------------------------------------------------------------------

    def _make_categories(self, rng: np.random.Generator) -> None:
        self.categories: list[tuple[str, str, str]] = []
        vectors = []
        for top, middles in TREE.items():
            of_top = rng.normal(size=DIMENSIONS)
            for middle, leaves in middles.items():
                of_middle = of_top + 0.8 * rng.normal(size=DIMENSIONS)
                for leaf in leaves:
                    self.categories.append((top, middle, leaf))
                    vectors.append(of_middle + 0.6 * rng.normal(size=DIMENSIONS))
        self.category_vectors = np.array(vectors, dtype=np.float32)
        self.category_vectors /= np.linalg.norm(self.category_vectors, axis=1, keepdims=True)
        popularity = rng.permutation((1.0 + np.arange(len(self.categories))) ** -self.config.zipf)
        self.category_shares = popularity / popularity.sum()

    def _make_items(self, rng: np.random.Generator) -> None:
        config, leaves = self.config, len(self.categories)
        daily = round(config.items * config.new_items_per_day)
        count = config.items + daily * config.days
        self.item_category = np.concatenate([np.arange(leaves), rng.integers(0, leaves, count - leaves)])
        self.item_vectors = self.category_vectors[self.item_category] + 0.25 * rng.normal(size=(count, DIMENSIONS))
        self.item_vectors = self.item_vectors.astype(np.float32)
        old = config.start_ms - rng.integers(1, 365 * DAY_MS, config.items)
        new = config.start_ms + np.repeat(np.arange(config.days), daily) * DAY_MS + rng.integers(0, DAY_MS, daily * config.days)
        self.item_created = np.concatenate([np.sort(old), np.sort(new)])
        rank = np.empty(count)
        by_category = np.lexsort((rng.random(count), self.item_category))
        starts = np.searchsorted(self.item_category[by_category], np.arange(leaves))
        rank[by_category] = np.arange(count) - starts[self.item_category[by_category]]
        self.item_popularity = (1.0 + rank) ** -config.zipf
        category_price = np.exp(rng.normal(3.5, 0.8, leaves))
        self.item_price = np.floor(category_price[self.item_category] * np.exp(rng.normal(0, 0.4, count))) + 0.99
        self.item_style = rng.integers(0, len(STYLES), count)
        self.item_brand = rng.integers(0, len(BRANDS), count)
        self.item_available = rng.random(count) < 0.97
        self._by_category = np.argsort(self.item_category, kind="stable")
        self._category_bounds = np.searchsorted(self.item_category[self._by_category], np.arange(leaves + 1))

    def _make_users(self, rng: np.random.Generator) -> None:
        config = self.config
        self._new_users = round(config.users * config.new_users_per_day)
        count = config.users + self._new_users * (config.days - 1)
        leaves = len(self.categories)
        first = rng.choice(leaves, count, p=self.category_shares)
        siblings = first[:, None] // TOP_SIZE * TOP_SIZE + rng.integers(0, TOP_SIZE, (count, 1))
        others = rng.choice(leaves, (count, FAVOURITES - 2), p=self.category_shares)
        self.user_favourites = np.concatenate([first[:, None], siblings, others], axis=1)
        self.user_shares = rng.dirichlet((3.0, 1.5, 1.0, 0.7), count).astype(np.float32)
        noise = 0.35 * rng.normal(size=(count, DIMENSIONS)).astype(np.float32)
        self.user_vectors = np.einsum("uf,ufd->ud", self.user_shares, self.category_vectors[self.user_favourites]) + noise
        self.user_activity = rng.lognormal(0, 0.9, count)
        self.user_device = rng.choice(len(DEVICES), count, p=DEVICE_SHARES)
        self.user_country = rng.choice(len(COUNTRIES), count, p=COUNTRY_SHARES)

    def _make_bursts(self, rng: np.random.Generator) -> None:
        config = self.config
        days = np.repeat(np.arange(config.days), config.viral_items_per_day)
        self.burst_item = rng.integers(0, config.items, len(days))
        self.burst_start = config.start_ms + days * DAY_MS + rng.integers(6, 18, len(days)) * HOUR_MS
        self.burst_end = self.burst_start + rng.integers(3, 7, len(days)) * HOUR_MS

    def _users_on(self, day: int) -> int:
        return self.config.users + self._new_users * day

    @cached_property
    def _hour_volumes(self) -> np.ndarray:
        """Expected share of the sessions of an average day, of every hour: float64 (days, 24)."""
        hours = self.config.start_ms // HOUR_MS + np.arange(24 * self.config.days)
        weekday = (hours // 24 + 3) % 7
        return (HOUR_VOLUME[hours % 24] / HOUR_VOLUME.sum() * WEEKDAY_VOLUME[weekday]).reshape(-1, 24)

    @cached_property
    def _sessions_per_activity(self) -> float:
        config = self.config
        events_a_view = 1 + config.cart_rate * (1 + config.purchase_rate) + config.like_rate
        sessions = config.events / (config.views_per_session * events_a_view)
        activity = np.cumsum(self.user_activity)[[self._users_on(day) - 1 for day in range(config.days)]]
        return float(sessions / (activity * self._hour_volumes.sum(axis=1)).sum())

    # -- what there is to read --------------------------------------------------------------------------------------

    @cached_property
    def item_ids(self) -> pa.Array:
        return fixed_width("i", np.arange(len(self.item_created)), 6)

    @cached_property
    def user_ids(self) -> pa.Array:
        return fixed_width("u", np.arange(len(self.user_activity)), 6)

    @cached_property
    def _category_paths(self) -> pa.Array:
        return pa.array(["/".join(path) for path in self.categories])

    def catalog(self) -> pa.Table:
        """All items that ever appear: item_id, title, category, price, available, created_ts (ms), brand."""
        titles = [
            f"{STYLES[style]} {self.categories[leaf][1].title()} {self.categories[leaf][2].title()} {number:03d}"
            for number, (style, leaf) in enumerate(zip(self.item_style.tolist(), self.item_category.tolist(), strict=True))
        ]
        return pa.table(
            {
                "item_id": self.item_ids,
                "title": titles,
                "category": self._category_paths.take(pa.array(self.item_category)),
                "price": self.item_price,
                "available": pa.array(self.item_available),
                "created_ts": self.item_created,
                "brand": pa.array(BRANDS).take(pa.array(self.item_brand)),
            }
        )

    def truth(self) -> dict[str, pa.Table]:
        """What no model may see: `users` (vector, categories, shares), `items` (vector), `bursts` (item, start, end in ms)."""
        paths = self._category_paths.to_numpy(zero_copy_only=False)
        return {
            "users": pa.table(
                {
                    "user_id": self.user_ids,
                    "vector": list(self.user_vectors),
                    "categories": list(paths[self.user_favourites]),
                    "shares": list(self.user_shares),
                }
            ),
            "items": pa.table(
                {
                    "item_id": self.item_ids,
                    "vector": list(self.item_vectors),
                    "category": self._category_paths.take(pa.array(self.item_category)),
                }
            ),
            "bursts": pa.table(
                {
                    "item_id": self.item_ids.take(pa.array(self.burst_item)),
                    "start_ts": self.burst_start,
                    "end_ts": self.burst_end,
                }
            ),
        }

    def batches(self) -> Iterator[EventBatch]:
        """The events hour by hour of their arrival. What would arrive after the end has not arrived yet and is left out."""
        config = self.config
        log_drift = np.zeros(len(self.item_created))
        waiting = _Events.none()
        for day in range(config.days):
            rng = np.random.default_rng([config.seed, 1, day])
            log_drift = 0.95 * log_drift + config.drift * rng.normal(size=len(log_drift))
            start = config.start_ms + day * DAY_MS
            popularity = np.where(self.item_created < start + DAY_MS, self.item_popularity * np.exp(log_drift), 0.0)
            arrived = _Events.joined([waiting, self._day(day, rng, popularity)])
            arrived = arrived.take(np.argsort(arrived.arrival, kind="stable"))
            cuts = np.searchsorted(arrived.arrival, start + np.arange(25) * HOUR_MS)
            table = self._table(arrived.take(slice(0, cuts[-1])))
            for hour in range(24):
                yield EventBatch(start + hour * HOUR_MS, table.slice(cuts[hour], cuts[hour + 1] - cuts[hour]))
            waiting = arrived.take(slice(cuts[-1], None))

    def write_landing(self, landing: Landing, source: str = SOURCE) -> int:
        """Write a landing file for each hour of arrival, named by it. Returns the number of rows."""
        rows = 0
        for batch in progress.track(self.batches(), "simulating hours", 24 * self.config.days):
            if batch.events.num_rows:
                landing.write_events(source, hour_key(batch.arrival_ms), batch.events)
                rows += batch.events.num_rows
        return rows

    def write_catalog(self, lake: Lake) -> None:
        """Merge the items into the lake's catalogue; brand and creation time go into the attributes."""
        items = self.catalog()
        extra = zip(items["brand"].to_pylist(), items["created_ts"].to_pylist(), strict=True)
        attributes = [json.dumps({"brand": brand, "created_ts": created}) for brand, created in extra]
        merge_catalog(lake, items.append_column("attributes", pa.array(attributes)).select(CATALOG_SCHEMA.names))

    def write_truth(self, folder: Path) -> None:
        """Write each table of `truth` as `<folder>/<name>.parquet`; keep the folder apart from what models read."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in self.truth().items():
            pq.write_table(table, folder / f"{name}.parquet")

    # -- one day ----------------------------------------------------------------------------------------------------

    def _day(self, day: int, rng: np.random.Generator, popularity: np.ndarray) -> _Events:
        """The events that happen from the sessions of a day, in no particular order, with their times of arrival."""
        views = self._views(day, rng, popularity)
        carts = views.take(rng.random(len(views)) < self.config.cart_rate).later(CART, rng, 5_000, 60_000)
        purchases = carts.take(rng.random(len(carts)) < self.config.purchase_rate).later(PURCHASE, rng, 20_000, 240_000)
        likes = views.take(rng.random(len(views)) < self.config.like_rate).later(LIKE, rng, 2_000, 30_000)
        events = _Events.joined([views, carts, purchases, likes])
        events.number[:] = (day << 40) + np.arange(len(events))
        late = rng.random(len(events)) < self.config.late_rate
        events.arrival[late] += rng.integers(HOUR_MS, MAX_LATE_HOURS * HOUR_MS, int(late.sum()))
        again = events.take(rng.random(len(events)) < self.config.duplicate_rate)
        again.arrival[:] += rng.integers(1, MAX_REPEAT_MS, len(again))
        return _Events.joined([events, again])

    def _views(self, day: int, rng: np.random.Generator, popularity: np.ndarray) -> _Events:
        config = self.config
        volumes = self._hour_volumes[day]
        expected = self.user_activity[: self._users_on(day)] * (self._sessions_per_activity * volumes.sum())
        user = np.repeat(np.arange(len(expected)), rng.poisson(expected))
        sessions = len(user)
        hour = np.searchsorted(np.cumsum(volumes) / volumes.sum(), rng.random(sessions), side="right").clip(0, 23)
        start = config.start_ms + day * DAY_MS + hour * HOUR_MS + rng.integers(0, HOUR_MS, sessions)
        category = self._session_categories(user, rng)
        length = rng.geometric(1 / config.views_per_session, sessions)
        session = np.repeat(np.arange(sessions), length)
        first = np.cumsum(length) - length
        pause = np.minimum(rng.lognormal(10.2, 0.8, len(session)), MAX_PAUSE_MS).astype(np.int64)
        elapsed = np.cumsum(pause)
        ts = start[session] + elapsed - elapsed[first][session]
        item = self._items_viewed(user[session], category[session], ts, rng, popularity)
        self._go_viral(item, ts, rng)
        return _Events(np.full(len(ts), VIEW, np.int8), user[session], item, (day << 40) + session, ts, ts.copy(), ts.copy())

    def _session_categories(self, user: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        bounds = np.cumsum(self.user_shares[user], axis=1)
        favourite = (rng.random((len(user), 1)) * bounds[:, -1:] > bounds[:, :-1]).sum(axis=1)
        category = self.user_favourites[user, favourite]
        explores = rng.random(len(user)) < self.config.explore_rate
        return np.where(explores, rng.choice(len(self.categories), len(user), p=self.category_shares), category)

    def _items_viewed(
        self, user: np.ndarray, category: np.ndarray, ts: np.ndarray, rng: np.random.Generator, popularity: np.ndarray
    ) -> np.ndarray:
        """Draw candidates of the category by popularity, then one of them by softmax of its closeness to the user."""
        mass = np.concatenate([[0.0], np.cumsum(popularity[self._by_category])])
        low, high = mass[self._category_bounds[category]], mass[self._category_bounds[category + 1]]
        drawn = low[:, None] + rng.random((len(user), CANDIDATES)) * (high - low)[:, None]
        position = np.searchsorted(mass, drawn, side="right") - 1
        candidates = self._by_category[np.minimum(position, self._category_bounds[category + 1][:, None] - 1)]
        closeness = np.einsum("nd,ncd->nc", self.user_vectors[user], self.item_vectors[candidates])
        score = self.config.taste * closeness + rng.gumbel(size=closeness.shape)
        score[self.item_created[candidates] > ts[:, None]] = -np.inf
        chosen = candidates[np.arange(len(user)), score.argmax(axis=1)]
        oldest = self._by_category[self._category_bounds[category]]
        return np.where(self.item_created[chosen] <= ts, chosen, oldest)

    def _go_viral(self, item: np.ndarray, ts: np.ndarray, rng: np.random.Generator) -> None:
        """Turn views within a burst into views of its item, with a share that falls to nothing by the burst's end."""
        chance = rng.random(len(ts))
        now = (self.burst_start <= ts.max(initial=0)) & (self.burst_end > ts.min(initial=self.config.end_ms))
        for viral, start, end in zip(self.burst_item[now], self.burst_start[now], self.burst_end[now], strict=True):
            share = self.config.viral_share * (end - ts) / (end - start)
            item[(ts >= start) & (ts < end) & (chance < share)] = viral

    def _table(self, events: _Events) -> pa.Table:
        kind = pa.array(events.kind)
        value = np.where(events.kind == PURCHASE, self.item_price[events.item], np.nan)
        columns = {
            "event_id": fixed_width("", _scrambled(events.number, self.config.seed), 16, hexadecimal=True),
            "user_id": self.user_ids.take(pa.array(events.user)),
            "item_id": self.item_ids.take(pa.array(events.item)),
            "event_type": pa.array(TYPES).take(kind),
            "ts": pa.array(events.ts),
            "session_id": fixed_width("s", _scrambled(events.session, self.config.seed + 1), 16, hexadecimal=True),
            "device": pa.array(DEVICES).take(pa.array(self.user_device[events.user])),
            "country": pa.array(COUNTRIES).take(pa.array(self.user_country[events.user])),
            "value": pa.array(value, from_pandas=True),
            "recommendation_id": pa.nulls(len(events), pa.string()),
        }
        return pa.table([columns[name] for name in EVENT_SCHEMA.names], schema=EVENT_SCHEMA)


@dataclass(frozen=True)
class _Events:
    """Events as parallel arrays (n,): kind, user, item, session, event time and arrival (ms), running number."""

    kind: np.ndarray
    user: np.ndarray
    item: np.ndarray
    session: np.ndarray
    ts: np.ndarray
    arrival: np.ndarray
    number: np.ndarray

    @staticmethod
    def none() -> _Events:
        return _Events(np.zeros(0, np.int8), *(np.zeros(0, np.int64) for _ in range(6)))

    @staticmethod
    def joined(parts: list[_Events]) -> _Events:
        return _Events(*(np.concatenate(columns) for columns in zip(*(p.columns() for p in parts), strict=True)))

    def columns(self) -> tuple[np.ndarray, ...]:
        return self.kind, self.user, self.item, self.session, self.ts, self.arrival, self.number

    def __len__(self) -> int:
        return len(self.ts)

    def take(self, which: np.ndarray | slice) -> _Events:
        return _Events(*(column[which] for column in self.columns()))

    def later(self, kind: int, rng: np.random.Generator, least_ms: int, most_ms: int) -> _Events:
        """Events of another kind on the same items, a moment after these."""
        ts = self.ts + rng.integers(least_ms, most_ms, len(self))
        return _Events(np.full(len(ts), kind, np.int8), self.user, self.item, self.session, ts, ts.copy(), self.number)


def fixed_width(prefix: str, numbers: np.ndarray, digits: int, hexadecimal: bool = False) -> pa.Array:
    """Strings (n,) of `prefix` and the zero-padded numbers, decimal (wider where needed) or hexadecimal."""
    rest = numbers.astype(np.uint64)
    if not hexadecimal and len(rest):
        digits = max(digits, len(str(int(rest.max()))))
    width = len(prefix) + digits
    text = np.empty((len(rest), width), np.uint8)
    text[:, : len(prefix)] = np.frombuffer(prefix.encode(), np.uint8)
    alphabet = np.frombuffer(b"0123456789abcdef", np.uint8)
    for at in range(width - 1, len(prefix) - 1, -1):
        if hexadecimal:
            text[:, at] = alphabet[(rest & np.uint64(15)).astype(np.int64)]
            rest = rest >> np.uint64(4)
        else:
            rest, digit = np.divmod(rest, np.uint64(10))
            text[:, at] = alphabet[digit.astype(np.int64)]
    offsets = np.arange(len(rest) + 1, dtype=np.int32) * np.int32(width)
    return pa.StringArray.from_buffers(len(rest), pa.py_buffer(offsets), pa.py_buffer(text))


def _scrambled(numbers: np.ndarray, seed: int) -> np.ndarray:
    """Distinct numbers as distinct 64-bit numbers without order (the finalizer of SplitMix64, Steele et al. 2014)."""
    mixed = numbers.astype(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
