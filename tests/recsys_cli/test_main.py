"""The `recsys` command as a user meets it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from recsys_cli.main import app

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
