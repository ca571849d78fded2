"""What a user did before being forgotten does not come back with a file or a topic that is read again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from builders import archived_as, event, event_table, ms

from recsys_core import tombstones
from recsys_core.events import EVENT_SCHEMA
from recsys_core.lake import Lake
from recsys_core.landing import ARCHIVE_SCHEMA, QUARANTINE_SCHEMA, Landing, OffsetRange
from recsys_core.ledger import LandingFile
from recsys_core.tombstones import MERGED, NEW, TOMBSTONES, TombstoneLog, Tombstones, hash_of

MOMENT = "2026-03-02T10:30"
EVENTS = (
    event("e1", "gone", "i1", "2026-03-02T09:00"),
    event("e2", "stays", "i1", "2026-03-02T09:00"),
    event("e3", "gone", "i1", MOMENT),
    event("e4", "gone", "i1", "2026-03-02T10:31"),
)
LEFT = ["e2", "e4"]


def forget(lake: Lake, user: str, moment: str = MOMENT) -> None:
    TombstoneLog(lake).add(hash_of(user), ms(moment))


def test_events_up_to_the_moment_are_covered_and_later_ones_are_not(lake: Lake) -> None:
    forget(lake, "gone", "2026-03-01T00:00")
    forget(lake, "gone")
    known = Tombstones.read(lake)
    odd = [{**event("e5", None, "i", MOMENT)}, {**event("e6", "gone", "i", MOMENT), "ts": None}]
    assert known.covers(event_table(*EVENTS, *odd)).tolist() == [True, False, True, False, False, False]
    assert [known.covers_one(e["user_id"], e["ts"]) for e in EVENTS] == [True, False, True, False]
    assert known.filtered(event_table(*EVENTS))["event_id"].to_pylist() == LEFT
    assert known.covers(event_table()).tolist() == []


def test_what_came_before_the_moment_is_covered_whatever_the_senders_clock_says(lake: Lake) -> None:
    forget(lake, "gone")
    moment = ms(MOMENT)
    ahead = [{**event(f"e{n}", "gone", "i", MOMENT), "ts": moment + 3_000_000, "offset": n} for n in range(3)]
    arrived = np.array([moment - 1, moment, moment + 1])
    events = pa.Table.from_pylist([{n: row.get(n) for n in ARCHIVE_SCHEMA.names} for row in ahead], schema=ARCHIVE_SCHEMA)
    assert Tombstones.read(lake).covers(events, arrived).tolist() == [True, True, False]
    held = OffsetRange("clickstream.events", "0abcdef0", 0, 0, 2)
    Landing(lake).write_archive(held, 3, events, QUARANTINE_SCHEMA.empty_table(), arrived)
    assert archived_as(Landing(lake), held).forgotten == 2


BROKEN = '{"user_id": "gone", "ts": 1e'
REFUSED = ('{"user_id": "gone"}', BROKEN, '{"user_id": "stays"}', "not JSON", None, '{"item_id": "gone"}')


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_what_is_no_event_is_kept_without_what_names_the_user(lake: Lake, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    landing, put = Landing(lake), Landing._put
    rows = [{"origin": "t/0", "row": at, "reason": "no item", "content": text} for at, text in enumerate(REFUSED)]

    def forgotten_meanwhile(self: Landing, path: str, table: pa.Table) -> LandingFile:
        monkeypatch.setattr(Landing, "_put", put)
        forget(lake, "gone")
        return put(self, path, table)

    if when == "before":
        forget(lake, "gone")
    else:
        monkeypatch.setattr(Landing, "_put", forgotten_meanwhile)
    held = OffsetRange("clickstream.events", "0abcdef0", 0, 0, len(rows) - 1)
    rejected = pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA)
    landing.write_archive(held, len(rows), ARCHIVE_SCHEMA.empty_table(), rejected)
    [found] = landing.quarantined()
    assert found["content"].to_pylist() == [None, None, *REFUSED[2:]]
    assert found["row"].to_pylist() == list(range(len(rows)))


def test_without_a_forgotten_user_everything_stays(lake: Lake) -> None:
    known = Tombstones.read(lake)
    table = event_table(*EVENTS)
    assert not known
    assert known.filtered(table) is table


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
    file = archived_as(Landing(lake), held)
    assert (file.messages, file.rows, file.forgotten) == (4, 2, 2)
    assert file.hours == {"2026-03-02T09": 1, "2026-03-02T10": 1}


# -- the log: what is new, what is merged ------------------------------------------------------------------------


USERS = [hash_of(f"user-{n}") for n in range(9)]


def removed(log: TombstoneLog, users: Sequence[str], moment: int = 1_000) -> None:
    for user in users:
        log.add(user, moment)


def names(lake: Lake, folder: str) -> list[str]:
    root = lake.path(TOMBSTONES, folder)
    return sorted(lake.fs.ls(root, detail=False)) if lake.fs.exists(root) else []


@pytest.fixture
def store(any_store: str) -> Lake:
    return Lake(f"{any_store}/lake")


def test_a_removal_is_known_to_those_that_read_before_and_after_it_is_merged(store: Lake) -> None:
    reader, log = TombstoneLog(store), TombstoneLog(store)
    assert not reader.read()
    log.add(USERS[0], 1_000)
    assert reader.read().moments == {USERS[0]: 1_000}
    log.merge(least=1)
    assert names(store, NEW) == []
    assert reader.read().moments == {USERS[0]: 1_000}
    log.add(USERS[1], 2_000)
    log.add(USERS[0], 3_000)
    assert reader.read().moments == TombstoneLog(store).read().moments == {USERS[0]: 3_000, USERS[1]: 2_000}


def test_many_removals_are_two_listings_for_a_reader_that_knows_them(store: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    log = TombstoneLog(store)
    removed(log, USERS)
    log.merge(least=1)
    reader = TombstoneLog(store)
    known = reader.read()
    assert len(known.moments) == len(USERS)
    monkeypatch.setattr(store.fs, "cat_file", lambda *_: pytest.fail("a file was read again"))
    assert reader.read() is known


def test_names_are_merged_once_there_are_enough_of_them(store: Lake) -> None:
    log = TombstoneLog(store)
    removed(log, USERS[:2])
    log.merge(least=3)
    assert (len(names(store, NEW)), len(names(store, MERGED))) == (2, 0)
    removed(log, USERS[2:3])
    log.merge(least=3)
    assert (len(names(store, NEW)), len(names(store, MERGED))) == (0, 1)
    assert set(TombstoneLog(store).read().moments) == set(USERS[:3])


def test_a_file_that_a_later_one_contains_goes_once_no_listing_can_need_it(
    store: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = TombstoneLog(store)
    for user in USERS[:3]:
        log.add(user, 1_000)
        log.merge(least=1)
    log.add(USERS[0], 2_000)
    log.merge(least=1)
    assert len(names(store, MERGED)) == 4
    monkeypatch.setattr("recsys_core.tombstones.KEEP_SECONDS", 0)
    reader = TombstoneLog(store)
    reader.read()
    log.add(USERS[3], 1_000)
    log.merge(least=1)
    assert len(names(store, MERGED)) == 1
    expected = {USERS[0]: 2_000, **dict.fromkeys(USERS[1:4], 1_000)}
    assert reader.read().moments == TombstoneLog(store).read().moments == expected


@pytest.mark.parametrize("step", ["before the file", "after the file", "between the names", "before old files go"])
def test_a_merge_that_was_cut_off_loses_nothing_and_the_next_one_tidies_up(
    store: Lake, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    log = TombstoneLog(store)
    removed(log, USERS[:1])
    log.merge(least=1)
    removed(log, USERS[1:4])

    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("recsys_core.tombstones.KEEP_SECONDS", 0)
        if step == "before the file":
            patch.setattr("recsys_core.tombstones.write_atomically", cut_off)
        elif step == "before old files go":
            patch.setattr(TombstoneLog, "_drop_contained", cut_off)
        else:
            gone = iter([False, True] if step == "between the names" else [True])
            remove = TombstoneLog._remove
            patch.setattr(TombstoneLog, "_remove", lambda *args: cut_off() if next(gone) else remove(*args))
        with pytest.raises(KeyboardInterrupt):
            log.merge(least=1)
    left = {"before the file": 3, "after the file": 3, "between the names": 2, "before old files go": 0}
    assert len(names(store, NEW)) == left[step]
    assert set(TombstoneLog(store).read().moments) == set(USERS[:4])
    monkeypatch.setattr("recsys_core.tombstones.KEEP_SECONDS", 0)
    log.merge(least=0)
    assert (len(names(store, NEW)), len(names(store, MERGED))) == (0, 1)
    assert set(TombstoneLog(store).read().moments) == set(USERS[:4])


def test_two_merges_at_once_lose_nothing_whichever_ends_first(store: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys_core.tombstones.KEEP_SECONDS", 0)
    one, other = TombstoneLog(store), TombstoneLog(store)
    removed(one, USERS[:1])
    one.merge(least=1)
    removed(one, USERS[1:3])
    write = tombstones.write_atomically

    def another_comes_between(*args: Any) -> None:
        monkeypatch.setattr(tombstones, "write_atomically", write)
        removed(other, USERS[3:5])
        other.merge(least=1)
        assert names(store, NEW) == [], "the other one took the names of both away"
        write(*args)

    monkeypatch.setattr(tombstones, "write_atomically", another_comes_between)
    one.merge(least=1)
    assert set(TombstoneLog(store).read().moments) == set(USERS[:5])
    one.merge(least=0)
    assert set(TombstoneLog(store).read().moments) == set(USERS[:5])
    assert len(names(store, MERGED)) == 1


def test_a_merge_that_ends_after_a_later_one_does_not_drop_what_that_one_alone_has(
    store: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recsys_core.tombstones.KEEP_SECONDS", 0)
    one, other = TombstoneLog(store), TombstoneLog(store)
    removed(one, USERS[:3])
    write = TombstoneLog._write

    def another_comes_first(self: TombstoneLog, moments: Mapping[str, int]) -> None:
        monkeypatch.setattr(TombstoneLog, "_write", write)
        removed(other, USERS[3:5])
        other.merge(least=1)
        write(self, moments)

    monkeypatch.setattr(TombstoneLog, "_write", another_comes_first)
    one.merge(least=1)
    assert len(names(store, MERGED)) == 2, "the newest file lacks what the other one merged"
    assert set(TombstoneLog(store).read().moments) == set(USERS[:5])


def test_a_reader_between_whose_listings_a_merge_falls_misses_nobody(store: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys_core.tombstones.KEEP_SECONDS", 0)
    log, reader = TombstoneLog(store), TombstoneLog(store)
    removed(log, USERS[:1])
    log.merge(least=1)
    reader.read()
    listed = TombstoneLog._names

    def merged_after_the_first(self: TombstoneLog, folder: str, pattern: re.Pattern[str]) -> frozenset[str]:
        found = listed(self, folder, pattern)
        if self is reader and folder == NEW:
            removed(log, USERS[1:2])
            log.merge(least=1)
        return found

    monkeypatch.setattr(TombstoneLog, "_names", merged_after_the_first)
    assert set(reader.read().moments) == set(USERS[:2])


def test_a_file_that_goes_while_it_is_about_to_be_read_is_looked_for_again(
    store: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recsys_core.tombstones.KEEP_SECONDS", 0)
    log, reader = TombstoneLog(store), TombstoneLog(store)
    removed(log, USERS[:1])
    log.merge(least=1)
    rows = TombstoneLog._rows

    def gone_first(self: TombstoneLog, name: str) -> list[tuple[str, int]]:
        monkeypatch.setattr(TombstoneLog, "_rows", rows)
        removed(log, USERS[1:2])
        log.merge(least=1)
        log.merge(least=0)
        return rows(self, name)

    monkeypatch.setattr(TombstoneLog, "_rows", gone_first)
    assert set(reader.read().moments) == set(USERS[:2])


def test_two_merges_that_drop_the_same_files_do_not_disturb_each_other(store: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = TombstoneLog(store), TombstoneLog(store)
    for user in USERS[:3]:
        one.add(user, 1_000)
        one.merge(least=1)
    monkeypatch.setattr("recsys_core.tombstones.KEEP_SECONDS", 0)
    rows = TombstoneLog._rows

    def dropped_meanwhile(self: TombstoneLog, name: str) -> list[tuple[str, int]]:
        monkeypatch.setattr(TombstoneLog, "_rows", rows)
        other.merge(least=0)
        return rows(self, name)

    monkeypatch.setattr(TombstoneLog, "_rows", dropped_meanwhile)
    one.merge(least=1)
    assert len(names(store, MERGED)) == 1
    assert set(TombstoneLog(store).read().moments) == set(USERS[:3])


def test_removals_at_the_same_time_are_all_there_in_the_end(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    users = [hash_of(f"one of many {n}") for n in range(40)]
    missed: list[str] = []

    def remove(user: str) -> None:
        log, reader = TombstoneLog(lake), TombstoneLog(lake)
        reader.read()
        log.add(user, 1_000)
        log.merge(least=2)
        if any(user not in found.read().moments for found in (reader, TombstoneLog(lake))):
            missed.append(user)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(remove, users))
    assert missed == []
    monkeypatch.setattr("recsys_core.tombstones.KEEP_SECONDS", 0)
    TombstoneLog(lake).merge(least=0)
    assert (len(names(lake, NEW)), len(names(lake, MERGED))) == (0, 1)
    assert set(TombstoneLog(lake).read().moments) == set(users)


@pytest.mark.parametrize("kind", ["events", "archive"])
def test_a_removal_that_begins_while_a_file_lands_is_not_undone_by_it(
    lake: Lake, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    landing, log = Landing(lake), TombstoneLog(lake)
    put = Landing._put

    def removed_meanwhile(self: Landing, path: str, table: pa.Table) -> LandingFile:
        monkeypatch.setattr(Landing, "_put", put)
        log.add(hash_of("gone"), ms(MOMENT))
        log.merge(least=1)
        return put(self, path, table)

    monkeypatch.setattr(Landing, "_put", removed_meanwhile)
    if kind == "events":
        landing.write_events("shop", "a", event_table(*EVENTS, schema=EVENT_SCHEMA))
    else:
        held = OffsetRange("clickstream.events", "0abcdef0", 0, 0, 3)
        rows = [{name: {**row, "offset": at}.get(name) for name in ARCHIVE_SCHEMA.names} for at, row in enumerate(EVENTS)]
        events = pa.Table.from_pylist(rows, schema=ARCHIVE_SCHEMA)
        landing.write_archive(held, 4, events, QUARANTINE_SCHEMA.empty_table())
        assert archived_as(landing, held).forgotten == 2
    (file,) = landing.files()
    assert file.rows == len(LEFT)
