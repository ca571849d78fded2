import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import write_interactions
from towers import make_tower

from recsys_core import bundle
from recsys_core.als import fit_als, inverse_propensity, read_factors
from recsys_core.bundle import (
    ALS_FACTORS,
    POPULAR_ITEMS,
    MismatchedParts,
    assemble,
    build_item_index,
    fit_als_factors,
    item_factors,
    publish_release,
    with_catalog,
)
from recsys_core.catalog import CATALOG_SCHEMA, merge_catalog
from recsys_core.evaluation import EVALUATION
from recsys_core.index import build_index, unit_rows
from recsys_core.lake import MissingPartition
from recsys_core.popularity import popular_items
from recsys_core.ranking import Trend, Users, rank
from recsys_core.release import Releases
from recsys_core.settings import Settings
from recsys_core.tower import npy_bytes

DAY = "2026-03-02"
ITEMS = [f"i{n}" for n in range(12)]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """So few users need less regularisation than the default for their items' vectors to differ in direction."""
    return settings.model_copy(update={"als": settings.als.model_copy(update={"rank": 4, "regularization": 0.1})})


def catalog(*rows: tuple) -> pa.Table:
    filled = [dict(zip(CATALOG_SCHEMA.names, (*row, *[None] * (6 - len(row))), strict=True)) for row in rows]
    return pa.Table.from_pylist([{**row, "available": row["available"] is not False} for row in filled], schema=CATALOG_SCHEMA)


@pytest.fixture
def made(lake, settings):
    """Everything a release of the day is assembled from. `i3` and `i5` can't be had, `i9` is not in the catalogue."""
    random = np.random.default_rng(0)
    rows = [(f"u{u}", item, 1.0 + (item == "i5")) for u in range(30) for item in random.permutation(ITEMS)[:5].tolist()]
    write_interactions(lake, DAY, rows)
    fit_als_factors(lake, DAY, settings, None, "implicit")
    build_item_index(lake, DAY, settings)
    lake.write(POPULAR_ITEMS, DAY, popular_items(lake.dataset("interactions", [DAY])))
    known = [item for item in reversed(ITEMS) if item != "i9"]
    merge_catalog(lake, catalog(*((item, f"Title {item}", "a/b", 1.0, item not in ("i3", "i5")) for item in known)))
    return lake


def test_positions_are_the_items_from_the_longest_vector_on_in_every_part(made):
    snapshot = assemble(made, DAY, "r1").snapshot
    assert sorted(snapshot.item_ids) == sorted(ITEMS)
    assert np.all(np.diff(np.linalg.norm(snapshot.als_items, axis=1)) <= 1e-6)
    factors = read_factors(made, ALS_FACTORS, DAY, "items")
    popular = {row["item_id"]: row["score"] for row in made.read(POPULAR_ITEMS, DAY).to_pylist()}
    for item, vector in zip(factors.ids, factors.vectors, strict=True):
        position = snapshot.item_ids.position(item)
        assert (snapshot.als_items[position] == vector).all()
        assert snapshot.popular[position] == popular[item]
        assert snapshot.indexes["cosine"].search(vector[None], 1).tolist() == [[position]]
    assert np.allclose(snapshot.als_gram, factors.vectors.T.astype(np.float64) @ factors.vectors)


def test_items_carry_their_catalogue_row_and_unavailable_ones_are_not_recommended(made, settings):
    snapshot = assemble(made, DAY, "r1").snapshot
    rows = {row["item_id"]: row for row in snapshot.items.to_pylist()}
    assert snapshot.items.schema.equals(CATALOG_SCHEMA)
    assert (rows["i2"]["title"], rows["i2"]["category"], rows["i2"]["price"]) == ("Title i2", "a/b", 1.0)
    assert (rows["i9"]["title"], rows["i9"]["available"]) == (None, True)
    assert {item for item in snapshot.item_ids if not snapshot.available[snapshot.item_ids.position(item)]} == {"i3", "i5"}
    users = Users(snapshot.als_items[:1], np.full((1, 1), -1, np.int64), np.full((1, 1), -1, np.int64))
    positions = rank(snapshot, Trend.of(snapshot, {"i5": 9.0}), users, 12, settings.ranking).positions[0]
    assert {snapshot.item_ids[p] for p in positions if p >= 0} == set(ITEMS) - {"i3", "i5"}


def test_catalogue_rows_follow_the_items_and_lacking_ones_get_defaults():
    rows = with_catalog(np.array(["c", "a", "x"], object), catalog(("a", "A"), ("b", "B"), ("c", "C", "k", 2.0, False, "{}")))
    assert rows.to_pydict() == {
        "item_id": ["c", "a", "x"],
        "title": ["C", "A", None],
        "category": ["k", None, None],
        "price": [2.0, None, None],
        "available": [False, True, True],
        "attributes": ["{}", None, None],
    }


def test_items_without_any_catalogue_are_available_and_untitled():
    rows = with_catalog(np.array(["b", "a"], object), CATALOG_SCHEMA.empty_table())
    assert rows.schema.equals(CATALOG_SCHEMA)
    assert rows.select(["item_id", "title", "available"]).to_pylist() == [
        {"item_id": item, "title": None, "available": True} for item in ("b", "a")
    ]


def test_an_index_over_the_factors_of_another_fit_is_refused(made, settings):
    other = settings.model_copy(update={"als": settings.als.model_copy(update={"seed": 99})})
    fit_als_factors(made, DAY, other, None, "implicit")
    with pytest.raises(MismatchedParts, match=f"item_index of {DAY} was built over other factors than als_factors of {DAY}"):
        assemble(made, DAY, "r1")
    build_item_index(made, DAY, other)
    assert assemble(made, DAY, "r1").snapshot.release_id == "r1"


@pytest.mark.parametrize("side", ["users", "items"])
def test_users_and_items_of_different_fits_are_refused(made, settings, side):
    other = settings.als.model_copy(update={"seed": 99})
    fit_als(made, made.files("interactions", [DAY]), "other", DAY, other, None, "implicit")
    made.write(f"{ALS_FACTORS}_{side}", DAY, made.read(f"other_{side}", DAY))
    for use in (
        lambda: item_factors(made, DAY),
        lambda: assemble(made, DAY, "r1"),
        lambda: build_item_index(made, DAY, settings),
    ):
        with pytest.raises(MismatchedParts, match=f"als_factors_{side} of {DAY} is not of the fit that als_factors"):
            use()


def test_the_same_fit_made_again_fits_the_index_of_before(made, settings):
    before = assemble(made, DAY, "r1")
    fit_als_factors(made, DAY, settings, None, "implicit")
    assert assemble(made, DAY, "r1").sources == before.sources


def test_a_part_that_was_never_made_is_named(lake, settings):
    with pytest.raises(MissingPartition, match="'als_factors'"):
        assemble(lake, DAY, "r1")
    write_interactions(lake, DAY, [("u", "i", 1.0), ("v", "j", 1.0)])
    fit_als_factors(lake, DAY, settings, None, "implicit")
    with pytest.raises(MissingPartition, match="'item_index'"):
        assemble(lake, DAY, "r1")
    build_item_index(lake, DAY, settings)
    with pytest.raises(MissingPartition, match="'popular_items'"):
        assemble(lake, DAY, "r1")


def test_the_sources_are_what_the_parts_were_made_from(made):
    fitted_on = made.get("interactions", DAY).data_version
    write_interactions(made, DAY, [("late", "i1", 1.0)])
    sources = assemble(made, DAY, "r1").sources
    assert sources["interactions"] == {"partition": DAY, "data_version": fitted_on}
    assert sources["item_catalog"]["data_version"] == made.get("item_catalog", "current").data_version
    assert sources["popular_items"] == {"partition": DAY, "data_version": made.get(POPULAR_ITEMS, DAY).data_version}


def test_a_published_release_loads_as_what_was_assembled_and_is_not_served_yet(made, settings):
    releases = Releases(settings.releases_uri)
    made.write_blobs(EVALUATION, DAY, {"evaluation.json": b"{}"}, 1, {"metrics": {"ALS": {"ndcg@10": 0.5}}})
    manifest, snapshot = publish_release(made, releases, DAY, settings, {"release": "run-1"})
    assert releases.champion() is None
    assert releases.newest_of(DAY) == manifest.release_id
    read, loaded = releases.load(manifest.release_id)
    assert read == manifest
    assert (read.metrics, read.run_ids) == ({"ALS": {"ndcg@10": 0.5}}, {"release": "run-1"})
    assert read.models["als"]["version"] == made.get(ALS_FACTORS, DAY).data_version
    assert read.models["two_tower"] is None
    assert loaded.items.equals(snapshot.items)
    for name in ("als_items", "als_gram", "popular"):
        assert (getattr(loaded, name) == getattr(snapshot, name)).all()
    for name in (
        "als_version",
        "als_alpha",
        "als_base_preference",
        "als_regularization",
        "als_regularization_per_item",
        "release_id",
    ):
        assert getattr(loaded, name) == getattr(snapshot, name)
    for metric, index in snapshot.indexes.items():
        queries = snapshot.als_items[:5]
        assert loaded.indexes[metric].search(queries, 4).tolist() == index.search(queries, 4).tolist()


def test_a_release_holds_what_interactions_with_each_item_weighed_in_the_fit(made, settings):
    alike = settings.model_copy(update={"als": settings.als.model_copy(update={"propensity_power": 0.0})})
    fit_als_factors(made, DAY, alike, None, "implicit")
    build_item_index(made, DAY, alike)
    assert assemble(made, DAY, "r1").snapshot.als_item_weights is None
    weighed = settings.model_copy(update={"als": settings.als.model_copy(update={"propensity_power": 0.5})})
    fit_als_factors(made, DAY, weighed, None, "implicit")
    build_item_index(made, DAY, weighed)
    releases = Releases(settings.releases_uri)
    manifest, _ = publish_release(made, releases, DAY, weighed, {})
    _, loaded = releases.load(manifest.release_id)
    factors = read_factors(made, ALS_FACTORS, DAY, "items")
    found = loaded.als_item_weights[[loaded.item_ids.position(item) for item in factors.ids]]
    assert (found == inverse_propensity(factors.n, 0.5)).all()
    assert len(set(found.tolist())) > 1


def test_no_release_is_made_of_parts_that_do_not_fit_together(made, settings):
    releases = Releases(settings.releases_uri)
    manifest, _ = publish_release(made, releases, DAY, settings, {})
    other = settings.model_copy(update={"als": settings.als.model_copy(update={"seed": 99})})
    fit_als_factors(made, DAY, other, None, "implicit")
    with pytest.raises(MismatchedParts):
        publish_release(made, releases, DAY, settings, {})
    assert [m.release_id for m in releases.list()] == [manifest.release_id]


def add_two_tower(lake, items: list[str], item_bias: bool = False) -> np.ndarray:
    """A two-tower model of the day that knows `items`."""
    tower = make_tower(["u0"], items, item_bias=item_bias)
    vectors = unit_rows(np.random.default_rng(0).normal(size=(len(items), tower.dimension)))
    ids = io.BytesIO()
    pq.write_table(pa.table({"item_id": items}), ids)
    files = {"items.parquet": ids.getvalue(), "items.npy": npy_bytes(vectors), **tower.to_files()}
    lake.write_blobs("two_tower", DAY, {**files, "saved_model/1/saved_model.pb": b"not for serving"}, len(items))
    return vectors


def test_a_two_tower_model_of_the_day_goes_into_the_release_in_the_order_of_positions(made, settings):
    vectors = add_two_tower(made, [*ITEMS[1:], "unheard-of"])
    releases = Releases(settings.releases_uri)
    manifest, _ = publish_release(made, releases, DAY, settings, {})
    _, loaded = releases.load(manifest.release_id)
    assert manifest.models["two_tower"] == {"version": "made-up", "dimension": 8}
    assert manifest.sources["two_tower"] == {"partition": DAY, "data_version": made.get("two_tower", DAY).data_version}
    assert "two_tower" not in manifest.notes
    assert not any(name.startswith("two_tower/saved_model") for name in manifest.files)
    for row, item in enumerate(ITEMS[1:]):
        assert (loaded.two_tower_items[loaded.item_ids.position(item)] == vectors[row]).all()
    assert not loaded.two_tower_items[loaded.item_ids.position("i0")].any()
    assert loaded.tower.version == "made-up"


@pytest.mark.parametrize("item_bias", [False, True])
def test_an_index_of_towers_is_tuned_to_questions_of_users_whose_last_component_meets_the_bias(made, monkeypatch, item_bias):
    add_two_tower(made, ITEMS, item_bias)
    asked = []

    def build(vectors, metric, settings, queries=None, allowed=None):
        asked.append(queries)
        return build_index(vectors, metric, settings, queries, allowed=allowed)

    monkeypatch.setattr(bundle, "GRAPH_ABOVE", 0)
    monkeypatch.setattr(bundle, "build_index", build)
    found = assemble(made, DAY, "r1").snapshot
    assert len(asked) == 1
    if item_bias:
        assert (asked[0][:, -1] == 1).all()
        assert (asked[0][:, :-1] == found.two_tower_items[:, :-1]).all()
    else:
        assert asked[0] is None


@pytest.mark.parametrize("broken", [{}, {"tower.json": b"{}"}, {"items.npy": b"x", "tower.json": b"x", "items.parquet": b"x"}])
def test_without_a_usable_two_tower_model_the_release_is_made_from_als_alone_and_says_so(made, settings, broken):
    if broken:
        made.write_blobs("two_tower", DAY, broken, 1)
    releases = Releases(settings.releases_uri)
    manifest, snapshot = publish_release(made, releases, DAY, settings, {})
    assert manifest.models["two_tower"] is None
    assert manifest.notes["two_tower"].startswith(f"answers come from ALS alone: two_tower of {DAY}")
    assert snapshot.tower is None
    assert "two_tower" not in manifest.sources


def test_a_release_carries_the_weights_that_the_evaluation_found(made, settings):
    found = {"als_weight": 0.11, "trend_weight": 0.9, "trend_mix": [0.5, -0.5, 0.0], "candidates": 7}
    made.write_blobs(EVALUATION, DAY, {"evaluation.json": b"{}"}, 1, {"metrics": {}, "ranking": found})
    releases = Releases(settings.releases_uri)
    manifest, _ = publish_release(made, releases, DAY, settings, {})
    _, loaded = releases.load(manifest.release_id)
    assert (loaded.ranking.als_weight, loaded.ranking.trend_mix) == (0.11, (0.5, -0.5, 0.0))
    assert loaded.ranking.candidates == settings.ranking.candidates, "weights alone are tuned"
    fixed = settings.model_copy(update={"ranking": settings.ranking.model_copy(update={"tune": False})})
    assert assemble(made, DAY, "r2", fixed).snapshot.ranking == fixed.ranking
