"""Asset checks, each named as the claim it makes: groups of claims by asset, and the factory that makes checks of them.

A group judges some partitions of one asset in one step. A blocking claim that fails stops what is made from the asset
in the same run: nothing that would harm a model goes on to the champion. The claims of an hour of clicks block nothing,
so that the caches go on; they are the hour's verdict, and `window_is_sound` of the day's interactions reads it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from recsys_assets.reports import table
from recsys_assets.resources import Platform, PlatformResource
from recsys_core import model_quality, quality
from recsys_core.bundle import ALS_FACTORS, ITEM_INDEX
from recsys_core.catalog import CATALOG_KEY, CATALOG_TABLE
from recsys_core.events import DAY_MS, USER_ID, hour_keys, key_start_ms
from recsys_core.landing import STRANGE
from recsys_core.ledger import LANDING as LANDING_AREA
from recsys_core.ledger import QUARANTINE, LandingFile, Listing
from recsys_core.profiles import (
    Measure,
    Profiles,
    judge,
    judge_catalogue,
    missing_hours,
    unsound_hours,
    window_report,
)
from recsys_core.quality import Finding, Report, validate
from recsys_core.release import Manifest, ReleaseError
from recsys_core.tables import ACTIVE_USERS, CLICKS_HOURLY, INTERACTIONS

if TYPE_CHECKING:
    import pandas as pd

NEWEST_FILES = 20
CACHE_SAMPLE = 1000


@dataclass(frozen=True)
class Claim:
    """What a check claims, whether a failure is a warning only, and whether it stops what is made from the asset."""

    name: str
    description: str
    blocking: bool = False
    warning: bool = False


@dataclass(frozen=True)
class Group:
    """The claims on an asset, and how some of its partitions are judged: a report by claim.

    `latest` gives the partition to look at when none is named; an asset without partitions has none. `made` says whether
    the asset is there at all, or a partition of it.
    """

    asset: str
    claims: tuple[Claim, ...]
    judge: Callable[[Platform, Sequence[str]], Mapping[str, Report]]
    latest: Callable[[Platform], str | None]
    made: Callable[[Platform, str | None], bool]

    def chosen(self, platform: Platform, partitions: Sequence[str] = ()) -> list[str]:
        """`partitions`, by default the latest; empty for an asset without partitions."""
        latest = self.latest(platform) if not partitions else None
        return list(partitions) or ([latest] if latest else [])

    def reports(self, platform: Platform, partitions: Sequence[str] = ()) -> list[tuple[Claim, Report]]:
        """Every claim with its report on `partitions`, by default the latest."""
        found = self.judge(platform, self.chosen(platform, partitions))
        return [(claim, found[claim.name]) for claim in self.claims]


def _latest_of(name: str) -> Callable[[Platform], str | None]:
    return lambda platform: platform.lake.latest(name)


def _has(name: str) -> Callable[[Platform, str | None], bool]:
    def made(platform: Platform, partition: str | None) -> bool:
        return platform.lake.latest(name) is not None if partition is None else platform.lake.find(name, partition) is not None

    return made


def _nothing(platform: Platform) -> str | None:  # noqa: ARG001
    """For assets that have no partitions."""
    return None


def _merged(claims: Iterable[str], found: Iterable[Mapping[str, Sequence[Measure]]]) -> dict[str, Report]:
    """One report a claim from the measures of several partitions."""
    measures: dict[str, list[Measure]] = {claim: [] for claim in claims}
    for of_partition in found:
        for claim, more in of_partition.items():
            measures[claim] += more
    return {claim: model_quality.report_of(claim, of_claim) for claim, of_claim in measures.items()}


# -- ingestion --------------------------------------------------------------------------------------------------


def _landing(platform: Platform, partitions: Sequence[str]) -> dict[str, Report]:  # noqa: ARG001
    listing = platform.landing.ledger.read()
    rows = listing.rows()
    rows = rows.filter(pc.greater(rows["rows"], 0))
    files = listing.as_files(rows.sort_by([("last_ts", "descending")]).slice(0, NEWEST_FILES))
    try:
        sample = _sample_of_files(platform, files)
    except (pa.ArrowException, OSError):
        damaged = platform.landing.damaged(files)
        if not damaged:
            raise
        platform.landing.note_damaged(damaged)
        sample = _sample_of_files(platform, [file for file in files if file.path not in damaged])
    return {
        "landed_rows_are_events": validate(quality.landing_suite(platform.settings.events), sample),
        "quarantined_rows_are_few": model_quality.report_of("quarantined_rows_are_few", [_rejected(platform, listing)]),
        "landing_files_are_readable": model_quality.report_of("landing_files_are_readable", _left_out(platform)),
    }


def _rejected(platform: Platform, listing: Listing) -> Measure:
    """The share of rejected rows in what arrived on the last day that anything did, or in all, where that is little.

    Of a long history a day that was rejected as a whole is too small a part to be seen.
    """
    arrived = listing.table["arrived"]
    last = pc.greater(arrived, (pc.max(arrived).as_py() or 0) - DAY_MS)
    landed, rejected = (_count(listing, area, last) for area in (LANDING_AREA, QUARANTINE))
    if landed + rejected < platform.settings.quality.min_events:
        landed, rejected = (_count(listing, area) for area in (LANDING_AREA, QUARANTINE))
    told = f"{rejected} of {landed + rejected}"
    return Measure("now", "share of rows in quarantine", rejected / max(landed + rejected, 1), most=0.2, beside=told)


def _count(listing: Listing, area: str, where: pa.ChunkedArray | None = None) -> int:
    return int(pc.sum(listing.rows(area, where=where)["rows"], min_count=0).as_py())


def _sample_of_files(platform: Platform, files: Sequence[LandingFile]) -> "pd.DataFrame":
    dataset = ds.dataset([f.path for f in files], filesystem=platform.lake.fs, format="parquet") if files else None
    return quality.sample_rows(dataset, platform.settings.quality.sample_rows)


def _left_out(platform: Platform) -> list[Measure]:
    """The files of the landing zone that no hour is made from, each with the reason."""
    reasons = platform.landing.unreadable() | dict.fromkeys(platform.landing.strangers(), STRANGE)
    named = [Measure("now", path, 1, most=0, beside=why) for path, why in sorted(reasons.items())[:NEWEST_FILES]]
    return [Measure("now", "files that are left out", len(reasons), most=0), *named]


def _clicks(platform: Platform, hours: Sequence[str]) -> dict[str, Report]:
    settings = platform.settings
    # Older hours reach no model; those that a day's window needs are judged by `window_is_sound`.
    hours = sorted(hours)[-24 * settings.interactions.window_days :]
    found = judge(Profiles(platform.lake, settings.quality), hours)
    rows = quality.sample_of(platform.lake, CLICKS_HOURLY, hours, settings.quality.sample_rows)
    return {**found, "rows_are_whole_events": validate(quality.clicks_suite(settings.events), rows)}


def _catalogue(platform: Platform, partitions: Sequence[str], accepted: bool = False) -> dict[str, Report]:  # noqa: ARG001
    rows = quality.sample_of(platform.lake, CATALOG_TABLE, [CATALOG_KEY], platform.settings.quality.sample_rows)
    report = validate(quality.catalogue_suite(), rows)
    return {report.claim: report, **judge_catalogue(platform.lake, report, accepted)}


def accept_catalogue(platform: Platform) -> None:
    """A person's word that the catalogue is as it should be; later ones are held against it."""
    _catalogue(platform, (), accepted=True)


LANDING = Group(
    "clickstream_landing",
    (
        Claim("landed_rows_are_events", "Rows that landed last can be events of schema v1.", warning=True),
        Claim("quarantined_rows_are_few", "At most a fifth of what arrived last was rejected.", warning=True),
        Claim("landing_files_are_readable", "Every file of the landing zone is one that hours are made from.", warning=True),
    ),
    _landing,
    _nothing,
    lambda platform, _: platform.landing.ledger.version() > 0,
)
CLICKS = Group(
    CLICKS_HOURLY,
    (
        Claim("event_ids_are_unique", "No event is counted twice within its hour."),
        Claim("events_lie_in_their_hour", "The time of every event is inside its partition."),
        Claim("rows_are_whole_events", "Every row has its ids, a known type, a time and a session."),
        Claim("events_are_not_repeated", "Hardly an event occurs again in its hour, or as a copy a day later."),
        Claim("volume_is_as_usual", "There are about as many events as in the same hour of past weeks."),
        Claim("users_are_many", "No single user makes most of the events."),
        Claim("event_types_are_as_usual", "Each event type has about its usual share of the last 24 hours."),
        Claim("prices_are_as_usual", "The median value of events is about the usual one."),
        Claim("categories_are_all_there", "No category that usually has events has lost them."),
        Claim("hours_lie_in_their_time_zone", "The curve of the day is not shifted against the days before."),
        Claim("items_are_in_the_catalogue", "Nearly all events are about items of the catalogue.", warning=True),
    ),
    _clicks,
    _latest_of(CLICKS_HOURLY),
    _has(CLICKS_HOURLY),
)
CATALOGUE = Group(
    CATALOG_TABLE,
    (
        Claim("catalogue_rows_are_items", "Every row is an item with an own id, a price that can be paid.", blocking=True),
        Claim("catalogue_size_is_as_usual", "The catalogue has not lost its items.", blocking=True),
        Claim("catalogue_prices_are_as_usual", "The median price is about that of the last sound one.", blocking=True),
        Claim("catalogue_categories_are_all_there", "No first-level category has lost its items.", blocking=True),
    ),
    _catalogue,
    _nothing,
    lambda platform, _: platform.lake.find(CATALOG_TABLE, CATALOG_KEY) is not None,
)


# -- features ---------------------------------------------------------------------------------------------------


def _window(platform: Platform, days: Sequence[str]) -> list[str]:
    ends = [key_start_ms(day) + DAY_MS for day in days]
    span = platform.settings.interactions.window_days * DAY_MS
    return hour_keys(min(ends) - span, max(ends)) if ends else []


def _interactions(platform: Platform, days: Sequence[str]) -> dict[str, Report]:
    settings, hours = platform.settings, _window(platform, days)
    profiles = Profiles(platform.lake, settings.quality)
    rows = quality.samples_of(platform.lake, INTERACTIONS, days, settings.quality.sample_rows)
    missing = dict.fromkeys(missing_hours(profiles, hours), "was never made; materialize it")
    weights = [w for day in days for w in model_quality.weight_measures(platform.lake, day)]
    return {
        "weights_are_positive_and_finite": model_quality.report_of("weights_are_positive_and_finite", weights),
        "pairs_are_whole_and_single": validate(quality.interactions_suite(), rows),
        "hours_are_all_there": window_report("hours_are_all_there", missing, len(hours)),
        "window_is_sound": window_report("window_is_sound", unsound_hours(profiles, hours), len(hours)),
    }


FEATURES = Group(
    INTERACTIONS,
    (
        Claim("weights_are_positive_and_finite", "Every weight is a finite number above zero: it can be fitted.", True),
        Claim("pairs_are_whole_and_single", "Every row is one user and one item, with counts and ordered times.", True),
        Claim("hours_are_all_there", "No hour of the window is missing after the first that was made.", True),
        Claim("window_is_sound", "Every hour of the window passed its checks, or a person accepted it.", True),
    ),
    _interactions,
    _latest_of(INTERACTIONS),
    _has(INTERACTIONS),
)


def _rows_group(name: str, suite: Callable[[Platform], quality.Suite], claim: Claim) -> Group:
    """A group of one suite over a sample of the rows of a daily table."""

    def run(platform: Platform, days: Sequence[str]) -> dict[str, Report]:
        chosen = suite(platform)
        columns = sorted({c for e in chosen.expectations for c in e.columns})
        dataset = platform.lake.dataset(name, days, missing_ok=True)
        report = validate(chosen, quality.sample_rows(dataset, platform.settings.quality.sample_rows, columns))
        empty = [day for day in days if (part := platform.lake.find(name, day)) is not None and not part.rows]
        if empty:
            found = Finding(f"every day has rows, which {', '.join(empty)} lacks", False, len(empty))
            report = replace(report, findings=(*report.findings, found))
        return {claim.name: report}

    return Group(name, (claim,), run, _latest_of(name), _has(name))


USER_FEATURES = _rows_group(
    "user_features",
    lambda _: quality.user_features_suite(),
    Claim("user_features_are_in_range", "Counts of users' events are there and are windows of one another.", warning=True),
)
ITEM_FEATURES = _rows_group(
    "item_features",
    lambda _: quality.item_features_suite(),
    Claim("item_features_are_in_range", "Counts of items' events are there and are windows of one another.", warning=True),
)
EXAMPLES = _rows_group(
    "training_examples",
    lambda platform: quality.training_examples_suite(platform.settings.events),
    Claim("examples_are_in_range", "Every example has a weight, a moment and features that can be learned from.", True),
)


# -- models -----------------------------------------------------------------------------------------------------


def _factors(platform: Platform, days: Sequence[str]) -> dict[str, Report]:
    return _merged([c.name for c in FACTORS.claims], (model_quality.factor_measures(platform.lake, day) for day in days))


def _tower(platform: Platform, days: Sequence[str]) -> dict[str, Report]:
    return _merged([c.name for c in TOWER.claims], (model_quality.tower_measures(platform.lake, day) for day in days))


def _index(platform: Platform, days: Sequence[str]) -> dict[str, Report]:
    target = platform.settings.index.recall_target
    found = (model_quality.index_measures(platform.lake, day, target) for day in days)
    return _merged([c.name for c in INDEX.claims], found)


FACTORS = Group(
    ALS_FACTORS,
    (
        Claim("factors_are_finite_and_not_all_zero", "Users and items have usable vectors.", blocking=True),
        Claim("lengths_are_in_range", "No vector is out of all proportion to the others.", warning=True),
        Claim("items_are_covered", "Most items of the window have a factor.", warning=True),
    ),
    _factors,
    _latest_of(ALS_FACTORS),
    _has(ALS_FACTORS),
)
TOWER = Group(
    "two_tower",
    (
        Claim("tower_vectors_are_finite", "Items have usable vectors, where the day has such a model.", warning=True),
        Claim("tower_directions_have_length_one", "Inner products are cosines, and biases if wanted.", warning=True),
    ),
    _tower,
    _latest_of("two_tower"),
    _has("two_tower"),
)
INDEX = Group(
    ITEM_INDEX,
    (
        Claim("recall_reaches_its_target", "recall@50 of each index is at least the target.", warning=True),
        Claim("index_is_of_the_same_factors", "The index holds the vectors of the day's factors.", blocking=True),
    ),
    _index,
    _latest_of(ITEM_INDEX),
    _has(ITEM_INDEX),
)


# -- serving ----------------------------------------------------------------------------------------------------


def _release(platform: Platform, days: Sequence[str]) -> dict[str, Report]:
    measures: dict[str, list[Measure]] = {claim.name: [] for claim in RELEASE.claims}
    newest: dict[str, Manifest] = {}
    for name in platform.releases.names():
        try:
            manifest = platform.releases.manifest(name)
        except ReleaseError as error:
            if not days or name[: len(days[0])] in days:
                measures["releases_are_whole"].append(Measure(str(error), "verifies (1: yes)", 0, least=1))
            continue
        if manifest.day not in newest or manifest.created_at > newest[manifest.day].created_at:
            newest[manifest.day] = manifest
    for day in set(days) - set(newest):
        measures["releases_are_whole"].append(Measure(f"no release of {day}", "verifies (1: yes)", 0, least=1))
    for manifest in [newest[day] for day in (days or sorted(newest)[-1:]) if day in newest]:
        try:
            _, snapshot = platform.releases.load(manifest.release_id)
        except ReleaseError as error:
            measures["releases_are_whole"].append(Measure(str(error), "verifies (1: yes)", 0, least=1))
            continue
        measures["releases_are_whole"].append(Measure(manifest.release_id, "verifies (1: yes)", 1, least=1))
        users = model_quality.records_of(platform.lake, manifest.day, snapshot.als_version)
        for claim, more in model_quality.release_measures(snapshot, users).items():
            measures[claim] += more
    return {claim: model_quality.report_of(claim, of_claim) for claim, of_claim in measures.items()}


def _champion(platform: Platform) -> Measure:
    try:
        champion = platform.releases.champion()
        if champion is None:
            return Measure("no release has been promoted", "champion", 1)
        platform.releases.load(champion.release_id, champion.manifest_sha256)
    except ReleaseError as error:
        return Measure(str(error), "champion verifies (1: yes)", 0, least=1)
    return Measure(champion.release_id, "champion verifies (1: yes)", 1, least=1)


def _has_champion(platform: Platform, _: str | None) -> bool:
    try:
        return platform.releases.champion() is not None
    except ReleaseError:
        # A pointer that can't be read is there, and does not verify.
        return True


def _caches(platform: Platform, hours: Sequence[str]) -> dict[str, Report]:
    champion = platform.releases.champion()
    found = []
    newest = platform.lake.latest(ACTIVE_USERS)
    for hour in hours:
        part = platform.lake.find(ACTIVE_USERS, hour)
        if part is not None and champion is not None and hour == newest:
            rows = quality.sample_of(platform.lake, ACTIVE_USERS, [hour], CACHE_SAMPLE)
            with platform.redis() as redis:
                users = rows[USER_ID].tolist() if part.rows else []
                found.append(model_quality.cache_measures(redis, hour, users, part.rows, champion.release_id))
    return _merged([c.name for c in CACHES.claims], found)


RELEASE = Group(
    "release",
    (
        Claim("releases_are_whole", "The day's release is complete, and its files are what its manifest says.", True),
        Claim("indexes_are_of_the_release", "The release's indexes hold its own vectors, all of them finite.", True),
        Claim("users_all_have_an_answer", "Sampled users, and one that nothing is known of, get items.", True),
    ),
    _release,
    _nothing,
    lambda platform, day: any(name.startswith(f"{day or ''}") for name in platform.releases.names()),
)
CHAMPION = Group(
    "champion",
    (Claim("champion_verifies", "The release that serving reads is complete and unchanged."),),
    lambda platform, _: {"champion_verifies": model_quality.report_of("champion_verifies", [_champion(platform)])},
    _nothing,
    _has_champion,
)
CACHES = Group(
    "rec_cache",
    (
        Claim("active_users_have_an_answer", "Sampled active users have a cached answer with items."),
        Claim("caches_are_of_the_champion", "Every sampled answer names the release that is served."),
        Claim("caches_are_as_many_as_active_users", "There is an answer for nearly every active user.", warning=True),
    ),
    _caches,
    _latest_of(ACTIVE_USERS),
    _has(ACTIVE_USERS),
)

ELSEWHERE = {
    "offsets_have_no_gap": CLICKS_HOURLY,
    "examples_see_only_the_past": "training_examples",
    "two_tower_is_trained": "two_tower",
    "challenger_beats_champion": "release",
}
"""Checks that need the brokers, the clicks or the run itself, and the asset whose runs make them."""

GROUPS = (
    LANDING,
    CLICKS,
    CATALOGUE,
    FEATURES,
    USER_FEATURES,
    ITEM_FEATURES,
    EXAMPLES,
    FACTORS,
    TOWER,
    INDEX,
    RELEASE,
    CHAMPION,
    CACHES,
)


# -- the factory ------------------------------------------------------------------------------------------------


def asset_checks(assets: Iterable[dg.AssetKey]) -> list[dg.AssetChecksDefinition]:
    """The checks of those assets that the code location has."""
    there = {key.to_user_string() for key in assets}
    return [_checks_of(group) for group in GROUPS if group.asset in there]


def _checks_of(group: Group) -> dg.AssetChecksDefinition:
    specs = [dg.AssetCheckSpec(c.name, asset=group.asset, blocking=c.blocking, description=c.description) for c in group.claims]

    @dg.multi_asset_check(specs=specs, name=f"{group.asset}_quality", can_subset=True)
    def checks(context: dg.AssetCheckExecutionContext, platform: PlatformResource) -> Iterator[dg.AssetCheckResult]:
        wanted = {key.name for key in context.selected_asset_check_keys}
        for claim, report in group.reports(platform, _partitions(context)):
            if claim.name in wanted:
                if not report.passed:
                    context.log.warning(f"{claim.name}: {report.reason}")
                yield result_of(group, claim, report)

    return checks


def _partitions(context: dg.AssetCheckExecutionContext) -> list[str]:
    return list(context.partition_keys) if context.has_partition_key or context.has_partition_key_range else []


def result_of(group: Group, claim: Claim, report: Report) -> dg.AssetCheckResult:
    """A report as the result of an asset check: what was looked at, what each expectation found, rows that fail."""
    severity = dg.AssetCheckSeverity.WARN if claim.warning else dg.AssetCheckSeverity.ERROR
    metadata: dict[str, dg.MetadataValue | str | int] = {"rows judged": report.rows}
    if not report.made:
        metadata["not made"] = "there was nothing to judge"
    if report.findings:
        findings = [["yes" if f.passed else "NO", f.expectation, f.unexpected] for f in report.findings]
        metadata["report"] = table(["holds", "expectation", "unexpected rows"], findings)
    if not report.passed:
        metadata["reason"] = report.reason
        if report.sample:
            shown = [name for name in report.sample[0] if name != USER_ID]  # Dagster's store keeps no user
            metadata["failing rows"] = table(shown, [[row[name] for name in shown] for row in report.sample])
    return dg.AssetCheckResult(
        check_name=claim.name, asset_key=group.asset, passed=report.passed, severity=severity, metadata=metadata
    )
