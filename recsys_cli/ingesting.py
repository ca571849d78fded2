"""`recsys ingest`: the mappings that flags and files ask for, the taking in, and what became of the rows."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from recsys_cli.console import table
from recsys_core.events import hour_key
from recsys_core.ingest import CatalogReport, Example, IngestReport, NothingTaken, ingest, ingest_catalog
from recsys_core.lake import Lake
from recsys_core.landing import QUARANTINE, Landing
from recsys_core.mappings import BUILTIN, MISFIT, MappingError, choose, fitting
from recsys_core.masking import masked_text
from recsys_core.settings import PartitionSettings, Settings, SourceMapping

Report = IngestReport | CatalogReport

LAYOUT = ("delimiter", "header")
"""What a flag says of the form of a file, whatever its columns."""
FLAGS = {"events": {"user_id": "--user", "item_id": "--item", "ts": "--time"}, "catalog": {"item_id": "--item"}}
LONGEST_LIST = 8
LONGEST_EXAMPLE = 80
KEPT_AS = {
    "value": "without a value",
    "price": "without a price",
    "available": "as available",
    "category": "without a category",
}
CURES = "name --user, --item and --time, or --catalog and --item, or a --mapping"


def chosen_mappings(
    settings: Settings, path: str, name: str | None, catalog: bool, fields: Mapping[str, Any], console: Console
) -> dict[str, SourceMapping]:
    """The mappings to use: that of the name, that made of the flags, or those that the files fit.

    `fields` are the flags by their names in SourceMapping; beside a name, or too few to be a mapping, they replace its own.
    """
    if not path:
        raise MappingError("name the file or folder to take in; `.` is this one")
    kind = "catalog" if catalog else "events"
    missing = [needed for needed in FLAGS[kind] if not fields.get(needed)]
    if name is None and not missing:
        return {"named by the flags": SourceMapping.model_validate({"kind": kind, **fields})}
    if name is None and len(missing) < len(FLAGS[kind]):
        flags = ", ".join(f"{needed} ({FLAGS[kind][needed]})" for needed in missing)
        raise MappingError(f"flags that name columns must name the column of: {flags}")
    layout = {key: value for key, value in fields.items() if key in LAYOUT}
    own = {**(BUILTIN if layout else {}), **settings.mappings}
    own = {key: mapping.model_copy(update=layout) for key, mapping in own.items()}
    try:
        names = [name] if name else fitting(path, own)
    except MappingError as error:
        raise MappingError(f"{error}; or {CURES}" if not name else str(error)) from error
    used = {key: choose(path, key, own)[1] for key in names}
    if name is None:
        console.print(f"{path} fits {_listed(names)}.", highlight=False, markup=False, soft_wrap=True)
    if catalog:
        used = {key: mapping for key, mapping in used.items() if mapping.kind == "catalog"}
    if not used:
        raise MappingError(
            f"the mapping {_listed(names)} describes events; name the item columns by --item, --title, --category"
        )
    return {key: SourceMapping.model_validate({**mapping.model_dump(), **fields}) for key, mapping in used.items()}


def take_in(
    path: str, mappings: Mapping[str, SourceMapping], settings: Settings, shift_to_ms: int | None = None
) -> dict[str, Report | NothingTaken]:
    """Ingest the files at `path` by each of the mappings. Raises NothingTaken when all of them come to that."""
    lake = Lake(settings.lake_uri, settings.lake.keep_versions)
    done: dict[str, Report | NothingTaken] = {}
    for name, mapping in mappings.items():
        try:
            if mapping.kind == "catalog":
                done[name] = ingest_catalog(path, lake, mapping)
            else:
                done[name] = ingest(path, Landing(lake), mapping, settings.events, shift_to_ms=shift_to_ms)
        except NothingTaken as error:
            done[name] = error
    failed = [report for report in done.values() if isinstance(report, NothingTaken)]
    if len(failed) == len(done):
        raise failed[0]
    return done


def show(
    done: Mapping[str, Report | NothingTaken], settings: Settings, console: Console, partitions: PartitionSettings | None
) -> bool:
    """Print what became of every row and every file, and which events lie outside `partitions`.

    Returns whether anything was kept, and by no mapping all files were damaged.
    """
    reports = {name: report for name, report in done.items() if not isinstance(report, NothingTaken)}
    for name, report in reports.items():
        title = f"Ingested as {name} in {report.seconds:.1f} s"
        console.print(table(title, [{"": what, "count": count} for what, count in _counts(report)]))
    for line in (*_notes(list(reports.values()), settings, partitions), *_left_out(done.values())):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    kept = any(report.landed for report in reports.values())
    if not kept:
        console.print("Nothing landed.", style="red")
    failed = [name for name in done if name not in reports]
    if failed:
        console.print(f"Nothing was taken in as {_listed(failed)}.", style="red")
    return kept and not failed


def _counts(report: Report) -> Iterator[tuple[str, int]]:
    yield "rows read", report.rows_read
    if isinstance(report, CatalogReport):
        yield "items kept", report.landed
        yield "items in the catalogue", report.items
    else:
        yield "events landed", report.landed
    if report.duplicates:
        yield "duplicates, in files with another's content", report.duplicates
    if isinstance(report, IngestReport) and report.forgotten:
        yield "left out, of users who were forgotten", report.forgotten
    for reason, count in sorted(report.quarantined.items()):
        yield f"quarantined: {reason}", count
    yield from _unreadable(report)
    if isinstance(report, IngestReport) and report.catalog:
        yield "items in the catalogue", report.catalog.items
        yield from _unreadable(report.catalog)


def _unreadable(report: Report) -> Iterator[tuple[str, int]]:
    for name, count in sorted(report.unreadable.items()):
        column = report.examples[name].column
        yield f"kept {KEPT_AS[name]}: {column} can't be read", count


def _notes(reports: list[Report], settings: Settings, partitions: PartitionSettings | None) -> Iterator[str]:
    lake = Lake(settings.lake_uri)
    yield f"The lake is {masked_text(settings.lake_uri)}."
    for report in reports:
        if isinstance(report, IngestReport) and report.days:
            yield from _span(report)
            yield from _outside(report, partitions, settings) if partitions else ()
        catalogs = [report.catalog] if isinstance(report, IngestReport) and report.catalog else []
        for part in (report, *catalogs):
            yield from (f"  {what}: {_shown(example)}" for what, example in sorted(part.examples.items()))
        again = [file for file in report.files if file.again]
        if again:
            yield f"Files that had been taken in before, so that their rows were replaced and not added: {len(again):,}."
        former = [moment for file in again for moment in file.former or ()]
        if former:
            yield (
                f"Their former events were of {_moment(min(former))} to {_moment(max(former))} UTC. Make the hours that hold "
                f"them again: recsys backfill clicks_hourly {hour_key(min(former))} {hour_key(max(former))}"
            )
        if isinstance(report, IngestReport) and report.repeated:
            yield f"Events whose event_id another one has: {report.repeated:,}. Tables have each event_id once."
        if report.unused:
            yield f"Columns that no field was read from: {_listed(report.unused)}."
    sources = sorted({file.source for report in reports for file in report.files if file.quarantined})
    if sources:
        yield f"Quarantined rows are in {_listed([lake.path(QUARANTINE, source) for source in sources])}."


def _left_out(done: Iterable[Report | NothingTaken]) -> Iterator[str]:
    """The files that no mapping took in, and why; that one of them names other columns says least."""
    reasons = [report.left_out for report in done]
    for path in sorted(set.intersection(*map(set, reasons))):
        yield f"Left out: {path}: {min((by[path] for by in reasons), key=lambda reason: reason.startswith(MISFIT))}"


def _span(report: IngestReport) -> Iterator[str]:
    yield f"The events are of {_moment(report.first_ts or 0)} to {_moment(report.last_ts or 0)} UTC."


def _moment(ts: int) -> str:
    return datetime.fromtimestamp(ts // 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _outside(report: IngestReport, partitions: PartitionSettings, settings: Settings) -> Iterator[str]:
    start, end = partitions.start.isoformat(), partitions.end.isoformat() if partitions.end else None
    before = sum(count for day, count in report.days.items() if day < start)
    after = sum(count for day, count in report.days.items() if end and day >= end)
    where = settings.home / "recsys.toml"
    if before:
        yield (
            f"{before:,} of them are before the first partition: [partitions] start = {start}, no table will hold them. "
            f"Set start = {min(report.days)} in {where}."
        )
    if after:
        yield (
            f"{after:,} of them are after the last partition: [partitions] end = {end}, no table will hold them. "
            f"Set a later end in {where}."
        )


def _shown(example: Example) -> str:
    content = " ".join(example.content.split())
    content = content if len(content) <= LONGEST_EXAMPLE else f"{content[:LONGEST_EXAMPLE]} …"
    where = f"{os.path.basename(example.path)} row {example.row}"
    return f"{where}, column {example.column}: {content!r}" if example.column else f"{where}: {content!r}"


def _listed(names: list[str]) -> str:
    more = len(names) - LONGEST_LIST
    return ", ".join(names[:LONGEST_LIST]) + (f" and {more:,} more" if more > 0 else "")
