import numpy as np
import pytest
import scipy.sparse as sp
from ranx import Qrels, Run
from ranx import evaluate as ranx_evaluate

from recsys_core.metrics import evaluate, per_user, rank_all, top_k
from recsys_core.settings import METRICS


def relevant_items(rows: list[list[int]], items: int) -> sp.csr_matrix:
    indptr = np.cumsum([0, *map(len, rows)])
    indices = np.array([item for row in rows for item in row])
    return sp.csr_matrix((np.ones(len(indices)), indices, indptr), shape=(len(rows), items))


def test_metrics_of_two_users_are_the_ones_worked_out_by_hand():
    recommended = np.array([[3, 0, 1], [2, 4, -1]])
    relevant = relevant_items([[0, 1], [5]], 6)
    result = per_user(recommended, relevant, [1, 3])
    assert result["hit@1"].tolist() == [0, 0]
    assert result["hit@3"].tolist() == [1, 0]
    assert result["recall@3"].tolist() == [1, 0]
    assert result["mrr@3"].tolist() == [0.5, 0]
    assert result["map@3"].tolist() == pytest.approx([(1 / 2 + 2 / 3) / 2, 0])
    assert result["ndcg@3"].tolist() == pytest.approx([(1 / np.log2(3) + 1 / 2) / (1 + 1 / np.log2(3)), 0])


def test_a_perfect_list_scores_one_even_when_there_is_more_to_find_than_places():
    result = per_user(np.array([[0, 1]]), relevant_items([[0, 1, 2, 3]], 4), [2])
    assert result["ndcg@2"] == 1
    assert result["map@2"] == 1
    assert result["recall@2"] == 0.5


def test_coverage_counts_distinct_items_and_novelty_is_the_mean_surprise_in_bits():
    recommended = np.array([[0, 1], [0, -1]])
    result = evaluate(recommended, relevant_items([[0], [1]], 4), [1, 2], np.array([4, 2, 1, 1]), 4)
    assert result["coverage@1"] == 1 / 4
    assert result["coverage@2"] == 2 / 4
    assert result["novelty@1"] == pytest.approx(1)
    assert result["novelty@2"] == pytest.approx((1 + 2 + 1) / 3)
    assert result["hit@2"] == 0.5
    assert {name.partition("@")[0] for name in result} == set(METRICS), "the settings of the gate know them"


def test_an_item_nobody_had_is_as_novel_as_one_with_a_single_observation():
    result = evaluate(np.array([[1]]), relevant_items([[0]], 2), [1], np.array([7, 0]), 2)
    assert result["novelty@1"] == pytest.approx(3)


def test_metrics_agree_with_ranx_also_for_short_lists():
    rng = np.random.default_rng(3)
    users, items, length, ks = 60, 80, 20, (1, 5, 20)
    recommended = np.stack([rng.permutation(items)[:length] for _ in range(users)])
    for row, kept in enumerate(rng.integers(1, length + 1, users)):
        recommended[row, kept:] = -1
    rows = [sorted(rng.choice(items, rng.integers(1, 30), replace=False).tolist()) for _ in range(users)]
    ours = per_user(recommended, relevant_items(rows, items), ks)

    qrels = Qrels({f"u{u}": {f"i{i}": 1 for i in row} for u, row in enumerate(rows)})
    run = Run({f"u{u}": {f"i{i}": float(length - r) for r, i in enumerate(row) if i >= 0} for u, row in enumerate(recommended)})
    names = {"hit": "hit_rate", "recall": "recall", "mrr": "mrr", "ndcg": "ndcg", "map": "map"}
    sizes = np.array([len(row) for row in rows])
    ranx_evaluate(qrels, run, [f"{theirs}@{k}" for theirs in names.values() for k in ks])
    for name, theirs in names.items():
        for k in ks:
            expected = np.array([run.scores[f"{theirs}@{k}"][f"u{u}"] for u in range(users)])
            if name == "map":
                # ranx divides by all relevant items, as TREC does; ours by those that fit into k places.
                expected = expected * sizes / np.minimum(sizes, k)
            np.testing.assert_allclose(ours[f"{name}@{k}"], expected, rtol=0, atol=1e-9, err_msg=f"{name}@{k}")


@pytest.mark.parametrize(
    ("recommended", "rows", "ks", "message"),
    [
        ([[0, 0]], [[1]], [2], "twice"),
        ([[0, 1]], [[]], [2], "no relevant item"),
        ([[0, 1]], [[1]], [3], "1..2"),
        ([[0, 9]], [[1]], [2], "indices below 4"),
        ([[0, 1], [1, 2]], [[1]], [2], "1 users"),
    ],
)
def test_lists_that_cannot_be_scored_are_refused(recommended, rows, ks, message):
    with pytest.raises(ValueError, match=message):
        per_user(np.array(recommended), relevant_items(rows, 4), ks)


def test_equal_scores_are_ranked_by_lower_index():
    scores = np.array([[1, 2, 2, 2, 0], [5, 5, 5, 5, 5]], np.float32)
    assert top_k(scores, 2).tolist() == [[1, 2], [0, 1]]
    assert top_k(scores, 4).tolist() == [[1, 2, 3, 0], [0, 1, 2, 3]]


def test_top_k_is_a_full_stable_sort_cut_off():
    scores = np.random.default_rng(0).integers(0, 12, (40, 90)).astype(np.float32)
    assert np.array_equal(top_k(scores, 17), np.argsort(-scores, axis=1, kind="stable")[:, :17])


def test_masked_items_are_left_out_and_short_rows_are_padded():
    scores = np.array([[1, 2, 3], [3, 2, 1]], np.float32)
    before = scores.copy()
    mask = relevant_items([[2], [0, 1]], 3)
    assert top_k(scores, 2, mask).tolist() == [[1, 0], [2, -1]]
    assert top_k(scores, 5).tolist() == [[2, 1, 0, -1, -1], [0, 1, 2, -1, -1]]
    assert np.array_equal(scores, before)


def test_scores_with_nan_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        top_k(np.array([[1, np.nan]], np.float32), 1)


def test_ranking_in_batches_equals_ranking_at_once_and_never_returns_seen_items():
    rng = np.random.default_rng(1)
    users, items = rng.normal(size=(23, 4)).astype(np.float32), rng.normal(size=(50, 4)).astype(np.float32)
    seen = sp.random(23, 50, density=0.3, format="csr", rng=rng)
    ids = rank_all(users, items, seen, 10, batch=4)
    assert np.array_equal(ids, top_k(users @ items.T, 10, seen))
    assert not any(set(ids[u]) & set(seen[[u]].indices) for u in range(23))
