"""The cores that a process may use, by its affinity and by the limit of its container."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recsys_core.cores import usable_cores


@pytest.mark.parametrize(("said", "cores"), [("50000 100000", 1), ("150000 100000", 2), ("200000 100000", 2)])
def test_a_limit_counts_in_whole_cores(said: str, cores: int, tmp_path: Path) -> None:
    limit = tmp_path / "cpu.max"
    limit.write_text(said)
    assert usable_cores(limit) == min(cores, len(os.sched_getaffinity(0)))


@pytest.mark.parametrize("said", ["max 100000", "", "?"])
def test_no_limit_leaves_what_the_process_may_run_on(said: str, tmp_path: Path) -> None:
    limit = tmp_path / "cpu.max"
    limit.write_text(said)
    assert usable_cores(limit) == usable_cores(tmp_path / "nothing") == len(os.sched_getaffinity(0))


def test_a_process_that_is_bound_to_a_core_has_one() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from recsys_core.cores import usable_cores; print(usable_cores())"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert int(shown.stdout) == 1
