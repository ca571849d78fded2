"""What comes from outside neither begins a log line of its own nor hides one."""

from __future__ import annotations

import io
import logging

from hypothesis import given
from hypothesis import strategies as st

from recsys_core.log_lines import TextLines

FORGED = "eve\r\n2026-01-01 00:00:00,000 CRITICAL serving.server: all is lost\x1b[2K\u2028\u202eback"


def logged(message: str, *arguments: object, exc_info: bool = False) -> str:
    sink = io.StringIO()
    handler = logging.StreamHandler(sink)
    handler.setFormatter(TextLines())
    log = logging.Logger("test")
    log.addHandler(handler)
    log.error(message, *arguments, exc_info=exc_info, extra={"fields": {"request": FORGED}})
    return sink.getvalue()


def test_a_record_is_one_line_with_its_fields() -> None:
    line = logged("Redis key %s can't be read", FORGED)
    assert line.count("\n") == len(line.splitlines()) == 1
    assert "\x1b" not in line
    assert "eve\\r\\n2026-01-01" in line
    assert "request=eve" in line


def test_the_lines_of_a_traceback_are_indented() -> None:
    try:
        raise ValueError(FORGED)
    except ValueError:
        first, *others = logged("failed", exc_info=True).splitlines()
    assert " ERROR test: failed" in first
    assert all(line.startswith("    ") for line in others)


@given(st.text())
def test_nothing_splits_a_line(text: str) -> None:
    assert len(logged("%s", text).splitlines()) == 1
