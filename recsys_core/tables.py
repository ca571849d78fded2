"""The Spark tables: `clicks_hourly`, `interactions` and `online_features`. A range of partitions is one Spark job."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from recsys_core.events import (
    COUNTRY,
    DAY_MS,
    DEVICE,
    EARLIEST_TS,
    EVENT_ID,
    EVENT_TYPE,
    HOLDS_NUL,
    HOUR_MS,
    ITEM_ID,
    MINUTE_MS,
    NAMES,
    NEEDED,
    NOT_FINITE,
    RECOMMENDATION_ID,
    SESSION_ID,
    TS,
    USER_ID,
    VALUE,
    hour_keys,
    key_start_ms,
)
from recsys_core.features import USER_FEATURES
from recsys_core.lake import Lake, Partition
from recsys_core.landing import Landing, what_was_read
from recsys_core.ledger import LandingFile
from recsys_core.settings import EventSettings, InteractionSettings
from recsys_core.spark import stage_progress

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

log = logging.getLogger(__name__)

CLICKS_HOURLY = "clicks_hourly"
CLICKS_QUARANTINE = "clicks_quarantine"
INTERACTIONS = "interactions"
ONLINE_FEATURES = "online_features"
ACTIVE_USERS = "active_users"

SOURCE_SESSION_ID = "source_session_id"
REASON = "reason"

SMALLEST_WEIGHT = 1e-30
"""A pair stays, and stays out of what is recommended again, however old it is."""

LANDING_DDL = (
    "event_id string, user_id string, item_id string, event_type string, ts bigint, session_id string, device string, "
    "country string, value double, recommendation_id string"
)


def build_clicks_hourly(
    spark: SparkSession, lake: Lake, landing: Landing, hours: Sequence[str], settings: EventSettings
) -> list[Partition]:
    """Replace the partitions `hours` of `clicks_hourly` from the landing zone.

    Rows are events of schema v1, each `event_id` once (its earliest occurrence), `session_id` made from the user's
    activity (the source's own is kept as `source_session_id`), sorted by user and time. Rows that can't be events go
    to `clicks_quarantine` of the same hour, with the reason.

    Sessions and duplicates are followed `lookback_hours` back over the borders of the hours, from each event's own hour,
    so that the result does not depend on which hours are made together. An event whose session began earlier than that
    is in a session of its hour; an occurrence of an `event_id` that is earlier than that does not hide a later one.
    """
    start, end = key_start_ms(min(hours)), key_start_ms(max(hours)) + HOUR_MS
    from_ms = start - settings.lookback_hours * HOUR_MS - settings.session_gap_minutes * MINUTE_MS
    without: set[str] = set()
    while True:
        listing = landing.ledger.read()
        files = [file for file in listing.covering(from_ms, end) if file.path not in without]
        said = dict.fromkeys(hours, what_was_read(listing.version, map(lake.below, without)))
        if not files:
            return publish_empty(lake, CLICKS_HOURLY, hours, said)
        try:
            with stage_progress(spark, f"clicks_hourly ({span(hours)})"):
                return _build_clicks(spark, lake, files, said, (from_ms, start, end), hours, settings)
        except Exception:
            damaged = landing.damaged(files)
            if not damaged:
                raise
            counting = {file.path for file in landing.ledger.read().covering(from_ms, end)}
            lost = {path: reason for path, reason in damaged.items() if path in counting}
            log.exception("clicks_hourly is made again, without %d landing files that can't be read", len(lost))
            landing.note_damaged(lost, hours)
            without |= lost.keys()


def _build_clicks(
    spark: SparkSession,
    lake: Lake,
    files: Sequence[LandingFile],
    said: Mapping[str, dict[str, Any]],
    times: tuple[int, int, int],
    hours: Sequence[str],
    settings: EventSettings,
) -> list[Partition]:
    from pyspark.sql import Observation
    from pyspark.sql import functions as F

    from_ms, start, end = times
    paths = [lake.url(file.path) for file in files]
    raw = spark.read.schema(LANDING_DDL).parquet(*paths).where(F.col(TS).between(from_ms, end - 1))
    seen = Observation()
    bad = F.col(REASON).isNotNull() & (F.col(TS) >= start)
    judged = raw.withColumn(REASON, _reason(settings)).observe(seen, F.count_if(bad).alias("rejected"))
    events = with_sessions(judged.where(F.col(REASON).isNull()), settings.session_gap_minutes, settings.lookback_hours)
    wanted = distinct_events(events, settings.lookback_hours).where(F.col(TS) >= start).withColumn("hour", _hour())
    staged = lake.stage(CLICKS_HOURLY)
    write_staged(wanted, lake.url(staged), "hour", [USER_ID, TS, EVENT_ID])
    # Spark prunes a plan that turns out to give no row, and what it would have observed with it.
    maybe = not _folders(lake, staged) or seen.get["rejected"]
    rejected = judged.where(bad).withColumn("hour", _hour()) if maybe else None
    _quarantine(spark, lake, rejected, hours)
    return publish(spark, lake, CLICKS_HOURLY, staged, "hour", hours, said)


def _quarantine(spark: SparkSession, lake: Lake, rejected: DataFrame | None, hours: Sequence[str]) -> None:
    """Replace the partitions of `clicks_quarantine` that have rows now or had some before."""
    staged = lake.stage(CLICKS_QUARANTINE)
    if rejected is not None:
        write_staged(rejected, lake.url(staged), "hour", [REASON, TS])
    touched = {name.partition("=")[2] for name in _folders(lake, staged)} | set(lake.keys(CLICKS_QUARANTINE))
    publish(spark, lake, CLICKS_QUARANTINE, staged, "hour", sorted(touched & set(hours)))


def distinct_events(events: DataFrame, lookback_hours: int) -> DataFrame:
    """Each `event_id` once: its earliest row, the smallest by content where times are equal.

    A row is left out when the lookback of its hour holds an earlier one.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    content = [name for name in events.columns if name not in (EVENT_ID, TS)]
    earlier = F.lag(TS).over(Window.partitionBy(EVENT_ID).orderBy(TS, *content))
    marked = events.withColumn("_earlier", earlier)
    return marked.where(F.col("_earlier").isNull() | (F.col("_earlier") < _lookback_start(lookback_hours))).drop("_earlier")


def with_sessions(events: DataFrame, gap_minutes: int, lookback_hours: int) -> DataFrame:
    """Add `session_id`: the user's events with pauses of at most `gap_minutes` share one.

    The id is made of the user and the time of the session's first event, at the earliest the start of the lookback of
    the event's hour, so it is the same wherever it is computed.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    by_time = Window.partitionBy(USER_ID).orderBy(TS)
    pause = F.col(TS) - F.lag(TS).over(by_time)
    starts = F.when(pause.isNull() | (pause > gap_minutes * MINUTE_MS), F.col(TS))
    last_start = F.last(starts, ignorenulls=True).over(by_time.rowsBetween(Window.unboundedPreceding, Window.currentRow))
    first = F.greatest(last_start, _lookback_start(lookback_hours))
    return events.select(
        EVENT_ID,
        USER_ID,
        ITEM_ID,
        EVENT_TYPE,
        TS,
        F.hex(F.xxhash64(F.col(USER_ID), first)).alias(SESSION_ID),
        F.col(SESSION_ID).alias(SOURCE_SESSION_ID),
        DEVICE,
        COUNTRY,
        VALUE,
        RECOMMENDATION_ID,
    )


def _lookback_start(hours: int) -> Column:
    """First millisecond of the lookback of an event's hour."""
    from pyspark.sql import functions as F

    return F.col(TS) - F.col(TS) % HOUR_MS - hours * HOUR_MS


def _reason(settings: EventSettings) -> Column:
    """Why a landed row can't be an event, null where it can: what `events.invalid_reasons` says, for Spark."""
    from pyspark.sql import functions as F

    rules = []
    limit = settings.max_id_bytes
    for name in NAMES:
        if name in NEEDED:
            rules.append((F.coalesce(F.octet_length(name), F.lit(0)) == 0, f"missing {name}"))
        rules.append((F.octet_length(name) > limit, f"{name} longer than {limit} bytes"))
        rules.append((F.col(name).contains("\0"), HOLDS_NUL.format(name)))
    known = F.col(EVENT_TYPE).isin(sorted(settings.weights))
    rules.append((~F.coalesce(known, F.lit(False)), "unknown event_type"))
    rules.append((F.col(TS) < EARLIEST_TS, "ts before 1990: wrong unit or broken clock"))
    rules.append((F.isnan(VALUE) | (F.abs(VALUE) == float("inf")), NOT_FINITE))
    return F.coalesce(*(F.when(applies, text) for applies, text in rules))


def build_interactions(
    spark: SparkSession, lake: Lake, days: Sequence[str], events: EventSettings, settings: InteractionSettings
) -> list[Partition]:
    """Replace the partitions `days` of `interactions`: one row a user–item pair of the window that ends with the day.

    Columns: user_id, item_id, `weight` (sum over events of type weight × 2^(-age/half-life), age in days at the end of
    the day), `n_events`, `first_ts`, `last_ts` (ms). The window is `window_days` long; hours that were never made
    count as empty.
    """
    from pyspark.sql import functions as F

    ends = {day: key_start_ms(day) + DAY_MS for day in days}
    first = min(ends.values()) - settings.window_days * DAY_MS
    paths = lake.files(CLICKS_HOURLY, hour_keys(first, max(ends.values())), missing_ok=True)
    if not paths:
        return publish_empty(lake, INTERACTIONS, days)
    with stage_progress(spark, f"interactions ({span(days)})"):
        clicks = spark.read.parquet(*map(lake.url, paths)).select(USER_ID, ITEM_ID, EVENT_TYPE, TS)
        borders = spark.createDataFrame(pa.table({"day": list(ends), "end": list(ends.values())}))
        age_ms = F.col("end") - F.col(TS)
        windowed = clicks.join(F.broadcast(borders), (age_ms > 0) & (age_ms <= settings.window_days * DAY_MS))
        weights = F.create_map(*[F.lit(part) for pair in sorted(events.weights.items()) for part in pair])
        weight = weights[F.col(EVENT_TYPE)] * F.pow(F.lit(2.0), -age_ms / (settings.half_life_days * DAY_MS))
        rows = windowed.groupBy("day", USER_ID, ITEM_ID).agg(
            F.greatest(F.sum(weight), F.lit(SMALLEST_WEIGHT)).cast("float").alias("weight"),
            F.count("*").cast("int").alias("n_events"),
            F.min(TS).alias("first_ts"),
            F.max(TS).alias("last_ts"),
        )
        staged = lake.stage(INTERACTIONS)
        write_staged(rows, lake.url(staged), "day", [USER_ID, ITEM_ID])
        return publish(spark, lake, INTERACTIONS, staged, "day", days)


def build_online_features(spark: SparkSession, lake: Lake, day: str, user_factors: str) -> Partition:
    """Replace partition `day` of `online_features`: one row a user of the window, as the online record wants it.

    Columns: user_id, `last`, `last_ts`, `seen` and `features` as in `user_features` of the day, `factor` (from the lake
    table `user_factors`, null for a user that ALS does not know).
    """
    from pyspark.sql import functions as F

    paths = lake.files(USER_FEATURES, [day])
    if not paths:
        return publish_empty(lake, ONLINE_FEATURES, [day])[0]
    users = spark.read.parquet(*map(lake.url, paths)).select(USER_ID, "last", "last_ts", "seen", "features")
    factors = spark.read.parquet(*map(lake.url, lake.files(user_factors, [day])))
    with stage_progress(spark, f"online_features ({day})"):
        rows = users.join(factors.select(F.col("id").alias(USER_ID), "factor"), USER_ID, "left").withColumn("day", F.lit(day))
        staged = lake.stage(ONLINE_FEATURES)
        write_staged(rows, lake.url(staged), "day", [USER_ID])
        return publish(spark, lake, ONLINE_FEATURES, staged, "day", [day])[0]


def build_active_users(spark: SparkSession, lake: Lake, hour: str, active_hours: int) -> Partition:
    """Replace partition `hour` of `active_users`: user_id of everyone with an event in the `active_hours` up to its end."""
    from pyspark.sql import functions as F

    end = key_start_ms(hour) + HOUR_MS
    paths = lake.files(CLICKS_HOURLY, hour_keys(end - active_hours * HOUR_MS, end), missing_ok=True)
    if not paths:
        return publish_empty(lake, ACTIVE_USERS, [hour])[0]
    with stage_progress(spark, f"active users ({hour})"):
        users = spark.read.parquet(*map(lake.url, paths)).select(USER_ID).distinct().withColumn("hour", F.lit(hour))
        staged = lake.stage(ACTIVE_USERS)
        write_staged(users, lake.url(staged), "hour", [USER_ID])
        return publish(spark, lake, ACTIVE_USERS, staged, "hour", [hour])[0]


def _hour() -> Column:
    from pyspark.sql import functions as F

    return F.date_format(F.timestamp_millis(F.col(TS)), "yyyy-MM-dd'T'HH")


def write_staged(rows: DataFrame, url: str, partition: str, order: Sequence[str | Column]) -> None:
    """Write into `<partition>=<key>` folders; the rebalance splits large partitions over tasks and joins small ones."""
    rows.hint("rebalance", partition).sortWithinPartitions(partition, *order).write.partitionBy(partition).parquet(
        url, mode="append"
    )


def publish(
    spark: SparkSession,
    lake: Lake,
    table: str,
    staged: str,
    column: str,
    keys: Sequence[str],
    extras: Mapping[str, dict[str, Any]] | None = None,
) -> list[Partition]:
    """Point the partitions `keys` at what was staged, with row counts and data versions read back from it, and `extras` by key.

    The data version is the exclusive or of the rows' 64-bit hashes: equal rows give an equal version in any order.
    """
    from pyspark.sql import functions as F

    contents: dict[str, tuple[int, str]] = dict.fromkeys(keys, (0, "empty"))
    if _folders(lake, staged):
        rows = spark.read.parquet(lake.url(staged))
        names = [name for name in rows.columns if name != column]
        found = rows.groupBy(column).agg(F.count("*").alias("rows"), F.bit_xor(F.xxhash64(*names)).alias("version"))
        for row in found.collect():
            if row[column] in contents:
                contents[row[column]] = (row["rows"], f"{row['version'] & 0xFFFFFFFFFFFFFFFF:016x}")
    return lake.publish_staged(table, staged, column, contents, extras)


def _folders(lake: Lake, staged: str) -> list[str]:
    """Names of the `<column>=<key>` folders that Spark made."""
    lake.fs.invalidate_cache()
    if not lake.fs.exists(staged):
        return []
    names = (path.rstrip("/").rsplit("/", 1)[-1] for path in lake.fs.ls(staged, detail=False))
    return [name for name in names if "=" in name]


def publish_empty(
    lake: Lake, table: str, keys: Sequence[str], extras: Mapping[str, dict[str, Any]] | None = None
) -> list[Partition]:
    return lake.publish_staged(table, lake.stage(table), "none", dict.fromkeys(keys, (0, "empty")), extras)


def span(keys: Sequence[str]) -> str:
    return min(keys) if len(set(keys)) == 1 else f"{min(keys)} … {max(keys)}"
