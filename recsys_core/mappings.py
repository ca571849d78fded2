"""Mappings of well-known public data sets, ready by name, and the choice of the one that fits a file."""

from __future__ import annotations

from collections.abc import Mapping

import fsspec
import pyarrow as pa
import pyarrow.compute as pc

from recsys_core.delimited import fields_of, layout_of
from recsys_core.parsing import parse_ts
from recsys_core.readers import columns_of, first_lines
from recsys_core.settings import SourceMapping
from recsys_core.sources import JSON, IngestError, SourceFile, find_files
from recsys_core.stores import open_filesystem

BUILTIN: dict[str, SourceMapping] = {
    "recsys": SourceMapping(
        user_id="user_id",
        item_id="item_id",
        event_type="event_type",
        ts="ts",
        event_id="event_id",
        session_id="session_id",
        device="device",
        country="country",
        value="value",
        recommendation_id="recommendation_id",
        optional=["event_id", "session_id", "device", "country", "value", "recommendation_id"],
    ),
    "recsys-catalog": SourceMapping(
        kind="catalog",
        item_id="item_id",
        title="title",
        category="category",
        price="price",
        available="available",
        attributes=["*"],
        optional=["price", "available"],
    ),
    "globo": SourceMapping(
        user_id="user_id",
        item_id="click_article_id",
        default_event_type="click",
        ts="click_timestamp",
        session_id="session_id",
        device="click_deviceGroup",
        country="click_country",
    ),
    "globo-catalog": SourceMapping(
        kind="catalog",
        item_id="article_id",
        category="category_id",
        attributes=["created_at_ts", "publisher_id", "words_count"],
    ),
    "deskdrop": SourceMapping(
        user_id="personId",
        item_id="contentId",
        event_type="eventType",
        event_types={"COMMENT CREATED": "comment"},
        ts="timestamp",
        ts_unit="s",
        session_id="sessionId",
        country="userCountry",
    ),
    "deskdrop-catalog": SourceMapping(
        kind="catalog", item_id="contentId", title="title", category="contentType", attributes=["url", "lang"]
    ),
    "movielens": SourceMapping(
        user_id="userId", item_id="movieId", default_event_type="rating", ts="timestamp", ts_unit="s", value="rating"
    ),
    "movielens-catalog": SourceMapping(
        kind="catalog", item_id="movieId", title="title", category="genres", category_list_separator="|"
    ),
    "movielens-1m": SourceMapping(
        user_id="userId",
        item_id="movieId",
        default_event_type="rating",
        ts="timestamp",
        ts_unit="s",
        value="rating",
        delimiter="::",
        header=["userId", "movieId", "rating", "timestamp"],
    ),
    "movielens-1m-catalog": SourceMapping(
        kind="catalog",
        item_id="movieId",
        title="title",
        category="genres",
        category_list_separator="|",
        delimiter="::",
        header=["movieId", "title", "genres"],
    ),
    "movielens-100k": SourceMapping(
        user_id="userId",
        item_id="movieId",
        default_event_type="rating",
        ts="timestamp",
        ts_unit="s",
        value="rating",
        delimiter="\t",
        header=["userId", "movieId", "rating", "timestamp"],
    ),
    "movielens-inter": SourceMapping(
        user_id="user_id:token",
        item_id="item_id:token",
        default_event_type="rating",
        ts="timestamp:float",
        ts_unit="s",
        value="rating:float",
        delimiter="\t",
    ),
    "movielens-item": SourceMapping(
        kind="catalog",
        item_id="item_id:token",
        title="movie_title:token_seq",
        category="class:token_seq",
        category_list_separator=" ",
        attributes=["release_year:token"],
        delimiter="\t",
    ),
    "rees46": SourceMapping(
        user_id="user_id",
        item_id="product_id",
        event_type="event_type",
        ts="event_time",
        ts_unit="iso",
        session_id="user_session",
        value="price",
        category="category_code",
        category_separator=".",
        price="price",
        attributes=["brand", "category_id"],
        catalog_from_events=True,
    ),
    "retailrocket": SourceMapping(
        user_id="visitorid",
        item_id="itemid",
        event_type="event",
        event_types={"addtocart": "cart", "transaction": "purchase"},
        ts="timestamp",
    ),
    "taobao": SourceMapping(
        user_id="user",
        item_id="item",
        event_type="behaviour",
        event_types={"pv": "view", "buy": "purchase", "cart": "cart", "fav": "fav"},
        ts="ts",
        ts_unit="s",
        category="category",
        catalog_from_events=True,
        header=["user", "item", "category", "behaviour", "ts"],
    ),
}


class MappingError(IngestError):
    """A mapping does not fit a file, or no mapping can be chosen for it."""


MISFIT = "the mapping names"
"""How the reason begins for which a file is none of a mapping."""

EVENT_FIELDS = (
    *("user_id", "item_id", "event_type", "ts", "event_id", "session_id", "device", "country", "value"),
    "recommendation_id",
)
TEXT_FIELDS = ("title", "category")
"""Fields whose values may hold line ends."""
FIELDS = (*EVENT_FIELDS, *TEXT_FIELDS, "price", "available")
"""The fields of a mapping that name one column each."""


def mapped_fields(mapping: SourceMapping) -> dict[str, str]:
    """The column of each field of an event or item that the mapping names one for."""
    return {name: column for name in FIELDS if (column := getattr(mapping, name))}


def mapped_columns(mapping: SourceMapping) -> list[str]:
    """The columns that a mapping names, each once. `*` is no column."""
    return list(dict.fromkeys(column for column in (*mapped_fields(mapping).values(), *mapping.attributes) if column != "*"))


def needed_columns(mapping: SourceMapping) -> list[str]:
    """The columns that a file must have."""
    return [column for column in mapped_columns(mapping) if column not in mapping.optional]


def source_file(fs: fsspec.AbstractFileSystem, path: str, mapping: SourceMapping) -> SourceFile:
    """A file as a mapping says that it is to be read."""
    one_line = {column for name, column in mapped_fields(mapping).items() if name not in TEXT_FIELDS}
    nested = tuple(column for column in mapped_columns(mapping) if "." in column)
    return SourceFile(fs, path, mapping.delimiter, tuple(mapping.header), nested, frozenset(one_line - set(mapping.attributes)))


def check_columns(source: SourceFile, mapping: SourceMapping) -> list[str]:
    """The columns of a file, none of an empty one. Raises MappingError when it lacks one that the mapping needs.

    A file without a header line has the columns of the mapping; it fits when one of its first lines has as many fields.
    """
    needed = needed_columns(mapping)
    there = columns_of(source, needed)
    missing = [column for column in needed if column not in there]
    if there and missing:
        raise MappingError(f"{source.path}: {MISFIT} {', '.join(missing)}; the file's columns are {', '.join(there)}")
    lines = first_lines(source) if mapping.header else []
    widths = [len(fields_of(line, layout_of(source, lines).delimiter)) for line in lines]
    if widths and len(mapping.header) not in widths:
        raise MappingError(f"{source.path}: {MISFIT} {len(mapping.header)} columns; the file's first line has {widths[0]}")
    return there


def fitting(path: str, own: Mapping[str, SourceMapping] | None = None) -> list[str]:
    """The names of the mappings, of the ready and the `own` ones, that the files at `path` fit, those of events first.

    A file fits a mapping when it has all its columns; one without a header line when most of its first lines have as many
    fields, a readable time and a known event type. Files that fit none or several are passed over while another one fits.
    Raises MappingError when none does.
    """
    known = {**BUILTIN, **(own or {})}
    fs, root = open_filesystem(path)
    found: dict[tuple[str, ...], str] = {}
    problems = []
    for file in find_files(fs, root)[0]:
        try:
            there, lines = _shown(fs, file)
            # Most files of a folder look alike. Without a header line each of them looks otherwise.
            if tuple(there) not in found:
                found[tuple(there)] = _only_fit(fs, file, there, lines, known)
        except IngestError as error:
            problems.append(error)
    if not found:
        raise next((problem for problem in problems if not isinstance(problem, _EmptyFile)), problems[0])
    return sorted(set(found.values()), key=lambda name: (known[name].kind != "events", list(known).index(name)))


def detect(path: str, own: Mapping[str, SourceMapping] | None = None) -> str:
    """The first name of `fitting`."""
    return fitting(path, own)[0]


def choose(path: str, name: str | None = None, own: Mapping[str, SourceMapping] | None = None) -> tuple[str, SourceMapping]:
    """The mapping called `name`, of the ready and the `own` ones, or the first that `path` fits. Raises MappingError."""
    known = {**BUILTIN, **(own or {})}
    chosen = detect(path, own) if name is None else name
    if chosen not in known:
        raise MappingError(f"there is no mapping {chosen!r}; there are: {', '.join(sorted(known))}")
    return chosen, known[chosen]


class _EmptyFile(MappingError):
    """A file holds nothing that a mapping could fit."""


def _shown(fs: fsspec.AbstractFileSystem, path: str) -> tuple[list[str], list[str]]:
    """The columns that a file shows without a mapping, and its first lines if it is delimited. Raises _EmptyFile."""
    source = SourceFile(fs, path)
    lines = first_lines(source)
    there = [*layout_of(source, lines).names, *source.folders] if lines else columns_of(source)
    if not there:
        raise _EmptyFile(f"{path} is empty")
    return there, lines


def _only_fit(
    fs: fsspec.AbstractFileSystem, path: str, there: list[str], lines: list[str], known: Mapping[str, SourceMapping]
) -> str:
    """The only mapping that a file fits. Raises MappingError when there is none or another one."""
    source = SourceFile(fs, path)
    fits = [name for name, mapping in known.items() if _fits(source_file(fs, path, mapping), mapping, there, lines)]
    if not fits and source.ending in JSON:
        # A key may come late.
        there = columns_of(source, None)
        fits = [name for name, mapping in known.items() if _fits(source_file(fs, path, mapping), mapping, there, lines)]
    if len(fits) == 1:
        return fits[0]
    found = f"fit equally: {', '.join(sorted(fits))}" if fits else f"none of {', '.join(sorted(known))} fits"
    raise MappingError(f"{path} has the columns {', '.join(there)}; {found}. Name a mapping, or add one as [mappings.<name>]")


def _fits(source: SourceFile, mapping: SourceMapping, there: list[str], lines: list[str]) -> bool:
    """`there` are the columns that the file shows without a mapping, `lines` its first lines if it is delimited."""
    needed = set(needed_columns(mapping))
    if lines and (mapping.delimiter or mapping.header):
        layout = layout_of(source, lines)
        if mapping.header:
            records = [fields_of(line, layout.delimiter) for line in lines]
            fitting = sum(_is_record(fields, mapping) for fields in records)
            return needed <= {*mapping.header, *source.folders} and 2 * fitting > len(records)
        there = [*layout.names, *source.folders]
    elif source.nested:
        there = columns_of(source, needed)
    return needed <= set(there) and not (mapping.header and not lines)


def _is_record(fields: list[str], mapping: SourceMapping) -> bool:
    if len(fields) != len(mapping.header):
        return False
    row = dict(zip(mapping.header, fields, strict=True))
    if mapping.ts in row and not pc.all(pc.is_valid(parse_ts(pa.array([row[mapping.ts]]), mapping.ts_unit))).as_py():
        return False
    known_types = {name.lower() for name in mapping.event_types}
    return mapping.event_type not in row or not known_types or row[mapping.event_type].lower() in known_types
