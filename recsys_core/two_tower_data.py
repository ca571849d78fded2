"""Training data of the two-tower model: what is known of ids and scales, shuffled shards on disk, and batches of arrays.

Two passes read `training_examples` as a stream. The first learns ids, values and scales. The second writes the examples as
numbers into shards, each example to one drawn at random; an epoch reads the shards in random order. So memory holds one shard
and one batch of the stream, whatever the number of examples, and everything follows from the seed.

A batch has the examples of a shard that follow each other in time, and its negatives are what they were then: nothing but what
the user wants tells them from the positive. Batches of a shard come in random order.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.ipc as ipc

from recsys_core import progress
from recsys_core.errors import UserError
from recsys_core.events import DAY_MS, HOUR_MS
from recsys_core.lake import Lake, MissingPartition
from recsys_core.settings import TwoTowerSettings
from recsys_core.tower import COUNTS, Vocabulary, embedding_rows, fingerprints, standardise

Array = npt.NDArray[Any]

TRAINING_EXAMPLES = "training_examples"
ITEM_FEATURES = "item_features"

ITEM_NUMBERS = ("item_age_days", "item_events_1d", "item_events_7d", "item_events_window")
"""The age comes last in the arrays, so that its absence is what `standardise` flags."""
ITEM_ORDER = (*ITEM_NUMBERS[1:], ITEM_NUMBERS[0])
CONTEXT_VALUES = {"device": "device", "country": "country", "category": "user_category"}
"""Context of a user by the name that the tower gives it -> column of `training_examples`."""
MAX_VALUES = 1_000
"""Most values of a context feature that are told apart: the most frequent ones."""
MAX_PRICE_BUCKET = 126
CATEGORY_LEVELS = 4
"""Levels of a category path that have an embedding; deeper ones are left out."""
READ_ROWS = 1 << 16
MAX_PAST = 1 << 24
"""About how many examples `Past` keeps, 32 bytes each: the first ones, which are a random part of the users."""
LEAD_MS = HOUR_MS
"""So long before its first example an item is there to be chosen; nothing says when it was published."""
NEAR = 4
"""So many batches before and after a batch tell how frequent its items are at that time."""

READ_COLUMNS = (
    "user_id", "item_id", "ts", "weight", "history", "hour", "weekday", "device", "country", "user_category", "price_bucket",
    *COUNTS, *ITEM_NUMBERS,
)  # fmt: skip

SHARD_SCHEMA = pa.schema(
    [
        pa.field("user", pa.int32()),
        pa.field("item", pa.int32()),
        pa.field("ts", pa.int64()),
        pa.field("weight", pa.float32()),
        pa.field("hour", pa.int8()),
        pa.field("weekday", pa.int8()),
        pa.field("device", pa.int16()),
        pa.field("country", pa.int16()),
        pa.field("category", pa.int16()),
        pa.field("price", pa.int16()),
        *(pa.field(f"numbers_{n}", pa.float32()) for n in range(len(COUNTS) + 1)),
        *(pa.field(f"item_numbers_{n}", pa.float32()) for n in range(len(ITEM_NUMBERS) + 1)),
        pa.field("history", pa.list_(pa.int32())),
    ]
)
"""An example as numbers: places of ids (-1: user unknown), rows of values, standardised counts, history as places."""


class TwoTowerError(UserError, ValueError):
    """The two-tower model can't be trained; the message names the table, the partition and what is wrong."""


# -- what the first pass learns -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Items:
    """The items of `item_features`, in the order of their fingerprints.

    `ids` string (n,); `path` int32 (n,), the number of the item's category path, 0 without one; `path_prefixes` int32 (paths,
    CATEGORY_LEVELS), which of `prefixes` (from 1 on) a path consists of, 0 where it is shorter; `price` int32 (n,), row of
    the price bucket; `numbers` float32 (n, 4), raw, in ITEM_ORDER, as of the end of the day.
    """

    ids: pa.Array
    vocabulary: Vocabulary
    path: npt.NDArray[np.int32]
    path_prefixes: npt.NDArray[np.int32]
    prefixes: tuple[str, ...]
    price: npt.NDArray[np.int32]
    numbers: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Past:
    """Numbers of items at their examples, from which follows what they were at any moment, and which items were there.

    Rows go by item and time: `starts` int64 (n items + 1,) are the bounds of an item's rows, `ts` int64 (m,) in ms since
    `origin`, below `span`, `numbers` float32 (m, 4), raw, in ITEM_ORDER, as of before the example, and `key` int64 (m,) has
    item and time in one number. `order` int64 (n items,) has the items as they came, at the times `born` (n items,): those
    without an example first, the others LEAD_MS before their first one.
    """

    starts: npt.NDArray[np.int64]
    ts: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.float32]
    key: npt.NDArray[np.int64]
    order: npt.NDArray[np.int64]
    born: npt.NDArray[np.int64]
    origin: int
    span: int

    @classmethod
    def of(cls, places: Array, ts: Array, numbers: Array, items: int) -> Past:
        """From examples in any order, at least one."""
        origin, span = int(ts.min()), int(np.ptp(ts)) + 1
        by_item = np.lexsort((ts, places))
        places, ts = places[by_item].astype(np.int64), ts[by_item].astype(np.int64) - origin
        starts = np.searchsorted(places, np.arange(items + 1))
        known = np.flatnonzero(starts[:-1] < starts[1:])
        born = np.full(items, -LEAD_MS)
        born[known] = ts[starts[known]] - LEAD_MS
        order = np.argsort(born, kind="stable")
        return cls(starts, ts, numbers[by_item], places * span + ts, order, born[order], origin, span)

    def living(self, moments: Array) -> npt.NDArray[np.int64]:
        """How many items of `order` are there at moments (ms), at least 1."""
        return np.maximum(1, np.searchsorted(self.born, moments - self.origin, side="right"))

    def at(self, places: Array, moments: Array, unseen: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Raw numbers float32 (k, 4) of items at moments (ms), before what happens then; `unseen` of items without examples.

        After an example the counts of the day and the week before it fall to 0 in a line, as those of evenly spread events do.
        """
        moments = np.clip(moments - self.origin, 0, self.span - 1)
        first = self.starts[places]
        latest = np.searchsorted(self.key, places * self.span + moments) - 1
        newborn = np.flatnonzero((latest < first) & (first < self.starts[places + 1]))
        known = np.flatnonzero(latest >= first)
        latest = latest[known]
        days = ((moments[known] - self.ts[latest]) / DAY_MS).astype(np.float32)
        numbers = self.numbers[latest] + np.array([0, 0, 1, 0], np.float32)
        for column, span in enumerate((1, 7)):
            numbers[:, column] = np.rint(numbers[:, column] * np.maximum(0, 1 - days / span)) + (days < span)
        numbers[:, -1] += days
        found = unseen.copy()
        found[newborn] = self.numbers[first[newborn]]
        found[known] = numbers
        return found


@dataclass(frozen=True)
class Learned:
    """What the first pass found. `counts` (n items,) are the training examples of each item.

    Examples from `from_ts` (ms) on are read: `rows` to learn from, `skipped` of unknown items, `repeats` of items that the
    user's history has. Those from `cut_ts` on are the validation part. `center` and `spread` standardise the users' counts,
    `item_center` and `item_spread` those of items (ITEM_ORDER).
    """

    items: Items
    users: Vocabulary
    values: dict[str, tuple[str, ...]]
    counts: npt.NDArray[np.int64]
    from_ts: int
    cut_ts: int
    rows: int
    skipped: int
    repeats: int
    center: tuple[float, ...]
    spread: tuple[float, ...]
    item_center: tuple[float, ...]
    item_spread: tuple[float, ...]
    past: Past

    @cached_property
    def item_numbers(self) -> npt.NDArray[np.float32]:
        """Standardised numbers of all items, float32 (n, 5), as of the end of the day."""
        return standardise(self.items.numbers, self.item_center, self.item_spread)

    @cached_property
    def newborn(self) -> npt.NDArray[np.float32]:
        """Standardised numbers of an item that was published this moment, float32 (5,)."""
        return standardise(np.zeros((1, len(ITEM_NUMBERS))), self.item_center, self.item_spread)[0]

    def numbers_at(self, places: Array, moments: Array) -> npt.NDArray[np.float32]:
        """Standardised numbers of items at moments (ms), float32 (k, 5)."""
        return standardise(self.past.at(places, moments, self.items.numbers[places]), self.item_center, self.item_spread)


def read_items(lake: Lake, day: str) -> Items:
    """The universe of items. Raises MissingPartition, and TwoTowerError when it has no item."""
    where = f"{ITEM_FEATURES}, partition {day!r}"
    if not lake.get(ITEM_FEATURES, day).rows:
        raise TwoTowerError(f"{where}: there is no item")
    table = lake.read(ITEM_FEATURES, day, ["item_id", "category", "price_bucket", *ITEM_NUMBERS]).combine_chunks()
    ids = table["item_id"].combine_chunks().cast(pa.string())
    if ids.null_count:
        raise TwoTowerError(f"{where}: {ids.null_count} rows have no item_id")
    prints = fingerprints(ids)
    known, first = np.unique(prints, return_index=True)
    if len(known) < len(prints):
        twice = ids[int(np.setdiff1d(np.arange(len(prints)), first)[0])]
        raise TwoTowerError(f"{where}: {len(prints) - len(known)} items stand twice, such as {twice}")
    rows = pa.array(first)
    paths = _category_paths(table["category"].take(rows))
    price = _integers(table["price_bucket"].take(rows), -1)
    numbers = np.stack([_floats(table[name].take(rows)) for name in ITEM_ORDER], axis=1)
    return Items(ids.take(rows), Vocabulary(known), *paths, price_rows(price), numbers)


def price_rows(bucket: Array) -> npt.NDArray[np.int32]:
    """Row of a price bucket: 0 for an unknown price."""
    return (np.clip(bucket, -1, MAX_PRICE_BUCKET) + 1).astype(np.int32)


def _category_paths(paths: Any) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], tuple[str, ...]]:
    """`path`, `path_prefixes` and `prefixes` of Items."""
    encoded: Any = pc.dictionary_encode(paths.cast(pa.string()).combine_chunks())
    split = [[level for level in path.split("/") if level.strip()][:CATEGORY_LEVELS] for path in encoded.dictionary.to_pylist()]
    found = [["/".join(levels[: depth + 1]) for depth in range(len(levels))] for levels in split]
    prefixes = tuple(sorted({prefix for path in found for prefix in path}))
    number = {prefix: row for row, prefix in enumerate(prefixes, start=1)}
    rows = np.zeros((len(found) + 1, CATEGORY_LEVELS), np.int32)
    for at, path in enumerate(found, start=1):
        rows[at, : len(path)] = [number[prefix] for prefix in path]
    return (_integers(encoded.indices, -1) + 1).astype(np.int32), rows, prefixes


def _integers(column: Any, missing: int) -> npt.NDArray[np.int64]:
    return np.asarray(pc.fill_null(column.cast(pa.int64()), missing).to_numpy(zero_copy_only=False))


def _floats(column: Any) -> npt.NDArray[np.float32]:
    """Values as float32, NaN where there is none."""
    return np.asarray(column.cast(pa.float32()).to_numpy(zero_copy_only=False), np.float32)


class _Moments:
    """Mean and standard deviation of log(1 + value) of some columns, of finite values only."""

    def __init__(self, columns: int) -> None:
        self.n, self.sum, self.squares = np.zeros(columns), np.zeros(columns), np.zeros(columns)

    def add(self, values: npt.NDArray[np.float32]) -> None:
        known = np.isfinite(values)
        logs = np.log1p(np.maximum(np.where(known, values, 0), 0, dtype=np.float64))
        self.n += known.sum(axis=0)
        self.sum += logs.sum(axis=0)
        self.squares += (logs * logs).sum(axis=0)

    def scales(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        mean = self.sum / np.maximum(self.n, 1)
        deviation = np.sqrt(np.maximum(self.squares / np.maximum(self.n, 1) - mean * mean, 0))
        return tuple(mean.tolist()), tuple(np.where(deviation > 1e-3, deviation, 1.0).tolist())


def learn(lake: Lake, day: str, settings: TwoTowerSettings) -> Learned:
    """The first pass. Raises MissingPartition, and TwoTowerError when the tables can't be trained on."""
    where = f"{TRAINING_EXAMPLES}, partition {day!r}"
    partition = lake.get(TRAINING_EXAMPLES, day)
    items = read_items(lake, day)
    dataset = lake.dataset(TRAINING_EXAMPLES, [day])
    if not partition.rows or dataset is None:
        raise TwoTowerError(f"{where}: there is no example; no event with a weight lies in its window")
    missing = [name for name in READ_COLUMNS if name not in dataset.schema.names]
    if missing:
        raise TwoTowerError(f"{where}: the columns {', '.join(missing)} are missing")
    from_ts, cut_ts, total = _times(dataset, settings)
    dataset = dataset.filter(_since(from_ts))
    counts = np.zeros(len(items), np.int64)
    users: list[tuple[Array, Array]] = []
    values: dict[str, Counter[str]] = {name: Counter() for name in CONTEXT_VALUES}
    moments, item_moments = _Moments(len(COUNTS)), _Moments(len(ITEM_NUMBERS))
    pasts: list[tuple[Array, Array, Array]] = []
    kept = rows = skipped = 0
    columns = [name for name in READ_COLUMNS if name not in ("hour", "weekday")]
    for batch in _stream(dataset, columns, total, "two-tower: reading examples"):
        _check(batch, where)
        places, ts = _places_of(batch["item_id"], items.vocabulary), _integers(batch["ts"], 0)
        known = places >= 0
        skipped += int(np.count_nonzero(~known))
        numbers = _columns(batch, ITEM_ORDER)
        if kept < MAX_PAST:
            pasts.append((places[known], ts[known], numbers[known]))
            kept += len(places)
        used = known & _is_used(batch, settings)
        rows += int(np.count_nonzero(used))
        train = used & (ts < cut_ts)
        counts += np.bincount(places[train], minlength=len(items))
        users.append(_fingerprint_counts(batch["user_id"].filter(pa.array(train))))
        if len(users) >= 64:
            users = [_merged(users)]
        for name, column in CONTEXT_VALUES.items():
            found = pc.value_counts(batch[column].cast(pa.string()))
            values[name].update({v["values"]: v["counts"] for v in found.to_pylist() if v["values"]})
        moments.add(_columns(batch, COUNTS))
        item_moments.add(numbers)
    if skipped == total:
        raise TwoTowerError(f"{where}: none of its items is in {ITEM_FEATURES} of the same day; make both anew")
    if not rows:
        raise TwoTowerError(
            f"{where}: all items are of the user's history already; two_tower.repeats learns from such examples"
        )
    prints, seen = _merged(users)
    places_of_past, times_of_past, numbers_of_past = map(np.concatenate, zip(*pasts, strict=True))
    frequent = {name: tuple(sorted(v for v, _ in _most_common(found))) for name, found in values.items()}
    return Learned(
        items,
        Vocabulary(prints[seen >= settings.min_user_examples] if settings.user_ids else prints[:0]),
        frequent,
        counts,
        from_ts,
        cut_ts,
        rows,
        skipped,
        total - rows - skipped,
        *moments.scales(),
        *item_moments.scales(),
        Past.of(places_of_past, times_of_past, numbers_of_past, len(items)),
    )


def _most_common(found: Counter[str]) -> list[tuple[str, int]]:
    return sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))[:MAX_VALUES]


def _times(dataset: ds.Dataset, settings: TwoTowerSettings) -> tuple[int, int, int]:
    """From which moment (ms) examples are learned from, from which they are the validation part, and how many are learned from.

    The validation part is the newest share; it begins after all of them when none would be left to train on.
    """
    times = np.sort(dataset.to_table(columns=["ts"])["ts"].drop_null().to_numpy())
    if not len(times):
        return 0, 0, 0
    if settings.max_examples:
        times = times[np.searchsorted(times, times[-min(settings.max_examples, len(times))]) :]
    first, last = int(times[0]), int(times[-1])
    cut = int(times[min(len(times) - 1, int(len(times) * (1 - settings.validation_share)))]) if settings.validation_share else 0
    return first, cut if cut > first else last + 1, len(times)


def _since(from_ts: int) -> ds.Expression:
    """Examples from a moment on, and broken ones without a time, which are an error."""
    return (ds.field("ts") >= from_ts) | ds.field("ts").is_null()


def _is_used(batch: pa.RecordBatch, settings: TwoTowerSettings) -> Array:
    """Which examples are learned from: those of items that the user's history has not, or all with `repeats`."""
    sizes = _integers(pc.list_value_length(batch["history"]), 0)
    used = np.ones(len(sizes), bool)
    if not settings.repeats:
        strings = [batch["item_id"].cast(pa.string()), batch["history"].flatten().cast(pa.string())]
        encoded: Any = pc.dictionary_encode(pa.concat_arrays(strings))
        own, had = np.split(_integers(encoded.indices, -1), [len(sizes)])
        rows = np.repeat(np.arange(len(sizes)), sizes)
        used[rows[own[rows] == had]] = False
    return used


def _check(batch: pa.RecordBatch, where: str) -> None:
    for name in ("user_id", "item_id", "ts"):
        if batch[name].null_count:
            raise TwoTowerError(f"{where}: {batch[name].null_count} examples have no {name}")
    weights = _floats(batch["weight"])
    if not (np.isfinite(weights) & (weights > 0)).all():
        raise TwoTowerError(f"{where}: an example has a weight that isn't a finite number above 0")


def _stream(dataset: ds.Dataset, columns: Sequence[str], rows: int, name: str) -> Iterator[pa.RecordBatch]:
    done = 0
    with progress.task(name, rows) as bar:
        for batch in dataset.to_batches(
            columns=list(columns), batch_size=READ_ROWS, batch_readahead=2, fragment_readahead=1, use_threads=True
        ):
            if batch.num_rows:
                yield batch
            done += batch.num_rows
            bar.update(done, rows)


def _columns(batch: pa.RecordBatch, names: Sequence[str]) -> npt.NDArray[np.float32]:
    return np.stack([_floats(batch[name]) for name in names], axis=1)


def _places_of(column: Any, vocabulary: Vocabulary) -> npt.NDArray[np.int32]:
    """Places of strings that repeat: each distinct one is looked up once. Nulls have place -1."""
    encoded: Any = pc.dictionary_encode(column.cast(pa.string()))
    places = np.append(vocabulary.places(encoded.dictionary), np.int32(-1))
    return places[_integers(encoded.indices, -1)]


def _fingerprint_counts(column: Any) -> tuple[Array, Array]:
    found: Any = pc.value_counts(column.cast(pa.string()))
    return fingerprints(found.field("values")), found.field("counts").to_numpy()


def _merged(parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    known, place = np.unique(np.concatenate([p for p, _ in parts]), return_inverse=True)
    seen = np.bincount(place, np.concatenate([n for _, n in parts]), len(known)).astype(np.int64)
    return known, seen


# -- shards ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shards:
    """Files of examples as numbers, and how many examples they have."""

    train: tuple[Path, ...]
    validation: tuple[Path, ...]
    rows: int
    validation_rows: int


def write_shards(lake: Lake, day: str, learned: Learned, settings: TwoTowerSettings, folder: Path) -> Shards:
    """The second pass. `folder` is emptied before."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    dataset = lake.dataset(TRAINING_EXAMPLES, [day])
    if dataset is None:
        raise MissingPartition(f"table {TRAINING_EXAMPLES!r}, partition {day!r}: made, but without any row")
    dataset = dataset.filter(_since(learned.from_ts))
    random = np.random.default_rng([settings.seed, 0])
    held_back = int(learned.rows * settings.validation_share)
    sizes = {"train": _shards_for(learned.rows, settings), "validation": _shards_for(held_back, settings)}
    rows = {"train": 0, "validation": 0}
    paths = {part: tuple(folder / f"{part}-{n:05d}.arrow" for n in range(size)) for part, size in sizes.items()}
    with ExitStack() as stack:
        writers = {
            part: [stack.enter_context(ipc.new_file(str(path), SHARD_SCHEMA)) for path in found]
            for part, found in paths.items()
        }
        total = learned.rows + learned.skipped + learned.repeats
        for batch in _stream(dataset, READ_COLUMNS, total, "two-tower: shuffling examples"):
            encoded, train = _encode(batch, learned, settings)
            for part, chosen in (("train", train), ("validation", ~train)):
                _scatter(encoded, np.flatnonzero(chosen), writers[part], random)
                rows[part] += int(np.count_nonzero(chosen))
    if not rows["train"]:
        raise TwoTowerError(f"{TRAINING_EXAMPLES}, partition {day!r}: no example is left to train on")
    return Shards(paths["train"], paths["validation"], rows["train"], rows["validation"])


def _shards_for(rows: int, settings: TwoTowerSettings) -> int:
    return max(1, -(-rows // settings.shuffle_rows))


def _scatter(encoded: pa.RecordBatch, rows: Array, writers: Sequence[Any], random: np.random.Generator) -> None:
    shard = random.integers(0, len(writers), len(rows))
    order = np.argsort(shard, kind="stable")
    bounds = np.searchsorted(shard[order], np.arange(len(writers) + 1))
    for n, writer in enumerate(writers):
        if bounds[n + 1] > bounds[n]:
            writer.write_batch(encoded.take(pa.array(rows[order[bounds[n] : bounds[n + 1]]])))


def _encode(batch: pa.RecordBatch, learned: Learned, settings: TwoTowerSettings) -> tuple[pa.RecordBatch, Array]:
    """Examples as numbers, without those that are not learned from; which are for training."""
    places = _places_of(batch["item_id"], learned.items.vocabulary)
    used = (places >= 0) & _is_used(batch, settings)
    batch, places = batch.filter(pa.array(used)), places[used]
    columns: dict[str, Any] = {
        "user": _places_of(batch["user_id"], learned.users),
        "item": places,
        "ts": _integers(batch["ts"], 0),
        "weight": _floats(batch["weight"]),
        "hour": np.clip(_integers(batch["hour"], 0), 0, 23),
        "weekday": np.clip(_integers(batch["weekday"], 0), 0, 6),
        "price": price_rows(_integers(batch["price_bucket"], -1)),
    }
    for name, column in CONTEXT_VALUES.items():
        rows = pc.index_in(batch[column].cast(pa.string()), pa.array(learned.values[name], pa.string()))
        columns[name] = _integers(rows, -1) + 1
    numbers = standardise(_columns(batch, COUNTS), learned.center, learned.spread)
    item_numbers = standardise(_columns(batch, ITEM_ORDER), learned.item_center, learned.item_spread)
    columns |= {f"numbers_{n}": numbers[:, n] for n in range(numbers.shape[1])}
    columns |= {f"item_numbers_{n}": item_numbers[:, n] for n in range(item_numbers.shape[1])}
    columns["history"] = _encode_history(batch["history"], learned.items.vocabulary, settings.history)
    arrays = [
        columns[field.name] if field.name == "history" else pa.array(columns[field.name]).cast(field.type)
        for field in SHARD_SCHEMA
    ]
    return pa.record_batch(arrays, schema=SHARD_SCHEMA), _integers(batch["ts"], 0) < learned.cut_ts


def _encode_history(lists: Any, vocabulary: Vocabulary, longest: int) -> pa.Array:
    """Lists of the places of known items, newest first, at most `longest`."""
    sizes = _integers(pc.list_value_length(lists), 0)
    places = _places_of(lists.flatten(), vocabulary)
    rows = np.repeat(np.arange(len(sizes)), sizes)
    known = places >= 0
    rank: Array = np.cumsum(known) - known
    before = np.append(0, np.cumsum(np.bincount(rows[known], minlength=len(sizes))))
    kept = known & (rank - before[rows] < longest)
    offsets = np.append(0, np.cumsum(np.bincount(rows[kept], minlength=len(sizes)))).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(places[kept], pa.int32()))


def _stacked(encoded: Any, prefix: str, columns: int) -> npt.NDArray[np.float32]:
    return np.stack([np.asarray(encoded[f"{prefix}_{n}"]) for n in range(columns)], axis=1)


# -- batches --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batches:
    """Examples of `shards` as the arrays that a step takes (BATCH_TYPES); the order follows from the seed and the epoch."""

    learned: Learned
    shards: Shards
    settings: TwoTowerSettings

    @cached_property
    def item_rows(self) -> npt.NDArray[np.int32]:
        """Row of each item in the embedding table: 0 for items that training never had as the answer."""
        order = np.cumsum(self.learned.counts > 0) - 1
        buckets = max(1, min(int((self.learned.counts > 0).sum()), self.settings.item_buckets))
        return np.where(self.learned.counts > 0, 1 + order % buckets, 0).astype(np.int32)

    @property
    def item_table(self) -> int:
        """Rows of the item embedding."""
        return int(self.item_rows.max(initial=0)) + 1

    @property
    def user_table(self) -> int:
        """Rows of the user embedding."""
        return min(len(self.learned.users), self.settings.user_buckets) + 1

    @cached_property
    def shares(self) -> npt.NDArray[np.float64]:
        """Share of each item among the training examples."""
        return self.learned.counts / max(1, self.learned.counts.sum())

    def steps(self) -> int:
        """Batches of an epoch, about: shards differ a little in size."""
        return max(1, round(self.shards.rows / self.settings.batch_size))

    def epoch(self, number: int, skip: int = 0) -> Iterator[dict[str, Array]]:
        """The batches of a pass over the training part, without the first `skip`."""
        yield from self._pass(self.shards.train, number, skip, hide=True, most=None)

    def validation(self, hide: bool = False, number: int = 0) -> Iterator[dict[str, Array]]:
        """The validation part: at most `validation_rows` with all ids shown; everything, as for training, with `hide`."""
        most = None if hide else self.settings.validation_rows
        yield from self._pass(self.shards.validation, 1_000_000 + number, 0, hide=hide, most=most)

    def _pass(self, files: Sequence[Path], number: int, skip: int, hide: bool, most: int | None) -> Iterator[dict[str, Array]]:
        random = np.random.default_rng([self.settings.seed, 1, number])
        at = seen = 0
        for file in random.permutation(len(files)).tolist():
            shard = _read_shard(files[file])
            order = random.permutation(len(shard["user"]))[: None if most is None else max(0, most - seen)]
            seen += len(order)
            order = order[np.argsort(shard["ts"][order], kind="stable")]
            bounds = np.linspace(0, len(order), 1 + -(-len(order) // self.settings.batch_size)).astype(int)
            for n in random.permutation(len(bounds) - 1).tolist():
                if at >= skip:
                    before, rows, after = np.split(order, bounds[n : n + 2])
                    near = np.concatenate([before[-NEAR * len(rows) :], after[: NEAR * len(rows)]])
                    drawn = np.random.default_rng([self.settings.seed, 2, number, at])
                    yield self._batch(shard, rows, near, drawn, hide)
                at += 1

    def _batch(
        self, shard: dict[str, Array], rows: Array, near: Array, random: np.random.Generator, hide: bool
    ) -> dict[str, Array]:
        history, segments, rank = _ragged(shard["offsets"], shard["values"], rows)
        places = shard["item"][rows].astype(np.int64)
        negatives, moments, living = self._drawn(shard["ts"][rows], random)
        used, where = _distinct(len(self.learned.items), history, places, negatives)
        pooled = random.random(len(history)) >= (self.settings.history_dropout if hide else 0)
        newest = rank < self.settings.recent
        users, user_at = self._user_rows(shard["user"][rows], random, hide)
        table_rows = self.item_rows[used]
        shown = np.concatenate([places, negatives])
        item_numbers = np.concatenate([shard["item_numbers"][rows], self.learned.numbers_at(negatives, moments)])
        if hide:
            hidden_ids = random.random(len(used)) < self.settings.id_dropout
            table_rows = np.where(hidden_ids, 0, table_rows)
            # An item without a known id is one that was just published: it has no age and no past either.
            item_numbers[hidden_ids[where[shown]]] = self.learned.newborn
        distinct_rows, row_at = np.unique(table_rows, return_inverse=True)
        candidates = np.concatenate([places, negatives]) if self.settings.in_batch else negatives
        shares = self._shares(shard["item"][near], len(rows))
        hidden = self._hidden(where[places], where[history], segments, where[candidates], len(used))
        batch = {
            "user_rows": users,
            "user_at": user_at,
            "item_rows": distinct_rows,
            "row_at": row_at,
            "path": self.learned.items.path[used],
            "history": where[history[pooled]],
            "segments": segments[pooled],
            "recent": where[history[newest]],
            "recent_segments": segments[newest],
            "item": where[shown],
            "price": np.concatenate([shard["price"][rows], self.learned.items.price[negatives]]),
            "item_numbers": item_numbers,
            "correction": self._log_q(shares[candidates], living, len(rows)) - self._log_propensity(candidates),
            "correction_label": self._log_q(shares[places], living, len(rows)) - self._log_propensity(places),
            "hidden": hidden,
            "weight": shard["weight"][rows],
            "numbers": shard["numbers"][rows],
            "seed": random.integers(0, 2**31, 2),
            **{name: shard[name][rows] for name in ("hour", "weekday", "device", "country", "category")},
        }
        return {name: np.ascontiguousarray(batch[name], kind) for name, (kind, _) in BATCH_TYPES.items()}

    def _user_rows(self, places: Array, random: np.random.Generator, hide: bool) -> tuple[Array, Array]:
        rows = embedding_rows(places, self.user_table)
        if hide:
            rows = np.where(random.random(len(rows)) < self.settings.id_dropout, 0, rows)
        return np.unique(rows, return_inverse=True)

    def _drawn(self, ts: Array, random: np.random.Generator) -> tuple[Array, Array, float]:
        """Negatives, each drawn uniformly from the items that were there at the time of an example, those times, and how many
        items it was from, on average."""
        past = self.learned.past
        living = past.living(ts)
        example = random.integers(0, len(ts), self.settings.negatives)
        drawn = (random.random(len(example)) * living[example]).astype(np.int64)
        return past.order[drawn], ts[example], float(living.mean())

    def _shares(self, near: Array, examples: int) -> npt.NDArray[np.float64]:
        """Share of each item in the examples of a time: of those `near` a batch, with a batch of all times as the prior."""
        counts = np.bincount(near, minlength=len(self.shares))
        return (counts + examples * self.shares) / (len(near) + examples)

    def _log_q(self, shares: Array, living: float, examples: int) -> Array:
        """Logarithm of the probability with which a candidate of a batch is that item (Yi et al. 2019, whose frequencies are
        those of the time as well; mixed with uniform negatives as in Yang et al. 2020)."""
        in_batch = examples if self.settings.in_batch else 0
        total = max(1, in_batch + self.settings.negatives)
        return np.log(np.maximum((in_batch * shares + self.settings.negatives / living) / total, 1e-12))

    def _log_propensity(self, items: Array) -> Array:
        """Logarithm of the items' propensities to be observed, up to a constant: `propensity_power` times that of their counts.

        Added to the scores in training alone, it takes from what is learned the part of an item's frequency that is not taste
        (Menon et al. 2021, "Long-tail learning via logit adjustment"; the weights of ALS have the same aim).
        """
        return self.settings.propensity_power * np.log(np.maximum(self.learned.counts[items], 1))

    def _hidden(self, places: Array, history: Array, segments: Array, candidates: Array, distinct: int) -> Array:
        """(example, candidate) pairs that are no negatives: the example's own item, and its history with `mask_history`.

        Items are given by their number among the `distinct` ones of the batch. The pairs of the diagonal are left out when the
        batch's items are the candidates: there stands the label.
        """
        items, rows = places, np.arange(len(places))
        if self.settings.mask_history:
            items, rows = np.concatenate([places, history]), np.concatenate([rows, segments])
        counts = np.bincount(candidates, minlength=distinct)
        starts = np.cumsum(counts) - counts
        order = np.argsort(candidates, kind="stable")
        sizes = counts[items]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        pairs = np.stack([np.repeat(rows, sizes), order[np.repeat(starts[items], sizes) + within]], axis=1)
        return pairs[pairs[:, 0] != pairs[:, 1]] if self.settings.in_batch else pairs


BATCH_TYPES: dict[str, tuple[type[np.generic], tuple[int | None, ...]]] = {
    "user_rows": (np.int32, (None,)),
    "user_at": (np.int32, (None,)),
    "item_rows": (np.int32, (None,)),
    "row_at": (np.int32, (None,)),
    "path": (np.int32, (None,)),
    "history": (np.int32, (None,)),
    "segments": (np.int32, (None,)),
    "recent": (np.int32, (None,)),
    "recent_segments": (np.int32, (None,)),
    "item": (np.int32, (None,)),
    "price": (np.int32, (None,)),
    "item_numbers": (np.float32, (None, len(ITEM_NUMBERS) + 1)),
    "correction": (np.float32, (None,)),
    "correction_label": (np.float32, (None,)),
    "hidden": (np.int32, (None, 2)),
    "weight": (np.float32, (None,)),
    "numbers": (np.float32, (None, len(COUNTS) + 1)),
    "seed": (np.int32, (2,)),
    "hour": (np.int32, (None,)),
    "weekday": (np.int32, (None,)),
    "device": (np.int32, (None,)),
    "country": (np.int32, (None,)),
    "category": (np.int32, (None,)),
}
"""Type and shape of each array of a batch.

`user_rows` and `item_rows` are distinct rows of the embedding tables; `user_at` (b,) says which of them an example has,
`row_at` (u,) which of them one of the u distinct items of the batch has, `path` (u,) its category path. `history`, `recent` and
`item` are places among those u; the segments say whose history it is. `item` has the b positives, then the negatives.
`hidden` are pairs of an example and a candidate that is no negative.
"""


def _read_shard(path: Path) -> dict[str, Array]:
    with pa.memory_map(str(path)) as source:
        table = ipc.open_file(source).read_all().combine_chunks()
    names = ("user", "item", "ts", "weight", "hour", "weekday", "price", *CONTEXT_VALUES)
    arrays = {name: table[name].to_numpy() for name in names}
    lists = table["history"].combine_chunks()
    arrays["offsets"] = np.asarray(lists.offsets)
    arrays["values"] = np.asarray(lists.values)
    arrays["numbers"] = _stacked(table, "numbers", len(COUNTS) + 1)
    arrays["item_numbers"] = _stacked(table, "item_numbers", len(ITEM_NUMBERS) + 1)
    return arrays


def _ragged(offsets: Array, values: Array, rows: Array) -> tuple[Array, Array, Array]:
    """Values of some lists in a row, the number of the list of each, and its rank inside the list."""
    starts, sizes = offsets[rows].astype(np.int64), (offsets[rows + 1] - offsets[rows]).astype(np.int64)
    segments = np.repeat(np.arange(len(rows)), sizes)
    rank = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return values[np.repeat(starts, sizes) + rank], segments, rank


def _distinct(size: int, *places: Array) -> tuple[Array, Array]:
    """The distinct places in order, and for each place below `size` where it stands among them (undefined for others)."""
    used = np.zeros(size, bool)
    for found in places:
        used[found] = True
    distinct = np.flatnonzero(used)
    where = np.zeros(size, np.int32)
    where[distinct] = np.arange(len(distinct))
    return distinct, where
