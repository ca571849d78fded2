"""How fast interactions go stale: the half-life that ALS is fitted with, found on the last day of its own window.

News and posts live for hours, what a shop sells for months; a half-life of the wrong order costs a factor model half of its
ranking. So each window says itself: factors of what was known before its last day are fitted with each half-life of
`als.half_lives_days` in turn, and what users took first on that day says which of them foretells best.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import scipy.sparse as sp

from recsys_core import progress
from recsys_core.als import AlsReport, factorize_exactly, faded, fit_als, inverse_propensity, ridges_of
from recsys_core.events import DAY_MS, ITEM_ID, USER_ID, day_key
from recsys_core.lake import Lake
from recsys_core.metrics import per_user, rank_all
from recsys_core.samples import codes, distinct_users, smallest, validation_span
from recsys_core.settings import AlsSettings
from recsys_core.tables import INTERACTIONS

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

TESTED_USERS = 5_000
"""Most users whose last day is foretold."""
FITTED_USERS = 20_000
"""Most users that factors are fitted to, those among them: memory and time are bounded whatever the window holds."""
RANK, ITERATIONS = 32, 5
"""Most factors and sweeps of these fits."""


def fit_window(
    lake: Lake,
    window: tuple[str, str],
    end: int,
    into: tuple[str, str],
    settings: AlsSettings,
    spark: Callable[[], SparkSession] | None,
    engine: str,
) -> AlsReport:
    """`fit_als` of the window, table and partition, that ended at `end` (ms), with the half-life that it asks for.

    `into` names table and partition of the factors.
    """
    table, key = window
    half_life = choose_half_life(lake, lake.dataset(table, [key]), end, settings)
    return fit_als(lake, lake.files(table, [key]), *into, settings, spark, engine, half_life)


def choose_half_life(lake: Lake, window: ds.Dataset | None, end: int, settings: AlsSettings) -> float:
    """The one of `settings.half_lives_days` that foretells the last day of a window of interactions best.

    That is the one of the highest NDCG@10; where nobody came back, the first one. Where few users did, the last day is the
    last 2, 4, … days.
    """
    candidates = settings.half_lives_days
    if len(candidates) == 1 or window is None:
        return candidates[0]
    start, days, users = validation_span(window, end, TESTED_USERS)
    if not days:
        return candidates[0]
    past = _past(lake, window, start, users)
    if past is None:
        return candidates[0]
    small = settings.model_copy(update={"rank": min(settings.rank, RANK), "iterations": min(settings.iterations, ITERATIONS)})
    scores = []
    with progress.task("half-life of ALS", len(candidates)) as bar:
        for tried, half_life in enumerate(candidates, 1):
            with progress.reporting_to(progress.silent):
                scores.append(_foretold(past, half_life, small))
            bar.update(tried)
    return candidates[int(np.argmax([found.mean() for found in scores]))]


@dataclass(frozen=True)
class _Past:
    """A sample of users as they were at a moment, and what some of them took since.

    Attributes:
        weights: of their pairs, CSR float32 (users, items).
        age_ms: of each pair, in the order of `weights.data`: time from its last event to the moment.
        tested: rows of the users that took something new, int64 (t,).
        seen: what these had before, CSR bool (t, items).
        relevant: what they took, CSR bool (t, items).
    """

    weights: sp.csr_matrix
    age_ms: npt.NDArray[np.int64]
    tested: npt.NDArray[np.int64]
    seen: sp.csr_matrix
    relevant: sp.csr_matrix


def _past(lake: Lake, window: ds.Dataset, moment: int, returning: pa.Array) -> _Past | None:
    """None when the `returning` users took no item since the moment (ms) that anybody of the sample had before.

    Fitted are the interactions of the day that ended at the moment. Where that day was not made, they are the pairs of `window`
    that were over by then: the weight of one that went on would tell what came later.
    """
    others = smallest(distinct_users(window, ds.field("first_ts") < moment, 2 * FITTED_USERS), FITTED_USERS - len(returning))
    users = pc.unique(pa.concat_arrays([returning, others]))
    columns = [USER_ID, ITEM_ID, "weight", "first_ts", "last_ts"]
    rows = window.to_table(columns=columns, filter=ds.field(USER_ID).isin(users))
    had = rows.filter(pc.less(rows["first_ts"], moment))
    day = day_key(moment - DAY_MS)
    made = lake.dataset(INTERACTIONS, [day]) if lake.find(INTERACTIONS, day) else None
    if made is None:
        fitted = had.filter(pc.less(had["last_ts"], moment))
    else:
        fitted = made.to_table(columns=columns, filter=ds.field(USER_ID).isin(users))
    items = pc.unique(fitted[ITEM_ID])
    shape = (len(users), len(items))

    def matrix(pairs: pa.Table, values: npt.NDArray[Any]) -> sp.csr_matrix:
        at, of = codes(pairs[USER_ID], users), codes(pairs[ITEM_ID], items)
        return sp.csr_matrix((values[of >= 0], (at[of >= 0], of[of >= 0])), shape)

    since = rows.filter(pc.and_(pc.greater_equal(rows["first_ts"], moment), pc.is_in(rows[USER_ID], returning)))
    relevant = matrix(since, np.ones(since.num_rows, bool))
    tested = np.flatnonzero(np.diff(relevant.indptr))
    if not len(tested):
        return None
    return _Past(
        weights=matrix(fitted, fitted["weight"].to_numpy().astype(np.float32)),
        age_ms=matrix(fitted, moment - fitted["last_ts"].to_numpy()).data,
        tested=tested,
        seen=matrix(had, np.ones(had.num_rows, bool))[tested],
        relevant=relevant[tested],
    )


def _foretold(past: _Past, half_life_days: float, settings: AlsSettings) -> npt.NDArray[np.float64]:
    """NDCG@10 of each tested user, float64 (t,), by factors fitted with a half-life."""
    weights = past.weights.copy()
    weights.data = faded(weights.data, past.age_ms, half_life_days)
    weights.data *= inverse_propensity(weights.getnnz(axis=0), settings.propensity_power)[weights.indices]
    ridges = ridges_of(weights.nnz, weights.shape, settings, settings.frequency_scaling)
    user_vectors, item_vectors = factorize_exactly(weights, ridges, settings)
    top = rank_all(user_vectors[past.tested], item_vectors, past.seen, 10)
    return per_user(top, past.relevant, [10])["ndcg@10"]
