"""From an item filter to a mask over a release's items; masks that are asked for again are kept."""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Collection, Iterable
from functools import cached_property
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from recsys_core.ranking import Snapshot
from serving.validation import EVERY_ITEM, ItemFilter

KEPT_MASKS = 64
KEPT_BYTES = 64 << 20
"""Masks of the filters that were asked for last: so many, and so many bytes of them."""
ROWS_AT_ONCE = 1 << 14
OWN_COLUMNS = ("item_id", "title", "category", "price", "available", "attributes")
"""Columns that are no attributes."""


class ItemFilters:
    """Masks over the items of one release, bool (n,). May be used by several threads."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._masks: OrderedDict[ItemFilter, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self._kept = min(KEPT_MASKS, max(1, KEPT_BYTES // max(1, snapshot.items.num_rows)))

    def mask(self, wanted: ItemFilter) -> np.ndarray | None:
        """The items that may be returned, availability included; None when all that are available may."""
        if wanted == EVERY_ITEM:
            return None
        with self._lock:
            if wanted not in self._masks:
                self._masks[wanted] = self._made(wanted)
            self._masks.move_to_end(wanted)
            while len(self._masks) > self._kept:
                self._masks.popitem(last=False)
            return self._masks[wanted]

    def prepare(self) -> None:
        """Read all that filters ask of the items. It takes seconds for a million, so that no call should have to do it."""
        _ = self._categories, self._prices, self._members

    def known(self, wanted: ItemFilter) -> np.ndarray | None:
        """The mask if it is there already, else None: for callers that can't wait for it to be made."""
        return self._masks.get(wanted)

    def mask_of_category(self, position: int) -> np.ndarray:
        """The items of one item's own category; only itself where it has none."""
        codes = self._categories[0]
        if codes[position] < 0:
            return np.arange(len(codes)) == position
        return codes == codes[position]

    def category_codes(self, positions: np.ndarray) -> np.ndarray:
        """Codes of the items' categories, -1 where there is none."""
        return self._categories[0][positions]

    def _made(self, wanted: ItemFilter) -> np.ndarray:
        snapshot = self._snapshot
        mask = np.ones(snapshot.items.num_rows, bool) if wanted.include_unavailable else snapshot.available.copy()
        if wanted.categories:
            mask &= self._in_categories(wanted.categories)
        if wanted.min_price is not None:
            mask &= self._prices >= wanted.min_price
        if wanted.max_price is not None:
            mask &= self._prices <= wanted.max_price
        for name, values in wanted.attributes:
            mask &= self._with_attribute(name, values)
        mask.setflags(write=False)
        return mask

    @cached_property
    def _categories(self) -> tuple[np.ndarray, list[str]]:
        """Code of each item's category, -1 for none, and the categories by code."""
        return _coded(self._snapshot.items["category"])

    @cached_property
    def _prices(self) -> np.ndarray:
        """float64 (n,), NaN where an item has none."""
        items = self._snapshot.items
        if "price" not in items.column_names:
            return np.full(items.num_rows, np.nan)
        return np.asarray(pc.cast(items["price"], pa.float64()).to_numpy(), np.float64)

    def _in_categories(self, wanted: tuple[str, ...]) -> np.ndarray:
        codes, names = self._categories
        roots = [category.rstrip("/") for category in wanted]
        below = tuple(f"{root}/" for root in roots)
        exact = {*wanted, *roots}
        chosen = np.fromiter((name in exact or name.startswith(below) for name in names), bool, len(names))
        return np.append(chosen, False)[codes]

    def _with_attribute(self, name: str, values: Collection[str]) -> np.ndarray:
        """The items that have one of the values, in a further column of the catalogue or as a member of `attributes`."""
        items = self._snapshot.items
        chosen = np.zeros(items.num_rows, bool)
        if name in items.column_names and name not in OWN_COLUMNS:
            written = pc.cast(items[name], pa.string())
            found = pc.is_in(written, value_set=pa.array(values, pa.string()))
            chosen |= pc.fill_null(found, False).to_numpy()
        chosen[self._members.rows(name, values)] = True
        return chosen

    @cached_property
    def _members(self) -> Members:
        items = self._snapshot.items
        return Members(items["attributes"] if "attributes" in items.column_names else pa.chunked_array([], pa.string()))


class Members:
    """Which items have which value of which attribute, of JSON objects; of a list each value counts.

    Kept are the row and a hash of 64 bits for each value that an item has, 12 bytes, whatever the number of names: a release
    may have thousands of them. Of ten million values two are confused with a probability of 3 in a million.
    """

    def __init__(self, texts: pa.ChunkedArray) -> None:
        hashes, rows = array("q"), array("i")
        having = np.flatnonzero(texts.is_valid())
        for start in range(0, len(having), ROWS_AT_ONCE):
            some = having[start : start + ROWS_AT_ONCE]
            for row, text in zip(some.tolist(), texts.take(some).to_pylist(), strict=True):
                for name, value in _members(text):
                    for one in value if isinstance(value, list) else (value,):
                        hashes.append(hash((name, _written(one))))
                        rows.append(row)
        order = np.argsort(np.frombuffer(hashes, np.int64))
        self._hashes = np.frombuffer(hashes, np.int64)[order]
        self._rows = np.frombuffer(rows, np.int32)[order]

    def rows(self, name: str, values: Iterable[str]) -> np.ndarray:
        """The rows that have one of the values, in no order."""
        wanted = np.array([hash((name, value)) for value in values], np.int64)
        first, after = (np.searchsorted(self._hashes, wanted, side) for side in ("left", "right"))
        found = [self._rows[start:end] for start, end in zip(first, after, strict=True)]
        return np.concatenate(found) if found else np.empty(0, np.int32)


def _coded(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    encoded = column.combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    codes = np.asarray(pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False), np.int32)
    return codes, encoded.dictionary.to_pylist()


def _members(text: str | None) -> list[tuple[str, Any]]:
    if not text:
        return []
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return []
    return list(value.items()) if isinstance(value, dict) else []


def _written(value: Any) -> str:
    """A value as a filter names it: text as it is, everything else as JSON writes it."""
    return value if isinstance(value, str) else orjson.dumps(value).decode()
