"""Archive files are joined: the same rows, told alike, and nobody's reading or writing is disturbed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from builders import event, ms

from recsys_core import compaction
from recsys_core import ledger as ledger_module
from recsys_core.compaction import Joined, compact
from recsys_core.events import DAY_MS
from recsys_core.lake import Lake
from recsys_core.landing import ARCHIVE_SCHEMA, QUARANTINE_SCHEMA, Landing, OffsetRange, offset_faults
from recsys_core.ledger import LandingFile, Ledger

DAY = ms("2026-03-02")
TOPIC = "clicks"


@pytest.fixture(params=["local", "s3"])
def landing(request: pytest.FixtureRequest, tmp_path: Path) -> Landing:
    place = request.getfixturevalue("s3") if request.param == "s3" else str(tmp_path / "lake")
    return Landing(Lake(place))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """When files arrive, and go; the last entry is now (ms)."""
    moments = [DAY]
    for module in ("landing", "ledger"):
        monkeypatch.setattr(f"recsys_core.{module}.now_ms", lambda: moments[-1])
    # Files of a test are written long after the days that it is about.
    monkeypatch.setattr(compaction, "written_at", lambda _: 0.0)
    return moments


def archive(landing: Landing, first: int, last: int, partition: int = 0) -> OffsetRange:
    """A file of which each tenth offset is rejected and each tenth a marker."""
    held = OffsetRange(TOPIC, "0abcdef0", partition, first, last)
    rows = [{**event(f"e{n}", f"u{n % 3}", "i", f"2026-03-02T{n % 24:02}"), "offset": n} for n in range(first, last + 1)]
    bad = [{"origin": "t/0", "row": n, "reason": "no id", "content": "x"} for n in range(first, last + 1) if n % 10 == 9]
    table = pa.Table.from_pylist([row for row in rows if row["offset"] % 10 < 8], schema=ARCHIVE_SCHEMA)
    landing.write_archive(held, table.num_rows + len(bad), table, pa.Table.from_pylist(bad, schema=QUARANTINE_SCHEMA))
    return held


def ranges(landing: Landing) -> list[tuple[int, int, int]]:
    return [(one.partition, one.first, one.last) for one in landing.archived(TOPIC)]


def rows(landing: Landing, files: list[LandingFile]) -> pa.Table:
    read = []
    for file in files:
        with landing.lake.fs.open(file.path, "rb") as source:
            read.append(pq.read_table(source))
    return pa.concat_tables(read)


def told(files: list[LandingFile]) -> tuple[int, int, int, int, dict[str, int]]:
    hours = sorted((hour, count) for file in files for hour, count in file.hours.items())
    sums: dict[str, int] = {}
    for hour, count in hours:
        sums[hour] = sums.get(hour, 0) + count
    return (*(sum(getattr(f, name) for f in files) for name in ("rows", "messages", "rejected", "forgotten")), sums)


def test_files_of_a_day_become_one_with_the_same_rows_and_facts(landing: Landing, clock: list[int]) -> None:
    for n in range(30):
        archive(landing, n * 10, n * 10 + 9)
        archive(landing, n * 10, n * 10 + 9, partition=1)
    small, news = landing.files(), landing.ledger.version()
    clock.append(DAY + DAY_MS)
    archive(landing, 300, 309)
    assert compact(landing, DAY + DAY_MS) == Joined(60, 2, 0)
    large = landing.files()
    assert ranges(landing) == [(0, 0, 299), (0, 300, 309), (1, 0, 299)]
    joined = [file for file in large if file.arrived == DAY]
    assert rows(landing, joined).equals(rows(landing, small))
    assert told(joined) == told(small)
    assert [file.bytes for file in joined] == [landing.lake.fs.info(file.path)["size"] for file in joined]
    assert {(file.first_ts, file.last_ts) for file in joined} == {
        (min(f.first_ts for f in small), max(f.last_ts for f in small))
    }
    assert set(landing.news(news)) == set(large[1].hours), "only the new file is news"
    assert offset_faults(landing.archived()) == []
    assert compact(landing, DAY + DAY_MS) == Joined()


def test_who_was_told_of_the_small_files_finds_them_for_a_day(
    landing: Landing, clock: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "HEAD_ROWS", 1)
    for n in range(3):
        archive(landing, n * 10, n * 10 + 9)
    small = landing.files()
    clock.append(DAY + DAY_MS)
    compact(landing, clock[-1])
    for later, there in ((DAY_MS - 1, True), (DAY_MS + 1, False)):
        compact(landing, DAY + DAY_MS + later)
        assert [landing.lake.fs.exists(file.path) for file in small] == [there] * 3
    assert landing.ledger.read().gone.num_rows == 0
    assert rows(landing, landing.files()).num_rows == 24


def test_a_joined_file_is_news_to_who_has_not_heard_of_what_is_in_it(landing: Landing, clock: list[int]) -> None:
    archive(landing, 0, 9)
    heard = landing.ledger.version()
    archive(landing, 10, 19)
    clock.append(DAY + DAY_MS)
    compact(landing, clock[-1])
    assert set(landing.news(heard).values()) == {heard + 1}
    assert landing.news(heard + 1) == {}


def test_gaps_other_topics_other_days_and_large_files_are_not_joined_over(
    landing: Landing, clock: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for first in (0, 10, 30, 40):
        archive(landing, first, first + 9)
    clock.append(DAY + DAY_MS)
    for first in (50, 60, 70):
        archive(landing, first, first + 9)
    landing.write_events("app", "a", rows(landing, landing.files()[:1]).drop_columns(["offset"]))
    sizes = sorted(file.bytes for file in landing.files())
    monkeypatch.setattr(compaction, "LARGEST", 2 * sizes[-1])
    clock.append(DAY + 2 * DAY_MS)
    assert compact(landing, clock[-1]) == Joined(6, 3, 0)
    assert ranges(landing) == [(0, 0, 19), (0, 30, 49), (0, 50, 69), (0, 70, 79)]


def test_what_was_taken_out_of_a_file_meanwhile_does_not_come_back(
    landing: Landing, clock: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(2):
        archive(landing, n * 10, n * 10 + 9)
    first = landing.files()[0]
    clock.append(DAY + DAY_MS)
    own = Landing.write_stream

    def beside(self: Landing, path: str, schema: pa.Schema, tables: Iterator[pa.Table]) -> LandingFile:
        monkeypatch.setattr(Landing, "write_stream", own)
        done = own(self, path, schema, tables)
        Landing(landing.lake).take_out(first.path, lambda table: pc.equal(table["user_id"], "u0"), landing.ledger.read())
        return done

    monkeypatch.setattr(Landing, "write_stream", beside)
    assert compact(landing, clock[-1]) == Joined()
    landing.lake.fs.invalidate_cache()
    assert len(landing.lake.fs.ls(landing.lake.path("landing", TOPIC))) == 2, "nothing is left of it"
    assert compact(landing, clock[-1]) == Joined(2, 1, 0)
    [file] = landing.files()
    assert (file.rows + file.forgotten + file.rejected, file.forgotten > 0) == (file.messages, True)
    assert "u0" not in rows(landing, [file]).filter(pc.less(rows(landing, [file])["offset"], 10))["user_id"].to_pylist()


@pytest.mark.parametrize("how", ["damaged", "gone"])
def test_a_file_that_cannot_be_read_is_not_joined(landing: Landing, clock: list[int], how: str) -> None:
    for n in range(3):
        archive(landing, n * 10, n * 10 + 9)
    before, path = landing.files(), landing.files()[1].path
    if how == "gone":
        landing.lake.fs.rm_file(path)
    else:
        landing.lake.fs.pipe_file(path, landing.lake.fs.cat_file(path)[:-30])
    clock.append(DAY + DAY_MS)
    assert compact(landing, clock[-1]) == Joined()
    assert landing.files() == before


def test_of_two_that_join_the_same_files_one_is_refused_and_nothing_is_lost(
    landing: Landing, clock: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(3):
        archive(landing, n * 10, n * 10 + 9)
    before = rows(landing, landing.files())
    clock.append(DAY + DAY_MS)
    own = Landing.write_stream

    def beside(self: Landing, path: str, schema: pa.Schema, tables: Iterator[pa.Table]) -> LandingFile:
        monkeypatch.setattr(Landing, "write_stream", own)
        assert compact(Landing(landing.lake), clock[-1]).large == 1
        return own(self, path, schema, tables)

    monkeypatch.setattr(Landing, "write_stream", beside)
    assert compact(landing, clock[-1]).large == 0
    assert ranges(landing) == [(0, 0, 29)]
    assert rows(landing, landing.files()).equals(before)


def test_a_store_whose_answer_to_the_commit_was_lost_loses_no_file(
    landing: Landing, clock: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(3):
        archive(landing, n * 10, n * 10 + 9)
    clock.append(DAY + DAY_MS)
    own = Ledger.commit

    def twice(self: Ledger, *args: Any, **more: Any) -> int:
        own(self, *args, **more)
        return own(self, *args, **more)

    monkeypatch.setattr(Ledger, "commit", twice)
    assert compact(landing, clock[-1]).large == 1
    assert rows(landing, landing.files()).num_rows == 24
