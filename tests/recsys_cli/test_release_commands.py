"""`recsys release`: list, show, diff, promote and rollback as an operator uses them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from snapshots import make_manifest, make_snapshot
from typer.testing import CliRunner, Result

from recsys_cli.main import app
from recsys_core.gate import Claim, Verdict, write_verdict
from recsys_core.lake import Lake
from recsys_core.registry import CHAMPION, Registry
from recsys_core.release import Releases
from recsys_core.settings import Settings

FIRST, SECOND, THIRD = "2026-01-01.a", "2026-01-02.b", "2026-01-03.c"


@pytest.fixture(autouse=True)
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.delenv("RECSYS_CONFIG", raising=False)


@pytest.fixture
def releases(mlflow_settings: Settings) -> Releases:
    """Three releases of three days, of which the first two were promoted and the third failed at the gate."""
    found = Releases(mlflow_settings.releases_uri)
    base = make_snapshot(items=60)
    for at, name in enumerate((FIRST, SECOND, THIRD)):
        snapshot = replace(base if at else make_snapshot(items=50), release_id=name)
        manifest = replace(make_manifest(snapshot), day=name[:10], created_at=float(at))
        found.write(replace(manifest, metrics={"served ranking": {"ndcg@10": 0.1 + at / 100}}), snapshot)
    found.promote(FIRST)
    found.promote(SECOND, reason="ndcg@10 and every guardrail held")
    claims = (Claim("ndcg@10", 0.12, 0.2, 0.19, False),)
    verdict = Verdict(False, "ndcg@10 0.12 is below 0.19 (champion 0.2)", claims, THIRD, SECOND)
    write_verdict(Lake(mlflow_settings.lake_uri), THIRD[:10], verdict)
    return found


@pytest.fixture
def release(mlflow_settings: Settings, releases: Releases):
    """Runs `recsys release …` in the home of the three."""
    del releases

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["release", *arguments, "--home", str(mlflow_settings.home)])

    return run


def row(output: str, start: str) -> str:
    return next(line for line in output.splitlines() if start in line)


def test_the_list_says_what_is_served_and_what_the_gate_said(release) -> None:
    result = release("list")
    assert result.exit_code == 0, result.output
    names = [part for line in result.stdout.splitlines() for part in (FIRST, SECOND, THIRD) if part in line]
    assert names[:1] == [THIRD]
    assert "│ champion " in row(result.stdout, SECOND)
    assert "│ 1 back " in row(result.stdout, FIRST)
    assert "failed: ndcg@10 0.12 is below 0.19 (champion 0.2)" in row(result.stdout, THIRD)
    assert "0.11" in row(result.stdout, SECOND)


def test_the_list_keeps_ids_whole_on_a_narrow_terminal(release, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    result = release("list")
    assert all(row(result.stdout, name) for name in (FIRST, SECOND, THIRD))
    assert len(result.stdout.splitlines()) < 20
    assert max(map(len, result.stdout.splitlines())) <= 60


def test_a_broken_release_is_listed_with_what_is_wrong(release, releases: Releases) -> None:
    Path(releases.path(FIRST, "manifest.json")).write_text("{")
    result = release("list")
    assert result.exit_code == 0, result.output
    assert "manifest.json is not JSON" in row(result.stdout, FIRST)


def test_a_home_without_releases_says_so(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["release", "list", "--home", str(tmp_path / "new")])
    assert result.exit_code == 0
    assert "There is no release" in result.stdout
    result = CliRunner().invoke(app, ["release", "show", "--home", str(tmp_path / "new")])
    assert (result.exit_code, result.stderr.strip()) == (2, "no release has been promoted yet")


def test_show_tells_lineage_models_metrics_and_verdict(release) -> None:
    shown = release("show", THIRD).stdout
    assert "als_factors" in row(shown, "abc")
    assert "0.12" in row(shown, "ndcg@10")
    assert "als.rank" in shown
    assert f"The gate against {SECOND}: failed" in shown
    assert [line for line in shown.splitlines() if "│ ndcg@10" in line][-1].split("│")[-2].strip() == "no"
    assert f"Release {SECOND}" in release("show").stdout, "without a name it is the champion"


def test_a_start_of_an_id_is_enough_when_it_names_one(release) -> None:
    assert f"Release {FIRST}" in release("show", "2026-01-01").stdout
    result = release("show", "2026-01")
    assert result.exit_code == 2
    assert "3 releases start with '2026-01'" in result.stderr
    assert "there is no release 'x'" in release("show", "x").stderr


def test_diff_shows_only_what_differs(release) -> None:
    shown = release("diff", FIRST, SECOND).stdout
    assert "metrics.served ranking.ndcg@10" in shown
    assert "models.als.rank" not in shown
    assert row(shown, "items only here").replace(" ", "") == "│itemsonlyhere│0│10│"


def test_promote_verifies_first_and_moves_pointer_and_alias(release, releases: Releases, mlflow_settings: Settings) -> None:
    result = release("promote", THIRD, "--reason", "trust me")
    assert result.exit_code == 0, result.output
    pointer = releases.champion()
    assert (pointer.release_id, pointer.reason, pointer.previous) == (THIRD, "trust me", (SECOND, FIRST))
    assert Registry(mlflow_settings).resolve(CHAMPION).release_id == THIRD


def test_a_release_that_is_not_whole_is_not_promoted(release, releases: Releases) -> None:
    Path(releases.path(THIRD, "popular.npy")).write_bytes(b"")
    result = release("promote", THIRD)
    assert result.exit_code == 2
    assert "popular.npy has 0 bytes" in result.stderr
    assert releases.champion().release_id == SECOND


def test_rollback_returns_to_the_champion_before(release, releases: Releases, mlflow_settings: Settings) -> None:
    result = release("rollback")
    assert result.exit_code == 0, result.output
    assert f"{FIRST} is the champion" in result.stdout
    assert releases.champion().release_id == FIRST
    assert Registry(mlflow_settings).resolve(CHAMPION).release_id == FIRST
    result = release("rollback")
    assert (result.exit_code, result.stderr.strip()) == (2, "there is no earlier champion to return to")


def test_a_rollback_does_not_wait_for_mlflow(release, releases: Releases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECSYS_MLFLOW__TRACKING_URI", "http://127.0.0.1:9")
    result = release("rollback")
    assert result.exit_code == 0, result.output
    assert "stays behind" in result.stdout
    assert releases.champion().release_id == FIRST


def test_metrics_of_many_models_are_readable_at_80_columns(
    release, releases: Releases, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = ("served ranking", "als", "two_tower", "popular", "trending", "item_item")
    names = [f"{metric}@{k}" for metric in ("ndcg", "recall", "precision", "mrr", "hit_rate", "coverage") for k in (10, 20, 50)]
    snapshot = replace(make_snapshot(items=50), release_id="2026-01-04.d")
    metrics = {model: dict.fromkeys(names, 0.1234) for model in models}
    releases.write(replace(make_manifest(snapshot), day="2026-01-04", created_at=9.0, metrics=metrics), snapshot)
    monkeypatch.setenv("COLUMNS", "80")
    shown = release("show", "2026-01-04.d").stdout
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80
    assert row(shown, "ndcg@10").count("0.1234") == len(models)
    order = [line.split("│")[1].strip() for line in lines if "@" in line]
    assert order == sorted(order, key=lambda name: (name.split("@")[0], int(name.split("@")[1])))


def test_without_a_release_the_way_to_one_is_told(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["release", "list", "--home", str(tmp_path)]).stdout
    assert "the job `nightly`" in shown
    assert "materialize `release`" not in shown
