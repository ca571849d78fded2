import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from recsys_core.popularity import last_hours_popularity, popular_by_category, popular_items, trend_scores, trending_items

HOUR = 3_600_000
NOW = 1_700_000_000_000


def clicks(rows: list[tuple[str, str, int]]) -> ds.Dataset:
    items, types, ts = zip(*rows, strict=True)
    return ds.dataset(pa.table({"item_id": items, "event_type": types, "ts": pa.array(ts, pa.int64())}))


def test_popular_items_sums_weights_and_counts_users_over_all_batches():
    batches = [
        pa.record_batch({"item_id": ["b", "a", "c"], "weight": pa.array([1.0, 2.0, 0.5], pa.float32())}),
        pa.record_batch({"item_id": ["b", "c"], "weight": pa.array([2.0, 0.25], pa.float32())}),
    ]
    result = popular_items(ds.dataset(pa.Table.from_batches(batches)))
    assert result.to_pydict() == {"item_id": ["b", "a", "c"], "score": [3.0, 2.0, 0.75], "users": [2, 1, 2]}


def test_equally_popular_items_are_in_the_order_of_their_ids():
    table = pa.table({"item_id": ["z", "m", "a"], "weight": [1.0, 1.0, 1.0]})
    assert popular_items(ds.dataset(table))["item_id"].to_pylist() == ["a", "m", "z"]


def test_no_interactions_give_an_empty_popularity_table():
    empty = pa.table({"item_id": pa.array([], pa.string()), "weight": pa.array([], pa.float32())})
    result = popular_items(ds.dataset(empty))
    assert result.num_rows == 0
    assert result.column_names == ["item_id", "score", "users"]


def test_each_category_gets_its_own_best_items():
    popular = pa.table({"item_id": ["a", "b", "c", "d", "e"], "score": [5.0, 4.0, 3.0, 3.0, 1.0], "users": [1, 1, 1, 1, 1]})
    catalog = pa.table(
        {"item_id": ["a", "b", "c", "d", "x"], "category": ["red", None, "blue", "blue", "red"], "price": range(5)}
    )
    result = popular_by_category(popular, catalog, top=1)
    assert result.to_pydict() == {"category": ["blue", "red"], "item_id": ["c", "a"], "score": [3.0, 5.0], "users": [1, 1]}
    assert popular_by_category(popular, catalog, top=5)["item_id"].to_pylist() == ["c", "d", "a"]


def test_an_event_counts_half_after_one_half_life_and_nothing_before_it_happened():
    ts = np.array([NOW, NOW - 2 * HOUR, NOW - 4 * HOUR, NOW + 1])
    scores = trend_scores(ts, np.array([1.0, 1.0, 8.0, 1.0]), np.array([0, 0, 1, 2]), NOW, 2.0, 4)
    assert scores.tolist() == [1.5, 2.0, 0.0, 0.0]


def test_trending_items_weighs_by_type_and_age_and_keeps_the_top():
    events = clicks(
        [
            ("old", "click", NOW - HOUR),
            ("old", "click", NOW - HOUR),
            ("old", "click", NOW - HOUR),
            ("new", "purchase", NOW),
            ("future", "purchase", NOW + HOUR),
            ("unweighted", "hover", NOW),
            ("tail", "click", NOW - 10 * HOUR),
        ]
    )
    result = trending_items(events, NOW, {"click": 1.0, "purchase": 8.0}, [1.0, 0.5], top=2)
    scores = [[8.0, 8.0], [1.5, 0.75]]
    assert result.to_pydict() == {"item_id": ["new", "old"], "score": [8.0, 1.5], "events": [1, 3], "scores": scores}


def test_an_item_is_kept_when_it_is_among_the_top_of_any_half_life():
    events = clicks(
        [("now", "click", NOW), *[("often", "click", NOW - 6 * HOUR)] * 20, *[("tail", "click", NOW - 9 * HOUR)] * 4]
    )
    assert trending_items(events, NOW, {"click": 1.0}, [0.25], top=1)["item_id"].to_pylist() == ["now"]
    found = trending_items(events, NOW, {"click": 1.0}, [0.25, 24.0], top=1)
    assert sorted(found["item_id"].to_pylist()) == ["now", "often"]
    later = clicks([("later", "click", NOW + 1)])
    assert trending_items(later, NOW, {"click": 1.0}, [0.25, 24.0], top=1).num_rows == 0


def test_trends_are_the_same_whether_read_from_one_file_or_several(tmp_path):
    rng = np.random.default_rng(5)
    table = pa.table(
        {
            "item_id": [f"i{n}" for n in rng.integers(0, 30, 5000)],
            "event_type": rng.choice(["click", "purchase"], 5000).tolist(),
            "ts": NOW - rng.integers(0, 24 * HOUR, 5000),
        }
    )
    ds.write_dataset(table, tmp_path, format="parquet", max_rows_per_file=700, max_rows_per_group=300)
    weights = {"click": 1.0, "purchase": 8.0}
    whole = trending_items(ds.dataset(table), NOW, weights, [3.0], 100)
    parts = trending_items(ds.dataset(tmp_path), NOW, weights, [3.0], 100)
    assert parts["item_id"] == whole["item_id"]
    assert parts["events"] == whole["events"]
    assert parts["score"].to_numpy() == pytest.approx(whole["score"].to_numpy(), rel=1e-12)
    assert sum(parts["events"].to_pylist()) == 5000


def test_last_hours_popularity_takes_its_start_and_leaves_out_its_end():
    events = clicks([("a", "click", NOW - 1), ("b", "click", NOW), ("b", "view", NOW + 5), ("c", "click", NOW + 10)])
    result = last_hours_popularity(events, NOW, NOW + 10)
    assert result.to_pydict() == {"item_id": ["b"], "score": [2.0], "events": [2]}
