import itertools
import math

import pyarrow as pa
import pytest
from builders import event, event_table, land, ms, write_clicks

from recsys_core.events import HOUR_MS, hour_keys, invalid_reasons
from recsys_core.landing import Landing
from recsys_core.ledger import Ledger
from recsys_core.settings import EventSettings, InteractionSettings
from recsys_core.tables import (
    ACTIVE_USERS,
    CLICKS_HOURLY,
    CLICKS_QUARANTINE,
    INTERACTIONS,
    ONLINE_FEATURES,
    build_active_users,
    build_clicks_hourly,
    build_interactions,
    build_online_features,
)

EVENTS = EventSettings(lookback_hours=3)
DAY = "2026-03-02"


def hours(first: str, last: str) -> list[str]:
    return hour_keys(ms(first), ms(last) + HOUR_MS)


@pytest.fixture
def build(spark, lake):
    """Make some hours of `clicks_hourly` from the landing zone; gives the data version of each."""
    landing = Landing(lake)

    def run(keys: list[str], settings: EventSettings = EVENTS) -> dict[str, str]:
        return {p.key: p.data_version for p in build_clicks_hourly(spark, lake, landing, keys, settings)}

    return run


def rows_of(lake, table: str, keys: list[str]) -> list[dict]:
    dataset = lake.dataset(table, keys)
    return [] if dataset is None else dataset.to_table().to_pylist()


def sessions_of(lake, keys: list[str]) -> list[list[str]]:
    """Event ids by session, in the order of their times."""
    found: dict[str, list[str]] = {}
    for row in sorted(rows_of(lake, CLICKS_HOURLY, keys), key=lambda r: (r["ts"], r["event_id"])):
        found.setdefault(row["session_id"], []).append(row["event_id"])
    return list(found.values())


def test_an_hour_holds_its_events_by_user_and_time_with_all_their_fields(lake, build):
    more = {"session_id": "s9", "device": "tv", "country": "SE", "value": 2.5, "recommendation_id": "r1"}
    land(lake, event("c", "v", "i", f"{DAY}T10:59:59.999"), event("b", "u", "j", f"{DAY}T10:30"), name="1")
    land(lake, event("a", "u", "i", f"{DAY}T10:00", "cart", **more), event("d", "u", "i", f"{DAY}T11:00"), name="2")
    build(hours(f"{DAY}T10", f"{DAY}T10"))
    rows = rows_of(lake, CLICKS_HOURLY, [f"{DAY}T10"])
    assert [row["event_id"] for row in rows] == ["a", "b", "c"]
    assert lake.get(CLICKS_HOURLY, f"{DAY}T10").rows == 3
    assert {**rows[0], "session_id": "?"} == {
        "event_id": "a",
        "user_id": "u",
        "item_id": "i",
        "event_type": "cart",
        "ts": ms(f"{DAY}T10:00"),
        "session_id": "?",
        "source_session_id": "s9",
        "device": "tv",
        "country": "SE",
        "value": 2.5,
        "recommendation_id": "r1",
    }
    assert rows[1]["source_session_id"] is None


def test_an_event_that_arrived_twice_counts_once_as_its_earliest(lake, build):
    twice = event("a", "u", "i", f"{DAY}T10:20")
    land(lake, twice, event("b", "u", "j", f"{DAY}T10:40"), event("b", "u", "k", f"{DAY}T10:30"), name="1")
    land(lake, twice, twice, name="2")
    build(hours(f"{DAY}T10", f"{DAY}T10"))
    found = [(row["event_id"], row["item_id"]) for row in rows_of(lake, CLICKS_HOURLY, [f"{DAY}T10"])]
    assert found == [("a", "i"), ("b", "k")]


@pytest.mark.parametrize("step", [1, 2])
def test_a_duplicate_in_a_later_hour_is_left_out_however_the_hours_are_made(lake, build, step):
    keys = hours(f"{DAY}T10", f"{DAY}T11")
    land(lake, event("a", "u", "i", f"{DAY}T10:59"), event("a", "u", "i", f"{DAY}T11:01"), event("b", "u", "i", f"{DAY}T11:02"))
    for at in range(0, 2, step):
        build(keys[at : at + step])
    assert [row["event_id"] for row in rows_of(lake, CLICKS_HOURLY, keys)] == ["a", "b"]
    assert lake.get(CLICKS_HOURLY, f"{DAY}T11").rows == 1


def test_thirty_minutes_without_an_event_end_a_session_and_one_millisecond_less_does_not(lake, build):
    land(
        lake,
        event("a", "u", "i", f"{DAY}T10:00"),
        event("b", "u", "i", f"{DAY}T10:30"),
        event("c", "u", "i", f"{DAY}T11:00:00.001"),
        event("other", "v", "i", f"{DAY}T10:15"),
    )
    keys = hours(f"{DAY}T10", f"{DAY}T11")
    build(keys)
    assert sessions_of(lake, keys) == [["a", "b"], ["other"], ["c"]]


@pytest.mark.parametrize("together", [True, False])
def test_a_session_goes_on_over_the_hour_and_over_midnight(lake, build, together):
    land(
        lake,
        event("a", "u", "i", "2026-03-01T22:50"),
        event("b", "u", "i", "2026-03-01T23:10"),
        event("c", "u", "i", "2026-03-01T23:40"),
        event("d", "u", "i", "2026-03-02T00:05"),
        event("e", "u", "i", "2026-03-02T00:36"),
    )
    keys = hours("2026-03-01T22", "2026-03-02T00")
    for part in [keys] if together else [[key] for key in keys]:
        build(part)
    assert sessions_of(lake, keys) == [["a", "b", "c", "d"], ["e"]]


def test_an_hour_is_the_same_whether_made_alone_in_a_range_in_any_order_or_again(lake, build):
    """Over sessions and duplicates that are nearer and farther than the lookback, equal times and bad rows."""
    nearby = EventSettings(lookback_hours=1)
    moments = [(f"{DAY}T{h:02}:{m:02}", h * 60 + m) for h in range(2, 6) for m in range(5, 60, 10)]
    always = [event(f"always-{n}", "always", f"i{n % 3}", moment) for moment, n in moments]
    early = [event(f"early-{n}", "early", "i1", moment) for moment, n in moments if n < 260]
    again = [event(f"always-{n - 20}", "always", f"i{n % 3}", moment) for moment, n in moments if n > 150 and n % 50 == 25]
    far = [event("far", "far", "i1", f"{DAY}T{h:02}:30") for h in (2, 3, 5)]
    same = [event("same", "same", "i1", f"{DAY}T04:00", device=device) for device in ("tv", None, "phone")]
    land(lake, *always, *far, *same, name="1")
    land(lake, *early, *again, event("bad", None, "i", f"{DAY}T05:00"), name="2")
    keys = hours(f"{DAY}T02", f"{DAY}T05")
    together = build(keys, nearby)
    assert len(set(together.values())) == 4
    rows = rows_of(lake, CLICKS_HOURLY, keys)
    assert [row["ts"] for row in rows if row["event_id"] == "far"] == [ms(f"{DAY}T02:30"), ms(f"{DAY}T05:30")]
    lengths = [len(found) for found in sessions_of(lake, keys) if found[0].startswith("always")]
    assert lengths == [12, 6, 6]
    assert build(keys, nearby) == together
    assert rows_of(lake, CLICKS_HOURLY, keys) == rows
    alone = {}
    for key in (keys[3], keys[0], keys[2]):
        alone |= build([key], nearby)
    assert alone | build([keys[3], keys[1]], nearby) == together
    assert rows_of(lake, CLICKS_HOURLY, keys) == rows


def test_late_events_are_in_their_hour_after_it_is_made_again(lake, build):
    keys = hours(f"{DAY}T10", f"{DAY}T11")
    land(lake, event("a", "u", "i", f"{DAY}T10:00"), event("c", "u", "i", f"{DAY}T11:00"), name="on-time")
    before = build(keys)
    assert sessions_of(lake, keys) == [["a"], ["c"]]
    land(lake, event("b", "u", "i", f"{DAY}T10:30"), name="late")
    after = build(keys)
    assert sessions_of(lake, keys) == [["a", "b", "c"]]
    assert all(before[key] != after[key] for key in keys)


def test_an_hour_without_events_is_empty_and_one_whose_events_went_is_emptied(lake, build):
    path = land(lake, event("a", "u", "i", f"{DAY}T10:00"))
    keys = hours(f"{DAY}T09", f"{DAY}T11")
    build(keys)
    assert [lake.get(CLICKS_HOURLY, key).rows for key in keys] == [0, 1, 0]
    assert lake.dataset(CLICKS_HOURLY, [keys[0], keys[2]]) is None
    land(lake, event("z", "u", "i", "2026-07-01T10:00"), event("y", "u", "i", "2026-03-01T10:00"), name="wide")
    gap = hours("2026-06-01T00", "2026-06-01T01")
    assert build(gap) == dict.fromkeys(gap, "empty")
    far = hours("2026-08-01T00", "2026-08-01T01")
    assert build(far) == dict.fromkeys(far, "empty")
    lake.fs.rm(path)
    build(keys)
    assert [lake.get(CLICKS_HOURLY, key).rows for key in keys] == [0, 0, 0]


LONG = "é" * 129
CHANGES = [
    {},
    *({name: bad} for name in ("user_id", "item_id", "event_id") for bad in (None, "", LONG, "é" * 128)),
    *({name: bad} for name in ("session_id", "device", "country", "recommendation_id") for bad in ("", LONG)),
    *({name: "nul\0"} for name in ("user_id", "item_id", "event_id", "country", "event_type")),
    *({"event_type": bad} for bad in (None, "", "View", "purchase")),
    {"user_id": LONG, "item_id": ""},
    {"user_id": "", "item_id": None, "event_id": None, "event_type": "?"},
    {"item_id": LONG, "event_id": ""},
    {"country": LONG, "device": LONG, "event_type": "?"},
    *({"value": bad} for bad in (math.nan, math.inf, -math.inf, -0.0, 1.7e308)),
    {"value": math.nan, "event_type": "?"},
]


def test_spark_and_arrow_judge_every_row_alike(lake, build):
    rows = []
    for number, (change, moment) in enumerate(itertools.product(CHANGES, (f"{DAY}T10:00", "1989-12-31T23:00"))):
        made = event(f"e{number}", "u", "i", moment) | change
        rows.append(made | {"ts": made["ts"] + number})
    reasons = invalid_reasons(event_table(*rows), EVENTS).to_pylist()
    assert len(set(reasons)) == 18
    land(lake, *rows)
    keys = [f"{DAY}T10", "1989-12-31T23"]
    for key in keys:
        build([key])
    judged = {row["ts"]: row["reason"] for row in rows_of(lake, CLICKS_QUARANTINE, lake.keys(CLICKS_QUARANTINE))}
    judged |= {row["ts"]: None for row in rows_of(lake, CLICKS_HOURLY, keys)}
    assert [judged[row["ts"]] for row in rows] == reasons


def test_bad_rows_are_kept_in_the_quarantine_of_their_hour_and_touch_nothing_else(lake, build):
    land(
        lake,
        event("a", "u", "i", f"{DAY}T10:00"),
        event("b", "u", None, f"{DAY}T10:10", device="tv"),
        event("a", "u", "i", f"{DAY}T09:50", "teleport"),
        event("c", "u", "i", f"{DAY}T11:00"),
    )
    keys = hours(f"{DAY}T09", f"{DAY}T11")
    build(keys)
    assert lake.keys(CLICKS_QUARANTINE) == keys[:2]
    (bad,) = rows_of(lake, CLICKS_QUARANTINE, [keys[1]])
    assert (bad["event_id"], bad["item_id"], bad["device"], bad["reason"]) == ("b", None, "tv", "missing item_id")
    assert [row["reason"] for row in rows_of(lake, CLICKS_QUARANTINE, [keys[0]])] == ["unknown event_type"]
    assert [row["event_id"] for row in rows_of(lake, CLICKS_HOURLY, keys)] == ["a", "c"]


def test_the_quarantine_is_emptied_when_its_rows_are_accepted_after_all(lake, build):
    land(lake, event("a", "u", "i", f"{DAY}T10:00", "teleport"))
    build([f"{DAY}T10"])
    assert lake.get(CLICKS_QUARANTINE, f"{DAY}T10").rows == 1
    build([f"{DAY}T10"], EventSettings(weights={"teleport": 1.0}))
    assert lake.get(CLICKS_QUARANTINE, f"{DAY}T10").rows == 0
    assert lake.get(CLICKS_HOURLY, f"{DAY}T10").rows == 1


def jobs_of(spark, work) -> int:
    """How many Spark jobs some work runs."""
    scheduler = spark.sparkContext._jsc.sc().dagScheduler()
    before = scheduler.numTotalJobs()
    work()
    return scheduler.numTotalJobs() - before


def test_a_longer_range_takes_no_more_spark_jobs(spark, lake, build):
    land(lake, *(event(f"e{h}", "u", f"i{h % 3}", f"{DAY}T{h:02}:30") for h in range(24)))
    short = jobs_of(spark, lambda: build(hours(f"{DAY}T00", f"{DAY}T01")))
    assert jobs_of(spark, lambda: build(hours(f"{DAY}T00", f"{DAY}T23"))) <= short
    days = [f"2026-03-{d:02}" for d in range(2, 9)]
    short = jobs_of(spark, lambda: interactions(spark, lake, days[:2]))
    assert jobs_of(spark, lambda: interactions(spark, lake, days)) <= short


def interactions(spark, lake, days: list[str], window: int = 90, half_life: float = 30.0) -> dict[str, str]:
    settings = InteractionSettings(window_days=window, half_life_days=half_life)
    return {p.key: p.data_version for p in build_interactions(spark, lake, days, EventSettings(), settings)}


def test_a_pair_weighs_its_events_by_type_and_by_age_at_the_end_of_the_day(spark, lake):
    write_clicks(lake, [("u", "i", "2026-03-01T00"), ("u", "j", "2026-03-02T12")])
    write_clicks(lake, [("u", "i", "2026-03-02T00"), ("v", "i", "2026-02-27T00")], kind="purchase")
    interactions(spark, lake, [DAY], window=90, half_life=1.0)
    rows = rows_of(lake, INTERACTIONS, [DAY])
    assert [(r["user_id"], r["item_id"], r["n_events"]) for r in rows] == [("u", "i", 2), ("u", "j", 1), ("v", "i", 1)]
    assert [r["weight"] for r in rows] == pytest.approx([1 / 4 + 8 / 2, 2**-0.5, 8 / 16], abs=1e-6)
    assert (rows[0]["first_ts"], rows[0]["last_ts"]) == (ms("2026-03-01T00"), ms("2026-03-02T00"))
    assert lake.dataset(INTERACTIONS, [DAY]).schema.field("weight").type == pa.float32()


def test_the_window_ends_with_the_day_and_begins_so_many_days_before(spark, lake):
    moments = ["2026-02-28T23:59:59.999", "2026-03-01T00:00", "2026-03-02T23:59:59.999", "2026-03-03T00:00"]
    write_clicks(lake, [("u", moment, moment) for moment in moments])
    interactions(spark, lake, [DAY], window=2)
    assert [row["item_id"] for row in rows_of(lake, INTERACTIONS, [DAY])] == moments[1:3]


def test_several_days_at_once_are_the_same_as_day_by_day(spark, lake):
    write_clicks(lake, [(f"u{n % 5}", f"i{n % 7}", f"2026-03-{1 + n % 4:02}T{n % 24:02}:00") for n in range(24)])
    days = ["2026-03-01", "2026-03-02", "2026-03-04"]
    together = interactions(spark, lake, days, window=2)
    assert len(set(together.values())) == 3
    alone = {}
    for day in reversed(days):
        alone |= interactions(spark, lake, [day], window=2)
    assert alone == together
    assert all(len({(r["user_id"], r["item_id"]) for r in rows_of(lake, INTERACTIONS, [d])}) > 5 for d in days)


def test_a_day_whose_window_has_no_events_is_empty(spark, lake):
    write_clicks(lake, [("u", "i", "2026-03-01T00:00")])
    assert interactions(spark, lake, ["2026-06-01", "2026-03-01"], window=7)["2026-06-01"] == "empty"
    assert interactions(spark, lake, ["2027-01-01"]) == {"2027-01-01": "empty"}
    assert lake.get(INTERACTIONS, "2026-03-01").rows == 1


def test_online_features_are_those_of_the_day_and_the_factor_of_each_user(spark, lake):
    action = {"item_id": "i", "event_type": "view", "ts": 7}
    users = [
        {"user_id": user, "history": ["i"], "last": [action], "last_ts": 7, "seen": ["i"], "features": '{"at":9}'}
        for user in ("u", "stranger")
    ]
    lake.write("user_features", DAY, pa.Table.from_pylist(users))
    factor = pa.array([[0.5, -1.0]], pa.list_(pa.float32(), 2))
    lake.write("factors_users", DAY, pa.table({"id": ["u"], "n": pa.array([5], pa.int32()), "factor": factor}))
    made = build_online_features(spark, lake, DAY, "factors_users")
    assert made.rows == 2
    stranger, known = rows_of(lake, ONLINE_FEATURES, [DAY])
    assert known == {
        "user_id": "u",
        "last": [action],
        "last_ts": 7,
        "seen": ["i"],
        "features": '{"at":9}',
        "factor": [0.5, -1.0],
    }
    assert stranger == {**known, "user_id": "stranger", "factor": None}
    assert build_online_features(spark, lake, DAY, "factors_users").data_version == made.data_version


def test_active_users_had_an_event_in_the_hours_up_to_the_end_of_the_hour(spark, lake):
    times = {"early": "07:59", "first": "08:00", "twice": "09:00", "last": "10:59", "next": "11:00"}
    write_clicks(lake, [(user, "i", f"{DAY}T{time}") for user, time in times.items()])
    write_clicks(lake, [("twice", "i", f"{DAY}T09:00"), ("twice", "j", f"{DAY}T09:30")])
    assert build_active_users(spark, lake, f"{DAY}T10", active_hours=3).rows == 3
    assert [row["user_id"] for row in rows_of(lake, ACTIVE_USERS, [f"{DAY}T10"])] == ["first", "last", "twice"]
    assert build_active_users(spark, lake, "2027-01-01T00", active_hours=3).rows == 0


def test_a_file_whose_pages_are_damaged_is_left_out_of_the_hour_and_named(lake, build):
    """Its footer is whole, so that only reading its rows shows it."""
    land(lake, event("good", "u", "i", f"{DAY}T10:30"), name="good")
    path = land(lake, *(event(f"e{n}", f"u{n}", f"i{n}", f"{DAY}T10:{n:02}") for n in range(60)), name="bad")
    content = bytearray(lake.fs.cat_file(path))
    for at in range(4, 600):
        content[at] ^= 0xFF
    lake.fs.pipe_file(path, bytes(content))
    build([f"{DAY}T10"])
    assert [row["event_id"] for row in rows_of(lake, CLICKS_HOURLY, [f"{DAY}T10"])] == ["good"]
    assert lake.get(CLICKS_HOURLY, f"{DAY}T10").extra["without"] == [lake.below(path)]
    assert list(Landing(lake).unreadable()) == [path]


def test_an_hour_whose_files_are_joined_while_it_is_made_is_made_from_what_took_their_place(lake, build, monkeypatch):
    small = [land(lake, event(name, "u", "i", f"{DAY}T10:30"), name=name) for name in ("a", "b")]
    own, joins = Ledger.read, iter([True])

    def read(self):
        listing = own(self)
        if next(joins, False):
            land(lake, event("a", "u", "i", f"{DAY}T10:30"), event("b", "u", "i", f"{DAY}T10:30"), name="joined")
            Ledger(lake).commit(removed=small)
            for path in small:
                lake.fs.rm_file(path)
        return listing

    monkeypatch.setattr(Ledger, "read", read)
    build([f"{DAY}T10"])
    assert sorted(row["event_id"] for row in rows_of(lake, CLICKS_HOURLY, [f"{DAY}T10"])) == ["a", "b"]
    assert Landing(lake).noted() == []


def test_an_hour_knows_which_files_it_was_made_from(lake, build):
    land(lake, event("a", "u", "i", f"{DAY}T10:30"), name="a")
    build(hours(f"{DAY}T10", f"{DAY}T11"))
    for hour in (10, 11):
        assert lake.get(CLICKS_HOURLY, f"{DAY}T{hour}").extra == {"looked": 1, "without": []}
    land(lake, event("b", "u", "i", f"{DAY}T10:31"), name="b")
    assert Landing(lake).news(1) == {f"{DAY}T10": 2}
