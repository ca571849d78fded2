"""Rows of a foreign file as events or catalogue items: what a mapping makes of its text columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from recsys_core.catalog import CATALOG_SCHEMA
from recsys_core.events import EARLIEST_TS, EVENT_SCHEMA, content_ids
from recsys_core.json_rows import number_text
from recsys_core.mappings import mapped_columns, mapped_fields
from recsys_core.parsing import NO_ID, by_value, is_nothing, parse_amount, parse_bool, parse_names, parse_ts
from recsys_core.settings import SourceMapping

CATEGORIES = "categories"
"""The attribute that holds all categories of an item that has several."""


def text_column(table: pa.Table, name: str | None) -> pa.ChunkedArray:
    """A column as it was written, all null when the mapping or the file has none; empty text is null."""
    if name is None or name not in table.column_names:
        return pa.chunked_array([pa.nulls(table.num_rows, pa.string())])
    text = table[name]
    return pc.if_else(pc.equal(pc.binary_length(text), 0), pa.scalar(None, pa.string()), text)


def item_ids(table: pa.Table, mapping: SourceMapping) -> pa.ChunkedArray:
    """The item of each row, null where there is none."""
    return _ids(table, mapping.item_id)


def _ids(table: pa.Table, column: str | None) -> pa.ChunkedArray:
    """Users or items. A list or an object is none: nobody would ask for it by that text."""
    ids = parse_names(text_column(table, column), NO_ID)
    maybe = pc.or_(pc.starts_with(ids, "["), pc.starts_with(ids, "{"))
    if not pc.any(maybe).as_py():
        return ids
    return by_value(ids, lambda text: text if _listed(text) is None else None, pa.string())


def is_header(table: pa.Table, mapping: SourceMapping) -> pa.ChunkedArray:
    """Which rows repeat the names of all mapped columns, as where files were joined with their headers, bool (n,)."""
    names = [name for name in mapped_fields(mapping).values() if name in table.column_names]
    same = pc.equal(text_column(table, mapping.item_id), mapping.item_id)
    if pc.any(same).as_py():
        for name in names:
            same = pc.and_(same, pc.equal(pc.utf8_trim_whitespace(text_column(table, name)), name))
    return pc.fill_null(same, False)


# -- events ---------------------------------------------------------------------------------------------------------


def map_events(table: pa.Table, mapping: SourceMapping, shift: int = 0) -> pa.Table:
    """The events of some rows: a table with the columns of EVENT_SCHEMA, nulls where a field is missing or unreadable.

    An event without an id of its own gets one made from the mapped fields before the shift.
    """
    source_ts = parse_ts(text_column(table, mapping.ts), mapping.ts_unit)
    columns = {
        "user_id": _ids(table, mapping.user_id),
        "item_id": item_ids(table, mapping),
        "event_type": _event_types(table, mapping),
        "ts": source_ts,
        "session_id": parse_names(text_column(table, mapping.session_id), NO_ID),
        "device": parse_names(text_column(table, mapping.device)),
        "country": parse_names(text_column(table, mapping.country)),
        "value": parse_amount(text_column(table, mapping.value), mapping.decimal),
        "recommendation_id": parse_names(text_column(table, mapping.recommendation_id), NO_ID),
    }
    columns["event_id"] = parse_names(text_column(table, mapping.event_id), NO_ID)
    if columns["event_id"].null_count:
        mapped = [column.cast(pa.string()) for name, column in columns.items() if getattr(mapping, name)]
        columns["event_id"] = pc.coalesce(columns["event_id"], content_ids(mapped))
    columns["ts"] = pc.if_else(pc.greater_equal(source_ts, EARLIEST_TS), pc.add(source_ts, shift), source_ts)
    return pa.table([columns[name] for name in EVENT_SCHEMA.names], names=EVENT_SCHEMA.names)


def _event_types(table: pa.Table, mapping: SourceMapping) -> pa.ChunkedArray:
    if mapping.event_type is None:
        return pa.chunked_array([pa.repeat(mapping.default_event_type, table.num_rows)])
    known = {name.strip().lower(): event_type for name, event_type in mapping.event_types.items()}
    lower = pc.utf8_lower(pc.utf8_trim_whitespace(text_column(table, mapping.event_type)))
    if not known:
        return lower
    at = pc.index_in(lower, value_set=pa.array(list(known)))
    return pc.coalesce(pa.chunked_array([pa.array(list(known.values()))]).take(at), lower)


def unreadable_values(table: pa.Table, events: pa.Table, mapping: SourceMapping) -> dict[str, pa.ChunkedArray]:
    """Of each optional field of events, which rows hold something that can't be read, bool (n,)."""
    text = text_column(table, mapping.value)
    return {"value": _lost(text, events["value"])} if mapping.value else {}


def _lost(text: pa.ChunkedArray, parsed: pa.ChunkedArray) -> pa.ChunkedArray:
    if parsed.null_count == text.null_count:
        return pa.chunked_array([pa.repeat(False, len(text))])
    return pc.and_not(pc.is_null(parsed), is_nothing(text))


# -- items ----------------------------------------------------------------------------------------------------------


def map_items(table: pa.Table, mapping: SourceMapping) -> pa.Table:
    """The catalogue rows, CATALOG_SCHEMA, of some rows that have an item id."""
    columns = {
        "item_id": item_ids(table, mapping),
        "title": pc.utf8_trim_whitespace(text_column(table, mapping.title)),
        "category": _categories(table, mapping),
        "price": parse_amount(text_column(table, mapping.price), mapping.decimal),
        "available": pc.fill_null(parse_bool(text_column(table, mapping.available)), True),
        "attributes": _attributes(table, mapping),
    }
    return pa.table(columns).cast(CATALOG_SCHEMA)


def unreadable_items(table: pa.Table, mapping: SourceMapping) -> dict[str, pa.ChunkedArray]:
    """Of each optional field of items, which rows hold something that can't be read, bool (n,)."""
    price, available = text_column(table, mapping.price), text_column(table, mapping.available)
    category = text_column(table, mapping.category)
    found = {
        "price": _lost(price, parse_amount(price, mapping.decimal)),
        "available": _lost(available, parse_bool(available)),
        "category": _lost(category, _categories(table, mapping)),
    }
    return {name: rows for name, rows in found.items() if getattr(mapping, name)}


def _categories(table: pa.Table, mapping: SourceMapping) -> pa.ChunkedArray:
    """The category of each row, of several the first one."""
    text = parse_names(text_column(table, mapping.category))
    return by_value(text, lambda value: next(iter(category_paths(value, mapping)), None), pa.string())


def category_paths(text: str, mapping: SourceMapping) -> list[str]:
    """The categories that a text names, as paths with `/`. A list inside a list are the levels of one."""
    entries = _listed(text)
    if entries is None:
        entries = text.split(mapping.category_list_separator) if mapping.category_list_separator else [text]
    sign = mapping.category_separator
    paths = ("/".join(_levels(entry)).strip() for entry in entries)
    if sign != "/":
        paths = ("/".join(level for part in path.split(sign) if (level := part.strip())) for path in paths)
    return [path for path in dict.fromkeys(paths) if path]


def _listed(text: str) -> list[Any] | None:
    """The entries of a JSON list; an object is a list of one; None for any other text."""
    if text[:1] not in ("[", "{"):
        return None
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, list) else [value]


def _levels(entry: Any) -> Iterator[str]:
    if isinstance(entry, list):
        for level in entry:
            yield from _levels(level)
    elif isinstance(entry, dict):
        yield from _levels(entry.get("name"))
    elif isinstance(entry, str):
        yield entry.strip()
    elif entry is not None:
        yield number_text(entry) if isinstance(entry, float) else orjson.dumps(entry).decode()


def _attributes(table: pa.Table, mapping: SourceMapping) -> pa.Array:
    """The further columns of each row as a JSON object of those that are not empty, null when all are.

    A list stays one. Where the category is a list, all of it is the attribute `categories`.
    """
    names = list(mapping.attributes)
    if "*" in names:
        mapped = mapped_columns(mapping)
        names = [name for name in table.column_names if name not in mapped]
    columns = {name: parse_names(table[name]).to_pylist() for name in names if name in table.column_names}
    categories = parse_names(text_column(table, mapping.category)).to_pylist()
    texts = []
    for row, category in enumerate(categories):
        found = {name: _list_or_text(column[row]) for name, column in columns.items() if column[row]}
        if category and (mapping.category_list_separator or _listed(category) is not None):
            found.setdefault(CATEGORIES, category_paths(category, mapping))
        texts.append(orjson.dumps(found).decode() if found else None)
    return pa.array(texts, pa.string())


def _list_or_text(text: str) -> Any:
    return text if text[:1] != "[" else _listed(text) or text
