"""Whether a text names a user: by a field that is a user's, or by words that may as well mean something else.

User ids are often plain numbers, which stand in every text for something else. So only a value under a name like `user_id`
is the user, in JSON by what it means and not by how it is escaped. The same characters elsewhere are a mention, which people
have to look at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from typing import Any

_WHO = (
    "user|uid|customer|client|visitor|member|account|person|profile|subscriber|buyer|shopper|reader|viewer|listener|guest|player"
    "|reviewer|consumer"
)
_USER_FIELD = re.compile(rf"(?:{_WHO})(?:id|ids|key|no|nr|num|number|name|uuid|guid|code|ref|login)?")
_USERS_FIELD = re.compile(rf"(?:{_WHO})s")
"""Names of lists of ids, and of numbers of users."""
_OTHER_FIELD = re.compile(
    r"(?:item|product|article|movie|film|track|song|book|content|sku|event|ts|time|date|session|device|country|region|value|price|"
    r"rating|amount|quantity|count|category|class|title|recommendation|schema|version|offset|partition|user|click|action|type).*"
)
_FIELD = re.compile(r'("(?:[^"\\]|\\.)*")\s*:\s*("(?:[^"\\]|\\.)*"|-?\d[\w.+-]*)')
_EDGE = r"[\"'|,;=:\s<>()\[\]{}]"


class Named:
    """One user's id, looked for in texts. `fields` are further names of fields that hold user ids."""

    def __init__(self, user_id: str, fields: Collection[str] = ()) -> None:
        self.user_id = user_id
        self._fields = frozenset(fields)
        escaped = {user_id, json.dumps(user_id)[1:-1], json.dumps(user_id, ensure_ascii=False)[1:-1]}
        either = "|".join(map(re.escape, sorted(escaped)))
        self._mention = re.compile(rf"(?:^|{_EDGE})(?:{either})(?:$|{_EDGE})", re.IGNORECASE if "\\u" in either else 0)

    def is_field(self, name: str) -> bool:
        """Whether a field of this name holds a user's id."""
        return name in self._fields or _USER_FIELD.fullmatch(_plain(name)) is not None

    def in_fields(self, text: str) -> bool:
        """Whether a value of a user's field of a JSON text, whole or broken, is the id."""
        return self.user_id in self._users(_fields_of(text))

    def is_of(self, row: str) -> bool:
        """Whether a rejected row, a JSON text, is the user's.

        One that has no field of a user's name is when a field of unknown meaning holds the id.
        """
        return self.user_id in self.users_of(row)

    def users_of(self, row: str) -> list[str]:
        """Ids that may be of the user of a rejected row, as `is_of` looks for one of them."""
        fields = _fields_of(row)
        return self._users(fields) or [value for name, value in fields if not _OTHER_FIELD.fullmatch(_plain(name))]

    def _users(self, fields: list[tuple[str, str]]) -> list[str]:
        return [value for name, value in fields if self.is_field(name) or (_is_list(name) and not isinstance(value, _Number))]

    def mentioned(self, text: str) -> bool:
        """Whether the id stands in a text, not as a part of a longer word."""
        return self._mention.search(text) is not None


class _Number(str):
    """A number of a JSON text, as it is written there."""


def _fields_of(text: str) -> list[tuple[str, str]]:
    """Field and value of everything in a JSON text; what stands in a list is of the list's field."""
    try:
        return list(_pairs(json.loads(text, parse_int=_Number, parse_float=_Number, parse_constant=_Number)))
    except (ValueError, RecursionError):
        return [(_text(key), _text(value)) for key, value in _FIELD.findall(text)]


def _pairs(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _pairs(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _pairs(inner, name)
    elif isinstance(value, str) and name:
        yield name, value


def _text(literal: str) -> str:
    """What a JSON string or number stands for; a string with a broken escape stands for itself."""
    if not literal.startswith('"'):
        return _Number(literal)
    try:
        return str(json.loads(literal, strict=False))
    except ValueError:
        return literal.strip('"')


def _plain(name: str) -> str:
    """`userid` of `User-ID` and of `user_id:token`."""
    return re.sub(r"[^a-z0-9]", "", name.partition(":")[0].lower())


def _is_list(name: str) -> bool:
    return _USERS_FIELD.fullmatch(_plain(name)) is not None
