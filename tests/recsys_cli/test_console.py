"""Progress and tables as they look."""

from __future__ import annotations

import io
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from rich.console import Console

from recsys_cli.console import showing_progress, table
from recsys_core import progress


def recording(terminal: bool) -> tuple[Console, io.StringIO]:
    output = io.StringIO()
    return Console(file=output, force_terminal=terminal, width=120, color_system=None), output


def test_without_a_terminal_a_task_is_a_line_at_its_start_and_one_at_its_end() -> None:
    console, output = recording(terminal=False)
    with showing_progress(console):
        list(progress.track(range(3), "reading files"))
    first, last = output.getvalue().splitlines()
    assert first == "reading files …"
    assert last.startswith("reading files: 3 in ")
    assert last.endswith(" s")


def test_on_a_terminal_a_bar_shows_amount_share_and_time_left() -> None:
    console, output = recording(terminal=True)
    with showing_progress(console):
        with progress.task("reading", total=2000) as bar:
            bar.update(1000)
            time.sleep(0.3)  # a frame is drawn ten times a second
    shown = output.getvalue()
    assert "1,000/2,000" in shown
    assert "50%" in shown
    assert "left" in shown


@pytest.mark.parametrize("terminal", [True, False])
def test_tasks_nest_and_run_in_threads(terminal: bool) -> None:
    console, output = recording(terminal)

    def work(number: int) -> None:
        with progress.task(f"part {number}", total=10) as bar:
            bar.update(10)

    with showing_progress(console), progress.task("whole"), ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))
    assert all(f"part {number}: 10 in" in output.getvalue() for number in range(8))
    assert "whole: in" in output.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_failed_task_says_so_and_the_error_goes_on(terminal: bool) -> None:
    console, output = recording(terminal)
    with pytest.raises(ZeroDivisionError), showing_progress(console), progress.task("dividing"):
        _ = 1 / 0
    assert "dividing: failed after" in output.getvalue()


def test_progress_is_silent_again_after_the_block() -> None:
    console, output = recording(terminal=False)
    with showing_progress(console):
        pass
    list(progress.track(range(3), "unseen"))
    assert output.getvalue() == ""


def test_a_table_shows_brackets_as_they_are_and_groups_digits() -> None:
    console, output = recording(terminal=False)
    console.print(table("Users", [{"user": "[red]a", "events": 1234567, "share": 0.123456}]))
    assert "[red]a" in output.getvalue()
    assert "1,234,567" in output.getvalue()
    assert "0.1235" in output.getvalue()
