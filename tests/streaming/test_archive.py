"""Borders of archive files depend on the topic alone: however messages come in batches, the files are the same bytes."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from recsys_core.lake import Lake
from recsys_core.landing import ARCHIVE_SCHEMA, Landing, OffsetRange, offset_faults
from recsys_core.settings import StreamSettings
from streaming.archive import GRACE_MS, Archive, Messages, Rejected

SETTINGS = StreamSettings(archive_rows=100, archive_seconds=60)
TOPIC = "clicks"
START = 1_772_000_000_000 // 60_000 * 60_000


def messages(start: int, end: int) -> Messages:
    """One message a second for each offset; every 17th is rejected, every 40th offset is a marker of the broker."""
    offset = np.array([at for at in range(start, end) if at % 40 != 39], np.int64)
    rejected = [Rejected(3, at, "not JSON", b"\xff") for at in offset.tolist() if at % 17 == 0]
    rows = [
        {"event_id": f"e{at}", "user_id": "u", "item_id": "i", "event_type": "view", "ts": START + at, "offset": at}
        for at in offset.tolist()
        if at % 17
    ]
    table = pa.Table.from_pylist([{n: r.get(n) for n in ARCHIVE_SCHEMA.names} for r in rows], schema=ARCHIVE_SCHEMA)
    return Messages(offset, START + offset * 1000, table, rejected)


def run(folder: Path, batches: list[tuple[int, int]], start: int = 0) -> dict[str, bytes]:
    """Archive batches in a lake and return the files of its landing zone and quarantine."""
    landing = Landing(Lake(str(folder)))
    archive = Archive(landing, TOPIC, SETTINGS)
    landed = archive.landed(3, "0abcdef0")
    archive.start(3, start if landed is None else landed, 1, "0abcdef0")
    for first, end in batches:
        archive.add(3, messages(first, end), 1)
    return files_of(archive, folder)


def files_of(archive: Archive, folder: Path) -> dict[str, bytes]:
    """What is in the landing zone and the quarantine of a lake once all is written."""
    archive.write()
    paths = [path for area in ("landing", "quarantine") for path in sorted((folder / area).rglob("*.parquet"))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_files_end_at_multiples_of_offsets_and_at_intervals(tmp_path: Path) -> None:
    run(tmp_path, [(0, 250)])
    names = [(r.first, r.last) for r in Landing(Lake(str(tmp_path))).archived(TOPIC)]
    assert names == [(0, 59), (60, 99), (100, 119), (120, 179), (180, 199), (200, 239)]


@pytest.mark.parametrize("ahead", [[5], [5, 6], [58]])
def test_a_broker_whose_clock_was_ahead_holds_no_file_open(tmp_path: Path, ahead: list[int]) -> None:
    archive = Archive(Landing(Lake(str(tmp_path))), TOPIC, SETTINGS)
    archive.start(3, 0, 1, "0abcdef0")
    whole = messages(0, 60)
    whole.appended[ahead] += 365 * 24 * 3_600_000
    archive.add(3, whole, 1)
    end = START + 60_000
    archive.reach(3, 60, end)
    archive.tick(end + 60_000 + GRACE_MS + 1)
    archive.write()
    held = archive._landing.archived(TOPIC)
    assert (held[0].first, held[-1].last, offset_faults(held)) == (0, 59, [])
    assert len(held) == (2 if ahead == [58] else 3)


@pytest.mark.parametrize("seed", range(5))
def test_any_batches_and_a_restart_at_any_border_give_the_same_bytes(tmp_path: Path, seed: int) -> None:
    whole = run(tmp_path / "whole", [(0, 400)])
    chance = random.Random(seed)
    cuts = sorted(chance.sample(range(1, 400), 12))
    stop = chance.randrange(12)
    pieces = list(zip([0, *cuts], [*cuts, 400], strict=True))
    run(tmp_path / "pieces", pieces[:stop])
    landed = Archive(Landing(Lake(str(tmp_path / "pieces"))), TOPIC, SETTINGS).landed(3, "0abcdef0")
    assert run(tmp_path / "pieces", [(landed or 0, 300), (300, 400)]) == whole


def test_what_a_zombie_archived_in_part_is_completed_and_not_doubled(tmp_path: Path) -> None:
    landing = Landing(Lake(str(tmp_path)))
    part = messages(0, 30)
    events = part.events
    landing.write_archive(
        OffsetRange(TOPIC, "0abcdef0", 3, 0, 29),
        len(part.offset),
        events,
        pa.table({"origin": ["clicks/3"] * 2, "row": [0, 17], "reason": ["not JSON"] * 2, "content": ["�"] * 2}),
    )
    archive = Archive(landing, TOPIC, SETTINGS)
    archive.start(3, 0, 1, "0abcdef0")
    archive.add(3, messages(0, 100), 1)
    archive.write()
    held = landing.archived(TOPIC)
    assert [(r.first, r.last) for r in held] == [(0, 29), (30, 59)]
    assert offset_faults(held) == []


def test_messages_of_an_assignment_that_is_over_are_left_out(tmp_path: Path) -> None:
    archive = Archive(Landing(Lake(str(tmp_path / "again"))), TOPIC, SETTINGS)
    archive.start(3, 0, 1, "0abcdef0")
    archive.add(3, messages(0, 10), 1)
    archive.drop([3])
    archive.start(3, 0, 2, "0abcdef0")
    archive.add(3, messages(10, 70), 1)
    archive.add(3, messages(0, 70), 2)
    assert files_of(archive, tmp_path / "again") == run(tmp_path / "whole", [(0, 70)])


def test_a_file_ends_when_its_interval_is_over_and_nothing_came(tmp_path: Path) -> None:
    landing = Landing(Lake(str(tmp_path)))
    archive = Archive(landing, TOPIC, SETTINGS)
    archive.start(3, 0, 1, "0abcdef0")
    archive.add(3, messages(0, 30), 1)
    archive.tick(START + 60_000 + GRACE_MS + 1)
    assert not archive.write()
    archive.reach(3, 30, START + 30_000)
    archive.tick(START + 60_000)
    assert not archive.write()
    archive.tick(START + 60_000 + GRACE_MS + 1)
    assert archive.durable(3) == 0
    assert archive.write()
    assert archive.durable(3) == 30
    assert [(r.first, r.last) for r in landing.archived(TOPIC)] == [(0, 29)]
