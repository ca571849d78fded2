"""How fast interactions go stale, and how far factors may follow single ones: found on the last days of a window itself.

News and posts live for hours, what a shop sells for months; a half-life of the wrong order costs a factor model half of its
ranking. And of news everybody takes the same: best for them is a ridge under which little else is left, where tastes differ one
under which much is. So factors of what was known before each of the window's last days are fitted with each half-life and each
ridge in turn, and what users took first on these days says which of them foretells best.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import scipy.sparse as sp

from recsys_core import progress
from recsys_core.als import AlsReport, base_preference_of, factorize_exactly, fit_als, not_faded
from recsys_core.events import DAY_MS, ITEM_ID, USER_ID, day_key
from recsys_core.lake import Lake
from recsys_core.metrics import per_user, rank_all
from recsys_core.samples import codes, distinct_users, smallest, validation_span
from recsys_core.settings import AlsSettings
from recsys_core.tables import INTERACTIONS

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

SPANS = 2
"""Last days that are foretold. What is best for one day of news may lie beyond the ridge that leaves something on another."""
TESTED_USERS = 5_000
"""Most users of whom a day is foretold."""
FITTED_USERS = 20_000
"""Most users that factors are fitted to, those among them: memory and time are bounded whatever the window holds."""
RANK, ITERATIONS = 32, 5
"""Most factors and sweeps of these fits."""


class Chosen(NamedTuple):
    """Of a fit: days after which half of an interaction is left (0: all), and λ in units of `als.common_scale`.

    λ of 0 stands for that of the settings.
    """

    half_life_days: float
    relative_regularization: float


def fit_window(
    lake: Lake,
    window: tuple[str, str],
    end: int,
    into: tuple[str, str],
    settings: AlsSettings,
    spark: Callable[[], SparkSession] | None,
    engine: str,
) -> AlsReport:
    """`fit_als` of the window, table and partition, that ended at `end` (ms), with what it asks for itself.

    `into` names table and partition of the factors.
    """
    table, key = window
    chosen = choose(lake, lake.dataset(table, [key]), end, settings, engine)
    return fit_als(lake, lake.files(table, [key]), *into, settings, spark, engine, *chosen)


def choose(lake: Lake, window: ds.Dataset | None, end: int, settings: AlsSettings, engine: str) -> Chosen:
    """What foretells the last SPANS days of a window of interactions best.

    That is the one of `settings.half_lives_days`, and for the engine `numpy` of `settings.relative_regularizations`, with the
    highest NDCG@10, of which each day counts alike; where nobody came back, the first of each. Where few users did, a day
    is 2, 4, … days.
    """
    ridges = settings.relative_regularizations if engine == "numpy" else ()
    candidates = [Chosen(*pair) for pair in product(settings.half_lives_days, ridges or (0.0,))]
    if len(candidates) == 1 or window is None:
        return candidates[0]
    pasts = _pasts(lake, window, end)
    if not pasts:
        return candidates[0]
    small = settings.model_copy(
        update={
            "rank": min(settings.rank, RANK),
            "iterations": min(settings.iterations, ITERATIONS),
            "base_preference": base_preference_of(engine, settings),
        }
    )
    scores = []
    with progress.task("half-life and ridge of ALS", len(candidates)) as bar:
        for tried, candidate in enumerate(candidates, 1):
            with progress.reporting_to(progress.silent):
                scores.append(np.mean([_foretold(past, candidate, small, engine).mean() for past in pasts]))
            bar.update(tried)
    return candidates[int(np.argmax(scores))]


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


def _pasts(lake: Lake, window: ds.Dataset, end: int) -> list[_Past]:
    """The moments before the last SPANS days of a window that ended at `end` (ms), newest first; of a short window fewer."""
    found = []
    for _ in range(SPANS):
        start, days, users = validation_span(window, end, TESTED_USERS)
        past = _past(lake, window, start, users) if days else None
        if past is None:
            break
        found.append(past)
        window, end = window.filter(ds.field("first_ts") < start), start
    return found


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


def _foretold(past: _Past, candidate: Chosen, settings: AlsSettings, engine: str) -> npt.NDArray[np.float64]:
    """NDCG@10 of each tested user, float64 (t,), by factors that `factorize_exactly` fits to what the engine has of pairs."""
    weights, fresh = past.weights.copy(), past.weights.copy()
    fresh.data = not_faded(past.age_ms, candidate.half_life_days)
    if engine != "numpy":
        weights.data *= fresh.data
        fresh.data = np.ones_like(fresh.data)
    fit = factorize_exactly(weights, fresh, settings, candidate.relative_regularization)
    top = rank_all(fit.users[past.tested], fit.items, past.seen, 10)
    return per_user(top, past.relevant, [10])["ndcg@10"]
