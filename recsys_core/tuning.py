"""Finds the weights of the scoring path that maximise NDCG@10 on what users did after some moments of the past.

The parts of every candidate are computed once, by the scoring path itself; the search over weights is then a few hundred
weighted sums. From the best part alone, from the configured weights, and from the maximum of the listwise likelihood (ListNet,
Cao et al. 2007, "Learning to Rank: From Pairwise Approach to Listwise Approach", top-one probabilities) it goes on by
coordinate ascent on the metric (Metzler & Croft 2007, "Linear feature-based models for information retrieval").
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sp

from recsys_core import progress
from recsys_core.ranking import Snapshot, Trend, Users, candidates, parts_of, queries_of
from recsys_core.settings import RankingSettings

CUT = 10
MODELS = ("als", "two_tower", "session", "popular")
"""Parts whose weights are never below 0; the trend has one for each half-life, of any sign."""
SEED_BLEND = {"als": 0.7, "two_tower": 0.3}
LEAST_USERS = 30
"""With fewer users the configured weights stay: a handful of clicks says nothing of seven weights."""
STEPS = (0.4, 0.2, 0.1, 0.05)
"""Sizes of the steps of the ascent, as shares of all weights."""
LEAST_POPULAR = 0.001
"""Weight of popularity where the search gives it none: too little to matter, but it orders what nothing else tells apart."""
LIKELIHOOD_STEPS = 40
LEARNING_RATE = 0.15
CLEAR = 1.0
"""Standard errors that a step has to gain and a part to be worth: less is noise that another day does not repeat."""
DEEPEST = 4096
"""Trending items of each half-life that may be candidates."""
BLOCK = 256


@dataclass(frozen=True)
class Case:
    """Users at a moment, and what they did after it.

    Attributes:
        snapshot, trend, users: as `rank` takes them, as of the moment.
        relevant: CSR (users, items of the snapshot) bool, at least one for each user.
        outside: int64 (users,), further relevant items that the snapshot does not know; no ranking can reach them.
        whole: it is all of the validation days as seen from their first moment, for the blend of the two models alone.
    """

    snapshot: Snapshot
    trend: Trend
    users: Users
    relevant: sp.csr_matrix
    outside: np.ndarray
    whole: bool = False


@dataclass(frozen=True)
class Tuned:
    """What the search found.

    Attributes:
        ranking: the settings with the weights found.
        ndcg: NDCG@10 by them on the validation moments, `configured` by the settings as they were.
        blend: weights of ALS and two-tower where these two rank alone, with sum 1.
        users, moments: that it was found on.
        note: why weights stayed as configured, empty when they did not.
    """

    ranking: RankingSettings
    ndcg: float
    configured: float
    blend: dict[str, float]
    users: int
    moments: int
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class _Table:
    """Scored candidates of a moment: parts (b, c, p) with the trend by half-life, and where the relevant ones are.

    `rows` and `columns` name the relevant candidates, `ideal` (b,) the DCG of a perfect list.
    """

    parts: np.ndarray
    usable: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    ideal: np.ndarray

    def ndcg(self, weights: np.ndarray) -> np.ndarray:
        """NDCG@CUT of each user, float64 (b,)."""
        return self.ndcg_of(self.parts @ weights.astype(np.float32))

    def ndcg_of(self, scores: np.ndarray) -> np.ndarray:
        """The same of scores (b, c); equal ones go by position, as `rank` has it."""
        scores = np.where(self.usable, scores, -np.inf)
        mine, theirs = scores[self.rows, self.columns, None], scores[self.rows]
        level = (theirs == mine) & (np.arange(scores.shape[1]) < self.columns[:, None])
        above = np.count_nonzero((theirs > mine) | level, axis=1)
        gains = np.where(above < CUT, 1 / np.log2(above + 2), 0.0)
        return np.bincount(self.rows, gains, minlength=len(self.ideal)) / self.ideal


def tune(cases: Sequence[Case], settings: RankingSettings) -> Tuned:
    """The weights for `cases`, whose snapshots all have, or all lack, a two-tower model."""
    started = time.perf_counter()
    whole = [case for case in cases if case.whole]
    cases = [case for case in cases if not case.whole]
    users = sum(len(case.users) for case in cases)
    if users < LEAST_USERS:
        note = f"configured weights: only {users} users did something new at the validation moments, {LEAST_USERS} are needed"
        return Tuned(settings, 0.0, 0.0, dict(SEED_BLEND), users, len(cases), time.perf_counter() - started, note)
    tables = [_table(case, settings) for case in progress.track(cases, "parts of the validation moments")]
    names = (*MODELS, *range(tables[0].parts.shape[2] - len(MODELS)))
    objective = _Objective(tables, len(names))
    configured = _weights_of(settings, len(names) - len(MODELS))
    alone = max(np.eye(len(names))[objective.active], key=objective)
    starts = (alone, _scaled(configured), _scaled(_likelihood(tables, objective.active)))
    # An ascent ends at a maximum near its start, and the one below may be by far the higher.
    best, *others = (_pruned(_ascend(start, objective, objective.active), objective) for start in starts)
    for other in others:
        best = other if objective.gains(other, best) > CLEAR else best
    towers = cases[0].users.two_tower is not None
    tuned = _settings_of(best, settings, towers)
    blend = _blend([_table(case, settings) for case in whole]) if towers else dict(SEED_BLEND)
    seconds = time.perf_counter() - started
    return Tuned(tuned, objective(best), objective(configured), blend, users, len(cases), seconds)


class _Objective:
    """NDCG of the users of all tables, remembered by weights."""

    def __init__(self, tables: Sequence[_Table], parts: int) -> None:
        self.tables = tables
        self.active = [p for p in range(parts) if any(table.parts[..., p].any() for table in tables)]
        self.known: dict[bytes, np.ndarray] = {}

    def __call__(self, weights: np.ndarray) -> float:
        """The mean."""
        return float(self.each(weights).mean())

    def each(self, weights: np.ndarray) -> np.ndarray:
        """Of each user, float32."""
        key = np.round(weights, 9).tobytes()
        if key not in self.known:
            self.known[key] = np.concatenate([table.ndcg(weights) for table in self.tables]).astype(np.float32)
        return self.known[key]

    def gains(self, new: np.ndarray, old: np.ndarray) -> float:
        """What `new` gains over `old`, in standard errors of the paired difference."""
        difference = self.each(new) - self.each(old)
        error = difference.std() / np.sqrt(len(difference))
        return float(difference.mean() / error) if error > 0 else 0.0


def _table(case: Case, settings: RankingSettings) -> _Table:
    snapshot, trend = case.snapshot, case.trend
    every = replace(trend, order=_interleaved(trend, snapshot.available))
    wide = settings.model_copy(update={"trending": max(settings.trending, 100), "popular": max(settings.popular, 50)})
    queries = queries_of(snapshot, case.users, wide)
    positions = candidates(snapshot, every, case.users, queries, CUT, wide)
    parts = np.empty((*positions.shape, len(MODELS) + trend.by_half_life.shape[1]), np.float32)
    for at in range(0, len(positions), BLOCK):
        some = slice(at, at + BLOCK)
        found = parts_of(snapshot, trend, queries.rows(some), positions[some])
        parts[some, :, : len(MODELS)] = found[..., [0, 1, 2, 4]]
        parts[some, :, len(MODELS) :] = trend.by_half_life[positions[some]]
    usable = positions >= 0
    relevant = _is_relevant(positions, case.relevant) & usable
    rows, columns = np.nonzero(relevant)
    discounts = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, CUT + 2)))])
    wanted = np.diff(case.relevant.indptr) + case.outside
    return _Table(parts, usable, rows, columns, discounts[np.minimum(wanted, CUT)])


def _interleaved(trend: Trend, available: np.ndarray) -> np.ndarray:
    """Positions with a trend of any half-life: the first of each, then the second of each, and so on."""
    orders = np.argsort(-trend.by_half_life, axis=0, kind="stable")
    mixed = orders[:DEEPEST].ravel()
    trending = np.asarray(trend.by_half_life.any(axis=1)) & available
    mixed = mixed[trending[mixed]]
    _, first = np.unique(mixed, return_index=True)
    return mixed[np.sort(first)]


def _is_relevant(positions: np.ndarray, relevant: sp.csr_matrix) -> np.ndarray:
    items = relevant.shape[1]
    offsets = np.arange(len(positions), dtype=np.int64) * items
    wanted = relevant.indices + np.repeat(offsets, np.diff(relevant.indptr))
    return np.isin(positions + offsets[:, None], wanted)


def _likelihood(tables: Sequence[_Table], active: Sequence[int]) -> np.ndarray:
    """Weights of the highest listwise likelihood, by Adam (Kingma & Ba 2015) from zeros; models not below 0."""
    weights = np.zeros(tables[0].parts.shape[2])
    moment, square = np.zeros_like(weights), np.zeros_like(weights)
    for step in range(1, LIKELIHOOD_STEPS + 1):
        gradient = sum(map(_slope(weights), tables), np.zeros_like(weights)) / len(tables)
        moment = 0.9 * moment + 0.1 * gradient
        square = 0.99 * square + 0.01 * gradient**2
        weights = weights - LEARNING_RATE * 10 * (moment / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.99**step)) + 1e-9)
        weights[: len(MODELS)] = np.maximum(weights[: len(MODELS)], 0)
    result = np.zeros_like(weights)
    result[list(active)] = weights[list(active)]
    return result


def _slope(weights: np.ndarray) -> Callable[[_Table], np.ndarray]:
    """The gradient of the negative mean log likelihood of a table's relevant candidates."""

    def of(table: _Table) -> np.ndarray:
        hits = np.bincount(table.rows, minlength=len(table.ideal))
        some = np.flatnonzero(hits)
        if not len(some):
            return np.zeros(len(weights))
        scores = np.where(table.usable, table.parts @ weights.astype(np.float32), -np.inf)
        scores -= scores.max(axis=1, keepdims=True)
        odds = np.exp(scores)
        odds *= (hits > 0)[:, None] / odds.sum(axis=1, keepdims=True)
        observed = (1 / hits[table.rows]) @ table.parts[table.rows, table.columns]
        return (np.einsum("bc,bcp->p", odds, table.parts, optimize=True) - observed) / len(some)

    return of


def _ascend(start: np.ndarray, objective: _Objective, active: Sequence[int]) -> np.ndarray:
    """Coordinate ascent: steps that fall in size, each taken as long as it clearly gains."""
    best = start
    for step in progress.track(STEPS, "weights"):
        gained = True
        while gained:
            gained = False
            for part in active:
                for change in (step, -step):
                    tried = _changed(best, part, best[part] + change)
                    if tried is not None and objective.gains(tried, best) > CLEAR:
                        best, gained = tried, True
                        break
    return best


def _pruned(weights: np.ndarray, objective: _Objective) -> np.ndarray:
    """Without the parts that are not clearly worth anything, the lightest first."""
    best = weights
    for part in np.argsort(np.abs(weights)):
        tried = _changed(best, part, 0.0)
        if best[part] and tried is not None and objective.gains(best, tried) < CLEAR:
            best = tried
    return best


def _changed(weights: np.ndarray, part: int, value: float) -> np.ndarray | None:
    """Scaled weights with another one of a part; None when nothing is left."""
    tried = weights.copy()
    tried[part] = max(value, 0.0) if part < len(MODELS) else value
    return _scaled(tried) if tried.any() else None


def _blend(found: Sequence[_Table]) -> dict[str, float]:
    """The best share of ALS where it and the two-tower model rank alone; of equal ones, that nearest to the seed's.

    They are judged as the evaluation reports them: by what users took in a whole day, as known at its first moment, and by
    items that one of them knows. An item that was published since has no score, and which of the two leaves it above the
    others would decide.
    """
    tables = [_known_to_models(table) for table in found]
    shares = np.linspace(0, 1, 21)

    def ndcg(share: float) -> float:
        weights = np.zeros(tables[0].parts.shape[2])
        weights[:2] = share, 1 - share
        return float(np.concatenate([table.ndcg(weights) for table in tables]).mean())

    best = max(shares, key=lambda share: (round(ndcg(share), 6), -abs(share - SEED_BLEND["als"])))
    return {"als": round(float(best), 4), "two_tower": round(float(1 - best), 4)}


def _known_to_models(table: _Table) -> _Table:
    """Without the candidates that neither ALS nor the two-tower model scores."""
    usable = table.usable & table.parts[..., :2].any(axis=2)
    kept = usable[table.rows, table.columns]
    return replace(table, usable=usable, rows=table.rows[kept], columns=table.columns[kept])


def _scaled(weights: np.ndarray) -> np.ndarray:
    """The same ranking with absolute weights of sum 1."""
    return weights / max(np.abs(weights).sum(), 1e-12)


def _weights_of(settings: RankingSettings, half_lives: int) -> np.ndarray:
    mix = settings.trend_mix if len(settings.trend_mix) == half_lives else (1.0, *[0.0] * (half_lives - 1))
    models = [getattr(settings, f"{part}_weight") for part in MODELS]
    return np.array([*models, *(settings.trend_weight * share for share in mix)])


def _settings_of(weights: np.ndarray, settings: RankingSettings, towers: bool) -> RankingSettings:
    """The settings with these weights, their absolute sum 1, those of the trend as one weight and shares of sum 1.

    Without a two-tower model to tune on, it shares the factor models' weight with ALS as the seed has it.
    """
    found = _scaled(weights)
    update: dict[str, Any] = {f"{part}_weight": round(float(weight), 6) for part, weight in zip(MODELS, found, strict=False)}
    if not towers:
        update["two_tower_weight"] = round(float(found[0]) * SEED_BLEND["two_tower"] / SEED_BLEND["als"], 6)
    update["popular_weight"] = max(update["popular_weight"], LEAST_POPULAR)
    trend = found[len(MODELS) :]
    total = float(np.abs(trend).sum())
    update["trend_weight"] = round(total, 6)
    if total > 0:
        update["trend_mix"] = tuple(round(float(share / total), 6) for share in trend)
    return settings.model_copy(update=update)
