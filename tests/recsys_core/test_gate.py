"""The gate lets a release through that ranks as well as the champion, and says in one sentence why another one stays out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from nights import GOOD, evaluate_as, make_release, prepare_night, small

from recsys_core.evaluation import SERVED
from recsys_core.gate import LATENCY, Verdict, challenge, judge, read_verdict, served_scores
from recsys_core.lake import Lake
from recsys_core.release import ReleaseError, Releases
from recsys_core.settings import GateSettings, Settings

CHAMPION = {"ndcg@10": 0.20, "coverage@10": 0.5, LATENCY: 1.0}
GATE = GateSettings(tolerance=0.05, min_coverage=0.1, max_latency_ms=10, max_segment_drop=0.5, min_segment_users=30)


def judged(champion: dict[str, float] | None = CHAMPION, **challenger: float) -> Verdict:
    named = {name.replace("_at_", "@"): value for name, value in challenger.items()}
    return judge({**CHAMPION, **named}, champion, GATE)


@pytest.mark.parametrize("value", [0.20, 0.25, 0.191, 0.19])
def test_equal_better_and_within_the_tolerance_pass(value: float) -> None:
    assert judged(ndcg_at_10=value).passed


def test_worse_than_the_tolerance_fails_with_both_numbers() -> None:
    verdict = judged(ndcg_at_10=0.18)
    assert not verdict.passed
    assert verdict.reason == "ndcg@10 0.18 is below 0.19 (champion 0.2)"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_no_score(value: float) -> None:
    verdict = judged(ndcg_at_10=value)
    assert (verdict.passed, verdict.reason) == (False, "the challenger has no ndcg@10")
    verdict = judged(champion={**CHAMPION, "ndcg@10": value})
    assert (verdict.passed, verdict.reason) == (False, "the champion has no ndcg@10 to be compared with")


@pytest.mark.parametrize("name", ["ndcg@10", "coverage@10", LATENCY])
def test_a_missing_score_keeps_no_claim(name: str) -> None:
    verdict = judge({key: value for key, value in CHAMPION.items() if key != name}, CHAMPION, GATE)
    assert (verdict.passed, verdict.reason) == (False, f"the challenger has no {name}")


def test_a_challenger_that_was_not_evaluated_stays_out() -> None:
    assert not judge({}, CHAMPION, GATE).passed


def test_the_first_release_passes_whatever_its_scores() -> None:
    assert judge({}, None, GATE) == Verdict(True, "there is no champion yet")


def test_better_does_not_make_up_for_a_broken_guardrail() -> None:
    assert judged(ndcg_at_10=0.9, coverage_at_10=0.05).reason == "coverage@10 0.05 is below 0.1 (champion 0.5)"
    assert judged(ndcg_at_10=0.9, latency_ms=11.0).reason == "latency_ms 11 is above 10 (champion 1)"


def test_every_broken_claim_is_named() -> None:
    assert judged(ndcg_at_10=0.1, coverage_at_10=0.05).reason.count("; ") == 1


def test_a_segment_may_not_lose_more_than_its_share_unless_it_is_too_small_to_tell() -> None:
    segment = {"ndcg@10 of cold users": 0.1, "users of cold users": 100.0}
    worse = {**CHAMPION, **segment, "ndcg@10 of cold users": 0.04}
    verdict = judge(worse, {**CHAMPION, **segment}, GATE)
    assert (verdict.passed, verdict.reason) == (False, "ndcg@10 of cold users 0.04 is below 0.05 (champion 0.1)")
    assert judge({**worse, "ndcg@10 of cold users": 0.06}, {**CHAMPION, **segment}, GATE).passed
    assert judge({**worse, "users of cold users": 29.0}, {**CHAMPION, **segment}, GATE).passed


def test_another_metric_can_be_chosen() -> None:
    gate = GATE.model_copy(update={"metric": "recall@20"})
    challenger = {**CHAMPION, "ndcg@10": 0.0, "recall@20": 0.3}
    assert judge(challenger, {**CHAMPION, "recall@20": 0.3}, gate).passed
    segment = {"ndcg@10 of cold users": 0.1, "users of cold users": 100.0}
    worse = {**challenger, **segment, "ndcg@10 of cold users": 0.0}
    assert not judge(worse, {**CHAMPION, "recall@20": 0.3, **segment}, gate).passed, "segments are judged whatever the metric"


def test_what_an_evaluation_says_of_segments_is_judged() -> None:
    said = {
        "metrics": {SERVED: {"ndcg@10": 0.2, "note": "no number"}, "ALS": {"ndcg@10": 0.1}},
        "headline": "ndcg@10",
        "segments": {"cold users": {"users": 40, SERVED: 0.1, "ALS": 0.0}, "heavy users": {"users": 7, "ALS": 0.3}},
    }
    assert served_scores(said) == {"ndcg@10": 0.2, "ndcg@10 of cold users": 0.1, "users of cold users": 40.0}


# -- with releases ----------------------------------------------------------------------------------------------------

DAY, NEXT = "2026-01-02", "2026-01-03"


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return small(settings)


@pytest.fixture
def lake(settings: Settings) -> Lake:
    return Lake(settings.lake_uri)


@pytest.fixture
def releases(settings: Settings) -> Releases:
    return Releases(settings.releases_uri)


@pytest.fixture
def champion(lake: Lake, releases: Releases, settings: Settings) -> str:
    """The promoted release of DAY."""
    prepare_night(lake, DAY, settings, GOOD)
    release_id = make_release(lake, releases, DAY, settings).release_id
    releases.promote(release_id)
    return release_id


def test_a_verdict_is_kept_by_day(lake: Lake, releases: Releases, settings: Settings) -> None:
    prepare_night(lake, DAY, settings, GOOD)
    assert read_verdict(lake, DAY) is None
    release_id = make_release(lake, releases, DAY, settings).release_id
    verdict = challenge(lake, releases, DAY, settings)
    assert (verdict.passed, verdict.release_id, verdict.champion_id) == (True, release_id, "")
    assert read_verdict(lake, DAY) == verdict


def test_a_champion_of_the_day_before_is_ranked_for_the_day(
    lake: Lake, releases: Releases, settings: Settings, champion: str
) -> None:
    """The champion knows both tastes, so it finds what each group takes next; a challenger that does not stays out."""
    prepare_night(lake, NEXT, settings, {"ndcg@10": 0.01, "coverage@10": 0.5})
    make_release(lake, releases, NEXT, settings)
    verdict = challenge(lake, releases, NEXT, settings)
    claims = {claim.name: claim for claim in verdict.claims}
    assert not verdict.passed
    assert verdict.champion_id == champion
    scored = claims["ndcg@10"].champion
    assert scored is not None
    assert scored > 0.2
    evaluate_as(lake, NEXT, {"ndcg@10": scored, "coverage@10": 0.5})
    assert challenge(lake, releases, NEXT, settings).passed


def test_a_champion_of_the_same_day_is_taken_by_its_own_evaluation(
    lake: Lake, releases: Releases, settings: Settings, champion: str
) -> None:
    evaluate_as(lake, DAY, {**GOOD, "ndcg@10": 0.3})
    make_release(lake, releases, DAY, settings)
    verdict = challenge(lake, releases, DAY, settings)
    assert (verdict.passed, verdict.reason) == (False, "ndcg@10 0.3 is below 0.388 (champion 0.4)")
    assert verdict.champion_id == champion


def test_a_segment_that_a_later_release_of_the_same_day_loses_keeps_it_out(
    lake: Lake, releases: Releases, settings: Settings
) -> None:
    prepare_night(lake, DAY, settings, GOOD)
    evaluate_as(lake, DAY, GOOD, {"cold users": {"users": 900.0, SERVED: 0.2}})
    releases.promote(make_release(lake, releases, DAY, settings).release_id)
    evaluate_as(lake, DAY, GOOD, {"cold users": {"users": 900.0, SERVED: 0.01}})
    make_release(lake, releases, DAY, settings)
    verdict = challenge(lake, releases, DAY, settings)
    assert (verdict.passed, verdict.reason) == (False, "ndcg@10 of cold users 0.01 is below 0.14 (champion 0.2)")


def test_a_day_before_the_champions_never_wins(lake: Lake, releases: Releases, settings: Settings, champion: str) -> None:
    prepare_night(lake, "2026-01-01", settings, {"ndcg@10": 0.9, "coverage@10": 0.9})
    make_release(lake, releases, "2026-01-01", settings)
    verdict = challenge(lake, releases, "2026-01-01", settings)
    assert (verdict.passed, verdict.reason) == (False, f"the champion {champion} knows a later day than 2026-01-01")


def test_judging_the_champion_again_changes_nothing(lake: Lake, releases: Releases, settings: Settings, champion: str) -> None:
    verdict = challenge(lake, releases, DAY, settings)
    assert (verdict.passed, verdict.reason, verdict.release_id) == (True, "it is the champion already", champion)


def test_a_champion_that_can_not_be_used_protects_nothing(
    lake: Lake, releases: Releases, settings: Settings, champion: str
) -> None:
    evaluate_as(lake, DAY, {**GOOD, "ndcg@10": 0.01})
    make_release(lake, releases, DAY, settings)
    Path(releases.path(champion, "popular.npy")).unlink()
    verdict = challenge(lake, releases, DAY, settings)
    assert verdict.passed
    assert "nothing to protect" in verdict.reason
    assert "popular.npy is missing" in verdict.reason


@pytest.mark.usefixtures("champion")
def test_a_day_that_could_not_be_evaluated_leaves_the_champion(lake: Lake, releases: Releases, settings: Settings) -> None:
    prepare_night(lake, NEXT, settings, None)
    make_release(lake, releases, NEXT, settings)
    verdict = challenge(lake, releases, NEXT, settings)
    assert not verdict.passed
    assert "the challenger has no ndcg@10" in verdict.reason


def test_without_a_release_there_is_nothing_to_judge(lake: Lake, releases: Releases, settings: Settings) -> None:
    with pytest.raises(ReleaseError, match="no release of 2026-01-02"):
        challenge(lake, releases, DAY, settings)
