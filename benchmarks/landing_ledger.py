"""What the ledger of the landing zone costs at a million files: a commit, a process's first look, an hour's files, news.

Each measure is taken in a process of its own, on a lake that holds nothing but the ledger: no file is opened.

    python benchmarks/landing_ledger.py --files 1000000
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from recsys_cli.console import table
from recsys_core.events import HOUR_MS, hour_key
from recsys_core.lake import Lake
from recsys_core.landing import Landing, OffsetRange
from recsys_core.ledger import Advance, LandingFile

TOPIC, IDENTITY, PARTITIONS = "clickstream.events", "0abcdef0", 12
START = 1_772_000_000_000
MINUTE_MS = 60_000
AT_ONCE = 200
ROWS = 1000


def file(landing: Landing, number: int) -> tuple[OffsetRange, LandingFile]:
    """The archive file of a minute and partition; one event of each is hours late. AT_ONCE that follow are of one partition."""
    block, within = divmod(number, AT_ONCE)
    partition, minute = block % PARTITIONS, block // PARTITIONS * AT_ONCE + within
    held = OffsetRange(TOPIC, IDENTITY, partition, minute * ROWS, (minute + 1) * ROWS - 1)
    at = START + minute * MINUTE_MS
    late = at - 5 * HOUR_MS
    hours = {hour_key(late): 1, hour_key(at): ROWS - 1}
    path = landing.lake.path("landing", TOPIC, f"{held.name}.parquet")
    return held, LandingFile(path, ROWS, 120_000, late, at + MINUTE_MS, at, ROWS, hours=hours)


def fill(place: str, files: int) -> None:
    """Commits as an archive that catches up makes them."""
    landing = Landing(Lake(place))
    for first in range(0, files, AT_ONCE):
        made = [file(landing, number) for number in range(first, min(first + AT_ONCE, files))]
        held = made[0][0]
        landing.ledger.commit([one for _, one in made], advance=Advance(held.archive, held.first, made[-1][0].last + 1))


def commits(place: str, files: int) -> str:
    landing = Landing(Lake(place))
    for number in range(files, files + 600):
        held, one = file(landing, number)
        landing.ledger.commit([one], advance=Advance(held.archive, held.first, held.last + 1))
    return "600 commits"


def first_look(place: str, _: int) -> str:
    return f"{Landing(Lake(place)).ledger.read().table.num_rows:,} files"


def an_hour(place: str, files: int) -> str:
    at = START + files // PARTITIONS * MINUTE_MS - 24 * HOUR_MS
    return f"{len(Landing(Lake(place)).ledger.read().covering(at - 13 * HOUR_MS, at)):,} files"


def news(place: str, _: int) -> str:
    ledger = Landing(Lake(place)).ledger
    return f"{len(Landing(Lake(place)).news(ledger.version() - 180)):,} hours"


def reached(place: str, _: int) -> str:
    return f"offset {Landing(Lake(place)).ledger.reached(f'{TOPIC}/{IDENTITY}-00000'):,}"


def settle(place: str, _: int) -> str:
    ledger = Landing(Lake(place)).ledger
    listing = ledger.read()
    ledger.settle(listing, listing.gone)
    return f"{len(ledger.parts())} parts"


MEASURES: dict[str, Callable[[str, int], str]] = {
    "600 files are archived": commits,
    "a worker asks how far a partition is": reached,
    "first look at all files": first_look,
    "the files of an hour with its lookback": an_hour,
    "hours of which events arrived in 180 commits": news,
    "parts are rewritten": settle,
}


def measure(name: str, place: str, files: int, told: Any) -> None:
    """Put the seconds, the peak of the process's memory in MB and what was found into `told`."""
    work = MEASURES[name]
    started = time.perf_counter()
    found = work(place, files)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    told.put({"": name, "seconds": f"{seconds:.3f}", "MB": f"{peak:.0f}", "found": found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--lake", help="where; by default a temporary folder")
    chosen = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        place = chosen.lake or str(Path(folder) / "lake")
        started = time.perf_counter()
        fill(place, chosen.files)
        seconds = f"{time.perf_counter() - started:.1f}"
        rows = [{"": "the files are named", "seconds": seconds, "MB": "", "found": f"{chosen.files:,}"}]
        for name in MEASURES:
            told = context.Queue()
            process = context.Process(target=measure, args=(name, place, chosen.files, told))
            process.start()
            rows.append(told.get())
            process.join()
    Console().print(table("The ledger of the landing zone", rows))


if __name__ == "__main__":
    main()
