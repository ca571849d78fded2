"""How often clean traffic is called unsound, and that faults are found in the same traffic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
from traffic import KINDS, START, HeldProfiles, Traffic, flat, history, judged, shifted, times

from recsys_core.events import DAY_MS, HOUR_MS, hour_key
from recsys_core.profiles import Measure, Profile
from recsys_core.settings import QualitySettings

SETTINGS = QualitySettings()
THIRD_DAY = hour_key(START + 2 * DAY_MS)


def alarms(traffic: Traffic, days: int, seed: int) -> list[str]:
    _, bad = judged(history(traffic, 24 * days, seed), SETTINGS)
    return [
        f"{hour} {claim}: {measures[0]}"
        for hour, found in bad.items()
        if hour >= THIRD_DAY
        for claim, measures in found.items()
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_clean_traffic_gives_less_than_one_alarm_in_a_thousand_hours(kind: str) -> None:
    """The first days, which are compared with days; those after three weeks are in the tests of power."""
    spans = [(6, 1)] if kind.startswith("10,000") else [(9, 3), (8, 4)]
    found = [alarm for days, seed in spans for alarm in alarms(KINDS[kind], days, seed)]
    assert len(found) <= sum(days - 2 for days, _ in spans) * 24 / 1000, found


@pytest.mark.parametrize("events", [30, 100, 1000])
def test_even_traffic_gives_no_alarm_on_its_first_days(events: int) -> None:
    """The nights of a newcomer: three and four days of history, many times."""
    found = [alarm for seed in range(8) for alarm in alarms(Traffic(lambda: flat(events), users=20 * events), 5, seed)]
    assert found == []


# -- power --------------------------------------------------------------------------------------------------------

PAST_DAYS = 22
"""Three weeks, so that the same hours of past weeks are known, and a Monday."""
Fault = Callable[[Profile], Profile]


@cache
def past_and_next_day(kind: str) -> tuple[HeldProfiles, tuple[Profile, ...]]:
    """A clean history that was judged, and the clean hours of its next day."""
    made = history(KINDS[kind], 24 * (PAST_DAYS + 1), 11)
    held, bad = judged(made[: 24 * PAST_DAYS], SETTINGS)
    assert bad == {}
    return held, tuple(made[24 * PAST_DAYS :])


def found_in(kind: str, day: list[Profile]) -> dict[str, list[Measure]]:
    """What is found in a day after a clean history, by claim."""
    held, clean = past_and_next_day(kind)
    found: dict[str, list[Measure]] = {}
    try:
        for profile in day:
            held.replace(profile)
            for claim, measures in held.judge_hour(profile.hour).items():
                found[claim] = [*found.get(claim, []), *measures]
    finally:
        for profile in clean:
            held.forget_hour(profile.hour)
    return found


def of_one_user(profile: Profile) -> Profile:
    return replace(profile, users=1, top_user=profile.looked_at, category_users=dict.fromkeys(profile.categories, 1))


def without_purchases(profile: Profile) -> Profile:
    kept = [{n: c for n, c in of.items() if n != "purchase"} for of in (profile.types, profile.type_users)]
    return replace(profile, types=kept[0], type_users=kept[1])


def all_purchases(profile: Profile) -> Profile:
    return replace(profile, types={"purchase": profile.looked_at}, type_users={"purchase": profile.users})


def without_sports(profile: Profile) -> Profile:
    kept = [{n: c for n, c in of.items() if n != "sports"} for of in (profile.categories, profile.category_users)]
    return replace(profile, categories=kept[0], category_users=kept[1])


FAULTS: dict[str, tuple[Fault, str]] = {
    "ten times the prices": (lambda p: replace(p, price=p.price * 10), "prices_are_as_usual"),
    "a tenth of the prices": (lambda p: replace(p, price=p.price / 10), "prices_are_as_usual"),
    "half of the traffic": (lambda p: times(p, 0.5), "volume_is_as_usual"),
    "twice the traffic": (lambda p: times(p, 2.0), "volume_is_as_usual"),
    "a tenth of the traffic": (lambda p: times(p, 0.1), "volume_is_as_usual"),
    "no event at all": (lambda p: Profile(p.hour, "gone", 0), "volume_is_as_usual"),
    "all of one user": (of_one_user, "users_are_many"),
    "a tenth of the users with all the events": (lambda p: replace(p, users=p.users // 10), "users_are_many"),
    "no purchases": (without_purchases, "event_types_are_as_usual"),
    "nothing but purchases": (all_purchases, "event_types_are_as_usual"),
    "a category lost": (without_sports, "categories_are_all_there"),
    "one event id twice": (lambda p: replace(p, repeated_ids=1), "event_ids_are_unique"),
    "one time of another hour": (lambda p: replace(p, outside=1), "events_lie_in_their_hour"),
    "a third of the events twice": (lambda p: replace(p, repeated=p.looked_at // 3), "events_are_not_repeated"),
    "a third of the events of the day before": (lambda p: replace(p, copied=p.looked_at // 3), "events_are_not_repeated"),
    "one value that is no number": (lambda p: replace(p, unreadable=1), "prices_are_as_usual"),
    "no values at all": (lambda p: replace(p, priced=0, price=0.0), "prices_are_as_usual"),
    "a price that is NaN": (lambda p: replace(p, price=float("nan")), "prices_are_as_usual"),
}
STEADY = ("1,000 events an hour, flat", "strong day curve", "weekends")
WILD = ("growing shop", "bursty shop", "news")
WHOLE_DAY = {"no purchases", "nothing but purchases", "no values at all"}
HARD_TO_TELL = {"half of the traffic", "twice the traffic"}
"""In traffic that doubles by itself within hours."""


@pytest.mark.parametrize(
    ("kind", "fault"),
    [(kind, fault) for kind in (*STEADY, *WILD) for fault in FAULTS if kind in STEADY or fault not in HARD_TO_TELL],
)
def test_a_fault_is_found_by_its_claim_within_the_day(kind: str, fault: str) -> None:
    plant, claim = FAULTS[fault]
    _, clean = past_and_next_day(kind)
    assert claim in found_in(kind, [plant(profile) for profile in (clean if fault in WHOLE_DAY else clean[::4])])


@pytest.mark.parametrize("kind", [*STEADY, *WILD])
def test_the_same_day_without_a_fault_is_sound(kind: str) -> None:
    assert found_in(kind, list(past_and_next_day(kind)[1])) == {}


def test_one_user_who_bookmarks_a_hundred_items_is_no_fault() -> None:
    """On a quiet day that is most of the events."""
    _, clean = past_and_next_day("strong day curve")
    few = [times(profile, 0.3) for profile in clean]
    bookmarks = [replace(p, types={**p.types, "purchase": p.looked_at // 2}) for p in few]
    assert "event_types_are_as_usual" not in found_in("strong day curve", bookmarks)


@pytest.mark.parametrize("hours", [-8, -5, 5, 6, 10])
@pytest.mark.parametrize("kind", ["strong day curve", "weak day curve", "weekends", "growing shop"])
def test_a_day_in_another_time_zone_is_found(kind: str, hours: int) -> None:
    made = history(KINDS[kind], 24 * (PAST_DAYS + 2), 11)
    moved = {profile.hour: profile for profile in shifted(made, hours)}
    day = [moved[profile.hour] for profile in made[24 * PAST_DAYS : 24 * (PAST_DAYS + 1)]]
    assert "hours_lie_in_their_time_zone" in found_in(kind, day)


def test_even_traffic_that_is_moved_is_as_it_was() -> None:
    made = history(KINDS["1,000 events an hour, flat"], 24 * (PAST_DAYS + 1), 11)
    moved = {profile.hour: profile for profile in shifted(made, 6)}
    day = [moved[hour_key(START + (24 * PAST_DAYS + n) * HOUR_MS)] for n in range(24)]
    assert found_in("1,000 events an hour, flat", day) == {}
