"""What the demo makes of a user's own files, before the graph runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from recsys_cli import demo
from recsys_cli.processes import StackError
from recsys_core.catalog import names_of
from recsys_core.lake import Lake
from recsys_core.settings import Settings

RATINGS = "userId,movieId,rating,timestamp\n1,1,4.0,964982703\n1,2,3.0,964982704\n"
MOVIES = "movieId,title,genres\n1,Toy Story (1995),Adventure\n"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    return Settings(home=tmp_path / "home")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "ratings.csv").write_text(RATINGS)
    return folder


def title(settings: Settings) -> str:
    return names_of(Lake(settings.lake_uri), ["1"])["1"]


def test_a_folder_of_events_and_items_gives_both(settings: Settings, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "movies.csv").write_text(MOVIES)
    assert demo._land(settings, folder, None, None, Console()) == "2000-07-30"
    assert title(settings) == "Toy Story (1995)"
    shown = " ".join(capsys.readouterr().out.split())
    assert "fits movielens, movielens-catalog" in shown
    assert "before the first partition" not in shown


def test_a_catalogue_may_be_elsewhere(settings: Settings, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "movies.csv").write_text(MOVIES)
    demo._land(settings, folder, None, tmp_path / "movies.csv", Console())
    assert title(settings) == "Toy Story (1995)"


def test_items_without_events_are_no_demo(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "movies.csv").write_text(MOVIES)
    with pytest.raises(StackError, match="describes items; the demo needs events"):
        demo._land(settings, tmp_path / "movies.csv", None, None, Console())


def test_a_catalogue_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "movies.csv").write_text(MOVIES)
    with pytest.raises(StackError, match="name both"):
        demo.run(None, None, tmp_path / "home", tmp_path / "movies.csv")
