"""What every part of the rig has in common: that it may not be had here, and what is noted of what it went through."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from recsys_core.errors import UserError


@dataclass(frozen=True)
class Drill:
    """What a test did to an engine.

    Attributes:
        engine: and how many of it.
        ran: what worked on it meanwhile.
        fault: what was done to it.
        lost: events, answers or rows that were lost or doubled, of how many.
        degraded: for how long and how far.
    """

    engine: str
    ran: str
    fault: str
    lost: str
    degraded: str


Note = Callable[[Drill], None]
"""Adds a line to the table at the end."""


@contextmanager
def had(part: AbstractContextManager[Any]) -> Iterator[Any]:
    """A part of the rig. Where it can't be had the test is skipped and says why; in CI it fails."""
    try:
        entered = part.__enter__()
    except UserError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    try:
        yield entered
    finally:
        part.__exit__(None, None, None)
