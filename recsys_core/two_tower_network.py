"""The two towers in Keras, their losses, and the training step. Imports TensorFlow: import it where it is used.

A step sees only the distinct rows of the embedding tables that its batch touches. They are gathered once, everything else is
dense, and their gradient goes back to those rows alone (`SparseAdam`): a step costs the same whatever the size of the tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from recsys_core.settings import TwoTowerSettings
from recsys_core.tower import EPSILON, NUMBERS
from recsys_core.two_tower_data import BATCH_TYPES, ITEM_NUMBERS, MAX_PRICE_BUCKET

CONTEXT_WIDTH = 8
CONTEXT = ("hour", "weekday", "device", "country", "category")
START_DEVIATION = 0.1
HIDDEN_LOGIT = -1e9
SCALES = ("of_user", "of_history", "of_recent")

Tensors = Mapping[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Rows of the embedding tables, and the prefixes of each category path (`two_tower_data.Items`)."""

    users: int
    items: int
    path_prefixes: npt.NDArray[np.int32]
    devices: int
    countries: int
    user_categories: int


class Towers(keras.Model):
    """Both towers over one batch (`two_tower_data.BATCH_TYPES`).

    Vectors have length 1, their inner product is their cosine. With `item_bias` that holds for all but the last component,
    which is an item's bias, and 1 for a user: the inner product is cosine plus bias.
    """

    def __init__(self, sizes: Sizes, settings: TwoTowerSettings) -> None:
        super().__init__(name="two_tower")
        self.settings = settings
        d = settings.dimension
        seeds = iter(np.random.default_rng([settings.seed, 3]).integers(0, 2**31, 64).tolist())

        def table(name: str, rows: int, width: int) -> Any:
            start = keras.initializers.RandomNormal(stddev=START_DEVIATION, seed=next(seeds))
            return self.add_weight(shape=(rows, width), initializer=start, dtype="float32", name=name)

        self.user_table = table("users", sizes.users, d)
        self.item_table = table("items", sizes.items, d)
        self.paths = sizes.path_prefixes
        self.category_table = table("item_categories", int(self.paths.max(initial=0)) + 1, d)
        rows = (24, 7, sizes.devices, sizes.countries, sizes.user_categories)
        self.context = {name: table(name, count, CONTEXT_WIDTH) for name, count in zip(CONTEXT, rows, strict=True)}
        self.price_table = table("price", MAX_PRICE_BUCKET + 2, CONTEXT_WIDTH)
        self.scales = {name: self.add_weight(shape=(), initializer="ones", dtype="float32", name=name) for name in SCALES}
        self.bias = self.add_weight(shape=(), initializer="zeros", dtype="float32", name="bias")
        units = [*settings.hidden, d] if settings.hidden else []
        self.user_layers = [self._dense(f"user_{n}", size, n == len(units) - 1, next(seeds)) for n, size in enumerate(units)]
        self.item_layers = [self._dense(f"item_{n}", size, n == len(units) - 1, next(seeds)) for n, size in enumerate(units)]
        width = d + CONTEXT_WIDTH + len(ITEM_NUMBERS) + 1
        self._build_layers(self.user_layers, 3 * d + CONTEXT_WIDTH * len(CONTEXT) + NUMBERS)
        self._build_layers(self.item_layers, width)
        self.built = True

    def _dense(self, name: str, units: int, last: bool, seed: int) -> Any:
        return keras.layers.Dense(
            units,
            activation=None if last else "relu",
            kernel_initializer=keras.initializers.GlorotUniform(seed=seed),
            dtype=self.settings.precision,
            name=name,
        )

    @staticmethod
    def _build_layers(layers: list[Any], width: int) -> None:
        for layer in layers:
            layer.build((None, width))
            width = layer.units

    def gather(self, batch: Tensors) -> tuple[Any, Any]:
        """The distinct rows of both embedding tables that the batch touches."""
        return tf.gather(self.user_table, batch["user_rows"]), tf.gather(self.item_table, batch["item_rows"])

    def embed(self, item_rows: Any, path: Any) -> Any:
        """Id embedding (n, d) plus the mean of those of the category's prefixes: what stands for an item everywhere."""
        if not self.paths.any():
            return item_rows
        # Items have far fewer paths than there are items: their embeddings are made first.
        present = (self.paths > 0).astype(np.float32)[:, :, None]
        found = tf.gather(self.category_table, self.paths) * present
        return item_rows + tf.gather(tf.reduce_sum(found, axis=1) / np.maximum(present.sum(axis=1), 1), path)

    def users(self, own: Any, pooled: Any, newest: Any, batch: Tensors, seed: Any = None) -> Any:
        """Vectors (b, d) from the user's own embedding, the means of history and newest items, and the context."""
        own = self.scales["of_user"] * own if self.settings.user_ids else tf.zeros_like(own)
        pooled, newest = self.scales["of_history"] * pooled, self.scales["of_recent"] * newest
        result = own + pooled + newest
        if self.user_layers:
            context = [tf.gather(self.context[name], batch[name]) for name in CONTEXT]
            x = tf.concat([own, pooled, newest, *context, batch["numbers"]], axis=1)
            result += self._through(self.user_layers, x, seed, 0)
        return self._vectors(result, tf.ones_like(result[:, -1:]))

    def items(self, embedded: Any, price: Any, numbers: Any, seed: Any = None) -> Any:
        """Vectors (n, d) from `embed`, rows of the price and standardised numbers."""
        result = embedded
        if self.item_layers:
            x = tf.concat([embedded, tf.gather(self.price_table, price), numbers], axis=1)
            result += self._through(self.item_layers, x, seed, 100)
        return self._vectors(result, result[:, -1:])

    def _vectors(self, x: Any, last: Any) -> Any:
        return tf.concat([_unit(x[:, :-1]), last], axis=1) if self.settings.item_bias else _unit(x)

    def _through(self, layers: list[Any], x: Any, seed: Any, salt: int) -> Any:
        for n, layer in enumerate(layers):
            x = layer(x)
            if seed is not None and self.settings.dropout and n < len(layers) - 1:
                x = tf.nn.experimental.stateless_dropout(x, self.settings.dropout, seed=seed + salt + n)
        return tf.cast(x, tf.float32)

    def batch_vectors(self, gathered: tuple[Any, Any], batch: Tensors, training: bool) -> tuple[Any, Any]:
        """Vectors of the users (b, d), and of the positives and negatives (b + n, d)."""
        user_rows, item_rows = gathered
        seed = batch["seed"] if training else None
        embedded = self.embed(tf.gather(item_rows, batch["row_at"]), batch["path"])
        b = tf.size(batch["weight"])
        pooled = _mean_of(embedded, batch["history"], batch["segments"], b)
        newest = _mean_of(embedded, batch["recent"], batch["recent_segments"], b)
        users = self.users(tf.gather(user_rows, batch["user_at"]), pooled, newest, batch, seed)
        items = self.items(tf.gather(embedded, batch["item"]), batch["price"], batch["item_numbers"], seed)
        return users, items

    def loss_of(self, users: Any, items: Any, batch: Tensors) -> Any:
        """The loss of each example, (b,)."""
        b = tf.shape(users)[0]
        positives = items[:b]
        candidates = items if self.settings.in_batch else items[b:]
        scores = tf.matmul(users, candidates, transpose_b=True)
        own = tf.reduce_sum(users * positives, axis=1)
        # With the batch's items as candidates the diagonal is the positive itself.
        hidden = batch["hidden"]
        if self.settings.in_batch:
            diagonal = tf.range(b)
            hidden = tf.concat([hidden, tf.stack([diagonal, diagonal], axis=1)], axis=0)
        return LOSSES[self.settings.loss](own, scores, hidden, batch, self)


def _unit(x: Any) -> Any:
    return x * tf.math.rsqrt(tf.maximum(tf.reduce_sum(x * x, axis=1, keepdims=True), EPSILON))


def _mean_of(embedded: Any, places: Any, segments: Any, count: Any) -> Any:
    """Mean of some rows for each segment, (count, d), zeros for empty ones.

    One more segment of one row is added and cut off again: without any row, the gradient of TensorFlow's kernel is memory that
    was never written (2.21, SparseSegmentMeanGrad).
    """
    places, segments = tf.concat([places, [0]], axis=0), tf.concat([segments, [count]], axis=0)
    return tf.sparse.segment_mean(embedded, places, segments, num_segments=count + 1)[:count]


def _hide(values: Any, hidden: Any, by: float) -> Any:
    return tf.tensor_scatter_nd_update(values, hidden, tf.fill([tf.shape(hidden)[0]], tf.constant(by, values.dtype)))


def _softmax(own: Any, scores: Any, hidden: Any, batch: Tensors, towers: Towers) -> Any:
    """Sampled softmax, accidental hits left out (Bengio, Senécal 2008; Yi et al. 2019).

    `correction` is what is taken from the scores: logQ, less the logarithm of the item's propensity.
    """
    temperature = towers.settings.temperature
    logits = _hide(scores / temperature - batch["correction"][None, :], hidden, HIDDEN_LOGIT)
    label = own / temperature - batch["correction_label"]
    return tf.reduce_logsumexp(tf.concat([label[:, None], logits], axis=1), axis=1) - label


def _binary(own: Any, scores: Any, hidden: Any, batch: Tensors, towers: Towers) -> Any:  # noqa: ARG001
    """Binary cross-entropy: the positive pair against 1, and the mean over the negatives against 0."""
    logits = scores / towers.settings.temperature + towers.bias
    costs = _hide(tf.nn.softplus(logits), hidden, 0.0)
    return tf.nn.softplus(-(own / towers.settings.temperature + towers.bias)) + _mean_over_negatives(costs, hidden)


def _contrastive(own: Any, scores: Any, hidden: Any, batch: Tensors, towers: Towers) -> Any:  # noqa: ARG001
    """Cosine contrastive loss (Mao et al. 2021, SimpleX, eq. 3)."""
    costs = _hide(tf.nn.relu(scores - towers.settings.margin), hidden, 0.0)
    return 1 - own + towers.settings.negative_weight * _mean_over_negatives(costs, hidden)


def _mean_over_negatives(costs: Any, hidden: Any) -> Any:
    gone = tf.math.bincount(hidden[:, 0], minlength=tf.shape(costs)[0], maxlength=tf.shape(costs)[0], dtype=tf.float32)
    return tf.reduce_sum(costs, axis=1) / tf.maximum(tf.cast(tf.shape(costs)[1], tf.float32) - gone, 1.0)


LOSSES: dict[str, Callable[..., Any]] = {"softmax": _softmax, "binary": _binary, "contrastive": _contrastive}


class SparseAdam(keras.optimizers.Adam):
    """Adam (Kingma, Ba 2015) that leaves rows of a table, and their moments, alone in steps that don't touch them."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        if not isinstance(gradient, tf.IndexedSlices):
            super().update_step(gradient, variable, learning_rate)
            return
        rows, found = gradient.indices, gradient.values
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            # A batch has each row once, but several devices may bring a gradient of the same row.
            rows, at = tf.unique(rows)
            found = tf.math.unsorted_segment_sum(found, at, tf.size(rows))
        index = self._get_variable_index(variable)
        step = tf.cast(self.iterations + 1, tf.float32)
        alpha = tf.cast(learning_rate, tf.float32) * tf.sqrt(1 - self.beta_2**step) / (1 - self.beta_1**step)
        first, second = self._momentums[index].value, self._velocities[index].value
        m = self.beta_1 * tf.gather(first, rows) + (1 - self.beta_1) * found
        v = self.beta_2 * tf.gather(second, rows) + (1 - self.beta_2) * found * found
        first.scatter_update(tf.IndexedSlices(m, rows))
        second.scatter_update(tf.IndexedSlices(v, rows))
        variable.scatter_sub(tf.IndexedSlices(alpha * m / (tf.sqrt(v) + self.epsilon), rows))


@dataclass
class Trainer:
    """Model, optimizer and compiled steps on one device, or on several that each take a batch (`tf.distribute`)."""

    towers: Towers
    optimizer: Any
    strategy: Any
    train_step: Callable[[Any], Any]
    loss_step: Callable[[Any], Any]

    def variables(self) -> list[Any]:
        """Everything that training changes, in a fixed order: the model's variables, then the optimizer's."""
        return [*self.towers.trainable_variables, *self.optimizer.variables]


def make_trainer(sizes: Sizes, settings: TwoTowerSettings, total_steps: int) -> Trainer:
    """A trainer with start values of the seed; the learning rate falls along a cosine over `total_steps`."""
    strategy = _strategy(settings.devices)
    with strategy.scope():
        towers = Towers(sizes, settings)
        rate = keras.optimizers.schedules.CosineDecay(
            settings.learning_rate, max(1, total_steps), alpha=settings.final_learning_rate
        )
        optimizer: Any = SparseAdam(rate)
        if settings.precision == "mixed_float16":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        optimizer.build(towers.trainable_variables)
    return Trainer(towers, optimizer, strategy, *_steps(towers, optimizer, strategy))


def _strategy(devices: int) -> Any:
    """MirroredStrategy over the first `devices` GPUs, or CPUs where there is no GPU. Raises ValueError when there are fewer."""
    if devices == 1:
        return tf.distribute.get_strategy()
    found = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    if devices > len(found):
        raise ValueError(f"two_tower.devices = {devices}, but TensorFlow sees {', '.join(d.name for d in found)}")
    return tf.distribute.MirroredStrategy([d.name for d in found[: devices or None]])


def _steps(towers: Towers, optimizer: Any, strategy: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    variables = towers.trainable_variables
    tables = [id(towers.user_table), id(towers.item_table)]
    dense = [v for v in variables if id(v) not in tables]

    def on_device(batch: Tensors) -> Any:
        with tf.GradientTape() as tape:
            gathered = towers.gather(batch)
            for rows in gathered:
                tape.watch(rows)
            losses = towers.loss_of(*towers.batch_vectors(gathered, batch, training=True), batch)
            total = tf.reduce_sum(batch["weight"])
            loss = tf.reduce_sum(losses * batch["weight"]) / total
            target = loss / strategy.num_replicas_in_sync
            if towers.settings.l2:
                target += towers.settings.l2 * sum(tf.reduce_sum(rows * rows) for rows in gathered)
            if towers.settings.precision == "mixed_float16":
                target = optimizer.scale_loss(target)
        users, items, *others = map(
            tf.convert_to_tensor,
            tape.gradient(target, [*gathered, *(v.value for v in dense)], unconnected_gradients=tf.UnconnectedGradients.ZERO),
        )
        slices = [
            (tf.IndexedSlices(users, batch["user_rows"], tf.shape(towers.user_table)), towers.user_table),
            (tf.IndexedSlices(items, batch["item_rows"], tf.shape(towers.item_table)), towers.item_table),
        ]
        pairs = [*slices, *zip(others, dense, strict=True)]
        optimizer.apply([g for g, _ in pairs], [v for _, v in pairs])
        return loss * total, total

    def on_device_without_training(batch: Tensors) -> Any:
        losses = towers.loss_of(*towers.batch_vectors(towers.gather(batch), batch, training=False), batch)
        return tf.reduce_sum(losses * batch["weight"]), tf.reduce_sum(batch["weight"])

    def over_devices(run: Callable[[Tensors], Any]) -> Callable[[Any], Any]:
        @tf.function(reduce_retracing=True, autograph=False)
        def step(batch: Any) -> Any:
            sums = strategy.run(run, args=(batch,))
            return [strategy.reduce(tf.distribute.ReduceOp.SUM, value, axis=None) for value in sums]

        return step

    return over_devices(on_device), over_devices(on_device_without_training)


def dataset_of(batches: Iterator[Mapping[str, Any]], strategy: Any) -> Any:
    """Batches as a dataset that a thread fills while a step computes; one for each device, the last ones again if need be."""
    types = {name: tf.TensorSpec(shape, kind) for name, (kind, shape) in BATCH_TYPES.items()}
    devices = strategy.num_replicas_in_sync

    def for_all_devices() -> Iterator[Mapping[str, Any]]:
        group: list[Mapping[str, Any]] = []
        for batch in batches:
            group.append(batch)
            if len(group) == devices:
                yield from group
                group = []
        if group:
            yield from itertools.islice(itertools.cycle(group), devices)

    def made(_context: Any = None) -> Any:
        return tf.data.Dataset.from_generator(for_all_devices, output_signature=types).prefetch(2 * devices)

    return made() if devices == 1 else strategy.distribute_datasets_from_function(made)
