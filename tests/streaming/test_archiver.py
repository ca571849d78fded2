"""The archive's own thread: whatever fails, fills up, or comes in between, each message is archived once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest
from builders import archived_as
from confluent_kafka import KafkaError
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from recsys_core.lake import Lake
from recsys_core.landing import Landing, offset_faults
from recsys_core.live import Batch
from recsys_core.settings import Settings
from streaming import archiver as archiver_module
from streaming.archiver import Archiver, Assigned
from streaming.arrival import Arrivals
from streaming.batches import Row, by_partition, taken_rows
from streaming.connections import BrokerFailure, KafkaLog
from streaming.decode import decode
from streaming.topics import Topic

TOPIC = Topic("clicks", "0abcdef0", 1)
START = 1_772_000_000_000 // 60_000 * 60_000
END = 300
"""Offsets of the topic; some at its end, and each 40th, have no message."""


def row(at: int) -> Row:
    event = {"v": 1, "event_id": f"e{at}", "user_id": "u", "item_id": "i", "event_type": "view", "ts": START + at}
    return 0, at, START + at * 1000, orjson.dumps(event) if at % 17 else b"junk"


ROWS = [row(at) for at in range(END - 3) if at % 40 != 39]


@dataclass
class Told:
    """What a consumer gives: a message, or that the end is reached."""

    at: int
    end: bool

    def error(self) -> KafkaError | None:
        return KafkaError(KafkaError._PARTITION_EOF) if self.end else None

    def partition(self) -> int:
        return 0

    def offset(self) -> int:
        return self.at

    def timestamp(self) -> tuple[int, int]:
        return 2, row(self.at)[2]

    def value(self) -> bytes | None:
        return row(self.at)[3]


class Reader:
    """Reads the topic a few messages at a time, and fails when it is told to."""

    def __init__(self, fails: Iterator[bool]) -> None:
        self._fails = fails
        self._at: int | None = None

    def read(self, places: Mapping[int, int]) -> list[Told]:
        if self._at is None:
            self._at = places[0]
        if next(self._fails):
            raise BrokerFailure("a test wants it")
        found = [Told(offset, False) for _, offset, _, _ in ROWS if offset >= (self._at or 0)][:30]
        self._at = found[-1].at + 1 if found else END
        return found if found else [Told(END, True)]

    def close(self) -> None:
        self._at = None


def archiver_of(home: Path, kilobytes: int, fails: Iterator[bool], monkeypatch: pytest.MonkeyPatch) -> Archiver:
    stream = {"archive_rows": 100, "archive_seconds": 60}
    lake = Lake(str(home / "lake"))
    made = Archiver(Settings(home=home, stream=stream), TOPIC, False, lake, Arrivals(TOPIC.name), KafkaLog(Event()))
    made._intake._max_bytes = kilobytes << 10
    made._reader = Reader(fails)  # type: ignore[assignment]
    write = made._archive._landing.write_archive

    def flaky(*args: Any) -> str:
        if next(fails):
            raise RuntimeError("a test wants it")
        path = write(*args)
        if next(fails):
            raise RuntimeError("after it was written")
        return path

    monkeypatch.setattr(made._archive._landing, "write_archive", flaky)
    return made


def turn(archiver: Archiver) -> None:
    try:
        archiver._turn()
    except (RuntimeError, BrokerFailure):
        archiver._stop_reading()


def offer(archiver: Archiver, rows: list[Row], parsed: bool, settings: Settings) -> None:
    if not parsed:
        archiver.offer_rows(list(rows))
        return
    taken = taken_rows(rows)
    decoded = decode(taken.values, settings.events, 1 << 20, taken.appended)
    batch = Batch(decoded.events, taken.partition[decoded.rows], taken.offset[decoded.rows])
    archiver.offer_parsed(by_partition(taken, decoded, batch), {0: 1})


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.tuples(st.integers(1, 60), st.booleans(), st.integers(0, 3)), min_size=3, max_size=20),
    start=st.sampled_from([0, 50, 150]),
    kilobytes=st.sampled_from([4, 16, 1000]),
    failures=st.lists(st.booleans(), max_size=40),
    again=st.sampled_from([None, 2, 5]),
)
def test_whatever_fails_and_whatever_fills_up_each_message_is_archived_once(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    settings: Settings,
    steps: list[tuple[int, bool, int]],
    start: int,
    kilobytes: int,
    failures: list[bool],
    again: int | None,
) -> None:
    home = tmp_path_factory.mktemp("home")
    fails = iter([*failures, *[False] * 10_000])
    monkeypatch.setattr(archiver_module, "GATHER_SECONDS", 0.0)
    archiver = archiver_of(home, kilobytes, fails, monkeypatch)
    archiver.assign(0, Assigned(1, TOPIC.identity, 0, 0, END, start))
    at = next(n for n, (_, offset, _, _) in enumerate(ROWS) if offset >= start)
    for number, (count, parsed, turns) in enumerate(steps):
        if some := ROWS[at : at + count]:
            offer(archiver, some, parsed, settings)
        at += count
        for _ in range(turns):
            turn(archiver)
        if number == again:  # the worker ends and another one has the partition, from where Redis is
            archiver = archiver_of(home, kilobytes, fails, monkeypatch)
            archiver.assign(0, Assigned(1, TOPIC.identity, 0, 0, END, ROWS[at - 1][1] + 1 if at < len(ROWS) else END))
    for rest in range(at, len(ROWS), 50):
        offer(archiver, ROWS[rest : rest + 50], True, settings)
    archiver.offer_ends({0: END})
    archiver.alive()
    for _ in range(200):
        turn(archiver)
        if archiver.durable(0) == END:
            break
    assert archiver.durable(0) == END
    landing = Landing(Lake(str(home / "lake")))
    held = landing.archived(TOPIC.name)
    assert offset_faults(held) == []
    assert (held[0].first, held[-1].last) == (0, END - 1)
    paths = (landing.lake.path("landing", one.topic, f"{one.name}.parquet") for one in held)
    found = np.concatenate([pq.read_table(path)["offset"].to_numpy() for path in paths])
    assert found.tolist() == [offset for _, offset, _, _ in ROWS if offset % 17]
    assert sum(archived_as(landing, one).messages for one in held) == len(ROWS)
