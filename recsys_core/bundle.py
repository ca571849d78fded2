"""What a release is put together from: factors, index, popularity and catalogue of one day, as one snapshot."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from recsys_core.als import AlsReport, Factors, inverse_propensity, iter_factors, read_factors
from recsys_core.catalog import CATALOG_KEY, CATALOG_TABLE, read_catalog, with_catalog
from recsys_core.errors import UserError
from recsys_core.evaluation import ALS_FACTORS, EVALUATION, SERVED, by_segment
from recsys_core.events import DAY_MS, ITEM_ID, key_start_ms
from recsys_core.fold_in import gram
from recsys_core.holdout import TWO_TOWER, NoTwoTower, TwoTower, read_two_tower
from recsys_core.index import (
    GRAPH_ABOVE,
    SIMILAR,
    ExactIndex,
    IndexReport,
    Metric,
    Part,
    Searchable,
    VectorIndex,
    build_index,
    longest_first,
    sample_queries,
    similar_items,
    tune_index,
)
from recsys_core.lake import Lake, Partition
from recsys_core.ranking import Snapshot, availability
from recsys_core.recency import fit_window
from recsys_core.release import Manifest, Releases, new_release_id, npy_array, npy_bytes
from recsys_core.settings import IndexSettings, RankingSettings, Settings
from recsys_core.tables import INTERACTIONS

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

ALS_USERS = f"{ALS_FACTORS}_users"
ALS_ITEMS = f"{ALS_FACTORS}_items"
ITEM_INDEX = "item_index"
POPULAR_ITEMS = "popular_items"
TRENDING_ITEMS = "trending_items"
SIMILAR_BLOB = "similar.npy"
METRICS: tuple[Metric, ...] = ("inner_product", "cosine")


class MismatchedParts(UserError):
    """Parts of a release were not made from each other; the message names them."""


@dataclass(frozen=True)
class Bundle:
    """A snapshot and what its manifest says of it."""

    snapshot: Snapshot
    sources: dict[str, dict[str, str]]
    models: dict[str, dict[str, Any] | None]
    index: dict[str, dict[str, Any]]
    notes: dict[str, str]


def fit_als_factors(
    lake: Lake, day: str, settings: Settings, spark: Callable[[], SparkSession] | None, engine: str
) -> AlsReport:
    """Replace partition `day` of `als_factors_users` and `_items`, then of `als_factors`, the record that ties them."""
    end = key_start_ms(day) + DAY_MS
    report = fit_window(lake, (INTERACTIONS, day), end, (ALS_FACTORS, day), settings.als, spark, engine)
    fit = {
        "engine": report.engine,
        "rank": settings.als.rank,
        "alpha": settings.als.alpha,
        "base_preference": report.base_preference,
        "regularization": report.ridge,
        "regularization_per_item": report.ridge_per_observation,
        "propensity_power": report.propensity_power,
        "half_life_days": report.half_life_days,
        "users_version": lake.get(ALS_USERS, day).data_version,
        "items_version": lake.get(ALS_ITEMS, day).data_version,
        "interactions_version": lake.get(INTERACTIONS, day).data_version,
    }
    lake.write_blobs(ALS_FACTORS, day, {"fit.json": orjson.dumps(fit)}, report.users + report.items, fit)
    return report


def item_factors(lake: Lake, day: str) -> Factors:
    """The item factors of a day, longest first, then by id: the order of positions in index and release.

    Raises MissingPartition, and MismatchedParts when users and items are not of one fit.
    """
    fit = lake.get(ALS_FACTORS, day).extra
    for side, table in (("users", ALS_USERS), ("items", ALS_ITEMS)):
        if lake.get(table, day).data_version != fit[f"{side}_version"]:
            raise MismatchedParts(f"{table} of {day} is not of the fit that als_factors of {day} records: make it again")
    found = read_factors(lake, ALS_FACTORS, day, "items")
    order = np.argsort(found.ids)
    order = order[longest_first(found.vectors[order])]
    return Factors(found.ids[order], found.n[order], np.ascontiguousarray(found.vectors[order]))


def build_item_index(lake: Lake, day: str, settings: Settings) -> tuple[Partition, list[IndexReport]]:
    """Replace partition `day` of `item_index`: over `item_factors`, in their order, one HNSW a metric and similar items.

    Searches are for available items, and so are the recall that efSearch is tuned to and the similar items.
    """
    factors = item_factors(lake, day)
    items, available = factors.vectors, availability(with_catalog(factors.ids, read_catalog(lake)))
    part = Part.of(available, tuned=True)
    queries = next(iter_factors(lake, ALS_FACTORS, day, "users")).vectors
    indexes: dict[Metric, VectorIndex] = {}
    reports = []
    extra: dict[str, Any] = {
        "factors_version": lake.get(ALS_FACTORS, day).data_version,
        "available_version": available_version(available),
    }
    for metric in METRICS:
        of_users = queries if metric == "inner_product" else None
        indexes[metric], report = build_index(items, metric, settings.index, of_users, allowed=part)
        reports.append(report)
        extra[metric] = {"ef_search": report.ef_search, "recall": report.recall}
    blobs = {f"{metric}.faiss": index.serialize() for metric, index in indexes.items()}
    blobs[SIMILAR_BLOB] = npy_bytes(similar_items(items, SIMILAR, indexes["cosine"], allowed=part))
    return lake.write_blobs(ITEM_INDEX, day, blobs, rows=len(items), extra=extra), reports


def available_version(available: np.ndarray) -> str:
    """Tells masks of available items apart."""
    return hashlib.sha256(np.packbits(available).tobytes()).hexdigest()[:16]


def assemble(lake: Lake, day: str, release_id: str, settings: Settings | None = None) -> Bundle:
    """The snapshot of a day's release, with the weights that `evaluation` of the day found.

    Without a two-tower model of the day that can be used it is made from ALS alone, and `notes` says why. `settings` are
    those of the ranking and of the index over the item tower, None: the defaults. Raises MissingPartition, MismatchedParts.
    """
    index_settings = settings.index if settings else IndexSettings()
    factors = item_factors(lake, day)
    parts = {name: lake.get(name, day) for name in (ALS_FACTORS, ITEM_INDEX, POPULAR_ITEMS)}
    fit, index = parts[ALS_FACTORS].extra, parts[ITEM_INDEX].extra
    if index["factors_version"] != parts[ALS_FACTORS].data_version:
        raise MismatchedParts(f"item_index of {day} was built over other factors than als_factors of {day}: make it again")
    two_tower: TwoTower | None = None
    about: dict[str, Any] | None = None
    notes: dict[str, str] = {}
    try:
        two_tower = read_two_tower(lake, day, factors.ids)
        about = {"version": two_tower.tower.version, "dimension": two_tower.tower.dimension}
    except NoTwoTower as reason:
        notes[TWO_TOWER] = f"answers come from ALS alone: {reason}"
    items = with_catalog(factors.ids, read_catalog(lake))
    available = availability(items)
    indexes, similar, found = _item_index(lake, day, factors.vectors, available, index_settings)
    towers, of_towers = _two_tower_index(two_tower, index_settings, Part.of(available, tuned=True))
    snapshot = Snapshot(
        release_id=release_id,
        items=items,
        als_items=factors.vectors,
        als_gram=gram(factors.vectors),
        als_version=parts[ALS_FACTORS].data_version,
        als_alpha=fit["alpha"],
        als_base_preference=fit["base_preference"],
        als_regularization=fit["regularization"],
        als_regularization_per_item=fit["regularization_per_item"],
        als_item_weights=inverse_propensity(factors.n, fit["propensity_power"]) if fit["propensity_power"] else None,
        popular=_popularity(lake, day, factors.ids),
        similar=similar,
        indexes=indexes,
        ranking=_tuned(lake, day, settings.ranking if settings else RankingSettings()),
        two_tower_items=None if two_tower is None else two_tower.items,
        two_tower_index=towers,
        tower=None if two_tower is None else two_tower.tower,
    )
    sources = {name: {"partition": day, "data_version": part.data_version} for name, part in parts.items()}
    sources[INTERACTIONS] = {"partition": day, "data_version": fit["interactions_version"]}
    if catalog := lake.find(CATALOG_TABLE, CATALOG_KEY):
        sources[CATALOG_TABLE] = {"partition": CATALOG_KEY, "data_version": catalog.data_version}
    if two_tower is not None:
        sources[TWO_TOWER] = {"partition": day, "data_version": lake.get(TWO_TOWER, day).data_version}
    als = {"version": snapshot.als_version, **fit}
    models = {"als": als, TWO_TOWER: about}
    return Bundle(snapshot, sources, models, {**found, **of_towers}, notes)


def _item_index(
    lake: Lake, day: str, vectors: np.ndarray, available: np.ndarray, settings: IndexSettings
) -> tuple[dict[Metric, VectorIndex], np.ndarray, dict[str, dict[str, Any]]]:
    """Indexes and similar items of `item_index`, and what the manifest says of the indexes.

    Where other items are available than those it was made for, it is tuned, and similar items are found, once more.
    """
    extra = lake.get(ITEM_INDEX, day).extra
    found: dict[str, dict[str, Any]] = {metric: dict(extra[metric]) for metric in METRICS}
    indexes: dict[Metric, VectorIndex] = {
        metric: VectorIndex.deserialize(
            lake.read_blob(ITEM_INDEX, day, f"{metric}.faiss"), metric, int(found[metric]["ef_search"])
        )
        for metric in METRICS
    }
    if extra.get("available_version") == available_version(available):
        return indexes, npy_array(lake.read_blob(ITEM_INDEX, day, SIMILAR_BLOB)), found
    part = Part.of(available, tuned=True)
    users = next(iter_factors(lake, ALS_FACTORS, day, "users")).vectors
    for metric, index in indexes.items():
        if index.items > GRAPH_ABOVE:
            pool = users if metric == "inner_product" else vectors
            report = tune_index(index, sample_queries(pool, settings, noisy=metric == "cosine"), settings, part)
            found[metric] = {"ef_search": report.ef_search, "recall": report.recall}
    return indexes, similar_items(vectors, SIMILAR, indexes["cosine"], allowed=part), found


def _two_tower_index(
    two_tower: TwoTower | None, settings: IndexSettings, part: Part | None
) -> tuple[Searchable | None, dict[str, dict[str, Any]]]:
    """An index over the item tower's vectors and what the manifest says of it. Few items are scanned, without a graph."""
    if two_tower is None:
        return None, {}
    if len(two_tower.items) <= GRAPH_ABOVE:
        return ExactIndex(two_tower.items, "inner_product"), {}
    queries = None
    if two_tower.tower.spec.item_bias:
        queries = two_tower.items.copy()
        queries[:, -1] = 1
    index, report = build_index(two_tower.items, "inner_product", settings, queries, allowed=part)
    return index, {TWO_TOWER: {"ef_search": report.ef_search, "recall": report.recall}}


def _tuned(lake: Lake, day: str, ranking: RankingSettings) -> RankingSettings:
    """The ranking with the weights that the evaluation of the day found, if it was evaluated and they are wanted."""
    evaluated = lake.find(EVALUATION, day)
    found = evaluated.extra.get("ranking", {}) if evaluated and ranking.tune else {}
    weights = {name: value for name, value in found.items() if name.endswith("_weight") or name == "trend_mix"}
    return RankingSettings.model_validate({**ranking.model_dump(), **weights})


def publish_release(
    lake: Lake, releases: Releases, day: str, settings: Settings, run_ids: dict[str, str]
) -> tuple[Manifest, Snapshot]:
    """Write the release of a day and read all of it back, verified. What is served does not change.

    Raises MissingPartition, MismatchedParts, ReleaseError.
    """
    created_at = time.time()
    bundle = assemble(lake, day, new_release_id(day, created_at), settings)
    evaluated = lake.find(EVALUATION, day)
    manifest = Manifest(
        release_id=bundle.snapshot.release_id,
        day=day,
        created_at=created_at,
        sources=bundle.sources,
        models=bundle.models,
        index=bundle.index,
        ranking=bundle.snapshot.ranking.model_dump(mode="json"),
        metrics=_metrics(evaluated.extra) if evaluated else {},
        run_ids=run_ids,
        notes=bundle.notes,
    )
    complete = releases.write(manifest, bundle.snapshot)
    releases.load(complete.release_id)
    return complete, bundle.snapshot


def _metrics(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The metrics by model, those of the served ranking with its segments: a later release of the day is held against them."""
    metrics = dict(evaluation["metrics"])
    segments = {name: values for name, values in evaluation.get("segments", {}).items() if SERVED in values}
    if segments and SERVED in metrics:
        metrics[SERVED] = {**metrics[SERVED], **by_segment(segments, evaluation["headline"])}
    return metrics


def _popularity(lake: Lake, day: str, item_ids: np.ndarray) -> np.ndarray:
    popular = lake.read(POPULAR_ITEMS, day)
    found = pc.index_in(pa.array(item_ids, pa.string()), value_set=popular[ITEM_ID].combine_chunks())
    scores = popular["score"].take(found)
    return np.asarray(pc.fill_null(scores, 0.0).to_numpy(), np.float32)
