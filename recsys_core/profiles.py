"""What an hour of clicks looks like, what is usual for it, and whether it may be learned from.

A profile of an hour is a handful of counts, kept in the lake table `clicks_profile` (a partition a day) beside the verdict
on the hour, so that holding an hour against its past reads a few small files and no clicks. Usual is what the same hour of
past weeks had, else the same hour of past days, else the hours just before; only hours that were found sound (or that a
person accepted) count as a past. The model day reads the verdicts of its whole window.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_core import progress
from recsys_core.catalog import CATALOG_KEY, CATALOG_TABLE, read_catalog
from recsys_core.events import DAY_MS, EVENT_ID, EVENT_TYPE, HOUR_MS, ITEM_ID, TS, USER_ID, VALUE, hour_key, key_start_ms
from recsys_core.lake import Lake, Partition, PartitionChanged
from recsys_core.quality import LEAST, MOST, SAMPLE, VALUE_COLUMN, Finding, Report, readable, usual_suite, validate
from recsys_core.settings import QualitySettings
from recsys_core.tables import CLICKS_HOURLY

if TYPE_CHECKING:
    import pandas as pd

CLICKS_PROFILE = "clicks_profile"
CATALOG_PROFILE = "catalog_profile"

WEEKS, DAYS, BEFORE = "the same hour of past weeks", "the same hour of past days", "the hours before"
DAY_HOURS = 24
MAX_LAG = 11
"""Hours; a day curve shifted by twelve can't be told from one shifted the other way."""
SHIFTS = sorted(range(-MAX_LAG, MAX_LAG + 1), key=abs)
LEAST_SHIFT, BURST = 3, 4
LEAST_HOURS, LEAST_REGULAR = 14, 0.7
"""Hours with events that a curve needs to be judged, and how like the others each day before has to be (correlation)."""
COLUMNS = [EVENT_ID, USER_ID, ITEM_ID, EVENT_TYPE, TS, VALUE]
SIGMAS_OF_MAD = 1.4826
"""Standard deviations of a normal distribution in its median absolute deviation."""
BUSIEST = 100
OTHER = "(others)"
MOST_CATEGORIES = 200


@dataclass(frozen=True)
class Profile:
    """Counts of an hour of clicks.

    Attributes:
        hour: partition key.
        data_version: of the partition that was looked at.
        events: rows of the partition.
        looked_at: rows that the other counts are of; less than `events` for an hour above `quality.sample_rows`.
        users: distinct users.
        top_user: events of the most active user of the whole hour.
        repeated_ids: events whose id occurs before in the hour.
        outside: events whose time is not in the hour.
        repeated: events whose user, item, type and time occur before in the hour.
        copied: events that occur at the same time of the day before.
        unknown_items: events of items that the catalogue lacks; -1 without a catalogue.
        priced, price: events with a value that is a finite number, and the median of the values.
        price_spread: robust standard deviation of the logarithm of the values above zero.
        unreadable: events whose value is not a finite number.
        types, categories: events by event type and by first level of the category.
        type_users, category_users: distinct users of each of those types and categories.
    """

    hour: str
    data_version: str
    events: int
    looked_at: int = 0
    users: int = 0
    top_user: int = 0
    repeated_ids: int = 0
    outside: int = 0
    repeated: int = 0
    copied: int = 0
    unknown_items: int = -1
    priced: int = 0
    price: float = 0.0
    price_spread: float = 0.0
    unreadable: int = 0
    types: dict[str, int] = field(default_factory=dict)
    categories: dict[str, int] = field(default_factory=dict)
    type_users: dict[str, int] = field(default_factory=dict)
    category_users: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """Whether an hour may be learned from: claim -> reason of what failed, and whether a person accepted it anyway."""

    profile: Profile
    failed: dict[str, str] = field(default_factory=dict)
    judged: bool = False
    accepted: bool = False

    @property
    def sound(self) -> bool:
        return self.accepted or (self.judged and not self.failed)


class Catalogue:
    """What profiles want to know of the items: first level of the category of each."""

    def __init__(self, lake: Lake) -> None:
        catalogue = read_catalog(lake)
        self.items = catalogue[ITEM_ID].combine_chunks()
        first = pc.list_element(pc.split_pattern(pc.fill_null(catalogue["category"], ""), "/"), 0)
        self.tops = first.combine_chunks() if isinstance(first, pa.ChunkedArray) else first

    def tops_of(self, items: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
        """First level of each item's category, null for an item that is not there."""
        return self.tops.take(pc.index_in(items, value_set=self.items))


class Profiles:
    """Profiles and verdicts of hours of one lake, made where they are missing and read once."""

    def __init__(self, lake: Lake, settings: QualitySettings) -> None:
        self.lake = lake
        self.settings = settings
        self._parts: dict[str, Partition | None] = {}
        self._stored: dict[str, Verdict | None] = {}
        self._sums: dict[int, Profile | None] = {}
        self._contents: dict[str, np.ndarray] = {}
        self._days: dict[str, dict[str, Verdict]] = {}
        self._errors: dict[tuple[str, str], tuple[float, float]] = {}

    @cached_property
    def catalogue(self) -> Catalogue:
        return Catalogue(self.lake)

    def load(self, hours: Iterable[str]) -> None:
        """Read the pointers of hours that were not read yet, concurrently."""
        new = [hour for hour in dict.fromkeys(hours) if hour not in self._parts]
        if not new:
            return
        parts = self.lake.find_all(CLICKS_HOURLY, new)
        stored = self._read_days({hour[:10] for hour in new})
        for hour in new:
            part, kept = parts.get(hour), stored.get(hour)
            self._parts[hour] = part
            same = part is not None and kept is not None and kept["profile"]["data_version"] == part.data_version
            self._stored[hour] = _verdict_of(kept) if same and kept else None

    def _read_days(self, days: Iterable[str]) -> dict[str, dict[str, Any]]:
        """What is kept of the hours of some days."""
        found: dict[str, dict[str, Any]] = {}
        for part in self.lake.find_all(CLICKS_PROFILE, sorted(days)).values():
            found |= part.extra["hours"]
        return found

    def events(self, hour: str) -> int | None:
        """Rows of the hour, None when it was never made."""
        self.load([hour])
        part = self._parts[hour]
        return part.rows if part else None

    def verdict(self, hour: str) -> Verdict | None:
        """What is stored of the hour as it is now, None when nothing is."""
        self.load([hour])
        return self._stored[hour]

    def profile(self, hour: str) -> Profile | None:
        """The profile of the hour as it is now, None when it was never made."""
        found = self.verdict(hour)
        if found:
            return found.profile
        part = self._parts[hour]
        if part is None:
            return None
        made = self._measure(part)
        self._stored[hour] = Verdict(made)
        return made

    def sound_day(self, start: int) -> Profile | None:
        """The 24 hours that end with the hour at `start` as one profile, None unless all of them are sound."""
        if start not in self._sums:
            verdicts = [self.verdict(hour_key(start - n * HOUR_MS)) for n in range(DAY_HOURS)]
            self._sums[start] = _summed([v.profile if v and v.sound else None for v in verdicts])
        return self._sums[start]

    def errors(self, start: int, kind: str, least: float) -> np.ndarray:
        """Of the sound hours of the week before `start`, the logarithm of their events over what `kind` foretold.

        Those are taken for which about `least` or more were foretold: in a quiet hour chance errs by more.
        """
        found = [self._error(hour_key(start - n * HOUR_MS), kind) for n in range(1, 7 * DAY_HOURS + 1)]
        return np.array([error for foretold, error in found if foretold >= least])

    def _error(self, hour: str, kind: str) -> tuple[float, float]:
        """What was foretold of an hour, 0 when nothing was, and the error."""
        if (hour, kind) not in self._errors:
            start = key_start_ms(hour)
            steps = range(1, self.settings.weeks + 1) if kind == WEEKS else range(1, 8)
            each = 7 * DAY_MS if kind == WEEKS else DAY_MS
            events = self.sound_events(hour)
            past = [count for n in steps if (count := self.sound_events(hour_key(start - n * each)))] if events else []
            foretold = median(past) if past else 0.0
            self._errors[hour, kind] = (foretold, math.log(events / foretold)) if events and past else (0.0, 0.0)
        return self._errors[hour, kind]

    def sound_events(self, hour: str) -> int | None:
        """Events of an hour that was found sound, by what is kept of its day; None of any other."""
        if hour not in self._stored:
            day = hour[:10]
            if day not in self._days:
                self._days[day] = {h: _verdict_of(kept) for h, kept in self._read_days([day]).items()}
            verdict = self._days[day].get(hour)
        else:
            verdict = self._stored[hour]
        return verdict.profile.events if verdict and verdict.sound else None

    def hold(self, verdict: Verdict) -> None:
        """Use a verdict from now on, before it is stored."""
        self._stored[verdict.profile.hour] = verdict
        for kind in (WEEKS, DAYS):
            self._errors.pop((verdict.profile.hour, kind), None)

    def store(self, verdicts: Iterable[Verdict]) -> None:
        """Keep verdicts beside their profiles, a small file a day; several runs may judge hours of one day at once."""
        by_day: dict[str, dict[str, Verdict]] = {}
        for verdict in verdicts:
            self._stored[verdict.profile.hour] = verdict
            by_day.setdefault(verdict.profile.hour[:10], {})[verdict.profile.hour] = verdict
        for day, of_day in by_day.items():
            self._add(day, {hour: asdict(verdict) for hour, verdict in of_day.items()})

    def _add(self, day: str, verdicts: dict[str, Any]) -> None:
        def add(part: Partition | None) -> None:
            there = part.extra["hours"] if part else {}
            hours = there | {hour: _still_accepted(there.get(hour), verdict) for hour, verdict in verdicts.items()}
            self.lake.write_blobs(CLICKS_PROFILE, day, {}, len(hours), {"hours": dict(sorted(hours.items()))}, part)

        self.lake.revise(CLICKS_PROFILE, day, add)

    def _measure(self, part: Partition) -> Profile:
        rows = _sample_of_users(self.lake, part, self.settings.sample_rows)
        busiest = _busiest_user(self.lake, part) if part.rows > self.settings.sample_rows else 0
        if rows is None or not rows.num_rows:
            return Profile(part.key, part.data_version, part.rows, top_user=busiest)
        per_user = pc.value_counts(rows[USER_ID]).field("counts").to_numpy()
        content = self._contents[part.key] = _hashes(rows, 0)
        if len(self._contents) > DAY_HOURS + 1:
            self._contents.pop(next(iter(self._contents)))
        tops = self.catalogue.tops_of(rows[ITEM_ID]) if len(self.catalogue.items) else None
        categories, category_users = _by_category(rows[USER_ID], tops) if tops is not None else ({}, {})
        given = rows[VALUE].drop_null().to_numpy() if VALUE in rows.column_names else np.zeros(0)
        values = given[np.isfinite(given)]
        return Profile(
            hour=part.key,
            data_version=part.data_version,
            events=part.rows,
            looked_at=rows.num_rows,
            users=len(per_user),
            top_user=max(busiest, int(per_user.max())),
            repeated_ids=rows.num_rows - pc.count_distinct(rows[EVENT_ID]).as_py() if EVENT_ID in rows.column_names else 0,
            outside=int(np.count_nonzero(rows[TS].to_numpy() // HOUR_MS != key_start_ms(part.key) // HOUR_MS)),
            repeated=rows.num_rows - len(np.unique(content)),
            copied=self._copied(part, content, rows),
            unknown_items=int(tops.null_count) if tops is not None else -1,
            priced=len(values),
            price=float(np.median(values)) if len(values) else 0.0,
            price_spread=spread_of(values),
            unreadable=len(given) - len(values),
            types=_counts(rows[EVENT_TYPE]),
            type_users=_counts(rows.group_by([USER_ID, EVENT_TYPE]).aggregate([])[EVENT_TYPE]),
            categories=categories,
            category_users=category_users,
        )

    def _copied(self, part: Partition, content: np.ndarray, rows: pa.Table) -> int:
        """Rows that the hour of the day before has, a day earlier to the millisecond."""
        earlier = hour_key(key_start_ms(part.key) - DAY_MS)
        self.load([earlier])
        before = self._parts[earlier]
        if before is None or not before.rows:
            return 0
        step = max(1, -(-part.rows // self.settings.sample_rows))
        if step == 1 and earlier in self._contents:
            # The hashes of that hour are here already; those of this one have to be as of a day before.
            return int(np.isin(_hashes(rows, -DAY_MS), self._contents[earlier]).sum())
        found = _sample_of_users(self.lake, before, self.settings.sample_rows, step)
        return int(np.isin(content, _hashes(found, DAY_MS)).sum()) if found is not None and found.num_rows else 0

    # -- what is usual --------------------------------------------------------------------------------------------

    def past(self, hour: str) -> tuple[list[Profile], str]:
        """The sound hours that `hour` is held against, and which kind they are; none when there is no past or a small one."""
        start, settings = key_start_ms(hour), self.settings
        kinds = (
            (WEEKS, [start - n * 7 * DAY_MS for n in range(1, settings.weeks + 1)], 2),
            (DAYS, [start - n * DAY_MS for n in range(1, 8)], 2),
            (BEFORE, [start - n * HOUR_MS for n in range(1, 4)], 1),
        )
        for kind, starts, needed in kinds:
            found = [profile for ms in starts if (profile := self._sound_profile(hour_key(ms)))]
            if len(found) >= needed:
                return (found, kind) if median(p.events for p in found) >= settings.min_events else ([], "")
        return [], ""

    def _sound_profile(self, hour: str) -> Profile | None:
        verdict = self.verdict(hour)
        return verdict.profile if verdict and verdict.sound and verdict.profile.events else None


def _still_accepted(there: Mapping[str, Any] | None, verdict: dict[str, Any]) -> dict[str, Any]:
    """A verdict as it replaces the one that is there: what a person accepted while the hour was judged stays accepted."""
    same = there is not None and there["profile"]["data_version"] == verdict["profile"]["data_version"]
    return {**verdict, "accepted": verdict["accepted"] or there["accepted"]} if same and there else verdict


def _verdict_of(kept: Mapping[str, Any]) -> Verdict:
    return Verdict(**{**kept, "profile": Profile(**kept["profile"])})


def _sample_of_users(lake: Lake, part: Partition, limit: int, step: int | None = None) -> pa.Table | None:
    """All rows of one in `step` users, chosen by a hash of their id, so that at most about `limit` are held.

    A user's rows stay together: repetitions, and what one user does to the counts, are seen in the sample as in the whole.
    """
    import pandas as pd

    dataset = lake.dataset(part.table, [part.key])
    if dataset is None:
        return None
    step = step or max(1, -(-part.rows // limit))
    columns = [name for name in COLUMNS if name in dataset.schema.names]
    kept = []
    for batch in dataset.to_batches(columns=columns):
        if step > 1:
            hashes = pd.util.hash_array(batch[USER_ID].to_numpy(zero_copy_only=False), categorize=False)
            batch = batch.filter(pa.array(hashes % np.uint64(step) == 0))
        kept.append(batch)
    return pa.Table.from_batches(kept, kept[0].schema) if kept else None


def _busiest_user(lake: Lake, part: Partition) -> int:
    """Events of the most active user of all, whom a sample of users hardly ever has.

    Of each batch the `BUSIEST` most active are counted, so a user above a hundredth of the events is counted nearly whole.
    """
    counts: Counter[str] = Counter()
    dataset = lake.dataset(part.table, [part.key])
    for batch in dataset.to_batches(columns=[USER_ID]) if dataset else ():
        counted = pc.value_counts(batch[USER_ID])
        most = np.argsort(-counted.field("counts").to_numpy())[:BUSIEST]
        counts.update({one["values"]: one["counts"] for one in counted.take(pa.array(most)).to_pylist()})
    return max(counts.values(), default=0)


def _hashes(rows: pa.Table, shift_ms: int) -> np.ndarray:
    """uint64 (n,): a hash of user, item, type and time + `shift_ms` of each row."""
    import pandas as pd

    columns = [rows[name].combine_chunks().to_numpy(zero_copy_only=False) for name in (USER_ID, ITEM_ID, EVENT_TYPE)]
    mixed = pd.util.hash_array(rows[TS].to_numpy() + shift_ms)
    for column in columns:
        mixed = mixed * np.uint64(1_000_003) ^ pd.util.hash_array(column, categorize=len(column) > 1000)
    return np.asarray(mixed, np.uint64)


def _counts(column: pa.Array | pa.ChunkedArray) -> dict[str, int]:
    counted = pc.value_counts(column.drop_null())
    pairs = Counter(dict(zip(counted.field("values").to_pylist(), counted.field("counts").to_pylist(), strict=True)))
    most = dict(pairs.most_common(MOST_CATEGORIES))
    rest = pairs.total() - sum(most.values())
    return most | ({OTHER: rest} if rest else {})


def _by_category(users: pa.ChunkedArray, tops: pa.Array | pa.ChunkedArray) -> tuple[dict[str, int], dict[str, int]]:
    """Events and distinct users of each category; `tops` (n,) has that of each event, null or empty where it has none."""
    known = pa.table({"user": users, "top": tops}).filter(pc.greater(pc.binary_length(tops), 0))
    return _counts(known["top"]), _counts(known.group_by(["user", "top"]).aggregate([])["top"])


def spread_of(values: np.ndarray) -> float:
    """Robust standard deviation of the logarithm of the values above zero; 0 of none."""
    logs = np.log(values[values > 0])
    return float(SIGMAS_OF_MAD * np.median(np.abs(logs - np.median(logs)))) if len(logs) else 0.0


# -- measures beside what is usual -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """A value of an hour beside its usual range; a bound that is None is not judged."""

    hour: str
    what: str
    value: float
    least: float | None = None
    most: float | None = None
    beside: str = ""

    @property
    def readable(self) -> bool:
        """Whether value and bounds are finite numbers."""
        bounds = (bound for bound in (self.least, self.most) if bound is not None)
        return self.value is not None and all(map(math.isfinite, (self.value, *bounds)))

    @property
    def unusual(self) -> bool:
        """Whether the value is out of its range, or something of it is no finite number."""
        if not self.readable:
            return True
        return (self.least is not None and self.value < self.least) or (self.most is not None and self.value > self.most)

    def __str__(self) -> str:
        usual = f"{readable(self.least)} … {readable(self.most)}"
        value = readable(self.value) if self.readable else "not a number"
        return f"{self.what} {value}, usual {usual}" + (f" ({self.beside})" if self.beside else "")


def frame_of(measures: Sequence[Measure]) -> pd.DataFrame:
    """The measures as a frame for `usual_suite`; beside a bound that is no finite number no value is one."""
    import pandas as pd

    rows = [asdict(m if m.readable else replace(m, value=math.nan)) for m in measures]
    frame = pd.DataFrame(rows, columns=["hour", "what", VALUE_COLUMN, LEAST, MOST, "beside"])
    return frame.astype({VALUE_COLUMN: "float64", LEAST: "float64", MOST: "float64"})


VOLUME_RANGE = {WEEKS: (0.3, 3.5), DAYS: (0.2, 8.0), BEFORE: (0.05, 10.0)}
"""Times the usual number of events. A day is not like the day before it, and an hour still less like the one before."""
LEAST_FACTOR, LOWEST, KNOWN_ERRORS = 1.8, 0.12, 40
"""Half and double are found where the errors of so many hours are small; a tenth is found however large they are."""
MEDIAN_ERROR = math.sqrt(math.pi / 2)
"""Standard error of a median in those of the mean."""
SIGMAS, BEYOND = 5.0, 1.3
"""What is unusual: so many robust standard deviations of the errors, and so many times the largest of them."""


def repeated_ids(profiles: Profiles, hour: str) -> Iterator[Measure]:
    """Events whose id occurs twice in the hour."""
    if profile := profiles.profile(hour):
        yield Measure(hour, "event ids that occur again", profile.repeated_ids, most=0)


def outside_times(profiles: Profiles, hour: str) -> Iterator[Measure]:
    """Events whose time is not in the hour."""
    if profile := profiles.profile(hour):
        yield Measure(hour, "events of other hours", profile.outside, most=0)


FEW = 10
"""Times `min_events`: with fewer events a quiet night and a loyal customer look like faults."""


def volumes(profiles: Profiles, hour: str) -> Iterator[Measure]:
    """Events of the hour beside what they were, as far as that foretold the hours of the last week.

    The same hour of past weeks is moved by what the last week as a whole was beside its own past, so that a shop may grow, and
    holds as closely as its errors were small. Days say nothing of weekends yet, and the hours before little of the next one.
    """
    past, kind = profiles.past(hour)
    events = profiles.events(hour) or 0
    if not past:
        yield Measure(hour, "events", events, beside="no past to compare with")
        return
    level, least, most = 1.0, *VOLUME_RANGE[kind]
    usual = median(p.events for p in past)
    errors = profiles.errors(key_start_ms(hour), kind, max(usual / 2, 1)) if kind != BEFORE else np.zeros(0)
    known = kind == WEEKS and len(errors) >= KNOWN_ERRORS
    if len(errors):
        middle = float(np.median(errors))
        if known:
            level, least, most = math.exp(middle), 1 / LEAST_FACTOR, LEAST_FACTOR
        apart = np.abs(errors - middle)
        visits = median(p.users for p in past)
        spread = math.hypot(SIGMAS_OF_MAD * float(np.median(apart)), math.sqrt((1 + 1 / len(past)) / max(visits, 1)))
        wide = math.exp(max(SIGMAS * spread, BEYOND * float(apart.max())))
        least, most = max(min(least, 1 / wide), LOWEST), max(most, wide)
    if kind == BEFORE and usual < FEW * profiles.settings.min_events:
        least = 0.0
    elif usual < FEW * profiles.settings.min_events:
        least = min(least, _fewest_users(past, 1.0)) if known else min(least, LOWEST, _fewest_users(past, 0.5))
    usual *= level
    yield Measure(hour, "events", events, usual * least, usual * most, f"{usual:.0f} by {kind}")


def _fewest_users(past: Sequence[Profile], due: float) -> float:
    """Share of the usual users that hardly ever is less where a share of them is `due`: of a dozen users none may come."""
    from scipy.stats import poisson

    usual = median(p.users for p in past)
    return float(poisson.ppf(UNLIKELY, usual * due) / max(usual, 1))


def repetitions(profiles: Profiles, hour: str) -> Iterator[Measure]:
    """Shares of events that occur before in the hour, or a day earlier to the millisecond."""
    profile = profiles.profile(hour)
    if profile and profile.looked_at >= profiles.settings.min_events:
        limit = profiles.settings.max_repeated
        yield Measure(hour, "share repeated within the hour", profile.repeated / profile.looked_at, most=limit)
        yield Measure(hour, "share copied from the day before", profile.copied / profile.looked_at, most=limit)


def user_shares(profiles: Profiles, hour: str) -> Iterator[Measure]:
    """Share of the most active user, and distinct users for an event."""
    profile = profiles.profile(hour)
    if not profile or profile.events < profiles.settings.min_events:
        return
    past, kind = profiles.past(hour)
    tops = [p.top_user / p.events for p in past if p.events]
    few = profile.events < FEW * profiles.settings.min_events or kind in ("", BEFORE)
    most = min(0.9, max(0.7 if few else 0.3, 3 * max(tops, default=0.0)))
    yield Measure(hour, "share of the most active user", profile.top_user / profile.events, None, most, kind)
    if profile.looked_at < profiles.settings.min_events:
        return
    ratios = [p.users / p.looked_at for p in past if p.looked_at]
    least = 0.2 * median(ratios) if ratios else None
    yield Measure(hour, "distinct users for an event", profile.users / profile.looked_at, least, None, kind)


def type_shares(profiles: Profiles, hour: str) -> Iterator[Measure]:
    """Share of each event type that is or was there, in the 24 hours up to the hour.

    A type is too frequent, or missed, where too many or too few of the users do it as well, by more than chance gives: one who
    bookmarks a hundred items is no fault of the data.
    """
    from scipy.stats import poisson

    now, past = _days(profiles, hour)
    if not now or not past:
        return
    total = sum(now.types.values())
    for name in sorted(set(now.types).union(*(p.types for p in past))):
        usual = median(p.types.get(name, 0) / max(sum(p.types.values()), 1) for p in past)
        of_users = median(p.type_users.get(name, 0) / max(p.users, 1) for p in past)
        share, who = now.types.get(name, 0) / max(total, 1), now.type_users.get(name, 0)
        few = who < of_users * now.users / 4 and (1 - of_users) ** (now.users / RETURNS) < UNLIKELY
        missed = few and usual * total >= profiles.settings.min_events
        due = max(4 * of_users, 0.15) * now.users
        many = usual < 0.5 and who > due and poisson.sf(who / RETURNS - 1, due / 4 / RETURNS) < UNLIKELY
        least, most = usual / 4 if missed else None, max(4 * usual, 0.15) if many else None
        yield Measure(hour, f"share of {name!r}, 24 hours", share, least, most, f"{usual:.3f} on the days before")


def prices(profiles: Profiles, hour: str) -> Iterator[Measure]:
    """Median value of the events that have one, in the hour and in the 24 hours up to it; and values that are no numbers.

    A median of few values that differ widely says little: its range is as wide as `SIGMAS` of its standard error.
    """
    least_events = profiles.settings.min_priced
    now = profiles.profile(hour)
    past, kind = profiles.past(hour)
    pairs = [("median value", now, past, kind)]
    day, days = _days(profiles, hour)
    pairs.append(("median value, 24 hours", day, days, "the days before"))
    if now and now.unreadable:
        yield Measure(hour, "values that are not finite numbers", now.unreadable, most=0)
    if day and days:
        share = median(p.priced / p.looked_at for p in days)
        if share * day.looked_at >= profiles.settings.min_events:
            told = f"{share:.3f} on the days before"
            yield Measure(hour, "share with a value, 24 hours", day.priced / day.looked_at, share / 4, None, told)
    for what, one, others, beside in pairs:
        known = [p for p in others if p.priced >= least_events and p.price > 0]
        if one and one.priced >= least_events and known:
            usual = median(p.price for p in known)
            error = math.hypot(_median_error(one), median(map(_median_error, known)) / math.sqrt(len(known)))
            most = max(4.0, math.exp(SIGMAS * error))
            yield Measure(hour, what, one.price, usual / most, usual * most, f"{usual:.2f} in {beside}")


def _median_error(profile: Profile) -> float:
    """Standard error of the logarithm of the median value; a user's values are taken to be alike."""
    return MEDIAN_ERROR * profile.price_spread / math.sqrt(max(1, min(profile.priced, profile.users)))


UNLIKELY = 1e-6
"""What chance does less often than so is no chance: a day that looks moved, a category that none of the users came for."""
CERTAIN = math.log(len(SHIFTS) / UNLIKELY)
"""A likelihood ratio above it has a probability below `UNLIKELY` (Markov), were all of the shifts tried (Bonferroni)."""
RETURNS = 3.0
"""Hours of a day in which a user comes, at most on average (1.4 on Deskdrop, 1.5 on Globo, 2.0 simulated)."""


def category_counts(profiles: Profiles, hour: str) -> Iterator[Measure]:
    """Events of each first-level category, in the hour and in the 24 hours up to it, where some must be expected.

    It is users that come or stay away by chance, each with a session of many events of mostly one category: fifty events may be
    those of seven users, and a night without them no loss. So a category is judged where `UNLIKELY` no user would want it.
    A single day, and the hours before, say nothing of what is usual: an item that goes viral is most of a small category.
    """
    now, (past, kind) = profiles.profile(hour), profiles.past(hour)
    day, days = _days(profiles, hour)
    for what, one, others, beside, returns in (
        ("", now, past, kind, 1.0),
        (", 24 hours", day, days, "the days before", RETURNS),
    ):
        if not one or len(others) < 2 or beside == BEFORE:
            continue
        for name in sorted(set().union(*(p.categories for p in others)) - {OTHER}):
            expected = one.looked_at * _low(p.categories.get(name, 0) / max(p.looked_at, 1) for p in others)
            of_users = _low(p.category_users.get(name, 0) / max(p.users, 1) for p in others)
            if expected >= profiles.settings.min_category_events and (1 - of_users) ** (one.users / returns) < UNLIKELY:
                least = max(1.0, 0.05 * expected)
                yield Measure(
                    hour, f"events of {name!r}{what}", one.categories.get(name, 0), least, None, f"{expected:.0f} by {beside}"
                )


def _low(shares: Iterable[float]) -> float:
    """What two thirds of the shares reach: a burst, which a day or some hours in a row may be, does not raise it."""
    found = sorted(shares)
    return found[(len(found) - 1) // 3]


def known_items(profiles: Profiles, hour: str) -> Iterator[Measure]:
    """Share of events whose item the catalogue has."""
    profile = profiles.profile(hour)
    if profile and profile.looked_at and profile.unknown_items >= 0:
        share = 1 - profile.unknown_items / profile.looked_at
        yield Measure(hour, "share of events of known items", share, profiles.settings.min_known_items)


def time_shifts(profiles: Profiles, hour: str) -> Iterator[Measure]:
    """By how many hours the day curve that ends with the hour has to be moved to lie on that of the days before.

    A shift counts where three things hold: each day before is like the others without it, so that there is a curve at all;
    moving wins `min_shift_gain` of correlation; and the moved curve explains the day so much better that chance, over all
    shifts that were tried, does it less than once in `UNLIKELY` days (likelihood ratio, with the days' own dispersion).
    Less than `LEAST_SHIFT` hours are those of late risers on a weekend. Hours without events are left out.
    """
    start, settings = key_start_ms(hour), profiles.settings
    counts = _day_counts(profiles, start)
    earlier = [c for n in range(1, 8) if (c := _day_counts(profiles, start - n * DAY_MS, sound=True)) is not None]
    if counts is None or len(earlier) < 2 or counts.sum() < DAY_HOURS * settings.min_events / 4:
        return
    there = counts > 0
    if there.sum() < LEAST_HOURS or median(_likeness(earlier)) <= LEAST_REGULAR:
        return
    usual = _mean_curve(earlier)
    unmoved = _levelled(usual, counts)
    fits = {lag: _correlation(counts[there], (np.roll(usual, lag) if lag else unmoved)[there]) for lag in SHIFTS}
    best = max(SHIFTS, key=lambda lag: fits[lag])
    told = f"correlation {fits[0]:.2f} as it is, {fits[best]:.2f} when moved by {best} h"
    wins = fits[best] - fits[0] >= settings.min_shift_gain
    found = wins and abs(best) >= LEAST_SHIFT and _explains(counts, np.roll(usual, best), unmoved, earlier) > CERTAIN
    yield Measure(hour, "hours that the day is shifted by", best if found else 0, 0, 0, told)


def _levelled(usual: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The usual curve with levels of their own before and after its low, where one day becomes the next: a Monday is no
    Sunday."""
    low = int(np.argmin(usual))
    parts = [part for part in (slice(0, low), slice(low, None)) if usual[part].sum() > 0]
    levelled = usual.copy()
    for part in parts:
        levelled[part] *= max(counts[part].sum(), 1.0) / usual[part].sum()
    return levelled


def _likeness(days: Sequence[np.ndarray]) -> list[float]:
    """Correlation of the curve of each day with the mean of all the others."""
    return [_correlation(day, _mean_curve(_others(days, at))) for at, day in enumerate(days)]


def _explains(counts: np.ndarray, moved: np.ndarray, unmoved: np.ndarray, earlier: Sequence[np.ndarray]) -> float:
    """Logarithm of how many times more probable a day's counts are of the moved curve than of the one as it is.

    Twice the root of a count has variance 1 by chance alone (Anscombe 1948); the variance here is that of the days
    before, so that it holds what makes days differ beside chance. Hours of a day that differ together, from one to the next,
    count as fewer than they are (effective sample size of an autoregression).
    """
    apart = [_differences(day, _mean_curve(_others(earlier, at))) for at, day in enumerate(earlier)]
    variance = max(1.0, float(np.mean([_size(of) for of in apart])))
    together = sum(float(of[1:] @ of[:-1]) for of in apart) / max(sum(float(of @ of) for of in apart), 1e-9)
    share = (1 - together) / (1 + together) if together > 0 else 1.0
    there = counts > 0
    won = _size(_differences(counts[there], unmoved[there])) - _size(_differences(counts[there], moved[there]))
    return float(share * won * there.sum() / (2 * variance))


def _differences(counts: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """Of twice the roots of counts and of a curve that is brought to their sum."""
    expected = curve * (counts.sum() / max(curve.sum(), 1e-9))
    return np.asarray(2 * np.sqrt(counts + 0.375) - 2 * np.sqrt(expected + 0.375))


def _size(differences: np.ndarray) -> float:
    """Mean square without the `BURST` largest."""
    return float(np.mean(np.sort(differences**2)[:-BURST]))


def _mean_curve(days: Sequence[np.ndarray]) -> np.ndarray:
    """Mean of the days' curves as if each had the same number of events, the mean one."""
    return np.asarray(np.mean([day / day.sum() for day in days], axis=0) * np.mean([day.sum() for day in days]))


def _others(days: Sequence[np.ndarray], at: int) -> list[np.ndarray]:
    return [day for n, day in enumerate(days) if n != at]


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Of the logarithms, so that the low of the night counts as much as the peaks."""
    one, other = np.log1p(one), np.log1p(other)
    one, other = one - one.mean(), other - other.mean()
    both = math.sqrt(float(one @ one) * float(other @ other))
    return float(one @ other) / both if both else 0.0


def _day_counts(profiles: Profiles, start: int, sound: bool = False) -> np.ndarray | None:
    """Events of the 24 hours that end with the hour at `start`; None when some were never made (or not sound)."""
    hours = [hour_key(start - n * HOUR_MS) for n in range(DAY_HOURS - 1, -1, -1)]
    counts = [profiles.events(hour) for hour in hours]
    if any(count is None for count in counts) or not any(counts):
        return None
    if sound and any((v := profiles.verdict(hour)) is None or (v.judged and not v.sound) for hour in hours):
        return None
    return np.asarray(counts, float)


def _days(profiles: Profiles, hour: str) -> tuple[Profile | None, list[Profile]]:
    """The 24 hours up to the hour as one profile, and those of the seven days before, as far as all are there and sound."""
    start = key_start_ms(hour)
    past = [p for n in range(1, 8) if (p := profiles.sound_day(start - n * DAY_MS)) is not None]
    if not past:
        return None, []
    earlier = [profiles.verdict(hour_key(start - n * HOUR_MS)) for n in range(1, DAY_HOURS)]
    now = _summed([profiles.profile(hour), *(v.profile if v else None for v in earlier)])
    return (now, past) if now is not None and now.looked_at >= profiles.settings.min_events else (None, [])


def _summed(parts: Sequence[Profile | None]) -> Profile | None:
    """Profiles of hours as one; None when an hour is missing or all are empty. The price is the weighted median of theirs,
    and a user counts in every hour."""
    known = [part for part in parts if part is not None]
    total = sum(p.looked_at for p in known)
    if len(known) < len(parts) or not total:
        return None
    types, type_users, categories, category_users = (Counter[str]() for _ in range(4))
    for part in known:
        types.update(part.types)
        type_users.update(part.type_users)
        categories.update(part.categories)
        category_users.update(part.category_users)
    by_price = sorted((p.price, p.priced) for p in known if p.priced)
    weights = np.cumsum([weight for _, weight in by_price])
    price = by_price[int(np.searchsorted(weights, weights[-1] / 2))][0] if by_price else 0.0
    return Profile(
        hour=known[0].hour,
        data_version="",
        events=sum(p.events for p in known),
        looked_at=total,
        users=sum(p.users for p in known),
        priced=sum(weight for _, weight in by_price),
        price=price,
        price_spread=max((p.price_spread for p in known if p.priced), default=0.0),
        types=dict(types),
        type_users=dict(type_users),
        categories=dict(categories),
        category_users=dict(category_users),
    )


Measuring = Callable[[Profiles, str], Iterable[Measure]]
HOUR_CLAIMS: Mapping[str, Measuring] = {
    "event_ids_are_unique": repeated_ids,
    "events_lie_in_their_hour": outside_times,
    "events_are_not_repeated": repetitions,
    "volume_is_as_usual": volumes,
    "users_are_many": user_shares,
    "event_types_are_as_usual": type_shares,
    "prices_are_as_usual": prices,
    "categories_are_all_there": category_counts,
    "hours_lie_in_their_time_zone": time_shifts,
    "items_are_in_the_catalogue": known_items,
}
"""What is claimed of an hour of clicks, and how it is measured."""
WARNINGS = frozenset({"items_are_in_the_catalogue"})
"""Claims that don't make an hour unsound: an item may be sold before the catalogue knows it."""


def judge(profiles: Profiles, hours: Sequence[str]) -> dict[str, Report]:
    """Judge hours in their order, keep the verdict on each, and return the report of every claim over all of them."""
    lookback = (max(profiles.settings.weeks * 7, 8) + 1) * DAY_HOURS
    starts = [key_start_ms(hour) for hour in hours]
    wanted = {hour_key(ms - n * HOUR_MS) for ms in starts for n in (*range(8 * DAY_HOURS + 1), *_same_hours(lookback))}
    profiles.load(sorted(wanted))
    measures: dict[str, list[Measure]] = {claim: [] for claim in HOUR_CLAIMS}
    new: list[Verdict] = []
    for hour in progress.track(sorted(hours), "judging hours", len(hours)):
        found = {claim: list(measuring(profiles, hour)) for claim, measuring in HOUR_CLAIMS.items()}
        for claim, of_hour in found.items():
            measures[claim] += of_hour
        if (profile := profiles.profile(hour)) is not None:
            before = profiles.verdict(hour)
            failed = {claim: "; ".join(map(str, bad)) for claim, of in found.items() if (bad := [m for m in of if m.unusual])}
            hard = {claim: reason for claim, reason in failed.items() if claim not in WARNINGS}
            verdict = Verdict(profile, hard, True, bool(before and before.accepted))
            if verdict != before:
                profiles.hold(verdict)
                new.append(verdict)
    profiles.store(new)
    return {claim: validate(usual_suite(claim), frame_of(of_claim)) for claim, of_claim in measures.items()}


def _same_hours(lookback: int) -> range:
    return range(0, lookback, 7 * DAY_HOURS)


def accept(profiles: Profiles, hours: Iterable[str]) -> list[str]:
    """A person's word that these hours are as they should be; they count as a past from now on. Returns those changed."""
    changed = []
    for hour in hours:
        profile = profiles.profile(hour)
        verdict = profiles.verdict(hour)
        if profile is not None and verdict is not None and not verdict.accepted:
            changed.append(replace(verdict, accepted=True))
    profiles.store(changed)
    return [verdict.profile.hour for verdict in changed]


def unsound_hours(profiles: Profiles, hours: Sequence[str]) -> dict[str, str]:
    """Hours that may not be learned from, and why. What was not judged yet, or failed, is judged now; hours never made
    are not among them."""
    profiles.load(hours)
    known = [hour for hour in hours if profiles.events(hour) is not None]
    open_ = [hour for hour in known if (v := profiles.verdict(hour)) is None or not v.sound]
    if open_:
        judge(profiles, open_)
    found = {hour: profiles.verdict(hour) for hour in open_}
    return {
        hour: "; ".join(f"{claim}: {reason}" for claim, reason in verdict.failed.items())
        for hour, verdict in found.items()
        if verdict and not verdict.sound
    }


def missing_hours(profiles: Profiles, hours: Sequence[str]) -> list[str]:
    """Hours after the first one that was made that were never made."""
    profiles.load(hours)
    made = [profiles.events(hour) is not None for hour in hours]
    first = made.index(True) if any(made) else len(hours)
    return [hour for hour, there in zip(hours[first:], made[first:], strict=True) if not there]


def window_report(claim: str, found: Mapping[str, str], hours: int) -> Report:
    """The report of a claim about the hours of a window, from the reasons by hour."""
    finding = Finding(claim.replace("_", " "), not found, len(found))
    sample = tuple({"hour": hour, "reason": reason} for hour, reason in sorted(found.items())[:SAMPLE])
    return Report(claim, hours, (finding,), sample)


# -- the catalogue ----------------------------------------------------------------------------------------------


def catalogue_measures(lake: Lake) -> tuple[dict[str, list[Measure]], dict[str, Any]]:
    """What is claimed of the catalogue as it is now beside the last one that was found sound, and its own profile."""
    table = read_catalog(lake)
    tops = Counter(_counts(Catalogue(lake).tops))
    tops.pop("", None)
    given = pc.drop_null(table["price"])
    priced = given.filter(pc.is_finite(given))
    now = {
        "items": table.num_rows,
        "priced": len(priced),
        "price": float(np.median(priced.to_numpy())) if len(priced) else 0.0,
        "available": int(pc.sum(table["available"]).as_py() or 0),
        "categories": dict(tops),
    }
    stored = lake.find(CATALOG_PROFILE, CATALOG_KEY)
    before = stored.extra["profile"] if stored else None
    told = "the last sound catalogue"
    measures: dict[str, list[Measure]] = {
        "catalogue_size_is_as_usual": [Measure("now", "items", now["items"])],
        "catalogue_prices_are_as_usual": [Measure("now", "median price", now["price"])],
        "catalogue_categories_are_all_there": [],
    }
    if before:
        size = before["items"]
        share = before["available"] / 4 if before["available"] >= SAMPLE else None
        measures["catalogue_size_is_as_usual"] = [
            Measure("now", "items", now["items"], 0.7 * size, None, f"{size} in {told}"),
            Measure("now", "available items", now["available"], share, None, f"{before['available']} in {told}"),
        ]
        if before["priced"] >= SAMPLE:
            usual = before["price"]
            priced_before = f"{before['priced']} in {told}"
            measures["catalogue_prices_are_as_usual"] = [
                Measure("now", "median price", now["price"], usual / 4, usual * 4, f"{usual:.2f} in {told}"),
                Measure("now", "items with a price", now["priced"], before["priced"] / 4, None, priced_before),
            ]
        measures["catalogue_categories_are_all_there"] = [
            Measure(
                "now", f"items of {name!r}", now["categories"].get(name, 0), max(1, 0.2 * count), None, f"{count} in {told}"
            )
            for name, count in before["categories"].items()
            if count >= SAMPLE and name != OTHER
        ]
    measures["catalogue_prices_are_as_usual"].append(
        Measure("now", "prices that are not finite numbers", len(given) - len(priced), most=0)
    )
    return measures, now


def judge_catalogue(lake: Lake, rows: Report, accepted: bool = False) -> dict[str, Report]:
    """The reports on the catalogue; one that is sound, or accepted, is what the next one is held against.

    `rows` is the report on its rows, which has to be good as well.
    """
    part = lake.find(CATALOG_TABLE, CATALOG_KEY)
    before = lake.find(CATALOG_PROFILE, CATALOG_KEY)
    measures, now = catalogue_measures(lake)
    reports = {claim: validate(usual_suite(claim), frame_of(of_claim)) for claim, of_claim in measures.items()}

    def keep(stored: Partition | None) -> None:
        if stored is None or stored.extra["profile"] != now:
            lake.write_blobs(CATALOG_PROFILE, CATALOG_KEY, {}, now["items"], {"profile": now}, stored)

    if part and accepted:
        lake.revise(CATALOG_PROFILE, CATALOG_KEY, keep)
    elif part and rows.passed and all(report.passed for report in reports.values()):
        with suppress(PartitionChanged):  # another judgement, or a person's word, was kept meanwhile
            keep(before)
    return reports


CATALOGUE_CLAIMS = (
    "catalogue_size_is_as_usual",
    "catalogue_prices_are_as_usual",
    "catalogue_categories_are_all_there",
)
