"""What the landing zone costs does not grow with the files that are in it: requests to the store, counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
import pytest
from builders import event, write_clicks

from recsys_assets.resources import Platform
from recsys_assets.stream_checks import offsets_have_no_gap
from recsys_core.events import HOUR_MS, key_start_ms
from recsys_core.landing import ARCHIVE_SCHEMA, OffsetRange, what_was_read
from recsys_core.ledger import Advance, LandingFile
from recsys_core.settings import Settings
from recsys_core.tables import CLICKS_HOURLY
from recsys_sensors.late_data import late_hours
from streaming.archive import Archive, Messages

TOPIC, IDENTITY = "clickstream.events", "0abcdef0"
HOUR = "2026-03-02T10"
START = key_start_ms(HOUR)
CALLS = ("cat_file", "pipe_file", "put_file", "ls", "find", "info", "exists", "_open", "rm_file", "mv")
A_DAY = 24 * 60


@contextmanager
def counted(fs: Any, patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The requests that a filesystem gets."""
    calls: list[str] = []

    def counting(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def one(*args: object, **more: object) -> object:
            calls.append(name)
            return call(*args, **more)

        return one

    with patch.context() as here:
        for name in CALLS:
            here.setattr(fs, name, counting(name, getattr(fs, name)))
        yield calls


def fill(platform: Platform, files: int) -> None:
    """An archive whose files each hold a minute, the last of them up to HOUR. None is there: nobody is to open them."""
    for first in range(0, files, 200):
        held = [OffsetRange(TOPIC, IDENTITY, 0, n * 10, n * 10 + 9) for n in range(first, min(first + 200, files))]
        times = [START + (n - files) * 60_000 for n in range(first, min(first + 200, files))]
        added = [
            LandingFile(
                platform.lake.path("landing", TOPIC, f"{one.name}.parquet"), 10, 1, at, at + 59_999, at, 10, hours={HOUR: 10}
            )
            for one, at in zip(held, times, strict=True)
        ]
        platform.landing.ledger.commit(added, advance=Advance(held[0].archive, held[0].first, held[-1].last + 1))


def minute(first: int) -> Messages:
    rows = [{**event(f"e{n}", "u", "i", f"{HOUR}:05"), "offset": n} for n in range(first, first + 10)]
    table = pa.Table.from_pylist([{n: r.get(n) for n in ARCHIVE_SCHEMA.names} for r in rows], schema=ARCHIVE_SCHEMA)
    return Messages(np.arange(first, first + 10), np.full(10, START + 300_000), table, [])


def costs(settings: Settings, files: int, patch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The requests of each kind of work that comes again and again, with so many files in the landing zone."""
    patch.setattr("recsys_assets.stream_checks.BROKER_SECONDS", 0.2)
    kafka = settings.kafka.model_copy(update={"bootstrap_servers": "127.0.0.1:1"})
    partitions = settings.partitions.model_copy(update={"start": "2026-01-01"})
    home = settings.home / str(files)
    changed = {"kafka": kafka, "partitions": partitions, "lake_uri": str(home / "lake"), "home": home}
    platform = Platform(settings.model_copy(update=changed))
    fill(platform, files)
    write_clicks(platform.lake, [("u", "i", f"{HOUR}:05")])
    said = what_was_read(platform.landing.ledger.version(), ())
    platform.lake.write(CLICKS_HOURLY, HOUR, pa.table({"n": [1]}), extra=said)
    found: dict[str, list[str]] = {}
    with dg.DagsterInstance.ephemeral() as instance:
        platform.landing.ledger.read()  # a process that has looked before
        first = late_hours(dg.build_sensor_context(instance=instance), platform)
        archive = Archive(platform.landing, TOPIC, settings.stream)
        with counted(platform.lake.fs, patch) as found["a worker starts with a partition"]:
            landed = archive.landed(0, IDENTITY)
        assert landed == files * 10
        archive.start(0, landed, 1, IDENTITY)
        archive.add(0, minute(landed), 1)
        archive.reach(0, landed + 10, START)
        archive.tick(START + 10 * HOUR_MS)
        with counted(platform.lake.fs, patch) as found["a file is archived"]:
            assert archive.write()
        with counted(platform.lake.fs, patch) as found["an hour's files"]:
            assert len(platform.landing.ledger.read().covering(START - HOUR_MS, START + HOUR_MS)) == 61
        with counted(platform.lake.fs, patch) as found["a tick of late_hours"]:
            asked = late_hours(dg.build_sensor_context(instance=instance, cursor=first.cursor), platform)
        assert [request.partition_key for request in asked.run_requests or []] == [HOUR]
        with counted(platform.lake.fs, patch) as found["offsets_have_no_gap"]:
            result = offsets_have_no_gap(dg.build_asset_check_context(), platform)
        assert isinstance(result, dg.AssetCheckResult)
        assert result.passed, result.metadata
    return found


def test_what_comes_again_and_again_costs_as_much_with_twenty_thousand_files_as_with_a_thousand(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = costs(settings, 1_000, monkeypatch), costs(settings, 20_000, monkeypatch)
    assert few == many
    assert max(map(len, few.values())) <= 20, few


def test_a_process_that_begins_reads_few_parts_however_many_files_there_are(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = Platform(settings)
    fill(platform, 20_000)
    with counted(platform.lake.fs, monkeypatch) as calls:
        assert len(Platform(settings).landing.files()) == 20_000
    assert len(calls) <= 12, calls
