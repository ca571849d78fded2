"""Offline evaluation of a day: models fitted on the window before it, full ranking, beside the popularity baselines.

Time split: everything before the day is known, the day is predicted. Ranked for are users seen before, with every
available item of the window; what a user had before is masked. Relevant are the user's available items of the day that the
window knows and the user had not. The weights of the served ranking are tuned on moments of the day before, with models that
know nothing of that day, and reported on the day.

Intervals are percentiles of the bootstrap over users (Sakai 2006, "Evaluating evaluation metrics based on the bootstrap");
differences of two models are paired: the same users are drawn for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pyarrow as pa
import scipy.sparse as sp

from recsys_core import progress
from recsys_core.als import AlsReport, read_factors
from recsys_core.events import DAY_MS, HOUR_MS, ITEM_ID, day_key, hour_keys, key_start_ms
from recsys_core.holdout import (
    Models,
    NoTwoTower,
    Past,
    Split,
    aligned,
    fit_holdout,
    holdout_models,
    holdout_snapshot,
    read_two_tower,
    time_split,
    trend_then,
    users_then,
    validation_cases,
)
from recsys_core.holdout import (
    NothingToEvaluate as NothingToEvaluate,
)
from recsys_core.index import unit_rows
from recsys_core.lake import Lake, Partition
from recsys_core.metrics import evaluate, per_user, rank_all
from recsys_core.popularity import last_hours_popularity, trending_items
from recsys_core.ranking import Snapshot, rank
from recsys_core.samples import codes
from recsys_core.settings import RankingSettings, Settings
from recsys_core.tables import CLICKS_HOURLY
from recsys_core.tuning import Tuned, tune

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

EVALUATION = "evaluation"
ALS_FACTORS = "als_factors"
RECENT_HOURS = 6
FAST_HALF_LIFE = 1.0

POPULAR_WINDOW = "popularity, window"
POPULAR_RECENT = f"popularity, last {RECENT_HOURS} h"
POPULAR_FAST = "popularity, half-life 1 h"
ALS = "ALS"
TWO_TOWER = "two-tower"
BLEND = "blend"
SERVED = "served ranking"

EVERYONE = "all"
RANK_USERS = 512


@dataclass(frozen=True)
class Evaluation:
    """Metrics by model, and how many users, items and relevant pairs they are the means of.

    Attributes:
        metrics: model -> metric -> mean.
        headline: the metric of the rest, NDCG at the first cut-off.
        intervals: model -> bounds of its 95 % interval.
        differences: model -> what the served ranking gains over it, with bounds, paired by users.
        blend_differences: the same of the blend, over ALS and two-tower alone and the popularity of the window.
        segments: segment -> its `users` and the headline of each model; `cold items`: relevant are cold items alone.
        ranking: the tuned settings of the scoring path; `tuning` says how they were found.
        two_tower: version of the model that was evaluated, or why there is none.
    """

    day: str
    users: int
    items: int
    relevant: int
    new_item_share: float
    metrics: dict[str, dict[str, float]]
    als: AlsReport
    headline: str
    intervals: dict[str, list[float]]
    differences: dict[str, list[float]]
    blend_differences: dict[str, list[float]]
    segments: dict[str, dict[str, float]]
    ranking: dict[str, Any]
    tuning: dict[str, Any]
    two_tower: str
    recommended: dict[str, np.ndarray] = field(repr=False, compare=False)


def evaluate_day(lake: Lake, day: str, settings: Settings, spark: Callable[[], SparkSession] | None, engine: str) -> Evaluation:
    """Evaluate `day` against models of the day before. Raises NothingToEvaluate, MissingPartition."""
    before = day_key(key_start_ms(day) - DAY_MS)
    split = time_split(lake, before, day, settings)
    report = fit_holdout(lake, before, day, settings, spark, engine)
    tuned = tune(validation_cases(lake, before, settings, spark, engine), settings.ranking)
    return compare(lake, day, split, report, tuned, settings)


def compare(lake: Lake, day: str, split: Split, report: AlsReport, tuned: Tuned, settings: Settings) -> Evaluation:
    """Every model on a split of `day`, what is served by the tuned weights; `report` is of the ALS fitted before the day."""
    before = day_key(key_start_ms(day) - DAY_MS)
    models = holdout_models(lake, before, day, split, report)
    depth = max(settings.evaluation.ks)
    with progress.task(f"evaluation ({day})", 3) as bar:
        recommended = _counters(lake, day, split, settings, depth)
        bar.update(1)
        recommended |= _models(lake, day, split, models, tuned, settings, depth)
        bar.update(2)
        recommended[SERVED] = served(lake, day, split, models, tuned.ranking, settings, depth)
        bar.update(3)
    return _compared(day, split, models, tuned, recommended, _two_tower_note(lake, before, split, models), settings)


def write_evaluation(lake: Lake, day: str, evaluation: Evaluation | None, reason: str = "") -> Partition:
    """Replace partition `day` of `evaluation`; without one, `reason` says why the day was not evaluated."""
    content: dict[str, Any] = {"day": day, "metrics": {}, "reason": reason}
    if evaluation:
        content = _rounded(asdict(replace(evaluation, recommended={})))
        del content["recommended"]
    users = evaluation.users if evaluation else 0
    return lake.write_blobs(EVALUATION, day, {"evaluation.json": orjson.dumps(content)}, users, content)


def evaluate_snapshot(
    lake: Lake, day: str, snapshot: Snapshot, settings: Settings, split: Split | None = None
) -> dict[str, float]:
    """Metrics of a release's own answers on the split of a day, by its own weights: what the gate asks of the champion.

    Factors of the split's users are those of the release's fit where the lake still has them; others are folded in. Items
    that the release does not know count as missed. Beside the metrics: what `by_segment` gives. Raises NothingToEvaluate,
    MissingPartition.
    """
    before = day_key(key_start_ms(day) - DAY_MS)
    split = split or time_split(lake, before, day, settings)
    there = codes(snapshot.item_ids.array.cast(pa.string()), split.items)
    beyond = np.flatnonzero(there < 0)
    place = there.copy()
    place[beyond] = len(split.items) + np.arange(len(beyond))
    depth = max(settings.evaluation.ks)
    positions = _ranked(lake, day, snapshot, split, _factors_of(lake, snapshot, split.users), settings, depth)
    recommended = np.where(positions >= 0, place[positions], -1)
    relevant = split.relevant.copy()
    relevant.resize(len(split.users), len(split.items) + len(beyond))
    popularity = np.concatenate([split.users_of_item, np.ones(len(beyond), np.int64)])
    headline = f"ndcg@{settings.evaluation.ks[0]}"
    widened = replace(split, relevant=relevant, users_of_item=popularity)
    each = {SERVED: per_user(recommended, relevant, settings.evaluation.ks)[headline]}
    segments = _segments(widened, {SERVED: recommended}, each, settings)
    return {
        **evaluate(recommended, relevant, settings.evaluation.ks, popularity, len(split.items)),
        **by_segment(segments, headline),
    }


def by_segment(segments: Mapping[str, Mapping[str, float]], headline: str) -> dict[str, float]:
    """The served ranking's headline as `<headline> of <segment>`, and each segment's size as `users of <segment>`."""
    scores: dict[str, float] = {}
    for segment, values in segments.items():
        scores |= {f"{headline} of {segment}": float(values[SERVED]), f"users of {segment}": float(values["users"])}
    return scores


# -- what is compared ---------------------------------------------------------------------------------------------------


def _counters(lake: Lake, day: str, split: Split, settings: Settings, depth: int) -> dict[str, np.ndarray]:
    start = key_start_ms(day)
    clicks = lake.dataset(CLICKS_HOURLY, hour_keys(start - settings.trends.window_hours * HOUR_MS, start), missing_ok=True)
    recent = clicks and last_hours_popularity(clicks, start - RECENT_HOURS * HOUR_MS, start)
    weights = dict.fromkeys(settings.events.weights, 1.0)
    fast = clicks and trending_items(clicks, start, weights, (FAST_HALF_LIFE,), len(split.items))
    return {
        POPULAR_WINDOW: _by_score(split, split.users_of_item, settings, depth),
        POPULAR_RECENT: _by_score(split, _scores(recent, split.items), settings, depth),
        POPULAR_FAST: _by_score(split, _scores(fast, split.items), settings, depth),
    }


def _models(
    lake: Lake, day: str, split: Split, models: Models, tuned: Tuned, settings: Settings, depth: int
) -> dict[str, np.ndarray]:
    found = {ALS: _best(split, models.als_users, models.als_items, settings, depth)}
    if models.two_tower is None:
        return found
    snapshot = _snapshot(split, models, settings)
    past = Past(split.users, models.als_users, split.items, split.seen, key_start_ms(day))
    users = users_then(lake, snapshot, past, settings.ranking, settings)
    assert users.two_tower is not None
    found[TWO_TOWER] = _best(split, users.two_tower, models.two_tower.items, settings, depth)
    # A weighted sum of inner products is the inner product of concatenated vectors.
    share = np.float32(tuned.blend["als"] / snapshot.longest)
    both = np.hstack([share * unit_rows(users.als), np.float32(tuned.blend["two_tower"]) * users.two_tower])
    found[BLEND] = _best(split, both, np.hstack([models.als_items, models.two_tower.items]), settings, depth)
    return found


def served(
    lake: Lake, day: str, split: Split, models: Models, ranking: RankingSettings, settings: Settings, depth: int
) -> np.ndarray:
    """The scoring path of serving on the state of the moment before the day: item indices int64 (u, depth)."""
    snapshot = replace(_snapshot(split, models, settings), ranking=ranking)
    place = codes(snapshot.item_ids.array.cast(pa.string()), split.items)
    positions = _ranked(lake, day, snapshot, split, models.als_users, settings, depth)
    return np.where(positions >= 0, place[positions], -1)


def _snapshot(split: Split, models: Models, settings: Settings) -> Snapshot:
    needed = split.recent[split.recent >= 0]
    return holdout_snapshot(split.items, models, split.popularity, needed, settings, split.available)


def _ranked(
    lake: Lake, day: str, snapshot: Snapshot, split: Split, factors: np.ndarray, settings: Settings, depth: int
) -> np.ndarray:
    """Answers of a snapshot, by its own weights, for the users of a split as they were before the day.

    They are chosen among as many candidates as the caches' are.
    """
    start = key_start_ms(day)
    trend = trend_then(lake, snapshot, start, settings)
    past = Past(split.users, factors, split.items, split.seen, start)
    ranked, count = np.empty((len(split.users), depth), np.int64), max(depth, settings.cache.items)
    for at in range(0, len(split.users), RANK_USERS):
        rows = slice(at, at + RANK_USERS)
        users = users_then(lake, snapshot, past.rows(rows), snapshot.ranking, settings)
        ranked[rows] = rank(snapshot, trend, users, count, snapshot.ranking).positions[:, :depth]
    return ranked


def _factors_of(lake: Lake, snapshot: Snapshot, users: np.ndarray) -> np.ndarray:
    """Factors of users from the fit that the snapshot was made of, zeros where the lake has it no more."""
    width = snapshot.als_items.shape[1]
    for key in reversed(lake.keys(ALS_FACTORS)):
        if lake.get(ALS_FACTORS, key).data_version == snapshot.als_version:
            return aligned(read_factors(lake, ALS_FACTORS, key, "users", users), users, width)
    return np.zeros((len(users), width), np.float32)


def _two_tower_note(lake: Lake, before: str, split: Split, models: Models) -> str:
    if models.two_tower is not None:
        return models.two_tower.tower.version
    try:
        return read_two_tower(lake, before, split.items).tower.version
    except NoTwoTower as reason:
        return f"not evaluated: {reason}"


def _scores(table: pa.Table | None, items: np.ndarray) -> np.ndarray:
    """Scores of a (item_id, score) table as float64 (n,), 0 where it has none."""
    scores = np.zeros(len(items))
    if table is not None:
        at = codes(table[ITEM_ID], items)
        scores[at[at >= 0]] = table["score"].to_numpy()[at >= 0]
    return scores


def _by_score(split: Split, scores: np.ndarray, settings: Settings, k: int) -> np.ndarray:
    everyone = np.ones((len(split.users), 1), np.float32)
    return _best(split, everyone, scores.astype(np.float32)[:, None], settings, k)


def _best(split: Split, users: np.ndarray, items: np.ndarray, settings: Settings, k: int) -> np.ndarray:
    """The k items of highest inner product that each user may be served, int64 (u, k), padded by -1."""
    servable = np.flatnonzero(split.available)
    left_out = split.left_out(settings.ranking)
    found = rank_all(users, items[servable], None if left_out is None else left_out[:, servable], k)
    return np.where(found >= 0, servable[found], -1)


# -- how it is reported -------------------------------------------------------------------------------------------------


def _compared(
    day: str,
    split: Split,
    models: Models,
    tuned: Tuned,
    recommended: dict[str, np.ndarray],
    two_tower: str,
    settings: Settings,
) -> Evaluation:
    options = settings.evaluation
    headline = f"ndcg@{options.ks[0]}"
    each = {name: per_user(ranked, split.relevant, options.ks)[headline] for name, ranked in recommended.items()}
    drawn = resamples(len(split.users), options.bootstrap)
    others = [name for name in each if name != SERVED]
    parts = [name for name in (POPULAR_WINDOW, ALS, TWO_TOWER) if name in each and BLEND in each]
    tuning = {name: value for name, value in asdict(replace(tuned, ranking=RankingSettings())).items() if name != "ranking"}
    return Evaluation(
        day=day,
        users=len(split.users),
        items=len(split.items),
        relevant=split.relevant.nnz,
        new_item_share=split.new_item_share,
        metrics={
            name: evaluate(ranked, split.relevant, options.ks, split.users_of_item, len(split.items))
            for name, ranked in recommended.items()
        },
        als=models.als,
        headline=headline,
        intervals={name: interval(values, drawn)[1:] for name, values in each.items()},
        differences={name: interval(each[SERVED] - each[name], drawn) for name in others},
        blend_differences={name: interval(each[BLEND] - each[name], drawn) for name in parts},
        segments=_segments(split, recommended, each, settings),
        ranking=tuned.ranking.model_dump(mode="json"),
        tuning=tuning,
        two_tower=two_tower,
        recommended=recommended,
    )


def resamples(users: int, count: int, seed: int = 0) -> np.ndarray:
    """How often each user is drawn in each of `count` resamples of the users, float32 (count, users)."""
    random = np.random.default_rng(seed)
    drawn = np.empty((count, users), np.float32)
    for row in drawn:
        row[:] = np.bincount(random.integers(0, users, users), minlength=users)
    return drawn


def interval(values: np.ndarray, drawn: np.ndarray) -> list[float]:
    """The mean of users' values, and the bounds of its 95 % interval."""
    means = drawn @ values.astype(np.float32) / len(values)
    low, high = np.percentile(means, [2.5, 97.5])
    return [float(values.mean()), float(low), float(high)]


def _segments(
    split: Split, recommended: Mapping[str, np.ndarray], each: Mapping[str, np.ndarray], settings: Settings
) -> dict[str, dict[str, float]]:
    options = settings.evaluation
    had = np.diff(split.seen.indptr)
    middle = np.median(had)
    groups = {
        EVERYONE: np.ones(len(had), bool),
        "cold users": had <= options.cold_user_items,
        "light users": had <= middle,
        "heavy users": had > middle,
    }
    found = {
        name: {"users": int(group.sum()), **{model: float(values[group].mean()) for model, values in each.items()}}
        for name, group in groups.items()
        if group.any()
    }
    cold = sp.csr_matrix(split.relevant.multiply((split.users_of_item <= options.cold_item_users)[None, :]), dtype=bool)
    cold.eliminate_zeros()
    some = np.flatnonzero(np.diff(cold.indptr))
    if len(some):
        headline = f"ndcg@{options.ks[0]}"
        scores = {
            model: float(per_user(ranked[some], cold[some], options.ks[:1])[headline].mean())
            for model, ranked in recommended.items()
        }
        found["cold items"] = {"users": len(some), **scores}
    return found


def _rounded(value: Any) -> Any:
    """The same with every number cut to six digits after the point, tuples as lists."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Mapping):
        return {name: _rounded(held) for name, held in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_rounded(held) for held in value]
    return value
