from typing import get_args

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp

from recsys_core import progress
from recsys_core.als import (
    AlsReport,
    Ridge,
    Side,
    choose_engine,
    common_scale,
    factorize_exactly,
    fit_als,
    inverse_propensity,
    iter_factors,
    not_faded,
    read_factors,
    ridges_of,
)
from recsys_core.events import DAY_MS
from recsys_core.fold_in import fold_in, gram
from recsys_core.lake import Lake, MissingPartition
from recsys_core.least_squares import Entries
from recsys_core.metrics import evaluate, rank_all
from recsys_core.settings import AlsSettings

KEY = "2026-01-31"
ENGINES = ["numpy", "implicit", "spark"]
ONE_MACHINE = ["numpy", "implicit"]


def write_interactions(lake: Lake, rows: list[tuple[str, str, float]], pieces: int = 1) -> list[str]:
    """Paths of interactions spread over some partitions of the lake."""
    paths = []
    for piece in range(pieces):
        users, items, weights = zip(*rows[piece::pieces], strict=True)
        table = pa.table({"user_id": users, "item_id": items, "weight": pa.array(weights, pa.float32())})
        lake.write("interactions", f"piece-{piece}", table)
        paths += lake.files("interactions", [f"piece-{piece}"])
    return paths


def fit(lake: Lake, files: list[str], engine: str, spark, **settings) -> AlsReport:
    return fit_als(lake, files, "als_factors", KEY, AlsSettings(**settings), lambda: spark, engine)


def taste(users: int, items: int, rank: int, per_user: int, seed: int) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Train and test interactions of users who pick items by a low-rank taste and some popularity."""
    rng = np.random.default_rng(seed)
    affinity = 1.6 * rng.normal(size=(users, rank)) @ rng.normal(size=(rank, items)) / np.sqrt(rank)
    affinity += 0.7 * rng.normal(size=items)
    drawn = np.argsort(-(affinity + rng.gumbel(size=affinity.shape)), axis=1)[:, : per_user + 5]
    drawn = rng.permuted(drawn, axis=1)
    shape = (users, items)

    def matrix(chosen: np.ndarray) -> sp.csr_matrix:
        rows = np.repeat(np.arange(users), chosen.shape[1])
        return sp.csr_matrix((np.ones(chosen.size, np.float32), (rows, chosen.ravel())), shape=shape)

    return matrix(drawn[:, 5:]), matrix(drawn[:, :5])


def pairs_of(matrix: sp.csr_matrix) -> list[tuple[str, str, float]]:
    coo = matrix.tocoo()
    return [(f"u{u}", f"i{i}", float(w)) for u, i, w in zip(coo.row, coo.col, coo.data, strict=True)]


def matrix_order(lake: Lake, side: Side, size: int) -> np.ndarray:
    """Vectors at the row that the number in their id names."""
    factors = read_factors(lake, "als_factors", KEY, side)
    vectors = np.zeros((size, factors.vectors.shape[1]), np.float32)
    vectors[[int(name[1:]) for name in factors.ids]] = factors.vectors
    return vectors


def test_all_engines_rank_far_better_than_popularity_and_like_each_other(lake, spark):
    train, test = taste(users=1500, items=600, rank=8, per_user=25, seed=1)
    files = write_interactions(lake, pairs_of(train))
    popularity = train.getnnz(axis=0)
    popular = rank_all(np.ones((1500, 1), np.float32), popularity[:, None].astype(np.float32), train, 10)
    ndcg = {"popularity": evaluate(popular, test, [10], popularity, 600)["ndcg@10"]}
    for engine in ENGINES:
        fit(lake, files, engine, spark, rank=8, iterations=10, alpha=5.0, regularization=0.1, base_preference=1.0)
        users, items = matrix_order(lake, "users", 1500), matrix_order(lake, "items", 600)
        ndcg[engine] = evaluate(rank_all(users, items, train, 10), test, [10], popularity, 600)["ndcg@10"]
    for engine in ENGINES:
        assert ndcg[engine] > 2 * ndcg["popularity"]
        assert ndcg[engine] == pytest.approx(ndcg["spark"], rel=0.05)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_writes_the_same_rows(lake, spark, engine):
    rows = [("ann", "x", 1.0), ("ann", "y", 0.5), ("bob", "x", 2.0), ("eve", "ü/ж", 1.0), ("eve", "x", 0.1)]
    files = write_interactions(lake, rows, pieces=2)
    report = fit(lake, files, engine, spark, rank=3, iterations=3)
    assert (report.engine, report.users, report.items, report.observations) == (engine, 3, 3, 5)
    assert report.seconds > 0
    expected = {"users": {"ann": 2, "bob": 1, "eve": 2}, "items": {"x": 3, "y": 1, "ü/ж": 1}}
    for side in get_args(Side):
        factors = read_factors(lake, "als_factors", KEY, side)
        assert dict(zip(factors.ids, factors.n.tolist(), strict=True)) == expected[side]
        assert factors.ids.dtype == object
        assert factors.n.dtype == np.int32
        assert factors.vectors.dtype == np.float32
        assert factors.vectors.shape == (3, 3)
        assert factors.vectors.flags.c_contiguous
        assert np.isfinite(factors.vectors).all()
        assert lake.get(f"als_factors_{side}", KEY).rows == 3


@pytest.mark.parametrize("engine", ENGINES)
def test_user_vectors_solve_their_own_normal_equations(lake, spark, engine):
    """Confidence, preference and the documented ridge: folding a fitted user in again gives the fitted vector back."""
    train, _ = taste(users=80, items=40, rank=3, per_user=8, seed=4)
    train.data = np.random.default_rng(0).uniform(0.2, 3, train.nnz).astype(np.float32)
    files = write_interactions(lake, pairs_of(train))
    report = fit(lake, files, engine, spark, rank=4, iterations=60, alpha=2.0, regularization=0.1, propensity_power=0.0)
    users, items = matrix_order(lake, "users", 80), matrix_order(lake, "items", 40)
    weights = train.toarray()
    ridge = report.ridge + report.ridge_per_observation * train.getnnz(axis=1)

    def off(weights: np.ndarray, preference: float) -> float:
        folded = fold_in(gram(items), np.broadcast_to(items, (80, 40, 4)), weights, 2.0, preference, ridge)
        return float(np.median(np.linalg.norm(folded - users, axis=1) / np.linalg.norm(users, axis=1)))

    assert report.base_preference == (0.0 if engine == "numpy" else 1.0), "the libraries have 1, whatever the settings say"
    assert off(weights, report.base_preference) < 0.01
    assert off(weights > 0, report.base_preference) > 0.05
    assert off(weights, 1 - report.base_preference) > 0.05


@pytest.mark.parametrize("engine", ENGINES)
def test_with_a_propensity_users_are_folded_in_with_the_item_weights_of_their_fit(lake, spark, engine):
    train, _ = taste(users=80, items=40, rank=3, per_user=8, seed=4)
    files = write_interactions(lake, pairs_of(train))
    report = fit(lake, files, engine, spark, rank=4, iterations=60, alpha=2.0, regularization=0.1, propensity_power=1.0)
    users, items = matrix_order(lake, "users", 80), matrix_order(lake, "items", 40)
    weights = train.toarray() * inverse_propensity(train.getnnz(axis=0), report.propensity_power)
    ridge = report.ridge + report.ridge_per_observation * train.getnnz(axis=1)
    preference = report.base_preference
    folded = fold_in(gram(items), np.broadcast_to(items, (80, 40, 4)), weights, 2.0, preference, ridge)
    assert np.median(np.linalg.norm(folded - users, axis=1) / np.linalg.norm(users, axis=1)) < 0.01
    alike = fold_in(gram(items), np.broadcast_to(items, (80, 40, 4)), train.toarray(), 2.0, preference, ridge)
    assert np.median(np.linalg.norm(alike - users, axis=1) / np.linalg.norm(users, axis=1)) > 0.05


def test_half_of_a_pair_is_left_after_the_half_life_and_a_power_of_time_later():
    age = (np.array([0.0, 3.0, 3e4, 3e5]) * DAY_MS).astype(np.int64)
    left = not_faded(age, 3.0)
    assert left.dtype == np.float32
    assert left[:2].tolist() == [1.0, 0.5]
    assert left[2] / left[3] == pytest.approx(10**1.5, rel=1e-3)
    assert not_faded(age, 0.0).tolist() == [1.0] * 4


def aged_pairs(lake) -> tuple[list[str], sp.csr_matrix, sp.csr_matrix]:
    """Files of pairs of all ages between 40 users and 20 items, the weights, and what is left after a half-life of 3 days."""
    train, _ = taste(users=40, items=20, rank=2, per_user=6, seed=4)
    pairs = pairs_of(train)
    ages = np.random.default_rng(2).integers(0, 9, len(pairs)).astype(float)
    ages[0], ages[1] = 0.0, 1000.0
    users, items, weights = zip(*pairs, strict=True)
    last = pa.array((1e12 - ages * DAY_MS).astype(np.int64))
    table = pa.table({"user_id": users, "item_id": items, "weight": pa.array(weights, pa.float32()), "last_ts": last})
    lake.write("interactions", "aged", table)
    left = train.copy()
    left.data = not_faded((ages * DAY_MS).astype(np.int64), 3.0)
    return lake.files("interactions", ["aged"]), train, left


@pytest.mark.parametrize("engine", ["implicit", "spark"])
def test_with_a_half_life_libraries_fit_faded_weights(lake, spark, engine):
    files, train, left = aged_pairs(lake)
    settings = AlsSettings(rank=4, iterations=10)
    report = fit_als(lake, files, "als_factors", KEY, settings, lambda: spark, engine, half_life_days=3.0)
    assert report.half_life_days == 3.0
    with_half_life = matrix_order(lake, "items", 20)
    fit(lake, write_interactions(lake, pairs_of(train.multiply(left).tocsr())), engine, spark, rank=4, iterations=10)
    np.testing.assert_allclose(
        with_half_life @ with_half_life.T, (found := matrix_order(lake, "items", 20)) @ found.T, atol=1e-3
    )
    fit(lake, files, engine, spark, rank=4, iterations=10)
    alike = matrix_order(lake, "items", 20)
    assert np.abs(alike @ alike.T - found @ found.T).max() > 0.02


@pytest.mark.parametrize("preference", [0.0, 0.4, 1.0])
def test_with_a_half_life_numpy_takes_what_has_faded_of_a_pair_as_not_observed(lake, preference):
    files, train, left = aged_pairs(lake)
    weighed = {"propensity_power": 0.0, "base_preference": preference}
    settings = AlsSettings(rank=4, iterations=60, alpha=2.0, regularization=0.2, **weighed)
    report = fit_als(lake, files, "als_factors", KEY, settings, None, "numpy", half_life_days=3.0)
    users, items = matrix_order(lake, "users", 40), matrix_order(lake, "items", 20).astype(np.float64)
    f, w = left.toarray(), train.toarray()
    ridge = Ridge(report.ridge, report.ridge_per_observation).of(f.sum(axis=1))
    assert ridge.sum() == pytest.approx(ridges_of(f.sum(), (40, 20), settings, 1.0)[0].of(f.sum(axis=1)).sum())
    for user in range(40):
        left_side = (items * (1 + f[user] * 2 * w[user])[:, None]).T @ items + ridge[user] * np.eye(4)
        expected = np.linalg.solve(left_side, items.T @ (f[user] * (preference + 2 * w[user]) * (w[user] > 0)))
        np.testing.assert_allclose(users[user], expected, atol=0.01 * np.abs(users).max())


def common_scale_of(weights: sp.csr_matrix, fresh: sp.csr_matrix, settings: AlsSettings) -> float:
    excess = weights.copy()
    excess.data = np.float32(settings.alpha) * weights.data * fresh.data
    n = [np.asarray(fresh.sum(axis=axis)).ravel() for axis in (1, 0)]
    unit = settings.model_copy(update={"regularization": 1.0})
    ridges = ridges_of(float(n[0].sum()), weights.shape, unit, settings.frequency_scaling)
    return common_scale(Entries(excess, settings.base_preference * fresh.data), ridges[0].of(n[0]), ridges[1].of(n[1]))


@pytest.mark.parametrize("preference", [0.0, 1.0])
def test_where_users_are_alike_and_took_the_same_factors_grow_below_that_regularization_and_vanish_above_it(preference):
    weights = sp.csr_matrix(np.ones((40, 5), np.float32))
    fresh = weights.copy()
    fresh.data[:] = 0.3
    settings = AlsSettings(rank=4, iterations=60, alpha=2.0, propensity_power=0.0, base_preference=preference)
    least = common_scale_of(weights, fresh, settings)
    lengths = {
        share: np.abs(
            factorize_exactly(weights, fresh, settings.model_copy(update={"regularization": share * least})).items
        ).max()
        for share in (0.9, 1.1)
    }
    assert lengths[0.9] > 0.01
    assert lengths[1.1] < 1e-5


def test_the_relative_regularization_is_so_many_times_that_of_users_who_are_alike():
    weights, _ = taste(users=60, items=30, rank=2, per_user=6, seed=4)
    fresh = weights.copy()
    settings = AlsSettings(rank=4, iterations=2, regularization=0.01, propensity_power=0.0)
    least = common_scale_of(weights, fresh, settings)
    half = factorize_exactly(weights, fresh, settings, 0.5)
    assert half.regularization == pytest.approx(0.5 * least)
    by_hand = factorize_exactly(weights, fresh, settings.model_copy(update={"regularization": half.regularization}))
    np.testing.assert_array_equal(half.items, by_hand.items)
    assert half.ridge == by_hand.ridge
    assert factorize_exactly(weights, fresh, settings).regularization == 0.01


def test_the_inverse_propensity_halves_for_four_times_the_interactions_and_keeps_the_mean_weight():
    n = np.array([1, 4, 16, 0, 100])
    weights = inverse_propensity(n, 0.5)
    assert weights.dtype == np.float32
    assert weights[1] == pytest.approx(weights[0] / 2)
    assert weights[4] == pytest.approx(weights[0] / 10)
    assert weights[3] == weights[0]
    assert (weights * n).sum() / n.sum() == pytest.approx(1)
    assert inverse_propensity(n, 0.0).tolist() == [1.0] * 5
    assert inverse_propensity(np.zeros(2, int), 0.5).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("engine", ONE_MACHINE)
def test_the_engines_of_one_machine_repeat_to_the_bit_whatever_the_order_of_rows(lake, spark, engine):
    train, _ = taste(users=60, items=30, rank=3, per_user=6, seed=2)
    rows = pairs_of(train)
    found = []
    for order in (rows, rows[::-1]):
        fit(lake, write_interactions(lake, order, pieces=3), engine, spark, rank=5, iterations=4, seed=11)
        found.append([read_factors(lake, "als_factors", KEY, side) for side in get_args(Side)])
    for first, second in zip(*found, strict=True):
        assert first.ids.tolist() == second.ids.tolist()
        assert np.array_equal(first.vectors, second.vectors)


def test_another_seed_gives_other_factors(lake, spark):
    files = write_interactions(lake, pairs_of(taste(60, 30, 3, 6, seed=2)[0]))
    found = []
    for seed in (1, 2):
        fit(lake, files, "implicit", spark, rank=5, iterations=2, seed=seed)
        found.append(read_factors(lake, "als_factors", KEY, "items").vectors)
    assert not np.array_equal(*found)


@pytest.mark.parametrize("engine", ENGINES)
def test_rare_users_and_items_get_no_factors(lake, spark, engine):
    rows = [
        ("ann", "x", 1),
        ("ann", "y", 1),
        ("bob", "x", 1),
        ("bob", "y", 1),
        ("cat", "x", 1),
        ("dan", "z", 1),
        ("dan", "w", 1),
    ]
    files = write_interactions(lake, rows)
    report = fit(lake, files, engine, spark, rank=2, iterations=2, min_user_interactions=2, min_item_interactions=2)
    assert (report.users, report.items, report.observations) == (2, 2, 4)
    assert sorted(read_factors(lake, "als_factors", KEY, "users").ids) == ["ann", "bob"]
    assert sorted(read_factors(lake, "als_factors", KEY, "items").ids) == ["x", "y"]


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_to_fit_names_the_table_and_the_partition(lake, spark, engine):
    files = write_interactions(lake, [("ann", "x", 1.0)])
    with pytest.raises(ValueError, match=r"als_factors, partition '2026-01-31': no interactions to fit"):
        fit(lake, files, engine, spark, rank=2, min_user_interactions=2)
    with pytest.raises(ValueError, match=r"als_factors, partition '2026-01-31': no interactions to fit"):
        fit(lake, [], engine, spark, rank=2)


def test_a_file_without_rows_is_nothing_to_fit(lake, spark):
    columns = {"user_id": pa.array([], pa.string()), "item_id": pa.array([], pa.string()), "weight": pa.array([], pa.float32())}
    lake.write("interactions", KEY, pa.table(columns))
    with pytest.raises(ValueError, match="no interactions to fit"):
        fit(lake, lake.files("interactions", [KEY]), "implicit", spark, rank=2)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_positive_number_is_refused_and_nothing_is_published(lake, spark, engine, weight):
    files = write_interactions(lake, [("ann", "x", 1.0), ("bob", "y", weight)])
    with pytest.raises(ValueError, match="weight"):
        fit(lake, files, engine, spark, rank=2)
    assert lake.find("als_factors_users", KEY) is None


def test_factors_of_chosen_ids_are_read_without_the_others(lake, spark):
    files = write_interactions(lake, pairs_of(taste(60, 30, 3, 6, seed=2)[0]))
    fit(lake, files, "implicit", spark, rank=5, iterations=2)
    every = read_factors(lake, "als_factors", KEY, "users")
    some = read_factors(lake, "als_factors", KEY, "users", ids=["u7", "nobody", "u51"])
    assert some.ids.tolist() == ["u51", "u7"]
    for name, vector in zip(some.ids, some.vectors, strict=True):
        assert np.array_equal(vector, every.vectors[every.ids.tolist().index(name)])
    none = read_factors(lake, "als_factors", KEY, "users", ids=["nobody"])
    assert none.vectors.shape == (0, 5)


def test_batches_of_factors_add_up_to_the_table(lake, spark):
    files = write_interactions(lake, pairs_of(taste(60, 30, 3, 6, seed=2)[0]))
    fit(lake, files, "implicit", spark, rank=5, iterations=2)
    batches = list(iter_factors(lake, "als_factors", KEY, "users", batch_rows=7))
    assert max(len(batch.ids) for batch in batches) == 7
    whole = read_factors(lake, "als_factors", KEY, "users")
    assert np.array_equal(np.concatenate([batch.vectors for batch in batches]), whole.vectors)


def test_reading_factors_that_were_never_made_says_so(lake):
    with pytest.raises(MissingPartition, match="als_factors_users"):
        read_factors(lake, "als_factors", KEY, "users")


@pytest.mark.parametrize("base", [0.0, 1.0])
def test_fold_in_is_the_closed_form_for_one_user_and_for_many(base):
    rng = np.random.default_rng(8)
    items = rng.normal(size=(20, 3))
    weights = np.array([1.0, 0.5])
    confidence, wanted = np.ones(20), np.zeros(20)
    confidence[[4, 9]] += 3.0 * weights
    wanted[[4, 9]] = base + 3.0 * weights
    left = items.T @ np.diag(confidence) @ items + 0.7 * np.eye(3)
    expected = np.linalg.solve(left, items.T @ wanted)
    one = fold_in(gram(items), items[[4, 9]], weights, alpha=3.0, base_preference=base, regularization=0.7)
    assert one == pytest.approx(expected, rel=1e-5)

    padded = np.stack([items[[4, 9, 0]], items[[1, 2, 3]]])
    many = fold_in(gram(items), padded, np.array([[1.0, 0.5, 0.0], [1.0, 1.0, 1.0]]), 3.0, base, np.array([0.7, 0.2]))
    assert many[0] == pytest.approx(expected, rel=1e-5)
    assert many[1] == pytest.approx(fold_in(gram(items), items[[1, 2, 3]], np.ones(3), 3.0, base, 0.2), rel=1e-5)


@pytest.mark.parametrize(
    ("engine", "master", "chosen"),
    [
        ("auto", "local[*]", "numpy"),
        ("auto", "spark://host:7077", "spark"),
        ("auto", "k8s://https://host", "spark"),
        ("spark", "local[2]", "spark"),
        ("implicit", "yarn", "implicit"),
    ],
)
def test_auto_takes_numpy_only_where_spark_would_be_local(engine, master, chosen):
    assert choose_engine(AlsSettings(engine=engine), master) == chosen


@pytest.mark.parametrize("scaling", [0.3, 1.0])
def test_with_frequency_scaling_users_are_folded_in_with_the_ridge_of_their_fit(lake, spark, scaling):
    train, _ = taste(users=80, items=40, rank=3, per_user=8, seed=4)
    train.data[np.random.default_rng(1).random(train.nnz) < 0.4] = 0
    train.eliminate_zeros()
    files = write_interactions(lake, pairs_of(train))
    weighed = {"frequency_scaling": scaling, "propensity_power": 0.0}
    report = fit(lake, files, "numpy", spark, rank=4, iterations=60, alpha=2.0, regularization=0.3, **weighed)
    users, items = matrix_order(lake, "users", 80), matrix_order(lake, "items", 40)
    n = train.getnnz(axis=1)
    some = n > 0
    assert report.ridge_per_observation > 0
    ridge = report.ridge + report.ridge_per_observation * n
    folded = fold_in(gram(items), np.broadcast_to(items, (80, 40, 4)), train.toarray(), 2.0, report.base_preference, ridge)
    relative = np.linalg.norm(folded - users, axis=1)[some] / np.linalg.norm(users, axis=1)[some]
    assert np.median(relative) < 0.01


@pytest.mark.parametrize("scaling", [0.0, 0.5, 1.0])
def test_the_mean_ridge_is_lambda_times_the_mean_number_of_observations_whatever_the_scaling(scaling):
    n = np.random.default_rng(0).integers(1, 50, 300)
    m = np.random.default_rng(1).multinomial(n.sum() - 20, np.ones(20) / 20) + 1
    users, items = ridges_of(int(n.sum()), (300, 20), AlsSettings(regularization=0.7, alpha=3.0), scaling)
    mean = np.concatenate([users.of(n), items.of(m)]).mean()
    assert mean == pytest.approx(0.7 * 2 * n.sum() / 320)


def test_frequency_scaling_at_one_is_that_of_the_paper():
    """Rendle et al. 2022: λ·(n_u + α0·|I|) for users and λ·(n_i + α0·|U|) for items, α0 = 1/alpha."""
    users, items = ridges_of(900, (60, 30), AlsSettings(regularization=0.5, alpha=4.0), 1.0)
    assert users.constant / users.per_observation == pytest.approx(30 / 4)
    assert items.constant / items.per_observation == pytest.approx(60 / 4)
    assert users.per_observation == items.per_observation


def test_implicit_has_one_ridge_for_all_rows_whatever_the_scaling(lake, spark):
    files = write_interactions(lake, pairs_of(taste(60, 30, 3, 6, seed=2)[0]))
    report = fit(lake, files, "implicit", spark, rank=2, iterations=1, regularization=0.5, frequency_scaling=1.0)
    assert (report.ridge, report.ridge_per_observation) == (0.5 * 2 * report.observations / (report.users + report.items), 0.0)


def test_an_unknown_engine_is_refused(lake, spark):
    with pytest.raises(ValueError, match="unknown ALS engine 'magic'"):
        fit(lake, write_interactions(lake, [("ann", "x", 1.0)]), "magic", spark)


@pytest.mark.parametrize("engine", ONE_MACHINE)
def test_a_fit_reports_each_iteration(lake, spark, engine):
    seen = []

    class Bar:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def update(self, completed, total=None):  # noqa: ARG002
            seen.append(completed)

    with progress.reporting_to(lambda _description, _total: Bar()):
        fit(lake, write_interactions(lake, pairs_of(taste(20, 10, 2, 4, seed=2)[0])), engine, spark, rank=2, iterations=3)
    assert seen == [1, 2, 3]
