"""Archive files of days that are over, joined to few: a topic brings a file a minute and partition, and each costs its readers.

The joined file takes the place of the others with one commit, which is no news to anyone. The others stay for a day, for those
who were told of them before.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys_core.events import DAY_MS
from recsys_core.landing import ARCHIVE_SCHEMA, ENDING, ROW_GROUP, Landing, OffsetRange, joined, row_groups
from recsys_core.ledger import LANDING, LandingFile, LedgerChanged
from recsys_core.stores import written_at

log = logging.getLogger(__name__)

LARGEST = 256 << 20
"""Bytes of a joined file, about."""
GRACE_MS = DAY_MS
REMOVED_AT_ONCE = 16


@dataclass(frozen=True)
class Joined:
    """What was done: small files that were joined, into how many, and files of earlier joins and removals that went."""

    small: int = 0
    large: int = 0
    gone: int = 0


def compact(landing: Landing, now_ms: int) -> Joined:
    """Join the archive files that came before the day (UTC) of `now_ms`, and remove what no longer counts for a day.

    What changes meanwhile, or can't be read, stays as it is until the next time.
    """
    listing = landing.ledger.read()
    days = pc.divide(listing.table["arrived"], DAY_MS)
    small = large = 0
    for day in sorted(day for day in pc.unique(days).to_pylist() if day < now_ms // DAY_MS):
        for held, files in _together(listing.files(where=pc.equal(days, day))):
            if _join(landing, held, files, listing.version):
                small, large = small + len(files), large + 1
    return Joined(small, large, _sweep(landing, now_ms))


def _together(files: Iterable[LandingFile]) -> Iterator[tuple[OffsetRange, list[LandingFile]]]:
    """What can be joined: files of one archive that follow each other without a gap, and their range."""
    found = ((OffsetRange.parse(file.path), file) for file in files)
    held, run = None, list[LandingFile]()
    for one, file in sorted(((one, file) for one, file in found if one), key=lambda pair: pair[0]):
        if held and _follows(held, run, one, file):
            held, run = replace(held, last=one.last), [*run, file]
            continue
        if held and len(run) > 1:
            yield held, run
        held, run = one, [file]
    if held and len(run) > 1:
        yield held, run


def _follows(held: OffsetRange, run: Sequence[LandingFile], one: OffsetRange, file: LandingFile) -> bool:
    is_next = one.archive == held.archive and one.first == held.last + 1
    return is_next and sum(other.bytes for other in run) + file.bytes <= LARGEST


def _join(landing: Landing, held: OffsetRange, files: Sequence[LandingFile], as_of: int) -> bool:
    path = landing.lake.path(LANDING, held.topic, f"{held.name}-{uuid.uuid4().hex[:8]}{ENDING}")
    told = joined(path, files)
    try:
        now = landing.write_stream(path, ARCHIVE_SCHEMA, _rows(landing, files))
        if now.rows == told.rows:
            landing.ledger.commit([replace(told, bytes=now.bytes)], [file.path for file in files], as_of=as_of)
            return True
        log.warning("%s is not joined: %d rows are told of its files, they hold %d", held.name, told.rows, now.rows)
    except LedgerChanged as error:
        log.info("%s is not joined now: %s", held.name, error)
    except (pa.ArrowException, FileNotFoundError) as error:
        log.warning("%s is not joined, one of its files can't be read: %s", held.name, error)
    # A store that was asked again, as its answer was lost, refuses what it has taken.
    if landing.ledger.read().find(path):
        return True
    with suppress(FileNotFoundError):
        landing.lake.fs.rm_file(path)
    return False


def _rows(landing: Landing, files: Iterable[LandingFile]) -> Iterator[pa.Table]:
    """The rows of files one after the other, in tables of about ROW_GROUP rows."""
    waiting: list[pa.Table] = []
    for file in files:
        with landing.lake.fs.open(file.path, "rb") as source:
            for table in row_groups(pq.ParquetFile(source)):
                waiting.append(table.cast(ARCHIVE_SCHEMA))
                if sum(one.num_rows for one in waiting) >= ROW_GROUP:
                    yield pa.concat_tables(waiting)
                    waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _sweep(landing: Landing, now_ms: int) -> int:
    """Remove the files that went out of what counts before the grace, and let the ledger forget them. Returns their number."""
    listing, fs = landing.ledger.read(), landing.lake.fs
    over = pc.less(listing.gone["arrived"], now_ms - GRACE_MS)

    def remove(below: str) -> None:
        path = landing.lake.path(below)
        with suppress(FileNotFoundError):
            if written_at(fs.info(path)) * 1000 < now_ms - GRACE_MS:  # a later one is of a writer that is about to name it
                fs.rm_file(path)

    gone = listing.gone.filter(over)["path"].to_pylist()
    with ThreadPoolExecutor(REMOVED_AT_ONCE) as pool:
        list(pool.map(remove, gone))
    landing.ledger.settle(listing, listing.gone.filter(pc.invert(over)))
    return len(gone)
