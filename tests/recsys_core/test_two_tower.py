"""The two-tower model on a planted shop of clear clusters: what it learns, survives, refuses and exports."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from examples import CLUSTERS, DAY, category_of, example, item, planted_news, planted_shop, write_examples
from recsys_home import default_settings
from towers import random_inputs

from recsys_core.events import key_start_ms
from recsys_core.lake import Lake, MissingPartition
from recsys_core.tower import TowerInputs, UserTower
from recsys_core.two_tower import CHECKPOINTS, TWO_TOWER, TwoTowerReport, fit_two_tower
from recsys_core.two_tower_data import ITEM_FEATURES, TRAINING_EXAMPLES, TwoTowerError, learn

TESTS = Path(__file__).parents[1]
SMALL: dict[str, Any] = {
    "dimension": 16,
    "hidden": (24, 16),
    "batch_size": 64,
    "negatives": 16,
    "epochs": 6,
    "patience": 3,
    "id_dropout": 0.25,
    "learning_rate": 0.01,
    "checkpoint_steps": 7,
    "repeats": True,
}
OVERFITTING: dict[str, Any] = {"epochs": 8, "patience": 1, "learning_rate": 0.05, "checkpoint_steps": 2, "id_dropout": 0.0}
USERS, ITEMS, NEW_ITEMS = 120, 90, 12
MOMENT = key_start_ms(DAY) + 86_000_000


class Model:
    """The files of a trained partition, and questions to them."""

    def __init__(self, lake: Lake, report: TwoTowerReport | None = None) -> None:
        self.lake, self.report = lake, report
        names = lake.get(TWO_TOWER, DAY).files
        self.files = {name: lake.read_blob(TWO_TOWER, DAY, name) for name in names}
        self.tower = UserTower.from_files(self.files)
        self.items = np.load(io.BytesIO(self.files["items.npy"]))
        self.ids = pq.read_table(io.BytesIO(self.files["items.parquet"]))["item_id"].to_pylist()

    def nearest(self, history: list[str], count: int, user_id: str = "someone-new") -> list[str]:
        """Items by closeness to a user with `history`, without that history."""
        counts = np.array([[len(history), len(history), len(history), 0.1]], np.float32)
        inputs = TowerInputs([user_id], [history], np.array([MOMENT]), [None], [None], [None], counts)
        scores = (self.tower.vectors(inputs) @ self.items.T)[0]
        ranked = [self.ids[k] for k in np.argsort(-scores, kind="stable")]
        return [name for name in ranked if name not in history][:count]


def train(home: Path, examples: list[dict], items: list[dict], **settings: Any) -> Model:
    lake = Lake(str(home / "lake"))
    write_examples(lake, examples, items)
    report = fit_two_tower(lake, DAY, default_settings(home, two_tower={**SMALL, **settings}))
    return Model(lake, report)


def train_elsewhere(home: Path, *options: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """A training of the tables under `home` in a process of its own."""
    command = [sys.executable, str(TESTS / "two_tower_process.py"), str(home), json.dumps({**SMALL, **settings}), *options]
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=560, check=False
    )


def cluster_of(name: str) -> int:
    return int(name[1:]) % CLUSTERS


@pytest.fixture(scope="module")
def shop() -> tuple[list[dict], list[dict]]:
    return planted_shop(USERS, ITEMS, events=20, unseen_items=NEW_ITEMS)


@pytest.fixture(scope="module")
def model(shop: tuple[list[dict], list[dict]], tmp_path_factory: pytest.TempPathFactory) -> Model:
    return train(tmp_path_factory.mktemp("trained"), *shop)


def test_users_are_near_the_items_of_their_cluster(model):
    for user in range(12):
        history = [f"i{user % CLUSTERS + CLUSTERS * k}" for k in range(4)]
        found = model.nearest(history, 8, user_id=f"u{user}")
        assert np.mean([cluster_of(name) == user % CLUSTERS for name in found]) >= 0.8, (user, found)


def test_a_new_user_with_three_live_clicks_gets_neighbours_of_that_cluster(model):
    for cluster in range(CLUSTERS):
        found = model.nearest([f"i{cluster + CLUSTERS * k}" for k in (1, 2, 3)], 8)
        assert np.mean([cluster_of(name) == cluster for name in found]) >= 0.7, (cluster, found)


def test_an_item_published_today_is_among_the_nearest_of_those_who_like_its_category(model):
    new = {f"i{n}" for n in range(ITEMS - NEW_ITEMS, ITEMS)}
    places = []
    for cluster in range(CLUSTERS):
        found = model.nearest([f"i{cluster + CLUSTERS * k}" for k in (1, 2, 3)], ITEMS)
        places += [found.index(name) for name in new if cluster_of(name) == cluster]
        others = [found.index(name) for name in new if cluster_of(name) != cluster]
        assert max(places[-2:]) < np.median(others)
    assert np.median(places) < ITEMS / 4


def test_a_stranger_gets_what_is_wanted_now_and_not_what_was_wanted_once(tmp_path):
    news = train(tmp_path, *planted_news(), epochs=2)
    found = news.nearest(["n6-0", "n6-1"], 10)
    assert sum(name.startswith("n7-") for name in found) >= 8, found


def test_vectors_have_length_one_and_ids_name_every_item(model):
    assert np.linalg.norm(model.items, axis=1) == pytest.approx(np.ones(ITEMS), abs=1e-5)
    assert sorted(model.ids) == sorted(f"i{n}" for n in range(ITEMS))
    assert model.items.dtype == np.float32


def test_the_report_says_what_was_trained_on_and_validation_is_the_newest_part(model):
    report = model.report
    assert (report.examples, report.validation_examples, report.skipped) == (2160, 240, 0)
    assert (report.users, report.items, report.version) == (USERS, ITEMS, model.tower.version)
    assert {"loss", "validation_loss", "seconds"} <= set(report.epochs[0])
    assert report.epochs[report.best_epoch - 1]["validation_loss"] == min(e["validation_loss"] for e in report.epochs)
    assert model.lake.find(CHECKPOINTS, DAY) is None


def difference_from_the_saved_model(model: Model) -> float:
    """The largest difference between the tower in NumPy and the SavedModel, for users of all kinds."""
    import tensorflow as tf

    version = DAY.replace("-", "")
    with tempfile.TemporaryDirectory() as folder:
        for name, data in model.files.items():
            if name.startswith("saved_model/"):
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        loaded = tf.saved_model.load(f"{folder}/saved_model/{version}")
        call = loaded.signatures["serving_default"]
        inputs = random_inputs([f"u{n}" for n in range(USERS)], model.ids, 300, seed=4)
        encoded = model.tower.encode(inputs)
        served = call(**{name: tf.constant(values) for name, values in encoded.items()})["vector"].numpy()
    ours = model.tower.vectors(inputs)
    assert (np.abs(ours).sum(axis=1) > 0).mean() > 0.9
    return float(np.abs(ours - served).max())


def test_the_tower_without_tensorflow_equals_the_saved_model(model):
    assert difference_from_the_saved_model(model) < 1e-4


@pytest.mark.parametrize("hidden", [(), (24, 16)])
def test_a_bias_tells_how_often_an_item_is_chosen_and_both_towers_have_its_place(tmp_path, hidden):
    rows, items = planted_shop(USERS, ITEMS, events=20)
    random = np.random.default_rng(3)
    chosen = random.choice(ITEMS, len(rows), p=(shares := 0.93 ** np.arange(ITEMS)) / shares.sum())
    rows = [{**row, "item_id": f"i{n}"} for row, n in zip(rows, chosen.tolist(), strict=True)]
    model = train(tmp_path, rows, items, item_bias=True, hidden=hidden, in_batch=False, id_dropout=0.0, epochs=8)
    assert difference_from_the_saved_model(model) < 1e-4
    biases = model.items[:, -1]
    assert biases.mean() == pytest.approx(0, abs=1e-6)
    assert np.linalg.norm(model.items[:, :-1], axis=1) == pytest.approx(np.ones(ITEMS), abs=1e-5)
    counts = np.bincount(chosen, minlength=ITEMS)
    often = [counts[int(name[1:])] for name in model.ids]
    assert np.corrcoef(biases, np.log1p(often))[0, 1] > 0.8
    assert model.tower.spec.item_bias


def test_warm_up_requests_are_prediction_logs_that_fit_the_signature(model):
    import tensorflow as tf
    from tensorflow_serving.apis import prediction_log_pb2

    name = f"saved_model/{DAY.replace('-', '')}/assets.extra/tf_serving_warmup_requests"
    with tempfile.NamedTemporaryFile() as file:
        file.write(model.files[name])
        file.flush()
        records = [record.numpy() for record in tf.data.TFRecordDataset(file.name)]
    assert 1 <= len(records) <= 1000
    for record in records:
        request = prediction_log_pb2.PredictionLog.FromString(record).predict_log.request
        assert (request.model_spec.name, request.model_spec.signature_name) == ("two_tower", "serving_default")
        sizes = {len(tf.make_ndarray(tensor)) for tensor in request.inputs.values()}
        assert len(sizes) == 1
        encoded = {name: tf.make_ndarray(tensor) for name, tensor in request.inputs.items()}
        assert np.isfinite(model.tower.forward(encoded)).all()


@pytest.mark.timeout(600)
def test_a_killed_training_goes_on_and_ends_as_if_it_had_not_been_killed(model, shop, tmp_path):
    lake = Lake(str(tmp_path / "lake"))
    write_examples(lake, *shop)
    killed = train_elsewhere(tmp_path, "kill=epoch 2 of:16")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert lake.find(TWO_TOWER, DAY) is None
    report = fit_two_tower(lake, DAY, default_settings(tmp_path, two_tower=SMALL))
    assert report.resumed_at == (1, 14)
    resumed = Model(lake, report)
    assert np.array_equal(resumed.items, model.items)
    assert resumed.tower.version == model.tower.version
    assert [e["loss"] for e in report.epochs] == [e["loss"] for e in model.report.epochs]
    assert lake.find(CHECKPOINTS, DAY) is None


@pytest.fixture(scope="module")
def overfitted(shop: tuple[list[dict], list[dict]], tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model whose best epoch is followed by worse ones."""
    model = train(tmp_path_factory.mktemp("overfitted"), *shop, **OVERFITTING)
    assert model.report.best_epoch < len(model.report.epochs)
    return model


def test_the_weights_of_the_best_epoch_are_kept_however_many_worse_ones_follow(shop, tmp_path, monkeypatch):
    found = {}
    for patience in (1, 3):
        losses = iter([3.0, 2.0, 2.5, 2.6, 2.7])
        monkeypatch.setattr("recsys_core.two_tower._Training._validate", lambda _, losses=losses: next(losses))
        found[patience] = train(tmp_path / str(patience), *shop, patience=patience, learn_validation=False)
    one, two = found.values()
    assert [len(model.report.epochs) for model in (one, two)] == [3, 5]
    assert one.report.best_epoch == two.report.best_epoch == 2
    assert np.array_equal(one.items, two.items)
    assert one.tower.version == two.tower.version


@pytest.mark.timeout(600)
def test_a_training_killed_after_its_best_epoch_and_in_the_last_pass_ends_as_if_it_had_not_been_killed(
    overfitted, shop, tmp_path
):
    lake = Lake(str(tmp_path / "lake"))
    write_examples(lake, *shop)
    epoch = overfitted.report.best_epoch + 1
    for words, step in ((f"epoch {epoch} of", 20), ("newest examples", 3)):
        killed = train_elsewhere(tmp_path, f"kill={words}:{step}", **OVERFITTING)
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    resumed = Model(lake, fit_two_tower(lake, DAY, default_settings(tmp_path, two_tower={**SMALL, **OVERFITTING})))
    assert resumed.report.resumed_at == (len(overfitted.report.epochs), 0)
    assert np.array_equal(resumed.items, overfitted.items)
    assert resumed.tower.version == overfitted.tower.version


@pytest.mark.timeout(600)
def test_several_devices_and_mixed_precision_learn_the_same_clusters(shop, tmp_path):
    lake = Lake(str(tmp_path / "lake"))
    write_examples(lake, *shop)
    done = train_elsewhere(tmp_path, "cpus=2", devices=2, precision="mixed_bfloat16", batch_size=32)
    assert done.stdout.strip().endswith("trained"), done.stderr[-2000:]
    found = Model(lake).nearest(["i1", "i7", "i13"], 8)
    assert np.mean([cluster_of(name) == 1 for name in found]) >= 0.7


def test_unknown_prices_and_categories_and_missing_context_give_a_sensible_model(tmp_path):
    examples, items = planted_shop(60, 48, events=16, categories=False, seed=3)
    nothing = {"price_bucket": None, "item_age_days": np.nan, "user_recency_hours": np.nan, "device": None}
    items = [{**row, "price": np.nan, "price_bucket": None, "item_age_days": np.nan} for row in items]
    strange = [{**row, **nothing, "user_category": "no such category"} for row in examples]
    model = train(tmp_path, strange, items, epochs=6, validation_share=0, hidden=())
    assert np.isfinite(model.items).all()
    found = model.nearest(["i2", "i8", "i14"], 5)
    assert np.mean([cluster_of(name) == 2 for name in found]) >= 0.6, found


def test_one_single_user_gives_a_model(tmp_path):
    start = key_start_ms(DAY)
    examples = [example("ann", f"i{n}", start + n, [f"i{k}" for k in range(n)][::-1]) for n in range(4)]
    model = train(tmp_path, examples, [item(f"i{n}", category_of(n)) for n in range(4)], negatives=2, min_user_examples=1)
    assert np.linalg.norm(model.items, axis=1) == pytest.approx(np.ones(4), abs=1e-5)
    assert len(model.nearest(["i0"], 10, user_id="ann")) == 3


def test_only_the_newest_examples_are_learned_from_when_there_is_a_most(tmp_path, shop):
    examples, items = shop
    most = len(examples) // 3
    model = train(tmp_path, examples, items, max_examples=most, epochs=1)
    learned = learn(model.lake, DAY, default_settings(tmp_path, two_tower={**SMALL, "max_examples": most}).two_tower)
    newest = sorted(example["ts"] for example in examples)[-most]
    assert learned.from_ts == newest
    assert model.report.examples + model.report.validation_examples == sum(example["ts"] >= newest for example in examples)


def refused(home: Path, examples: list[dict], items: list[dict], **settings: Any) -> str:
    with pytest.raises(TwoTowerError) as caught:
        train(home, examples, items, **settings)
    return str(caught.value)


def test_a_day_without_examples_is_refused_and_the_former_model_stays(tmp_path):
    lake = Lake(str(tmp_path / "lake"))
    lake.write_blobs(TWO_TOWER, DAY, {"items.npy": b"of yesterday"}, 1)
    message = refused(tmp_path, [], [item("i0")])
    assert TRAINING_EXAMPLES in message
    assert DAY in message
    assert "there is no example" in message
    assert lake.read_blob(TWO_TOWER, DAY, "items.npy") == b"of yesterday"


def test_tables_that_were_never_made_are_named(tmp_path, settings):
    with pytest.raises(MissingPartition, match=TRAINING_EXAMPLES):
        fit_two_tower(Lake(str(tmp_path / "lake")), DAY, settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": float("nan")}, "weight that isn't a finite number"),
        ({"weight": 0.0}, "weight that isn't a finite number"),
        ({"user_id": None}, "1 examples have no user_id"),
        ({"item_id": None}, "1 examples have no item_id"),
        ({"item_id": "stranger"}, f"none of its items is in {ITEM_FEATURES}"),
    ],
)
def test_broken_examples_are_refused_with_the_reason(change, message, tmp_path):
    rows = [{**example("ann", "i0", key_start_ms(DAY)), **change}]
    assert message in refused(tmp_path, rows, [item("i0")])


def test_items_that_stand_twice_are_refused(tmp_path):
    rows = [example("ann", "i0", key_start_ms(DAY))]
    assert "stand twice, such as i0" in refused(tmp_path, rows, [item("i0"), item("i1"), item("i0")])


def test_a_training_that_diverges_is_refused(shop, tmp_path):
    message = refused(tmp_path, *shop, learning_rate=1e30, epochs=1, hidden=())
    assert "the training diverged in epoch 1" in message
    assert "learning_rate" in message


def test_importing_the_module_does_not_import_tensorflow():
    code = "import sys, recsys_core.two_tower, recsys_core.tower; print('tensorflow' in sys.modules, 'keras' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
