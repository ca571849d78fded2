import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from builders import NULLABLE_EVENTS, event, event_table, land, ms

from recsys_core.events import EVENT_SCHEMA
from recsys_core.lake import Lake
from recsys_core.landing import ARCHIVE_SCHEMA, QUARANTINE_SCHEMA, Landing, OffsetRange
from recsys_core.ledger import DamagedLedger, Ledger


@pytest.fixture
def landing(any_store: str) -> Landing:
    """A landing zone in a store of each kind."""
    return Landing(Lake(any_store))


def at(*moments: str) -> pa.Table:
    return event_table(*(event(moment, "u", "i", moment) for moment in moments), schema=EVENT_SCHEMA)


def names(files) -> list[str]:
    return [file.path.rsplit("/", 1)[-1] for file in files]


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
    assert names(landing.ledger.read().covering(ten, eleven)) == ["late.parquet", "wide.parquet"]
    assert names(landing.ledger.read().covering(ten - 1, ten)) == ["early.parquet", "wide.parquet"]
    assert names(landing.ledger.read().covering(eleven, eleven + 1)) == ["late.parquet", "wide.parquet"]
    assert names(landing.ledger.read().covering(eleven + 1, eleven + 2)) == ["wide.parquet"]
    assert landing.ledger.read().covering(ms("2026-03-03T00:00") + 1, ms("2026-03-04")) == []


def test_the_extent_is_that_of_all_files_and_none_where_nothing_landed(landing):
    assert landing.extent() is None
    landing.write_events("app", "empty", at())
    assert landing.extent() is None
    assert landing.ledger.read().covering(0, ms("2100-01-01")) == []
    landing.write_events("app", "b", at("2026-03-02T10:00", "2026-03-05T10:00"))
    landing.write_events("web", "a", at("2026-03-01T10:00"))
    assert landing.extent() == (ms("2026-03-01T10:00"), ms("2026-03-05T10:00"))


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


# -- damage, and what nobody reads ---------------------------------------------------------------------------------------


def cut_short(landing: Landing, path: str) -> bytes:
    """Damage a file. Returns what it was."""
    content: bytes = landing.lake.fs.cat_file(path)
    landing.lake.fs.pipe_file(path, content[:-30])
    return content


def test_a_file_that_cannot_be_read_is_named_once_it_was_noted_and_as_long_as_it_cannot(landing):
    good, bad, gone = (landing.write_events("app", name, at("2026-03-02T10:00")) for name in ("good", "bad", "gone"))
    whole = cut_short(landing, bad)
    landing.lake.fs.rm_file(gone)
    damaged = landing.damaged(landing.files())
    assert set(damaged) == {bad, gone}
    assert good not in damaged
    assert damaged[gone] == "it is gone"
    assert damaged[bad].startswith("not readable as Parquet: ")
    assert landing.unreadable() == {}, "nobody has said so"
    for hours in (["2026-03-02T10"], ["2026-03-02T11", "2026-03-02T10"]):
        landing.note_damaged({bad: damaged[bad]}, hours)
    assert landing.unreadable() == {bad: damaged[bad]}
    [noted] = landing.noted()
    assert (noted.path, noted.hours) == ("landing/app/bad.parquet", ("2026-03-02T10", "2026-03-02T11"))
    landing.lake.fs.pipe_file(bad, whole)
    assert landing.unreadable() == {}
    assert set(landing.damaged(landing.files())) == {gone}


def test_damaged_pages_under_a_whole_footer_are_found(landing):
    path = landing.write_events("app", "one", at(*(f"2026-03-02T10:{n:02}" for n in range(60))))
    content = bytearray(landing.lake.fs.cat_file(path))
    for place in range(4, 300):
        content[place] ^= 0xFF
    landing.lake.fs.pipe_file(path, bytes(content))
    assert list(landing.damaged(landing.files())) == [path]


def test_a_store_that_is_away_makes_no_file_unreadable(landing, monkeypatch):
    landing.write_events("app", "good", at("2026-03-02T10:00"))

    def away(*_, **__):
        raise ConnectionError(111, "refused")

    with monkeypatch.context() as patch:
        patch.setattr(landing.lake.fs, "open", away)
        with pytest.raises(ConnectionError):
            landing.damaged(landing.files())
    assert landing.damaged(landing.files()) == {}


def drop(landing: Landing, name: str) -> str:
    """Copy a file into the landing zone by hand."""
    path = landing.lake.path("landing", name)
    landing.lake.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    landing.lake.fs.pipe_file(path, b"x")
    return path


def test_what_somebody_put_there_is_read_by_nobody_and_named(landing):
    assert landing.strangers() == []
    landing.write_events("app", "one", at("2026-03-02T10:00"))
    mine = [drop(landing, name) for name in ("clicks.parquet", "mine/x.parquet", "mine/deep/notes.txt")]
    assert names(landing.files()) == ["one.parquet"]
    assert landing.strangers() == sorted(mine)


@pytest.mark.parametrize(
    "name",
    [
        ".copying.parquet",
        "_tmp.parquet",
        "_temporary/0/part.parquet",
        ".hidden/x.parquet",
        "shop-0123456789abcdef/00000.parquet",
        "clicks/0abcdef0-00003-00000000000000000000-00000000000000000059.parquet",
    ],
)
def test_a_copy_under_way_and_what_a_writer_of_ours_has_not_committed_is_no_stranger(landing, name):
    landing.write_events("app", "one", at("2026-03-02T10:00"))
    drop(landing, name)
    assert names(landing.files()) == ["one.parquet"]
    assert landing.strangers() == []


@pytest.mark.parametrize("area", ["landing", "quarantine"])
def test_a_ledger_that_was_lost_is_not_taken_for_an_empty_landing_zone(landing, area):
    landing.write_events("app", "one", at("2026-03-02T10:00"))
    landing.lake.fs.rm_file(landing.lake.path("ledger", "head.json"))
    drop(landing, "mine.parquet")
    assert Landing(landing.lake).files() == [], "nothing says that it had counted"
    path = landing.lake.path(area, "shop-0123456789abcdef", "00000.parquet")
    landing.lake.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    landing.lake.fs.pipe_file(path, b"x")
    other = Landing(landing.lake)
    for use in (other.files, other.ledger.version, lambda: other.write_events("app", "two", at("2026-03-02T10:00"))):
        with pytest.raises(DamagedLedger, match=r"00000\.parquet is there and head\.json .* from a backup"):
            use()


def test_a_writer_that_broke_off_before_the_first_commit_stops_nobody(landing, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "commit", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            landing.write_events("shop-0123456789abcdef", "00000", at("2026-03-02T10:00"))
    other = Landing(landing.lake)
    assert other.files() == []
    other.write_events("shop-0123456789abcdef", "00000", at("2026-03-02T10:00"))
    assert names(other.files()) == ["00000.parquet"]


def test_a_folder_that_cannot_be_listed_is_named(landing, monkeypatch):
    landing.write_events("app", "one", at("2026-03-02T10:00"))
    closed = drop(landing, "closed/x.parquet").rsplit("/", 1)[0]
    own = landing.lake.fs.ls

    def ls(path, *more, **others):
        if path == closed:
            raise PermissionError(13, "Permission denied")
        return own(path, *more, **others)

    monkeypatch.setattr(landing.lake.fs, "ls", ls)
    assert landing.strangers() == [closed]


def test_quarantine_that_is_damaged_or_gone_is_left_out(landing):
    rows = pa.table({"origin": ["f"], "row": [1], "reason": ["no id"], "content": ["x" * 300]}, schema=QUARANTINE_SCHEMA)
    paths = [landing.write_quarantine("test", name, rows) for name in ("a", "damaged", "gone")]
    cut_short(landing, paths[1])
    landing.lake.fs.rm_file(paths[2])
    assert [table.num_rows for table in landing.quarantined()] == [1]


# -- what the ledger says of them ------------------------------------------------------------------------------------------


def test_files_are_told_by_the_hours_of_their_events(landing):
    landing.write_events("app", "one", at("2026-03-02T10:15", "2026-03-02T10:59", "2026-03-02T12:00"))
    [file] = landing.files()
    assert file.hours == {"2026-03-02T10": 2, "2026-03-02T12": 1}
    landing.write_events("app", "two", at("2026-03-02T12:00"))
    assert landing.news(0) == {"2026-03-02T10": 1, "2026-03-02T12": 2}
    assert landing.news(1) == {"2026-03-02T12": 2}
    landing.write_events("app", "one", at("2026-03-02T10:15"))
    assert landing.news(2) == {"2026-03-02T10": 3}
    assert landing.news(3) == {}


def test_rows_that_are_taken_out_are_no_news_and_the_archive_still_adds_up(landing):
    held = OffsetRange("clicks", "0abcdef0", 0, 0, 299_999)
    rows = pa.Table.from_pylist(
        [{**event(f"e{n}", f"u{n % 3}", "i", f"2026-03-02T1{n % 2}"), "offset": 100 * n} for n in range(3000)],
        schema=ARCHIVE_SCHEMA,
    )
    landing.write_archive(held, 3000, rows, QUARANTINE_SCHEMA.empty_table())
    [before] = landing.files()
    landing.take_out(before.path, lambda table: pc.equal(table["user_id"], "u0"), landing.ledger.read())
    [after] = landing.files()
    assert (after.rows, after.forgotten, after.messages, sum(after.hours.values())) == (2000, 1000, 3000, 2000)
    assert (after.since, after.arrived) == (before.since, before.arrived)
    assert after.bytes == landing.lake.fs.info(after.path)["size"]
    assert landing.news(before.since) == {}
    with landing.lake.fs.open(after.path, "rb") as source:
        assert pq.read_table(source).equals(rows.filter(pc.not_equal(rows["user_id"], "u0")))


def test_the_last_busy_day_is_not_one_of_stray_events(landing):
    assert landing.last_busy_day() is None
    for day, events in (("01", 50), ("02", 60), ("03", 40), ("04", 2), ("19", 1)):
        landing.write_events("app", day, at(*(f"2026-03-{day}T10:{n:02}" for n in range(events))))
    assert landing.last_busy_day() == "2026-03-03"
