"""Small literal inputs for tests: events of the landing zone, and tables of the lake."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from recsys_core.events import DAY_MS, EVENT_SCHEMA, key_start_ms
from recsys_core.lake import Lake, Partition
from recsys_core.landing import Landing, OffsetRange, file_of
from recsys_core.ledger import LandingFile, Ledger
from recsys_core.tables import CLICKS_HOURLY, INTERACTIONS

NULLABLE_EVENTS = pa.schema([pa.field(f.name, f.type) for f in EVENT_SCHEMA])
"""The event schema as a foreign writer may leave it: any value can be null."""

CLICKS_SCHEMA = pa.schema([NULLABLE_EVENTS.field(n) for n in ("event_id", "user_id", "item_id", "event_type", "ts")])
INTERACTIONS_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string()),
        pa.field("item_id", pa.string()),
        pa.field("weight", pa.float32()),
        pa.field("n_events", pa.int32()),
        pa.field("first_ts", pa.int64()),
        pa.field("last_ts", pa.int64()),
    ]
)


def ms(moment: str) -> int:
    """Milliseconds since 1970 of a moment such as `2026-03-02T10:15` (UTC)."""
    return key_start_ms(moment)


def event(
    event_id: str | None, user: str | None, item: str | None, moment: str, kind: str | None = "view", **more: object
) -> dict:
    """A row of the event schema."""
    return {"event_id": event_id, "user_id": user, "item_id": item, "event_type": kind, "ts": ms(moment), **more}


def event_table(*rows: dict, schema: pa.Schema = NULLABLE_EVENTS) -> pa.Table:
    return pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema=schema)


def land(lake: Lake, *rows: dict, name: str = "a", source: str = "test") -> str:
    """A file that counts, whose rows may be no events. Returns its path."""
    path, sink = lake.path("landing", source, f"{name}.parquet"), pa.BufferOutputStream()
    pq.write_table(event_table(*rows), sink)
    lake.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    content = sink.getvalue().to_pybytes()
    lake.fs.pipe_file(path, content)
    Ledger(lake).commit([file_of(path, event_table(*rows), len(content))])
    return path


def archived_as(landing: Landing, held: OffsetRange) -> LandingFile:
    """What the ledger says of the archive file of a range."""
    file = landing.ledger.read().find(landing.lake.path("landing", held.topic, f"{held.name}.parquet"))
    assert file is not None
    return file


def write_clicks(lake: Lake, rows: Sequence[tuple[str, str, str]], kind: str = "view") -> None:
    """Partitions of `clicks_hourly` from (user, item, moment), without Spark."""
    hours: dict[str, list[dict]] = {}
    for user, item, moment in rows:
        row = event(f"{kind}-{user}-{item}-{moment}", user, item, moment, kind)
        hours.setdefault(moment[:13], []).append(row)
    for hour, found in hours.items():
        lake.write(CLICKS_HOURLY, hour, pa.Table.from_pylist(found, schema=CLICKS_SCHEMA))


def write_interactions(lake: Lake, day: str, rows: Sequence[tuple[str, str, float]]) -> Partition:
    """Partition `day` of `interactions` from (user, item, weight), without Spark; a later row happened later."""
    start = ms(day) - DAY_MS
    table = [
        {"user_id": user, "item_id": item, "weight": weight, "n_events": 1, "first_ts": start + at, "last_ts": start + at}
        for at, (user, item, weight) in enumerate(rows)
    ]
    return lake.write(INTERACTIONS, day, pa.Table.from_pylist(table, schema=INTERACTIONS_SCHEMA))
