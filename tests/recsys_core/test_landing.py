import math
import os
import time
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import NULLABLE_EVENTS, event, event_table, land, ms
from hypothesis import given
from hypothesis import strategies as st

from recsys_core import landing as landing_module
from recsys_core import stores
from recsys_core.events import EVENT_SCHEMA
from recsys_core.lake import Lake, Partition
from recsys_core.landing import CLOCK_SECONDS, QUARANTINE_SCHEMA, Landing, was_read, what_was_read


@pytest.fixture
def landing(any_store: str) -> Landing:
    """A landing zone in a store of each kind."""
    return Landing(Lake(any_store))


@pytest.fixture
def on_disk(lake: Lake) -> Landing:
    """One whose files can be given any time."""
    return Landing(lake)


def at(*moments: str) -> pa.Table:
    return event_table(*(event(moment, "u", "i", moment) for moment in moments), schema=EVENT_SCHEMA)


def names(files) -> list[str]:
    return [file.path.rsplit("/", 1)[-1] for file in files]


def put(landing: Landing, name: str, table: pa.Table, **options) -> None:
    path = landing.lake.path("landing", "test", name)
    landing.lake.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    with landing.lake.fs.open(path, "wb") as out:
        pq.write_table(table, out, **options)


def test_what_was_landed_is_listed_with_its_rows_and_its_times(landing):
    path = landing.write_events("app", "one", at("2026-03-02T10:15", "2026-03-02T09:00", "2026-03-02T11:59"))
    (file,) = landing.files()
    assert file.path == path == landing.lake.path("landing", "app", "one.parquet")
    assert (file.rows, file.bytes) == (3, landing.lake.fs.size(path))
    assert (file.first_ts, file.last_ts) == (ms("2026-03-02T09:00"), ms("2026-03-02T11:59"))
    assert pq.read_table(path, filesystem=landing.lake.fs).schema.names == EVENT_SCHEMA.names


def test_covering_gives_the_files_that_may_hold_events_of_a_range_whose_end_is_not_in_it(landing):
    landing.write_events("app", "early", at("2026-03-02T08:00", "2026-03-02T09:59:59.999"))
    landing.write_events("app", "late", at("2026-03-02T10:00", "2026-03-02T11:00"))
    landing.write_events("app", "wide", at("2026-03-01T00:00", "2026-03-03T00:00"))
    ten, eleven = ms("2026-03-02T10:00"), ms("2026-03-02T11:00")
    assert names(landing.covering(ten, eleven)) == ["late.parquet", "wide.parquet"]
    assert names(landing.covering(ten - 1, ten)) == ["early.parquet", "wide.parquet"]
    assert names(landing.covering(eleven, eleven + 1)) == ["late.parquet", "wide.parquet"]
    assert names(landing.covering(eleven + 1, eleven + 2)) == ["wide.parquet"]
    assert landing.covering(ms("2026-03-03T00:00") + 1, ms("2026-03-04")) == []


def test_the_extent_is_that_of_all_files_and_none_where_nothing_landed(landing):
    assert landing.extent() is None
    landing.write_events("app", "empty", at())
    assert landing.extent() is None
    assert landing.covering(0, ms("2100-01-01")) == []
    landing.write_events("app", "b", at("2026-03-02T10:00", "2026-03-05T10:00"))
    landing.write_events("web", "a", at("2026-03-01T10:00"))
    assert landing.extent() == (ms("2026-03-01T10:00"), ms("2026-03-05T10:00"))


def test_a_file_without_statistics_is_looked_into_rather_than_passed_over(landing):
    put(landing, "plain.parquet", at("2026-03-02T10:00", "2026-03-02T12:00"), write_statistics=False, row_group_size=1)
    assert landing.extent() == (ms("2026-03-02T10:00"), ms("2026-03-02T12:00"))
    assert len(landing.covering(ms("2026-03-02T12:00"), ms("2026-03-02T13:00"))) == 1


def test_rows_without_a_time_do_not_hide_those_that_have_one(landing):
    rows = event_table(event("a", "u", "i", "2026-03-02T10:00"), {**event("b", "u", "i", "2026-03-02T10:00"), "ts": None})
    put(landing, "mixed.parquet", rows, row_group_size=1)
    assert landing.extent() == (ms("2026-03-02T10:00"), ms("2026-03-02T10:00"))
    put(landing, "mixed.parquet", rows.slice(1))
    assert landing.extent() is None


def test_junk_with_the_name_of_a_parquet_file_is_named_and_the_rest_is_read(landing):
    landing.write_events("app", "one", at("2026-03-02T10:00"))
    path = landing.lake.path("landing", "test", "junk.parquet")
    for content in (b"PAR1 this is no Parquet", b""):
        landing.lake.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        landing.lake.fs.pipe_file(path, content)
        assert names(landing.files()) == ["one.parquet"]
        assert list(landing.unreadable()) == [path]
        assert landing.unreadable()[path].startswith("not readable as Parquet: ")


def test_a_table_that_is_not_of_events_is_named_with_the_columns_it_lacks(landing):
    put(landing, "foreign.parquet", at("2026-03-02T10:00").drop_columns(["user_id", "ts"]))
    assert landing.covering(0, 1) == []
    assert "lacks the columns user_id, ts; put foreign files in by" in landing.unreadable()[path_of(landing, "foreign")]


def test_a_column_of_another_type_is_named_with_both_types(landing):
    table = at("2026-03-02T10:00")
    put(landing, "seconds.parquet", table.set_column(4, "ts", table["ts"].cast(pa.timestamp("ms"))))
    assert landing.unreadable()[path_of(landing, "seconds")].startswith(
        "not of the event schema: ts is timestamp[ms], not int64"
    )


def path_of(landing: Landing, name: str) -> str:
    return landing.lake.path("landing", "test", f"{name}.parquet")


def test_other_encodings_of_strings_and_further_columns_are_fine(landing):
    table = at("2026-03-02T10:00")
    table = table.set_column(1, "user_id", table["user_id"].dictionary_encode())
    table = table.set_column(2, "item_id", table["item_id"].cast(pa.large_string()))
    put(landing, "pandas.parquet", table.add_column(0, "more", [[{"a": 1, "b": 2}]]))
    assert landing.extent() == (ms("2026-03-02T10:00"), ms("2026-03-02T10:00"))


def test_other_files_beside_the_landed_ones_are_left_alone(landing):
    landing.write_events("app", "one", at("2026-03-02T10:00"))
    landing.lake.fs.pipe_file(landing.lake.path("landing", "app", "README.txt"), b"by hand")
    assert names(landing.files()) == ["one.parquet"]


def test_a_file_that_is_rewritten_is_looked_at_again(landing):
    landing.write_events("app", "one", at("2026-03-02T10:00"))
    assert landing.extent() == (ms("2026-03-02T10:00"), ms("2026-03-02T10:00"))
    landing.write_events("app", "one", at("2026-03-02T11:00"))
    assert landing.extent() == (ms("2026-03-02T11:00"), ms("2026-03-02T11:00"))


def test_a_new_file_is_seen_by_a_landing_zone_that_listed_before(landing):
    assert landing.files() == []
    land(landing.lake, event("a", "u", "i", "2026-03-02T10:00"), name="dropped")
    assert names(landing.files()) == ["dropped.parquet"]


def test_events_that_are_not_of_the_schema_are_not_landed(landing):
    with pytest.raises(ValueError, match=r"names|fields"):
        landing.write_events("app", "one", at("2026-03-02T10:00").drop_columns(["ts"]))
    with pytest.raises(ValueError, match="null"):
        landing.write_events("app", "one", event_table(event("a", None, "i", "2026-03-02T10:00"), schema=NULLABLE_EVENTS))
    assert landing.files() == []


def test_rejected_rows_are_kept_apart_with_origin_row_and_reason(landing):
    def rejected(row: int) -> pa.Table:
        rows = [{"origin": "f.csv", "row": row, "reason": "missing user_id", "content": ",i,1"}]
        return pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA)

    assert list(landing.quarantined()) == []
    landing.write_quarantine("app", "b", rejected(2))
    landing.write_quarantine("app", "a", rejected(1))
    assert [table["row"].to_pylist() for table in landing.quarantined()] == [[1], [2]]
    assert next(landing.quarantined()).schema.equals(QUARANTINE_SCHEMA)
    assert landing.files() == []


# -- one bad file among good ones ---------------------------------------------------------------------------------------


def whole() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(at("2026-03-02T10:30"), sink)
    return sink.getvalue().to_pybytes()


def drop(landing: Landing, name: str, content: bytes) -> str:
    path = landing.lake.path("landing", "drop", name)
    landing.lake.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    landing.lake.fs.pipe_file(path, content)
    return path


BAD = {
    "zero.parquet": b"",
    "half.parquet": whole()[:-30],
    "no footer.parquet": whole()[:40],
    "text.parquet": b"user,item\n1,2\n",
    "broken footer.parquet": whole()[:-60] + b"\xff" * 40 + whole()[-20:],
}


@pytest.mark.parametrize("name", BAD)
def test_one_bad_file_stops_nothing_and_is_named(landing, name):
    landing.write_events("app", "good", at("2026-03-02T10:00"))
    path = drop(landing, name, BAD[name])
    for found in (landing.files(), landing.covering(0, ms("2100-01-01")), Landing(landing.lake).files()):
        assert names(found) == ["good.parquet"]
    assert landing.extent() == (ms("2026-03-02T10:00"), ms("2026-03-02T10:00"))
    assert landing.last_busy_day() == "2026-03-02"
    assert list(landing.unreadable()) == [path]
    assert len(landing.arrivals(0)) == 1
    drop(landing, name, whole())
    assert names(landing.files()) == ["good.parquet", name]
    assert landing.unreadable() == {}


@pytest.mark.parametrize("name", [".copying.parquet", "_tmp.parquet", "_temporary/0/part.parquet", ".hidden/x.parquet"])
def test_a_copy_under_way_is_no_file_yet(landing, name):
    drop(landing, name, b"x")
    assert landing.files() == []
    assert landing.unreadable() == {}
    assert landing.strangers() == []


def test_an_ending_in_capitals_is_read_and_another_one_is_named(landing):
    drop(landing, "X.PARQUET", whole())
    notes = drop(landing, "notes.txt", b"by hand")
    assert names(landing.files()) == ["X.PARQUET"]
    assert landing.strangers() == [notes]


def test_a_store_that_is_away_makes_no_file_unreadable(landing, monkeypatch):
    landing.write_events("app", "good", at("2026-03-02T10:00"))

    def away(*_, **__):
        raise ConnectionError(111, "refused")

    with monkeypatch.context() as patch:
        patch.setattr(landing.lake.fs, "open", away)
        with pytest.raises(ConnectionError):
            landing.files()
    assert names(landing.files()) == ["good.parquet"]


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), ConnectionError(111, "refused")])
def test_a_folder_that_cannot_be_listed_is_named_or_raised_and_never_taken_for_empty(landing, monkeypatch, error):
    landing.write_events("app", "good", at("2026-03-02T10:00"))
    landing.write_events("shop", "closed", at("2026-03-02T10:00"))
    closed = landing.lake.path("landing", "shop")
    own = landing.lake.fs.ls

    def ls(path, *more, **others):
        if path == closed:
            raise error
        return own(path, *more, **others)

    with monkeypatch.context() as patch:
        patch.setattr(landing.lake.fs, "ls", ls)
        if isinstance(error, ConnectionError):
            with pytest.raises(ConnectionError):
                landing.files()
            return
        assert names(landing.files()) == ["good.parquet"]
        assert landing.unreadable() == {closed: str(error)}
        landing.note_arrivals()
    assert landing.unreadable() == {}
    assert [arrival.file.path for arrival in landing.arrivals(time.time() + 3600) if arrival.unseen] == [
        f"{closed}/closed.parquet"
    ]


def test_a_file_that_goes_while_it_is_looked_at_is_not_there(landing, monkeypatch):
    landing.write_events("app", "good", at("2026-03-02T10:00"))
    path = drop(landing, "gone.parquet", whole())
    listed = landing._entries()
    landing.lake.fs.rm_file(path)
    monkeypatch.setattr(landing, "_entries", lambda: listed)
    assert names(landing.files()) == ["good.parquet"]
    assert landing.unreadable() == {}


@given(st.lists(st.tuples(st.integers(0, len(whole()) - 1), st.integers(0, 255)), min_size=1, max_size=6), st.integers(0, 900))
def test_whatever_is_wrong_with_a_file_the_others_are_read(changes, cut):
    lake = Lake(f"memory://{uuid.uuid4().hex}")
    landing = Landing(lake)
    landing.write_events("app", "good", at("2026-03-02T10:00"))
    content = bytearray(whole())
    for place, value in changes:
        content[place] = value
    drop(landing, "changed.parquet", bytes(content[: len(content) - cut]))
    assert "good.parquet" in names(landing.files())
    assert len(landing.files()) + len(landing.unreadable()) == 2
    damaged = landing.damaged(landing.files())
    assert "good.parquet" not in names(damaged)
    for file in landing.files():
        with lake.fs.open(file.path, "rb") as source:
            pq.read_table(source)


# -- what was made without which file -----------------------------------------------------------------------------------

HOUR = "2026-03-02T10"


def made(landing: Landing, looked: float) -> Partition:
    """An hour that is made now from what can be read."""
    said = what_was_read(landing.files(), looked, [HOUR])
    return Partition("clicks_hourly", HOUR, "v", (), 0, 0, "d", looked, said[HOUR])


def late(landing: Landing, hour: Partition, since: float) -> list[str]:
    """Files that the hour was made without, at a look after one at `since`."""
    found = [a.file.path.rsplit("/", 1)[-1] for a in landing.arrivals(since) if not was_read(hour, a, since)]
    landing.note_arrivals()
    return sorted(found)


@pytest.fixture(params=["fine", "whole seconds", "behind", "ahead"])
def clock(request, monkeypatch):
    """How the clock of the store is off, seconds."""
    off = {"fine": lambda t: t, "whole seconds": math.floor, "behind": lambda t: t - 300, "ahead": lambda t: t + 300}
    monkeypatch.setattr(landing_module, "written_at", lambda entry: off[request.param](stores.written_at(entry)))


@pytest.mark.usefixtures("clock")
def test_an_hour_is_late_once_for_each_file_that_it_was_made_without(landing):
    """Everything happens within one second, by whatever clock."""
    landing.write_events("app", "before", at(f"{HOUR}:10"))
    hour = made(landing, time.time())
    assert late(landing, hour, time.time()) == []
    since = time.time()
    landing.write_events("app", "after", at(f"{HOUR}:20"))
    assert late(landing, hour, since) == ["after.parquet"]
    assert late(landing, hour, time.time()) == ["after.parquet"], "until it is made again"
    hour = made(landing, time.time())
    assert late(landing, hour, since) == late(landing, hour, time.time()) == []


def test_a_file_that_can_be_read_again_makes_its_hour_late(on_disk):
    landing = on_disk
    drop(landing, "half.parquet", whole()[:-30])
    hour = made(landing, time.time())
    assert late(landing, hour, time.time()) == []
    since = time.time()
    path = drop(landing, "half.parquet", whole())
    os.utime(path, (1_000_000, 1_000_000))
    assert late(landing, hour, since) == ["half.parquet"], "whatever its time says"
    assert late(landing, made(landing, time.time()), since) == []


def test_a_file_that_is_brought_in_with_its_old_time_is_late(on_disk):
    landing = on_disk
    landing.write_events("app", "before", at(f"{HOUR}:10"))
    hour = made(landing, time.time())
    late(landing, hour, time.time())
    since = time.time()
    path = landing.write_events("app", "copied", at(f"{HOUR}:20"))
    os.utime(path, (1_000_000, 1_000_000))
    assert late(landing, hour, since) == ["copied.parquet"]


def test_a_file_that_is_replaced_by_another_is_late_and_an_old_one_is_not(on_disk):
    landing = on_disk
    path = landing.write_events("app", "one", at(f"{HOUR}:10"))
    long_ago = time.time() - 10 * CLOCK_SECONDS
    os.utime(path, (long_ago, long_ago))
    hour = made(landing, time.time())
    assert hour.extra["recent"] == []
    assert late(landing, hour, 0) == []
    landing.write_events("app", "one", at(f"{HOUR}:10", f"{HOUR}:11"))
    assert late(landing, hour, time.time() - 1) == ["one.parquet"]


def test_only_marks_of_files_that_hold_events_of_the_hour_are_kept_with_it(landing):
    for n in range(3):
        landing.write_events("app", f"f{n}", at(f"2026-03-02T1{n}:00"))
    said = what_was_read(landing.files(), time.time(), [f"2026-03-02T1{n}" for n in range(4)])
    assert [len(of_hour["recent"]) for of_hour in said.values()] == [1, 1, 1, 0]


def test_quarantine_that_is_damaged_or_goes_is_left_out(landing, monkeypatch):
    rows = pa.table({"origin": ["f"], "row": [1], "reason": ["no id"], "content": ["x" * 300]}, schema=QUARANTINE_SCHEMA)
    paths = [landing.write_quarantine("test", name, rows) for name in ("a", "damaged", "gone")]
    content = bytearray(landing.lake.fs.cat_file(paths[1]))
    content[4:200] = bytes(196)
    landing.lake.fs.pipe_file(paths[1], bytes(content))
    found = landing._found
    monkeypatch.setattr(landing, "_found", lambda area: found(area) | {paths[2]: {}})
    landing.lake.fs.rm_file(paths[2])
    assert [table.num_rows for table in landing.quarantined()] == [1]


def test_a_file_with_damaged_pages_is_named_once_it_is_read(landing):
    landing.write_events("app", "good", at(f"{HOUR}:10"))
    content = bytearray(whole())
    for place in range(4, 300):
        content[place] ^= 0xFF
    path = drop(landing, "damaged.parquet", bytes(content))
    assert len(landing.files()) == 2
    assert [a.file.path for a in landing.arrivals(0)] != [path]
    assert list(landing.unreadable()) == [path]
    assert Landing(landing.lake).last_busy_day() == "2026-03-02"
