"""The night's last steps on a real Dagster instance and a real MLflow: a challenger becomes the champion, or stays out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dagster as dg
import pytest
from mlflow import MlflowClient
from nights import GOOD, evaluate_as, prepare_night, small

from recsys_assets.definitions import build_definitions
from recsys_core.gate import read_verdict
from recsys_core.lake import Lake
from recsys_core.registry import CHALLENGER, CHAMPION, Registry
from recsys_core.release import Releases
from recsys_core.settings import Settings

DAY, NEXT = "2026-01-02", "2026-01-03"
CHAMPION_ALONE = dg.AssetKey("champion")
STEPS = [dg.AssetKey("release"), dg.AssetKey("champion")]


class Night:
    """Runs the steps of the nightly job for one day, and knows what they left."""

    def __init__(self, settings: Settings, instance: dg.DagsterInstance) -> None:
        self.settings = settings
        self.instance = instance
        self.lake = Lake(settings.lake_uri)
        self.releases = Releases(settings.releases_uri)
        self.registry = Registry(settings)

    def run(self, *assets: dg.AssetKey, day: str = DAY) -> dg.ExecuteInProcessResult:
        job = build_definitions(self.settings).resolve_job_def("nightly")
        return job.execute_in_process(
            instance=self.instance, asset_selection=list(assets) or STEPS, partition_key=day, raise_on_error=False
        )

    @property
    def served(self) -> str | None:
        pointer = self.releases.champion()
        return pointer.release_id if pointer else None

    def alias(self, name: str) -> str | None:
        version = self.registry.resolve(name)
        return version.release_id if version else None


def made(result: dg.ExecuteInProcessResult, asset: str) -> dict[str, object]:
    """Metadata of the asset that the run made."""
    found = [e for e in result.get_asset_materialization_events() if e.asset_key == dg.AssetKey(asset)]
    return {name: value.value for name, value in found[-1].materialization.metadata.items()}


def checked(result: dg.ExecuteInProcessResult, name: str) -> dg.AssetCheckEvaluation:
    return next(e for e in result.get_asset_check_evaluations() if e.check_name == name)


@pytest.fixture
def night(mlflow_settings: Settings) -> Iterator[Night]:
    settings = small(mlflow_settings)
    with dg.DagsterInstance.ephemeral() as instance:
        found = Night(settings, instance)
        prepare_night(found.lake, DAY, settings, GOOD)
        yield found


def test_the_first_release_becomes_the_champion_in_pointer_and_registry(night: Night) -> None:
    result = night.run()
    assert result.success
    release_id = made(result, "release")["release_id"]
    assert night.served == night.alias(CHAMPION) == release_id
    assert night.alias(CHALLENGER) is None
    assert made(result, "champion")["took the place of"] == "none"
    assert checked(result, "challenger_beats_champion").passed
    assert checked(result, "champion_verifies").passed


def test_the_run_of_a_release_and_the_run_in_dagster_name_each_other(night: Night) -> None:
    result = night.run()
    link = str(made(result, "release")["MLflow run"])
    run = MlflowClient(night.registry.uri).get_run(link.split(" in ")[0])
    assert run.data.tags["dagster.run_id"] == result.run_id
    assert (run.data.tags["dagster.asset"], run.data.tags["dagster.partition"]) == ("release", DAY)
    assert run.data.metrics["served ranking.ndcg at 10"] == GOOD["ndcg@10"]
    assert night.releases.manifest(str(night.served)).run_ids == {"release": result.run_id, "mlflow": run.info.run_id}
    datasets = {given.dataset.name for given in run.inputs.dataset_inputs}
    assert {f"als_factors/{DAY}", f"item_index/{DAY}", f"evaluation/{DAY}"} <= datasets


def test_a_worse_challenger_fails_the_run_with_the_reason_and_the_champion_stays(night: Night) -> None:
    first = made(night.run(), "release")["release_id"]
    evaluate_as(night.lake, DAY, {**GOOD, "ndcg@10": 0.2})
    result = night.run()
    assert not result.success
    assert not [e for e in result.get_asset_materialization_events() if e.asset_key == dg.AssetKey("champion")]
    check = checked(result, "challenger_beats_champion")
    assert (check.passed, check.blocking) == (False, True)
    assert check.metadata["reason"].value == "ndcg@10 0.2 is below 0.388 (champion 0.4)"
    assert "| ndcg@10 | 0.2000 | 0.1500 … 0.2500 | 0.4000 | 0.3880 | **no** |" in str(check.metadata["scores"].value)
    second = made(result, "release")["release_id"]
    assert second != first
    assert night.served == night.alias(CHAMPION) == first
    assert night.alias(CHALLENGER) == second


def test_materializing_the_champion_alone_does_not_get_around_the_gate(night: Night) -> None:
    first = made(night.run(), "release")["release_id"]
    evaluate_as(night.lake, DAY, {**GOOD, "ndcg@10": 0.2})
    night.run()
    assert not night.run(dg.AssetKey("champion")).success
    assert night.served == first


def test_records_of_an_older_day_do_not_take_the_place_of_those_that_are_served(night: Night) -> None:
    prepare_night(night.lake, "2026-01-01", night.settings, GOOD)
    served = made(night.run(), "release")["release_id"]
    result = night.run(dg.AssetKey("online_features"), day="2026-01-01")
    assert not result.success
    [failure] = [e for e in result.all_events if e.is_step_failure]
    assert f"2026-01-01 is over, release {served} is served" in str(failure.step_failure_data.user_failure_data)


def test_without_a_judged_release_there_is_no_champion(night: Night) -> None:
    assert not night.run(dg.AssetKey("champion")).success
    assert night.served is None


def test_a_better_challenger_after_a_failed_one_takes_the_place(night: Night) -> None:
    first = made(night.run(), "release")["release_id"]
    evaluate_as(night.lake, DAY, {**GOOD, "ndcg@10": 0.2})
    night.run()
    evaluate_as(night.lake, DAY, {**GOOD, "ndcg@10": 0.41})
    result = night.run()
    assert result.success
    assert made(result, "champion")["took the place of"] == first
    assert night.served == night.alias(CHAMPION) == made(result, "release")["release_id"]


def test_a_promotion_cut_off_between_alias_and_pointer_is_mended(night: Night) -> None:
    """The pointer is what counts: after the cut it still names the old release, and the alias comes back to it."""
    first = str(made(night.run(), "release")["release_id"])
    evaluate_as(night.lake, DAY, {**GOOD, "ndcg@10": 0.2})
    second = str(made(night.run(), "release")["release_id"])
    night.registry.promote(night.releases.manifest(second), "")
    assert (night.served, night.alias(CHAMPION)) == (first, second)
    night.run()
    assert night.served == night.alias(CHAMPION) == first


def test_promoting_again_after_a_cut_ends_with_pointer_and_alias_alike(night: Night) -> None:
    night.run(dg.AssetKey("release"))
    verdict = read_verdict(night.lake, DAY)
    assert verdict is not None
    night.registry.promote(night.releases.manifest(verdict.release_id), "")
    for _ in range(2):
        assert night.run(dg.AssetKey("champion")).success
        assert night.served == night.alias(CHAMPION) == verdict.release_id
    assert night.releases.champion().previous == ()


def test_a_night_without_mlflow_releases_and_promotes_and_says_so(night: Night) -> None:
    away = night.settings.mlflow.model_copy(update={"tracking_uri": "http://127.0.0.1:9"})
    night.settings = night.settings.model_copy(update={"mlflow": away})
    result = night.run()
    assert result.success
    assert night.served == made(result, "release")["release_id"]
    for asset in ("release", "champion"):
        assert "http://127.0.0.1:9" in str(made(result, asset)["MLflow trouble"])
    assert "not registered" in made(result, "release")


def failure_of(result: dg.ExecuteInProcessResult) -> str:
    return " ".join(str(e.step_failure_data.error_display_string) for e in result.all_events if e.is_step_failure)


@pytest.fixture
def two_nights(night: Night) -> tuple[Night, str, str]:
    """Two nights whose releases both became champion, one after the other."""
    first = str(made(night.run(), "release")["release_id"])
    prepare_night(night.lake, NEXT, night.settings, {**GOOD, "ndcg@10": 0.95, "coverage@10": 0.9})
    assert night.run(day=NEXT).success
    assert night.served not in (None, first)
    return night, first, str(night.served)


def test_materializing_the_champion_of_an_older_day_changes_nothing(two_nights: tuple[Night, str, str]) -> None:
    night, first, second = two_nights
    again = night.run(CHAMPION_ALONE)
    assert not again.success
    assert f"{first} was judged against another champion than {second}, which was named since" in failure_of(again)
    assert "materialize `release` to judge it now" in failure_of(again)
    assert not night.run().success, "and judged again it loses to the later day"
    assert night.served == night.alias(CHAMPION) == second


def test_materializing_the_champion_does_not_undo_a_rollback(two_nights: tuple[Night, str, str]) -> None:
    night, first, second = two_nights
    night.releases.roll_back("it recommends umbrellas to everybody")
    assert night.served == first
    for day in (NEXT, DAY):
        night.run(CHAMPION_ALONE, day=day)
        assert night.served == first
    night.releases.promote(second, "mended")
    assert night.run(CHAMPION_ALONE, day=NEXT).success, "it is the champion already"
    assert night.served == second


def test_an_operator_who_promotes_between_the_verdict_and_its_use_is_not_undone(night: Night) -> None:
    first = str(made(night.run(), "release")["release_id"])
    prepare_night(night.lake, NEXT, night.settings, {**GOOD, "ndcg@10": 0.95, "coverage@10": 0.9})
    judged = night.run(dg.AssetKey("release"), day=NEXT)
    assert checked(judged, "challenger_beats_champion").passed
    night.releases.promote(first, "by hand")
    assert not night.run(CHAMPION_ALONE, day=NEXT).success
    assert night.served == first
    assert night.run(day=NEXT).success, "judged again it takes the place"
    assert night.served != first


def test_the_alias_follows_a_pointer_that_changes_meanwhile(
    two_nights: tuple[Night, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    night, first, second = two_nights
    promote, acts = night.registry.promote, iter([night.releases.roll_back])

    def slow(*args: Any) -> Any:
        version = promote(*args)
        for act in acts:
            act()
        return version

    monkeypatch.setattr(night.registry, "promote", slow)
    version = night.registry.follow(night.releases)
    assert version is not None
    assert night.served == night.alias(CHAMPION) == version.release_id == first != second
