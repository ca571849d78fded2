"""Foreign files as batches of text columns: delimited text, JSON and Parquet, plain or gzip, in bounded memory.

Every row of a file comes out exactly once, either in a table or as a `Rejected` with its number and the reason. The number of
rows is held against what was counted without the parser: the lines of a text file, the rows in a Parquet file's footer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import IO, Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys_core.delimited import layout_of, read_delimited, sample_of
from recsys_core.json_rows import json_columns, number_text, read_json
from recsys_core.sources import JSON, PARQUET, IngestError, RawBatch, SourceFile, opened

BLOCK_BYTES = 4 << 20
JSON_SAMPLE_ROWS = 1_000
PARQUET_BATCH_ROWS = 65_536


def columns_of(source: SourceFile, needed: Collection[str] | None = ()) -> list[str]:
    """Column names of a file and of its folders. An empty file has none.

    Of JSON they are the keys of the first 1,000 rows, and of as many more as it takes to see all of `needed`; of all rows for
    None.
    """
    with opened(source) as raw:
        if source.fs.size(source.path) == 0:
            return []
        if source.ending in PARQUET:
            schema = pq.ParquetFile(raw).schema_arrow
            names = [*schema.names, *(name for name in source.nested if _path(schema, name))]
        elif source.ending in JSON:
            names = json_columns(
                source, raw, JSON_SAMPLE_ROWS, None if needed is None else frozenset(needed) - source.folders.keys()
            )
        else:
            sample = sample_of(source, raw)
            names = list(layout_of(source, sample).names) if sample else []
    return list(dict.fromkeys([*names, *source.folders])) if names else []


def first_lines(source: SourceFile) -> list[str]:
    """The first lines of a delimited file that are not blank; none of any other file."""
    if source.ending in JSON + PARQUET:
        return []
    with opened(source) as raw:
        return sample_of(source, raw)


def read_rows(source: SourceFile) -> Iterator[RawBatch]:
    """All rows of a file in order. Raises IngestError for a damaged file, and for one whose rows do not add up."""
    with opened(source) as raw:
        if source.ending in PARQUET:
            batches = _parquet(source, raw)
        else:
            batches = (read_json if source.ending in JSON else read_delimited)(source, raw, BLOCK_BYTES)
        for batch in batches:
            yield RawBatch(_with_folders(batch.table, source), batch.rows, batch.rejected, batch.lines)


def _with_folders(table: pa.Table, source: SourceFile) -> pa.Table:
    """The rows with the columns that the folders give them; a column of the file's own stands before a folder's."""
    for name, value in source.folders.items():
        if name not in table.column_names:
            table = table.append_column(name, pa.repeat(pa.scalar(value, pa.string()), table.num_rows))
    return table


# -- Parquet --------------------------------------------------------------------------------------------------------


def _parquet(source: SourceFile, raw: IO[bytes]) -> Iterator[RawBatch]:
    file = pq.ParquetFile(raw)
    first = 1
    for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        columns |= {
            name: pc.struct_field(batch.column(p[0]), p[1:]) for name in source.nested if (p := _path(batch.schema, name))
        }
        arrays = [_arrow_text(column) for column in columns.values()]
        rows = np.arange(first, first + batch.num_rows)
        yield RawBatch(pa.table(arrays, names=list(columns)), rows, [])
        first += batch.num_rows
    if first - 1 != file.metadata.num_rows:
        raise IngestError(f"{source.path} has {file.metadata.num_rows} rows, {first - 1} were read: it is damaged")


def _path(schema: pa.Schema, name: str) -> list[str]:
    """The names that lead to a nested value, empty when there is none or a column has that very name."""
    parts = name.split(".")
    if name in schema.names or parts[0] not in schema.names:
        return []
    kind = schema.field(parts[0]).type
    for part in parts[1:]:
        if not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
            return []
        kind = kind.field(part).type
    return parts


def _arrow_text(column: pa.Array) -> pa.Array:
    """Any column as text: whole numbers without a fraction, lists and structs as JSON.

    NaN, the infinities and bytes that are not UTF-8 become null.
    """
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if isinstance(column.type, pa.UuidType):
        return pa.array([None if value is None else str(value) for value in column.to_pylist()], pa.string())
    if pa.types.is_floating(column.type):
        return _float_text(column.cast(pa.float32()) if pa.types.is_float16(column.type) else column)
    if pa.types.is_decimal(column.type):
        return pa.array([None if value is None else number_text(value) for value in column.to_pylist()], pa.string())
    try:
        return column.cast(pa.string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        return pa.array([_python_text(value) for value in column.to_pylist()], pa.string())


def _float_text(column: pa.Array) -> pa.Array:
    missing = pa.scalar(None, column.type)
    column = pc.if_else(pc.is_finite(column), column, missing)
    whole = pc.equal(column, pc.floor(column))
    small = pc.and_(whole, pc.less(pc.abs(column), 2.0**63))
    text = pc.coalesce(pc.if_else(small, column, missing).cast(pa.int64()).cast(pa.string()), column.cast(pa.string()))
    large = pc.and_not(whole, small)
    if not pc.any(large).as_py():
        return text
    values = pc.if_else(large, column, missing).to_pylist()
    return pc.coalesce(pa.array([None if v is None else number_text(v) for v in values], pa.string()), text)


def _python_text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    return orjson.dumps(value, default=str).decode() if isinstance(value, list | tuple | dict) else str(value)
