"""Whether vectors, an index, a release and the caches can serve: measures beside the range that they have to be in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from recsys_core.als import iter_factors
from recsys_core.bundle import ALS_FACTORS, ITEM_INDEX, METRICS, item_factors
from recsys_core.events import ITEM_ID
from recsys_core.index import Metric, VectorIndex, unit_rows
from recsys_core.lake import Lake
from recsys_core.online import CachedAnswer, CorruptValue, UserRecord, recs_key, users_of
from recsys_core.popularity import READ_ROWS
from recsys_core.profiles import Measure, frame_of
from recsys_core.quality import Report, usual_suite, validate
from recsys_core.ranking import Snapshot, Trend, rank
from recsys_core.release import npy_array
from recsys_core.tables import INTERACTIONS
from recsys_core.tower import TOWER_FILE

COMPARED = 200
"""Vectors of an index that are compared with those it should have been built over."""
USERS = 200
"""Users of a release that are answered."""
LONGEST = 1e4
"""A vector may be so many times as long as the median one: a few real items are a thousand times longer."""


def report_of(claim: str, measures: Sequence[Measure]) -> Report:
    """The report of a claim over measures."""
    return validate(usual_suite(claim), frame_of(measures))


def weight_measures(lake: Lake, day: str) -> list[Measure]:
    """Of all rows of a day's interactions: is there any, and are the weights finite and above zero."""
    dataset = lake.dataset(INTERACTIONS, [day], missing_ok=True)
    rows = bad = 0
    for batch in dataset.to_batches(columns=["weight"], batch_size=READ_ROWS) if dataset else ():
        weights = batch["weight"].to_numpy(zero_copy_only=False)
        rows += len(weights)
        bad += int(np.count_nonzero(~(np.isfinite(weights) & (weights > 0))))
    return [Measure(day, "pairs", rows, least=1), Measure(day, "weights that are not finite or not above zero", bad, most=0)]


# -- vectors ----------------------------------------------------------------------------------------------------


def vector_measures(where: str, vectors: Iterable[np.ndarray], unit: bool = False) -> tuple[list[Measure], list[Measure]]:
    """Of vectors float32 (n, d) in parts: are they finite and not all zero; are their lengths in range.

    `unit` says that they have to have length 1; rows of zeros stand for what is not known.
    """
    count = not_finite = zero = off = 0
    lengths = []
    for part in vectors:
        finite = np.isfinite(part).all(axis=1)
        length = np.linalg.norm(part[finite], axis=1)
        count += len(part)
        not_finite += int((~finite).sum())
        zero += int((length == 0).sum())
        off += int((np.abs(length[length > 0] - 1) > 1e-3).sum())
        lengths.append(length[length > 0])
    held = np.concatenate(lengths) if lengths else np.zeros(0)
    finite_measures = [
        Measure(where, "vectors", count, least=1),
        Measure(where, "vectors with values that are not finite", not_finite, most=0),
        Measure(where, "vectors of zeros", zero, most=count - 1),
    ]
    ratio = float(held.max() / np.median(held)) if len(held) else 0.0
    range_measures = [Measure(where, "longest vector over the median length", ratio, most=LONGEST)]
    if unit:
        range_measures = [Measure(where, "vectors whose length is not 1", off, most=0)]
    return finite_measures, range_measures


def factor_measures(lake: Lake, day: str) -> dict[str, list[Measure]]:
    """The ALS factors of a day: finite, of sane length, and for nearly all items of the interactions."""
    finite, ranges, items = [], [], 0
    for side in ("users", "items"):
        found = vector_measures(f"{day} {side}", (part.vectors for part in iter_factors(lake, ALS_FACTORS, day, side)))
        finite += found[0]
        ranges += found[1]
        items = int(found[0][0].value)
    dataset = lake.dataset(INTERACTIONS, [day], missing_ok=True)
    known: set[str] = set()
    for batch in dataset.to_batches(columns=[ITEM_ID]) if dataset else ():
        known.update(batch[ITEM_ID].unique().to_pylist())
    covered = [Measure(day, "share of the window's items that have a factor", items / len(known), least=0.5)] if known else []
    return {"factors_are_finite_and_not_all_zero": finite, "lengths_are_in_range": ranges, "items_are_covered": covered}


def tower_measures(lake: Lake, day: str) -> dict[str, list[Measure]]:
    """The item vectors of the two-tower model of a day; nothing where the day has no such model."""
    if lake.find("two_tower", day) is None:
        return {"tower_vectors_are_finite": [], "tower_directions_have_length_one": []}
    vectors = npy_array(lake.read_blob("two_tower", day, "items.npy"))
    finite, _ = vector_measures(day, [vectors])
    biased = json.loads(lake.read_blob("two_tower", day, TOWER_FILE)).get("item_bias", False)
    _, unit = vector_measures(day, [vectors[:, :-1] if biased else vectors], unit=True)
    return {"tower_vectors_are_finite": finite, "tower_directions_have_length_one": unit}


# -- index and release ------------------------------------------------------------------------------------------


def _differing(index: VectorIndex, vectors: np.ndarray) -> int:
    """Of some positions, how many the index holds another vector for; all when counts or dimensions differ."""
    if (index.items, index.dimension) != vectors.shape:
        return max(index.items, len(vectors))
    at = np.unique(np.linspace(0, len(vectors) - 1, min(COMPARED, len(vectors))).astype(np.int64))
    own = index.index.reconstruct_batch(at)
    expected = unit_rows(vectors[at]) if index.metric == "cosine" else vectors[at]
    return int((~np.isclose(own, expected, rtol=1e-4, atol=1e-5)).any(axis=1).sum())


def index_measures(lake: Lake, day: str, recall_target: float) -> dict[str, list[Measure]]:
    """The index of a day: recall, and that it was built over the day's factors."""
    extra = lake.get(ITEM_INDEX, day).extra
    of_factors = lake.get(ALS_FACTORS, day).data_version == extra["factors_version"]
    same = [Measure(day, "built over the factors that are there now (1: yes)", int(of_factors), least=1)]
    vectors = item_factors(lake, day).vectors
    recalls = []
    for metric in METRICS:
        recalls.append(Measure(day, f"recall@50, {metric}", extra[metric]["recall"], least=recall_target))
        index = VectorIndex.deserialize(lake.read_blob(ITEM_INDEX, day, f"{metric}.faiss"), metric, 64)
        same.append(Measure(day, f"vectors that differ from the factors, {metric}", _differing(index, vectors), most=0))
    return {"recall_reaches_its_target": recalls, "index_is_of_the_same_factors": same}


def release_measures(snapshot: Snapshot, users: Sequence[UserRecord]) -> dict[str, list[Measure]]:
    """A release: its indexes hold its own vectors, all vectors are finite, and everyone gets an answer.

    `users` are sampled records; one that nothing is known of is added.
    """
    name = snapshot.release_id
    own = [
        Measure(name, f"vectors of the index that are not the release's, {metric}", _differing(index, vectors), most=0)
        for metric, index, vectors in _indexes(snapshot)
    ]
    not_finite = int((~np.isfinite(snapshot.als_items)).any(axis=1).sum())
    own.append(Measure(name, "item vectors that are not finite", not_finite, most=0))
    state = users_of(snapshot, [*users, UserRecord()], snapshot.ranking)
    ranked = rank(snapshot, Trend.of(snapshot, {}), state, 10, snapshot.ranking)
    empty = int((ranked.positions < 0).all(axis=1).sum())
    servable = Measure(name, "items that may be recommended", int(snapshot.available.sum()), least=1)
    answers = [servable, Measure(name, f"of {len(state)} users, those without an item", empty, most=0)]
    return {"indexes_are_of_the_release": own, "users_all_have_an_answer": answers}


def _indexes(snapshot: Snapshot) -> list[tuple[Metric, VectorIndex, np.ndarray]]:
    return [(m, i, snapshot.als_items) for m, i in snapshot.indexes.items() if isinstance(i, VectorIndex)]


def records_of(lake: Lake, day: str, version: str) -> list[UserRecord]:
    """Some users' factors of a day as the records that serving reads."""
    part = next(iter_factors(lake, ALS_FACTORS, day, "users"), None)
    vectors = part.vectors[:USERS] if part is not None else ()
    return [UserRecord(als_version=version, als=vector) for vector in vectors]


# -- caches -----------------------------------------------------------------------------------------------------


def cache_measures(redis: Any, hour: str, users: Sequence[str], active: int, release_id: str) -> dict[str, list[Measure]]:
    """The cached answers of sampled active users: there, not empty, of the champion.

    `active` is how many users were active; the caches that there should be are estimated from the sample.
    """
    pipeline = redis.pipeline(transaction=False)
    for user in users:
        pipeline.get(recs_key(user))
    found: Mapping[str, Any] = dict(zip(users, pipeline.execute() if users else (), strict=True))
    missing = empty = other = 0
    for value in found.values():
        answer = _decoded(value)
        missing += answer is None
        empty += answer is not None and not len(answer.ends)
        other += answer is not None and answer.release_id != release_id
    total = max(len(users), 1)
    has = [
        Measure(hour, f"of {len(users)} sampled users, those without an answer", missing, most=0),
        Measure(hour, f"of {len(users)} sampled users, those with an empty answer", empty, most=0),
    ]
    size = active * (1 - missing / total)
    covers = [Measure(hour, "cached answers, by the sample", size, least=0.99 * active, beside=f"{active} active users")]
    of_champion = [Measure(hour, "answers of another release than the champion", other, most=0, beside=release_id)]
    return {
        "active_users_have_an_answer": has,
        "caches_are_of_the_champion": of_champion,
        "caches_are_as_many_as_active_users": covers,
    }


def _decoded(value: bytes | None) -> CachedAnswer | None:
    if value is None:
        return None
    try:
        return CachedAnswer.decode(value)
    except CorruptValue:
        return None
