"""The `recsys` command as a user meets it."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner, Result

from recsys_cli.main import app
from recsys_core.catalog import read_catalog
from recsys_core.lake import Lake
from recsys_core.landing import Landing

EVENTS = "user_id,item_id,event_type,ts\nu1,i1,view,1767225600000\nu1,i2,click,1767225601000\n,i3,view,1767225602000\n"


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("RECSYS_HOME", "RECSYS_CONFIG"):
        monkeypatch.delenv(name, raising=False)


def recsys(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys\nfrom typer.testing import CliRunner\nfrom recsys_cli.main import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print([m for m in ('dagster', 'pandas', 'pyarrow', 'pydantic', 'grpc', 'numpy') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_config_shows_what_is_in_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECSYS_ALS__RANK", "77")
    result = recsys("config")
    assert result.exit_code == 0
    line = next(line for line in result.stdout.splitlines() if "als.rank" in line)
    assert "77" in line


def test_a_wrong_setting_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "recsys.toml").write_text("[als]\nrnak = 3\n")
    result = recsys("config")
    assert result.exit_code == 2
    assert result.stderr.strip() == "recsys.toml: als.rnak: there is no such setting (`recsys config` lists them)"


def test_ingest_takes_events_by_named_columns_and_counts_what_it_refused(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text(EVENTS)
    columns = ("--user", "user_id", "--item", "item_id", "--type", "event_type", "--time", "ts")
    result = recsys("ingest", "events.csv", *columns)
    assert result.exit_code == 0, result.output
    counts = [line.replace(" ", "").strip("│") for line in result.stdout.splitlines() if "│" in line]
    assert counts == ["rowsread│3", "eventslanded│2", "quarantined:missinguser_id│1"]


def told(result: Result) -> str:
    """What a command printed, in one line."""
    return " ".join(result.output.replace("│", " ").split())


def test_ingest_says_what_became_of_every_row_and_where_to_look(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "Kunde;Artikel;Zeit;Betrag;Filiale\n"
        "anna;tent;31.12.2025 10:00;zwei;1\nbert;pan;1.2.2026 10:00;12,50;1\ncarl;pan;gestern;1;1\n"
    )
    flags = ("--user", "Kunde", "--item", "Artikel", "--time", "Zeit", "--value", "Betrag")
    result = recsys("ingest", "a.csv", *flags)
    assert result.exit_code == 0, result.output
    text = told(result)
    assert "kept without a value: Betrag can't be read 1" in text
    assert "value: a.csv row 1, column Betrag: 'zwei'" in text
    assert "missing or unreadable ts: a.csv row 3, column Zeit: 'gestern'" in text
    assert "The events are of 2025-12-31 10:00:00 to 2026-02-01 10:00:00 UTC." in text
    assert "1 of them are before the first partition: [partitions] start = 2026-01-01" in text
    assert "Set start = 2025-12-31 in" in text
    assert "Columns that no field was read from: Filiale." in text
    [folder] = (tmp_path / ".recsys" / "lake" / "quarantine").iterdir()
    assert f"Quarantined rows are in {folder}." in text
    assert "taken in before" not in text
    assert "so that their rows were replaced and not added: 1." in told(recsys("ingest", "a.csv", *flags))


def test_the_hours_of_events_that_are_replaced_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("u,i,t\na,x,3/2/2026\nb,x,5/2/2026\n")
    flags = ("ingest", "a.csv", "--user", "u", "--item", "i", "--time", "t", "--unit")
    recsys(*flags, "mdy")
    assert "Their former events" not in told(recsys(*flags, "mdy"))
    text = told(recsys(*flags, "dmy"))
    assert "Their former events were of 2026-03-02 00:00:00 to 2026-05-02 00:00:00 UTC." in text
    assert "recsys backfill clicks_hourly 2026-03-02T00 2026-05-02T00" in text


def test_events_after_the_last_partition_are_told(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text(EVENTS)
    (tmp_path / "recsys.toml").write_text("[partitions]\nstart = 2020-01-01\nend = 2020-02-01\n")
    assert "after the last partition: [partitions] end = 2020-02-01" in told(recsys("ingest", "events.csv"))


@pytest.mark.parametrize("text", ["", "\n", "user_id,item_id,event_type,ts\n", "user_id,item_id,event_type,ts\nu,i,fly,0\n"])
def test_ingest_that_lands_nothing_is_exit_code_1(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    result = recsys("ingest", "a.csv", "--mapping", "recsys")
    assert result.exit_code == 1
    assert "Nothing landed." in result.output


def test_ingest_of_a_catalogue_without_items_is_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sku,name\n,Tent\n")
    assert recsys("ingest", "a.csv", "--catalog", "--item", "sku").exit_code == 1


def test_ingest_takes_events_and_items_of_one_folder_and_names_what_it_leaves(tmp_path: Path) -> None:
    folder = tmp_path / "ml"
    folder.mkdir()
    (folder / "README.txt").write_text("Summary, of the data\n")
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,1,4.0,964982703\n")
    (folder / "movies.csv").write_text("movieId,title,genres\n1,Toy Story (1995),Adventure|Animation\n")
    result = recsys("ingest", "ml")
    assert result.exit_code == 0, result.output
    text = told(result)
    assert "ml fits movielens, movielens-catalog." in text
    assert "events landed 1" in text
    assert "items in the catalogue 1" in text
    assert "README.txt: the mapping names" in text
    assert "movies.csv: the mapping" not in text


def test_what_landed_is_told_when_all_files_of_another_kind_are_damaged(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "events.csv").write_text(EVENTS)
    items = "item_id,title,category,price\n" + "".join(f"{n * 7919 % 99991},T{n},c,{n * 31 % 977}\n" for n in range(50_000))
    (tmp_path / "in" / "items.csv.gz").write_bytes(gzip.compress(items.encode())[:-2000])
    result = recsys("ingest", "in")
    text = told(result)
    assert result.exit_code == 1
    assert "events landed 2" in text
    assert "items.csv.gz: is damaged" in text
    assert "Nothing was taken in as recsys-catalog." in text


def test_events_that_share_an_event_id_are_told(tmp_path: Path) -> None:
    rows = ["event_id,user_id,item_id,event_type,ts", *(f"order-{n // 3},u,i{n},purchase,176722560000{n}" for n in range(6))]
    (tmp_path / "a.csv").write_text("\n".join(rows))
    assert "Events whose event_id another one has: 4. Tables have each event_id once" in told(recsys("ingest", "a.csv"))
    (tmp_path / "b.csv").write_text(EVENTS)
    assert "Events whose event_id" not in told(recsys("ingest", "b.csv"))


def test_flags_name_the_form_of_a_file_and_every_field(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("anna\ttent\t1767225600\tbuy\t9,5\tNA\n")
    flags = (
        "--header",
        "who,what,when,how,paid,land",
        "--delimiter",
        "\\t",
        "--user",
        "who",
        "--item",
        "what",
        "--time",
        "when",
    )
    result = recsys("ingest", "a.txt", *flags, "--unit", "s", "--value", "paid", "--country", "land")
    assert result.exit_code == 0, result.output
    [row] = Landing(Lake(str(tmp_path / ".recsys" / "lake"))).files()
    assert pq.read_table(row.path).select(["user_id", "ts", "value", "country"]).to_pylist() == [
        {"user_id": "anna", "ts": 1_767_225_600_000, "value": 9.5, "country": "NA"}
    ]
    (tmp_path / "items.csv").write_text("sku|eur|stock|brand|note\ntent|$12|no|acme|x\n")
    items = ("--catalog", "--item", "sku", "--price", "eur", "--available", "stock", "--attributes", "brand")
    result = recsys("ingest", "items.csv", *items)
    assert result.exit_code == 0, result.output
    [item] = read_catalog(Lake(str(tmp_path / ".recsys" / "lake"))).to_pylist()
    assert (item["price"], item["available"], item["attributes"]) == (12.0, False, '{"brand":"acme"}')
    assert "Columns that no field was read from: note." in told(result)


def test_a_unit_alone_changes_the_mapping_that_fits(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user_id,item_id,event_type,ts\nu,i,view,1767225600\n")
    result = recsys("ingest", "a.csv", "--unit", "s")
    assert result.exit_code == 0, result.output
    assert "The events are of 2026-01-01 00:00:00" in told(result)


def test_a_unit_alone_for_a_file_that_fits_nothing_says_what_to_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    result = recsys("ingest", "a.csv", "--unit", "s")
    assert result.exit_code == 2
    assert "has the columns x, y" in result.stderr
    assert "--user, --item and --time" in result.stderr


def test_no_help_text_loses_what_is_in_brackets() -> None:
    shown = " ".join(recsys("ingest", "--help").output.split())
    assert "mappings.<name> in" in shown
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    texts = [option.help for command in commands.values() for option in command.params if getattr(option, "help", None)]
    assert [text for text in texts if re.search(r"(?<!\\)\[\w+\]", text)] == []


def test_a_mapping_that_names_an_absent_column_lists_those_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text(EVENTS)
    result = recsys("ingest", "events.csv", "--user", "visitor", "--item", "item_id", "--time", "ts")
    assert result.exit_code == 2
    assert "visitor" in result.stderr
    assert "user_id, item_id, event_type, ts" in result.stderr


def test_an_absent_file_is_told_by_name() -> None:
    result = recsys("ingest", "absent.csv", "--mapping", "globo")
    assert result.exit_code == 2
    assert "absent.csv" in result.stderr
    assert "Traceback" not in result.output


def test_an_unknown_mapping_lists_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text(EVENTS)
    result = recsys("ingest", "events.csv", "--mapping", "globe")
    assert result.exit_code == 2
    assert "globo" in result.stderr


def test_a_mapping_without_a_time_says_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text(EVENTS)
    result = recsys("ingest", "events.csv", "--user", "user_id", "--item", "item_id")
    assert result.exit_code == 2
    assert "must name the column of: ts" in result.stderr


def test_status_without_a_stack_is_exit_code_1() -> None:
    result = recsys("status")
    assert result.exit_code == 1
    assert "start it with `recsys up`" in result.stdout


def test_simulate_lands_events_and_keeps_the_truth_apart(tmp_path: Path) -> None:
    result = recsys("simulate", "--days", "1", "--events", "2000", "--users", "100", "--items", "60")
    assert result.exit_code == 0, result.output
    assert list((tmp_path / ".recsys" / "lake" / "landing").rglob("*.parquet"))
    assert sorted(file.name for file in (tmp_path / ".recsys" / "truth").iterdir())
    assert not list((tmp_path / ".recsys" / "lake").rglob("*truth*"))


def test_a_server_that_does_not_answer_is_one_line_and_exit_code_2() -> None:
    result = recsys("recommend", "u1", "--address", "127.0.0.1:1")
    assert result.exit_code == 2
    assert "UNAVAILABLE" in result.stderr
    assert "`recsys status`" in result.stderr
