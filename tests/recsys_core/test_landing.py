import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import NULLABLE_EVENTS, event, event_table, land, ms

from recsys_core.events import EVENT_SCHEMA
from recsys_core.lake import Lake
from recsys_core.landing import QUARANTINE_SCHEMA, Landing


@pytest.fixture
def landing(lake: Lake) -> Landing:
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
    assert pq.read_table(path).schema.names == EVENT_SCHEMA.names


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


@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_file_that_is_rewritten_is_looked_at_again(where, tmp_path):
    landing = Landing(Lake(str(tmp_path) if where == "local" else f"memory://{tmp_path.name}"))
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
