"""When a dependency is left out, how often that is said, and the numbers of it."""

from __future__ import annotations

import logging
import sys
import threading
import time

import pytest

from serving import seldom
from serving.breaker import TIMEOUTS_TO_OPEN, Breaker
from serving.metrics import Metrics
from serving.seldom import Seldom


def test_calls_that_time_out_together_are_one_timeout() -> None:
    breaker, began = Breaker("it"), time.monotonic()
    assert not any(breaker.failed(TimeoutError(), began) for _ in range(10))
    assert not breaker.open
    for _ in range(TIMEOUTS_TO_OPEN - 1):
        breaker.failed(TimeoutError(), time.monotonic())
    assert breaker.open


def test_an_answer_in_between_starts_the_count_anew() -> None:
    breaker = Breaker("it")
    for _ in range(5):
        for _ in range(TIMEOUTS_TO_OPEN - 1):
            assert not breaker.failed(TimeoutError(), time.monotonic())
        breaker.succeeded()
    assert (breaker.open, breaker.opened) == (False, 0)


def test_a_refusal_opens_it_at_once_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    breaker = Breaker("it")
    assert all(breaker.failed(ConnectionError("no")) for _ in range(10))
    assert [record.getMessage() for record in caplog.records] == [
        "it does not answer (ConnectionError: no); answers come from lower tiers"
    ]


def test_what_happens_all_the_time_is_told_now_and_then_with_how_often_it_happened(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seldom, "SECONDS", 0.1)
    told = Seldom(logging.getLogger("test"))
    for number in range(100):
        told.warn("number %d", number)
    time.sleep(0.11)
    told.warn("number %d", 100)
    assert [record.getMessage() for record in caplog.records] == ["number 0", "number 100 (and 99 more like it)"]


def test_the_numbers_may_be_asked_for_while_calls_add_names() -> None:
    metrics = Metrics()

    def add() -> None:
        for number in range(2000):
            metrics.calls["Recommend", str(number)] += 1
            metrics.events[str(number)] += 1
            metrics.latency(str(number)).observe(0.1)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        adding = threading.Thread(target=add)
        adding.start()
        while adding.is_alive():
            metrics.snapshot()
        adding.join()
    finally:
        sys.setswitchinterval(before)
    assert len(metrics.snapshot()["calls"]) == 2000
