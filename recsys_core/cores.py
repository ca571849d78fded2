"""How many cores this process may use, which is less than the machine has in a container and under `taskset`."""

from __future__ import annotations

import os
from math import ceil, inf
from pathlib import Path

LIMIT = Path("/sys/fs/cgroup/cpu.max")
"""Of a container (cgroup v2): microseconds of processor time that it may use in a period, or `max`, and the period."""


def usable_cores(limit: Path = LIMIT) -> int:
    """At least one; 2.5 cores of a limit count as 3."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, ceil(min(allowed, _limited_to(limit))))


def _limited_to(limit: Path) -> float:
    try:
        time, period = limit.read_text().split()
        return inf if time == "max" else int(time) / int(period)
    except (OSError, ValueError):
        return inf
