"""MLflow on its sqlite: runs, versions and aliases as people find them, and nights that go on without MLflow."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from snapshots import make_manifest, make_snapshot

from recsys_core.registry import CHALLENGER, CHAMPION, Registry, RegistryError
from recsys_core.release import Manifest
from recsys_core.settings import Settings

OUT_OF_REACH = "http://127.0.0.1:9"


@pytest.fixture
def registry(mlflow_settings: Settings) -> Registry:
    return Registry(mlflow_settings)


@pytest.fixture
def away(settings: Settings) -> Registry:
    return Registry(settings.model_copy(update={"mlflow": settings.mlflow.model_copy(update={"tracking_uri": OUT_OF_REACH})}))


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return make_manifest(make_snapshot(items=60))


def named(manifest: Manifest, release_id: str) -> Manifest:
    return replace(manifest, release_id=release_id)


def registered(registry: Registry, manifest: Manifest) -> Any:
    with registry.run("release", {}) as run:
        return registry.register(manifest, f"/releases/{manifest.release_id}", run)


def recorded(registry: Registry, run_id: str | None) -> Run:
    assert run_id is not None
    return MlflowClient(registry.uri).get_run(run_id)


def test_a_run_keeps_what_a_training_was_and_how_it_did(registry: Registry, tmp_path: Path) -> None:
    with registry.run("two_tower 2026-01-01", {"dagster.run_id": "abc"}) as run:
        run.log_params({"als": {"rank": 64}, "engine": "numpy"})
        run.log_metrics({"loss": 2.0}, step=1)
        run.log_metrics({"loss": 1.0, "popularity, window": {"ndcg@10": 0.1}, "engine": "no number"}, step=2)
        run.log_inputs({"interactions": {"partition": "2026-01-01", "data_version": "f" * 64}}, "/lake")
        run.log_text("reports/table.md", "| a |")
    kept = recorded(registry, run.run_id)
    assert (kept.info.status, kept.info.run_name) == ("FINISHED", "two_tower 2026-01-01")
    assert kept.data.params == {"als.rank": "64", "engine": "numpy"}
    assert kept.data.metrics == {"loss": 1.0, "popularity_ window.ndcg at 10": 0.1}
    assert kept.data.tags["dagster.run_id"] == "abc"
    [dataset] = kept.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.source) == ("interactions/2026-01-01", "/lake/interactions/2026-01-01")
    assert {tag.key: tag.value for tag in dataset.tags}["data_version"] == "f" * 64
    client = MlflowClient(registry.uri)
    assert [m.value for m in client.get_metric_history(kept.info.run_id, "loss")] == [2.0, 1.0]
    assert Path(client.download_artifacts(kept.info.run_id, "reports/table.md", str(tmp_path))).read_text() == "| a |"


def test_a_training_that_fails_is_a_failed_run(registry: Registry) -> None:
    with pytest.raises(ZeroDivisionError), registry.run("als_factors", {}) as run:
        1 / 0  # noqa: B018
    assert recorded(registry, run.run_id).info.status == "FAILED"


def test_more_params_and_metrics_than_one_call_takes_are_all_kept(registry: Registry) -> None:
    with registry.run("many", {}) as run:
        run.log_params({f"p{n}": n for n in range(250)})
        run.log_metrics({f"m{n}": float(n) for n in range(1100)} | {"nan": math.nan})
    kept = recorded(registry, run.run_id)
    assert run.trouble == ""
    assert (len(kept.data.params), len(kept.data.metrics)) == (250, 1101)


def test_files_of_runs_stay_in_the_home(
    registry: Registry, mlflow_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with registry.run("als_factors", {}) as run:
        run.log_text("a.txt", "a")
    assert list(elsewhere.iterdir()) == []
    assert len(list((mlflow_settings.home / "mlflow").rglob("a.txt"))) == 1


def test_a_release_is_a_version_that_is_challenger_until_it_is_champion(registry: Registry, manifest: Manifest) -> None:
    version = registered(registry, manifest)
    assert (version.release_id, version.day) == (manifest.release_id, "2026-01-01")
    challenger = registry.resolve(CHALLENGER)
    assert challenger is not None
    assert (challenger.version, challenger.run_id) == (version.version, version.run_id)
    assert registry.resolve(CHAMPION) is None
    registry.promote(manifest, "/releases")
    champion = registry.resolve(CHAMPION)
    assert champion is not None
    assert champion.version == version.version
    assert registry.resolve(CHALLENGER) is None


def test_a_challenger_that_was_not_promoted_stays_challenger_beside_the_champion(
    registry: Registry, manifest: Manifest
) -> None:
    registered(registry, manifest)
    registry.promote(manifest, "/releases")
    registered(registry, named(manifest, "2026-01-02.b"))
    assert [(v.release_id, v.aliases) for v in registry.versions()] == [
        ("2026-01-02.b", (CHALLENGER,)),
        (manifest.release_id, (CHAMPION,)),
    ]
    registry.promote(manifest, "/releases")
    assert [v.aliases for v in registry.versions()] == [(CHALLENGER,), (CHAMPION,)]


def test_registering_or_promoting_twice_makes_one_version(registry: Registry, manifest: Manifest) -> None:
    assert registered(registry, manifest).version == registered(registry, manifest).version
    assert registry.promote(manifest, "/releases").version == registry.promote(manifest, "/releases").version
    assert len(registry.versions()) == 1


def test_a_release_made_while_mlflow_was_away_is_registered_when_it_is_promoted(registry: Registry, manifest: Manifest) -> None:
    version = registry.promote(manifest, "/releases/a")
    assert version.run_id == ""
    assert [v.aliases for v in registry.versions()] == [(CHAMPION,)]


def test_nothing_is_registered_yet(registry: Registry) -> None:
    assert registry.versions() == []
    assert registry.resolve(CHAMPION) is None
    assert registry.find("2026-01-01.a") is None


def test_a_training_goes_on_when_mlflow_can_not_be_reached_and_its_metadata_say_so(away: Registry) -> None:
    with away.run("als_factors", {"a": "b"}) as run:
        run.log_params({"rank": 1})
        run.log_metrics({"loss": 1.0})
        run.log_text("a", "b")
    assert run.run_id is None
    assert list(run.link()) == ["MLflow trouble"]
    assert OUT_OF_REACH in run.link()["MLflow trouble"]


def test_versions_and_aliases_say_that_mlflow_can_not_be_reached(away: Registry, manifest: Manifest) -> None:
    for call in (lambda: away.promote(manifest, "/releases"), away.versions, lambda: registered(away, manifest)):
        with pytest.raises(RegistryError, match=r"MLflow at http://127\.0\.0\.1:9"):
            call()


def test_a_database_that_breaks_in_the_middle_ends_the_recording_and_not_the_training(
    registry: Registry, mlflow_settings: Settings
) -> None:
    with registry.run("als_factors", {}) as run:
        database = mlflow_settings.home / "mlflow.db"
        database.write_bytes(b"no database at all" * 1000)
        run.log_metrics({"loss": 1.0})
        run.log_metrics({"loss": 0.5})
    assert "MLflow at sqlite" in run.trouble
    assert set(run.link()) == {"MLflow run", "MLflow trouble"}


def test_a_run_links_to_its_page_where_there_is_a_server(away: Registry) -> None:
    assert away.run_url("3", "abc") == f"{OUT_OF_REACH}/#/experiments/3/runs/abc"
