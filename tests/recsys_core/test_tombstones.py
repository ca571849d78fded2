"""What a user did before being forgotten does not come back with a file or a topic that is read again."""

from __future__ import annotations

from dataclasses import asdict

import pyarrow as pa
from builders import event, event_table, ms

from recsys_core.events import EVENT_SCHEMA
from recsys_core.forget import Forgotten
from recsys_core.lake import Lake
from recsys_core.landing import ARCHIVE_SCHEMA, QUARANTINE_SCHEMA, Landing, OffsetRange
from recsys_core.tombstones import FORGOTTEN, Tombstones, hash_of

MOMENT = "2026-03-02T10:30"
EVENTS = (
    event("e1", "gone", "i1", "2026-03-02T09:00"),
    event("e2", "stays", "i1", "2026-03-02T09:00"),
    event("e3", "gone", "i1", MOMENT),
    event("e4", "gone", "i1", "2026-03-02T10:31"),
)
LEFT = ["e2", "e4"]


def forget(lake: Lake, user: str, moment: str = MOMENT, key: str = "1") -> None:
    lake.write_blobs(FORGOTTEN, key, {}, 0, asdict(Forgotten(hash_of(user), ms(moment), {}, {})))


def test_events_up_to_the_moment_are_covered_and_later_ones_are_not(lake: Lake) -> None:
    forget(lake, "gone", "2026-03-01T00:00")
    forget(lake, "gone", key="2")
    tombstones = Tombstones.read(lake)
    odd = [{**event("e5", None, "i", MOMENT)}, {**event("e6", "gone", "i", MOMENT), "ts": None}]
    assert tombstones.covers(event_table(*EVENTS, *odd)).tolist() == [True, False, True, False, False, False]
    assert [tombstones.covers_one(e["user_id"], e["ts"]) for e in EVENTS] == [True, False, True, False]
    assert tombstones.filtered(event_table(*EVENTS))["event_id"].to_pylist() == LEFT
    assert tombstones.covers(event_table()).tolist() == []


def test_without_a_forgotten_user_everything_stays(lake: Lake) -> None:
    tombstones = Tombstones.read(lake)
    table = event_table(*EVENTS)
    assert not tombstones
    assert tombstones.filtered(table) is table


def test_a_file_that_is_ingested_again_lands_without_the_user(lake: Lake) -> None:
    forget(lake, "gone")
    Landing(lake).write_events("shop", "again", event_table(*EVENTS, schema=EVENT_SCHEMA))
    (file,) = Landing(lake).files()
    assert file.rows == len(LEFT)


def test_an_archive_file_that_is_written_again_counts_what_was_left_out(lake: Lake) -> None:
    forget(lake, "gone")
    held = OffsetRange("clickstream.events", "0abcdef0", 0, 0, 3)
    rows = [{name: {**row, "offset": at}.get(name) for name in ARCHIVE_SCHEMA.names} for at, row in enumerate(EVENTS)]
    Landing(lake).write_archive(held, 4, pa.Table.from_pylist(rows, schema=ARCHIVE_SCHEMA), QUARANTINE_SCHEMA.empty_table())
    facts = Landing(lake).archive_facts(held)
    assert (facts["messages"], facts["events"], facts["forgotten"]) == (4, 2, 2)
    assert facts["hours"] == {"2026-03-02T09": 1, "2026-03-02T10": 1}
