"""The user tower without TensorFlow: ids, inputs, vectors, files."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from towers import make_tower, random_inputs

from recsys_core import tower as tower_module
from recsys_core.tower import TOWER_FILE, TowerError, TowerInputs, UserTower, Vocabulary, fingerprint, fingerprints

USERS = [f"u{n}" for n in range(20)]
ITEMS = [f"i{n}" for n in range(30)]
MASK = 2**64 - 1


def fingerprint_by_definition(text: str) -> int:
    """The documented hash of one string, in whole numbers of Python."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 33)) * 0xFF51AFD7ED558CCD) & MASK
        x = ((x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53) & MASK
        return x ^ (x >> 33)

    data = text.encode()
    result = mix((len(data) + 0x9E3779B97F4A7C15) & MASK)
    for at in range(0, len(data), 8):
        result = (mix(result ^ int.from_bytes(data[at : at + 8], "little")) + at) & MASK
    return result


@settings(deadline=None)
@given(st.lists(st.text(max_size=40), max_size=20))
def test_fingerprints_of_many_are_those_of_each_by_definition(texts):
    by_definition = [fingerprint_by_definition(text) for text in texts]
    assert fingerprints(texts).tolist() == by_definition
    assert list(map(fingerprint, texts)) == by_definition


def test_fingerprints_are_the_same_in_every_release():
    known = {"": 0xE4D971771B652C20, "u000123": fingerprint_by_definition("u000123")}
    assert fingerprints(list(known))[0] == fingerprint_by_definition("")
    assert len(set(fingerprints([f"item-{n}" for n in range(200_000)]).tolist())) == 200_000


def test_slices_and_large_strings_have_the_fingerprints_of_their_values():
    values = pa.array(["a", "bb", "ccc", "ü/ж" * 9])
    assert np.array_equal(fingerprints(values.slice(1, 2)), fingerprints(["bb", "ccc"]))
    assert np.array_equal(fingerprints(values.cast(pa.large_string())), fingerprints(values))
    with pytest.raises(ValueError, match="null"):
        fingerprints(pa.array(["a", None]))


def test_a_vocabulary_says_where_an_id_stands_and_minus_one_for_others():
    known = np.sort(fingerprints(ITEMS))
    places = Vocabulary(known).places([*ITEMS, "other"])
    assert sorted(places[:-1]) == list(range(30))
    assert places[-1] == -1
    assert Vocabulary(np.empty(0, np.uint64)).places(["a"]).tolist() == [-1]


@pytest.mark.parametrize("one_by_one", [0, 100])
@pytest.mark.parametrize("known", [ITEMS, []])
def test_asking_for_ids_again_and_again_gives_one_more_than_their_places(known, one_by_one, monkeypatch):
    monkeypatch.setattr(tower_module, "MEMO_ENTRIES", 8)
    monkeypatch.setattr(tower_module, "ONE_BY_ONE", one_by_one)
    vocabulary = Vocabulary(np.sort(fingerprints(known)))
    random = np.random.default_rng(1)
    for _ in range(50):
        some = [[*ITEMS, "x", "y"][k] for k in random.integers(0, 32, 6)]
        assert vocabulary.rows(some) == (vocabulary.places(some) + 1).tolist()
        assert len(vocabulary._memo) <= 8 + len(some)


@pytest.mark.parametrize("hidden", [(16, 8), ()])
def test_vectors_of_many_are_those_of_each_and_have_length_one(hidden, monkeypatch):
    tower = make_tower(USERS, ITEMS, hidden=hidden)
    inputs = random_inputs(USERS, ITEMS, 40)
    many = tower.vectors(inputs)
    for at in range(40):
        one = TowerInputs(**{name: values[at : at + 1] for name, values in vars(inputs).items()})
        assert tower.vectors(one)[0] == pytest.approx(many[at], abs=1e-6)
    lengths = np.linalg.norm(many, axis=1)
    assert ((np.abs(lengths - 1) < 1e-5) | (lengths == 0)).all()
    monkeypatch.setattr(tower_module, "POOL_VALUES", 64 * 60 * 3)
    assert tower.vectors(inputs) == pytest.approx(many, abs=1e-6)
    assert many.dtype == np.float32


def user(history: list[str], user_id: str = "nobody", counts: tuple[float, ...] = (0, 0, 0, np.nan), **more) -> TowerInputs:
    known = {"device": None, "country": None, "category": None, "ts": 1_700_000_000_000, **more}
    return TowerInputs(
        [user_id],
        [history],
        np.array([known["ts"]]),
        [known["device"]],
        [known["country"]],
        [known["category"]],
        np.array([counts], np.float32),
    )


@pytest.mark.parametrize("item_bias", [False, True])
def test_a_user_of_whom_nothing_is_known_has_zeros(item_bias):
    tower = make_tower(USERS, ITEMS, item_bias=item_bias)
    assert not tower.vectors(user([])).any()
    assert not tower.vectors(user(["never-seen"], device="mobile")).any()
    assert tower.vectors(user(["i3"])).any()
    assert tower.vectors(user([], user_id="u3")).any()


@pytest.mark.parametrize("hidden", [(16, 8), ()])
def test_a_question_about_nobody_has_no_vector(hidden):
    inputs = random_inputs(USERS, ITEMS, 0)
    assert make_tower(USERS, ITEMS, hidden=hidden).vectors(inputs).shape == (0, 8)


def test_a_vector_is_that_of_its_formula():
    tower = make_tower(USERS, ITEMS)
    spec, tables = tower.spec, tower.tables
    counts = (3.0, 0.0, 7.0, np.nan)
    moment = int(np.datetime64("2026-11-25T15:30", "ms").astype(int))
    asked = user(["i4", "gone", "i2", "i9", "i7"], user_id="u5", counts=counts, ts=moment, device="mobile", category="books")
    places = Vocabulary(tables["item_ids"]).places(["i4", "i2", "i9", "i7"])
    items = tables["history"][places + 1].astype(float)
    own = spec.scales[0] * tables["users"][Vocabulary(tables["user_ids"]).places(["u5"])[0] + 1].astype(float)
    pooled, newest = spec.scales[1] * items.mean(axis=0), spec.scales[2] * items[: spec.recent].mean(axis=0)
    context = [tables[name][row] for name, row in zip(tower_module.CONTEXT, (15, 2, 2, 0, 1), strict=True)]
    numbers = [(np.log1p(c) - m) / s for c, m, s in zip(counts[:3], spec.center, spec.spread, strict=False)]
    x = np.concatenate([own, pooled, newest, *context, numbers, [0, 1]])
    for kernel, bias in tower.dense[:-1]:
        x = np.maximum(x @ kernel + bias, 0)
    kernel, bias = tower.dense[-1]
    result = own + pooled + newest + x @ kernel + bias
    assert tower.vectors(asked)[0] == pytest.approx(result / np.linalg.norm(result), abs=1e-6)
    biased = make_tower(USERS, ITEMS, item_bias=True)
    direction = result[:-1] / np.linalg.norm(result[:-1])
    assert biased.vectors(asked)[0] == pytest.approx([*direction, 1], abs=1e-6)


def test_context_the_newest_items_and_counts_change_the_vector():
    tower = make_tower(USERS, ITEMS)
    first = tower.vectors(user(["i1", "i2", "i3", "i4"]))
    for other in (
        user(["i4", "i2", "i3", "i1"]),
        user(["i1", "i2", "i3", "i4"], device="mobile"),
        user(["i1", "i2", "i3", "i4"], country="DE"),
        user(["i1", "i2", "i3", "i4"], category="books"),
        user(["i1", "i2", "i3", "i4"], ts=1_700_000_000_000 + 3_600_000),
        user(["i1", "i2", "i3", "i4"], counts=(1, 2, 3, 4)),
        user(["i1", "i2", "i3", "i4"], user_id="u1"),
    ):
        assert np.abs(tower.vectors(other) - first).max() > 1e-3


def test_values_that_are_unknown_or_not_finite_count_as_not_known():
    tower = make_tower(USERS, ITEMS)
    plain = tower.vectors(user(["i1"], counts=(np.nan, np.nan, np.nan, np.nan)))
    assert np.array_equal(tower.vectors(user(["i1"], counts=(np.inf, np.nan, -np.inf, np.nan))), plain)
    assert np.array_equal(tower.vectors(user(["i1", "gone"], counts=(np.nan,) * 4, device="toaster")), plain)


def test_only_the_newest_items_count_up_to_the_length_of_training():
    tower = make_tower(USERS, ITEMS)
    tower = UserTower(replace(tower.spec, history=3), tower.tables, tower.dense)
    assert np.array_equal(tower.vectors(user(["i1", "i2", "i3", "i4"])), tower.vectors(user(["i1", "i2", "i3"])))


def test_hours_and_weekdays_are_those_of_utc():
    tower = make_tower(USERS, ITEMS)
    encoded = tower.encode(user(["i1"], ts=int(np.datetime64("2026-11-25T15:30", "ms").astype(int))))
    assert (encoded["hour"][0], encoded["weekday"][0]) == (15, 2)


def test_users_share_the_rows_of_a_smaller_table_as_in_training():
    tower = make_tower(USERS, ITEMS)
    few_rows = UserTower(tower.spec, {**tower.tables, "users": tower.tables["users"][:6]}, tower.dense)
    asked = random_inputs(USERS, ITEMS, 60)
    places = Vocabulary(tower.tables["user_ids"]).places(asked.user_ids)
    assert few_rows.encode(asked)["user"].tolist() == tower_module.embedding_rows(places, 6).tolist()


def test_files_give_the_tower_back():
    tower = make_tower(USERS, ITEMS)
    again = UserTower.from_files(tower.to_files())
    inputs = random_inputs(USERS, ITEMS, 30)
    assert np.array_equal(again.vectors(inputs), tower.vectors(inputs))
    assert (again.version, again.dimension) == ("made-up", 8)


def broken(name: str, change) -> dict[str, bytes]:
    files = make_tower(USERS, ITEMS).to_files()
    changed = change(files[name])
    return {**{k: v for k, v in files.items() if k != name}, **({name: changed} if changed is not None else {})}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (TOWER_FILE, lambda _: None, "needs tower.json"),
        (TOWER_FILE, lambda _: b"nonsense", "not a JSON object"),
        (TOWER_FILE, lambda data: json.dumps({**json.loads(data), "schema_version": 9}).encode(), "schema version 9"),
        (TOWER_FILE, lambda data: json.dumps({**json.loads(data), "more": 1}).encode(), "does not fit its schema"),
        (TOWER_FILE, lambda data: json.dumps({**json.loads(data), "dimension": 7}).encode(), "says 7 columns"),
        ("users.npy", lambda _: None, "needs users.npy"),
        ("users.npy", lambda data: data[:40], "not a NumPy file"),
        ("users.npy", lambda _: tower_module.npy_bytes(np.full((3, 8), np.nan, np.float32)), "finite"),
        ("history.npy", lambda _: tower_module.npy_bytes(np.zeros((3, 8), np.float32)), "has 3 rows"),
        ("hours.npy", lambda _: tower_module.npy_bytes(np.zeros((24, 3), np.float32)), "equally many columns"),
        ("dense_1_kernel.npy", lambda _: tower_module.npy_bytes(np.zeros((3, 8), np.float32)), "expected 16 rows"),
    ],
)
def test_a_broken_file_is_named(name, change, message):
    with pytest.raises(TowerError, match=message):
        UserTower.from_files(broken(name, change))
