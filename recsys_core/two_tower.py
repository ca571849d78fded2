"""The two-tower model of a day: training with early stopping and checkpoints, and the files that serving needs.

    two_tower/<day>/items.parquet, items.npy           item ids and their vectors, float32 (n, d), row by row
    two_tower/<day>/tower.json, *.npy                  the user tower for `recsys_core.tower`
    two_tower/<day>/saved_model/<version>/…            the user tower for TensorFlow Serving, with warm-up requests

Two towers trained by a sampled softmax with logQ correction: Yi et al. 2019 (Sampling-Bias-Corrected Neural Modeling for Large
Corpus Item Recommendations). The user as the mean of the history in the table of the items: Covington et al. 2016.
"""

from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from recsys_core import progress
from recsys_core.lake import Lake
from recsys_core.settings import Settings, TwoTowerSettings
from recsys_core.tower import UserTower, npy_bytes
from recsys_core.two_tower_data import ITEM_FEATURES, TRAINING_EXAMPLES, Batches, TwoTowerError, learn, write_shards

if TYPE_CHECKING:
    from recsys_core.two_tower_network import Sizes, Towers, Trainer

TWO_TOWER = "two_tower"
CHECKPOINTS = "two_tower_checkpoint"
ITEMS_PARQUET = "items.parquet"
ITEMS_NPY = "items.npy"
STATE_FILE = "state.json"
NOW, BEST = "now/", "best/"
"""Folders of a checkpoint: what training changes, as it is now; the weights of the best epoch."""

Files = Iterator[tuple[str, bytes]]
"""Names and contents, each made when it is asked for."""

Log = Callable[[dict[str, float], int], None]
"""Called after each epoch with its metrics and its number, from 1."""


@dataclass(frozen=True)
class TwoTowerReport:
    """What a training did. `seconds` is the whole of it; `examples_per_second` counts the passes over the examples alone.

    `epochs` has the metrics of each epoch, `best_epoch` (from 1) is the one whose weights were kept. `skipped` are examples of
    items that `item_features` lacks, `repeats` those of items that the user's history has. `resumed_at` is (epoch, step) of
    the checkpoint that the training went on from.
    """

    version: str
    examples: int
    validation_examples: int
    skipped: int
    repeats: int
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
        towers = training.run()
        files, version = _export(towers, training.sizes, batches, day, folder / "saved_model")
        state = training.state
        report = TwoTowerReport(
            version=version,
            examples=shards.rows,
            validation_examples=shards.validation_rows,
            skipped=learned.skipped,
            repeats=learned.repeats,
            users=len(learned.users),
            items=len(learned.items),
            parameters=sum(int(np.prod(v.shape)) for v in towers.trainable_variables),
            epochs=state.epochs,
            best_epoch=state.best_epoch,
            steps=state.steps,
            seconds=time.perf_counter() - started,
            examples_per_second=training.examples / max(training.seconds, 1e-9),
            resumed_at=training.resumed_at,
        )
        lake.write_blobs(TWO_TOWER, day, files, len(learned.items), {"report": asdict(report)})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    training.drop_checkpoint()
    return report


class _Training:
    """A training and its state, in the checkpoint of which a killed one is found again."""

    def __init__(self, lake: Lake, day: str, settings: TwoTowerSettings, batches: Batches, log: Log | None) -> None:
        self.lake, self.day, self.settings, self.batches, self.log = lake, day, settings, batches, log
        self.sizes, self.trainer = _start(batches, settings)
        self.devices = self.trainer.strategy.num_replicas_in_sync
        self.state = _State()
        self.seconds = 0.0
        self.examples = 0.0
        self.inputs = self._inputs()
        self.resumed_at = self._resume()

    # -- the epochs -------------------------------------------------------------------------------------------------------

    def run(self) -> Towers:
        """Epochs until the validation loss has not fallen `patience` times, then one pass over the validation part.

        Gives the trained towers. The trainer goes, and with it the optimizer's moments: twice the memory of the weights.
        """
        while self.state.phase == "train":
            self._epoch()
            self._checkpoint()
        towers = self.trainer.towers
        if self.state.best_epoch < self.state.epoch:
            _assign(towers.trainable_variables, self._saved(BEST))
        if self.batches.shards.validation_rows and self.settings.learn_validation:
            self._pass(self.batches.validation(hide=True), "newest examples", self.batches.shards.validation_rows, 0)
            self._check_finite()
        del self.trainer
        gc.collect()
        return towers

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
        """Whether this epoch is the best one so far, and whether there is a next one."""
        state = self.state
        if validation_loss is None or validation_loss < state.best_loss:
            state.best_epoch, state.worse = state.epoch, 0
            if validation_loss is not None:
                state.best_loss = validation_loss
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
            for sum_of_batch in self._steps(self.trainer.train_step, batches):
                sums.append(sum_of_batch)
                state.steps += 1
                state.step += self.devices
                done = state.step // self.devices
                bar.update(min(done, total), total)
                # The last pass begins anew when it was cut off: it starts from the weights of the best epoch.
                every = self.settings.checkpoint_steps
                if every and done % every == 0 and state.phase == "train":
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
        sums = list(self._steps(self.trainer.loss_step, self.batches.validation()))
        return sum(float(loss) for loss, _ in sums) / max(sum(float(weight) for _, weight in sums), 1e-9)

    def _steps(self, step: Any, batches: Iterator[dict[str, Any]]) -> Iterator[Any]:
        """What a step gives for each batch.

        It is compiled once, for batches of any size. Compiled for the sizes of the first batches that come, it would round
        otherwise after a resumption, which begins with other batches.
        """
        from recsys_core.two_tower_network import dataset_of

        dataset = dataset_of(batches, self.trainer.strategy)
        compiled = step.get_concrete_function(dataset.element_spec)
        for batch in dataset:
            yield compiled(batch)

    def _check_finite(self) -> None:
        from recsys_core.two_tower_export import array_of

        metrics = self.state.epochs[-1]
        weights = self.trainer.towers.trainable_variables
        if not all(np.isfinite(v) for v in metrics.values()) or not all(np.isfinite(array_of(w)).all() for w in weights):
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
        self.lake.write_blobs(CHECKPOINTS, self.day, self._blobs(), self.state.steps, {"inputs": self.inputs})

    def _blobs(self) -> Files:
        """The files of a checkpoint. The weights of the best epoch are on disk alone, and only while a worse one may follow."""
        from recsys_core.two_tower_export import array_of

        state = self.state
        yield STATE_FILE, json.dumps(asdict(state)).encode()
        for n, variable in enumerate(self.trainer.variables()):
            yield f"{NOW}{n:04d}.npy", npy_bytes(array_of(variable))
        if state.best_epoch == state.epoch and not state.step:
            if state.phase == "train" and self.batches.shards.validation_rows:
                for n, variable in enumerate(self.trainer.towers.trainable_variables):
                    yield f"{BEST}{n:04d}.npy", npy_bytes(array_of(variable))
        elif state.best_epoch:
            for name in self._names(BEST):
                yield name, self.lake.read_blob(CHECKPOINTS, self.day, name)

    def _resume(self) -> tuple[int, int] | None:
        found = self.lake.find(CHECKPOINTS, self.day)
        if found is None or found.extra.get("inputs") != self.inputs:
            return None
        self.state = _State(**json.loads(self.lake.read_blob(CHECKPOINTS, self.day, STATE_FILE)))
        _assign(self.trainer.variables(), self._saved(NOW))
        return self.state.epoch, self.state.step

    def _names(self, folder: str) -> list[str]:
        """Files of the last checkpoint in one of its folders, in order."""
        return [name for name in sorted(self.lake.get(CHECKPOINTS, self.day).files) if name.startswith(folder)]

    def _saved(self, folder: str) -> Iterator[npt.NDArray[Any]]:
        for name in self._names(folder):
            yield np.load(io.BytesIO(self.lake.read_blob(CHECKPOINTS, self.day, name)), allow_pickle=False)

    def drop_checkpoint(self) -> None:
        """Remove what a finished training no longer needs."""
        if part := self.lake.find(CHECKPOINTS, self.day):
            self.lake.remove(part)


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


def _assign(variables: list[Any], values: Iterator[npt.NDArray[Any]]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


# -- files ----------------------------------------------------------------------------------------------------------------


def _export(towers: Towers, sizes: Sizes, batches: Batches, day: str, folder: Path) -> tuple[Files, str]:
    """The files of the partition, and the version of the tower. `folder` takes the SavedModel until its files are read."""
    from recsys_core.two_tower_export import item_vectors, save_model, user_tower

    vectors = item_vectors(towers, batches)
    tower = user_tower(towers, batches)
    save_model(towers, sizes, tower, folder / day.replace("-", ""))
    return _files(batches.learned.items.ids, vectors, tower, folder), tower.version


def _files(item_ids: pa.Array, vectors: npt.NDArray[np.float32], tower: UserTower, saved_model: Path) -> Files:
    ids = io.BytesIO()
    pq.write_table(pa.table({"item_id": item_ids}), ids)
    yield ITEMS_PARQUET, ids.getvalue()
    yield ITEMS_NPY, npy_bytes(vectors)
    yield from tower.files()
    for path in sorted(saved_model.rglob("*")):
        if path.is_file():
            yield f"saved_model/{path.relative_to(saved_model).as_posix()}", path.read_bytes()
