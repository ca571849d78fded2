"""The user tower of the two-tower model in plain NumPy: what serving and the precompute call, without TensorFlow.

A user's vector is the sum of three embeddings (the user's own, the mean of the history, the mean of its newest items; each
with a learned scale) and of a small network over these and the context, brought to length 1. In a model with item biases all
but the last component is, which is 1: there stands the bias in an item's vector, and the inner product is cosine plus bias.

Ids are looked up by 64-bit fingerprints of those that training knew. An unknown user takes row 0, which training learned by
hiding ids at random; an unknown item in a history is passed over.
"""

from __future__ import annotations

import io
import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain, filterfalse
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys_core.errors import UserError
from recsys_core.events import DAY_MS, HOUR_MS

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
UInt64 = npt.NDArray[np.uint64]

TOWER_FILE = "tower.json"
SCHEMA_VERSION = 1

COUNTS = ("user_events_1d", "user_events_7d", "user_events_window", "user_recency_hours")
NUMBERS = len(COUNTS) + 1
"""Columns of the encoded counts: each on a logarithmic scale and standardised, then whether there is no recency."""

EPSILON = 1e-12
MASK = (1 << 64) - 1
POOL_VALUES = 1 << 21
"""Most history values (users × items) × 64 gathered at a time."""
MEMO_ENTRIES = 1 << 17
ONE_BY_ONE = 64
"""Up to so many ids are looked up each by itself: most are remembered, and for the others arrays would have a fixed cost."""
FIRST_WEEKDAY = 3
"""1970-01-01 was a Thursday; Monday is 0."""


class TowerError(UserError, ValueError):
    """The files of a tower can't be used; the message names the file and what is wrong with it."""


# -- ids ----------------------------------------------------------------------------------------------------------------


def fingerprints(ids: pa.Array | Sequence[str]) -> UInt64:
    """64-bit fingerprints of UTF-8 strings, uint64 (n,), equal on every machine.

    Eight bytes at a time go through the finaliser of MurmurHash3 (fmix64, Appleby 2011), the length first.
    """
    strings = ids if isinstance(ids, pa.Array) else pa.array(ids, pa.string())
    if strings.null_count:
        raise ValueError("an id is null")
    if strings.type == pa.large_string():
        strings = strings.cast(pa.string())
    if not len(strings):
        return np.empty(0, np.uint64)
    _, offset_buffer, data = strings.buffers()
    offsets = np.frombuffer(offset_buffer, np.int32)[strings.offset : strings.offset + len(strings) + 1].astype(np.int64)
    first, last = int(offsets[0]), int(offsets[-1])
    content = np.zeros(last - first + 8, np.uint8)
    if last > first:
        content[:-8] = np.frombuffer(data, np.uint8)[first:last]
    words = np.ndarray((last - first + 1,), "<u8", content, 0, (1,))
    starts = offsets[:-1] - first
    left = np.diff(offsets)
    result = _mix(left.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    for at in range(0, int(left.max()), 8):
        some = left > at
        word = words[starts[some] + at]
        unused = (8 - np.minimum(left[some] - at, 8)).astype(np.uint64) * np.uint64(8)
        word = (word << unused) >> unused
        result[some] = _mix(result[some] ^ word) + np.uint64(at)
    return result


def _mix(x: UInt64) -> UInt64:
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


def fingerprint(text: str) -> int:
    """What `fingerprints` gives for one string, in whole numbers of Python."""
    data = text.encode()
    result = _mix_one(len(data) + 0x9E3779B97F4A7C15)
    for at in range(0, len(data), 8):
        result = (_mix_one(result ^ int.from_bytes(data[at : at + 8], "little")) + at) & MASK
    return result


def _mix_one(x: int) -> int:
    x = ((x ^ (x >> 33)) * 0xFF51AFD7ED558CCD) & MASK
    x = ((x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53) & MASK
    return x ^ (x >> 33)


class Vocabulary:
    """Known ids as sorted fingerprints. The place of an id is where its fingerprint stands, -1 when it is unknown."""

    def __init__(self, known: UInt64) -> None:
        """`known` uint64 (n,), ascending and distinct. Raises ValueError otherwise."""
        if known.ndim != 1 or known.dtype != np.uint64 or (known[1:] <= known[:-1]).any():
            raise ValueError("fingerprints of a vocabulary must be uint64, ascending and distinct")
        self.known = known
        self._memo = _Memo(known)

    def __len__(self) -> int:
        return len(self.known)

    def places(self, ids: pa.Array | Sequence[str]) -> Int32:
        """The place of each id, int32 (n,)."""
        wanted = fingerprints(ids)
        if not len(self.known):
            return np.full(len(wanted), -1, np.int32)
        at = np.minimum(np.searchsorted(self.known, wanted), len(self.known) - 1)
        return np.where(self.known[at] == wanted, at, -1).astype(np.int32)

    def rows(self, ids: Sequence[str]) -> list[int]:
        """1 + the place of each id, 0 for unknown ones; fast for ids that are asked for again and again."""
        memo = self._memo
        if len(memo) > MEMO_ENTRIES:
            # A new one: another thread may be reading the old one.
            memo = self._memo = _Memo(self.known)
        if len(ids) > ONE_BY_ONE:
            unseen = list(dict.fromkeys(filterfalse(memo.__contains__, ids)))
            memo.update(zip(unseen, (self.places(unseen) + 1).tolist(), strict=True))
        return list(map(memo.__getitem__, ids))


class _Memo(dict[str, int]):
    """1 + the places of ids that were asked for, 0 for unknown ones. It looks up by itself what it does not have."""

    def __init__(self, known: UInt64) -> None:
        super().__init__()
        self._known = known.data

    def __missing__(self, name: str) -> int:
        known, wanted = self._known, fingerprint(name)
        at = bisect_left(known, wanted)
        row = self[name] = at + 1 if at < len(known) and known[at] == wanted else 0
        return row


# -- the tower ----------------------------------------------------------------------------------------------------------


@dataclass
class TowerInputs:
    """What is known of b users at the moment of the question.

    `history` has the item ids of each, newest first. `ts_ms` int64 (b,) is the moment, in ms since 1970 (UTC). `category` is
    the preferred one of the first level. `counts` float32 (b, 4) has the columns COUNTS, with a NaN recency
    for a user without an earlier event.
    """

    user_ids: Sequence[str]
    history: Sequence[Sequence[str]]
    ts_ms: npt.NDArray[np.int64]
    device: Sequence[str | None]
    country: Sequence[str | None]
    category: Sequence[str | None]
    counts: Float32


@dataclass(frozen=True)
class TowerSpec:
    """What `tower.json` says: sizes, the values of each context feature (value n has row n + 1, others row 0), and scales.

    `scales` are the factors of the user's, the history's and the newest items' embedding. `center` and `spread` standardise
    log(1 + count), (4,) each. `layers` is the number of dense layers, 0: the sum of the embeddings alone. `item_bias`: the last
    component of a vector is no part of its direction.
    """

    dimension: int
    history: int
    recent: int
    layers: int
    devices: tuple[str, ...]
    countries: tuple[str, ...]
    categories: tuple[str, ...]
    scales: tuple[float, float, float]
    center: tuple[float, ...]
    spread: tuple[float, ...]
    item_bias: bool = False
    version: str = ""
    schema_version: int = SCHEMA_VERSION

    def numbers(self, counts: npt.NDArray[np.floating]) -> Float32:
        """Counts (b, 4) as the network reads them, float32 (b, NUMBERS). Anything not finite counts as not known."""
        return standardise(counts, *self._scale)

    @cached_property
    def _scale(self) -> tuple[Float32, Float32]:
        return np.array(self.center, np.float32), np.array(self.spread, np.float32)


TABLES = ("user_ids", "item_ids", "users", "history", "hours", "weekdays", "devices", "countries", "categories")
CONTEXT = ("hours", "weekdays", "devices", "countries", "categories")
CODES = ("user", "hour", "weekday", "device", "country", "category")
"""Inputs that are numbers of rows: of the users' table, and of each table of CONTEXT."""


@dataclass(frozen=True)
class UserTower:
    """The fitted tower. `tables` has the arrays named in TABLES, `dense` the kernel and bias of each layer.

    `users` (k + 1, d): row 0 for unknown users; the user at place p has row 1 + p mod k. `history` (n + 1, d): what the item
    at place p adds to a history, in row 1 + p; row 0 is zeros. Those of CONTEXT have equally many columns. All float32, but
    `user_ids` and `item_ids` are fingerprints, uint64.
    """

    spec: TowerSpec
    tables: Mapping[str, npt.NDArray[Any]]
    dense: Sequence[tuple[Float32, Float32]]
    _users: Vocabulary = field(init=False, repr=False)
    _items: Vocabulary = field(init=False, repr=False)
    _codes: dict[str, dict[str | None, int]] = field(init=False, repr=False)
    _context: Float32 = field(init=False, repr=False)
    _starts: npt.NDArray[np.intp] = field(init=False, repr=False)
    _factors: Float32 = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check(self)
        # The tables of the context as one, and where each of them starts.
        context = [self.tables[name] for name in CONTEXT]
        object.__setattr__(self, "_context", np.concatenate(context))
        object.__setattr__(self, "_starts", np.cumsum([0, *map(len, context[:-1])])[:, None])
        # By the length of a history: what makes scaled means of sums.
        lengths = np.maximum(np.arange(self.spec.history + 1), 1)
        counts = (np.ones_like(lengths), lengths, np.minimum(lengths, max(1, self.spec.recent)))
        object.__setattr__(self, "_factors", (np.array(self.spec.scales) / np.stack(counts, axis=1)).astype(np.float32))
        object.__setattr__(self, "_users", Vocabulary(self.tables["user_ids"]))
        object.__setattr__(self, "_items", Vocabulary(self.tables["item_ids"]))
        named = {"device": self.spec.devices, "country": self.spec.countries, "category": self.spec.categories}
        codes: dict[str, dict[str | None, int]] = {
            name: {value: row for row, value in enumerate(values, start=1)} for name, values in named.items()
        }
        object.__setattr__(self, "_codes", codes)

    @property
    def version(self) -> str:
        return self.spec.version

    @property
    def dimension(self) -> int:
        return self.spec.dimension

    def vectors(self, inputs: TowerInputs) -> Float32:
        """Vectors float32 (b, d); zeros for a user of whom nothing is known: an unknown id and no known item."""
        return self._vectors(*self._encode(inputs))

    def encode(self, inputs: TowerInputs) -> dict[str, npt.NDArray[Any]]:
        """The inputs as numbers, named as the inputs of the SavedModel's signature.

        user int32 (b,), a row of the table; history int32 (b, h), 1 + the place of an item, 0 where padded, known items only;
        hour, weekday, device, country, category int32 (b,); numbers float32 (b, NUMBERS).
        """
        codes, history, numbers = self._encode(inputs)
        return {**dict(zip(CODES, codes, strict=True)), "history": history, "numbers": numbers}

    def forward(self, encoded: Mapping[str, npt.NDArray[Any]]) -> Float32:
        """`vectors` of inputs that `encode` made."""
        return self._vectors(np.stack([encoded[name] for name in CODES]), encoded["history"], encoded["numbers"])

    def _encode(self, inputs: TowerInputs) -> tuple[Int32, Int32, Float32]:
        """CODES (6, b), history (b, h) and numbers (b, NUMBERS)."""
        # For one user, lists are faster than arrays; for many, the histories take longest, whichever is used here. The row of a
        # user is that of `embedding_rows`.
        moments = np.asarray(inputs.ts_ms, np.int64).tolist()
        buckets = max(1, len(self.tables["users"]) - 1)
        codes = [
            [row and 1 + (row - 1) % buckets for row in self._users.rows(inputs.user_ids)],
            [moment // HOUR_MS % 24 for moment in moments],
            [(moment // DAY_MS + FIRST_WEEKDAY) % 7 for moment in moments],
            self._rows("device", inputs.device),
            self._rows("country", inputs.country),
            self._rows("category", inputs.category),
        ]
        return np.array(codes, np.int32), self._history(inputs.history), self.spec.numbers(inputs.counts)

    def _vectors(self, codes: Int32, history: Int32, numbers: Float32) -> Float32:
        step = max(1, POOL_VALUES // 64 // max(1, history.shape[1]))
        if len(history) <= step:
            return self._forward(codes, history, numbers)
        parts = [slice(at, at + step) for at in range(0, len(history), step)]
        return np.concatenate([self._forward(codes[:, part], history[part], numbers[part]) for part in parts])

    def _rows(self, name: str, values: Sequence[str | None]) -> list[int]:
        codes = self._codes[name]
        return [codes.get(value, 0) for value in values]

    def _history(self, histories: Sequence[Sequence[str]]) -> Int32:
        longest = self.spec.history
        rows = self._items.rows(list(chain.from_iterable(histories)))
        kept, at = [], 0
        for items in histories:
            known = list(filter(None, rows[at : at + len(items)]))
            kept.append(known[:longest])
            at += len(items)
        width = max(map(len, kept), default=0)
        return np.array([known + [0] * (width - len(known)) for known in kept], np.int32).reshape(len(kept), width)

    def _forward(self, codes: Int32, history: Int32, numbers: Float32) -> Float32:
        (b, _), d, tables = history.shape, self.dimension, self.tables
        lengths: npt.NDArray[np.intp] = np.add.reduce(history > 0, axis=1)
        gathered = tables["history"].take(history, axis=0)
        context = self._context.take((codes[1:] + self._starts).T, axis=0)
        x = np.empty((b, 3 * d + context.shape[1] * context.shape[2] + NUMBERS), np.float32)
        # The user's own embedding, the mean of the history and that of its newest items; padding is zeros.
        embedded = x[:, : 3 * d].reshape(b, 3, d)
        embedded[:, 0] = tables["users"].take(codes[0], axis=0)
        np.add.reduce(gathered, axis=1, out=embedded[:, 1])
        np.add.reduce(gathered[:, : self.spec.recent], axis=1, out=embedded[:, 2])
        embedded *= self._factors.take(lengths, axis=0)[:, :, None]
        result = np.add.reduce(embedded, axis=1)
        if self.dense:
            x[:, 3 * d : -NUMBERS].reshape(context.shape)[...] = context
            x[:, -NUMBERS:] = numbers
            for kernel, bias in self.dense[:-1]:
                x = x @ kernel
                x += bias
                np.maximum(x, 0, out=x)
            kernel, bias = self.dense[-1]
            result += x @ kernel
            result += bias
        known = (codes[0] > 0) | (lengths > 0)
        direction = result[:, : d - self.spec.item_bias]
        direction *= (known / np.sqrt(np.maximum(np.vecdot(direction, direction), EPSILON)))[:, None]
        if self.spec.item_bias:
            result[:, -1] = known
        return result

    # -- files ----------------------------------------------------------------------------------------------------------

    def to_files(self) -> dict[str, bytes]:
        """`tower.json` and one `.npy` for each array, by name; `from_files` reads them."""
        return dict(self.files())

    def files(self) -> Iterator[tuple[str, bytes]]:
        """`to_files`, by name and one at a time, for a tower that is too large to be in memory twice."""
        arrays = {f"{name}.npy": self.tables[name] for name in TABLES}
        for layer, (kernel, bias) in enumerate(self.dense):
            arrays |= {f"dense_{layer}_kernel.npy": kernel, f"dense_{layer}_bias.npy": bias}
        for name in sorted((*arrays, TOWER_FILE)):
            if name == TOWER_FILE:
                yield name, json.dumps(asdict(self.spec), indent=2, ensure_ascii=False).encode()
            else:
                yield name, npy_bytes(arrays[name])

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> UserTower:
        """Raises TowerError when a file is missing, of another schema, or does not fit the others."""
        spec = _read_spec(files)
        names = [*TABLES, *(f"dense_{layer}_{part}" for layer in range(spec.layers) for part in ("kernel", "bias"))]
        arrays = {name: _read_array(files, f"{name}.npy") for name in names}
        dense = [(arrays[f"dense_{layer}_kernel"], arrays[f"dense_{layer}_bias"]) for layer in range(spec.layers)]
        return cls(spec, {name: arrays[name] for name in TABLES}, dense)


def standardise(values: npt.NDArray[np.floating], center: npt.ArrayLike, spread: npt.ArrayLike) -> Float32:
    """(log(1 + values) - center) / spread, and whether the last column is unknown: float32 (b, k + 1) of (b, k).

    What is not finite is unknown and becomes 0; what is negative counts as 0.
    """
    unknown = ~np.isfinite(values)
    result = np.empty((len(values), values.shape[1] + 1), np.float32)
    scaled = result[:, :-1]
    np.log1p(np.maximum(values, 0, dtype=np.float32), out=scaled)
    scaled -= np.asarray(center, np.float32)
    scaled /= np.asarray(spread, np.float32)
    scaled[unknown] = 0
    result[:, -1] = unknown[:, -1]
    return result


def embedding_rows(places: Int32, table_rows: int) -> Int32:
    """Rows of an embedding table for places of a vocabulary: 1 + place mod (rows - 1), and row 0 for place -1."""
    buckets = max(1, table_rows - 1)
    return np.where(places < 0, 0, 1 + places % buckets).astype(np.int32)


def npy_bytes(array: npt.NDArray[Any]) -> bytes:
    """An array in NumPy's own format."""
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def _read_spec(files: Mapping[str, bytes]) -> TowerSpec:
    if TOWER_FILE not in files:
        raise TowerError(f"a user tower needs {TOWER_FILE}, got {', '.join(sorted(files)) or 'nothing'}")
    try:
        raw = json.loads(files[TOWER_FILE])
        found = raw.get("schema_version")
    except (ValueError, AttributeError) as error:
        raise TowerError(f"{TOWER_FILE} is not a JSON object: {error}") from error
    if found != SCHEMA_VERSION:
        raise TowerError(f"{TOWER_FILE} has schema version {found!r}, this process reads {SCHEMA_VERSION}")
    try:
        fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
        return TowerSpec(**fields)
    except TypeError as error:
        raise TowerError(f"{TOWER_FILE} does not fit its schema: {error}") from error


def _read_array(files: Mapping[str, bytes], name: str) -> npt.NDArray[Any]:
    if name not in files:
        raise TowerError(f"a user tower needs {name}, got {', '.join(sorted(files))}")
    try:
        return np.load(io.BytesIO(files[name]), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise TowerError(f"{name} is not a NumPy file: {error}") from error


def _check(tower: UserTower) -> None:
    spec, tables, d = tower.spec, tower.tables, tower.spec.dimension
    rows = {
        "history": len(tables["item_ids"]) + 1,
        "hours": 24,
        "weekdays": 7,
        "devices": len(spec.devices) + 1,
        "countries": len(spec.countries) + 1,
        "categories": len(spec.categories) + 1,
    }
    for name, wanted in rows.items():
        if len(tables[name]) != wanted:
            raise TowerError(f"{name}.npy has {len(tables[name])} rows, {TOWER_FILE} and the ids say {wanted}")
    for name in ("users", "history"):
        if tables[name].ndim != 2 or tables[name].shape[1] != d:
            raise TowerError(f"{name}.npy has the shape {tables[name].shape}, {TOWER_FILE} says {d} columns")
    widths = {tables[name].shape[1:] for name in CONTEXT}
    if len(widths) > 1 or any(len(shape) != 1 for shape in widths):
        raise TowerError(f"{', '.join(f'{name}.npy' for name in CONTEXT)} must be tables with equally many columns")
    width = 3 * d + sum(tables[name].shape[1] for name in CONTEXT) + NUMBERS
    for layer, (kernel, bias) in enumerate(tower.dense):
        if kernel.ndim != 2 or len(kernel) != width or bias.shape != kernel.shape[1:]:
            raise TowerError(f"dense_{layer}_kernel.npy has the shape {kernel.shape}, expected {width} rows")
        width = kernel.shape[1]
    if tower.dense and width != d:
        raise TowerError(f"dense_{len(tower.dense) - 1}_kernel.npy gives {width} values, {TOWER_FILE} says {d}")
    for name, array in [*tables.items(), *((f"dense_{n}_kernel", k) for n, (k, _) in enumerate(tower.dense))]:
        wanted_type = np.uint64 if name.endswith("_ids") else np.float32
        if array.dtype != wanted_type or not np.isfinite(array).all():
            raise TowerError(f"{name}.npy must hold finite values of {np.dtype(wanted_type)}, it has {array.dtype}")
