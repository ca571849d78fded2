"""Batches of the two-tower model: what candidates look like at moments other than their own examples, and histories."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from examples import DAY, planted_shop, write_examples

from recsys_core.events import DAY_MS
from recsys_core.lake import Lake
from recsys_core.settings import TwoTowerSettings
from recsys_core.two_tower_data import Batches, Past, learn, write_shards

START = 1_700_000_000_000
UNTIL = START + 20 * DAY_MS
DRAWS = 4_000


def draw(past: Past, place: int, unseen: tuple[float, ...] = (0, 0, 0, 0)) -> np.ndarray:
    places = np.full(DRAWS, place)
    return past.at_random(places, np.tile(np.float32(unseen), (DRAWS, 1)), np.random.default_rng(3))


def test_an_item_ages_and_its_counts_fall_after_its_last_example():
    past = Past.of(np.array([1]), np.array([START]), np.float32([[9, 19, 29, 2]]), 3, UNTIL)
    found = draw(past, 1)
    before = (found == np.float32([9, 19, 29, 2])).all(axis=1)
    assert before.mean() == pytest.approx(1 / 2, abs=0.03)
    day, week, window, age = found[~before].T
    since = age - 2
    assert since.min() >= 0
    assert since.max() <= 20
    assert since.mean() == pytest.approx(10, abs=0.5)
    assert np.abs(day - 9 * np.maximum(0, 1 - since) - (since < 1)).max() < 1
    assert np.abs(week - 19 * np.maximum(0, 1 - since / 7) - (since < 7)).max() < 1
    assert (day - 9 * np.maximum(0, 1 - since) - (since < 1)).mean() == pytest.approx(0, abs=0.05)
    assert (window == 30).all()


def test_a_moment_has_the_numbers_of_the_latest_example_before_it():
    ts = START + np.array([10, 0, 5]) * DAY_MS
    past = Past.of(np.array([0, 0, 0]), ts, np.float32([[0, 0, 2, 10], [0, 0, 0, 0], [0, 0, 1, 5]]), 1, UNTIL)
    found = draw(past, 0)
    _, _, window, age = found.T
    assert np.mean(window == 0) == pytest.approx(1 / 4, abs=0.03)
    for count, first, last in ((1, 0, 5), (2, 5, 10), (3, 10, 20)):
        assert first <= age[window == count].min() < age[window == count].max() <= last + 1e-3
        assert np.mean(window == count) == pytest.approx(3 / 4 * (last - first) / 20, abs=0.03)


def test_items_side_by_side_do_not_see_each_other_and_one_without_a_past_keeps_its_numbers():
    past = Past.of(np.array([0, 2]), np.array([START, UNTIL]), np.float32([[5, 5, 5, 1], [7, 7, 7, 3]]), 3, UNTIL)
    assert set(draw(past, 0)[:, 2].tolist()) == {5, 6}
    assert (draw(past, 1, unseen=(1, 2, 3, 4)) == np.float32([1, 2, 3, 4])).all()
    assert set(map(tuple, draw(past, 2).tolist())) == {(7, 7, 7, 3), (8, 8, 8, 3)}


def test_items_of_a_catalogue_of_millions_do_not_see_each_other_either():
    items = 6_000_000
    places = np.array([5, items - 1])
    past = Past.of(places, np.array([START, START]), np.float32([[5, 5, 5, 1], [7, 7, 7, 3]]), items, UNTIL)
    assert [set(draw(past, place)[:, 2].tolist()) for place in places] == [{5, 6}, {7, 8}]


def test_the_past_of_very_many_examples_is_that_of_the_first_ones(tmp_path, monkeypatch):
    monkeypatch.setattr("recsys_core.two_tower_data.READ_ROWS", 100)
    monkeypatch.setattr("recsys_core.two_tower_data.MAX_PAST", 250)
    lake = Lake(str(tmp_path / "lake"))
    write_examples(lake, *planted_shop(users=40))
    learned = learn(lake, DAY, TwoTowerSettings(validation_share=0.0))
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
