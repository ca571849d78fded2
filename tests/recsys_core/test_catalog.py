"""The catalogue as people read it."""

from __future__ import annotations

import pyarrow as pa

from recsys_core.catalog import CATALOG_SCHEMA, merge_catalog, names_of
from recsys_core.lake import Lake


def test_items_are_known_by_their_title_and_without_one_by_their_id(lake: Lake) -> None:
    assert names_of(lake, ["a"]) == {"a": "a"}, "there is no catalogue"
    rows = [
        {"item_id": item, "title": title, "available": True} for item, title in (("a", "Apple"), ("b", None), ("c", "Chair"))
    ]
    merge_catalog(lake, pa.Table.from_pylist(rows, schema=CATALOG_SCHEMA))
    assert names_of(lake, ["b", "a", "new", "a"]) == {"b": "b", "a": "Apple", "new": "new"}
    assert names_of(lake, []) == {}
