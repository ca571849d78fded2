"""Files as writers leave them: damage costs its own rows, and the rows add up to lines that no parser counted."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import os
import random
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import event, event_table
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from recsys_core import delimited, json_rows, readers, sources
from recsys_core import ingest as ingest_module
from recsys_core.catalog import read_catalog
from recsys_core.events import EVENT_SCHEMA
from recsys_core.ingest import CatalogReport, IngestReport, ingest, ingest_catalog
from recsys_core.lake import Lake
from recsys_core.landing import Landing
from recsys_core.mappings import BUILTIN, MappingError, choose, fitting
from recsys_core.settings import EventSettings, SourceMapping
from recsys_core.sources import IngestError, SourceFile
from recsys_core.tombstones import TombstoneLog, hash_of

T = 1_767_225_600_000
UIT = SourceMapping(user_id="u", item_id="i", ts="t")
ITEMS = SourceMapping(kind="catalog", item_id="id", title="name", category="cat", price="price", attributes=["*"])


@pytest.fixture
def landing(lake: Lake) -> Landing:
    return Landing(lake)


def take(path: Path, landing: Landing, mapping: SourceMapping = UIT) -> IngestReport:
    report = ingest(str(path), landing, mapping, EventSettings())
    assert report.rows_read == report.landed + sum(report.quarantined.values()) + report.duplicates
    assert report.landed == len(landed(landing))
    return report


def landed(landing: Landing) -> list[dict[str, Any]]:
    return [row for file in landing.files() for row in pq.read_table(file.path).to_pylist()]


def pairs(landing: Landing) -> list[tuple[str, str]]:
    return [(row["user_id"], row["item_id"]) for row in landed(landing)]


def quarantined(landing: Landing) -> list[tuple[int, str]]:
    return [(row["row"], row["reason"]) for table in landing.quarantined() for row in table.to_pylist()]


def lines_of(data: bytes) -> int:
    """Counted as a person would: what has something on it."""
    return sum(1 for line in data.split(b"\n") if line.strip())


def clicks(count: int) -> list[str]:
    return [f"u{n},i{n % 7},{T + n}" for n in range(1, count + 1)]


# -- quotes ---------------------------------------------------------------------------------------------------------


def test_two_stray_quotes_far_apart_cost_two_rows(tmp_path: Path, landing: Landing) -> None:
    rows = clicks(1000)
    rows[99], rows[899] = f'"{rows[99]}', f'"{rows[899]}'
    (tmp_path / "q.csv").write_text("\n".join(["u,i,t", *rows]))
    report = take(tmp_path / "q.csv", landing)
    assert (report.rows_read, report.landed) == (1000, 998)
    assert quarantined(landing) == [(100, "a quote that is never closed"), (900, "a quote that is never closed")]


@pytest.mark.parametrize("apart", [1, 2, 3, 50])
def test_two_stray_quotes_that_look_like_one_quoted_id_cost_no_other_row(tmp_path: Path, landing: Landing, apart: int) -> None:
    rows = clicks(100)
    last = 9 + apart
    rows[9] = f'"{rows[9]}'
    rows[last] = rows[last].replace(",", '",', 1)
    (tmp_path / "q.csv").write_text("\n".join(["u,i,t", *rows]))
    report = take(tmp_path / "q.csv", landing)
    assert report.rows_read == 100
    users = {user for user, _ in pairs(landing)}
    assert users >= {f"u{n}" for n in range(1, 101) if n not in (10, last + 1)}


def test_stray_quotes_in_one_of_eight_hundred_rows_cost_those_rows(tmp_path: Path, landing: Landing) -> None:
    chance = random.Random(3)
    rows, broken = clicks(20_000), set()
    for n in range(20_000):
        if chance.random() < 1 / 800:
            at = chance.randrange(len(rows[n]))
            rows[n] = f'{rows[n][:at]}"{rows[n][at:]}'
            broken.add(n + 1)
    (tmp_path / "q.csv").write_text("\n".join(["u,i,t", *rows]))
    report = take(tmp_path / "q.csv", landing)
    assert report.rows_read == 20_000
    assert {row for row, _ in quarantined(landing)} <= broken
    assert {user for user, _ in pairs(landing)} >= {f"u{n}" for n in range(1, 20_001) if n not in broken}


def test_a_text_of_several_lines_with_delimiters_in_it_is_one_record(tmp_path: Path, lake: Lake) -> None:
    text = "Light, dry\nand warm, for two.\n\nMade in Finland"
    with (tmp_path / "items.csv").open("w", newline="") as out:
        csv.writer(out).writerows(
            [["id", "name", "cat", "price", "text"], ["a", "Tent", "x", "3", text], ["b", text, "x", "4", ""]]
        )
    report = ingest_catalog(str(tmp_path / "items.csv"), lake, ITEMS)
    assert (report.rows_read, report.landed) == (2, 2)
    a, b = read_catalog(lake).to_pylist()
    assert json.loads(a["attributes"]) == {"text": text}
    assert b["title"] == text


def test_quotes_that_are_escaped_by_a_backslash_are_read(tmp_path: Path, landing: Landing) -> None:
    (tmp_path / "a.csv").write_text(f'u,i,t\n"a \\"b, c\\" d",x,{T}\n"C:\\",y,{T}\n')
    take(tmp_path / "a.csv", landing)
    assert pairs(landing) == [('a "b, c" d', "x"), ("C:\\", "y")]


def test_a_value_with_text_after_its_closing_quote_is_not_made_up(tmp_path: Path, landing: Landing) -> None:
    (tmp_path / "a.csv").write_text(f'u,i,t\n"an"na,x,{T}\nbert,y,{T}\n')
    take(tmp_path / "a.csv", landing)
    assert pairs(landing) == [("bert", "y")]
    assert quarantined(landing) == [(1, "a quote inside a value")]


# -- the form of a file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["\n", "\r\n \r\n", "\ufeff\n", "   \n", "\ufeff", "sep=,\n"])
def test_the_header_is_the_first_line_that_holds_something(tmp_path: Path, landing: Landing, start: str) -> None:
    (tmp_path / "a.csv").write_bytes((start + "u,i,t\n" + "\n".join(clicks(3))).encode())
    assert take(tmp_path / "a.csv", landing).landed == 3


@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a.dat", "a.csv.gz"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", "::"])
def test_the_delimiter_is_what_the_first_lines_show(tmp_path: Path, landing: Landing, name: str, delimiter: str) -> None:
    text = "\n".join(["u,i,t", *clicks(3)]).replace(",", delimiter).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    take(tmp_path / name, landing)
    assert pairs(landing) == [("u1", "i1"), ("u2", "i2"), ("u3", "i3")]


def test_semicolons_with_decimal_commas_and_days_first(tmp_path: Path, landing: Landing) -> None:
    (tmp_path / "a.csv").write_text('u;i;t;paid\nanna;tent;31.12.2025 10:00;"1.299,50"\nbert;pan;1.1.2026 00:00:01;12,50\n')
    take(tmp_path / "a.csv", landing, UIT.model_copy(update={"value": "paid", "ts_unit": "iso"}))
    assert [(r["ts"], r["value"]) for r in landed(landing)] == [(1767175200000, 1299.5), (1767225601000, 12.5)]


def test_a_file_is_gzip_by_its_bytes_not_by_its_name(tmp_path: Path, landing: Landing) -> None:
    (tmp_path / "a.csv").write_bytes(gzip.compress(b"u,i,t\nanna,x,%d\n" % T))
    (tmp_path / "b.csv.gz").write_bytes(b"u,i,t\nbert,x,%d\n" % T)
    take(tmp_path, landing)
    assert pairs(landing) == [("anna", "x"), ("bert", "x")]


def test_utf_16_is_named_as_such(tmp_path: Path, landing: Landing) -> None:
    (tmp_path / "a.csv").write_bytes("u,i,t\n".encode("utf-16"))
    with pytest.raises(IngestError, match="UTF-16; save it as UTF-8"):
        take(tmp_path / "a.csv", landing)


# -- JSON -----------------------------------------------------------------------------------------------------------


def test_a_key_that_comes_late_is_kept(tmp_path: Path, landing: Landing) -> None:
    rows = [{"user_id": f"u{n}", "item_id": "i", "event_type": "view", "ts": T + n} for n in range(10_000)]
    rows += [{**row, "value": 2.5, "recommendation_id": "r"} for row in rows[:50]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    take(tmp_path / "a.jsonl", landing, BUILTIN["recsys"])
    assert sum(r["value"] == 2.5 and r["recommendation_id"] == "r" for r in landed(landing)) == 50


def test_items_that_are_sold_out_late_in_the_file_stay_so(tmp_path: Path, lake: Lake) -> None:
    rows: list[dict[str, Any]] = [{"item_id": str(n), "title": "x", "category": "c"} for n in range(10_500)]
    rows += [{**row, "price": 3, "available": False, "brand": "acme"} for row in rows[-20:]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ingest_catalog(str(tmp_path / "a.jsonl"), lake, choose(str(tmp_path / "a.jsonl"))[1])
    late = [row for row in read_catalog(lake).to_pylist() if not row["available"]]
    assert [(row["price"], row["attributes"]) for row in late] == [(3.0, '{"brand":"acme"}')] * 20


def test_a_mapped_key_may_come_late(tmp_path: Path, landing: Landing) -> None:
    rows = [*({"u": "a", "t": T} for _ in range(3_000)), {"u": "a", "i": "x", "t": T}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert take(tmp_path / "a.jsonl", landing).quarantined == {"missing item_id": 3_000}
    assert fitting(str(tmp_path / "a.jsonl"), {"mine": UIT}) == ["mine"]


ROWS = [{"u": "anna", "i": 1, "t": T}, {"u": "bert", "i": 2.0, "t": T, "note": "a]b,{\n"}]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "\ufeff  " + json.dumps(ROWS) + "\n\n",
        json.dumps(ROWS).replace("}, ", "},\n"),
    ],
)
@pytest.mark.parametrize("window", [1, 7, 1 << 20])
def test_a_json_array_is_read_element_by_element(
    tmp_path: Path, landing: Landing, monkeypatch: pytest.MonkeyPatch, text: str, window: int
) -> None:
    monkeypatch.setattr("recsys_core.json_rows.WINDOW_BYTES", window)
    (tmp_path / "a.json").write_text(text)
    take(tmp_path / "a.json", landing)
    assert pairs(landing) == [("anna", "1"), ("bert", "2")]


def test_bytes_that_are_no_utf8_cost_one_element(tmp_path: Path, landing: Landing) -> None:
    rows = [b'{"u": "%s", "i": "x", "t": %d}' % (user, T) for user in (b"ann", b"M\xfcller", b"M\xc3\xbcller", b"\\ud800")]
    (tmp_path / "a.json").write_bytes(b"[" + b",\n".join(rows) + b"]")
    take(tmp_path, landing)
    assert pairs(landing) == [("ann", "x"), ("M\u00fcller", "x")]
    assert quarantined(landing) == [(2, "not a JSON object with fields"), (4, "not a JSON object with fields")]
    [content] = [row["content"] for table in landing.quarantined() for row in table.to_pylist() if row["row"] == 2]
    assert "M?ller" in content


@pytest.mark.parametrize("text", ['[{"u": 1}, {"u": ]', '[{"u": 1}', '[{"u": 1}] {"u": 2}', '[{"u": 1} {"u": 2}]'])
def test_a_broken_array_is_an_error_that_names_the_element(tmp_path: Path, landing: Landing, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(IngestError, match=r"a\.json: the array can't be read at element [12]"):
        take(tmp_path / "a.json", landing, SourceMapping(user_id="u", item_id="u", ts="u"))


def test_nan_in_json_is_a_missing_value(tmp_path: Path, landing: Landing) -> None:
    mapping = UIT.model_copy(update={"value": "v"})
    (tmp_path / "a.jsonl").write_text(f'{{"u": "a", "i": "x", "t": {T}, "v": NaN}}\n{{"u": NaN, "i": "x", "t": {T}, "v": 1}}\n')
    report = take(tmp_path / "a.jsonl", landing, mapping)
    assert [(r["user_id"], r["value"]) for r in landed(landing)] == [("a", None)]
    assert (report.quarantined, report.unreadable) == ({"missing user_id": 1}, {})


@pytest.mark.parametrize("line", ['{"u": "\\ud800"}', "[" * 100_000, '{"u": ' + "9" * 5_000 + "}", "{'u': 1}", '{"u": 1'])
def test_a_line_that_is_no_json_costs_one_row(tmp_path: Path, landing: Landing, line: str) -> None:
    good = json.dumps({"u": "anna", "i": "x", "t": T})
    (tmp_path / "a.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    report = take(tmp_path / "a.jsonl", landing)
    assert (report.rows_read, report.landed) == (3, 2)


def test_values_inside_of_objects_have_names_with_dots(tmp_path: Path, landing: Landing) -> None:
    mapping = SourceMapping(user_id="who.id", item_id="what.sku.id", ts="t")
    rows = [{"who": {"id": 7}, "what": {"sku": {"id": "x"}}, "t": T}]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]) + "\n")
    pq.write_table(pa.Table.from_pylist([{**rows[0], "who": {"id": 8}}]), tmp_path / "b.parquet")
    take(tmp_path, landing, mapping)
    assert pairs(landing) == [("7", "x"), ("8", "x")]


# -- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["int.parquet", "float.parquet", "decimal.parquet", "json.jsonl", "array.json", "plain.csv", "pandas.csv"]
)
def test_a_user_has_one_name_in_every_format(tmp_path: Path, landing: Landing, name: str) -> None:
    ids = [1, 42, 10**15, 2**53]
    file = tmp_path / name
    times = [T + n for n in range(4)]
    rows = {"i": ["7"] * 4, "t": times}
    if name.endswith("parquet"):
        kinds = {"int": pa.int64(), "float": pa.float64(), "decimal": pa.decimal128(20, 2)}
        values = [Decimal(i) for i in ids] if name.startswith("decimal") else ids
        pq.write_table(pa.table({"u": pa.array(values, kinds[file.stem]), **rows}), file)
    elif name == "pandas.csv":
        pd.DataFrame({"u": [*map(float, ids), None], "i": 7, "t": T}).to_csv(file, index=False)
    elif name == "plain.csv":
        pd.DataFrame({"u": ids, **rows}).to_csv(file, index=False)
    else:
        objects = [{"u": float(u), "i": 7, "t": t} for u, t in zip(ids, times, strict=True)]
        file.write_text(json.dumps(objects) if name == "array.json" else "".join(json.dumps(o) + "\n" for o in objects))
    take(file, landing)
    assert pairs(landing) == [("1", "7"), ("42", "7"), ("1000000000000000", "7"), ("9007199254740992", "7")]


def test_large_numbers_keep_their_digits(tmp_path: Path, landing: Landing) -> None:
    numbers = ["12345678901234567890123", "9007199254740993.0", "1e22", "-9007199254740993"]
    (tmp_path / "a.jsonl").write_text("".join(f'{{"u": {n}, "i": 1, "t": {T}}}\n' for n in numbers))
    pq.write_table(pa.table({"u": [1e22, float("nan")], "i": [1.0, 1.0], "t": [T, T]}), tmp_path / "b.parquet")
    report = take(tmp_path, landing)
    users = [user for user, _ in pairs(landing)]
    assert users == ["12345678901234567890123", "9007199254740993", str(10**22), "-9007199254740993", str(10**22)]
    assert report.quarantined == {"missing user_id": 1}


def test_words_for_nothing_are_no_user_and_blanks_are_no_part_of_a_name(tmp_path: Path, landing: Landing) -> None:
    words = ["NULL", "\\N", "None", "nan", "(null)", "N/A", "   ", "NA"]
    (tmp_path / "a.csv").write_text("u,i,t\n" + "".join(f"{word},2,{T}\n" for word in words) + f"1, 2,{T}\n1,2,{T}\n")
    report = take(tmp_path / "a.csv", landing)
    assert pairs(landing) == [("1", "2"), ("1", "2")]
    assert report.quarantined == {"missing user_id": len(words)}


def test_na_is_a_country(tmp_path: Path, landing: Landing) -> None:
    (tmp_path / "a.csv").write_text(f"u,i,t,c\n1,2,{T},NA\n1,3,{T},NULL\n")
    take(tmp_path / "a.csv", landing, UIT.model_copy(update={"country": "c"}))
    assert [r["country"] for r in landed(landing)] == ["NA", None]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_lists_and_objects_are_no_ids(tmp_path: Path, landing: Landing, ending: str) -> None:
    row = {"u": ["a"], "i": {"$oid": "x"}, "t": T}
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    else:
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
    report = take(tmp_path, landing)
    assert report.quarantined == {"missing user_id": 1}
    assert (report.examples["missing user_id"].column, report.examples["missing user_id"].content) == ("u", '["a"]')
    take(tmp_path, landing, SourceMapping(user_id="t", item_id="i.$oid", ts="t"))
    assert pairs(landing) == [(str(T), "x")]


def test_ids_in_braces_are_ids(tmp_path: Path, landing: Landing) -> None:
    (tmp_path / "a.csv").write_text(f"u,i,t\n{{3F2504E0-4F89}},[x],{T}\n")
    take(tmp_path, landing)
    assert pairs(landing) == [("{3F2504E0-4F89}", "[x]")]


def test_parquet_has_ids_of_its_own_kinds(tmp_path: Path, landing: Landing) -> None:
    uuids = [uuid.UUID(int=n) for n in range(3)]
    users = pa.array([one.bytes for one in uuids], pa.uuid())
    items = pa.array([math.inf, -math.inf, 7.0])
    pq.write_table(pa.table({"u": users, "i": items, "t": [T] * 3}), tmp_path / "a.parquet")
    assert take(tmp_path, landing).quarantined == {"missing item_id": 2}
    assert pairs(landing) == [(str(uuids[2]), "7")]


@pytest.mark.parametrize("line", ["a\0b,x,{T}", '{{"u": "a\\u0000b", "i": "x", "t": {T}}}'])
def test_an_id_with_a_nul_is_refused_as_it_is_on_the_topic(tmp_path: Path, landing: Landing, line: str) -> None:
    text = line.format(T=T)
    (tmp_path / ("a.jsonl" if text.startswith("{") else "a.csv")).write_text(text if text.startswith("{") else f"u,i,t\n{text}")
    assert take(tmp_path, landing).quarantined == {"user_id holds a NUL character": 1}


# -- folders --------------------------------------------------------------------------------------------------------


def test_files_that_are_empty_or_foreign_are_named_and_left_out(tmp_path: Path, landing: Landing) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "README.txt").write_text("Notes on the data\nwith commas, and more\n")
    for name in ("part-00000.csv", "part-00000.parquet", "part-00000.jsonl", "blank.csv"):
        (folder / name).write_text("\n \n" if name == "blank.csv" else "")
    (folder / "part-1.csv.gz").write_bytes(gzip.compress(b""))
    (folder / "cut.csv.gz").write_bytes(gzip.compress("\n".join(["u,i,t", *clicks(5000)]).encode())[:-20])
    (folder / "torn.parquet").write_bytes(b"PAR1 and no more")
    (folder / "export.zip").write_bytes(b"PK")
    (folder / "part-00001.csv").write_text("\n".join(["u,i,t", *clicks(3)]))
    report = take(folder, landing)
    assert (report.landed, len(report.files)) == (3, 1)
    left_out = {Path(path).name: reason for path, reason in report.left_out.items()}
    assert left_out.keys() == {p.name for p in folder.iterdir()} - {"part-00001.csv"}
    assert "the mapping names u, i, t" in left_out["README.txt"]
    assert "damaged" in left_out["cut.csv.gz"]
    assert left_out["blank.csv"] == left_out["part-00000.parquet"] == left_out["part-1.csv.gz"] == "it is empty"


@pytest.mark.parametrize("empty", ["part-00000.csv", "part-00000.csv.gz", "part-00000.parquet", "part-00000.jsonl"])
def test_an_empty_first_part_does_not_hide_the_mapping(tmp_path: Path, landing: Landing, empty: str) -> None:
    (tmp_path / empty).write_text("")
    (tmp_path / "part-00001.csv").write_text(f"user_id,item_id,event_type,ts\nu,i,view,{T}\n")
    name, mapping = choose(str(tmp_path))
    assert name == "recsys"
    assert take(tmp_path, landing, mapping).landed == 1


def test_a_damaged_file_leaves_nothing_of_itself_behind(
    tmp_path: Path, landing: Landing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recsys_core.ingest.CHUNK_ROWS", 1000)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 4096)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress("\n".join(["u,i,t", *clicks(50_000)]).encode())[:-4000])
    with pytest.raises(IngestError, match="damaged"):
        take(tmp_path / "a.csv.gz", landing)
    assert landed(landing) == quarantined(landing) == []


def test_what_can_not_be_opened_is_named_and_the_rest_is_read(
    tmp_path: Path, landing: Landing, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = tmp_path / "in", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    for name in ("a.csv", "locked.csv", "locked.parquet"):
        (folder / name).write_text("\n".join(["user_id,item_id,event_type,ts", f"{name},x,view,{T}"]))
    os.mkfifo(folder / "pipe.csv")
    (folder / "nowhere.csv").symlink_to(tmp_path / "absent.csv")
    (folder / "more").symlink_to(other)
    (folder / "link.csv").symlink_to(folder / "a.csv")
    opening = landing.lake.fs.open

    def locked(path: str, mode: str) -> Any:
        if "locked" in path:
            raise PermissionError(13, "Permission denied", path)
        return opening(path, mode)

    monkeypatch.setattr(landing.lake.fs, "open", locked)
    assert fitting(str(folder)) == ["recsys"]
    report = take(folder, landing, BUILTIN["recsys"])
    left_out = {Path(path).name: reason for path, reason in report.left_out.items()}
    assert (report.landed, report.duplicates) == (1, 1)
    assert left_out.keys() == {"locked.csv", "locked.parquet", "pipe.csv", "nowhere.csv", "more"}
    assert left_out["locked.csv"] == "can't be read: Permission denied"
    assert left_out["pipe.csv"] == left_out["nowhere.csv"] == left_out["more"] == sources.NO_FILE


def test_a_file_that_can_not_be_read_now_keeps_what_it_landed_before(
    tmp_path: Path, landing: Landing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recsys_core.ingest.CHUNK_ROWS", 1)
    (tmp_path / "a.csv").write_text("\n".join(["u,i,t", *clicks(3)]))
    take(tmp_path / "a.csv", landing)
    before = landed(landing)

    def failing(source: SourceFile) -> Any:
        with sources.opened(source):
            raise OSError(5, "Input/output error")
        yield

    monkeypatch.setattr("recsys_core.ingest.read_rows", failing)
    with pytest.raises(IngestError, match="Input/output error"):
        take(tmp_path / "a.csv", landing)
    assert landed(landing) == before


def test_a_file_that_is_written_to_while_it_is_read_is_not_taken_in(
    tmp_path: Path, landing: Landing, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.csv"
    file.write_text("\n".join(["u,i,t", *clicks(3)])[:-5])
    reading = readers.read_rows

    def growing(source: SourceFile) -> Any:
        file.write_text("\n".join(["u,i,t", *clicks(4)]))
        yield from reading(source)

    monkeypatch.setattr("recsys_core.ingest.read_rows", growing)
    with pytest.raises(IngestError, match="changed while it was read"):
        take(file, landing)
    assert landed(landing) == quarantined(landing) == []


def test_the_files_of_the_lake_are_not_taken_in_again(tmp_path: Path) -> None:
    landing = Landing(Lake(str(tmp_path / "lake")))
    (tmp_path / "a.csv").write_text(f"user_id,item_id,event_type,ts\nu,i,view,{T}\n")
    for _ in range(2):
        assert take(tmp_path, landing, BUILTIN["recsys"]).landed == 1
    left_out = take(tmp_path, landing, BUILTIN["recsys"]).left_out
    there = [str(path) for path in (tmp_path / "lake").rglob("*") if path.is_file()]
    assert landing.files()[0].path in there
    assert left_out == dict.fromkeys(there, "it is a file of the lake")


def test_a_file_that_somebody_put_into_the_landing_zone_is_taken_in_from_there_and_what_counts_is_not(landing: Landing) -> None:
    own = landing.write_events("app", "own", event_table(event("e1", "ann", "tea", "2026-03-02T10:00"), schema=EVENT_SCHEMA))
    copied = landing.lake.path("landing", "app", "copied.parquet")
    pq.write_table(event_table(event("e2", "bob", "tea", "2026-03-02T10:00"), schema=EVENT_SCHEMA), copied)
    assert pairs(landing) == [("ann", "tea")]
    report = ingest(landing.lake.path("landing"), landing, BUILTIN["recsys"], EventSettings())
    assert (report.landed, report.left_out) == (1, {own: "it is a file of the lake"})
    assert sorted(pairs(landing)) == [("ann", "tea"), ("bob", "tea")]


def test_a_file_taken_for_items_keeps_what_it_gave_as_events(tmp_path: Path, landing: Landing) -> None:
    (tmp_path / "a.csv").write_text("\n".join(["u,i,t", *clicks(3), "u9,x,yesterday"]))
    take(tmp_path / "a.csv", landing)
    report = ingest_catalog(str(tmp_path / "a.csv"), landing.lake, SourceMapping(kind="catalog", item_id="i"))
    assert (report.landed, [file.again for file in report.files]) == (4, [False])
    assert (len(landed(landing)), quarantined(landing)) == (3, [(4, "missing or unreadable ts")])


def movielens(folder: Path) -> Path:
    folder.mkdir()
    (folder / "README.txt").write_text("Summary, of the data\n")
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,1,4.0,964982703\n")
    (folder / "movies.csv").write_text("movieId,title,genres\n1,Toy Story (1995),Adventure|Animation\n")
    (folder / "tags.csv").write_text("userId,movieId,tag,timestamp\n1,1,fun,964982703\n")
    return folder


def test_a_folder_of_events_and_items_fits_a_mapping_of_each(tmp_path: Path, landing: Landing) -> None:
    folder = movielens(tmp_path / "ml")
    assert fitting(str(folder)) == ["movielens", "movielens-catalog"]
    assert take(folder, landing, BUILTIN["movielens"]).landed == 1
    report = ingest_catalog(str(folder), landing.lake, BUILTIN["movielens-catalog"])
    assert (report.landed, len(report.left_out)) == (1, 3)


def test_movielens_1m_is_known(tmp_path: Path, landing: Landing) -> None:
    (tmp_path / "ratings.dat").write_text("1::1193::5::978300760\n1::661::3::978302109\n")
    (tmp_path / "movies.dat").write_text("1::Toy Story (1995)::Animation|Children's|Comedy\n2::Jumanji (1995)::Adventure\n")
    assert fitting(str(tmp_path)) == ["movielens-1m", "movielens-1m-catalog"]
    report = take(tmp_path, landing, BUILTIN["movielens-1m"])
    assert (report.landed, [Path(path).name for path in report.left_out]) == (2, ["movies.dat"])
    ingest_catalog(str(tmp_path / "movies.dat"), landing.lake, BUILTIN["movielens-1m-catalog"])
    assert read_catalog(landing.lake)["category"].to_pylist() == ["Animation", "Adventure"]


def test_folders_called_key_value_are_columns(tmp_path: Path, landing: Landing) -> None:
    for kind in ("view", "purchase", "__HIVE_DEFAULT_PARTITION__"):
        folder = tmp_path / f"event_type={kind}" / "country=S%20E"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"user_id": ["a"], "item_id": ["x"], "ts": [T]}), folder / "part-0.parquet")
    report = take(tmp_path, landing, BUILTIN["recsys"])
    assert sorted((r["event_type"], r["country"]) for r in landed(landing)) == [("purchase", "S E"), ("view", "S E")]
    assert len({r["event_id"] for r in landed(landing)}) == 2
    assert report.quarantined == {"unknown event_type": 1}


def test_a_folder_called_after_a_field_is_that_field_where_no_column_is_named(tmp_path: Path, landing: Landing) -> None:
    for kind in ("view", "purchase"):
        folder = tmp_path / f"event_type={kind}" / "dt=2026-01-01"
        folder.mkdir(parents=True)
        (folder / "part-0.csv").write_text(f"u,i,t\na,x,{T}\n")
    report = take(tmp_path, landing)
    assert sorted(r["event_type"] for r in landed(landing)) == ["purchase", "view"]
    assert report.unused == ["dt"]


def test_files_with_the_same_content_are_counted_as_duplicates(tmp_path: Path, landing: Landing) -> None:
    for host in ("one", "two"):
        (tmp_path / host).mkdir()
        (tmp_path / host / "part-0.csv").write_text("\n".join(["u,i,t", *clicks(5), "ragged"]))
    report = take(tmp_path, landing)
    assert (report.rows_read, report.landed, report.duplicates, report.quarantined) == (
        12,
        5,
        6,
        {"1 columns where 3 are expected": 1},
    )


def test_a_file_that_was_there_before_is_said_to_be_whatever_its_name(tmp_path: Path, landing: Landing) -> None:
    (tmp_path / "a.csv").write_text("\n".join(["u,i,t", *clicks(5)]))
    assert [f.again for f in take(tmp_path / "a.csv", landing).files] == [False]
    (tmp_path / "a.csv").rename(tmp_path / "b.csv")
    assert [f.again for f in take(tmp_path / "b.csv", landing).files] == [True]


MARK = "\ufeff"


@pytest.mark.parametrize("lines", [[f"{MARK}{MARK}u,i,t"], ["", f"{MARK}u,i,t"], ["  ", "", f'{MARK}"u",i,t']])
def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path: Path, landing: Landing, lines: list[str]) -> None:
    (tmp_path / "a.csv").write_text("\n".join([*lines, *clicks(2)]))
    assert take(tmp_path, landing).landed == 2


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_joined_files_have_byte_order_marks_and_headers_inside(
    tmp_path: Path, landing: Landing, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", size)
    part = f"{MARK}u,i,t\r\n" + "".join(f"{row}\r\n" for row in clicks(2))
    (tmp_path / "a.csv").write_bytes((part + part).encode())
    assert take(tmp_path, landing).landed == 4
    assert quarantined(landing) == [(3, "missing or unreadable ts")]
    headless = "".join(f"{MARK}{row}\n" for row in clicks(2))
    (tmp_path / "a.csv").write_bytes(headless.encode())
    other = Landing(Lake(str(tmp_path / "other")))
    assert take(tmp_path / "a.csv", other, UIT.model_copy(update={"header": ["u", "i", "t"]})).landed == 2
    assert pairs(other) == [("u1", "i1"), ("u2", "i2")]


def test_a_header_among_items_is_no_item(tmp_path: Path, landing: Landing) -> None:
    (tmp_path / "a.csv").write_text("id,name,cat,price\n1,A,x,3\nid,name,cat,price\nid,A,x,3\n")
    report = ingest_catalog(str(tmp_path), landing.lake, ITEMS)
    assert (report.rows_read, report.landed, report.quarantined) == (3, 2, {"the header again": 1})
    assert read_catalog(landing.lake)["item_id"].to_pylist() == ["1", "id"]


def test_columns_of_one_name_are_told_apart(tmp_path: Path, landing: Landing) -> None:
    (tmp_path / "a.csv").write_text("id,tag,tag,tag.2,,,name,cat,price\n1,a,b,c,d,e,A,x,3\n")
    ingest_catalog(str(tmp_path), landing.lake, ITEMS)
    attributes = {"tag": "a", "tag.3": "b", "tag.2": "c", "": "d", ".2": "e"}
    assert json.loads(read_catalog(landing.lake)["attributes"][0].as_py()) == attributes


@pytest.mark.parametrize(
    "text", ['{{\n "u": 1,\n "t": {T}\n}}\n', '{{"u":1,"i":1,"t":{T}}}{{"u":1,"i":2,"t":{T}}}', "[1]\n[2]\n"]
)
def test_json_without_an_object_a_line_is_not_called_empty(tmp_path: Path, landing: Landing, text: str) -> None:
    (tmp_path / "a.json").write_text(text.format(T=T))
    with pytest.raises(IngestError, match="no line is a JSON object"):
        fitting(str(tmp_path))
    (tmp_path / "b.csv").write_text("\n".join(["u,i,t", *clicks(2)]))
    left_out = take(tmp_path, landing).left_out
    assert "no line is a JSON object" in left_out[str(tmp_path / "a.json")]


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_keys_that_are_data_cost_memory_for_the_rows_that_have_them(
    tmp_path: Path, landing: Landing, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(json_rows, "MAX_CELLS", 5000)
    monkeypatch.setattr("recsys_core.ingest.CHUNK_CELLS", 20_000)
    joining, widths = ingest_module._join, []

    def join(batches: list[Any]) -> Any:
        joined = joining(batches)
        widths.append(joined.table.num_rows * joined.table.num_columns)
        return joined

    monkeypatch.setattr(ingest_module, "_join", join)
    rows = [json.dumps({"u": f"u{n}", "i": f"i{n % 7}", "t": T + n, f"key{n}": n}) for n in range(1, 1001)]
    (tmp_path / f"a.{ending}").write_text("\n".join([*rows, "7"]) if ending == "jsonl" else f"[{','.join([*rows, '7'])}]")
    report = take(tmp_path, landing)
    assert (report.rows_read, report.landed) == (1001, 1000)
    assert quarantined(landing) == [(1001, "not a JSON object with fields")]
    assert sorted(pairs(landing)) == sorted((f"u{n}", f"i{n % 7}") for n in range(1, 1001))
    assert max(widths) <= 20_000


def test_objects_may_begin_late(tmp_path: Path, landing: Landing) -> None:
    lines = ["garbage"] * 1500 + [json.dumps({"user_id": "u", "item_id": "x", "event_type": "view", "ts": T})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert fitting(str(tmp_path)) == ["recsys"]
    report = take(tmp_path, landing, BUILTIN["recsys"])
    assert (report.landed, report.rows_read) == (1, 1501)


def test_events_of_forgotten_users_are_counted_and_not_as_landed(tmp_path: Path, landing: Landing) -> None:
    TombstoneLog(landing.lake).add(hash_of("u2"), T + 2)
    (tmp_path / "a.csv").write_text("\n".join(["u,i,t", *clicks(3), f"u2,x,{T + 3}", "ragged"]))
    report = ingest(str(tmp_path), landing, UIT, EventSettings())
    assert (report.rows_read, report.landed, report.forgotten, sum(report.quarantined.values())) == (5, 3, 1, 1)
    assert pairs(landing) == [("u1", "i1"), ("u3", "i3"), ("u2", "x")]
    assert report.days == {"2026-01-01": 3}


# -- values and categories ------------------------------------------------------------------------------------------


def test_a_value_that_cannot_be_read_is_told_and_costs_no_event(tmp_path: Path, landing: Landing) -> None:
    (tmp_path / "a.csv").write_text(f"u,i,t,Betrag\n1,2,{T},N/A\n1,3,{T},zwei\n1,4,{T},drei\n1,5,{T},$7\n1,6,{T},\n")
    report = take(tmp_path / "a.csv", landing, UIT.model_copy(update={"value": "Betrag"}))
    assert [r["value"] for r in landed(landing)] == [None, None, None, 7.0, None]
    assert report.unreadable == {"value": 2}
    example = report.examples["value"]
    assert (Path(example.path).name, example.row, example.column, example.content) == ("a.csv", 2, "Betrag", "zwei")


def test_each_reason_has_an_example_with_its_column(tmp_path: Path, landing: Landing) -> None:
    (tmp_path / "a.csv").write_text("u,i,t\n1,2,yesterday\n1,2,today\n1\n")
    examples = take(tmp_path / "a.csv", landing).examples
    assert {reason: (e.row, e.column, e.content) for reason, e in examples.items()} == {
        "missing or unreadable ts": (1, "t", "yesterday"),
        "1 columns where 3 are expected": (3, None, "1"),
    }


def test_a_row_without_columns_is_shown_whole_whatever_its_reason_says(tmp_path: Path, landing: Landing) -> None:
    (tmp_path / "a.csv").write_text(f'u,i,t,v\na,1,{T},"x"y\n')
    examples = take(tmp_path / "a.csv", landing, UIT.model_copy(update={"value": "v"})).examples
    shown = examples["a quote inside a value"]
    assert (shown.column, shown.content) == (None, f'a,1,{T},"x"y')


def test_the_days_of_the_events_are_counted(tmp_path: Path, landing: Landing) -> None:
    (tmp_path / "a.csv").write_text(f"u,i,t\n1,2,{T}\n1,3,{T - 1}\n1,4,{T + 1}\n")
    assert take(tmp_path / "a.csv", landing).days == {"2025-12-31": 1, "2026-01-01": 2}


def catalogue(path: Path, lake: Lake, mapping: SourceMapping = ITEMS) -> tuple[CatalogReport, list[dict[str, Any]]]:
    report = ingest_catalog(str(path), lake, mapping)
    assert report.rows_read == report.landed + sum(report.quarantined.values()) + report.duplicates
    return report, read_catalog(lake).to_pylist()


def test_prices_with_a_currency_are_read_and_others_told(tmp_path: Path, lake: Lake) -> None:
    (tmp_path / "a.csv").write_text('id,name,cat,price\na,x,c,$12.99\nb,x,c,"1,299.00"\nc,x,c,"12,50 EUR"\nd,x,c,on request\n')
    report, rows = catalogue(tmp_path / "a.csv", lake)
    assert [row["price"] for row in rows] == [12.99, 1299.0, 12.5, None]
    assert (report.unreadable, report.examples["price"].content) == ({"price": 1}, "on request")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_a_list_of_categories_gives_the_first_and_keeps_all(tmp_path: Path, lake: Lake, name: str) -> None:
    lists = [["Shoes", "Sale"], [], None, ["Bags"]]
    rows = [{"id": str(n), "name": "x", "cat": cat, "price": 1.0, "tags": ["new", "red"]} for n, cat in enumerate(lists)]
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        (tmp_path / name).write_text(json.dumps(rows) if name == "a.json" else "".join(json.dumps(r) + "\n" for r in rows))
    _, found = catalogue(tmp_path / name, lake)
    assert [row["category"] for row in found] == ["Shoes", None, None, "Bags"]
    assert [json.loads(row["attributes"]).get("categories") for row in found] == [["Shoes", "Sale"], None, None, ["Bags"]]
    assert json.loads(found[0]["attributes"])["tags"] == ["new", "red"]


def test_a_list_in_a_list_are_the_levels_of_a_category(tmp_path: Path, lake: Lake) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1, "name": "x", "cat": [["Home", "Kitchen"], ["Gifts"], [2.0]], "price": 1}\n')
    _, [row] = catalogue(tmp_path / "a.jsonl", lake)
    assert row["category"] == "Home/Kitchen"
    assert json.loads(row["attributes"]) == {"categories": ["Home/Kitchen", "Gifts", "2"]}


def test_blanks_around_the_separator_are_no_part_of_a_category(tmp_path: Path, lake: Lake) -> None:
    (tmp_path / "a.csv").write_text("id,name,cat,price\n1,x, Clothing > Dresses>Long > ,1\n2,x,Rock / Pop,1\n3,x,>,1\n")
    _, rows = catalogue(tmp_path / "a.csv", lake, ITEMS.model_copy(update={"category_separator": ">"}))
    assert [row["category"] for row in rows] == ["Clothing/Dresses/Long", "Rock / Pop", None]


def test_genres_of_movielens_are_several_categories(tmp_path: Path, lake: Lake) -> None:
    _, [row] = catalogue(movielens(tmp_path / "ml"), lake, BUILTIN["movielens-catalog"])
    assert row["category"] == "Adventure"
    assert json.loads(row["attributes"]) == {"categories": ["Adventure", "Animation"]}


def test_category_ids_that_became_floats_are_integers_again(tmp_path: Path, lake: Lake) -> None:
    pq.write_table(
        pa.table({"id": [1.0, 2.0], "name": ["x", "y"], "cat": [281.0, None], "price": [1.0, None]}), tmp_path / "a.parquet"
    )
    _, rows = catalogue(tmp_path / "a.parquet", lake)
    assert [(row["item_id"], row["category"], row["price"]) for row in rows] == [("1", "281", 1.0), ("2", None, None)]


# -- whatever comes: rows add up to the lines, and what is whole is landed as it was written --------------------------

SAFE = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Z"], exclude_characters='"\ufeff\\'), min_size=1, max_size=6
)
TEXTS = st.text(st.sampled_from('ab ,;"\n|\t'), max_size=8)
DAMAGES = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from(["quote", "ragged", "bytes", "blank", "nul", "short"]), st.integers(0, 99))
)


def damaged(line: bytes, kind: str, at: int) -> bytes:
    at %= len(line)
    inserted = {"quote": b'"', "ragged": b",", "bytes": b"\xff", "blank": b"\n  \r\n", "nul": b"\0"}
    if kind == "short":
        return line[:at] or b"x"
    return b"\n\n" + line if kind == "blank" else line[:at] + inserted[kind] + line[at:]


@hypothesis_settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    notes=st.lists(SAFE, min_size=1, max_size=30),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    delimiter=st.sampled_from(",;\t|"),
    damages=DAMAGES,
    block=st.sampled_from([16, 100, 4 << 20]),
    start=st.sampled_from([b"", b"\xef\xbb\xbf", b"\n", b"\xef\xbb\xbf\r\n"]),
)
def test_damage_costs_the_rows_that_it_hits_and_every_line_is_accounted_for(
    tmp_path: Path,
    notes: list[str],
    quoting: Any,
    delimiter: str,
    damages: list[tuple[int, str, int]],
    block: int,
    start: bytes,
) -> None:
    lines = []
    for n, note in enumerate(notes):
        out = io.StringIO()
        csv.writer(out, delimiter=delimiter, quoting=quoting, lineterminator="").writerow([f"u{n}", note, "view", T + n])
        lines.append(out.getvalue().encode())
    hit = {at % len(lines): (kind, where) for at, kind, where in damages}
    whole = {f"u{n}" for n in range(len(lines)) if n not in hit or hit[n][0] == "blank"}
    lines = [damaged(line, *hit[n]) if n in hit else line for n, line in enumerate(lines)]
    data = start + delimiter.join(("u", "note", "type", "t")).encode() + b"\n" + b"\n".join(lines)
    file = tmp_path / "a.csv"
    file.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "BLOCK_BYTES", block)
        batches = list(readers.read_rows(SourceFile(Lake(str(tmp_path)).fs, str(file), delimiter)))
    numbers = sorted([n for b in batches for n in b.rows.tolist()] + [r.row for b in batches for r in b.rejected])
    lines_below = lines_of(data.removeprefix(b"\xef\xbb\xbf")) - 1
    assert sum(b.lines for b in batches) == lines_below
    # Two damaged lines may happen to be one correct record.
    assert numbers == list(range(1, len(numbers) + 1))
    assert lines_below - len(hit) <= len(numbers) <= lines_below
    kept = {row["u"]: row for b in batches for row in b.table.to_pylist()}
    for n, note in enumerate(notes):
        if f"u{n}" in whole:
            assert kept[f"u{n}"] == {"u": f"u{n}", "note": note, "type": "view", "t": str(T + n)}


@hypothesis_settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=20),
    block=st.sampled_from([16, 100, 4 << 20]),
    quoting=st.booleans(),
)
def test_what_a_csv_writer_wrote_is_read_as_it_was(
    tmp_path: Path, rows: list[tuple[str, str]], block: int, quoting: bool
) -> None:
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_ALL if quoting else csv.QUOTE_MINIMAL, lineterminator="\n")
    writer.writerows([("id", "a", "b", "c", "d"), *((n, a, "", b, "end") for n, (a, b) in enumerate(rows))])
    file = tmp_path / "a.csv"
    file.write_bytes(out.getvalue().encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "BLOCK_BYTES", block)
        batches = list(readers.read_rows(SourceFile(Lake(str(tmp_path)).fs, str(file), ",")))
    assert [r for b in batches for r in b.rejected] == []
    found = [(row["id"], row["a"] or "", row["c"] or "") for b in batches for row in b.table.to_pylist()]
    assert found == [(str(n), a, b) for n, (a, b) in enumerate(rows)]


@hypothesis_settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.dictionaries(st.sampled_from("uiabc"), st.one_of(st.integers(), SAFE, st.none(), st.booleans())),
        min_size=1,
        max_size=20,
    ),
    bad=st.lists(
        st.tuples(st.integers(0, 20), st.sampled_from([b"", b"  ", b"{", b"[1]", b"{}", b"\xff", b'{"u": NaN', b"null"]))
    ),
    block=st.sampled_from([16, 4 << 20]),
)
def test_every_line_of_json_is_accounted_for(
    tmp_path: Path, rows: list[dict[str, Any]], bad: list[tuple[int, bytes]], block: int
) -> None:
    lines = [json.dumps(row).encode() for row in rows]
    for at, line in bad:
        lines.insert(at, line)
    data = b"\n".join(lines)
    file = tmp_path / "a.jsonl"
    file.write_bytes(data)
    source = SourceFile(Lake(str(tmp_path)).fs, str(file))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "BLOCK_BYTES", block)
        batches = list(readers.read_rows(source))
    assert sum(len(b.rows) + len(b.rejected) for b in batches) == lines_of(data)
    kept = [{k: v for k, v in row.items() if v is not None} for b in batches for row in b.table.to_pylist()]
    written = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items() if v is not None} for row in rows if row]
    assert kept == written


def test_a_reader_that_loses_lines_is_found_out(tmp_path: Path, landing: Landing, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_text("\n".join(["u,i,t", *clicks(5)]))
    parse = delimited._regular
    monkeypatch.setattr(delimited, "_regular", lambda block, *rest: parse(block.removesuffix(clicks(5)[-1].encode()), *rest))
    with pytest.raises(IngestError, match="has 6 lines, its rows account for 5: a fault of the reader"):
        take(tmp_path / "a.csv", landing)
    assert landed(landing) == []


def test_no_mapping_fits_is_said_of_the_file_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("")
    (tmp_path / "b.csv").write_text("x,y\n1,2\n")
    with pytest.raises(MappingError, match=r"b\.csv has the columns x, y; none of"):
        choose(str(tmp_path))


def test_every_key_of_a_mapping_is_in_the_reference() -> None:
    reference = (Path(__file__).parents[2] / "docs" / "reference.md").read_text()
    section = reference.split("## Mappings")[1].split("## Features")[0]
    assert [key for key in SourceMapping.model_fields if f"`{key}`" not in section] == []
