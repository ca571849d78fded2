"""From an item filter to a mask over a release's items; masks that are asked for again are kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import cached_property
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from recsys_core.ranking import Snapshot
from serving.validation import EVERY_ITEM, ItemFilter

KEPT_MASKS = 64


class ItemFilters:
    """Masks over the items of one release, bool (n,). May be used by several threads."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._masks: OrderedDict[ItemFilter, np.ndarray] = OrderedDict()
        self._columns: dict[str, tuple[np.ndarray, dict[str, int]]] = {}
        self._lock = threading.Lock()

    def mask(self, wanted: ItemFilter) -> np.ndarray | None:
        """The items that may be returned, availability included; None when all that are available may."""
        if wanted == EVERY_ITEM:
            return None
        with self._lock:
            mask = self._masks.pop(wanted, None)
            if mask is None:
                mask = self._made(wanted)
            self._masks[wanted] = mask
            while len(self._masks) > KEPT_MASKS:
                self._masks.popitem(last=False)
            return mask

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
            codes, known = self._attribute(name)
            mask &= np.isin(codes, [known[value] for value in values if value in known])
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

    def _attribute(self, name: str) -> tuple[np.ndarray, dict[str, int]]:
        """Code of each item's value of an attribute, -1 for none, and the codes by value."""
        if name not in self._columns:
            if not self._columns:
                self._read_attributes()
            nothing: tuple[np.ndarray, dict[str, int]] = (np.full(self._snapshot.items.num_rows, -1, np.int32), {})
            return self._columns.get(name, nothing)
        return self._columns[name]

    def _read_attributes(self) -> None:
        """All attributes of the catalogue: its own further columns, and the members of the JSON objects in `attributes`."""
        items = self._snapshot.items
        columns: dict[str, tuple[np.ndarray, dict[str, int]]] = {}
        for name in items.column_names:
            if name not in ("item_id", "title", "category", "price", "available", "attributes"):
                codes, values = _coded(pc.cast(items[name], pa.string()))
                columns[name] = codes, {value: code for code, value in enumerate(values)}
        texts = items["attributes"].to_pylist() if "attributes" in items.column_names else []
        for row, text in enumerate(texts):
            for name, value in _members(text):
                if name not in columns:
                    columns[name] = np.full(len(texts), -1, np.int32), {}
                codes, known = columns[name]
                codes[row] = known.setdefault(_written(value), len(known))
        self._columns = columns or {"": (np.full(items.num_rows, -1, np.int32), {})}


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
