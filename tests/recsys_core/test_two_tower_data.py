"""Batches of the two-tower model: what candidates look like at moments other than their own examples, and histories."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from examples import DAY, planted_news, planted_shop, write_examples

from recsys_core.events import DAY_MS
from recsys_core.lake import Lake
from recsys_core.settings import TwoTowerSettings
from recsys_core.two_tower_data import LEAD_MS, Batches, Past, TwoTowerError, learn, write_shards

START = 1_700_000_000_000


def numbers_at(past: Past, place: int, *days: float, unseen: tuple[float, ...] = (0, 0, 0, 0)) -> np.ndarray:
    """Raw numbers of an item at moments in days after START."""
    moments = np.array([START + round(day * DAY_MS) for day in days])
    return past.at(np.full(len(days), place), moments, np.tile(np.float32(unseen), (len(days), 1)))


def test_an_item_ages_and_its_counts_fall_after_its_last_example():
    ts = START + np.array([0, 20]) * DAY_MS
    past = Past.of(np.array([1, 0]), ts, np.float32([[8, 14, 29, 2], [0, 0, 0, 0]]), 3)
    found = numbers_at(past, 1, 0.001, 0.5, 1, 3.5, 7, 20)
    assert found[:, 0].tolist() == [9, 5, 0, 0, 0, 0]
    assert found[:, 1].tolist() == [15, 14, 13, 8, 0, 0]
    assert (found[:, 2] == 30).all()
    assert found[:, 3] == pytest.approx([2.001, 2.5, 3, 5.5, 9, 22], abs=1e-3)


def test_a_moment_has_the_numbers_of_the_latest_example_before_it():
    ts = START + np.array([10, 0, 5]) * DAY_MS
    past = Past.of(np.array([0, 0, 0]), ts, np.float32([[0, 0, 2, 10], [0, 0, 0, 0], [0, 0, 1, 5]]), 1)
    assert numbers_at(past, 0, 0, 0.01, 5, 5.01, 9, 10, 11)[:, 2].tolist() == [0, 1, 1, 2, 2, 2, 2]


def test_items_side_by_side_do_not_see_each_other_and_one_without_examples_keeps_its_numbers():
    past = Past.of(np.array([0, 2]), np.array([START, START + 9 * DAY_MS]), np.float32([[5, 5, 5, 1], [7, 7, 7, 3]]), 3)
    assert numbers_at(past, 0, 0, 9)[:, 2].tolist() == [5, 6]
    assert numbers_at(past, 1, 0, 9, unseen=(1, 2, 3, 4)).tolist() == [[1, 2, 3, 4]] * 2
    assert numbers_at(past, 2, 0, 9).tolist() == [[7, 7, 7, 3]] * 2


def test_items_are_there_from_a_little_before_their_first_example():
    ts = START + np.array([3, 1, 2]) * DAY_MS
    past = Past.of(np.array([0, 2, 2]), ts, np.zeros((3, 4), np.float32), 3)
    moments = np.array([ts[1] - 2 * LEAD_MS, ts[1] - LEAD_MS, ts[0] - LEAD_MS - 1, ts[0], ts[0] + DAY_MS])
    assert [past.order[:n].tolist() for n in past.living(moments)] == [[1], [1, 2], [1, 2], [1, 2, 0], [1, 2, 0]]


@pytest.fixture
def news(tmp_path: Path) -> Callable[..., Batches]:
    lake = Lake(str(tmp_path / "lake"))
    write_examples(lake, *planted_news())

    def batches(**changed: Any) -> Batches:
        settings = TwoTowerSettings(batch_size=16, id_dropout=0, **changed)
        learned = learn(lake, DAY, settings)
        return Batches(learned, write_shards(lake, DAY, learned, settings, tmp_path / "work"), settings)

    return batches


def test_candidates_of_a_batch_were_there_when_its_examples_happened(news):
    batches = news()
    assert (batches.item_rows > 0).all()
    days = np.array([int(name[1 : name.index("-")]) for name in batches.learned.items.ids.to_pylist()])
    for batch in batches.epoch(0):
        used = np.flatnonzero(np.isin(batches.item_rows, batch["item_rows"]))
        places = used[batch["item"]]
        positives, negatives = np.split(days[places], [len(batch["weight"])])
        assert np.ptp(positives) <= 1
        assert set(range(positives.min() + 1)) <= set(negatives)
        assert negatives.max() <= positives.max() + 1


def test_frequencies_of_candidates_are_those_of_their_time(news):
    """News of a day are a twelfth of its examples each, and under a hundredth of all."""
    batches = news(negatives=0, propensity_power=0)
    found = np.concatenate([np.exp(batch["correction_label"]) for batch in batches.epoch(0)])
    assert np.median(found) == pytest.approx(1 / 12, rel=0.25)


@pytest.mark.parametrize("in_batch", [True, False])
def test_scores_are_corrected_by_the_propensities_of_items_as_well(tmp_path, in_batch):
    """Twice the interactions of another item put the score up by power · log 2 in training."""
    lake = Lake(str(tmp_path / "lake"))
    write_examples(lake, *planted_shop(users=40))
    found = {}
    for power in (0.0, 0.5):
        settings = TwoTowerSettings(batch_size=32, id_dropout=0, negatives=64, in_batch=in_batch, propensity_power=power)
        learned = learn(lake, DAY, settings)
        batches = Batches(learned, write_shards(lake, DAY, learned, settings, tmp_path / "work"), settings)
        found[power] = next(iter(batches.epoch(0)))
    assert len(set(learned.counts.tolist())) > 2
    used = np.flatnonzero(np.isin(batches.item_rows, found[0.0]["item_rows"]))
    assert np.array_equal(found[0.0]["item"], found[0.5]["item"])
    places, examples = used[found[0.0]["item"]], len(found[0.0]["weight"])
    added = 0.5 * np.log(np.maximum(learned.counts[places], 1))
    np.testing.assert_allclose(found[0.0]["correction_label"] - found[0.5]["correction_label"], added[:examples], atol=1e-5)
    candidates = added if in_batch else added[examples:]
    np.testing.assert_allclose(found[0.0]["correction"] - found[0.5]["correction"], candidates, atol=1e-5)


def test_actions_on_items_of_the_history_are_learned_from_only_where_that_is_wanted(tmp_path):
    lake = Lake(str(tmp_path / "lake"))
    rows, items = planted_shop(users=40)
    write_examples(lake, rows, items)
    repeats = sum(row["item_id"] in row["history"] for row in rows)
    for settings, left_out in ((TwoTowerSettings(), repeats), (TwoTowerSettings(repeats=True), 0)):
        learned = learn(lake, DAY, settings)
        shards = write_shards(lake, DAY, learned, settings, tmp_path / "work")
        assert (learned.repeats, learned.rows) == (left_out, len(rows) - left_out)
        assert shards.rows + shards.validation_rows == learned.rows
        assert learned.counts.sum() == shards.rows
    assert 0 < repeats < len(rows)


def test_users_who_only_repeat_themselves_are_refused_with_the_way_out(tmp_path):
    lake = Lake(str(tmp_path / "lake"))
    rows, items = planted_shop(users=40)
    write_examples(lake, [row for row in rows if row["item_id"] in row["history"]], items)
    with pytest.raises(TwoTowerError, match=r"of the user's history already; two_tower\.repeats"):
        learn(lake, DAY, TwoTowerSettings())


def test_items_of_a_catalogue_of_millions_do_not_see_each_other_either():
    items = 6_000_000
    places = np.array([5, items - 1])
    ts = np.array([START, START + DAY_MS])
    past = Past.of(places, ts, np.float32([[5, 5, 5, 1], [7, 7, 7, 3]]), items)
    assert [numbers_at(past, place, 0, 1)[:, 2].tolist() for place in places] == [[5, 6], [7, 7]]


def test_the_past_of_very_many_examples_is_that_of_the_first_ones(tmp_path, monkeypatch):
    monkeypatch.setattr("recsys_core.two_tower_data.READ_ROWS", 100)
    monkeypatch.setattr("recsys_core.two_tower_data.MAX_PAST", 250)
    lake = Lake(str(tmp_path / "lake"))
    write_examples(lake, *planted_shop(users=40))
    learned = learn(lake, DAY, TwoTowerSettings(repeats=True, validation_share=0.0))
    assert learned.rows > 400
    assert len(learned.past.ts) == 300


def test_training_leaves_out_a_share_of_histories_and_validation_nothing(tmp_path):
    lake = Lake(str(tmp_path / "lake"))
    write_examples(lake, *planted_shop(users=40))
    settings = TwoTowerSettings(history_dropout=0.5, batch_size=64)
    learned = learn(lake, DAY, settings)
    batches = Batches(learned, write_shards(lake, DAY, learned, settings, tmp_path / "work"), settings)
    whole = replace(batches, settings=settings.model_copy(update={"history_dropout": 0.0}))

    def size(passed: Iterator[dict[str, np.ndarray]]) -> int:
        return sum(len(batch["history"]) for batch in passed)

    assert size(batches.epoch(0)) / size(whole.epoch(0)) == pytest.approx(0.5, abs=0.05)
    assert size(batches.validation()) == size(whole.validation()) > 0
