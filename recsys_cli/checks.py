"""`recsys check`: the checks of assets from the terminal, and a person's word for what is unusual but right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from recsys_cli.console import table
from recsys_cli.processes import StackError
from recsys_core.settings import Settings

if TYPE_CHECKING:
    from recsys_assets.resources import Platform


def run(settings: Settings, asset: str | None, partitions: Sequence[str], accept: bool, console: Console) -> int:
    """Judge one asset or all of them, by default their latest partition. Returns 1 when an error was found, else 0.

    Raises StackError for an asset that has no checks.
    """
    from recsys_assets.checks import GROUPS, accept_catalogue
    from recsys_assets.resources import Platform
    from recsys_core.catalog import CATALOG_TABLE
    from recsys_core.profiles import Profiles, unsound_hours
    from recsys_core.profiles import accept as accept_hours
    from recsys_core.tables import CLICKS_HOURLY

    chosen = [group for group in GROUPS if asset in (None, group.asset)]
    if not chosen:
        raise StackError(f"no checks on {asset!r}; there are some on {', '.join(group.asset for group in GROUPS)}")
    platform = Platform(settings)
    if accept:
        if asset == CATALOG_TABLE:
            accept_catalogue(platform)
            console.print("The catalogue as it is now is what later ones are held against.")
            return 0
        if asset != CLICKS_HOURLY:
            raise StackError(
                f"--accept is for {CLICKS_HOURLY} (with --partition, or all of its unsound hours) and {CATALOG_TABLE}"
            )
        profiles = Profiles(platform.lake, settings.quality)
        changed = accept_hours(profiles, partitions or unsound_hours(profiles, platform.lake.keys(CLICKS_HOURLY)))
        console.print(f"Accepted: {', '.join(changed) or 'nothing new'}. Launch the night again: the job `nightly`.")
        return 0
    rows: list[dict[str, object]] = []
    errors = 0
    for group in chosen:
        if asset is None and not _is_made(platform, group.asset):
            continue
        for claim, report in group.reports(platform, partitions):
            outcome = "passed" if report.passed else "WARNING" if claim.warning else "FAILED"
            errors += outcome == "FAILED"
            reason = _shown(report.sample, report.reason)
            rows.append({"asset": group.asset, "check": claim.name, "": outcome, "rows": report.rows, "reason": reason})
    console.print(table("Checks", rows))
    return 1 if errors else 0


def _is_made(platform: Platform, asset: str) -> bool:
    """Whether there is anything to judge; assets that are not tables always are."""
    if asset in ("clickstream_landing", "item_catalog", "rec_cache"):
        return True
    return bool(platform.releases.list()) if asset == "release" else platform.lake.latest(asset) is not None


def _shown(sample: Sequence[dict[str, object]], reason: str) -> str:
    if not sample:
        return reason
    first = ", ".join(f"{name} {value}" for name, value in list(sample[0].items())[:6])
    return f"{reason}: {first}" + (f" and {len(sample) - 1} more" if len(sample) > 1 else "")
