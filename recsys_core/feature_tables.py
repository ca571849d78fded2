"""The Spark tables `user_features`, `item_features` and `training_examples`. A range of days is one Spark job.

What a feature means is in features.py. Spark sorts rows by user or item and time and hands them on in Arrow batches; a
worker holds the state of one user or item at a time. The rows of a table are the states at moments: an event's own time
for an example, the end of the day for a user or an item.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import TYPE_CHECKING

import pyarrow as pa

from recsys_core.catalog import CATALOG_KEY, CATALOG_TABLE
from recsys_core.events import COUNTRY, DAY_MS, DEVICE, EVENT_ID, EVENT_TYPE, ITEM_ID, TS, USER_ID, hour_keys, key_start_ms
from recsys_core.features import (
    CATEGORY,
    ITEM_FEATURES,
    PRICE,
    TRAINING_EXAMPLES,
    USER_FEATURES,
    WANTED,
    WEIGHT,
    user_examples,
    user_summaries,
    with_item_features,
)
from recsys_core.lake import Lake, Partition
from recsys_core.settings import Settings
from recsys_core.spark import stage_progress
from recsys_core.tables import CLICKS_HOURLY, publish, publish_empty, span, write_staged

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

    Batches = Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]

CLICKS_DDL = "event_id string, user_id string, item_id string, event_type string, ts bigint, device string, country string"
CATALOG_DDL = "item_id string, title string, category string, price double"
COUNTS_DDL = "{0}_events_1d int, {0}_events_7d int, {0}_events_window int"
ITEM_DDL = f"price_bucket tinyint, first_ts bigint, item_age_days float, {COUNTS_DDL.format('item')}"
USER_DDL = f"{COUNTS_DDL.format('user')}, user_recency_hours float, user_category string"
EXAMPLE_DDL = f"history array<string>, hour tinyint, weekday tinyint, {USER_DDL}"
SUMMARY_DDL = (
    f"history array<string>, {USER_DDL}, last array<struct<item_id: string, event_type: string, ts: bigint>>, "
    "last_ts bigint, device string, country string, seen array<string>, features string"
)

USER_COLUMNS = ("user_events_1d", "user_events_7d", "user_events_window", "user_recency_hours", "user_category")
ITEM_COLUMNS = (CATEGORY, "price_bucket", "item_age_days", "item_events_1d", "item_events_7d", "item_events_window")
EXAMPLE_COLUMNS = (
    *(USER_ID, ITEM_ID, EVENT_TYPE, TS, WEIGHT, "history", "hour", "weekday", DEVICE, COUNTRY),
    *USER_COLUMNS,
    *ITEM_COLUMNS,
)

DRAW = "draw"
DRAWS = 1 << 53
"""A draw is a hash of the event id, an integer in [0, DRAWS)."""


def build_training_examples(spark: SparkSession, lake: Lake, days: Sequence[str], settings: Settings) -> list[Partition]:
    """Replace the partitions `days` of `training_examples`: one row an event of the window that ends with the day.

    Columns: EXAMPLE_COLUMNS. Device and country are those of the event, category and price those of the catalogue as it
    is now, everything else is as of before the event. Features look a whole window back from each event, so that two
    windows are read. Rows are in the order of a hash, which is a shuffle of users, items and times. A window with more
    than `features.max_examples` events is sampled by a hash of the event id; features are made from all events.
    """
    from pyspark.sql import functions as F

    window_ms = settings.interactions.window_days * DAY_MS
    ends = _ends(days)
    source = Clicks.find(lake, min(ends.values()) - 2 * window_ms, max(ends.values()))
    if not source.paths:
        return publish_empty(lake, TRAINING_EXAMPLES, days)
    limits = {
        day: draw_limit(source.rows_between(end - window_ms, end), settings.features.max_examples) for day, end in ends.items()
    }
    with stage_progress(spark, f"training_examples ({span(days)})"):
        draw = F.xxhash64(EVENT_ID).bitwiseAND(F.lit(DRAWS - 1))
        asked = (F.col(TS) >= min(ends.values()) - window_ms) & (F.col(DRAW) < max(limits.values()))
        clicks = source.read(spark, settings).withColumn(DRAW, draw).withColumn(WANTED, asked)
        events = clicks.join(_catalog(spark, lake).drop("title"), ITEM_ID, "left")
        rows = _by_time(events, ITEM_ID, _item_stage(settings), ITEM_DDL)
        stage = partial(user_examples, window_days=settings.interactions.window_days, history=settings.features.history)
        rows = _by_time(rows, USER_ID, stage, EXAMPLE_DDL)
        borders = pa.table({"day": list(ends), "end": list(ends.values()), "limit": list(limits.values())})
        inside = (F.col(TS) < F.col("end")) & (F.col(TS) >= F.col("end") - window_ms) & (F.col(DRAW) < F.col("limit"))
        rows = rows.join(F.broadcast(spark.createDataFrame(borders)), inside)
        rows = rows.withColumn(WEIGHT, F.col(WEIGHT).cast("float")).select(*EXAMPLE_COLUMNS, "day")
        staged = lake.stage(TRAINING_EXAMPLES)
        # The rows are wide and spread over the tasks by user already: one more shuffle would cost more than it evens out.
        shuffled = rows.sortWithinPartitions("day", F.xxhash64(USER_ID, ITEM_ID, TS), EVENT_TYPE)
        shuffled.write.partitionBy("day").parquet(lake.url(staged), mode="append")
        return publish(spark, lake, TRAINING_EXAMPLES, staged, "day", days)


def build_user_features(spark: SparkSession, lake: Lake, days: Sequence[str], settings: Settings) -> list[Partition]:
    """Replace the partitions `days` of `user_features`: the users with an event in the window, as of the end of the day.

    Columns: user_id, `history` (distinct items, newest first), USER_COLUMNS, `last` (the last actions, newest first:
    item_id, event_type, ts), `last_ts` (ms), `device` and `country` (the latest known), `seen` (as `history`, at most
    `ranking.max_consumed`), `features` (what the online record holds of all this, see OnlineFeatures).
    """
    window_days = settings.interactions.window_days
    ends = _ends(days)
    source = Clicks.find(lake, min(ends.values()) - window_days * DAY_MS, max(ends.values()))
    if not source.paths:
        return publish_empty(lake, USER_FEATURES, days)
    with stage_progress(spark, f"user_features ({span(days)})"):
        clicks = source.read(spark, settings)
        categories = _catalog(spark, lake).select(ITEM_ID, CATEGORY)
        stage = partial(
            user_summaries,
            ends=sorted(ends.values()),
            window_days=window_days,
            history=settings.features.history,
            actions=settings.ranking.last_items,
            seen=settings.ranking.max_consumed,
        )
        rows = _by_time(clicks.join(categories, ITEM_ID, "left"), USER_ID, stage, SUMMARY_DDL, kept=(USER_ID, TS))
        return _replace(spark, lake, USER_FEATURES, _with_day(spark, rows, ends), [USER_ID], days)


def build_item_features(spark: SparkSession, lake: Lake, days: Sequence[str], settings: Settings) -> list[Partition]:
    """Replace the partitions `days` of `item_features`: items of the catalogue or with an event in the window.

    As of the end of the day. Columns: item_id, `title`, `price` (null where unknown or impossible), `first_ts` (ms, first
    event in the window, null without one), ITEM_COLUMNS.
    """
    from pyspark.sql import functions as F

    ends = _ends(days)
    source = Clicks.find(lake, min(ends.values()) - settings.interactions.window_days * DAY_MS, max(ends.values()))
    with stage_progress(spark, f"item_features ({span(days)})"):
        clicks = source.read(spark, settings).select(ITEM_ID, TS, WEIGHT).withColumn(WANTED, F.lit(False))
        catalog = _catalog(spark, lake).withColumn("listed", F.lit(True))
        items = clicks.select(ITEM_ID).distinct().join(catalog, ITEM_ID, "full")
        rows = _by_time(clicks.unionByName(_moments(spark, items, ends), True), ITEM_ID, _item_stage(settings), ITEM_DDL).where(
            F.col(WANTED) & (F.coalesce("listed", F.lit(False)) | (F.col("item_events_window") > 0))
        )
        price = F.when(F.col("price_bucket") >= 0, F.col(PRICE))
        named = _with_day(spark, rows, ends).withColumn(PRICE, price)
        named = named.select(ITEM_ID, "title", PRICE, "first_ts", *ITEM_COLUMNS, "day")
        return _replace(spark, lake, ITEM_FEATURES, named, [ITEM_ID], days)


def draw_limit(events: int, examples: int) -> int:
    """Events whose draw is below it are taken: all, or so few that more than `examples` come once in 30,000 times."""
    if events <= examples:
        return DRAWS
    return int(DRAWS * (examples - 4 * sqrt(examples)) / events)


@dataclass(frozen=True)
class Clicks:
    """The hours of `clicks_hourly` that exist in a span of time; those that were never made count as empty."""

    rows: dict[int, int]
    paths: tuple[str, ...]

    @classmethod
    def find(cls, lake: Lake, start: int, end: int) -> Clicks:
        found = lake.find_all(CLICKS_HOURLY, hour_keys(start, end))
        rows = {key_start_ms(key): part.rows for key, part in found.items()}
        paths = [lake.path(CLICKS_HOURLY, p.key, p.version, name) for p in found.values() for name in p.files]
        return cls(rows, tuple(map(lake.url, paths)))

    def rows_between(self, start: int, end: int) -> int:
        return sum(rows for hour, rows in self.rows.items() if start <= hour < end)

    def read(self, spark: SparkSession, settings: Settings) -> DataFrame:
        """The events with their weight by type (double). A type without a weight is no event any more."""
        from pyspark.sql import functions as F

        reader = spark.read.schema(CLICKS_DDL)
        clicks = reader.parquet(*self.paths) if self.paths else spark.createDataFrame([], CLICKS_DDL)
        weights = F.create_map(*[F.lit(part) for pair in sorted(settings.events.weights.items()) for part in pair])
        return clicks.withColumn(WEIGHT, weights[F.col(EVENT_TYPE)]).where(F.col(WEIGHT).isNotNull())


def _catalog(spark: SparkSession, lake: Lake) -> DataFrame:
    """The catalogue as it is now, without rows when none was ever written; an empty category is none."""
    from pyspark.sql import functions as F

    paths = lake.files(CATALOG_TABLE, [CATALOG_KEY], missing_ok=True)
    reader = spark.read.schema(CATALOG_DDL)
    catalog = reader.parquet(*map(lake.url, paths)) if paths else spark.createDataFrame([], CATALOG_DDL)
    return catalog.withColumn(CATEGORY, F.when(F.col(CATEGORY) != "", F.col(CATEGORY)))


def _ends(days: Sequence[str]) -> dict[str, int]:
    return {day: key_start_ms(day) + DAY_MS for day in days}


def _moments(spark: SparkSession, items: DataFrame, ends: dict[str, int]) -> DataFrame:
    """A row without a weight for each item at the end of each day: what is asked for."""
    from pyspark.sql import functions as F

    times = spark.createDataFrame(pa.table({TS: list(ends.values())}))
    return items.crossJoin(F.broadcast(times)).withColumn(WANTED, F.lit(True))


def _with_day(spark: SparkSession, rows: DataFrame, ends: dict[str, int]) -> DataFrame:
    from pyspark.sql import functions as F

    days = spark.createDataFrame(pa.table({"day": list(ends), TS: list(ends.values())}))
    return rows.join(F.broadcast(days), TS).drop(TS)


def _item_stage(settings: Settings) -> Batches:
    return partial(with_item_features, window_days=settings.interactions.window_days)


def _by_time(rows: DataFrame, key: str, stage: Batches, added: str, kept: Sequence[str] | None = None) -> DataFrame:
    """Rows of each value of `key` in one task, in the order of time, through `stage`, which adds columns.

    Of one millisecond the item that sorts first is taken for the newest, as in the online record.
    """
    from pyspark.sql import functions as F
    from pyspark.sql.types import StructType

    order: list[str | Column] = [key, TS, *(F.desc(name) for name in (ITEM_ID, EVENT_TYPE) if key == USER_ID)]
    fields = [rows.schema[name] for name in kept or rows.columns]
    schema = StructType(fields + list(StructType.fromDDL(added)))  # type: ignore[call-overload]
    return rows.repartition(key).sortWithinPartitions(*order).mapInArrow(stage, schema)


def _replace(
    spark: SparkSession, lake: Lake, table: str, rows: DataFrame, order: Sequence[str | Column], days: Sequence[str]
) -> list[Partition]:
    staged = lake.stage(table)
    write_staged(rows, lake.url(staged), "day", order)
    return publish(spark, lake, table, staged, "day", days)
