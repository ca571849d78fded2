"""Alternating least squares for implicit feedback (Hu, Koren, Volinsky 2008), three engines behind one interface.

`numpy` and `implicit` fit on one machine, Spark MLlib on a cluster. All minimise weighted squares: preference 0 with
confidence 1 for all user-item pairs, and preference 1 with confidence alpha·w for each observed one of weight w. Among all
pairs an observed one has preference 1 in the two libraries, as Hu et al. have it, and `base_preference` in `numpy`: 1, or 0 as
Rendle et al. 2022. With 0 an observation of little weight says little; with 1 it says that the item is liked, in whatever way
it was found. They differ in the ridge term too, n_r being the observations of row r and n̄ their mean over all users and items:

- MLlib: λ·n_r (ALS-WR).
- `implicit`: λ·n̄ for every row.
- `numpy`: λ·n̄·(1 − s + s·m_r/m̄) with s = `frequency_scaling` and m_r = n_r + N_r/alpha, N_r the size of the other side:
  at 0 that of `implicit`, at 1 frequency-scaled regularisation (Rendle et al. 2022, "Revisiting the performance of iALS",
  eq. 7 with ν = 1; 1/alpha is their weight of an unobserved pair), with the same mean for every s.

What is shown to everybody is acted on by many, whatever their taste. `propensity_power` takes an item's propensity to be
observed as its number of interactions to that power and weighs each interaction by the inverse (Saito et al. 2020, "Unbiased
recommender learning from missing-not-at-random implicit feedback", with power 0.5), in all engines.

Where items come and go, what was done long ago says little. With a half-life h a pair whose last event has the age t keeps the
share f = (1 + (2^(1/1.5) − 1)·t/h)^−1.5, a power of time as what people come back to is (Anderson & Schooler 1991, "Reflections
of the environment in memory"). `numpy` takes f of the pair as observed and 1 − f as not: f weighs what the pair adds to the
squares and to n_r, so that what has faded away weighs as little as what never was. The libraries of the other two know pairs
either as observed or as not and have f·w in place of w. `recency.choose` finds the half-life, and with it λ for `numpy`, in
units of what users have in common (`common_scale`): the λ that is right for weights of 5 leaves nothing of weights of a half.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import scipy.sparse as sp

from recsys_core import progress
from recsys_core.events import DAY_MS
from recsys_core.lake import Lake, MissingPartition
from recsys_core.least_squares import Entries, solve_rows
from recsys_core.settings import AlsSettings
from recsys_core.spark import is_local

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

Side = Literal["users", "items"]
FloatArray = npt.NDArray[np.floating]

READ_ROWS = 1 << 20
FACTOR_ROWS = 1 << 16
ID_BUCKETS = 256
START_DEVIATION = 0.1
FADING = 1.5
"""Exponent of the power of time by which pairs fade."""


@dataclass(frozen=True)
class AlsReport:
    """What a fit did. `seconds` is the whole of it, reading and writing included.

    What `fold_in.fold_in` needs: the ridge term of a user with n observations is `ridge + ridge_per_observation · n`, and
    each observation's weight was multiplied by `inverse_propensity(n of the items, propensity_power)`; and `base_preference`.
    """

    engine: str
    users: int
    items: int
    observations: int
    seconds: float
    ridge: float
    ridge_per_observation: float
    propensity_power: float
    base_preference: float
    half_life_days: float
    regularization: float


@dataclass(frozen=True)
class Ridge:
    """The ridge of a row of n observations, whole or faded: `constant + per_observation · n`."""

    constant: float
    per_observation: float

    def of(self, observations: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """float64 (m,) of (m,)."""
        return self.constant + self.per_observation * observations.astype(np.float64)


@dataclass(frozen=True)
class Factors:
    """Rows of a factor table: ids object (m,), observations int32 (m,), vectors float32 (m, rank), C-contiguous."""

    ids: npt.NDArray[np.object_]
    n: npt.NDArray[np.int32]
    vectors: npt.NDArray[np.float32]


def choose_engine(settings: AlsSettings, spark_master: str) -> str:
    """The engine that the settings name; on auto, `numpy` when Spark would run in this process, else `spark`."""
    if settings.engine != "auto":
        return settings.engine
    return "numpy" if is_local(spark_master) else "spark"


def fit_als(
    lake: Lake,
    files: Sequence[str],
    table: str,
    key: str,
    settings: AlsSettings,
    spark: Callable[[], SparkSession] | None,
    engine: str,
    half_life_days: float = 0.0,
    relative_regularization: float = 0.0,
) -> AlsReport:
    """Factorise interactions and replace partition `key` of `<table>_users` and `<table>_items`.

    `files` are Parquet files of the lake with the columns user_id, item_id and weight (> 0), one row for a pair, and with a
    half-life last_ts (ms): pairs fade as the module's first lines say, by the time from their last event to the newest of all.
    0: no half-life. `relative_regularization` is λ in units of `common_scale` (`numpy` alone), 0: `settings.regularization`.
    The tables have the columns id string, n int32 (observations in the fit), factor list of `rank` float32. A pair
    counts when its user has `min_user_interactions` and its item `min_item_interactions` before any pair is left out.

    `numpy` and `implicit` give the same factors, to the bit, for the same rows, versions and machine, whatever their order
    and the number of threads. Spark repeats start values and blocks by the seed, but adds partial sums in the order in
    which tasks end, so its factors repeat to rounding only.

    Raises ValueError when nothing is left to fit, for a weight that isn't finite and positive, for an unknown engine,
    and when the fit diverges.
    """
    started = time.perf_counter()
    name = f"{table}, partition {key!r}"
    if not files:
        raise ValueError(f"{name}: no interactions to fit, there is no file of them")
    if engine in ("numpy", "implicit"):
        users, items, observations, fitted = _fit_one_machine(
            lake, files, table, key, settings, engine, half_life_days, relative_regularization
        )
        ridge, regularization = fitted.ridge, fitted.regularization
    elif engine == "spark":
        if spark is None:
            raise ValueError(f"{name}: the engine `spark` needs a Spark session")
        users, items, observations = _fit_spark(lake, files, table, key, settings, spark(), half_life_days)
        ridge, regularization = Ridge(0.0, settings.regularization), settings.regularization
    else:
        raise ValueError(f"{name}: unknown ALS engine {engine!r}, use `numpy`, `implicit` or `spark`")
    seconds = time.perf_counter() - started
    return AlsReport(
        engine,
        users,
        items,
        observations,
        seconds,
        ridge.constant,
        ridge.per_observation,
        settings.propensity_power,
        base_preference_of(engine, settings),
        half_life_days,
        regularization,
    )


def base_preference_of(engine: str, settings: AlsSettings) -> float:
    """Preference of an observed pair among all pairs: the setting for `numpy`, 1 for the libraries."""
    return settings.base_preference if engine == "numpy" else 1.0


def _nothing_left(name: str, settings: AlsSettings) -> ValueError:
    return ValueError(
        f"{name}: no interactions to fit; every pair needs a user with at least {settings.min_user_interactions} "
        f"and an item with at least {settings.min_item_interactions} interactions"
    )


def inverse_propensity(n: npt.NDArray[np.integer], power: float) -> npt.NDArray[np.float32]:
    """What an interaction with each item of a fit is multiplied by, float32 (items,), from the items' interactions `n`.

    n^-power, scaled to the mean 1 over all interactions. An item without any gets what one of a single interaction does.
    """
    had = np.maximum(n, 1).astype(np.float64)
    scale = n.sum() / (n * had**-power).sum() if n.any() else 1.0
    return (scale * had**-power).astype(np.float32)


# -- one machine ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Interactions:
    """Ids in sorted order, the weights between them and what is left of each pair, both CSR float32 (users, items)."""

    user_ids: pa.Array
    item_ids: pa.Array
    weights: sp.csr_matrix
    fresh: sp.csr_matrix


@dataclass(frozen=True)
class Fit:
    """Vectors float32 (users, rank) and (items, rank), the users' ridge and the λ that it was made with."""

    users: npt.NDArray[np.float32]
    items: npt.NDArray[np.float32]
    ridge: Ridge
    regularization: float


def _fit_one_machine(
    lake: Lake,
    files: Sequence[str],
    table: str,
    key: str,
    settings: AlsSettings,
    engine: str,
    half_life_days: float,
    relative_regularization: float,
) -> tuple[int, int, int, Fit]:
    """Users, items, observations, and the fit."""
    name = f"{table}, partition {key!r}"
    data = _frequent(_read_interactions(lake, files, name, half_life_days), settings)
    users, items = data.weights.shape
    observations = int(data.weights.nnz)
    if not observations:
        raise _nothing_left(name, settings)
    if engine == "numpy":
        fit = factorize_exactly(data.weights, data.fresh, settings, relative_regularization)
    else:
        fit = _factorize_implicit(data.weights, data.fresh, settings)
    sides: tuple[tuple[Side, pa.Array, npt.NDArray[np.float32], npt.NDArray[np.int64]], ...] = (
        ("users", data.user_ids, fit.users, data.weights.getnnz(axis=1)),
        ("items", data.item_ids, fit.items, data.weights.getnnz(axis=0)),
    )
    for side, _, vectors, _ in sides:
        if not np.isfinite(vectors).all():
            raise ValueError(f"{name}: the fit diverged, {side} have factors that aren't finite; raise als.regularization")
    for side, ids, vectors, counts in sides:
        lake.write(f"{table}_{side}", key, _factor_batches(ids, counts, vectors), _factor_schema(settings.rank))
    return users, items, observations, fit


def ridges_of(observations: float, shape: tuple[int, int], settings: AlsSettings, scaling: float) -> tuple[Ridge, Ridge]:
    """The ridges of users and of items for a fit of `shape` (users, items); see the module's first lines for the formula."""
    mean = 2 * observations / sum(shape)
    offsets = (shape[1] / settings.alpha, shape[0] / settings.alpha)
    mean_frequency = mean + 2 * shape[0] * shape[1] / settings.alpha / sum(shape)
    even = settings.regularization * mean * (1 - scaling)
    scaled = settings.regularization * mean * scaling / mean_frequency
    users, items = (Ridge(even + scaled * offset, scaled) for offset in offsets)
    return users, items


def _factor_schema(rank: int) -> pa.Schema:
    return pa.schema([pa.field("id", pa.string()), pa.field("n", pa.int32()), pa.field("factor", pa.list_(pa.float32(), rank))])


def _factor_batches(ids: pa.Array, counts: npt.NDArray[np.int64], vectors: npt.NDArray[np.float32]) -> Iterator[pa.RecordBatch]:
    schema = _factor_schema(vectors.shape[1])
    for at in range(0, len(ids), FACTOR_ROWS):
        rows = slice(at, at + FACTOR_ROWS)
        factor = pa.FixedSizeListArray.from_arrays(pa.array(vectors[rows].reshape(-1)), vectors.shape[1])
        yield pa.record_batch([ids[rows], pa.array(counts[rows], pa.int32()), factor], schema=schema)


def _read_interactions(lake: Lake, files: Sequence[str], name: str, half_life_days: float) -> _Interactions:
    """Stream the pairs into codes and weights; strings are kept once for each batch, as dictionaries."""
    dataset = ds.dataset(list(files), filesystem=lake.fs, format="parquet")
    users, items, weights, last = [], [], [np.empty(0, np.float32)], [np.empty(0, np.int64)]
    read = ["user_id", "item_id", "weight", *(["last_ts"] if half_life_days else [])]
    for batch in dataset.to_batches(columns=read, batch_size=READ_ROWS):
        users.append(batch["user_id"].dictionary_encode())
        items.append(batch["item_id"].dictionary_encode())
        weights.append(batch["weight"].to_numpy(zero_copy_only=False).astype(np.float32))
        last.append(batch["last_ts"].to_numpy() if half_life_days else np.zeros(len(batch), np.int64))
    values, times = np.concatenate(weights), np.concatenate(last)
    if not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"{name}: an interaction has a weight that isn't a finite number above 0")
    user_ids, rows = _sorted_codes(users)
    item_ids, columns = _sorted_codes(items)

    def matrix(data: npt.NDArray[np.float32]) -> sp.csr_matrix:
        made = sp.coo_matrix((data, (rows, columns)), shape=(len(user_ids), len(item_ids))).tocsr()
        made.sort_indices()
        return made

    return _Interactions(user_ids, item_ids, matrix(values), matrix(not_faded(times.max(initial=0) - times, half_life_days)))


def not_faded(age_ms: npt.NDArray[np.int64], half_life_days: float) -> npt.NDArray[np.float32]:
    """What is left of pairs so long after their last event, float32 (m,), above 0 and at most 1; with half-life 0, all."""
    if not half_life_days:
        return np.ones(len(age_ms), np.float32)
    return ((1 + _growth(half_life_days) * age_ms.astype(np.float64)) ** -FADING).astype(np.float32)


def _growth(half_life_days: float) -> float:
    """The factor of an age in ms for which a half is left after the half-life."""
    return float((2 ** (1 / FADING) - 1) / (half_life_days * DAY_MS))


def _sorted_codes(chunks: list[Any]) -> tuple[pa.Array, npt.NDArray[np.int32]]:
    """The distinct ids in order, and the place of each row's id among them, so that row order has no influence."""
    kind: Any = pa.dictionary(pa.int32(), pa.string())
    unified: Any = pa.chunked_array([chunk.cast(kind) for chunk in chunks], kind).unify_dictionaries()
    if not len(unified):
        return pa.array([], pa.string()), np.empty(0, np.int32)
    ids = unified.chunk(0).dictionary
    order = pc.sort_indices(ids).to_numpy()
    place = np.empty(len(ids), np.int32)
    place[order] = np.arange(len(ids), dtype=np.int32)
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in unified.chunks])
    return ids.take(order), place[codes]


def _frequent(data: _Interactions, settings: AlsSettings) -> _Interactions:
    """Leave out pairs of rare users or items, then users and items without any pair."""
    matrix = data.weights
    users = np.flatnonzero(matrix.getnnz(axis=1) >= settings.min_user_interactions)
    items = np.flatnonzero(matrix.getnnz(axis=0) >= settings.min_item_interactions)
    matrix = matrix[users][:, items]
    some_users = np.flatnonzero(matrix.getnnz(axis=1))
    some_items = np.flatnonzero(matrix.getnnz(axis=0))
    return _Interactions(
        data.user_ids.take(users[some_users]),
        data.item_ids.take(items[some_items]),
        matrix[some_users][:, some_items],
        data.fresh[users][:, items][some_users][:, some_items],
    )


def factorize_exactly(
    weights: sp.csr_matrix, fresh: sp.csr_matrix, settings: AlsSettings, relative_regularization: float = 0.0
) -> Fit:
    """Each half-sweep solved exactly, with λ of `relative_regularization` times `common_scale`; 0: that of the settings.

    `weights` and `fresh`, what is left of each pair, are CSR float32 (users, items) of the same pairs. Items start from a
    normal distribution of standard deviation START_DEVIATION/√rank (Rendle et al. 2022, section 4.2).
    """
    excess = _unbiased(weights, settings)
    excess.data *= np.float32(settings.alpha) * fresh.data
    preference = fresh.copy()
    preference.data *= np.float32(settings.base_preference)
    by_user, by_item = Entries(excess, preference.data), _transposed(excess, preference)
    n_users, n_items = (np.asarray(fresh.sum(axis=axis, dtype=np.float64)).ravel() for axis in (1, 0))
    unit = settings.model_copy(update={"regularization": 1.0})
    user_ridge, item_ridge = ridges_of(float(n_users.sum()), weights.shape, unit, settings.frequency_scaling)
    of_users, of_items = user_ridge.of(n_users), item_ridge.of(n_items)
    regularization = settings.regularization
    if relative_regularization:
        regularization = relative_regularization * common_scale(by_user, of_users, of_items)
    random = np.random.default_rng(settings.seed)
    items = random.standard_normal((weights.shape[1], settings.rank), np.float32)
    items *= np.float32(START_DEVIATION / np.sqrt(settings.rank))
    users = np.zeros((weights.shape[0], settings.rank), np.float32)
    with progress.task("ALS iterations", settings.iterations) as bar:
        for done in range(settings.iterations):
            users = solve_rows(by_user, items, regularization * of_users)
            items = solve_rows(by_item, users, regularization * of_items)
            bar.update(done + 1)
    ridge = Ridge(regularization * user_ridge.constant, regularization * user_ridge.per_observation)
    return Fit(users, items, ridge, regularization)


def common_scale(entries: Entries, user_ridge: npt.NDArray[np.float64], item_ridge: npt.NDArray[np.float64]) -> float:
    """The λ with which users who are all alike give items vectors as long as theirs, of entries by user and ridges at λ = 1.

    Near zero a half-sweep is x = R⁻¹By/λ with B the right sides p + s and R the ridges, float64 (users,) and (items,): factors
    grow from it along the singular vectors of X = R_u^-½·B·R_i^-½ whose singular value is above λ. This is the length of Xᵀ1
    beside that of 1, at most the largest singular value; that one itself is no measure, since some rare items that weigh much
    by their inverse propensity may have it to themselves.
    """
    excess = entries.excess
    wanted = sp.csr_matrix((entries.preference + excess.data, excess.indices, excess.indptr), excess.shape)
    across = sp.diags(1 / np.sqrt(user_ridge)) @ wanted @ sp.diags(1 / np.sqrt(item_ridge))
    return float(np.linalg.norm(across.T @ np.ones(across.shape[0])) / np.sqrt(across.shape[0]))


def _unbiased(weights: sp.csr_matrix, settings: AlsSettings) -> sp.csr_matrix:
    """A copy in which each weight is that of its item's inverse propensity."""
    found = weights.copy()
    if settings.propensity_power:
        found.data *= inverse_propensity(weights.getnnz(axis=0), settings.propensity_power)[weights.indices]
    return found


def _transposed(excess: sp.csr_matrix, preference: sp.csr_matrix) -> Entries:
    by_item, theirs = excess.T.tocsr(), preference.T.tocsr()
    by_item.sort_indices()
    theirs.sort_indices()
    return Entries(by_item, theirs.data)


def _factorize_implicit(weights: sp.csr_matrix, fresh: sp.csr_matrix, settings: AlsSettings) -> Fit:
    """The same by a few conjugate gradient steps a half-sweep, the ridge equal for all rows.

    `implicit` takes the stored value as the whole confidence (implicit 0.7, cpu/als.py: b += c·y, A += (c − 1)·y·yᵀ),
    MLlib takes 1 + alpha·value; so the values handed over are 1 + alpha·w, with `implicit`'s own alpha at 1.
    """
    from implicit.cpu.als import AlternatingLeastSquares
    from threadpoolctl import threadpool_limits

    confidence = _unbiased(weights, settings)
    confidence.data = 1 + np.float32(settings.alpha) * fresh.data * confidence.data
    ridge, _ = ridges_of(weights.nnz, weights.shape, settings, 0.0)
    # The library's own threads each call BLAS: more threads inside those calls make a fit ten times slower.
    with threadpool_limits(1, "blas"), progress.task("ALS iterations", settings.iterations) as bar:
        model = AlternatingLeastSquares(
            factors=settings.rank,
            regularization=ridge.constant,
            alpha=1.0,
            iterations=settings.iterations,
            random_state=settings.seed,
            num_threads=0,
        )
        model.fit(confidence, show_progress=False, callback=lambda done, _seconds, _loss: bar.update(done + 1))
    return Fit(model.user_factors, model.item_factors, ridge, settings.regularization)


# -- Spark ------------------------------------------------------------------------------------------------------------


def _fit_spark(
    lake: Lake, files: Sequence[str], table: str, key: str, settings: AlsSettings, spark: SparkSession, half_life_days: float
) -> tuple[int, int, int]:
    from pyspark.ml.recommendation import ALS

    name = f"{table}, partition {key!r}"
    interactions = spark.read.parquet(*(lake.url(path) for path in files))
    pairs = _frequent_pairs(_faded(interactions, half_life_days), settings)
    observations = _count_valid(pairs, name)
    if not observations:
        raise _nothing_left(name, settings)
    users = _numbered(pairs, "user_id").persist()
    items = _numbered(pairs, "item_id").persist()
    blocks = int(spark.conf.get("spark.sql.shuffle.partitions") or 10)
    # Without checkpoints (MLlib makes one every ten sweeps) the lineage of some fifty sweeps overflows the JVM's stack.
    checkpoints = lake.stage(f"{table}_users")
    spark.sparkContext.setCheckpointDir(lake.url(checkpoints))
    try:
        ratings = (
            pairs.join(users.selectExpr("id AS user_id", "index AS user"), "user_id")
            .join(_weighted(items, settings.propensity_power), "item_id")
            .selectExpr("user", "item", "CAST(weight * inverse_propensity AS FLOAT) AS weight")
        )
        # MLlib's confidence is 1 + alpha·rating and its ridge regParam·n (ml/recommendation/ALS.scala, computeFactors).
        model = ALS(
            rank=settings.rank,
            maxIter=settings.iterations,
            regParam=settings.regularization,
            alpha=settings.alpha,
            implicitPrefs=True,
            seed=settings.seed,
            userCol="user",
            itemCol="item",
            ratingCol="weight",
            numUserBlocks=blocks,
            numItemBlocks=blocks,
        ).fit(ratings)
        written = {
            "users": _stage_factors(lake, f"{table}_users", key, users, model.userFactors),
            "items": _stage_factors(lake, f"{table}_items", key, items, model.itemFactors),
        }
    finally:
        users.unpersist()
        items.unpersist()
        lake.fs.rm(checkpoints, recursive=True)
    rows = {}
    for side, staged in written.items():
        factors = spark.read.parquet(lake.url(f"{staged}/key={key}"))
        rows[side], version = _check_factors(factors, f"{name}, {side}")
        lake.publish_staged(f"{table}_{side}", staged, "key", {key: (rows[side], version)})
    return rows["users"], rows["items"], observations


def _faded(interactions: DataFrame, half_life_days: float) -> DataFrame:
    """user_id, item_id and weight (float), as `not_faded` has it."""
    from pyspark.sql import functions as F

    weight = F.col("weight")
    if half_life_days:
        newest = interactions.agg(F.max("last_ts").alias("ts")).first()
        age_ms = F.lit(newest["ts"] if newest else None) - F.col("last_ts")
        weight *= F.pow(1 + F.lit(_growth(half_life_days)) * age_ms, F.lit(-FADING))
    return interactions.select("user_id", "item_id", weight.cast("float").alias("weight"))


def _frequent_pairs(pairs: DataFrame, settings: AlsSettings) -> DataFrame:
    """The pairs that count."""
    from pyspark.sql import functions as F

    kept = pairs
    for column, least in (("user_id", settings.min_user_interactions), ("item_id", settings.min_item_interactions)):
        if least > 1:
            frequent = pairs.groupBy(column).count().where(F.col("count") >= least).select(column)
            kept = kept.join(frequent, column, "left_semi")
    return kept


def _count_valid(pairs: DataFrame, name: str) -> int:
    from pyspark.sql import functions as F

    valid = F.col("weight").isNotNull() & (F.col("weight") > 0) & (F.col("weight") < float("inf"))
    counts = pairs.agg(F.count(F.lit(1)).alias("n"), F.count_if(~valid).alias("bad")).first()
    if counts is None or counts["bad"]:
        raise ValueError(f"{name}: an interaction has a weight that isn't a finite number above 0")
    return int(counts["n"])


def _numbered(pairs: DataFrame, column: str) -> DataFrame:
    """id, n (pairs) and a distinct int `index` for every value of `column`, made without gathering ids on one machine.

    Ids are spread over ID_BUCKETS by a hash and numbered inside each bucket by their order; index = number ·
    ID_BUCKETS + bucket. That depends on the ids alone, so a lost partition that Spark computes again gets the same.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    bucket = F.pmod(F.xxhash64("id"), F.lit(ID_BUCKETS))
    number = F.row_number().over(Window.partitionBy("bucket").orderBy("id")) - 1
    counted = pairs.groupBy(F.col(column).alias("id")).agg(F.count(F.lit(1)).cast("int").alias("n"))
    return counted.withColumn("bucket", bucket).select(
        "id", "n", (number * ID_BUCKETS + F.col("bucket")).cast("int").alias("index")
    )


def _weighted(items: DataFrame, power: float) -> DataFrame:
    """item_id, item (the index) and `inverse_propensity`, as the function of that name has it, of numbered items."""
    from pyspark.sql import functions as F

    total = items.agg(F.sum("n").alias("n"), F.sum(F.pow("n", F.lit(1 - power))).alias("scaled")).first()
    scale = total["n"] / total["scaled"] if total else 1.0
    weight = F.lit(scale) * F.pow("n", F.lit(-power))
    return items.select(F.col("id").alias("item_id"), F.col("index").alias("item"), weight.alias("inverse_propensity"))


def _stage_factors(lake: Lake, table: str, key: str, numbered: DataFrame, factors: DataFrame) -> str:
    """Write id, n, factor to a fresh staging folder and return it."""
    staged = lake.stage(table)
    rows = numbered.join(factors.withColumnRenamed("id", "index"), "index").selectExpr("id", "n", "features AS factor")
    rows.write.parquet(lake.url(f"{staged}/key={key}"))
    return staged


def _check_factors(factors: DataFrame, name: str) -> tuple[int, str]:
    """Rows and data version (a hash that ignores row order). Raises ValueError for factors that aren't finite."""
    from pyspark.sql import functions as F

    finite = F.forall("factor", lambda value: ~F.isnan(value) & (F.abs(value) < float("inf")))
    totals = factors.agg(
        F.count(F.lit(1)).alias("rows"),
        F.count_if(~finite).alias("bad"),
        F.bit_xor(F.xxhash64("id", "n", "factor")).alias("digest"),
    ).first()
    if totals is None or totals["bad"]:
        raise ValueError(f"{name}: the fit diverged, there are factors that aren't finite; raise als.regularization")
    return int(totals["rows"]), f"{totals['digest'] & (2**64 - 1):016x}"


# -- reading ----------------------------------------------------------------------------------------------------------


def iter_factors(
    lake: Lake, table: str, key: str, side: Side, ids: Iterable[str] | None = None, batch_rows: int = FACTOR_ROWS
) -> Iterator[Factors]:
    """The rows of `<table>_<side>`, or those of `ids`, in batches of at most `batch_rows`. Raises MissingPartition."""
    yield from _batches(_factor_dataset(lake, table, key, side), _only(ids), batch_rows)


def read_factors(lake: Lake, table: str, key: str, side: Side, ids: Iterable[str] | None = None) -> Factors:
    """All rows of `<table>_<side>`, or those of `ids` that it has, in the order of the table.

    Reads by batches, so memory holds the answer and one batch. Raises MissingPartition.
    """
    dataset = _factor_dataset(lake, table, key, side)
    only = _only(ids)
    rows = dataset.count_rows(filter=only)
    found = Factors(np.empty(rows, object), np.empty(rows, np.int32), np.empty((rows, _rank(dataset)), np.float32))
    at = 0
    for part in _batches(dataset, only, FACTOR_ROWS):
        to = at + len(part.ids)
        found.ids[at:to], found.n[at:to], found.vectors[at:to] = part.ids, part.n, part.vectors
        at = to
    return found


def _factor_dataset(lake: Lake, table: str, key: str, side: Side) -> ds.Dataset:
    dataset = lake.dataset(f"{table}_{side}", [key])
    if dataset is None:
        raise MissingPartition(f"table {table}_{side}, partition {key!r}: made, but without any row")
    return dataset


def _only(ids: Iterable[str] | None) -> ds.Expression | None:
    return None if ids is None else ds.field("id").isin(pa.array(ids, pa.string()))


def _rank(dataset: ds.Dataset) -> int:
    kind = dataset.schema.field("factor").type
    return kind.list_size if pa.types.is_fixed_size_list(kind) else len(dataset.head(1, columns=["factor"])["factor"][0])


def _batches(dataset: ds.Dataset, only: ds.Expression | None, batch_rows: int) -> Iterator[Factors]:
    for batch in dataset.to_batches(
        columns=["id", "n", "factor"], filter=only, batch_size=batch_rows, batch_readahead=2, fragment_readahead=1
    ):
        if batch.num_rows:
            lists: Any = batch["factor"]
            vectors = lists.flatten().to_numpy().reshape(batch.num_rows, -1)
            yield Factors(
                batch["id"].to_numpy(zero_copy_only=False),
                batch["n"].to_numpy().astype(np.int32),
                np.ascontiguousarray(vectors, np.float32),
            )
