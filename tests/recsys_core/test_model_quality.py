"""Planted faults in vectors, indexes, releases and caches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import redis as redis_py
from builders import write_interactions
from snapshots import make_snapshot
from towers import make_tower

from recsys_cli.stack import redis_server
from recsys_core.bundle import ITEM_INDEX, build_item_index, fit_als_factors
from recsys_core.item_ids import ItemIds
from recsys_core.lake import Lake
from recsys_core.model_quality import (
    cache_measures,
    factor_measures,
    index_measures,
    release_measures,
    report_of,
    tower_measures,
    vector_measures,
    weight_measures,
)
from recsys_core.online import AnswerEncoder, UserRecord, recs_key, write_answers
from recsys_core.profiles import Measure
from recsys_core.release import npy_bytes
from recsys_core.settings import Settings

DAY, OTHER_DAY = "2026-03-02", "2026-03-03"
SNAPSHOT = make_snapshot(items=80, rank=4)


def failed(measures: dict[str, list[Measure]]) -> set[str]:
    return {claim for claim, of_claim in measures.items() if not report_of(claim, of_claim).passed}


@pytest.fixture
def small(settings: Settings) -> Settings:
    return settings.model_copy(update={"als": settings.als.model_copy(update={"rank": 4, "iterations": 2})})


@pytest.fixture
def fitted(lake: Lake, small: Settings) -> Lake:
    for day, step in ((DAY, 1), (OTHER_DAY, 3)):
        write_interactions(lake, day, [(f"u{u}", f"i{(u * step + n) % 60}", 1.0 + n) for u in range(90) for n in range(5)])
        fit_als_factors(lake, day, small, None, "implicit")
        build_item_index(lake, day, small)
    return lake


def test_what_was_fitted_is_in_order(fitted: Lake) -> None:
    assert failed(factor_measures(fitted, DAY)) == set()
    assert failed(index_measures(fitted, DAY, 0.9)) == set()
    assert report_of("weights", weight_measures(fitted, DAY)).passed
    assert failed(tower_measures(fitted, DAY)) == set()


def test_vectors_with_nan_are_found() -> None:
    vectors = np.ones((10, 4), np.float32)
    vectors[3, 1] = np.nan
    finite, _ = vector_measures("items", [vectors])
    report = report_of("vectors_are_finite", finite)
    assert not report.passed
    assert report.sample[0]["what"] == "vectors with values that are not finite"
    assert report.sample[0]["value"] == 1


def test_vectors_of_zeros_alone_and_one_out_of_proportion_are_found() -> None:
    finite, _ = vector_measures("items", [np.zeros((4, 2), np.float32)])
    assert not report_of("vectors_are_finite", finite).passed
    _, lengths = vector_measures("items", [np.array([[1, 0]] * 9 + [[1e6, 0]], np.float32)])
    assert not report_of("lengths_are_in_range", lengths).passed


def test_tower_vectors_with_nan_or_another_length_are_found(lake: Lake) -> None:
    unit = np.eye(4, dtype=np.float32)

    def write(vectors: np.ndarray, item_bias: bool = False) -> None:
        tower = make_tower([], [], dimension=vectors.shape[1], item_bias=item_bias)
        lake.write_blobs("two_tower", DAY, {"items.npy": npy_bytes(vectors), **tower.to_files()}, 4)

    write(unit)
    assert failed(tower_measures(lake, DAY)) == set()
    write(np.hstack([unit, np.full((4, 1), 0.3, np.float32)]), item_bias=True)
    assert failed(tower_measures(lake, DAY)) == set()
    write(np.hstack([unit, np.full((4, 1), 0.3, np.float32)]))
    assert failed(tower_measures(lake, DAY)) == {"tower_directions_have_length_one"}
    write(unit * 2)
    assert failed(tower_measures(lake, DAY)) == {"tower_directions_have_length_one"}
    unit[0, 0] = np.nan
    write(unit)
    assert "tower_vectors_are_finite" in failed(tower_measures(lake, DAY))


def test_an_index_of_another_fit_is_found(fitted: Lake) -> None:
    other = fitted.get(ITEM_INDEX, OTHER_DAY)
    blobs = {name: fitted.read_blob(ITEM_INDEX, OTHER_DAY, name) for name in other.files}
    fitted.write_blobs(ITEM_INDEX, DAY, blobs, other.rows, {**fitted.get(ITEM_INDEX, DAY).extra})
    assert failed(index_measures(fitted, DAY, 0.9)) == {"index_is_of_the_same_factors"}


def test_an_index_that_misses_its_recall_is_found(fitted: Lake) -> None:
    assert failed(index_measures(fitted, DAY, 1.01)) == {"recall_reaches_its_target"}


def test_a_release_is_in_order_and_answers_a_stranger() -> None:
    users = [UserRecord(als_version=SNAPSHOT.als_version, als=vector) for vector in SNAPSHOT.als_items[:20]]
    assert failed(release_measures(SNAPSHOT, users)) == set()


def test_a_release_with_the_index_of_another_is_found() -> None:
    wrong = replace(SNAPSHOT, indexes=make_snapshot(items=80, rank=4, seed=1).indexes)
    assert failed(release_measures(wrong, [])) == {"indexes_are_of_the_release"}


def test_a_release_without_anything_to_recommend_is_found() -> None:
    empty = make_snapshot(items=20, rank=4, unavailable=tuple(range(20)))
    assert failed(release_measures(empty, [])) == {"users_all_have_an_answer"}


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url, redis_py.Redis.from_url(url) as client:
        yield client


def test_missing_empty_and_foreign_answers_are_found(redis: Any) -> None:
    encoder = AnswerEncoder("now", ItemIds(["a", "b"]))
    full, empty = encoder.encode(np.array([[0, 1], [-1, -1]]), np.ones((2, 2), np.float32), 1)
    (foreign,) = AnswerEncoder("before", ItemIds(["a"])).encode(np.array([[0]]), np.ones((1, 1), np.float32), 1)
    users = [f"u{n}" for n in range(100)]
    write_answers(redis, [(user, full) for user in users], 60)
    assert failed(cache_measures(redis, "h", users, 5000, "now")) == set()
    write_answers(redis, [("u1", empty)], 60)
    assert failed(cache_measures(redis, "h", users, 5000, "now")) == {"active_users_have_an_answer"}
    write_answers(redis, [("u1", foreign)], 60)
    assert failed(cache_measures(redis, "h", users, 5000, "now")) == {"caches_are_of_the_champion"}
    for user in users[:10]:
        redis.delete(recs_key(user))
    assert "caches_are_as_many_as_active_users" in failed(cache_measures(redis, "h", users, 5000, "now"))
