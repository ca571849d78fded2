"""The half-life of interactions and the ridge that a window's own last day asks for."""

import numpy as np
import pyarrow as pa
import pytest
from builders import INTERACTIONS_SCHEMA

from recsys_core import recency
from recsys_core.als import fit_als
from recsys_core.events import DAY_MS, day_key, key_start_ms
from recsys_core.recency import Chosen, choose, fit_window
from recsys_core.settings import AlsSettings

DAY = "2026-03-01"
END = key_start_ms(DAY) + DAY_MS
CANDIDATES = (0.0, 8.0, 1.0)
TOPICS, ITEMS = 8, 12
USERS = 400


def window(lake, news: bool, day_before: bool = True) -> None:
    """Users with five items of their topic a month ago, three three days ago and two on each of the last two days.

    Of news what was taken lately did not exist a month ago. Else items stay, and what was taken three days ago was a whim: of
    any topic.
    """
    random = np.random.default_rng(5)
    rows = []
    for user in range(USERS):
        home = int(random.integers(TOPICS))
        taken: set[str] = set()
        for count, ago in ((5, 30.0), (3, 3.0), (2, 1.5), (2, 0.5)):
            topic = int(random.integers(TOPICS)) if ago == 3.0 and not news else home
            first = ITEMS if news and ago < 30 else 0
            there = [f"t{topic}-{item}" for item in range(first, first + ITEMS)]
            for item in random.choice([item for item in there if item not in taken], count, replace=False).tolist():
                taken.add(item)
                rows.append((f"u{user}", item, int(END - (ago - 0.4 * random.random()) * DAY_MS)))
    for end in (END, END - DAY_MS) if day_before else (END,):
        pairs = [
            {"user_id": user, "item_id": item, "weight": 1.0, "n_events": 1, "first_ts": ts, "last_ts": ts}
            for user, item, ts in rows
            if ts < end
        ]
        lake.write("interactions", day_key(end - DAY_MS), pa.Table.from_pylist(pairs, schema=INTERACTIONS_SCHEMA))


def chosen(lake, engine: str = "numpy", **settings) -> Chosen:
    als = AlsSettings(rank=8, **{"half_lives_days": CANDIDATES, "relative_regularizations": (), **settings})
    return choose(lake, lake.dataset("interactions", [DAY]), END, als, engine)


@pytest.mark.parametrize("engine", ["numpy", "spark"])
@pytest.mark.parametrize("day_before", [True, False])
def test_of_news_a_half_life_of_days_is_taken(lake, day_before, engine):
    window(lake, news=True, day_before=day_before)
    assert chosen(lake, engine).half_life_days > 0
    assert chosen(lake, engine, half_lives_days=(4.0, 0.0)).half_life_days == 4.0, "the first one stays where none is better"


@pytest.mark.parametrize("engine", ["numpy", "spark"])
@pytest.mark.parametrize("day_before", [True, False])
def test_of_what_stays_nothing_fades(lake, day_before, engine):
    window(lake, news=False, day_before=day_before)
    assert chosen(lake, engine).half_life_days == 0.0


def test_the_ridge_is_the_one_that_foretells_best_and_for_numpy_alone(lake):
    window(lake, news=False)
    for ridges in ((1e-4, 0.1), (0.1, 50.0)):
        assert chosen(lake, relative_regularizations=ridges).relative_regularization == 0.1
        assert chosen(lake, "implicit", relative_regularizations=ridges).relative_regularization == 0.0


def test_the_last_two_days_are_foretold_and_count_alike(lake, monkeypatch):
    window(lake, news=False)
    [last, before] = recency._pasts(lake, lake.dataset("interactions", [DAY]), END)
    assert (last.age_ms.min() // DAY_MS, before.age_ms.min() // DAY_MS) == (0, 0)
    assert last.relevant.nnz == before.relevant.nnz == 2 * USERS, "two items of each user and day, none of another day"
    assert (last.weights.nnz, before.weights.nnz) == (10 * USERS, 8 * USERS)
    scores = {8.0: {10: 0.5, 8: 0.1}, 1.0: {10: 0.3, 8: 0.4}, 0.0: {10: 0.1, 8: 0.3}}

    def foretold(past, candidate, *_):
        return np.full(len(past.tested), scores[candidate.half_life_days][past.weights.nnz // USERS])

    monkeypatch.setattr(recency, "_foretold", foretold)
    assert chosen(lake).half_life_days == 1.0


def test_small_fits_have_the_preference_of_the_engine(lake, monkeypatch):
    window(lake, news=False)
    had = set()

    def foretold(past, _, settings, engine):
        had.add((engine, settings.base_preference))
        return np.zeros(len(past.tested))

    monkeypatch.setattr(recency, "_foretold", foretold)
    for engine in ("numpy", "implicit", "spark"):
        chosen(lake, engine, base_preference=0.3)
    assert had == {("numpy", 0.3), ("implicit", 1.0), ("spark", 1.0)}


def test_where_nobody_came_back_or_nothing_was_there_the_first_one_is_taken(lake):
    als = AlsSettings(half_lives_days=(2.0, 0.0), relative_regularizations=(0.5, 1.0))
    assert choose(lake, None, END, als, "numpy") == (2.0, 0.5)
    once = [{"user_id": "u", "item_id": "i", "weight": 1.0, "n_events": 1, "first_ts": END - 1, "last_ts": END - 1}]
    lake.write("interactions", DAY, pa.Table.from_pylist(once, schema=INTERACTIONS_SCHEMA))
    assert choose(lake, lake.dataset("interactions", [DAY]), END, als, "numpy") == (2.0, 0.5)


def test_the_fit_of_a_window_has_what_it_asks_for(lake):
    window(lake, news=True)
    als = AlsSettings(rank=8, half_lives_days=CANDIDATES, relative_regularizations=(50.0, 0.1))
    wanted = choose(lake, lake.dataset("interactions", [DAY]), END, als, "numpy")
    report = fit_window(lake, ("interactions", DAY), END, ("als_factors", DAY), als, None, "numpy")
    assert report.half_life_days == wanted.half_life_days
    assert wanted.relative_regularization == 0.1
    by_hand = fit_als(lake, lake.files("interactions", [DAY]), "others", DAY, als, None, "numpy", *wanted)
    assert report.regularization == by_hand.regularization
    assert (report.users, report.items) == (USERS, 2 * TOPICS * ITEMS)
