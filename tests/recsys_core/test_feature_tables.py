"""The feature tables on tiny clickstreams, and on a random one against a recomputation of every row."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyarrow as pa
import pytest
from builders import event, event_table, ms
from recsys_home import default_settings

from recsys_core.catalog import CATALOG_KEY, CATALOG_SCHEMA, CATALOG_TABLE
from recsys_core.events import DAY_MS, HOUR_MS, day_key, hour_key
from recsys_core.feature_tables import (
    DRAWS,
    EXAMPLE_COLUMNS,
    build_item_features,
    build_training_examples,
    build_user_features,
    draw_limit,
)
from recsys_core.features import ITEM_FEATURES, TRAINING_EXAMPLES, USER_FEATURES, OnlineFeatures, user_inputs
from recsys_core.lake import Lake, Partition
from recsys_core.leaks import find_leaks, leaks
from recsys_core.settings import Settings
from recsys_core.tables import CLICKS_HOURLY

DAY = "2026-03-02"
WINDOW = 3


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    home = tmp_path_factory.mktemp("home")
    return default_settings(home, interactions={"window_days": WINDOW}, features={"history": 3, "checked_examples": 10_000})


def write_events(lake: Lake, rows: list[dict]) -> None:
    """Partitions of `clicks_hourly` from rows of the event schema, without Spark."""
    hours: dict[str, list[dict]] = {}
    for row in rows:
        hours.setdefault(hour_key(row["ts"]), []).append(row)
    for hour, found in hours.items():
        lake.write(CLICKS_HOURLY, hour, event_table(*found))


def write_catalog(lake: Lake, *rows: dict) -> None:
    table = pa.Table.from_pylist([{"available": True, **row} for row in rows], schema=CATALOG_SCHEMA)
    lake.write(CATALOG_TABLE, CATALOG_KEY, table)


def rows_of(lake: Lake, table: str, day: str = DAY) -> list[dict]:
    dataset = lake.dataset(table, [day])
    return [] if dataset is None else dataset.to_table().to_pylist()


def examples_of(lake: Lake, day: str = DAY) -> list[dict]:
    return sorted(rows_of(lake, TRAINING_EXAMPLES, day), key=lambda r: (r["ts"], r["user_id"], r["item_id"]))


STORY = [
    event("1", "u", "shoe", "2026-03-01T23:00", "view", device="tv", country="SE"),
    event("2", "v", "shoe", f"{DAY}T09:00", "cart"),
    event("3", "u", "book", f"{DAY}T10:00", "purchase"),
    event("4", "u", "shoe", f"{DAY}T10:00"),
    event("5", "u", "odd", f"{DAY}T10:30", device="phone"),
]
CATALOG = [
    {"item_id": "shoe", "title": "Shoe", "category": "wear/feet/shoes", "price": 7.0},
    {"item_id": "book", "title": "Book", "category": "media", "price": float("nan")},
    {"item_id": "unsold", "title": "Unsold", "category": "", "price": -3.0},
]


def test_an_example_has_the_features_of_just_before_it(spark, lake, settings):
    write_events(lake, STORY)
    write_catalog(lake, *CATALOG)
    build_training_examples(spark, lake, [DAY], settings)
    first, cart, purchase, again, last = examples_of(lake)
    assert tuple(first) == EXAMPLE_COLUMNS
    assert first == {
        "user_id": "u",
        "item_id": "shoe",
        "event_type": "view",
        "ts": ms("2026-03-01T23:00"),
        "weight": 1.0,
        "history": [],
        "hour": 23,
        "weekday": 6,
        "device": "tv",
        "country": "SE",
        "user_events_1d": 0,
        "user_events_7d": 0,
        "user_events_window": 0,
        "user_recency_hours": None,
        "user_category": None,
        "category": "wear/feet/shoes",
        "price_bucket": 6,
        "item_age_days": 0.0,
        "item_events_1d": 0,
        "item_events_7d": 0,
        "item_events_window": 0,
    }
    assert (cart["weight"], cart["item_events_1d"], cart["history"]) == (4.0, 1, [])
    assert cart["item_age_days"] == pytest.approx(10 / 24)
    for one in (purchase, again):
        assert (one["history"], one["user_events_1d"], one["user_recency_hours"]) == (["shoe"], 1, 11.0)
        assert (one["user_category"], one["device"]) == ("wear", None)
    assert (purchase["category"], purchase["price_bucket"], purchase["item_events_1d"]) == ("media", -1, 0)
    assert again["item_events_1d"] == 2
    assert last["history"] == ["book", "shoe"]
    assert (last["user_events_1d"], last["user_recency_hours"], last["user_category"]) == (3, 0.5, "media")
    assert (last["category"], last["price_bucket"], last["device"]) == (None, -1, "phone")


@pytest.mark.usefixtures("examples")
def test_the_columns_have_the_types_of_the_contract(busy):
    schema = busy.dataset(TRAINING_EXAMPLES, [DAY]).schema
    assert {name: str(schema.field(name).type) for name in schema.names if schema.field(name).type != pa.string()} == {
        "ts": "int64",
        "weight": "float",
        "history": "list<element: string>",
        "hour": "int8",
        "weekday": "int8",
        "user_events_1d": "int32",
        "user_events_7d": "int32",
        "user_events_window": "int32",
        "user_recency_hours": "float",
        "price_bucket": "int8",
        "item_age_days": "float",
        "item_events_1d": "int32",
        "item_events_7d": "int32",
        "item_events_window": "int32",
    }


def test_users_and_items_are_as_of_the_end_of_the_day(spark, lake, settings):
    write_events(lake, [*STORY, event("6", "late", "new", "2026-03-03T00:00")])
    write_catalog(lake, *CATALOG)
    build_user_features(spark, lake, [DAY], settings)
    build_item_features(spark, lake, [DAY], settings)
    u, v = rows_of(lake, USER_FEATURES)
    features = OnlineFeatures.decode(u.pop("features"))
    assert u == {
        "user_id": "u",
        "history": ["odd", "book", "shoe"],
        "user_events_1d": 3,
        "user_events_7d": 4,
        "user_events_window": 4,
        "user_recency_hours": 13.5,
        "user_category": "media",
        "last": [
            {"item_id": item, "event_type": kind, "ts": ms(moment)}
            for item, kind, moment in (
                ("odd", "view", f"{DAY}T10:30"),
                ("book", "purchase", f"{DAY}T10:00"),
                ("shoe", "view", f"{DAY}T10:00"),
                ("shoe", "view", "2026-03-01T23:00"),
            )
        ],
        "last_ts": ms(f"{DAY}T10:30"),
        "device": "phone",
        "country": "SE",
        "seen": ["odd", "book", "shoe"],
    }
    assert features == OnlineFeatures(
        at=ms("2026-03-03"),
        window_days=WINDOW,
        last_ts=ms(f"{DAY}T10:30"),
        hours=((14, 3), (25, 1)),
        days=((1, 3), (2, 1)),
        category="media",
        device="phone",
        country="SE",
    )
    assert (v["user_id"], v["device"], v["user_category"]) == ("v", None, "wear")
    book, odd, shoe, unsold = rows_of(lake, ITEM_FEATURES)
    assert shoe == {
        "item_id": "shoe",
        "title": "Shoe",
        "price": 7.0,
        "first_ts": ms("2026-03-01T23:00"),
        "category": "wear/feet/shoes",
        "price_bucket": 6,
        "item_age_days": pytest.approx(25 / 24),
        "item_events_1d": 2,
        "item_events_7d": 3,
        "item_events_window": 3,
    }
    assert (book["price"], book["price_bucket"]) == (None, -1)
    assert (odd["title"], odd["category"], odd["item_events_window"]) == (None, None, 1)
    assert (unsold["first_ts"], unsold["item_age_days"], unsold["item_events_window"]) == (None, 0.0, 0)
    assert (unsold["category"], unsold["price"]) == (None, None)


@pytest.fixture(scope="module")
def busy(tmp_path_factory) -> Lake:
    """Ten days of few users and items, whose events often share a millisecond."""
    lake = Lake(str(tmp_path_factory.mktemp("busy")))
    random = np.random.default_rng(3)
    rows = []
    for number in range(1500):
        ts = ms(DAY) - 7 * DAY_MS + int(random.integers(0, 10 * 24 * 4)) * HOUR_MS // 4
        kind = str(random.choice(["view", "cart", "purchase", "bookmark"]))
        user, item = f"u{int(random.integers(0, 12) ** 2 / 12)}", f"i{int(random.integers(0, 20))}"
        rows.append({**event(f"e{number}", user, item, DAY, kind, device=f"d{number % 3}"), "ts": ts})
    write_events(lake, rows)
    write_catalog(lake, *({"item_id": f"i{n}", "category": f"c{n % 4}/x", "price": n} for n in range(17)))
    return lake


CATEGORIES: dict[str, str | None] = {f"i{n}": f"c{n % 4}/x" for n in range(17)}
DAYS = [day_key(ms(DAY) + n * DAY_MS) for n in (-1, 0, 2)]


@pytest.fixture(scope="module")
def examples(spark, busy, settings) -> dict[str, Partition]:
    """`training_examples` of three days, made as one range."""
    return {part.key: part for part in build_training_examples(spark, busy, DAYS, settings)}


def test_every_example_is_what_its_past_gives(busy, settings, examples):
    assert list(examples) == DAYS
    for part in examples.values():
        checked, wrong = find_leaks(busy, part.key, CATEGORIES, settings)
        assert checked == part.rows > 300
        assert wrong == []
        end = ms(part.key) + DAY_MS
        times = [row["ts"] for row in rows_of(busy, TRAINING_EXAMPLES, part.key)]
        assert end - WINDOW * DAY_MS <= min(times) <= max(times) < end


def test_a_day_between_others_is_the_same_as_alone(spark, busy, settings, examples):
    together = {"training_examples": examples[DAY].data_version}
    for build in (build_user_features, build_item_features):
        together |= {p.table: p.data_version for p in build(spark, busy, DAYS, settings) if p.key == DAY}
    assert len(set(together.values())) == 3
    for build in (build_user_features, build_item_features, build_training_examples):
        (alone,) = build(spark, busy, [DAY], settings)
        assert alone.data_version == together[alone.table]


def test_the_features_of_a_user_are_those_of_an_example_at_the_end_of_the_day(spark, busy, settings, tmp_path):
    """An event in the first millisecond of the next day sees what the tables of the day say, offline and online."""
    lake = Lake(str(tmp_path / "next"))
    clicks = busy.dataset(CLICKS_HOURLY, busy.keys(CLICKS_HOURLY)).to_table().to_pylist()
    tomorrow = day_key(ms(DAY) + DAY_MS)
    clicks = [row for row in clicks if row["ts"] < ms(tomorrow)]
    probes = [event(f"p-{user}", user, "i3", tomorrow) for user in sorted({row["user_id"] for row in clicks})]
    write_events(lake, clicks + probes)
    write_catalog(lake, *({"item_id": item, "category": path, "price": 1} for item, path in CATEGORIES.items()))
    build_user_features(spark, lake, [DAY], settings)
    build_item_features(spark, lake, [DAY], settings)
    build_training_examples(spark, lake, [tomorrow], settings)
    examples = {row["user_id"]: row for row in rows_of(lake, TRAINING_EXAMPLES, tomorrow) if row["ts"] == ms(tomorrow)}
    users = {row["user_id"]: row for row in rows_of(lake, USER_FEATURES)}
    (item,) = (row for row in rows_of(lake, ITEM_FEATURES) if row["item_id"] == "i3")
    assert set(users) <= set(examples)
    assert len(users) > 5
    for name, user in users.items():
        example = examples[name]
        assert {column: example[column] for column in example if column.startswith("item_") and column in item} == {
            **{column: item[column] for column in item if column.startswith("item_")}
        }
        shared = ("history", "user_events_1d", "user_events_7d", "user_events_window", "user_recency_hours", "user_category")
        assert [user[column] for column in shared] == [example[column] for column in shared]
        last = [(action["item_id"], action["event_type"], action["ts"]) for action in user["last"]]
        online = user_inputs(last, user["seen"], OnlineFeatures.decode(user["features"]), ms(tomorrow), 3)
        assert (online.history, online.category) == (example["history"], example["user_category"])
        assert online.counts == (*(example[c] for c in shared[1:4]), pytest.approx(example["user_recency_hours"], rel=1e-6))


@pytest.mark.usefixtures("examples")
def test_a_planted_leak_is_found(busy, settings):
    rows = busy.read(TRAINING_EXAMPLES, DAY).to_pylist()
    events = busy.dataset(CLICKS_HOURLY, busy.keys(CLICKS_HOURLY)).to_table()
    planted = {
        "history": lambda e: [e["item_id"], *e["history"][:2]],
        "user_events_1d": lambda e: e["user_events_1d"] + 1,
        "item_events_window": lambda e: e["item_events_window"] + 1,
        "user_recency_hours": lambda _: 0.0,
        "item_age_days": lambda e: e["item_age_days"] + 1,
        "weight": lambda e: e["weight"] * 2,
    }
    schema = busy.dataset(TRAINING_EXAMPLES, [DAY]).schema
    row = next(e for e in rows if e["history"] and e["history"][0] != e["item_id"] and e["user_recency_hours"])
    for name, plant in planted.items():
        table = pa.Table.from_pylist([{**row, name: plant(row)}], schema=schema)
        (found,) = leaks(table, events, CATEGORIES, settings)
        assert f"{name} is" in found
        assert row["user_id"] in found
    moved = pa.Table.from_pylist([{**row, "ts": row["ts"] - 1}], schema=schema)
    assert "there is no such event" in leaks(moved, events, CATEGORIES, settings)[0]


@pytest.mark.usefixtures("examples")
def test_rows_are_not_in_the_order_of_users_or_time(busy):
    rows = rows_of(busy, TRAINING_EXAMPLES)
    times = np.array([row["ts"] for row in rows])
    assert abs(np.corrcoef(times, np.arange(len(times)))[0, 1]) < 0.3
    neighbours = [a["user_id"] == b["user_id"] for a, b in itertools.pairwise(rows)]
    assert np.mean(neighbours) < 0.5


def test_more_events_than_wanted_are_sampled_and_the_features_are_of_all_events(spark, tmp_path, settings):
    lake = Lake(str(tmp_path / "many"))
    users, each = 40, 50
    rows = [
        {**event(f"{u}-{n}", f"u{u}", f"i{n}", DAY), "ts": ms(DAY) + n * 60_000 + u} for u in range(users) for n in range(each)
    ]
    write_events(lake, rows)
    few = settings.model_copy(update={"features": settings.features.model_copy(update={"max_examples": 1000})})
    (part,) = build_training_examples(spark, lake, [DAY], few)
    assert 700 < part.rows <= 1000
    for row in rows_of(lake, TRAINING_EXAMPLES):
        n = int(row["item_id"][1:])
        assert (row["user_events_window"], len(row["history"])) == (n, min(n, 3))
    (again,) = build_training_examples(spark, lake, [DAY], few)
    assert again.data_version == part.data_version


def test_the_limit_of_draws_keeps_the_sample_below_what_is_wanted():
    assert draw_limit(10, 10) == DRAWS
    assert draw_limit(2_000_000, 1_000_000) / DRAWS == pytest.approx(0.498, abs=1e-3)
    share = draw_limit(50_000, 1000) / DRAWS
    assert np.random.default_rng(1).binomial(50_000, share, 2000).max() <= 1000


def test_without_a_catalogue_the_items_are_those_of_the_clicks(spark, lake, settings):
    write_events(lake, STORY)
    build_item_features(spark, lake, [DAY], settings)
    build_training_examples(spark, lake, [DAY], settings)
    build_user_features(spark, lake, [DAY], settings)
    items = rows_of(lake, ITEM_FEATURES)
    assert [row["item_id"] for row in items] == ["book", "odd", "shoe"]
    assert {(row["category"], row["price_bucket"], row["title"]) for row in items} == {(None, -1, None)}
    assert {row["user_category"] for row in examples_of(lake)} == {None}
    assert {row["user_category"] for row in rows_of(lake, USER_FEATURES)} == {None}


def test_days_without_events_have_no_users_and_no_examples_but_the_catalogues_items(spark, lake, settings):
    write_catalog(lake, *CATALOG)
    for build, rows in ((build_user_features, 0), (build_training_examples, 0), (build_item_features, 3)):
        assert [p.rows for p in build(spark, lake, ["2027-01-01"], settings)] == [rows]
    write_events(lake, STORY)
    for build, rows in ((build_user_features, 0), (build_training_examples, 0), (build_item_features, 3)):
        made = build(spark, lake, ["2026-03-20", DAY], settings)
        assert made[0].rows == rows
        assert made[1].rows > rows


def test_a_day_without_events_inside_a_window_keeps_the_window(spark, lake, settings):
    write_events(lake, STORY)
    tomorrow = day_key(ms(DAY) + DAY_MS)
    (part,) = build_user_features(spark, lake, [tomorrow], settings)
    assert part.rows == 2
    u = rows_of(lake, USER_FEATURES, tomorrow)[0]
    assert (u["user_events_1d"], u["user_events_window"], u["user_recency_hours"]) == (0, 4, 37.5)


def test_one_single_user_is_enough(spark, lake, settings):
    write_events(lake, [event("1", "only", "i", f"{DAY}T10:00")])
    assert build_user_features(spark, lake, [DAY], settings)[0].rows == 1
    assert build_item_features(spark, lake, [DAY], settings)[0].rows == 1
    assert build_training_examples(spark, lake, [DAY], settings)[0].rows == 1


def test_a_type_that_lost_its_weight_is_no_event_any_more(spark, lake, settings):
    write_events(lake, STORY)
    only_views = settings.model_copy(update={"events": settings.events.model_copy(update={"weights": {"view": 1.0}})})
    build_training_examples(spark, lake, [DAY], only_views)
    assert [(row["item_id"], row["user_events_window"]) for row in examples_of(lake)] == [("shoe", 0), ("shoe", 1), ("odd", 2)]


def test_a_heavy_user_and_a_popular_item_take_no_time_that_grows_with_their_square(spark, lake, settings):
    n = 30_000
    rows = [{**event(f"e{k}", "bot", "hit", DAY), "ts": ms(DAY) + k * 2000} for k in range(n)]
    write_events(lake, rows)
    (part,) = build_training_examples(spark, lake, [DAY], settings)
    assert part.rows == n
    table = lake.read(TRAINING_EXAMPLES, DAY, ["user_events_window", "item_events_window"])
    assert sorted(table["user_events_window"].to_pylist()) == list(range(n))
    assert math.isclose(np.mean(table["item_events_window"].to_numpy()), (n - 1) / 2)
