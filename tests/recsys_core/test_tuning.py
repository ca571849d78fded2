"""The tuner finds by itself whether what users did follows their taste or the trend, and keeps its hands off little data."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from snapshots import CLUSTERS, make_snapshot

from recsys_core.metrics import per_user
from recsys_core.ranking import Trend, Users, rank
from recsys_core.settings import RankingSettings
from recsys_core.tuning import LEAST_USERS, MODELS, Case, _blend, _Table, tune

SNAPSHOT = make_snapshot(items=400)
SETTINGS = RankingSettings()
HALF_LIVES = 3


def relevant_of(rows: list[np.ndarray]) -> sp.csr_matrix:
    at = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    columns = np.concatenate(rows)
    return sp.csr_matrix((np.ones(len(at), bool), (at, columns)), (len(rows), SNAPSHOT.items.num_rows))


def users(count: int, random: np.random.Generator) -> tuple[Users, np.ndarray]:
    """Users with the taste of a cluster each."""
    cluster = random.integers(0, CLUSTERS, count)
    vectors = SNAPSHOT.als_items[cluster + CLUSTERS * random.integers(0, 40, count)]
    none = np.full((count, 1), -1, np.int64)
    return Users(vectors + 0.1 * random.normal(size=vectors.shape).astype(np.float32), none, none), cluster


def trends(random: np.random.Generator) -> np.ndarray:
    """Scores (items, half-lives) that have nothing to do with each other."""
    return np.exp(2 * random.normal(size=(SNAPSHOT.items.num_rows, HALF_LIVES))).astype(np.float32)


def case(kind: str, seed: int, count: int = 150) -> Case:
    """Users of whom each takes three items: of their taste, or those that trend by the second half-life."""
    random = np.random.default_rng(seed)
    state, cluster = users(count, random)
    scores = trends(random)
    if kind == "taste":
        taken = [c + CLUSTERS * random.choice(40, 3, replace=False) for c in cluster]
    else:
        odds = np.log1p(scores[:, 1]) - 0.7 * np.log1p(scores[:, 2])
        odds = np.exp(3 * odds)
        taken = [random.choice(len(odds), 3, replace=False, p=odds / odds.sum()) for _ in range(count)]
    trend = Trend.at(SNAPSHOT, np.arange(len(scores)), scores, SETTINGS.trend_mix)
    return Case(SNAPSHOT, trend, state, relevant_of(taken), np.zeros(count, np.int64))


def ndcg(found: RankingSettings, one: Case) -> float:
    trend = Trend.at(SNAPSHOT, np.arange(400), np.expm1(one.trend.by_half_life), found.trend_mix)
    ranked = rank(SNAPSHOT, trend, one.users, 10, found)
    return float(per_user(ranked.positions, one.relevant, [10])["ndcg@10"].mean())


def test_where_users_follow_their_taste_the_factor_model_gets_the_weight() -> None:
    found = tune([case("taste", 1), case("taste", 2)], SETTINGS).ranking
    assert found.als_weight > 2 * found.trend_weight
    later = case("taste", 3)
    assert ndcg(found, later) > 1.1 * ndcg(SETTINGS, later)


def test_where_users_follow_the_news_the_trend_gets_it_with_the_half_life_that_matters() -> None:
    tuned = tune([case("news", 1), case("news", 2)], SETTINGS)
    found = tuned.ranking
    assert found.trend_weight > 2 * found.als_weight
    assert found.trend_mix[1] > abs(found.trend_mix[0])
    assert found.trend_mix[2] < 0, "what trends for long is old news"
    later = case("news", 3)
    assert ndcg(found, later) > 1.5 * ndcg(SETTINGS, later)
    assert tuned.ndcg > tuned.configured


def test_what_the_search_reports_is_what_the_scoring_path_gives() -> None:
    cases = [case("news", 4)]
    tuned = tune(cases, SETTINGS)
    assert tuned.ndcg == pytest.approx(ndcg(tuned.ranking, cases[0]), abs=0.01)
    assert tuned.configured == pytest.approx(ndcg(SETTINGS, cases[0]), abs=0.01)


def test_a_part_that_is_the_same_for_all_items_is_worth_no_more_than_their_order() -> None:
    """Users without anything to tell them apart: were ties to count as hits, the silent models would seem perfect."""
    one = case("news", 9)
    silent = Users(np.zeros_like(one.users.als), one.users.last_items, one.users.excluded)
    tuned = tune([Case(SNAPSHOT, one.trend, silent, one.relevant, one.outside)], SETTINGS)
    assert tuned.ranking.trend_weight > 0.5
    assert (tuned.ranking.als_weight, tuned.ranking.session_weight) == (0.0, 0.0)


def test_who_is_known_by_nothing_gets_what_is_popular_whatever_the_weights() -> None:
    found = tune([case("taste", 10)], SETTINGS).ranking
    none = np.full((1, 1), -1, np.int64)
    nobody = Users(np.zeros((1, SNAPSHOT.als_items.shape[1]), np.float32), none, none)
    ranked = rank(SNAPSHOT, Trend.of(SNAPSHOT, {}), nobody, 5, found)
    assert ranked.positions[0].tolist() == SNAPSHOT.by_popularity[:5].tolist()


def test_equal_cases_give_equal_weights() -> None:
    assert tune([case("news", 5)], SETTINGS).ranking == tune([case("news", 5)], SETTINGS).ranking


def test_a_handful_of_users_changes_no_weight() -> None:
    tuned = tune([case("taste", 6, LEAST_USERS - 1)], SETTINGS)
    assert tuned.ranking == SETTINGS
    assert f"only {LEAST_USERS - 1} users" in tuned.note
    assert tune([], SETTINGS).ranking == SETTINGS


def test_without_a_two_tower_model_its_weight_follows_that_of_als_as_the_seed_has_it() -> None:
    found = tune([case("taste", 7)], SETTINGS).ranking
    assert found.two_tower_weight == pytest.approx(found.als_weight * 0.3 / 0.7, abs=1e-5)


def test_clicks_on_items_that_no_ranking_can_reach_lower_the_score_and_nothing_else() -> None:
    one = case("news", 8)
    other = Case(one.snapshot, one.trend, one.users, one.relevant, np.full(len(one.users), 3))
    assert tune([other], SETTINGS).ndcg < tune([one], SETTINGS).ndcg


def test_the_blend_is_judged_by_items_that_a_model_knows() -> None:
    known, new = 12, 12
    parts = np.zeros((1, known + 1, len(MODELS) + 1), np.float32)
    parts[0, :known, 0] = -1 - np.arange(known)
    parts[0, :known, 1] = 0.8
    parts[0, 2, 1] = 0.9
    usable, ideal = np.ones((1, known + 1), bool), np.array([1 + 1 / np.log2(3)])
    table = _Table(parts, usable, np.array([0, 0]), np.array([2, new]), ideal)
    alone = {name: table.ndcg(np.eye(len(MODELS) + 1)[at])[0] for at, name in enumerate(("als", "two_tower"))}
    assert alone["als"] > alone["two_tower"], "for the new item, which ALS has above all that it knows"
    assert _blend([table])["two_tower"] == 1
