"""From request bytes to checked arguments; every fault names its field."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from recsys_core.settings import Settings

DEFAULT_COUNT = 10
MAX_EXCLUDED = 1000
MAX_CATEGORIES = 50
MAX_BATCH_ITEMS = 1_000_000
"""Most items that one RecommendBatch may ask for: users × count."""

M = TypeVar("M", bound=Message)


class InvalidRequest(ValueError):
    """A request breaks a rule; the message names the field, what it was and what it may be."""


@dataclass(frozen=True)
class Options:
    """What is asked for, apart from whom for.

    Attributes:
        current_item: the item that the user looks at, empty for none. `excluded` holds it too.
    """

    count: int = DEFAULT_COUNT
    categories: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    current_item: str = ""
    explain: bool = False

    @property
    def needs_computing(self) -> bool:
        """Whether a cached answer can't hold what is asked for."""
        return bool(self.categories or self.current_item or self.explain)

    @property
    def plain(self) -> bool:
        """Whether the answer depends on the user and the count alone, and so may be cached."""
        return not (self.needs_computing or self.excluded)


def parse(kind: type[M], data: bytes) -> M:
    """Raises InvalidRequest when `data` is not a message of that kind."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise InvalidRequest(f"the request is not a {kind.DESCRIPTOR.full_name}: {error}") from error


def options_of(request: Any, settings: Settings) -> Options:
    """The options of a RecommendRequest or a RecommendBatchRequest. Raises InvalidRequest."""
    current = request.context.current_item_id
    excluded = _excluded(request, settings)
    if current:
        check_id("context.current_item_id", current, settings)
        excluded = (*excluded, current)
    return Options(_count(request, settings), _categories(request, settings), excluded, current, request.explain)


def similar_options_of(request: Any, settings: Settings) -> Options:
    """The options of a SimilarItemsRequest. Raises InvalidRequest."""
    return Options(_count(request, settings), _categories(request, settings), _excluded(request, settings))


def check_batch(user_ids: Iterable[str], users: int, count: int, settings: Settings) -> None:
    """Raises InvalidRequest when a batch is empty, too large, or has a bad user id."""
    if not 1 <= users <= settings.serving.max_batch:
        raise InvalidRequest(f"user_ids holds {users} users; it must hold 1 to {settings.serving.max_batch}")
    if users * count > MAX_BATCH_ITEMS:
        raise InvalidRequest(f"user_ids × count is {users * count} items; it may be {MAX_BATCH_ITEMS} at most")
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


def _categories(request: Any, settings: Settings) -> tuple[str, ...]:
    return _limited("categories", request.categories, MAX_CATEGORIES, settings)


def _excluded(request: Any, settings: Settings) -> tuple[str, ...]:
    return _limited("exclude_item_ids", request.exclude_item_ids, MAX_EXCLUDED, settings)


def _limited(field: str, values: Any, most: int, settings: Settings) -> tuple[str, ...]:
    if len(values) > most:
        raise InvalidRequest(f"{field} holds {len(values)} values; {most} are allowed")
    _check_ids(field, values, settings)
    return tuple(values)
