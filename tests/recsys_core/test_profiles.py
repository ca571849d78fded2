"""Planted faults in hours of clicks and in the catalogue: each is found by the claim that names it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from recsys_core.catalog import CATALOG_KEY, CATALOG_TABLE, read_catalog
from recsys_core.events import DAY_MS, HOUR_MS, hour_key, hour_keys, key_start_ms
from recsys_core.lake import Lake
from recsys_core.profiles import (
    CLICKS_PROFILE,
    Profiles,
    accept,
    judge,
    judge_catalogue,
    missing_hours,
    unsound_hours,
)
from recsys_core.quality import Report, catalogue_suite, sample_of, validate
from recsys_core.settings import QualitySettings
from recsys_core.simulate import Simulation, SimulationConfig
from recsys_core.tables import CLICKS_HOURLY

DAYS = 6
END = key_start_ms("2026-03-10")
LAST_DAY = hour_keys(END - DAY_MS, END)
SETTINGS = QualitySettings()


def write_hours(lake: Lake, events: pa.Table, hours: list[str]) -> None:
    """Partitions of `clicks_hourly` without Spark."""
    events = events.sort_by([("user_id", "ascending"), ("ts", "ascending")])
    of_hour = events["ts"].to_numpy() // HOUR_MS
    for hour in hours:
        lake.write(CLICKS_HOURLY, hour, events.filter(pa.array(of_hour == key_start_ms(hour) // HOUR_MS)))


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pa.Table, dict[str, Report]]:
    """Six days of a simulated shop, judged; the last is what faults are planted in."""
    root = tmp_path_factory.mktemp("history") / "lake"
    lake = Lake(str(root))
    made = Simulation(SimulationConfig(users=1500, items=400, days=DAYS, events=30_000, end=END))
    made.write_catalog(lake)
    events = pa.concat_tables([batch.events for batch in made.batches()])
    ids = events["event_id"].to_numpy(zero_copy_only=False)
    _, first = np.unique(ids, return_index=True)
    events = events.take(pa.array(np.sort(first)))
    hours = hour_keys(END - DAYS * DAY_MS, END)
    write_hours(lake, events, hours)
    reports = judge(Profiles(lake, SETTINGS), hours)
    judge_catalogue(lake, catalogue_rows(lake))
    return root, events, reports


def catalogue_rows(lake: Lake) -> Report:
    return validate(catalogue_suite(), sample_of(lake, CATALOG_TABLE, [CATALOG_KEY], 100_000))


@pytest.fixture
def planted(history: tuple[Path, pa.Table, dict[str, Report]], tmp_path: Path) -> Lake:
    shutil.copytree(history[0], tmp_path / "lake")
    return Lake(str(tmp_path / "lake"))


def of_last_day(events: pa.Table) -> pa.Table:
    return events.filter(pc.greater_equal(events["ts"], END - DAY_MS))


def failed(reports: dict[str, Report]) -> set[str]:
    return {claim for claim, report in reports.items() if not report.passed}


def column(events: pa.Table, name: str, values: object) -> pa.Table:
    at = events.schema.get_field_index(name)
    return events.set_column(
        at, events.schema.field(name), pa.chunked_array([pa.array(values, events.schema.field(name).type)])
    )


def renamed(events: pa.Table) -> pa.Table:
    return column(events, "event_id", [f"again-{e}" for e in events["event_id"].to_pylist()])


def twice(events: pa.Table) -> pa.Table:
    """The day was exported again: the same events with new ids."""
    day = of_last_day(events)
    return pa.concat_tables([day, renamed(day)])


def the_day_before_again(events: pa.Table) -> pa.Table:
    """The day before was sent as this one."""
    before = events.filter(pc.and_(pc.greater_equal(events["ts"], END - 2 * DAY_MS), pc.less(events["ts"], END - DAY_MS)))
    return renamed(column(before, "ts", before["ts"].to_numpy() + DAY_MS))


def a_tenth(events: pa.Table) -> pa.Table:
    return of_last_day(events).filter(pa.array(np.arange(of_last_day(events).num_rows) % 10 == 0))


def one_user(events: pa.Table) -> pa.Table:
    day = of_last_day(events)
    return column(day, "user_id", ["bot"] * day.num_rows)


def prices_times_100(events: pa.Table) -> pa.Table:
    day = of_last_day(events)
    return column(day, "value", pc.multiply(day["value"], 100.0).combine_chunks())


def another_time_zone(events: pa.Table) -> pa.Table:
    """Local times of UTC+5 were sent as UTC."""
    shifted = column(events, "ts", events["ts"].to_numpy() + 5 * HOUR_MS)
    return shifted.filter(pc.and_(pc.greater_equal(shifted["ts"], END - DAY_MS + 5 * HOUR_MS), pc.less(shifted["ts"], END)))


def without_a_category(events: pa.Table, lake: Lake, top: str = "sports") -> pa.Table:
    day, catalogue = of_last_day(events), read_catalog(lake)
    lost = catalogue["item_id"].filter(pc.starts_with(catalogue["category"], f"{top}/")).combine_chunks()
    return day.filter(pc.invert(pc.is_in(day["item_id"], value_set=lost)))


FAULTS: dict[str, tuple[Callable[..., pa.Table], str]] = {
    "duplicated day": (twice, "events_are_not_repeated"),
    "the day before again": (the_day_before_again, "events_are_not_repeated"),
    "events at 10 % of the usual volume": (a_tenth, "volume_is_as_usual"),
    "all one user": (one_user, "users_are_many"),
    "prices × 100": (prices_times_100, "prices_are_as_usual"),
    "timestamps in the wrong zone": (another_time_zone, "hours_lie_in_their_time_zone"),
    "a category lost": (without_a_category, "categories_are_all_there"),
}
NAMED = {"a category lost": "events of 'sports'"}
"""What the reason has to name where the claim looks at several things."""


def test_an_ordinary_history_gives_no_alarm(history: tuple[Path, pa.Table, dict[str, Report]]) -> None:
    reports = history[2]
    assert {claim: report.sample for claim, report in reports.items() if not report.passed} == {}
    judged = {claim for claim, report in reports.items() if report.rows}
    assert judged == set(reports)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named_and_the_window_may_not_be_learned_from(
    fault: str, planted: Lake, history: tuple[Path, pa.Table, dict[str, Report]]
) -> None:
    plant, claim = FAULTS[fault]
    bad = plant(history[1], planted) if plant is without_a_category else plant(history[1])
    write_hours(planted, bad, LAST_DAY)
    reports = judge(Profiles(planted, SETTINGS), LAST_DAY)
    assert claim in failed(reports), {name: report.sample for name, report in reports.items() if not report.passed}
    assert reports[claim].sample[0]["hour"] in LAST_DAY
    assert NAMED.get(fault, "") in reports[claim].reason
    assert reports[claim].reason
    unsound = unsound_hours(Profiles(planted, SETTINGS), hour_keys(END - DAYS * DAY_MS, END))
    assert unsound
    assert set(unsound) <= set(LAST_DAY)
    assert any(claim in reason for reason in unsound.values())


def categories_missed(lake: Lake, hours: list[str]) -> list[tuple[object, object]]:
    report = judge(Profiles(lake, SETTINGS), hours)["categories_are_all_there"]
    return [(row["hour"], row["what"]) for row in report.sample]


def test_a_category_that_one_busy_hour_lost_is_named(planted: Lake, history: tuple[Path, pa.Table, dict[str, Report]]) -> None:
    evening = f"{LAST_DAY[0][:10]}T21"
    write_hours(planted, without_a_category(history[1], planted, "media"), [evening])
    assert categories_missed(planted, LAST_DAY) == [(evening, "events of 'media'")]


def test_an_hour_whose_few_users_want_nothing_of_a_category_is_no_loss(
    planted: Lake, history: tuple[Path, pa.Table, dict[str, Report]]
) -> None:
    """Of 23 users seven would be usual, with forty events; that none comes happens once in some thousand such hours."""
    morning = f"{LAST_DAY[0][:10]}T08"
    write_hours(planted, without_a_category(history[1], planted, "media"), [morning])
    profiles = Profiles(planted, SETTINGS)
    profile, (past, _) = profiles.profile(morning), profiles.past(morning)
    assert profile is not None
    assert profile.users == 23
    assert profile.events * median(p.categories["media"] / p.events for p in past) > SETTINGS.min_category_events
    assert categories_missed(planted, LAST_DAY) == []


@pytest.mark.parametrize(("kept", "found"), [(5, False), (10, True)])
def test_an_hour_of_few_users_may_have_a_fifth_of_its_events_and_not_a_tenth(
    kept: int, found: bool, planted: Lake, history: tuple[Path, pa.Table, dict[str, Report]]
) -> None:
    evening = f"{LAST_DAY[0][:10]}T21"
    past, _ = Profiles(planted, SETTINGS).past(evening)
    day, usual = of_last_day(history[1]), int(median(p.events for p in past))
    assert usual < 1000
    rows = day.filter(pa.array(day["ts"].to_numpy() // HOUR_MS == key_start_ms(evening) // HOUR_MS))
    write_hours(planted, rows.slice(0, usual // kept), [evening])
    report = judge(Profiles(planted, SETTINGS), [evening])["volume_is_as_usual"]
    assert [row["hour"] for row in report.sample] == [evening] * found


def test_a_burst_does_not_make_a_rare_category_one_that_is_missed(
    lake: Lake, history: tuple[Path, pa.Table, dict[str, Report]]
) -> None:
    """The only item of a category goes viral for three hours, on one of the two days that there are to compare with."""
    catalogue = read_catalog(Lake(str(history[0])))
    viral, *others = catalogue["item_id"].to_pylist()
    paths = ["gifts/cards", *catalogue["category"].to_pylist()[1:]]
    lake.write(CATALOG_TABLE, CATALOG_KEY, column(catalogue, "category", paths))
    first = END - DAYS * DAY_MS
    events = history[1].filter(
        pc.and_(pc.less(history[1]["ts"], first + 3 * DAY_MS), pc.is_in(history[1]["item_id"], value_set=pa.array(others)))
    )
    hour = (events["ts"].to_numpy() - first) // HOUR_MS
    burst = np.isin(hour, 24 + np.arange(18, 21)) & (np.arange(events.num_rows) % 3 == 0)
    items = np.where(burst, viral, events["item_id"].to_numpy(zero_copy_only=False))
    hours = hour_keys(first, first + 3 * DAY_MS)
    write_hours(lake, column(events, "item_id", items), hours)
    evening = Profiles(lake, SETTINGS).profile(hours[24 + 19])
    assert evening is not None
    assert evening.categories["gifts"] > 2 * SETTINGS.min_category_events
    assert categories_missed(lake, hours) == []


def test_mended_data_is_sound_again(planted: Lake, history: tuple[Path, pa.Table, dict[str, Report]]) -> None:
    write_hours(planted, a_tenth(history[1]), LAST_DAY)
    assert unsound_hours(Profiles(planted, SETTINGS), LAST_DAY)
    write_hours(planted, of_last_day(history[1]), LAST_DAY)
    assert unsound_hours(Profiles(planted, SETTINGS), LAST_DAY) == {}


def test_what_a_person_accepted_is_sound_until_it_changes(
    planted: Lake, history: tuple[Path, pa.Table, dict[str, Report]]
) -> None:
    write_hours(planted, a_tenth(history[1]), LAST_DAY)
    profiles = Profiles(planted, SETTINGS)
    bad = unsound_hours(profiles, LAST_DAY)
    assert accept(profiles, bad) == sorted(bad)
    assert unsound_hours(Profiles(planted, SETTINGS), LAST_DAY) == {}
    assert accept(Profiles(planted, SETTINGS), bad) == []
    write_hours(planted, one_user(history[1]), LAST_DAY)
    assert unsound_hours(Profiles(planted, SETTINGS), LAST_DAY)


def test_unsound_hours_are_no_past_to_compare_with(planted: Lake, history: tuple[Path, pa.Table, dict[str, Report]]) -> None:
    write_hours(planted, a_tenth(history[1]), LAST_DAY)
    unsound_hours(Profiles(planted, SETTINGS), LAST_DAY)
    next_noon = hour_key(END + 12 * HOUR_MS)
    past, _ = Profiles(planted, SETTINGS).past(next_noon)
    assert past
    assert f"{LAST_DAY[0][:10]}T12" not in {profile.hour for profile in past}


def test_a_first_day_without_a_past_is_sound(lake: Lake, history: tuple[Path, pa.Table, dict[str, Report]]) -> None:
    write_hours(lake, of_last_day(history[1]), LAST_DAY)
    assert unsound_hours(Profiles(lake, SETTINGS), LAST_DAY) == {}


def test_even_traffic_of_a_newcomers_first_days_is_sound(lake: Lake) -> None:
    random = np.random.default_rng(5)
    hours = hour_keys(END - 4 * DAY_MS, END)
    for hour in hours:
        events = int(random.poisson(94))
        rows = {
            "event_id": [f"{hour}-{n}" for n in range(events)],
            "user_id": [f"u{n}" for n in random.integers(0, 2000, events)],
            "item_id": [f"i{n}" for n in random.integers(0, 300, events)],
            "event_type": ["view"] * events,
            "ts": key_start_ms(hour) + random.integers(0, HOUR_MS, events),
        }
        lake.write(CLICKS_HOURLY, hour, pa.table(rows))
    assert unsound_hours(Profiles(lake, SETTINGS), hours) == {}


def test_an_event_id_that_occurs_twice_and_a_time_of_another_hour_are_found(lake: Lake) -> None:
    rows = pa.table(
        {
            "event_id": ["a", "a", "b"],
            "user_id": ["u", "u", "v"],
            "item_id": ["i", "j", "i"],
            "event_type": ["view"] * 3,
            "ts": [key_start_ms("2026-03-02T10"), key_start_ms("2026-03-02T10") + 1, key_start_ms("2026-03-02T12")],
        }
    )
    lake.write(CLICKS_HOURLY, "2026-03-02T10", rows)
    reports = judge(Profiles(lake, SETTINGS), ["2026-03-02T10"])
    assert failed(reports) == {"event_ids_are_unique", "events_lie_in_their_hour"}


def test_hours_that_were_never_made_are_missing_only_after_the_first(lake: Lake) -> None:
    rows = pa.table({"event_id": ["a"], "user_id": ["u"], "item_id": ["i"], "event_type": ["view"], "ts": [0]})
    hours = hour_keys(0, 6 * HOUR_MS)
    for hour in (hours[1], hours[3]):
        lake.write(CLICKS_HOURLY, hour, rows)
    assert missing_hours(Profiles(lake, SETTINGS), hours) == [hours[2], hours[4], hours[5]]
    assert missing_hours(Profiles(lake, SETTINGS), hours[4:]) == []


def test_judging_again_reads_the_small_profiles_and_no_clicks(planted: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("clicks were read")

    monkeypatch.setattr("recsys_core.profiles._sample_of_users", refuse)
    assert all(report.passed for report in judge(Profiles(planted, SETTINGS), LAST_DAY).values())


def test_a_large_hour_is_judged_by_a_bounded_sample_of_its_users(
    planted: Lake, history: tuple[Path, pa.Table, dict[str, Report]]
) -> None:
    few = SETTINGS.model_copy(update={"sample_rows": 200, "min_events": 50})
    noon = f"{LAST_DAY[0][:10]}T18"
    planted.fs.rm(planted.path(CLICKS_PROFILE), recursive=True)
    write_hours(planted, twice(history[1]), [noon])
    reports = judge(Profiles(planted, few), [noon])
    kept = Profiles(planted, few).verdict(noon)
    assert kept is not None
    assert kept.profile.looked_at < 600 < kept.profile.events
    assert "events_are_not_repeated" in failed(reports)


@pytest.mark.parametrize("user", ["bot", *(f"bot {n}" for n in range(5))])
def test_one_user_who_makes_most_of_a_large_hour_is_found_whether_or_not_the_sample_has_them(lake: Lake, user: str) -> None:
    few = SETTINGS.model_copy(update={"sample_rows": 100})
    start = key_start_ms("2026-03-06T09")
    users = [f"u{n % 150}" for n in range(300)] + [user] * 1200
    rows = {
        "event_id": [f"e{n}" for n in range(len(users))],
        "user_id": users,
        "item_id": [f"i{n % 40}" for n in range(len(users))],
        "event_type": ["view"] * len(users),
        "ts": [start + n * 1000 for n in range(len(users))],
    }
    lake.write(CLICKS_HOURLY, "2026-03-06T09", pa.table(rows))
    assert failed(judge(Profiles(lake, few), ["2026-03-06T09"])) >= {"users_are_many"}
    lake.write(CLICKS_HOURLY, "2026-03-06T09", pa.table({**rows, "user_id": [user] * len(users)}))
    assert failed(judge(Profiles(lake, few), ["2026-03-06T09"])) >= {"users_are_many"}


# -- the catalogue ----------------------------------------------------------------------------------------------


def catalogue_reports(lake: Lake) -> dict[str, Report]:
    rows = catalogue_rows(lake)
    return {rows.claim: rows, **judge_catalogue(lake, rows)}


def replace(lake: Lake, name: str, values: object) -> None:
    lake.write(CATALOG_TABLE, CATALOG_KEY, column(read_catalog(lake), name, values))


def test_catalogue_prices_times_100_are_found_until_they_are_mended(planted: Lake) -> None:
    good = read_catalog(planted)
    replace(planted, "price", pc.multiply(good["price"], 100.0).combine_chunks())
    for _ in range(2):
        assert failed(catalogue_reports(planted)) == {"catalogue_prices_are_as_usual"}
    planted.write(CATALOG_TABLE, CATALOG_KEY, good)
    assert failed(catalogue_reports(planted)) == set()


def test_a_category_and_half_of_the_items_lost_are_found(planted: Lake) -> None:
    good = read_catalog(planted)
    kept = good.filter(pc.invert(pc.starts_with(good["category"], "sports/")))
    planted.write(CATALOG_TABLE, CATALOG_KEY, kept)
    assert failed(catalogue_reports(planted)) == {"catalogue_categories_are_all_there"}
    planted.write(CATALOG_TABLE, CATALOG_KEY, good.slice(0, good.num_rows // 2))
    assert "catalogue_size_is_as_usual" in failed(catalogue_reports(planted))


def test_rows_that_are_no_items_are_found(planted: Lake) -> None:
    prices = read_catalog(planted)["price"].to_pylist()
    replace(planted, "price", [-1.0, *prices[1:]])
    reports = catalogue_reports(planted)
    assert failed(reports) == {"catalogue_rows_are_items"}
    assert reports["catalogue_rows_are_items"].sample[0]["price"] == -1.0


def test_a_catalogue_that_a_person_accepted_is_the_new_normal(planted: Lake) -> None:
    good = read_catalog(planted)
    replace(planted, "price", pc.multiply(good["price"], 100.0).combine_chunks())
    judge_catalogue(planted, catalogue_rows(planted), accepted=True)
    assert failed(catalogue_reports(planted)) == set()
