"""Workers that believe they have the same partitions, and die at any moment: each offset is in the archive once."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections import Counter
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import event

from recsys_core import ledger as ledger_module
from recsys_core.lake import Lake
from recsys_core.landing import ARCHIVE_SCHEMA, Landing, offset_faults
from recsys_core.settings import StreamSettings
from streaming.archive import Archive, Messages, Rejected

TOPIC, IDENTITY = "clicks", "0abcdef0"
SETTINGS = StreamSettings(archive_rows=100, archive_seconds=60)
START = 1_772_000_000_000 // 60_000 * 60_000
END = 600
PARTITIONS = (0, 1)
WRITERS = 3
SECONDS = 240


def messages(partition: int, start: int, end: int) -> Messages:
    """A message a second and offset; each 17th is rejected, each 40th offset is a marker."""
    offset = np.array([at for at in range(start, end) if at % 40 != 39], np.int64)
    rejected = [Rejected(partition, at, "not JSON", b"\xff") for at in offset.tolist() if at % 17 == 0]
    rows = [{**event(f"{partition}-{at}", "u", "i", "2026-03-02T10"), "offset": at} for at in offset.tolist() if at % 17]
    table = pa.Table.from_pylist([{n: r.get(n) for n in ARCHIVE_SCHEMA.names} for r in rows], schema=ARCHIVE_SCHEMA)
    return Messages(offset, START + offset * 1000, table, rejected)


def archive_all(place: str, environment: dict[str, str], seed: int) -> None:
    """Archive every partition to its end, as if nobody else did, in batches of any size."""
    os.environ.update(environment)
    ledger_module.HEAD_ROWS = 8
    chance = random.Random(seed)
    archive = Archive(Landing(Lake(place)), TOPIC, SETTINGS)
    for partition in PARTITIONS:
        archive.start(partition, archive.landed(partition, IDENTITY) or 0, 1, IDENTITY)
    while any((archive.durable(partition) or 0) < END for partition in PARTITIONS):
        partition = chance.choice(PARTITIONS)
        at = archive.next(partition) or 0
        upto = min(at + chance.randrange(1, 150), END)
        archive.add(partition, messages(partition, at, upto), 1)
        if upto == END or chance.random() < 0.3:
            # The topic ends there for this worker, so that its file does, wherever those of the others end.
            archive.reach(partition, upto, START + upto * 1000)
            archive.tick(START + upto * 1000 + 3_600_000)
        archive.write()


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, str]]:
    """A store that processes share, and the variables by which they find it."""
    if request.param == "local":
        return str(tmp_path / "lake"), {}
    return str(request.getfixturevalue("s3")), request.getfixturevalue("shared_s3").environment


@pytest.mark.parametrize("seed", range(2))
def test_writers_of_the_same_partitions_that_are_killed_anywhere_archive_each_offset_once(
    place: tuple[str, dict[str, str]], seed: int
) -> None:
    chance = random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_archive_writers", "s3fs"])
    number, killed, deadline = 0, 0, time.monotonic() + SECONDS
    alive: list[multiprocessing.process.BaseProcess] = []
    landing = Landing(Lake(place[0]))
    while not all((landing.ledger.reached(f"{TOPIC}/{IDENTITY}-{n:05d}") or 0) >= END for n in PARTITIONS):
        assert time.monotonic() < deadline
        while len(alive) < WRITERS:
            number += 1
            alive.append(context.Process(target=archive_all, args=(*place, 100 * seed + number), daemon=True))
            alive[-1].start()
        time.sleep(chance.uniform(0.05, 0.4))
        if killed < 8:
            victim = alive.pop(chance.randrange(len(alive)))
            victim.kill()
            victim.join(SECONDS)
            killed += 1
        alive = [process for process in alive if process.is_alive()]
    for process in alive:
        process.join(SECONDS)
        assert process.exitcode == 0
    prove(landing)


def prove(landing: Landing) -> None:
    held = landing.archived(TOPIC)
    assert offset_faults(held) == []
    assert {(one.partition, one.last) for one in held} >= {(partition, END - 1) for partition in PARTITIONS}
    found: Counter[bytes] = Counter()
    for file in landing.files():
        with landing.lake.fs.open(file.path, "rb") as source:
            rows = pq.read_table(source).to_pylist()
        assert len(rows) == file.rows == file.messages - file.rejected
        found.update(orjson.dumps(row) for row in rows)
    sent = [messages(partition, 0, END) for partition in PARTITIONS]
    assert found == Counter(orjson.dumps(row) for of_one in sent for row in of_one.events.to_pylist())
    refused = Counter((row["origin"], row["row"]) for table in landing.quarantined() for row in table.to_pylist())
    assert refused == Counter(
        (f"{TOPIC}/{partition}", one.offset)
        for partition, of_one in zip(PARTITIONS, sent, strict=True)
        for one in of_one.rejected
    )
