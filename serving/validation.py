"""From request bytes to checked arguments; every fault names its field."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from recsys_core.settings import Settings

DEFAULT_COUNT = 10
MAX_EXCLUDED = 1000
MAX_CATEGORIES = 50
MAX_BATCH_ITEMS = 1_000_000
"""Most plain items that one RecommendBatch may ask for: users × count × the cost of an item."""
EXPLAINED_COST, DIVERSE_COST = 100, 10
"""What an item costs when it is explained (16–100 µs), or chosen by its difference from others (10–30); a plain one: 1–4."""
MAX_ATTRIBUTES = 20
MAX_VALUES = 100
"""Attributes of a filter, and values of each."""

M = TypeVar("M", bound=Message)


class InvalidRequest(ValueError):
    """A request breaks a rule; the message names the field, what it was and what it may be."""


@dataclass(frozen=True)
class ItemFilter:
    """Which items may be in an answer; all that is set must hold.

    Attributes:
        categories: any of these or one below them.
        min_price, max_price: inclusive bounds, None for none.
        attributes: names of catalogue attributes, each with the values of which one must be the item's.
        include_unavailable: also items that the catalogue says are not available.
    """

    categories: tuple[str, ...] = ()
    min_price: float | None = None
    max_price: float | None = None
    attributes: tuple[tuple[str, tuple[str, ...]], ...] = ()
    include_unavailable: bool = False


EVERY_ITEM = ItemFilter()


@dataclass(frozen=True)
class Diversity:
    """How much the items of an answer have to differ. `relevance` 1 and `max_per_category` 0 ask for nothing."""

    relevance: float = 1.0
    max_per_category: int = 0


NO_DIVERSITY = Diversity()


@dataclass(frozen=True)
class Context:
    """Where the user is, which changes what is recommended. `current_item` is the item that the user looks at; `excluded` of
    the options holds it too."""

    current_item: str = ""
    device: str = ""
    country: str = ""
    ts_ms: int = 0


NO_CONTEXT = Context()


@dataclass(frozen=True)
class Options:
    """What is asked for, apart from whom for."""

    count: int = DEFAULT_COUNT
    filter: ItemFilter = EVERY_ITEM
    excluded: tuple[str, ...] = ()
    context: Context = NO_CONTEXT
    diversity: Diversity = NO_DIVERSITY
    include_consumed: bool = False
    explain: bool = False

    @property
    def needs_computing(self) -> bool:
        """Whether a cached answer, which is made for no context, can't hold what is asked for."""
        return bool(
            self.filter != EVERY_ITEM
            or self.context != NO_CONTEXT
            or self.explain
            or self.diversity != NO_DIVERSITY
            or self.include_consumed
        )

    @property
    def cost(self) -> int:
        """What an item of the answer costs, in plain ones."""
        if self.explain:
            return EXPLAINED_COST
        return 1 if self.diversity == NO_DIVERSITY else DIVERSE_COST

    @cached_property
    def plain(self) -> bool:
        """Whether the answer depends on the user and the count alone, and so may be cached."""
        return not (self.needs_computing or self.excluded)

    @cached_property
    def without_place_and_time(self) -> Options:
        """The same for a release that takes no notice of device, country and time of the request: it has no user tower."""
        return replace(self, context=Context(self.context.current_item)) if self.context != NO_CONTEXT else self


def parse(kind: type[M], data: bytes) -> M:
    """Raises InvalidRequest when `data` is not a message of that kind."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise InvalidRequest(f"the request is not a {kind.DESCRIPTOR.full_name}: {error}") from error


def options_of(request: Any, settings: Settings) -> Options:
    """The options of a RecommendRequest or a RecommendBatchRequest. Raises InvalidRequest."""
    excluded = _excluded(request, settings)
    context = NO_CONTEXT
    if request.HasField("context"):
        context = _context(request.context, settings)
        excluded = (*excluded, context.current_item) if context.current_item else excluded
    return Options(
        count=_count(request, settings),
        filter=_filter(request, settings),
        excluded=excluded,
        context=context,
        diversity=_diversity(request.diversity, settings) if request.HasField("diversity") else NO_DIVERSITY,
        include_consumed=request.include_consumed,
        explain=request.explain,
    )


def item_options_of(request: Any, settings: Settings) -> Options:
    """The options of a SimilarItemsRequest or a TrendingRequest. Raises InvalidRequest."""
    return Options(_count(request, settings), _filter(request, settings), _excluded(request, settings))


def check_batch(user_ids: Iterable[str], users: int, options: Options, settings: Settings) -> None:
    """Raises InvalidRequest when a batch is empty, too large, or has a bad user id."""
    if not 1 <= users <= settings.serving.max_batch:
        raise InvalidRequest(f"user_ids holds {users} users; it must hold 1 to {settings.serving.max_batch}")
    items, most = users * options.count, MAX_BATCH_ITEMS // options.cost
    if items > most:
        what = "" if options.cost == 1 else f" with {'explain' if options.explain else 'diversity'}"
        raise InvalidRequest(f"user_ids × count is {items} items; it may be {most} at most{what}")
    _check_ids("user_ids", user_ids, settings)


def check_id(field: str, value: str, settings: Settings) -> None:
    """Raises InvalidRequest when an id is empty or too long."""
    if not value:
        raise InvalidRequest(f"{field} is empty")
    limit = settings.events.max_id_bytes
    if len(value) > limit or len(value.encode()) > limit:
        raise InvalidRequest(f"{field} has {len(value.encode())} bytes; {limit} are allowed")


def _check_ids(field: str, values: Iterable[str], settings: Settings) -> None:
    for at, value in enumerate(values):
        check_id(f"{field}[{at}]", value, settings)


def _count(request: Any, settings: Settings) -> int:
    if not request.HasField("count"):
        return min(DEFAULT_COUNT, settings.serving.max_items)
    if not 1 <= request.count <= settings.serving.max_items:
        raise InvalidRequest(f"count is {request.count}; it must be 1 to {settings.serving.max_items}")
    return int(request.count)


def _context(context: Any, settings: Settings) -> Context:
    named = (("current_item_id", context.current_item_id), ("device", context.device), ("country", context.country))
    for name, value in named:
        if value:
            check_id(f"context.{name}", value, settings)
    return Context(context.current_item_id, context.device, context.country, context.ts_ms)


def _filter(request: Any, settings: Settings) -> ItemFilter:
    categories = _limited("categories", request.categories, MAX_CATEGORIES, settings)
    if not request.HasField("filter"):
        return ItemFilter(categories) if categories else EVERY_ITEM
    wanted = request.filter
    bounds = {name: getattr(wanted, name) for name in ("min_price", "max_price") if wanted.HasField(name)}
    for name, bound in bounds.items():
        if math.isnan(bound):
            raise InvalidRequest(f"filter.{name} is not a number")
    if len(bounds) == 2 and bounds["min_price"] > bounds["max_price"]:
        raise InvalidRequest(
            f"filter.min_price is {bounds['min_price']} and filter.max_price {bounds['max_price']}; no price is between them"
        )
    if len(wanted.attributes) > MAX_ATTRIBUTES:
        raise InvalidRequest(f"filter.attributes holds {len(wanted.attributes)} attributes; {MAX_ATTRIBUTES} are allowed")
    attributes = []
    for at, attribute in enumerate(wanted.attributes):
        check_id(f"filter.attributes[{at}].name", attribute.name, settings)
        attributes.append((attribute.name, _limited(f"filter.attributes[{at}].values", attribute.values, MAX_VALUES, settings)))
    return ItemFilter(categories, attributes=tuple(attributes), include_unavailable=wanted.include_unavailable, **bounds)


def _diversity(wanted: Any, settings: Settings) -> Diversity:
    relevance = wanted.relevance if wanted.HasField("relevance") else 1.0
    if not 0 <= relevance <= 1:
        raise InvalidRequest(f"diversity.relevance is {relevance}; it must be 0 to 1")
    if not 0 <= wanted.max_per_category <= settings.serving.max_items:
        raise InvalidRequest(
            f"diversity.max_per_category is {wanted.max_per_category}; it must be 0 to {settings.serving.max_items}"
        )
    return Diversity(relevance, wanted.max_per_category)


def _excluded(request: Any, settings: Settings) -> tuple[str, ...]:
    return _limited("exclude_item_ids", request.exclude_item_ids, MAX_EXCLUDED, settings)


def _limited(field: str, values: Any, most: int, settings: Settings) -> tuple[str, ...]:
    if len(values) > most:
        raise InvalidRequest(f"{field} holds {len(values)} values; {most} are allowed")
    _check_ids(field, values, settings)
    return tuple(values)
