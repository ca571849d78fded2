"""Settings as people read them: the documented `recsys.toml` and the table of `recsys config`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from rich.table import Table
from rich.text import Text

from recsys_core.masking import MASK, is_secret_name, masked, masked_text
from recsys_core.settings import Section, Settings

HEADER = """\
# Every setting of the platform with its default. A name or value that is not known stops every command with a message.
#
# The first of these that names a setting wins:
#   1. a variable RECSYS_<SECTION>__<NAME>, such as RECSYS_ALS__RANK=100
#   2. <home>/recsys.toml, where <home> is RECSYS_HOME or --home (default: .recsys)
#   3. this file, or the file that RECSYS_CONFIG names
#   4. the defaults in recsys_core/settings.py
# `recsys config` shows what is in effect.
"""

MAPPING_EXAMPLE = """
# Own mappings of `recsys ingest PATH --mapping NAME`: which column of a file is which field. Not set by default.
# [mappings.shop]
# kind = "events"                  # events or catalog
# user_id = "visitor"              # the columns of the file
# item_id = "product"
# event_type = "action"
# event_types = { buy = "purchase" }
# ts = "time"
# ts_unit = "s"                    # s, ms, us, ns; dates: iso, dmy, mdy
# All keys: docs/reference.md.
"""


def documented_toml(settings: Settings) -> str:
    """All settings as the text of a `recsys.toml`, each after a comment that says what it does. Secrets are not in it."""
    lines = [HEADER]
    for name, field, value in _fields(settings):
        if not isinstance(value, Section) and name != "mappings":
            lines += _setting(name, field, Path(value).as_posix() if isinstance(value, Path) else value)
    for name, _, value in _fields(settings):
        if isinstance(value, Section):
            lines.append(f"\n[{name}]")
            for inner, field, inner_value in _fields(value):
                lines += _setting(inner, field, inner_value)
    return "\n".join(lines) + "\n" + MAPPING_EXAMPLE


def settings_table(settings: Settings) -> Table:
    """The settings in effect; those that differ from the default are marked."""
    made = Table(title="Settings in effect", title_justify="left", title_style="bold", header_style="bold")
    made.add_column("setting")
    made.add_column("value", overflow="fold")
    made.add_column("what it does", style="dim", overflow="fold")
    for section, _, value in _fields(settings):
        rows = [(f"{section}.{n}", f, v) for n, f, v in _fields(value)] if isinstance(value, Section) else [(section, _, value)]
        for name, field, current in rows:
            changed = current != field.get_default(call_default_factory=True)
            shown = Text("unset" if current is None else _show(masked(current)), style="bold yellow" if changed else "")
            made.add_row(name, shown, field.description or "")
    return made


def explain_invalid(error: ValidationError) -> str:
    """One line for each wrong setting."""
    lines = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"]) or error.title
        if problem["type"] == "extra_forbidden":
            lines.append(f"{name}: there is no such setting (`recsys config` lists them)")
        else:
            secret = any(is_secret_name(str(part)) for part in problem["loc"])
            given = MASK if secret else repr(masked(problem["input"]))
            lines.append(f"{name} = {given}: {masked_text(problem['msg'])}")
    return "\n".join(lines)


def _fields(model: BaseModel) -> Iterator[tuple[str, FieldInfo, Any]]:
    for name, field in type(model).model_fields.items():
        yield name, field, getattr(model, name)


def _setting(name: str, field: FieldInfo, value: Any) -> list[str]:
    comment = [f"# {field.description}"] if field.description else []
    if value is None:
        return [*comment, f"# {name} ="]
    shown = _toml(value if isinstance(value, SecretStr) else masked(value))
    # With a secret left out it would be another setting.
    return [*comment, f"# {name} = {shown}" if MASK in shown else f"{name} = {shown}"]


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_show(inner)}" for key, inner in value.items())
    return str(value)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(k)} = {_toml(v)}" for k, v in value.items()) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, Enum):
        return _toml(value.value)
    if isinstance(value, SecretStr):
        return '""'
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else json.dumps(name)
