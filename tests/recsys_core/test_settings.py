"""Settings: what the file documents is what the code does, and mistakes are told."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from recsys_cli.config import documented_toml, explain_invalid
from recsys_core.settings import Section, Settings, SettingsError, load_settings

PROJECT_FILE = Path(__file__).parents[2] / "recsys.toml"


@pytest.fixture(autouse=True)
def nothing_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory and no variables of the platform."""
    monkeypatch.chdir(tmp_path)
    for name in ("RECSYS_HOME", "RECSYS_CONFIG"):
        monkeypatch.delenv(name, raising=False)


def test_recsys_toml_is_the_documented_defaults() -> None:
    assert PROJECT_FILE.read_text() == documented_toml(Settings()), (
        "run: recsys config --toml > recsys.toml, without own settings"
    )


def test_recsys_toml_names_every_setting_that_has_a_default() -> None:
    written = tomllib.loads(PROJECT_FILE.read_text())
    defaults = Settings()
    for section in Settings.model_fields:
        values = getattr(defaults, section)
        if isinstance(values, Section):
            set_by_default = {name for name in type(values).model_fields if getattr(values, name) is not None}
            assert set(written[section]) == set_by_default, section


def test_the_project_file_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = load_settings()
    monkeypatch.setenv("RECSYS_CONFIG", str(PROJECT_FILE))
    assert load_settings() == defaults


def test_an_unknown_name_in_the_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "recsys.toml").write_text("[als]\nrnak = 3\n")
    with pytest.raises(ValidationError) as caught:
        load_settings()
    assert explain_invalid(caught.value).startswith("als.rnak: there is no such setting")


def test_an_unknown_section_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "recsys.toml").write_text("[asl]\nrank = 3\n")
    with pytest.raises(ValidationError) as caught:
        load_settings()
    assert explain_invalid(caught.value).startswith("asl: there is no such setting")


def test_an_unknown_name_in_a_variable_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECSYS_ALS__RNAK", "3")
    with pytest.raises(ValidationError) as caught:
        load_settings()
    assert "als.rnak: there is no such setting" in explain_invalid(caught.value)


def test_a_wrong_value_is_told_with_the_value(tmp_path: Path) -> None:
    (tmp_path / "recsys.toml").write_text("[als]\nrank = 0\n")
    with pytest.raises(ValidationError) as caught:
        load_settings()
    assert explain_invalid(caught.value).startswith("als.rank = 0: ")


def test_the_environment_beats_the_home_and_the_home_beats_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "recsys.toml").write_text("[als]\nrank = 11\niterations = 12\nseed = 13\n")
    (home / "recsys.toml").write_text("[als]\nrank = 21\niterations = 22\n")
    monkeypatch.setenv("RECSYS_ALS__RANK", "31")
    als = load_settings(home).als
    assert (als.rank, als.iterations, als.seed) == (31, 22, 13)


def test_a_config_variable_that_names_no_file_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECSYS_CONFIG", "absent.toml")
    with pytest.raises(SettingsError, match=r"absent\.toml"):
        load_settings()
