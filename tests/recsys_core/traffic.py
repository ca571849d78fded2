"""Clean clickstreams of many kinds, as profiles of their hours, and faults that can be planted in them.

Users come in sessions of several events, want mostly items of their own category and pay prices that differ widely. Only the
counts are kept, so that thousands of hours are judged in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from recsys_core.events import HOUR_MS, hour_key, key_start_ms
from recsys_core.lake import Lake, Partition
from recsys_core.profiles import (
    HOUR_CLAIMS,
    WARNINGS,
    Measure,
    Profile,
    Profiles,
    Verdict,
    spread_of,
)
from recsys_core.settings import QualitySettings
from recsys_core.tables import CLICKS_HOURLY

START = key_start_ms("2026-03-02")
"""A Monday."""
CATEGORIES = ("books", "garden", "media", "music", "sports", "toys")
TYPES, SHARES = ("view", "click", "cart", "purchase"), (0.7, 0.2, 0.07, 0.03)

Rate = Callable[[int, np.random.Generator], float]
"""Expected events of the hour with this number, counted from a Monday's first."""


def flat(events: float) -> Rate:
    return lambda hour, random: events  # noqa: ARG005


def day_curve(events: float, depth: float = 0.8, weekend: float = 1.0, later: int = 0, growth: float = 0.0) -> Rate:
    """A curve that is highest at 20 h; on weekends `weekend` times as high and `later` hours later; `growth` a day."""

    def rate(hour: int, random: np.random.Generator) -> float:  # noqa: ARG001
        day, of_day = divmod(hour, 24)
        off = day % 7 >= 5
        angle = 2 * np.pi * (of_day - 20 - (later if off else 0)) / 24
        return float(events * (1 + depth * np.cos(angle)) * (weekend if off else 1.0) * (1 + growth) ** day)

    return rate


def restless(rate: Rate, spread: float, burst: float = 1.0, hours_between: float = 48.0) -> Rate:
    """`rate` that moves by itself with a memory of some hours, and now and then bursts for three hours."""
    state = {"level": 0.0, "left": 0.0}

    def moved(hour: int, random: np.random.Generator) -> float:
        state["level"] = 0.8 * state["level"] + 0.6 * random.normal(0, spread)
        state["left"] = 3 if random.random() < 1 / hours_between else max(state["left"] - 1, 0)
        return rate(hour, random) * float(np.exp(state["level"])) * (burst if state["left"] else 1.0)

    return moved


@dataclass(frozen=True)
class Traffic:
    """A kind of clickstream. `session` is the mean number of events of a user's visit in an hour."""

    rate: Callable[[], Rate]
    session: float = 1.0
    users: int = 100_000
    loyal: float = 0.0
    """Share of visits by the ten most loyal users."""
    price_spread: float = 1.0
    """Standard deviation of the logarithm of prices."""


KINDS: dict[str, Traffic] = {
    "one event an hour, flat": Traffic(lambda: flat(1), users=50),
    "30 events an hour, flat": Traffic(lambda: flat(30), users=500),
    "100 events an hour, flat": Traffic(lambda: flat(100), users=2000),
    "1,000 events an hour, flat": Traffic(lambda: flat(1000)),
    "10,000 events an hour, flat": Traffic(lambda: flat(10_000)),
    "strong day curve": Traffic(lambda: day_curve(1000, 0.9), session=4),
    "weak day curve": Traffic(lambda: day_curve(200, 0.25), users=5000),
    "weekends": Traffic(lambda: day_curve(1500, 0.8, weekend=0.55, later=2), session=4),
    "weekends of an office": Traffic(lambda: day_curve(600, 0.8, weekend=0.35), session=3),
    "growing shop": Traffic(lambda: day_curve(300, 0.8, growth=0.05), session=4),
    "small shop": Traffic(lambda: restless(day_curve(60, 0.8), 0.25), session=6, users=400, loyal=0.3, price_spread=1.5),
    "bursty shop": Traffic(lambda: restless(day_curve(500, 0.7), 0.25, burst=2.5), session=5, loyal=0.1),
    "news": Traffic(lambda: restless(day_curve(3000, 0.6), 0.25, burst=3.0, hours_between=72), session=1.5),
}


def rates(traffic: Traffic, hours: int, seed: int) -> np.ndarray:
    rate, random = traffic.rate(), np.random.default_rng(seed)
    return np.array([rate(hour, random) for hour in range(hours)])


def profile_of(hour: str, expected: float, traffic: Traffic, random: np.random.Generator) -> Profile:
    """An hour in which about `expected` events happen."""
    visits = int(random.poisson(expected / traffic.session))
    sizes = random.geometric(1 / traffic.session, visits) if traffic.session > 1 else np.ones(visits, np.int64)
    events = int(sizes.sum())
    if not events:
        return Profile(hour, f"v-{hour}", 0)
    visitors = np.where(
        random.random(visits) < traffic.loyal, random.integers(0, 10, visits), random.integers(10, traffic.users, visits)
    )
    users = np.repeat(visitors, sizes)
    tastes = users * 7919 % len(CATEGORIES)
    wanted = np.where(random.random(events) < 0.8, tastes, random.integers(0, len(CATEGORIES), events))
    types = random.choice(len(TYPES), events, p=SHARES)
    values = 20 * np.exp(random.normal(0, traffic.price_spread, int((types >= 2).sum())))
    pairs = np.unique(users * len(CATEGORIES) + wanted)
    per_user = np.unique(users, return_counts=True)[1]
    return Profile(
        hour=hour,
        data_version=f"v-{hour}",
        events=events,
        looked_at=events,
        users=len(per_user),
        top_user=int(per_user.max()),
        unknown_items=0,
        priced=len(values),
        price=float(np.median(values)) if len(values) else 0.0,
        price_spread=spread_of(values),
        types=_counted(TYPES, types),
        type_users=_counted(TYPES, np.unique(users * len(TYPES) + types) % len(TYPES)),
        categories=_counted(CATEGORIES, wanted),
        category_users=_counted(CATEGORIES, pairs % len(CATEGORIES)),
    )


def _counted(names: tuple[str, ...], places: np.ndarray) -> dict[str, int]:
    counts = np.bincount(places, minlength=len(names))
    return {name: int(count) for name, count in zip(names, counts, strict=True) if count}


def history(traffic: Traffic, hours: int, seed: int) -> list[Profile]:
    """The profiles of some hours from `START` on."""
    random = np.random.default_rng([seed, 1])
    return [
        profile_of(hour_key(START + n * HOUR_MS), expected, traffic, random)
        for n, expected in enumerate(rates(traffic, hours, seed))
    ]


class HeldProfiles(Profiles):
    """Profiles that are in memory instead of a lake; hours beside them were never made."""

    def __init__(self, profiles: Iterable[Profile], settings: QualitySettings) -> None:
        super().__init__(Lake("memory://nothing"), settings)
        self.held = {profile.hour: profile for profile in profiles}

    def load(self, hours: Iterable[str]) -> None:
        for hour in hours:
            if hour not in self._parts:
                found = self.held.get(hour)
                self._parts[hour] = (
                    Partition(CLICKS_HOURLY, hour, "", (), found.events, 0, found.data_version, 0.0) if found else None
                )
                self._stored[hour] = Verdict(found) if found else None

    def replace(self, profile: Profile) -> None:
        """Another hour in the place of one, not judged yet."""
        self.forget_hour(profile.hour)
        self.held[profile.hour] = profile

    def forget_hour(self, hour: str) -> None:
        """As if the hour had never been made."""
        for known in (self.held, self._parts, self._stored):
            known.pop(hour, None)
        self._sums.clear()
        self._errors.clear()

    def judge_hour(self, hour: str) -> dict[str, list[Measure]]:
        """The measures of an hour that are not as usual, by claim; the verdict is held as `judge` does."""
        bad = {
            claim: unusual
            for claim, measuring in HOUR_CLAIMS.items()
            if claim not in WARNINGS and (unusual := [m for m in measuring(self, hour) if m.unusual])
        }
        profile = self.profile(hour)
        if profile is not None:
            self.hold(Verdict(profile, {claim: str(of[0]) for claim, of in bad.items()}, judged=True))
        return bad


def judged(profiles: list[Profile], settings: QualitySettings) -> tuple[HeldProfiles, dict[str, dict[str, list[Measure]]]]:
    """A history judged hour by hour, and the alarms."""
    held = HeldProfiles(profiles, settings)
    found = {profile.hour: held.judge_hour(profile.hour) for profile in profiles}
    return held, {hour: bad for hour, bad in found.items() if bad}


# -- faults -------------------------------------------------------------------------------------------------------


def scaled(counts: Mapping[str, int], factor: float) -> dict[str, int]:
    return {name: round(count * factor) for name, count in counts.items()}


def times(profile: Profile, factor: float) -> Profile:
    """The hour with `factor` times its users, who do what they did."""
    return replace(
        profile,
        events=round(profile.events * factor),
        looked_at=round(profile.looked_at * factor),
        users=max(1, round(profile.users * factor)),
        priced=round(profile.priced * factor),
        types=scaled(profile.types, factor),
        type_users=scaled(profile.type_users, factor),
        categories=scaled(profile.categories, factor),
        category_users=scaled(profile.category_users, factor),
    )


def shifted(profiles: list[Profile], hours: int) -> Iterator[Profile]:
    """The same hours, each with what happened `hours` before."""
    by_hour = {profile.hour: profile for profile in profiles}
    for profile in profiles:
        source = by_hour.get(hour_key(key_start_ms(profile.hour) - hours * HOUR_MS))
        if source is not None:
            yield replace(source, hour=profile.hour, data_version=f"s-{profile.hour}")
