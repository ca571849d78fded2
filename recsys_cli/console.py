"""What the command line shows: progress with the time left, and tables."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from rich.console import Console, Group
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as RichTask
from rich.table import Table
from rich.text import Text

from recsys_core.progress import Task, reporting_to


def plain_console() -> Console:
    """Where commands print. Brackets in what they print, such as those of a path, are no markup."""
    return Console(markup=False)


@contextmanager
def showing_progress(console: Console | None = None) -> Iterator[None]:
    """Show all progress of this process while the block runs: bars on a terminal, plain lines elsewhere.

    Tasks may be nested and may run in several threads.
    """
    console = console or plain_console()
    if not console.is_terminal:
        with reporting_to(_Lines(console)):
            yield
        return
    with _bars(console) as progress, reporting_to(_Bars(progress)):
        yield


def table(title: str, rows: Sequence[Mapping[str, object]], columns: Sequence[str] = (), whole: str = "") -> Group:
    """A table of `rows` under its title, which may be wider than it.

    Its columns are `columns`, else the keys of the first row. Numbers stand on the right. A narrow terminal breaks every column
    into lines but the one that is to stay `whole`.
    """
    names = list(columns) or list(rows[0] if rows else ())
    made = Table(header_style="bold")
    for name in names:
        numeric = bool(rows) and all(isinstance(row.get(name), int | float | None) for row in rows)
        made.add_column(name, justify="right" if numeric else "left", overflow="fold", no_wrap=name == whole)
    for row in rows:
        made.add_row(*(_cell(row.get(name)) for name in names))
    return Group(*([Text(title, style="bold")] if title else []), made)


def _cell(value: object) -> Text:
    if value is None:
        return Text("")
    if isinstance(value, bool):
        return Text("yes" if value else "no")
    if isinstance(value, int):
        return Text(f"{value:,}")
    if isinstance(value, float):
        return Text(f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}")
    return value if isinstance(value, Text) else Text(str(value))


@dataclass
class _Count:
    """The state of one task, for the line that closes it."""

    description: str
    total: float | None
    completed: float = 0.0
    started: float = 0.0

    def closing_line(self, failed: bool) -> str:
        seconds = f"{time.monotonic() - self.started:.1f} s"
        amount = f"{self.completed:,.0f} " if self.completed else ""
        return f"{self.description}: failed after {seconds}" if failed else f"{self.description}: {amount}in {seconds}"


class _Lines:
    """A reporter that prints a line when a task starts and one when it ends."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, description: str, total: float | None) -> AbstractContextManager[Task]:
        return self._task(_Count(description, total, started=time.monotonic()))

    @contextmanager
    def _task(self, count: _Count) -> Iterator[Task]:
        self._print(f"{count.description} …")
        failed = True
        try:
            yield _Handle(count)
            failed = False
        finally:
            self._print(count.closing_line(failed))

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Bars:
    """A reporter that draws a bar a task and leaves a line when the task ends."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __call__(self, description: str, total: float | None) -> AbstractContextManager[Task]:
        return self._task(_Count(description, total, started=time.monotonic()))

    @contextmanager
    def _task(self, count: _Count) -> Iterator[Task]:
        bar = self._progress.add_task(count.description, total=count.total)
        failed = True
        try:
            yield _Handle(count, self._progress, bar)
            failed = False
        finally:
            self._progress.remove_task(bar)
            line = Text(count.closing_line(failed), style="red" if failed else "dim")
            self._progress.console.print(line, soft_wrap=True)


class _Handle:
    """The task that the reporting code moves."""

    def __init__(self, count: _Count, progress: Progress | None = None, bar: TaskID | None = None) -> None:
        self._count, self._progress, self._bar = count, progress, bar

    def update(self, completed: float, total: float | None = None) -> None:
        self._count.completed = completed
        if self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, completed=completed, total=total)


class _AmountColumn(ProgressColumn):
    """`completed/total` with thousands separators; the total only once it is known."""

    def render(self, task: RichTask) -> Text:
        total = f"/{task.total:,.0f}" if task.total is not None else ""
        return Text(f"{task.completed:,.0f}{total}" if task.completed or total else "")


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        _AmountColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
