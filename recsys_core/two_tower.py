"""The two-tower model of a day: training with early stopping and checkpoints, and the files that serving needs.

    two_tower/<day>/items.parquet, items.npy           item ids and their unit vectors, float32 (n, d), row by row
    two_tower/<day>/tower.json, *.npy                  the user tower for `recsys_core.tower`
    two_tower/<day>/saved_model/<version>/…            the user tower for TensorFlow Serving, with warm-up requests

Two towers trained by a sampled softmax with logQ correction: Yi et al. 2019 (Sampling-Bias-Corrected Neural Modeling for Large
Corpus Item Recommendations). The user as the mean of the history in the table of the items: Covington et al. 2016.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from recsys_core import progress
from recsys_core.lake import Lake
from recsys_core.settings import Settings, TwoTowerSettings
from recsys_core.tower import npy_bytes
from recsys_core.two_tower_data import ITEM_FEATURES, TRAINING_EXAMPLES, Batches, TwoTowerError, learn, write_shards

if TYPE_CHECKING:
    from recsys_core.two_tower_network import Sizes, Trainer

TWO_TOWER = "two_tower"
CHECKPOINTS = "two_tower_checkpoint"
ITEMS_PARQUET = "items.parquet"
ITEMS_NPY = "items.npy"
STATE_FILE = "state.json"

Log = Callable[[dict[str, float], int], None]
"""Called after each epoch with its metrics and its number, from 1."""


@dataclass(frozen=True)
class TwoTowerReport:
    """What a training did. `seconds` is the whole of it; `examples_per_second` counts the passes over the examples alone.

    `epochs` has the metrics of each epoch, `best_epoch` (from 1) is the one whose weights were kept. `skipped` are examples of
    items that `item_features` lacks. `resumed_at` is (epoch, step) of the checkpoint that the training went on from.
    """

    version: str
    examples: int
    validation_examples: int
    skipped: int
    users: int
    items: int
    parameters: int
    epochs: list[dict[str, float]]
    best_epoch: int
    steps: int
    seconds: float
    examples_per_second: float
    resumed_at: tuple[int, int] | None


@dataclass
class _State:
    """Where a training stands: `step` batches of epoch `epoch` (from 0) are done. `phase`: train, then finish."""

    epoch: int = 0
    step: int = 0
    steps: int = 0
    loss: float = 0.0
    weight: float = 0.0
    best_loss: float = float("inf")
    best_epoch: int = 0
    worse: int = 0
    phase: str = "train"
    epochs: list[dict[str, float]] = field(default_factory=list)


def fit_two_tower(lake: Lake, day: str, settings: Settings, log: Log | None = None) -> TwoTowerReport:
    """Train on `training_examples` and `item_features` of `day` and replace partition `day` of the table `two_tower`.

    Equal tables, settings, versions and machine give equal vectors. A training that was killed goes on from its last checkpoint
    (table `two_tower_checkpoint`) and ends with the same vectors as one that was not.

    Raises MissingPartition when a table was not made, and TwoTowerError when there is nothing to train on, a row is broken
    or the training diverges. The partition of a former training then stays as it is.
    """
    started = time.perf_counter()
    learned = learn(lake, day, settings.two_tower)
    folder = settings.home.absolute() / "work" / TWO_TOWER / day
    try:
        shards = write_shards(lake, day, learned, settings.two_tower, folder)
        batches = Batches(learned, shards, settings.two_tower)
        training = _Training(lake, day, settings.two_tower, batches, log)
        training.run()
        files, version = training.export()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    state = training.state
    report = TwoTowerReport(
        version=version,
        examples=shards.rows,
        validation_examples=shards.validation_rows,
        skipped=learned.skipped,
        users=len(learned.users),
        items=len(learned.items),
        parameters=training.parameters,
        epochs=state.epochs,
        best_epoch=state.best_epoch,
        steps=state.steps,
        seconds=time.perf_counter() - started,
        examples_per_second=training.examples / max(training.seconds, 1e-9),
        resumed_at=training.resumed_at,
    )
    lake.write_blobs(TWO_TOWER, day, files, len(learned.items), {"report": asdict(report)})
    training.drop_checkpoint()
    return report


class _Training:
    """A training and its state, in the checkpoint of which a killed one is found again."""

    def __init__(self, lake: Lake, day: str, settings: TwoTowerSettings, batches: Batches, log: Log | None) -> None:
        self.lake, self.day, self.settings, self.batches, self.log = lake, day, settings, batches, log
        self.sizes, self.trainer = _start(batches, settings)
        self.devices = self.trainer.strategy.num_replicas_in_sync
        self.best: list[npt.NDArray[Any]] | None = None
        self.state = _State()
        self.seconds = 0.0
        self.examples = 0.0
        self.inputs = self._inputs()
        self.resumed_at = self._resume()

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(v.shape)) for v in self.trainer.towers.trainable_variables)

    # -- the epochs -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Epochs until the validation loss has not fallen `patience` times, then one pass over the validation part."""
        while self.state.phase == "train":
            self._epoch()
            self._checkpoint()
        if self.best is not None:
            _assign(self.trainer.towers.trainable_variables, self.best)
        if self.batches.shards.validation_rows and self.settings.learn_validation:
            self._pass(self.batches.validation(hide=True), "newest examples", self.batches.shards.validation_rows, 0)
            self._check_finite()

    def _epoch(self) -> None:
        state = self.state
        number = state.epoch + 1
        started = time.perf_counter()
        name = f"two-tower: epoch {number} of {self.settings.epochs}"
        self._pass(self.batches.epoch(state.epoch, state.step), name, self.batches.shards.rows, state.step)
        metrics = {"loss": state.loss / max(state.weight, 1e-9), "seconds": time.perf_counter() - started}
        if self.batches.shards.validation_rows:
            metrics["validation_loss"] = self._validate()
        state.epochs.append(metrics)
        if self.log is not None:
            self.log(metrics, number)
        self._check_finite()
        state.epoch, state.step, state.loss, state.weight = number, 0, 0.0, 0.0
        self._judge(metrics.get("validation_loss"))

    def _judge(self, validation_loss: float | None) -> None:
        """Keep the weights of the best epoch, and say whether there is a next one."""
        state = self.state
        if validation_loss is None or validation_loss < state.best_loss:
            state.best_epoch, state.worse = state.epoch, 0
            if validation_loss is not None:
                state.best_loss = validation_loss
                self.best = [v.numpy() for v in self.trainer.towers.trainable_variables]
        else:
            state.worse += 1
        if state.epoch >= self.settings.epochs or state.worse >= self.settings.patience:
            state.phase = "finish"

    def _pass(self, batches: Iterator[dict[str, Any]], name: str, rows: int, first_step: int) -> None:
        """Train on some batches. Losses are summed where they are and fetched at checkpoints, so that devices don't wait."""
        state, sums = self.state, []
        total = max(1, round(rows / self.settings.batch_size / self.devices))
        started = time.perf_counter()
        with progress.task(name, total) as bar:
            for batch in self._dataset(batches):
                sums.append(self.trainer.train_step(batch))
                state.steps += 1
                state.step += self.devices
                done = state.step // self.devices
                bar.update(min(done, total), total)
                every = self.settings.checkpoint_steps
                if every and done % every == 0:
                    self._sum_up(sums)
                    self._checkpoint()
        self._sum_up(sums)
        self.seconds += time.perf_counter() - started
        self.examples += max(0, rows - first_step * self.settings.batch_size)

    def _sum_up(self, sums: list[Any]) -> None:
        for loss, weight in sums:
            self.state.loss += float(loss)
            self.state.weight += float(weight)
        sums.clear()

    def _validate(self) -> float:
        sums = [self.trainer.loss_step(batch) for batch in self._dataset(self.batches.validation())]
        return sum(float(loss) for loss, _ in sums) / max(sum(float(weight) for _, weight in sums), 1e-9)

    def _dataset(self, batches: Iterator[dict[str, Any]]) -> Any:
        from recsys_core.two_tower_network import dataset_of

        return dataset_of(batches, self.trainer.strategy)

    def _check_finite(self) -> None:
        metrics = self.state.epochs[-1]
        weights = (v.numpy() for v in self.trainer.towers.trainable_variables)
        if not all(np.isfinite(value) for value in metrics.values()) or not all(np.isfinite(w).all() for w in weights):
            raise TwoTowerError(
                f"{TWO_TOWER}, partition {self.day!r}: the training diverged in epoch {len(self.state.epochs)} "
                f"(loss {metrics['loss']:g}); lower two_tower.learning_rate or use precision float32"
            )

    # -- checkpoints ------------------------------------------------------------------------------------------------------

    def _inputs(self) -> str:
        """A digest of everything that decides the outcome: a checkpoint of another one is not used."""
        import keras
        import tensorflow as tf

        versions = [self.lake.get(table, self.day).data_version for table in (TRAINING_EXAMPLES, ITEM_FEATURES)]
        parts = [self.day, versions, self.settings.model_dump(), self.devices, tf.__version__, keras.__version__]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _checkpoint(self) -> None:
        blobs = {STATE_FILE: json.dumps(asdict(self.state)).encode()}
        blobs |= {f"now/{n:04d}.npy": npy_bytes(v.numpy()) for n, v in enumerate(self.trainer.variables())}
        blobs |= {f"best/{n:04d}.npy": npy_bytes(v) for n, v in enumerate(self.best or ())}
        self.lake.write_blobs(CHECKPOINTS, self.day, blobs, self.state.steps, {"inputs": self.inputs})

    def _resume(self) -> tuple[int, int] | None:
        found = self.lake.find(CHECKPOINTS, self.day)
        if found is None or found.extra.get("inputs") != self.inputs:
            return None
        self.state = _State(**json.loads(self.lake.read_blob(CHECKPOINTS, self.day, STATE_FILE)))
        _assign(self.trainer.variables(), [self._array(name) for name in sorted(found.files) if name.startswith("now/")])
        best = [self._array(name) for name in sorted(found.files) if name.startswith("best/")]
        self.best = best or None
        return self.state.epoch, self.state.step

    def _array(self, name: str) -> npt.NDArray[Any]:
        return np.asarray(np.load(io.BytesIO(self.lake.read_blob(CHECKPOINTS, self.day, name)), allow_pickle=False))

    def drop_checkpoint(self) -> None:
        """Remove what a finished training no longer needs."""
        if self.lake.find(CHECKPOINTS, self.day) is not None:
            self.lake.fs.rm(self.lake.path(CHECKPOINTS, self.day), recursive=True)

    # -- files ------------------------------------------------------------------------------------------------------------

    def export(self) -> tuple[dict[str, bytes], str]:
        """The files of the partition, and the version of the tower."""
        from recsys_core.two_tower_export import item_vectors, saved_model_files, user_tower

        tower = user_tower(self.trainer.towers, self.batches)
        ids = io.BytesIO()
        pq.write_table(pa.table({"item_id": self.batches.learned.items.ids}), ids)
        files = {
            ITEMS_PARQUET: ids.getvalue(),
            ITEMS_NPY: npy_bytes(item_vectors(self.trainer.towers, self.batches)),
            **tower.to_files(),
            **saved_model_files(self.trainer.towers, self.sizes, tower, self.day),
        }
        return files, tower.version


def _start(batches: Batches, settings: TwoTowerSettings) -> tuple[Sizes, Trainer]:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    from recsys_core.two_tower_network import Sizes, make_trainer

    tf.config.experimental.enable_op_determinism()
    tf.random.set_seed(settings.seed)
    values = batches.learned.values
    sizes = Sizes(
        users=batches.user_table,
        items=batches.item_table,
        path_prefixes=batches.learned.items.path_prefixes,
        devices=len(values["device"]) + 1,
        countries=len(values["country"]) + 1,
        user_categories=len(values["category"]) + 1,
    )
    steps = settings.epochs * batches.steps()
    return sizes, make_trainer(sizes, settings, steps)


def _assign(variables: list[Any], values: list[npt.NDArray[Any]]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
