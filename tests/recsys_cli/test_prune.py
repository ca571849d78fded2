"""`recsys prune`: shows, removes, and refuses a policy that takes what a model reads."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from builders import event, event_table
from typer.testing import CliRunner

from recsys_cli.main import app
from recsys_core.events import EVENT_SCHEMA
from recsys_core.lake import Lake
from recsys_core.landing import Landing


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation with an old and a new day."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DAGSTER_HOME", "")  # so that what the command sets is undone
    monkeypatch.delenv("DAGSTER_HOME")
    monkeypatch.delenv("RECSYS_CONFIG", raising=False)
    lake = Lake(str(tmp_path / "lake"))
    landed = event_table(event("e", "ann", "tea", "2026-06-01"), schema=EVENT_SCHEMA)
    Landing(lake).write_events("t", "a", landed)
    for day in ("2026-01-01", "2026-05-31"):
        lake.write("als_factors", day, pa.table({"n": [1]}))
    return tmp_path


def test_a_dry_run_shows_what_would_go_and_the_run_after_it_removes_just_that(home: Path) -> None:
    lake = Lake(str(home / "lake"))
    shown = CliRunner().invoke(app, ["prune", "--home", str(home), "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "Would be removed" in shown.output
    assert lake.keys("als_factors") == ["2026-01-01", "2026-05-31"]
    removed = CliRunner().invoke(app, ["prune", "--home", str(home)])
    assert removed.exit_code == 0, removed.output
    assert "partition" in removed.output
    assert lake.keys("als_factors") == ["2026-05-31"]


def test_a_policy_that_takes_what_a_model_reads_is_one_red_line(home: Path) -> None:
    (home / "recsys.toml").write_text("[retention]\nhourly_days = 30\n")
    refused = CliRunner().invoke(app, ["prune", "--home", str(home)])
    assert refused.exit_code == 2
    assert "a model reads 90 days back" in refused.output
    assert Lake(str(home / "lake")).keys("als_factors") == ["2026-01-01", "2026-05-31"]
