"""Runs a function in a process of its own: its result, log, progress and errors come back, its memory and its crashes do not.

A training that the kernel kills for its memory would otherwise take the whole night with it.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from recsys_core import progress

T = TypeVar("T")

_WAIT_SECONDS = 10.0


class ApartError(Exception):
    """The function raised, or its process died; the message says which, the note has the trace of the other process."""


def run_apart(function: Callable[..., T], *arguments: Any, log: Callable[..., None]) -> T:
    """`function(*arguments, log=…)` in a fresh process. What it logs is given to `log` here, in order.

    `function` is importable by its module and name, arguments and result can be sent between processes. Raises ApartError.
    The process ends with this one and with the call.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(there, function, arguments), daemon=True)
    process.start()
    there.close()
    try:
        found: T = _follow(here, log)
        return found
    except EOFError:
        process.join(_WAIT_SECONDS)
        raise ApartError(f"the process of {function.__name__} died (exit code {process.exitcode})") from None
    finally:
        here.close()
        process.terminate()
        process.join()


def _follow(here: Connection, log: Callable[..., None]) -> Any:
    """Act on what the other process says until it gives its result. Raises EOFError when it dies."""
    with ExitStack() as opened:
        bars: dict[int, tuple[ExitStack, progress.Task]] = {}
        while True:
            kind, *content = here.recv()
            if kind == "log":
                log(*content)
            elif kind == "open":
                number, description, total = content
                own = opened.enter_context(ExitStack())
                bars[number] = own, own.enter_context(progress.task(description, total))
            elif kind == "move":
                number, completed, total = content
                bars[number][1].update(completed, total)
            elif kind == "close":
                bars.pop(content[0])[0].close()
            elif kind == "failed":
                error = ApartError(content[0])
                error.add_note(content[1])
                raise error
            else:
                return content[0]


# -- in the other process ---------------------------------------------------------------------------------------------


def _run(there: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        with progress.reporting_to(_Sent(there)):
            result = function(*arguments, log=lambda *logged: there.send(("log", *logged)))
        there.send(("done", result))
    except Exception as error:
        there.send(("failed", f"{type(error).__name__}: {error}", traceback.format_exc()))
        raise


class _Sent:
    """A reporter that sends what it is told."""

    def __init__(self, there: Connection) -> None:
        self._there = there
        self._numbers = count()

    @contextmanager
    def __call__(self, description: str, total: float | None) -> Iterator[progress.Task]:
        number = next(self._numbers)
        self._there.send(("open", number, description, total))
        try:
            yield _SentTask(self._there, number)
        finally:
            self._there.send(("close", number))


class _SentTask:
    def __init__(self, there: Connection, number: int) -> None:
        self._there, self._number = there, number

    def update(self, completed: float, total: float | None = None) -> None:
        self._there.send(("move", self._number, completed, total))
