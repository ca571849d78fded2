"""Secrets do not leave in text: one rule for the settings that are shown, for logs, messages of errors and metadata.

A secret is told by its type (SecretStr), by its place in a URL (before the `@`, or the value of a query's parameter) or by the
name that it has (`sasl.password`, `fs.s3a.secret.key`). What is told by a name is rather hidden too often than too rarely.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, SecretStr

MASK = "***"

_NAMES = (
    "password|passwd|passphrase|passcode|pwd|secret|token|credential|signature|jaas|oauthbearer|webhook|bearer|authorization"
    "|cookie|dsn|api[-_.]?key|access[-_.]?key|account[-_.]?key|private[-_.]?key|shared[-_.]?key|encryption[-_.]?key"
)
_SECRET_NAME = re.compile(rf"{_NAMES}|([-_.]|^)(key|auth|pass|sas|sig|pem)$|[-_.]sas[-_.]", re.IGNORECASE)
_IN_A_PLACE = re.compile(r"[-_.](location|file|path|type|provider|class|mechanisms?|algorithm|seconds|ms)$", re.IGNORECASE)
"""Ends of names of what only says where a secret is, or of which kind."""

_SCHEME = r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://"
_CONTAINER = re.compile(r"(abfss?|wasbs?)://[A-Za-z0-9-]+@")
"""Azure writes the container where other URLs have the user."""
_USERINFO = re.compile(rf"{_SCHEME}(?:[^\s/:@]*:\S*|[^\s/]*)@")
_ASSIGNED = re.compile(
    rf"""(?P<name>[\w.-]*(?:{_NAMES}|\bsig|\bsas)[\w.-]*)(?P<quote>["']?)(?P<sign>\s*=\s*|(?<=["'])\s*:\s*)"""
    r"""(?P<value>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^\s&;,}\])"']+)""",
    re.IGNORECASE,
)
_BEARER = re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{6,}")


def is_secret_name(name: str) -> bool:
    """Whether what has this name is a secret: the name of a property of Kafka or Spark, of a setting or a parameter."""
    return bool(_SECRET_NAME.search(name)) and not _IN_A_PLACE.search(name)


def masked_text(text: str) -> str:
    """A text without the users and passwords of its URLs, and without what it says that secrets are."""
    if "://" in text:
        text = _USERINFO.sub(_without_userinfo, text)
    if "=" in text or ":" in text:
        text = _ASSIGNED.sub(_without_value, text)
    return _BEARER.sub(rf"\1 {MASK}", text)


def _without_userinfo(found: re.Match[str]) -> str:
    return found[0] if _CONTAINER.fullmatch(found[0]) else f"{found['scheme']}://{MASK}@"


def _without_value(found: re.Match[str]) -> str:
    if _IN_A_PLACE.search(found["name"]):
        return found[0]
    return f"{found['name']}{found['quote']}{found['sign']}{MASK}"


def masked(value: Any, name: str = "") -> Any:
    """A value of the settings as it may be shown: the same but for what is secret in it.

    Members of mappings, which may have any name, are judged by it; fields of models by their types.
    """
    if isinstance(value, SecretStr):
        return MASK if value.get_secret_value() else ""
    if isinstance(value, BaseModel):
        members = {field: getattr(value, field) for field in type(value).model_fields}
        return {field: masked(inner) for field, inner in members.items() if inner is not None}
    if isinstance(value, Mapping):
        return {key: masked(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(masked(inner) for inner in value)
    if value not in (None, "") and is_secret_name(name):
        return MASK
    return masked_text(value) if isinstance(value, str) else value
