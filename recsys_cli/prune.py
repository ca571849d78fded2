"""`recsys prune`: what the retention policy lets go, shown or removed."""

from __future__ import annotations

import os
from datetime import UTC, datetime

from rich.console import Console

from recsys_cli.console import table
from recsys_cli.stack import prepare_dagster_home
from recsys_core.settings import Settings


def prune(settings: Settings, console: Console, dry_run: bool) -> None:
    """Remove (or with `dry_run` only show) what [retention] lets go. Raises UnsafePolicy, ReleaseError."""
    import dagster as dg

    from recsys_assets.resources import Platform
    from recsys_core.events import now_ms
    from recsys_core.registry import RegistryError
    from recsys_core.retention import data_end, plan, prune_mlflow, remove, spent_runs_of_mlflow, totals
    from recsys_sensors.pruning import prune_runs, spent_runs

    platform = Platform(settings)
    removals = plan(platform.landing, platform.releases, settings, now_ms())
    end_ms = data_end(platform.landing, now_ms())
    os.environ.setdefault("DAGSTER_HOME", str(prepare_dagster_home(settings.home)))
    with dg.DagsterInstance.get() as instance:
        if dry_run:
            runs = len(spent_runs(instance, settings.retention, datetime.now(UTC), end_ms))
        else:
            removals = remove(platform.landing, platform.releases, removals)
            runs = prune_runs(platform, instance)
    recorded: dict[str, int] = {}
    try:
        if dry_run:
            spent = spent_runs_of_mlflow(platform.registry, platform.releases, settings, end_ms)
            recorded = {"runs of MLflow": len(spent)}
        else:
            recorded = prune_mlflow(platform.registry, platform.releases, settings, end_ms)
    except RegistryError as error:
        console.print(f"MLflow stays as it is: {error}", style="yellow", soft_wrap=True)
    rows: list[dict[str, object]] = [
        {"": kind, "count": count, "megabytes": round(size / 2**20, 1)} for kind, (count, size) in totals(removals).items()
    ]
    rows.append({"": "runs of Dagster", "count": runs, "megabytes": ""})
    rows += [{"": kind, "count": count, "megabytes": ""} for kind, count in recorded.items()]
    console.print(table("Would be removed" if dry_run else "Removed", rows))
