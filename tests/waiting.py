"""Waiting for something that other threads and processes bring about."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def eventually(holds: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What `holds()` gives once it is true."""
    deadline = time.monotonic() + seconds
    while not (result := holds()):
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.02)
    return result
