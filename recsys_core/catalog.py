"""The item catalogue: one table, one row an item, replaced as a whole."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_core.events import ITEM_ID
from recsys_core.lake import Lake, Partition

CATALOG_TABLE = "item_catalog"
CATALOG_KEY = "current"

CATALOG_SCHEMA = pa.schema(
    [
        pa.field(ITEM_ID, pa.string(), nullable=False),
        pa.field("title", pa.string()),
        pa.field("category", pa.string()),
        pa.field("price", pa.float64()),
        pa.field("available", pa.bool_(), nullable=False),
        pa.field("attributes", pa.string()),
    ]
)
"""`category` is a path whose levels are separated by `/`; `attributes` is a JSON object or null."""


def read_catalog(lake: Lake) -> pa.Table:
    """The catalogue, CATALOG_SCHEMA, sorted by item_id; without rows when none was ever written."""
    found = lake.find(CATALOG_TABLE, CATALOG_KEY)
    if found is None or found.rows == 0:
        return CATALOG_SCHEMA.empty_table()
    return lake.read(CATALOG_TABLE, CATALOG_KEY).cast(CATALOG_SCHEMA)


def with_catalog(item_ids: np.ndarray, catalog: pa.Table) -> pa.Table:
    """CATALOG_SCHEMA rows of `item_ids` in their order; an item that the catalogue lacks is available and untitled."""
    ids = pa.array(item_ids, pa.string())
    at = pc.index_in(ids, value_set=catalog[ITEM_ID].combine_chunks())
    rows = catalog.take(at).set_column(0, CATALOG_SCHEMA.field(ITEM_ID), ids)
    available = pc.fill_null(rows["available"], True)
    return rows.set_column(rows.schema.get_field_index("available"), CATALOG_SCHEMA.field("available"), available)


def names_of(lake: Lake, item_ids: Iterable[str]) -> dict[str, str]:
    """What people know each of some items by: its title, or its id where it has none."""
    names = {item: item for item in item_ids}
    catalog = lake.dataset(CATALOG_TABLE, [CATALOG_KEY], missing_ok=True)
    if catalog is not None:
        wanted = pc.field(ITEM_ID).isin(pa.array(list(names), pa.string()))
        for row in catalog.to_table(columns=[ITEM_ID, "title"], filter=wanted).to_pylist():
            names[row[ITEM_ID]] = row["title"] or row[ITEM_ID]
    return names


def last_of_each(table: pa.Table, column: str) -> pa.Table:
    """The last row of each value of `column`, sorted by it."""
    numbered = pa.table({"value": table[column], "row": pa.array(np.arange(table.num_rows))})
    last = numbered.group_by("value").aggregate([("row", "max")]).sort_by("value")
    return table.take(last["row_max"])


def merge_catalog(lake: Lake, items: pa.Table) -> Partition:
    """Add `items` (CATALOG_SCHEMA) to the catalogue. A row replaces the item's earlier row; the last one wins."""

    def merge(part: Partition | None) -> Partition:
        merged = last_of_each(pa.concat_tables([read_catalog(lake), items.cast(CATALOG_SCHEMA)]), ITEM_ID)
        return lake.write(CATALOG_TABLE, CATALOG_KEY, merged, instead_of=part)

    return lake.revise(CATALOG_TABLE, CATALOG_KEY, merge)
