"""Ingestion: the topic, what landed, the catalogue, and the clickstream table by hour."""

from collections import Counter
from collections.abc import Iterator, Sequence

import dagster as dg
import pyarrow.compute as pc

from recsys_assets.partitions import hourly
from recsys_assets.reports import schema, table, tell_by_partition
from recsys_assets.resources import PlatformResource
from recsys_core.catalog import CATALOG_KEY, CATALOG_SCHEMA, CATALOG_TABLE
from recsys_core.events import EVENT_SCHEMA, hour_key
from recsys_core.lake import Partition
from recsys_core.landing import STRANGE
from recsys_core.ledger import LANDING, QUARANTINE
from recsys_core.tables import CLICKS_QUARANTINE, build_clicks_hourly

GROUP = "ingestion"
OWNERS = ["team:data-engineering"]
MONTH, DAY = len("2026-01"), len("2026-01-31")
DAYS_SHOWN = 31
FILES_SHOWN = 20

clickstream_topic = dg.AssetSpec(
    "clickstream_topic",
    group_name=GROUP,
    owners=OWNERS,
    kinds={"kafka"},
    description="Events of schema v1 as JSON, keyed by user_id.",
)


@dg.multi_observable_source_asset(
    name="observe_arrivals",  # the job is called `arrivals`, and a code location refuses an op of the same name
    specs=[
        dg.AssetSpec(
            "clickstream_landing",
            deps=[clickstream_topic],
            group_name=GROUP,
            owners=OWNERS,
            kinds={"parquet"},
            description="What arrived, untouched: Parquet files of events from the archive sink or from `recsys ingest`.",
            metadata={"dagster/column_schema": schema(EVENT_SCHEMA)},
        ),
        dg.AssetSpec(
            "item_catalog",
            group_name=GROUP,
            owners=OWNERS,
            kinds={"parquet"},
            description="Items with title, category, price, availability and further attributes, from `recsys ingest`.",
            metadata={"dagster/column_schema": schema(CATALOG_SCHEMA)},
        ),
    ],
)
def arrivals(platform: PlatformResource) -> Iterator[dg.ObserveResult]:
    """Rows, files and hours that are there now."""
    listing = platform.landing.ledger.read()
    landed, rejected = (
        {name: pc.sum(listing.rows(area)[name], min_count=0).as_py() for name in ("rows", "bytes")}
        for area in (LANDING, QUARANTINE)
    )
    files, extent = listing.rows(LANDING).num_rows, listing.extent()
    unreadable, strangers = platform.landing.unreadable(), platform.landing.strangers()
    left_out = [*unreadable.items(), *((path, STRANGE) for path in strangers)]
    yield dg.ObserveResult(
        asset_key="clickstream_landing",
        data_version=dg.DataVersion(f"{files}-{landed['rows']}"),
        metadata={
            "files": files,
            **landed,
            "first hour": hour_key(extent[0]) if extent else "none",
            "last hour": hour_key(extent[1]) if extent else "none",
            "quarantined rows": rejected["rows"],
            "unreadable files": len(unreadable),
            "files that nobody reads": len(strangers),
            **({"left out": table(["file", "why"], left_out[:FILES_SHOWN])} if left_out else {}),
        },
    )
    catalog = platform.lake.find(CATALOG_TABLE, CATALOG_KEY)
    yield dg.ObserveResult(
        asset_key="item_catalog",
        data_version=dg.DataVersion(catalog.data_version if catalog else "none"),
        metadata={"items": catalog.rows if catalog else 0},
    )


@dg.asset(
    deps=["clickstream_landing"],
    partitions_def=hourly,
    backfill_policy=dg.BackfillPolicy.single_run(),
    group_name=GROUP,
    owners=OWNERS,
    kinds={"spark", "parquet"},
    pool="spark",
    metadata={
        "dagster/column_schema": schema(
            {f.name: str(f.type) for f in EVENT_SCHEMA} | {"source_session_id": "string"},
        )
    },
)
def clicks_hourly(context: dg.AssetExecutionContext, platform: PlatformResource) -> dg.MaterializeResult:
    """Events of an hour: each event once, sessions by inactivity across hour borders, bad rows in quarantine."""
    hours = list(context.partition_keys)
    made = build_clicks_hourly(platform.spark(), platform.lake, platform.landing, hours, platform.settings.events)
    rejected = platform.lake.find_all(CLICKS_QUARANTINE, hours)
    counts = {hour: {"quarantined rows": rejected[hour].rows if hour in rejected else 0} for hour in hours}
    tell_by_partition(context, made, counts)
    unreadable = platform.landing.unreadable()
    return dg.MaterializeResult(
        metadata={
            "hours of the run": len(made),
            "hours of the run without events": sum(not p.rows for p in made),
            "unreadable landing files": len(unreadable),
            **({"they are left out": table(["file", "why"], list(unreadable.items())[:FILES_SHOWN])} if unreadable else {}),
            **_events_by_span(made),
        },
        data_version=dg.DataVersion(made[0].data_version) if len(made) == 1 else None,
    )


def _events_by_span(made: Sequence[Partition]) -> dict[str, dg.MarkdownMetadataValue]:
    """Events by day, and by month where there are many days: Dagster keeps a copy with each partition of a run."""
    days = {part.key[:DAY] for part in made}
    span, length = ("day", DAY) if len(days) <= DAYS_SHOWN else ("month", MONTH)
    events: Counter[str] = Counter()
    for part in made:
        events[part.key[:length]] += part.rows
    return {f"events by {span}": table([span, "events"], sorted(events.items()))}
