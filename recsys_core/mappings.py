"""Mappings of well-known public data sets, ready by name, and the choice of the one that fits a file."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from recsys_core.parsing import parse_ts
from recsys_core.readers import IngestError, SourceFile, columns_of, find_files, first_record
from recsys_core.settings import SourceMapping
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
    "movielens-catalog": SourceMapping(kind="catalog", item_id="movieId", title="title", category="genres"),
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


def mapped_columns(mapping: SourceMapping) -> list[str]:
    """The columns that a mapping names, each once. `*` is no column."""
    event = [mapping.user_id, mapping.item_id, mapping.event_type, mapping.ts, mapping.event_id, mapping.session_id]
    more = [mapping.device, mapping.country, mapping.value, mapping.recommendation_id]
    item = [mapping.title, mapping.category, mapping.price, mapping.available, *mapping.attributes]
    return list(dict.fromkeys(column for column in (*event, *more, *item) if column and column != "*"))


def check_columns(source: SourceFile, mapping: SourceMapping) -> None:
    """Raise MappingError when a file has columns but lacks one that the mapping names and needs."""
    there = columns_of(source)
    missing = [column for column in mapped_columns(mapping) if column not in there and column not in mapping.optional]
    if there and missing:
        raise MappingError(f"{source.path}: the mapping names {', '.join(missing)}; the file's columns are {', '.join(there)}")


def detect(path: str, own: Mapping[str, SourceMapping] | None = None) -> str:
    """The name of the only mapping, of the ready and the `own` ones, that fits the first file at `path`.

    A mapping with a header line fits when all its columns are there, one without when the first line has as many fields, a
    readable time and a known event type.
    Raises MappingError when none or several fit.
    """
    known = {**BUILTIN, **(own or {})}
    fs, root = open_filesystem(path)
    first = find_files(fs, root)[0]
    fitting = {name: mapping for name, mapping in known.items() if _fits(SourceFile(fs, first, mapping.delimiter), mapping)}
    if len(fitting) == 1:
        return next(iter(fitting))
    found = f"fit equally: {', '.join(sorted(fitting))}" if fitting else f"none of {', '.join(sorted(known))} fits"
    columns = ", ".join(columns_of(SourceFile(fs, first)))
    raise MappingError(f"{first} has the columns {columns}; {found}. Name a mapping, or add one as [mappings.<name>]")


def choose(path: str, name: str | None = None, own: Mapping[str, SourceMapping] | None = None) -> tuple[str, SourceMapping]:
    """The mapping called `name`, of the ready and the `own` ones, or the one that `path` fits. Raises MappingError."""
    known = {**BUILTIN, **(own or {})}
    chosen = detect(path, own) if name is None else name
    if chosen not in known:
        raise MappingError(f"there is no mapping {chosen!r}; there are: {', '.join(sorted(known))}")
    return chosen, known[chosen]


def _fits(source: SourceFile, mapping: SourceMapping) -> bool:
    if not mapping.header:
        needed = set(mapped_columns(mapping)) - set(mapping.optional)
        return needed <= set(columns_of(source))
    record = first_record(source)
    if len(record) != len(mapping.header):
        return False
    row = dict(zip(mapping.header, record, strict=True))
    if mapping.ts and not pc.all(pc.is_valid(parse_ts(pa.array([row[mapping.ts]]), mapping.ts_unit))).as_py():
        return False
    known_types = {name.lower() for name in mapping.event_types}
    return not mapping.event_type or row[mapping.event_type].strip().lower() in known_types
