"""Log lines for people: they tell no secret, and what comes from outside can't begin a line of its own, nor hide one."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from recsys_core.masking import masked_text

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Line ends, terminal codes, and what turns the direction of text."""


class TextLines(logging.Formatter):
    """A record as one line, with its fields behind the message; the lines of a traceback are indented below it."""

    def __init__(self, form: str = FORMAT) -> None:
        super().__init__(form)

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        line = super().formatMessage(record) + "".join(f" {name}={value}" for name, value in fields.items())
        return escaped(masked_text(line))

    def formatException(self, ei: Any) -> str:
        return "\n".join("    " + escaped(line) for line in masked_text(super().formatException(ei)).split("\n"))


def escaped(text: str) -> str:
    """The text with control characters as they are written in Python."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def set_up_text_log() -> None:
    """Logs of this process go to stderr as lines for people."""
    handler = logging.StreamHandler()
    handler.setFormatter(TextLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
