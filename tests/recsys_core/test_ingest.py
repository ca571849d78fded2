"""Foreign files of every format become landing files, catalogue rows or quarantined rows; none is lost."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from recsys_core import ingest as ingest_module
from recsys_core import readers
from recsys_core.catalog import CATALOG_SCHEMA, read_catalog
from recsys_core.events import HOUR_MS, key_start_ms
from recsys_core.ingest import IngestReport, ingest, ingest_catalog
from recsys_core.lake import Lake
from recsys_core.landing import Landing
from recsys_core.ledger import LandingFile
from recsys_core.mappings import BUILTIN, MappingError, detect
from recsys_core.parsing import parse_amount, parse_bool, parse_decimal, parse_names, parse_ts
from recsys_core.settings import EventSettings, SourceMapping
from recsys_core.sources import IngestError

T = 1_700_000_000_000
NOW = T + 1000 * HOUR_MS
SHOP = SourceMapping(
    user_id="who", item_id="what", event_type="how", ts="when", value="paid", event_types={" Buy ": "purchase", "LOOK": "view"}
)
ROWS = [
    {"who": "anna", "what": "tent", "how": "look", "when": str(T), "paid": ""},
    {"who": "anna", "what": "tent", "how": " BUY", "when": str(T + 60_000), "paid": "99.5"},
    {"who": "bert", "what": "pan, small", "how": "cart", "when": str(T + 120_000), "paid": ""},
]
LANDED = [
    ("anna", "tent", "view", T, None),
    ("anna", "tent", "purchase", T + 60_000, 99.5),
    ("bert", "pan, small", "cart", T + 120_000, None),
]


@pytest.fixture
def landing(lake: Lake) -> Landing:
    return Landing(lake)


def take(path: Path, landing: Landing, mapping: SourceMapping = SHOP, **options: Any) -> IngestReport:
    report = ingest(str(path), landing, mapping, EventSettings(), **{"now": NOW, **options})
    assert report.rows_read == report.landed + sum(report.quarantined.values()) + report.duplicates
    assert report.landed == len(landed(landing))
    assert sum(report.quarantined.values()) == len(quarantined(landing))
    return report


def landed(landing: Landing) -> list[dict[str, Any]]:
    return [row for file in landing.files() for row in pq.read_table(file.path).to_pylist()]


def facts(landing: Landing) -> list[tuple[Any, ...]]:
    return [tuple(r[c] for c in ("user_id", "item_id", "event_type", "ts", "value")) for r in landed(landing)]


def quarantined(landing: Landing) -> list[tuple[int, str]]:
    return [(row["row"], row["reason"]) for table in landing.quarantined() for row in table.to_pylist()]


def snapshot(lake: Lake) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in Path(lake.root).rglob("*.parquet")}


def csv_text(rows: list[dict[str, str]], delimiter: str = ",") -> str:
    quoted = [[f'"{v}"' if delimiter in v else v for v in row.values()] for row in rows]
    return "\n".join(delimiter.join(line) for line in [list(rows[0]), *quoted]) + "\n"


def write_csv(path: Path) -> None:
    path.write_text(csv_text(ROWS))


def write_csv_gz(path: Path) -> None:
    path.write_bytes(gzip.compress(csv_text(ROWS).encode()))


def write_tsv(path: Path) -> None:
    path.write_text(csv_text(ROWS, "\t"))


def write_jsonl(path: Path) -> None:
    typed = [{**row, "when": int(row["when"]), "paid": float(row["paid"]) if row["paid"] else None} for row in ROWS]
    path.write_text("".join(json.dumps(row) + "\n" for row in typed))


def write_jsonl_gz(path: Path) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))


def write_parquet(path: Path) -> None:
    typed = [{**row, "when": int(row["when"]), "paid": float(row["paid"]) if row["paid"] else None} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(typed), path)


def write_parquet_with_timestamps(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    times = pa.array([int(row["when"]) for row in ROWS], pa.timestamp("ms", tz="UTC"))
    pq.write_table(table.set_column(table.column_names.index("when"), "when", times), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.csv", write_csv),
        ("a.CSV.gz", write_csv_gz),
        ("a.tsv", write_tsv),
        ("a.jsonl", write_jsonl),
        ("a.ndjson.gz", write_jsonl_gz),
        ("a.parquet", write_parquet),
        ("b.parquet", write_parquet_with_timestamps),
    ],
)
def test_every_format_gives_the_same_events(tmp_path: Path, landing: Landing, name: str, write: Any) -> None:
    write(tmp_path / name)
    report = take(tmp_path / name, landing)
    assert facts(landing) == LANDED
    assert (report.rows_read, report.quarantined, report.first_ts, report.last_ts) == (3, {}, T, T + 120_000)


def test_a_row_that_cannot_be_an_event_is_quarantined_with_file_number_reason_and_content(
    tmp_path: Path, landing: Landing
) -> None:
    file = tmp_path / "bad.csv"
    file.write_text(
        "who,what,how,when,paid\n"
        f"anna,tent,look,{T},\n"
        f",tent,look,{T},\n"
        f"anna,tent,dance,{T},\n"
        "anna,tent,look,yesterday,\n"
        f"anna,tent,look,{NOW + 2 * HOUR_MS},\n"
        f"anna,tent\n"
        f"anna,tent,buy,{T},ninety\n"
        f"anna,tent,look,{T // 1000},\n"
    )
    report = take(file, landing)
    assert report.landed == 2
    assert quarantined(landing) == [
        (2, "missing user_id"),
        (3, "unknown event_type"),
        (4, "missing or unreadable ts"),
        (5, "ts in the future"),
        (6, "2 columns where 5 are expected"),
        (8, "ts before 1990: wrong unit or broken clock"),
    ]
    [table] = landing.quarantined()
    third = table.to_pylist()[1]
    assert third["origin"] == str(file)
    assert json.loads(third["content"]) == {"who": "anna", "what": "tent", "how": "dance", "when": str(T), "paid": None}
    assert table.to_pylist()[4]["content"] == "anna,tent"


def test_bytes_that_are_no_utf8_cost_one_row(tmp_path: Path, landing: Landing) -> None:
    lines = [b"who,what,how,when,paid", b"\xff\xfe,tent,look,%d," % T, "jürgen,tent,look,%d,".encode() % T]
    (tmp_path / "a.csv").write_bytes(b"\n".join(lines))
    take(tmp_path / "a.csv", landing)
    assert facts(landing) == [("jürgen", "tent", "view", T, None)]
    assert quarantined(landing) == [(1, "not UTF-8")]


def test_a_quoted_value_may_have_line_ends_and_a_stray_quote_costs_one_row(tmp_path: Path, landing: Landing) -> None:
    (tmp_path / "a.csv").write_text(
        "who,what,how,when,paid\r\n"
        f'anna,"a\r\nb",look,{T},\r\n'
        "\r\n"
        f'anna,5" nail,look,{T},\r\n'
        f'anna,"tent,look,{T},\r\n'
        f"bert,tent,look,{T},\r\n",
        newline="",
    )
    take(tmp_path / "a.csv", landing)
    assert [(r["user_id"], r["item_id"]) for r in landed(landing)] == [("anna", "a\nb"), ("anna", '5" nail'), ("bert", "tent")]
    assert quarantined(landing) == [(3, "a quote that is never closed")]


def test_row_numbers_and_values_survive_block_borders(
    tmp_path: Path, landing: Landing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 64)
    rows = ["short,row" if n % 10 == 0 else f'u{n},"first\nsecond {n}",look,{T + n},' for n in range(1, 101)]
    (tmp_path / "a.csv").write_text("\n".join(["who,what,how,when,paid", *rows]))
    take(tmp_path / "a.csv", landing)
    assert [row for row, _ in quarantined(landing)] == list(range(10, 101, 10))
    assert [(r["user_id"], r["item_id"], r["ts"]) for r in landed(landing)] == [
        (f"u{n}", f"first\nsecond {n}", T + n) for n in range(1, 101) if n % 10
    ]


@hypothesis_settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.text('ab",\r\t 1', max_size=12), max_size=30), block=st.integers(8, 200))
def test_every_line_of_garbage_is_accounted_for(tmp_path: Path, lines: list[str], block: int) -> None:
    file = tmp_path / "garbage.csv"
    file.write_bytes("\n".join(["x,y", *lines]).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "BLOCK_BYTES", block)
        batches = list(readers.read_rows(readers.SourceFile(Lake(str(tmp_path)).fs, str(file))))
    numbers = sorted([n for b in batches for n in b.rows.tolist()] + [r.row for b in batches for r in b.rejected])
    assert numbers == list(range(1, len(numbers) + 1))
    kept = "".join(str(list(row.values())) for b in batches for row in b.table.to_pylist())
    kept += "".join(r.content for b in batches for r in b.rejected)
    assert kept.count("a") == "".join(lines).count("a")


def test_lines_that_are_no_json_objects_are_quarantined(tmp_path: Path, landing: Landing) -> None:
    good = json.dumps({"who": "anna", "what": "tent", "how": "look", "when": T, "paid": 1})
    (tmp_path / "a.jsonl").write_text(f'{good}\n{{"who": \n\n[1]\n{{}}\n{good}\n')
    take(tmp_path / "a.jsonl", landing)
    assert quarantined(landing) == [(n, "not a JSON object with fields") for n in (2, 3, 4)]
    assert [r["value"] for r in landed(landing)] == [1.0, 1.0]


def test_a_file_that_lacks_a_mapped_column_is_an_error_that_names_both(tmp_path: Path, landing: Landing) -> None:
    (tmp_path / "b.csv").write_text("who,item,how,when\n")
    with pytest.raises(
        MappingError, match=r"b\.csv: the mapping names what, paid; the file's columns are who, item, how, when"
    ):
        take(tmp_path, landing)
    assert snapshot(landing.lake) == {}


def test_events_need_a_mapping_of_events_and_items_one_of_items(tmp_path: Path, landing: Landing) -> None:
    write_csv(tmp_path / "a.csv")
    with pytest.raises(MappingError, match="of kind 'events' is needed"):
        take(tmp_path / "a.csv", landing, SourceMapping(kind="catalog", item_id="what"))
    with pytest.raises(MappingError, match="of kind 'catalog' is needed"):
        ingest_catalog(str(tmp_path / "a.csv"), landing.lake, SHOP)


def test_a_file_may_lack_the_columns_that_the_mapping_calls_optional(tmp_path: Path, landing: Landing) -> None:
    (tmp_path / "a.csv").write_text(f"who,what,how,when\nanna,tent,look,{T}\n")
    take(tmp_path / "a.csv", landing, SHOP.model_copy(update={"optional": ["paid"]}))
    assert facts(landing) == LANDED[:1]


def test_a_folder_is_read_in_order_without_hidden_and_other_files(tmp_path: Path, landing: Landing) -> None:
    folder = tmp_path / "in"
    (folder / "day2").mkdir(parents=True)
    write_jsonl(folder / "day2" / "c.jsonl")
    write_csv(folder / "b.csv")
    write_csv(folder / ".hidden.csv")
    (folder / "notes.md").write_text("not data")
    report = take(folder, landing)
    assert [Path(f.path).name for f in report.files] == ["b.csv", "c.jsonl"]
    assert report.landed == 6


def test_a_folder_without_data_files_names_the_endings(tmp_path: Path, landing: Landing) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.md").write_text("not data")
    with pytest.raises(IngestError, match=r"no data file; the endings read are \.csv, \.tsv"):
        take(tmp_path / "in", landing)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        take(tmp_path / "nowhere", landing)


@pytest.mark.parametrize("content", ["", "who,what,how,when,paid\n", "who,what,how,when,paid"])
def test_a_file_without_rows_is_fine(tmp_path: Path, landing: Landing, content: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    report = take(tmp_path / "a.csv", landing)
    assert (report.rows_read, report.first_ts, report.last_ts) == (0, None, None)
    assert snapshot(landing.lake) == {}


@pytest.mark.parametrize("name", ["a.csv.gz", "a.parquet"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, landing: Landing, name: str) -> None:
    (write_csv_gz if name.endswith("gz") else write_parquet)(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:-20])
    with pytest.raises(IngestError, match=rf"{name} is damaged"):
        take(tmp_path / name, landing)


def test_ingesting_a_file_again_rewrites_the_same_files(tmp_path: Path, landing: Landing) -> None:
    write_csv(tmp_path / "My Shop (1).csv")
    report = take(tmp_path / "My Shop (1).csv", landing)
    assert report.files[0].source.startswith("my-shop-1-")
    first = snapshot(landing.lake)
    take(tmp_path / "My Shop (1).csv", landing)
    assert snapshot(landing.lake) == first


def test_a_corrected_mapping_takes_back_what_was_quarantined(tmp_path: Path, landing: Landing) -> None:
    write_csv(tmp_path / "a.csv")
    assert take(tmp_path / "a.csv", landing, SHOP.model_copy(update={"event_types": {}})).quarantined == {
        "unknown event_type": 2
    }
    assert take(tmp_path / "a.csv", landing).quarantined == {}


def test_ids_are_the_sources_own_or_made_from_content(tmp_path: Path, landing: Landing) -> None:
    (tmp_path / "a.csv").write_text(f"id,who,what,when\ne1,anna,tent,{T}\n,anna,tent,{T}\n,anna,tent,{T}\n,anna,pan,{T}\n")
    take(tmp_path / "a.csv", landing, SourceMapping(user_id="who", item_id="what", ts="when", event_id="id"))
    ids = [r["event_id"] for r in landed(landing)]
    assert ids[0] == "e1"
    assert ids[1] == ids[2] != ids[3]
    assert len(ids[3]) == 32


def test_a_large_file_is_read_in_chunks_within_bounded_memory(
    tmp_path: Path, landing: Landing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest_module, "CHUNK_ROWS", 5_000)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 100_000)
    with (tmp_path / "a.csv").open("w") as out:
        out.write("who,what,how,when,paid,note\n")
        for n in range(60_000):
            out.write(f"u{n},i{n % 100},look,{T + n},,{'x' * 200}\n")
    allocated = pa.total_allocated_bytes()
    peaks = []
    write = landing.stage_events

    def spy(source: str, name: str, events: pa.Table) -> LandingFile:
        peaks.append(pa.total_allocated_bytes() - allocated)
        return write(source, name, events)

    monkeypatch.setattr(landing, "stage_events", spy)
    tracemalloc.start()
    report = take(tmp_path / "a.csv", landing)
    assert report.landed == 60_000
    assert len(peaks) > 8
    assert max(peaks) < 8_000_000 < (tmp_path / "a.csv").stat().st_size
    tracemalloc.stop()


# -- times ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "unit", "expected"),
    [
        ("1465413032", "s", 1465413032000),
        (" 1465413032.0 ", "s", 1465413032000),
        ("1465413032.25", "s", 1465413032250),
        ("1.465413032e9", "s", 1465413032000),
        ("1465413032000", "ms", 1465413032000),
        ("1465413032000999", "us", 1465413032000),
        ("1465413032000999999", "ns", 1465413032000),
        ("146541303200099999", "ns", 146541303200),
        ("2019-10-01 00:00:00 UTC", "iso", 1569888000000),
        ("2019-10-01T00:00:00Z", "iso", 1569888000000),
        ("2019-10-01T02:00:00.123456+02:00", "iso", 1569888000123),
        ("2019-10-01 00:00", "iso", 1569888000000),
        ("2019-10-01", "iso", 1569888000000),
        ("01.10.2019", "iso", 1569888000000),
        ("1.10.2019, 02:00:00,250", "ms", 1569895200250),
        ("2019/10/1 00:00", "iso", 1569888000000),
        ("1/10/2019", "dmy", 1569888000000),
        ("10/1/2019 00:00", "mdy", 1569888000000),
        ("2019-10-01", "dmy", 1569888000000),
        ("1/10/2019", "iso", None),
        ("31.13.2019", "iso", None),
        ("2019-10-01 00:00:00", "ms", 1569888000000),
        ("2019-13-01 00:00:00", "iso", None),
        ("+1569888000", "s", 1_569_888_000_000),
        (" +5 ", "ms", 5),
        ("1569888000", "iso", None),
        ("", "s", None),
        ("yesterday", "ms", None),
        ("99999999999999999999", "s", None),
        ("999999999999999999", "s", None),
        ("1e99", "s", None),
        ("nan", "s", None),
        (None, "iso", None),
    ],
)
def test_times_of_every_unit(text: str | None, unit: str, expected: int | None) -> None:
    assert parse_ts(pa.array([text], pa.string()), unit).to_pylist() == [expected]


def test_times_of_one_column_may_be_written_differently() -> None:
    mixed = pa.array(["2019-10-01", "2019-10-01 00:00:00 UTC", "2019-10-01T01:00:00+01:00", "x", None])
    assert parse_ts(mixed, "iso").to_pylist() == [1569888000000] * 3 + [None, None]


def test_numbers_and_truth_values() -> None:
    assert parse_decimal(pa.array(["1", "-2.5", ".5", "1e3", "1,5", "nan", "inf", "", None])).to_pylist() == [
        1.0,
        -2.5,
        0.5,
        1000.0,
        *[None] * 5,
    ]
    assert parse_bool(pa.array(["TRUE", "no", " 1", "maybe", None])).to_pylist() == [True, False, True, None, None]


@pytest.mark.parametrize(
    ("text", "decimal", "expected"),
    [
        ("$12.99", ".", 12.99),
        ("US$ 12.99", ".", 12.99),
        ("12,50 EUR", ".", 12.5),
        ("12,50\u00a0€", ".", 12.5),
        ("-12,5", ".", -12.5),
        ("€ -3", ".", -3.0),
        ("1,299.00", ".", 1299.0),
        ("1.299,00", ".", 1299.0),
        ("1 299,50 kr", ".", 1299.5),
        ("1'299.50", ".", 1299.5),
        ("1,234,567", ".", 1234567.0),
        ("1.234.567", ".", 1234567.0),
        ("1,299", ".", 1299.0),
        ("1,299", ",", 1.299),
        ("1.299", ".", 1.299),
        ("1.299", ",", 1299.0),
        ("0,299", ".", 0.299),
        ("1e3", ",", 1000.0),
        ("12.50", ",", 12.5),
        ("1,29,9", ".", None),
        ("12.3.4", ".", None),
        ("12 50", ".", None),
        ("cheap", ".", None),
        ("12 per kg", ".", None),
        ("--3", ".", None),
        ("9" * 400, ".", None),
        ("", ".", None),
        (None, ".", None),
    ],
)
def test_amounts_are_read_as_people_write_them(text: str | None, decimal: Any, expected: float | None) -> None:
    assert parse_amount(pa.array([text], pa.string()), decimal).to_pylist() == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("42", "42"),
        ("42.0", "42"),
        ("-42.00", "-42"),
        ("1e+15", "1000000000000000"),
        ("1.0E15", "1000000000000000"),
        ("1.5E+15", "1500000000000000"),
        ("9007199254740993.0", "9007199254740993"),
        ("1e5", "1e5"),
        ("007", "007"),
        ("1.5", "1.5"),
        ("v1.0", "v1.0"),
        (" anna\t", "anna"),
        ("\u00a0anna", "anna"),
        ("Nullen", "Nullen"),
        *((word, None) for word in ("NULL", "\\N", "None", "nan", "NaN", "(null)", "N/A", "<NA>", " null ", "   ", "")),
        (None, None),
    ],
)
def test_a_name_is_the_text_that_was_written(text: str | None, expected: str | None) -> None:
    assert parse_names(pa.array([text], pa.string())).to_pylist() == [expected]
    assert parse_names(pa.array(["plain", text], pa.string())).to_pylist() == ["plain", expected]


# -- the shift ------------------------------------------------------------------------------------------------------


def history(path: Path, strays: int) -> None:
    """Ten busy hours from `T`'s hour on, 200 events each, and one stray event in each of the next `strays` hours."""
    hour = T // HOUR_MS * HOUR_MS
    times = [hour + h * HOUR_MS + n for h in range(10) for n in range(200)]
    times += [hour + (10 + h) * HOUR_MS for h in range(strays)]
    path.write_text("who,what,how,when,paid\n" + "".join(f"u{n},i,look,{ts},\n" for n, ts in enumerate(times)))


@pytest.mark.parametrize("strays", [0, 5, 400])
def test_the_shift_moves_the_last_busy_hour_into_the_hour_just_completed(tmp_path: Path, landing: Landing, strays: int) -> None:
    history(tmp_path / "a.csv", strays)
    now = key_start_ms("2026-03-01T12") + 20 * 60_000
    report = take(tmp_path / "a.csv", landing, shift_to_ms=now, now=now)
    assert report.shift_ms % HOUR_MS == 0
    assert report.first_ts == key_start_ms("2026-03-01T02")
    in_last_hour = [r for r in landed(landing) if r["ts"] // HOUR_MS * HOUR_MS == key_start_ms("2026-03-01T11")]
    assert len(in_last_hour) == 200
    # Strays of 12:00 and 13:00 are within the hour that clocks may be ahead.
    assert report.quarantined == ({"ts in the future": strays - 2} if strays > 2 else {})


def test_a_broken_clock_is_no_end_of_history_and_is_not_moved(tmp_path: Path, landing: Landing) -> None:
    (tmp_path / "a.csv").write_text(f"who,what,how,when,paid\nu,i,look,0,\nu,i,look,{T},\nu,i,look,9999999999999,\n")
    report = take(tmp_path / "a.csv", landing, shift_to_ms=NOW)
    assert report.last_ts is not None
    assert report.last_ts // HOUR_MS == NOW // HOUR_MS - 1
    assert report.quarantined == {"ts before 1990: wrong unit or broken clock": 1, "ts in the future": 1}


def test_the_shift_leaves_ids_as_they_are(tmp_path: Path, landing: Landing) -> None:
    write_csv(tmp_path / "a.csv")
    take(tmp_path / "a.csv", landing)
    before = [r["event_id"] for r in landed(landing)]
    take(tmp_path / "a.csv", landing, shift_to_ms=NOW)
    assert [r["event_id"] for r in landed(landing)] == before


def test_there_is_nothing_to_shift_without_a_time(tmp_path: Path, landing: Landing) -> None:
    (tmp_path / "a.csv").write_text("who,what,how,when,paid\nu,i,look,x,\n")
    assert take(tmp_path / "a.csv", landing, shift_to_ms=NOW).shift_ms == 0


# -- the catalogue --------------------------------------------------------------------------------------------------

ITEMS = SourceMapping(
    kind="catalog",
    item_id="sku",
    title="name",
    category="group",
    category_separator=">",
    price="eur",
    available="stock",
    attributes=["*"],
)


def test_items_become_catalogue_rows_and_the_last_row_of_an_item_wins(tmp_path: Path, lake: Lake) -> None:
    (tmp_path / "a.csv").write_text(
        "sku,name,group,eur,stock,colour\n"
        "b,Pan,home>kitchen,12.5,yes,red\n"
        "a,Tent,sports>camping,,no,\n"
        "b,Large Pan,home>kitchen,15,,blue\n"
        ",Ghost,home,1,yes,\n"
        "c,Bowl,home,cheap,maybe,\n"
    )
    report = ingest_catalog(str(tmp_path / "a.csv"), lake, ITEMS)
    assert (report.rows_read, report.landed, report.items) == (5, 4, 3)
    assert report.quarantined == {"missing item_id": 1}
    assert report.unreadable == {"price": 1, "available": 1}
    assert quarantined(Landing(lake)) == [(4, "missing item_id")]
    catalog = read_catalog(lake)
    assert catalog.schema == CATALOG_SCHEMA
    assert [tuple(row.values()) for row in catalog.to_pylist()] == [
        ("a", "Tent", "sports/camping", None, False, None),
        ("b", "Large Pan", "home/kitchen", 15.0, True, '{"colour":"blue"}'),
        ("c", "Bowl", "home", None, True, None),
    ]


def test_a_second_catalogue_file_is_merged_into_the_first(tmp_path: Path, lake: Lake) -> None:
    assert read_catalog(lake).num_rows == 0
    mapping = SourceMapping(kind="catalog", item_id="sku", title="name")
    for name, text in (("one.csv", "sku,name\na,Old\nb,Pan\n"), ("two.jsonl", '{"sku": "a", "name": "New"}\n')):
        (tmp_path / name).write_text(text)
        ingest_catalog(str(tmp_path / name), lake, mapping)
    assert read_catalog(lake).select(["item_id", "title"]).to_pylist() == [
        {"item_id": "a", "title": "New"},
        {"item_id": "b", "title": "Pan"},
    ]


REES46 = (
    "event_time,event_type,product_id,category_id,category_code,brand,price,user_id,user_session\n"
    "2019-10-01 00:00:00 UTC,view,1,77,home.kitchen.pans,acme,10.50,u1,s1\n"
    "2019-10-01 00:01:00 UTC,purchase,1,77,home.kitchen.pans,acme,9.50,u1,s1\n"
    "2019-10-01 00:02:00 UTC,view,2,78,,,3,u1,s1\n"
    "2019-10-01 00:03:00 UTC,fly,3,78,,,3,u1,s1\n"
)


def test_event_rows_can_also_describe_their_items(tmp_path: Path, landing: Landing) -> None:
    (tmp_path / "shop.csv").write_text(REES46)
    report = take(tmp_path / "shop.csv", landing, BUILTIN["rees46"])
    assert report.catalog is not None
    assert report.catalog.items == 2
    assert [tuple(row.values()) for row in read_catalog(landing.lake).to_pylist()] == [
        ("1", None, "home/kitchen/pans", 9.5, True, '{"brand":"acme","category_id":"77"}'),
        ("2", None, None, 3.0, True, '{"category_id":"78"}'),
    ]


# -- the ready mappings ---------------------------------------------------------------------------------------------

SAMPLES = {
    "recsys": ("a.jsonl", '{"user_id": "u", "item_id": "i", "event_type": "view", "ts": 1700000000000}\n', "view"),
    "globo": (
        "a.csv",
        "user_id,session_id,session_start,session_size,click_article_id,click_timestamp,click_environment,click_deviceGroup,"
        "click_os,click_country,click_region,click_referrer_type\n5,15,1500000000000,2,77,1500000001000,4,3,20,1,20,2\n",
        "click",
    ),
    "deskdrop": (
        "a.csv",
        "timestamp,eventType,contentId,personId,sessionId,userAgent,userRegion,userCountry\n"
        "1465413032,COMMENT CREATED,-34,-88,12,,,BR\n",
        "comment",
    ),
    "movielens": ("ratings.csv", "userId,movieId,rating,timestamp\n1,2,3.5,964982703\n", "rating"),
    "movielens-100k": ("u.data", "196\t242\t3\t881250949\n", "rating"),
    "movielens-inter": (
        "a.inter",
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t2\t3\t881250949\n",
        "rating",
    ),
    "rees46": ("a.csv", REES46.split("2019-10-01 00:01")[0], "view"),
    "retailrocket": ("a.csv", "timestamp,visitorid,event,itemid,transactionid\n1433221332117,25,addtocart,35,\n", "cart"),
    "taobao": ("a.csv", "1,22,333,buy,1511658000\n", "purchase"),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_ready_mapping_is_found_by_its_columns_and_fits(tmp_path: Path, landing: Landing, name: str) -> None:
    file, text, event_type = SAMPLES[name]
    (tmp_path / file).write_text(text)
    assert detect(str(tmp_path / file)) == name
    take(tmp_path / file, landing, BUILTIN[name])
    assert [r["event_type"] for r in landed(landing)] == [event_type]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("movielens-catalog", "movieId,title,genres\n1,A Film (1999),Drama\n"),
        ("globo-catalog", "article_id,category_id,created_at_ts,publisher_id,words_count\n1,2,3,4,5\n"),
        ("deskdrop-catalog", "timestamp,eventType,contentId,contentType,url,title,text,lang\n1,X,2,HTML,http://x,A,B,en\n"),
        ("recsys-catalog", "item_id,title,category\n1,A,b\n"),
    ],
)
def test_a_ready_catalogue_mapping_is_found_and_fits(tmp_path: Path, lake: Lake, name: str, text: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    assert detect(str(tmp_path / "a.csv")) == name
    assert ingest_catalog(str(tmp_path / "a.csv"), lake, BUILTIN[name]).items == 1


def test_a_file_that_fits_no_mapping_or_two_is_an_error_that_lists_what_there_is(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv")
    with pytest.raises(MappingError, match=r"columns who, what, how, when, paid; none of deskdrop, .*taobao fits"):
        detect(str(tmp_path / "a.csv"))
    assert detect(str(tmp_path / "a.csv"), {"shop": SHOP}) == "shop"
    with pytest.raises(MappingError, match="fit equally: other, shop"):
        detect(str(tmp_path / "a.csv"), {"shop": SHOP, "other": SHOP})
