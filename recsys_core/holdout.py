"""The past as it was known at a moment: who had what, what the models of then were, and what users did next.

Evaluation ranks a day from the window before it (`time_split`). The tuning of the weights ranks moments of the last day
of that window (`validation_cases`), with models that were fitted without this day.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import scipy.sparse as sp

from recsys_core.als import AlsReport, Factors, inverse_propensity, read_factors
from recsys_core.catalog import read_catalog, with_catalog
from recsys_core.events import DAY_MS, EVENT_TYPE, HOUR_MS, ITEM_ID, TS, USER_ID, day_key, hour_keys, key_start_ms
from recsys_core.features import OnlineFeatures
from recsys_core.fold_in import gram
from recsys_core.index import SIMILAR, ExactIndex, Part, longest_first, similar_items
from recsys_core.item_ids import digests, packed
from recsys_core.lake import Lake
from recsys_core.online import LAST_ACTIONS, UserRecord, users_of
from recsys_core.popularity import popular_items, trending_items
from recsys_core.ranking import Snapshot, Trend, Users, availability
from recsys_core.recency import fit_window
from recsys_core.samples import by_recency, codes, distinct_users, most_recent, smallest, validation_span
from recsys_core.settings import RankingSettings, Settings
from recsys_core.tables import CLICKS_HOURLY, INTERACTIONS
from recsys_core.tower import TOWER_FILE, TowerError, UserTower
from recsys_core.tuning import Case

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

HOLDOUT = "holdout_als"
VALIDATION = "validation_als"
VALIDATION_WINDOW = "validation_interactions"
TWO_TOWER = "two_tower"
USER_FEATURES = "user_features"


class NothingToEvaluate(Exception):
    """The day or the window before it has too little data; the message says which."""


class NoTwoTower(Exception):
    """There is no two-tower model of a day that can be used; the message says why."""


@dataclass(frozen=True)
class Split:
    """The time split as positions: rows are users, columns the items of the window.

    Attributes:
        users: object (u,), sampled user ids, sorted.
        items: object (n,), item ids of the window, sorted.
        seen: CSR int32 (u, n), what each user had in the window: 1 for the newest item, 2 for the next.
        recent: int64 (u, k), the user's last items of the window, newest first, padded by -1.
        relevant: CSR bool (u, n), what is asked for: items that each user took, that may be served and are new to them.
        available: bool (n,), items that may be served.
        outside: int64 (u,), further items that the user took and the window does not know.
        unreachable: sampled users that took nothing but such items; they are in none of the other arrays.
        popularity: float64 (n,), summed weights of the window, with time decay.
        users_of_item: int64 (n,), users that had each item in the window.
        new_item_share: share of the day's pairs whose item the window does not know.
    """

    users: np.ndarray
    items: np.ndarray
    seen: sp.csr_matrix
    recent: np.ndarray
    relevant: sp.csr_matrix
    available: np.ndarray
    outside: np.ndarray
    unreachable: int
    popularity: np.ndarray
    users_of_item: np.ndarray
    new_item_share: float

    def left_out(self, ranking: RankingSettings) -> sp.csr_matrix | None:
        """What no model may recommend to each user, CSR, as in serving; None when everything may be."""
        if not ranking.exclude_consumed:
            return None
        newest = self.seen.copy()
        newest.data[newest.data > ranking.max_consumed] = 0
        newest.eliminate_zeros()
        return newest


@dataclass(frozen=True)
class TwoTower:
    """The two-tower model of a day over some items: float32 (n, d), zeros for items that it lacks, and its user tower."""

    items: np.ndarray
    tower: UserTower


@dataclass(frozen=True)
class Models:
    """Models over the items of a split, in their order, and the factors of its users."""

    als: AlsReport
    als_items: np.ndarray
    als_item_weights: np.ndarray | None
    als_users: np.ndarray
    two_tower: TwoTower | None


def time_split(lake: Lake, before: str, day: str, settings: Settings, hours: int = 24) -> Split:
    """What was known before `day` and what happened in its first `hours`, for a sample of users.

    Asked for is what can be served: available items, and such that a user had already only where these are not left out.
    """
    window = lake.dataset(INTERACTIONS, [before])
    if window is None:
        raise NothingToEvaluate(f"the window that ends with {before} has no interactions; evaluate a later day")
    start = key_start_ms(day)
    clicks = lake.dataset(CLICKS_HOURLY, hour_keys(start, start + hours * HOUR_MS), missing_ok=True)
    if clicks is None:
        raise NothingToEvaluate(f"{day} has no events in {CLICKS_HOURLY}")
    sampled = _sample_users(clicks, window, settings.evaluation.max_users)
    if not len(sampled):
        raise NothingToEvaluate(f"no user with events on {day} has any in the window before")
    popular = popular_items(window)
    items = pc.sort_indices(popular[ITEM_ID])
    item_ids = popular[ITEM_ID].take(items).to_numpy()
    mine = ds.field(USER_ID).isin(sampled)
    had = window.to_table(columns=[USER_ID, ITEM_ID, "last_ts"], filter=mine).sort_by(
        [("last_ts", "descending"), (ITEM_ID, "ascending")]
    )
    shape = (len(sampled), len(item_ids))
    rows, columns = codes(had[USER_ID], sampled), codes(had[ITEM_ID], item_ids)
    seen = by_recency(rows, columns, shape)
    available = availability(with_catalog(item_ids, read_catalog(lake)))
    day_pairs = clicks.to_table(columns=[USER_ID, ITEM_ID], filter=mine).group_by([USER_ID, ITEM_ID]).aggregate([])
    users, clicked = codes(day_pairs[USER_ID], sampled), codes(day_pairs[ITEM_ID], item_ids)
    known = clicked >= 0
    asked = known & available[clicked]
    relevant = sp.csr_matrix((np.ones(int(asked.sum()), bool), (users[asked], clicked[asked])), shape)
    if settings.ranking.exclude_consumed:
        relevant = sp.csr_matrix(relevant > relevant.multiply(seen.astype(bool)))
    some = np.flatnonzero(np.diff(relevant.indptr))
    if not len(some):
        raise NothingToEvaluate(f"no user had an item on {day} that is new to them, known to the window and available")
    outside = np.bincount(users[~known], minlength=len(sampled))
    return Split(
        users=sampled.to_numpy(zero_copy_only=False)[some],
        items=item_ids,
        seen=seen[some],
        recent=most_recent(rows, columns, len(sampled), settings.ranking.last_items)[some],
        relevant=relevant[some],
        available=available,
        outside=outside[some],
        unreachable=int(np.count_nonzero((np.diff(relevant.indptr) == 0) & (outside > 0))),
        popularity=popular["score"].take(items).to_numpy(),
        users_of_item=popular["users"].take(items).to_numpy(),
        new_item_share=float(1 - known.mean()),
    )


# -- models of the past -------------------------------------------------------------------------------------------------


def fit_holdout(
    lake: Lake, before: str, day: str, settings: Settings, spark: Callable[[], SparkSession] | None, engine: str
) -> AlsReport:
    """ALS of the window that ends with `before`, kept in the tables HOLDOUT of `day`."""
    end = key_start_ms(before) + DAY_MS
    return fit_window(lake, (INTERACTIONS, before), end, (HOLDOUT, day), settings.als, spark, engine)


def holdout_models(lake: Lake, before: str, day: str, split: Split, report: AlsReport) -> Models:
    """What `fit_holdout` fitted, over the items and users of a split, and the two-tower model of `before` if there is one."""
    fitted = read_factors(lake, HOLDOUT, day, "items")
    items = aligned(fitted, split.items)
    users = aligned(read_factors(lake, HOLDOUT, day, "users", split.users), split.users, items.shape[1])
    try:
        two_tower = read_two_tower(lake, before, split.items)
    except NoTwoTower:
        two_tower = None
    return Models(report, items, item_weights(fitted, split.items, report), users, two_tower)


def read_two_tower(lake: Lake, day: str, item_ids: np.ndarray) -> TwoTower:
    """The two-tower model of a day, its item vectors in the order of `item_ids`. Raises NoTwoTower."""
    part = lake.find(TWO_TOWER, day)
    if part is None:
        raise NoTwoTower(f"two_tower of {day} was not made")
    try:
        blobs = {
            name: lake.read_blob(TWO_TOWER, day, name)
            for name in part.files
            if "/" not in name and name.endswith((".npy", TOWER_FILE, ".parquet"))
        }
        tower = UserTower.from_files(blobs)
        ids = pq.read_table(pa.BufferReader(blobs["items.parquet"]))[ITEM_ID].combine_chunks()
        found = np.load(pa.BufferReader(blobs["items.npy"]), allow_pickle=False)
    except (TowerError, KeyError, ValueError, pa.ArrowInvalid) as error:
        raise NoTwoTower(f"two_tower of {day} can't be read: {error}") from error
    if found.shape != (len(ids), tower.dimension) or not np.isfinite(found).all():
        raise NoTwoTower(f"two_tower of {day}: items.npy has shape {found.shape}, expected ({len(ids)}, {tower.dimension})")
    at = codes(pa.array(item_ids, pa.string()), ids)
    if (at < 0).all():
        raise NoTwoTower(f"two_tower of {day} knows none of the {len(item_ids)} items")
    vectors = np.where((at >= 0)[:, None], found[at], 0).astype(np.float32)
    return TwoTower(vectors, tower)


def holdout_snapshot(
    items: np.ndarray,
    models: Models,
    popularity: np.ndarray,
    needed: np.ndarray,
    settings: Settings,
    available: np.ndarray | None = None,
) -> Snapshot:
    """A release of the past, its items in the order of a release, searched exhaustively.

    `models` and `popularity` are those of `items`, of which those at the positions `needed` get similar items.
    """
    order = longest_first(models.als_items)
    there = np.ones(len(items), bool) if available is None else available[order]
    vectors, part = models.als_items[order], Part.of(there)
    cosine = ExactIndex(vectors, "cosine")
    wanted = np.flatnonzero(np.isin(order, needed))
    weights, two_tower = models.als_item_weights, models.two_tower
    towers = None if two_tower is None else two_tower.items[order]
    return Snapshot(
        release_id="holdout",
        items=pa.table(
            {
                ITEM_ID: pa.array(items[order], pa.string()),
                "available": there,
                "category": pa.nulls(len(items), pa.string()),
            }
        ),
        als_items=vectors,
        als_gram=gram(vectors),
        als_version="holdout",
        als_alpha=settings.als.alpha,
        als_base_preference=models.als.base_preference,
        als_regularization=models.als.ridge,
        als_regularization_per_item=models.als.ridge_per_observation,
        als_item_weights=None if weights is None else weights[order],
        popular=popularity[order].astype(np.float32),
        similar=similar_items(vectors, SIMILAR, cosine, wanted, part),
        indexes={"inner_product": ExactIndex(vectors, "inner_product"), "cosine": cosine},
        ranking=settings.ranking,
        two_tower_items=towers,
        two_tower_index=None if towers is None else ExactIndex(towers, "inner_product"),
        tower=None if two_tower is None else two_tower.tower,
    )


@dataclass(frozen=True)
class Past:
    """Some users as they were at a moment.

    Attributes:
        users: object (u,), their ids.
        factors: float32 (u, rank), their factors of a snapshot's model, a row of zeros where it does not know one.
        items: object (n,), item ids.
        seen: CSR int32 (u, n), what each had until then, as in `Split`.
        moment: ms since 1970.
    """

    users: np.ndarray
    factors: np.ndarray
    items: np.ndarray
    seen: sp.csr_matrix
    moment: int

    def rows(self, which: slice) -> Past:
        """Some of the users."""
        return replace(self, users=self.users[which], factors=self.factors[which], seen=self.seen[which])


def users_then(lake: Lake, snapshot: Snapshot, past: Past, ranking: RankingSettings, settings: Settings) -> Users:
    """The state of users at a moment, made as serving makes it: from the records that they would have had."""
    records = records_then(lake, snapshot, past, settings)
    return users_of(snapshot, records, ranking, user_ids=past.users.tolist(), now=past.moment)


def records_then(lake: Lake, snapshot: Snapshot, past: Past, settings: Settings) -> list[UserRecord]:
    """The records that users would have had at a moment.

    What only the user tower asks for is there where the snapshot has one: features of the last whole day before the moment,
    where they were made, and the actions since.
    """
    users = pa.array(past.users, pa.string())
    features: list[OnlineFeatures | None] = [None] * len(users)
    since: list[list[tuple[str, str, int]]] = [[] for _ in range(len(users))]
    if snapshot.tower is not None:
        midnight = past.moment - past.moment % DAY_MS
        features = _features_then(lake, users, day_key(midnight - DAY_MS))
        since = _actions_since(lake, users, midnight, past.moment, settings.events.weights)
    marks, history, most = digests(pa.array(past.items, pa.string())), settings.features.history, settings.ranking.max_consumed
    records = []
    for row, (start, end) in enumerate(zip(past.seen.indptr[:-1], past.seen.indptr[1:], strict=True)):
        had = past.seen.indices[start:end][np.argsort(past.seen.data[start:end])]
        factor = past.factors[row]
        records.append(
            UserRecord(
                last=tuple(since[row][:LAST_ACTIONS]),
                last_ts=since[row][0][2] if since[row] else 0,
                seen=tuple(past.items[had[:history]].tolist()),
                had=packed(marks[had[history:most]]),
                als_version=snapshot.als_version,
                als=factor if factor.any() else None,
                features=features[row],
            )
        )
    return records


def _features_then(lake: Lake, users: pa.Array, day: str) -> list[OnlineFeatures | None]:
    """`user_features` of a day of each user, None where it has none."""
    found: list[OnlineFeatures | None] = [None] * len(users)
    if lake.find(USER_FEATURES, day) and (features := lake.dataset(USER_FEATURES, [day])):
        rows = features.to_table(columns=[USER_ID, "features"], filter=ds.field(USER_ID).isin(users))
        for at, text in zip(codes(rows[USER_ID], users), rows["features"].to_pylist(), strict=True):
            found[at] = OnlineFeatures.decode(text)
    return found


def _actions_since(
    lake: Lake, users: pa.Array, start: int, end: int, weights: Collection[str]
) -> list[list[tuple[str, str, int]]]:
    """Each user's actions from `start` to before `end` (ms), newest first: item, type and time."""
    found: list[list[tuple[str, str, int]]] = [[] for _ in range(len(users))]
    clicks = lake.dataset(CLICKS_HOURLY, hour_keys(start, end), missing_ok=True) if start < end else None
    if clicks is not None:
        wanted = (ds.field(TS) >= start) & (ds.field(TS) < end) & ds.field(EVENT_TYPE).isin(pa.array(sorted(weights)))
        columns = [USER_ID, ITEM_ID, EVENT_TYPE, TS]
        rows = clicks.to_table(columns=columns, filter=wanted & ds.field(USER_ID).isin(users))
        rows = rows.sort_by([(TS, "descending"), (ITEM_ID, "ascending"), (EVENT_TYPE, "ascending")])
        for at, *action in zip(codes(rows[USER_ID], users), *(rows[name].to_pylist() for name in columns[1:]), strict=True):
            found[at].append(tuple(action))
    return found


def trend_then(lake: Lake, snapshot: Snapshot, moment: int, settings: Settings) -> Trend:
    """The trend at a moment (ms), as `trending_items` would have had it."""
    hours = hour_keys(moment - settings.trends.window_hours * HOUR_MS, moment)
    clicks = lake.dataset(CLICKS_HOURLY, hours, missing_ok=True)
    trends = settings.trends
    if clicks is None:
        none = np.empty((0, len(trends.half_lives_hours)), np.float32)
        return Trend.at(snapshot, np.empty(0, np.int64), none, settings.ranking.trend_mix)
    before = clicks.filter(ds.field("ts") < moment)
    found = trending_items(before, moment, settings.events.weights, trends.half_lives_hours, trends.top)
    return Trend.of(snapshot, dict(zip(found[ITEM_ID].to_pylist(), found["scores"].to_pylist(), strict=True)))


# -- validation ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pairs:
    """User-item pairs of some users: rows and columns int64, first and last time (ms) of each."""

    rows: np.ndarray
    columns: np.ndarray
    first: np.ndarray
    last: np.ndarray

    def take(self, which: np.ndarray) -> _Pairs:
        return _Pairs(self.rows[which], self.columns[which], self.first[which], self.last[which])


def validation_cases(
    lake: Lake, before: str, settings: Settings, spark: Callable[[], SparkSession] | None, engine: str
) -> list[Case]:
    """Moments of the day `before`, each `evaluation.horizon_hours` apart: what users took first in the hours after them.

    Where less than ENOUGH_USERS came back on that day, moments and hours stretch over 2, 4, … days up to its end, as long as
    there are more users and most of the window began before. The window of `before` says when a pair began and was last seen;
    later items are available from their first event on. ALS and popularity know the window that ended before the first moment,
    the two-tower model is that of the same day, if there is one. Where that window was not made, they know the pairs that
    began before the moment, by weights that count what came after it as well. Where nothing came before there is no case.
    The last case is the whole of these days, as seen from the first moment.
    """
    window = lake.dataset(INTERACTIONS, [before])
    if window is None:
        return []
    start, days, pool = validation_span(window, key_start_ms(before) + DAY_MS, settings.evaluation.tuning_users)
    if not len(pool):
        return []
    items, first_seen = _items_of(window)
    table, day = _window_then(lake, window, before, start)
    popularity = _popularity(lake.dataset(table, [day]), items)
    horizon = days * settings.evaluation.horizon_hours * HOUR_MS
    moments = range(start, start + days * DAY_MS, horizon)
    had = window.to_table(columns=[USER_ID, ITEM_ID, "first_ts", "last_ts"], filter=ds.field(USER_ID).isin(pool))
    pairs = _Pairs(codes(had[USER_ID], pool), codes(had[ITEM_ID], items), had["first_ts"].to_numpy(), had["last_ts"].to_numpy())
    wanted = _wanted(pairs, moments, len(pool), settings.ranking)
    if not any(map(len, wanted)):
        return []
    report = fit_window(lake, (table, day), start, (VALIDATION, before), settings.als, spark, engine)
    models = _validation_models(lake, before, start, items, pool, report)
    seen = {moment: _seen_at(pairs, moment, (len(pool), len(items))) for moment in moments}
    lately = np.concatenate([had.indices[had.data <= settings.ranking.last_items] for had in seen.values()])
    base = holdout_snapshot(items, models, popularity, lately, settings)
    order = codes(base.items[ITEM_ID], items)
    ids = pool.to_numpy(zero_copy_only=False)

    def case(moment: int, end: int, users: np.ndarray) -> Case:
        known = first_seen < moment
        snapshot = replace(base, items=base.items.set_column(1, "available", pa.array(known[order])))
        next_ones = pairs.take(_taken(pairs, moment, end, settings.ranking))
        there = next_ones.take(known[next_ones.columns])
        relevant = sp.csr_matrix((np.ones(len(there.rows), bool), (there.rows, there.columns)), seen[moment].shape)
        outside = np.bincount(next_ones.rows[~known[next_ones.columns]], minlength=len(pool))
        past = Past(ids[users], models.als_users[users], items, seen[moment][users], moment)
        state = users_then(lake, snapshot, past, settings.ranking, settings)
        return Case(snapshot, trend_then(lake, snapshot, moment, settings), state, relevant[users][:, order], outside[users])

    cases = [case(moment, moment + horizon, users) for moment, users in zip(moments, wanted, strict=True) if len(users)]
    whole = range(start, moments.stop, moments.stop - start)
    (returned,) = _wanted(pairs, whole, len(pool), settings.ranking)
    return [*cases, replace(case(start, whole.stop, returned), whole=True)]


def _items_of(window: ds.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Item ids, sorted, and the first event of each (ms)."""
    first = _by_item(window, "first_ts", pa.int64(), "min").sort_by(ITEM_ID)
    return first[ITEM_ID].to_numpy(), first["first_ts"].to_numpy()


def _popularity(window: ds.Dataset | None, items: np.ndarray) -> np.ndarray:
    """Weight of each of `items` in the pairs of a window, float64 (n,)."""
    found = np.zeros(len(items))
    if window is not None:
        total = _by_item(window, "weight", pa.float64(), "sum")
        at = codes(total[ITEM_ID], items)
        found[at[at >= 0]] = total["weight"].to_numpy()[at >= 0]
    return found


def _by_item(window: ds.Dataset, column: str, kind: pa.DataType, how: str) -> pa.Table:
    """A column of the pairs as one value of an item, by `how`: min or sum. Reads by batches."""
    total = pa.table({ITEM_ID: pa.array([], pa.string()), column: pa.array([], kind)})
    for batch in window.to_batches(columns=[ITEM_ID, column]):
        part = pa.table({ITEM_ID: batch[ITEM_ID].cast(pa.string()), column: batch[column].cast(kind)})
        merged = pa.concat_tables([total, part]).group_by(ITEM_ID, use_threads=False).aggregate([(column, how)])
        total = merged.select([ITEM_ID, f"{column}_{how}"]).rename_columns([ITEM_ID, column])
    return total


def _window_then(lake: Lake, window: ds.Dataset, before: str, start: int) -> tuple[str, str]:
    """Table and partition of the window that ended at `start` (ms), or else of the pairs of `window` that began before it."""
    day = day_key(start - DAY_MS)
    if lake.find(INTERACTIONS, day):
        return INTERACTIONS, day

    def earlier() -> Iterator[pa.RecordBatch]:
        for batch in window.to_batches(filter=ds.field("first_ts") < start):
            if batch.num_rows:
                yield batch

    lake.write(VALIDATION_WINDOW, before, earlier(), window.schema)
    return VALIDATION_WINDOW, before


def _wanted(pairs: _Pairs, moments: range, users: int, ranking: RankingSettings) -> list[np.ndarray]:
    """Users of each moment: with something before it and something that may be asked for after it."""
    found = []
    for moment in moments:
        had = np.bincount(pairs.rows[pairs.first < moment], minlength=users) > 0
        taken = _taken(pairs, moment, moment + moments.step, ranking)
        found.append(np.flatnonzero(had & (np.bincount(pairs.rows[taken], minlength=users) > 0)))
    return found


def _taken(pairs: _Pairs, start: int, end: int, ranking: RankingSettings) -> np.ndarray:
    """bool (n,): pairs that began from `start` to before `end` (ms), and where what a user had is served those that went on."""
    began = (pairs.first >= start) & (pairs.first < end)
    if ranking.exclude_consumed:
        return began
    return began | ((pairs.first < start) & (pairs.last >= start) & (pairs.last < end))


def _seen_at(pairs: _Pairs, moment: int, shape: tuple[int, int]) -> sp.csr_matrix:
    """What each user had until a moment, as in `Split`; a pair that went on after it counts from when it began."""
    past = pairs.take(pairs.first < moment)
    when = np.where(past.last < moment, past.last, past.first)
    order = np.lexsort((past.columns, -when))
    return by_recency(past.rows[order], past.columns[order], shape)


def _validation_models(lake: Lake, before: str, start: int, items: np.ndarray, pool: pa.Array, report: AlsReport) -> Models:
    fitted = read_factors(lake, VALIDATION, before, "items")
    vectors = aligned(fitted, items)
    ids = pool.to_numpy(zero_copy_only=False)
    factors = aligned(read_factors(lake, VALIDATION, before, "users", ids), ids, vectors.shape[1])
    try:
        two_tower = read_two_tower(lake, day_key(start - DAY_MS), items)
    except NoTwoTower:
        two_tower = None
    return Models(report, vectors, item_weights(fitted, items, report), factors, two_tower)


# -- ids as positions ---------------------------------------------------------------------------------------------------


def aligned(factors: Factors, ids: np.ndarray, rank: int | None = None) -> np.ndarray:
    """float32 (len(ids), rank): the factors in the order of the sorted `ids`, zeros for those that have none."""
    vectors = np.zeros((len(ids), rank or factors.vectors.shape[1]), np.float32)
    at = codes(pa.array(factors.ids, pa.string()), ids)
    vectors[at[at >= 0]] = factors.vectors[at >= 0]
    return vectors


def item_weights(fitted: Factors, ids: np.ndarray, report: AlsReport) -> np.ndarray | None:
    """float32 (len(ids),): `Snapshot.als_item_weights` of the sorted `ids`, 1 for those that were not in the fit."""
    if not report.propensity_power:
        return None
    weights = np.ones(len(ids), np.float32)
    at = codes(pa.array(fitted.ids, pa.string()), ids)
    weights[at[at >= 0]] = inverse_propensity(fitted.n, report.propensity_power)[at >= 0]
    return weights


def _sample_users(clicks: ds.Dataset, window: ds.Dataset, max_users: int) -> pa.Array:
    """Users of the day that the window knows: those with the smallest hashes, sorted. Memory holds twice `max_users`."""
    pool = smallest(distinct_users(clicks, None, 8 * max_users), 4 * max_users)
    users = smallest(distinct_users(window, ds.field(USER_ID).isin(pool), None), max_users)
    return users.take(pc.sort_indices(users))
