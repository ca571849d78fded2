"""What a function does in a process of its own is seen here, and how it dies does not matter here."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from recsys_core import progress
from recsys_core.apart import ApartError, run_apart


def trains(epochs: int, log: Callable[..., None]) -> dict[str, int]:
    for epoch in progress.track(range(epochs), "epochs"):
        log({"loss": 1 / (epoch + 1)}, epoch)
    return {"pid": os.getpid(), "epochs": epochs}


def raises(log: Callable[..., None]) -> None:
    log({"loss": 1.0}, 0)
    raise ValueError("no examples")


def is_killed(log: Callable[..., None]) -> None:
    log({"loss": 1.0}, 0)
    os.kill(os.getpid(), signal.SIGKILL)


def exits(log: Callable[..., None]) -> None:  # noqa: ARG001
    sys.exit(3)


def test_result_log_and_progress_come_back_from_another_process() -> None:
    logged: list[tuple[object, ...]] = []
    moves: list[float] = []

    class Bar:
        def update(self, completed: float, total: float | None = None) -> None:  # noqa: ARG002
            moves.append(completed)

    @contextmanager
    def reporter(description: str, total: float | None) -> Iterator[Bar]:
        assert (description, total) == ("epochs", 3)
        yield Bar()
        moves.append(-1)

    with progress.reporting_to(reporter):
        found = run_apart(trains, 3, log=lambda *values: logged.append(values))
    assert found["epochs"] == 3
    assert found["pid"] != os.getpid()
    assert logged == [({"loss": 1.0}, 0), ({"loss": 0.5}, 1), ({"loss": 1 / 3}, 2)]
    assert moves == [1, 2, 3, -1]


def test_an_error_comes_back_with_the_trace_of_the_other_process() -> None:
    with pytest.raises(ApartError, match="ValueError: no examples") as caught:
        run_apart(raises, log=lambda *_: None)
    assert "in raises" in caught.value.__notes__[0]


@pytest.mark.parametrize(("function", "code"), [(is_killed, -9), (exits, 3)])
def test_a_process_that_dies_is_an_error_here(function: Callable[..., None], code: int) -> None:
    with pytest.raises(ApartError, match=rf"died \(exit code {code}\)"):
        run_apart(function, log=lambda *_: None)
