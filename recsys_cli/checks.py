"""`recsys check`: the checks of assets from the terminal, and a person's word for what is unusual but right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from recsys_cli.console import table
from recsys_cli.errors import explain
from recsys_cli.processes import StackError
from recsys_core.events import checked_key
from recsys_core.settings import Settings

if TYPE_CHECKING:
    from recsys_assets.checks import Claim, Group
    from recsys_assets.resources import Platform
    from recsys_core.quality import Report


def run(settings: Settings, asset: str | None, partitions: Sequence[str], accept: bool, console: Console) -> int:
    """Judge one asset or all of them, by default their latest partition.

    Returns 1 when an error was found, or nothing was made that could be judged, else 0. Raises StackError for an asset that has
    no checks and for what was never made, BadKey for a partition that is no hour and no day.
    """
    from recsys_assets.checks import ELSEWHERE, GROUPS
    from recsys_assets.resources import Platform

    chosen = [group for group in GROUPS if asset in (None, group.asset)]
    if not chosen:
        raise StackError(f"no checks on {asset!r}; there are some on {', '.join(group.asset for group in GROUPS)}")
    platform = Platform(settings)
    if asset is None and partitions:
        raise StackError("--partition needs an asset: `recsys check clicks_hourly --partition 2026-01-31T09`")
    if asset is not None:
        _raise_unless_made(platform, chosen[0], [checked_key(key) for key in partitions])
    if accept:
        return _accept(platform, asset, partitions, console)
    made = [group for group in chosen if _is_made(platform, group)]
    if not made:
        console.print(
            f"Nothing is made in {settings.home.absolute()} yet, so there is nothing to check. "
            "`recsys ingest` brings events, `recsys up` makes the rest.",
            soft_wrap=True,
            highlight=False,
        )
        return 1
    errors = 0
    rows: list[dict[str, object]] = []
    reasons: list[str] = []
    for group in made:
        of = group.asset
        try:
            of = f"{group.asset} {_shown_partitions(group.chosen(platform, partitions))}".strip()
            found = [
                (claim.name, _outcome(claim, report), report.reason) for claim, report in group.reports(platform, partitions)
            ]
        except Exception as error:
            why = explain(error)
            if why is None:
                raise
            found = [("all of them", "FAILED", f"could not be judged: {why}")]
        for check, outcome, reason in found:
            errors += outcome == "FAILED"
            rows.append({"check": check, "of": of, "": outcome})
            if reason:
                reasons.append(f"{outcome} {check} of {of}: {reason}")
    console.print(table("Checks", rows, whole="check"))
    for line in reasons:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    _tell_what_is_not_made(console, [group.asset for group in chosen if group not in made], asset, ELSEWHERE)
    return 1 if errors else 0


def _is_made(platform: Platform, group: Group) -> bool:
    """Whether there is something of an asset. What can't be read is there, and fails when it is judged."""
    try:
        return group.made(platform, None)
    except Exception as error:
        if explain(error) is None:
            raise
        return True


def _outcome(claim: Claim, report: Report) -> str:
    if not report.made:
        return "not made"
    return "passed" if report.passed else "WARNING" if claim.warning else "FAILED"


def _shown_partitions(keys: Sequence[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} … {keys[-1]}" if keys else ""


def _tell_what_is_not_made(console: Console, absent: Sequence[str], asset: str | None, elsewhere: dict[str, str]) -> None:
    lines = [f"Not there yet, so not checked: {', '.join(absent)}."] if absent else []
    more = [check for check, of in elsewhere.items() if asset in (None, of)]
    if more:
        lines.append(f"Only runs of their assets make {', '.join(more)}; their results are in the web UI.")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)


def _raise_unless_made(platform: Platform, group: Group, partitions: Sequence[str]) -> None:
    """Raises StackError when the asset, or one of the partitions, was never made."""
    latest = group.latest(platform)
    if partitions and latest is None and group.asset != "release" and group.made(platform, None):
        raise StackError(f"{group.asset} has no partitions")
    if not group.made(platform, None):
        raise StackError(f"{group.asset} was never made in {platform.settings.home.absolute()}, so there is nothing to check")
    absent = [key for key in partitions if not group.made(platform, key)]
    if absent:
        newest = f"; the latest is {latest}" if latest else ""
        raise StackError(f"{group.asset} has no partition {', '.join(absent)}: it was never made{newest}")


def _accept(platform: Platform, asset: str | None, partitions: Sequence[str], console: Console) -> int:
    """A person's word for the catalogue, for some hours, or for all that are unsound."""
    from recsys_assets.checks import accept_catalogue
    from recsys_core.catalog import CATALOG_TABLE
    from recsys_core.profiles import Profiles, unsound_hours
    from recsys_core.profiles import accept as accept_hours
    from recsys_core.tables import CLICKS_HOURLY

    if asset == CATALOG_TABLE:
        accept_catalogue(platform)
        console.print("The catalogue as it is now is what later ones are held against.")
        return 0
    if asset != CLICKS_HOURLY:
        raise StackError(f"--accept is for {CLICKS_HOURLY} (with --partition, or all of its unsound hours) and {CATALOG_TABLE}")
    profiles = Profiles(platform.lake, platform.settings.quality)
    changed = accept_hours(profiles, partitions or unsound_hours(profiles, platform.lake.keys(CLICKS_HOURLY)))
    console.print(
        f"Accepted: {', '.join(changed) or 'nothing new'}. Launch the night again: the job `nightly`.",
        soft_wrap=True,
        highlight=False,
    )
    return 0
