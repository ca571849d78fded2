"""A trained two-tower model as files: item vectors, the user tower in NumPy, and a SavedModel with warm-up requests.

Imports TensorFlow: import it where it is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from recsys_core.tower import COUNTS, NUMBERS, TABLES, TowerSpec, UserTower
from recsys_core.two_tower_data import Batches
from recsys_core.two_tower_network import CONTEXT, SCALES, Sizes, Towers

EXPORT_ROWS = 8192
SIGNATURE = "serving_default"
OUTPUT = "vector"
MODEL_NAME = "two_tower"
WARM_UP_FILE = "assets.extra/tf_serving_warmup_requests"
WARM_UP_BATCHES = (1, 2, 8, 64)

TABLE_OF_CONTEXT = dict(zip(CONTEXT, ("hours", "weekdays", "devices", "countries", "categories"), strict=True))


def array_of(variable: Any) -> npt.NDArray[Any]:
    """The values of a variable, read-only. On a CPU they lie in TensorFlow's own memory: `numpy()` would copy them twice."""
    return np.asarray(memoryview(tf.convert_to_tensor(variable.value)))


def item_vectors(towers: Towers, batches: Batches) -> npt.NDArray[np.float32]:
    """Vectors of all items as of the end of the day, float32 (n, d). The mean bias is 0: that of an item without a vector."""
    items = batches.learned.items
    numbers = batches.learned.item_numbers
    found = np.empty((len(items), towers.settings.dimension), np.float32)
    for at in range(0, len(items), EXPORT_ROWS):
        rows = slice(at, at + EXPORT_ROWS)
        found[rows] = towers.items(_embedded(towers, batches, rows), items.price[rows], numbers[rows]).numpy()
    if towers.settings.item_bias:
        found[:, -1] -= found[:, -1].mean()
    return found


def _embedded(towers: Towers, batches: Batches, rows: slice) -> Any:
    return towers.embed(tf.gather(towers.item_table, batches.item_rows[rows]), batches.learned.items.path[rows])


def user_tower(towers: Towers, batches: Batches) -> UserTower:
    """The user tower for serving; its version is a digest of its content."""
    learned, settings = batches.learned, towers.settings
    history = np.zeros((len(learned.items) + 1, settings.dimension), np.float32)
    for at in range(0, len(learned.items), EXPORT_ROWS):
        rows = slice(at, at + EXPORT_ROWS)
        history[1:][rows] = _embedded(towers, batches, rows).numpy()
    arrays: dict[str, Any] = {
        "user_ids": learned.users.known,
        "item_ids": learned.items.vocabulary.known,
        "users": array_of(towers.user_table) if settings.user_ids else np.zeros((1, settings.dimension), np.float32),
        "history": history,
        **{TABLE_OF_CONTEXT[name]: table.numpy() for name, table in towers.context.items()},
    }
    of_user, of_history, of_recent = (towers.scales[name].numpy() for name in SCALES)
    spec = TowerSpec(
        dimension=settings.dimension,
        history=settings.history,
        recent=settings.recent,
        layers=len(towers.user_layers),
        devices=learned.values["device"],
        countries=learned.values["country"],
        categories=learned.values["category"],
        scales=(float(of_user), float(of_history), float(of_recent)),
        center=learned.center,
        spread=learned.spread,
        item_bias=settings.item_bias,
    )
    dense = [(layer.kernel.numpy(), layer.bias.numpy()) for layer in towers.user_layers]
    tower = UserTower(spec, {name: arrays[name] for name in TABLES}, dense)
    return UserTower(replace(spec, version=_digest(tower.files())), tower.tables, dense)


def _digest(files: Iterable[tuple[str, bytes]]) -> str:
    digest = hashlib.sha256()
    for name, content in files:
        digest.update(name.encode() + b"\0" + len(content).to_bytes(8, "little"))
        digest.update(content)
        del content
    return digest.hexdigest()[:16]


class _Served(tf.Module):
    """The user tower behind the signature of a SavedModel. Holds the variables of the user's side alone.

    The tables of users and history are those of `tower`; of `towers`, only the layers, scales and context are used.
    """

    def __init__(self, towers: Towers, tower: UserTower) -> None:
        super().__init__(name=MODEL_NAME)
        layers = [v for layer in towers.user_layers for v in layer.variables]
        self.used = [v.value for v in (*towers.context.values(), *towers.scales.values(), *layers)]
        self.users = tf.Variable(tower.tables["users"], trainable=False, name="users")
        self.history = tf.Variable(tower.tables["history"], trainable=False, name="history")
        newest = towers.settings.recent

        @tf.function(input_signature=[_signature()], autograph=False)
        def vectors(inputs: dict[str, Any]) -> dict[str, Any]:
            present = inputs["history"] > 0
            gathered = tf.gather(self.history, inputs["history"])
            own = tf.gather(self.users, inputs["user"])
            pooled = _mean(gathered, present)
            recent = _mean(gathered[:, :newest], present[:, :newest])
            known = (inputs["user"] > 0) | tf.reduce_any(present, axis=1)
            return {OUTPUT: towers.users(own, pooled, recent, inputs) * tf.cast(known, tf.float32)[:, None]}

        self.vectors = vectors


def _mean(gathered: Any, present: Any) -> Any:
    count = tf.reduce_sum(tf.cast(present, tf.float32), axis=1, keepdims=True)
    return tf.reduce_sum(gathered, axis=1) / tf.maximum(count, 1.0)


def _signature() -> dict[str, Any]:
    """What `UserTower.encode` gives."""
    inputs = {name: tf.TensorSpec((None,), tf.int32, name=name) for name in ("user", *CONTEXT)}
    inputs["history"] = tf.TensorSpec((None, None), tf.int32, name="history")
    inputs["numbers"] = tf.TensorSpec((None, NUMBERS), tf.float32, name="numbers")
    return inputs


def save_model(trained: Towers, sizes: Sizes, tower: UserTower, folder: Path) -> None:
    """A SavedModel in `folder`, with warm-up requests where TensorFlow Serving looks for them.

    The layers compute in float32, whatever the precision of the training.
    """
    towers = Towers(replace(sizes, users=1, items=1), trained.settings.model_copy(update={"precision": "float32"}))
    tables = (trained.user_table, trained.item_table)
    for to, value in zip(towers.trainable_variables, trained.trainable_variables, strict=True):
        if not any(value is table for table in tables):
            to.assign(value)
    served = _Served(towers, tower)
    tf.saved_model.save(served, str(folder), signatures={SIGNATURE: served.vectors})
    warm_up = folder / WARM_UP_FILE
    warm_up.parent.mkdir(exist_ok=True)
    _write_warm_up(warm_up, tower)


def _write_warm_up(path: Path, tower: UserTower) -> None:
    """Requests of several batch sizes, so that a server has traced and allocated everything before it takes traffic."""
    with tf.io.TFRecordWriter(str(path)) as out:
        for size in WARM_UP_BATCHES:
            history = 1 + np.arange(size * tower.spec.history).reshape(size, -1) % max(1, len(tower.tables["item_ids"]))
            inputs: dict[str, Any] = {name: np.zeros(size, np.int32) for name in ("user", *CONTEXT)}
            inputs["history"] = history.astype(np.int32)
            inputs["numbers"] = tower.spec.numbers(np.zeros((size, len(COUNTS)), np.float32))
            out.write(predict_log(inputs))


def predict_log(inputs: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """A `tensorflow.serving.PredictionLog` with one PredictRequest, in protobuf's wire format.

    Field numbers are those of prediction_log.proto, predict.proto and model.proto; the package with their generated code
    is not needed to write them.
    """
    model = _field(1, MODEL_NAME.encode()) + _field(3, SIGNATURE.encode())
    request = _field(1, model)
    for name, values in sorted(inputs.items()):
        tensor = tf.make_tensor_proto(values).SerializeToString(deterministic=True)
        request += _field(2, _field(1, name.encode()) + _field(2, tensor))
    return _field(6, _field(1, request))


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
