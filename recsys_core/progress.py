"""Progress of long work: core code reports steps, whoever runs it decides how they look.

The default reporter is silent. The command line installs one that draws bars with the time left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, TypeVar

T = TypeVar("T")


class Task(Protocol):
    """One bar. `total` is None while it is unknown."""

    def update(self, completed: float, total: float | None = None) -> None: ...


class _Silent:
    def update(self, completed: float, total: float | None = None) -> None:
        """Shows nothing."""


Reporter = Callable[[str, float | None], AbstractContextManager[Task]]


def silent(description: str, total: float | None) -> AbstractContextManager[Task]:  # noqa: ARG001
    """Reports nothing."""
    return nullcontext(_Silent())


_reporter: Reporter = silent


@contextmanager
def reporting_to(reporter: Reporter) -> Iterator[None]:
    """Send all progress of this process to `reporter` while the block runs."""
    global _reporter
    before, _reporter = _reporter, reporter
    try:
        yield
    finally:
        _reporter = before


def task(description: str, total: float | None = None) -> AbstractContextManager[Task]:
    """A bar named `description` of `total` units, open while the block runs."""
    return _reporter(description, total)


def track(items: Iterable[T], description: str, total: float | None = None) -> Iterator[T]:
    """Yield `items` and move a bar by one for each."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with task(description, total) as bar:
        for done, item in enumerate(items, start=1):
            yield item
            bar.update(done, total)
