"""`recsys replay` and `recsys forget`: a past day as it would have been, and a user as if they had never been."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from recsys_cli.console import showing_progress, table
from recsys_cli.processes import StackError
from recsys_core.events import DAY_MS, BadKey, checked_key, hour_keys, key_start_ms
from recsys_core.settings import Settings
from recsys_core.tables import CLICKS_HOURLY

if TYPE_CHECKING:
    from recsys_assets.resources import Platform


def replay(settings: Settings, day: str, users: Sequence[str], count: int, console: Console) -> None:
    """Print what would have been recommended on a day, beside what users did before it and had on it.

    Raises BadKey for what is no day and StackError where there are no clicks before it, before anything is started.
    """
    from recsys_assets.resources import Platform
    from recsys_cli.java import ensure_java
    from recsys_core.replay import replay_day
    from recsys_core.spark import stop_session

    platform = Platform(settings)
    _raise_without_clicks(platform, day)
    os.environ["JAVA_HOME"] = str(ensure_java().path)
    try:
        with showing_progress(console):
            found = replay_day(platform.lake, day, settings, platform.spark, platform.als_engine, users, count)
    finally:
        stop_session()
    titles = dict(zip(found.snapshot.item_ids, found.snapshot.items["title"].to_pylist(), strict=True))

    def named(items: Sequence[str]) -> str:
        return "\n".join(titles.get(item) or item for item in items[:5])

    rows: list[dict[str, object]] = [
        {
            "user": one.user_id,
            "did before": named(one.last),
            "would have been recommended": named(one.recommended),
            "of it had that day": named(one.hits),
        }
        for one in found.users
    ]
    made = f", made for it: {', '.join(found.made)}" if found.made else ""
    console.print(table(f"{day} from the data before it{made}", rows))
    for model, why in found.notes.items():
        console.print(f"Without {model}: {why}", highlight=False, soft_wrap=True)


def _raise_without_clicks(platform: Platform, day: str) -> None:
    start = key_start_ms(checked_key(day))
    if len(day) != len("2026-01-31"):
        raise BadKey(f"{day!r} is no day such as 2026-01-31")
    made = platform.lake.keys(CLICKS_HOURLY)
    window = hour_keys(start - platform.settings.interactions.window_days * DAY_MS, start)
    if not made:
        raise StackError(
            f"no hour of clicks was made in {platform.settings.home.absolute()}: `recsys backfill clicks_hourly …`"
        )
    if not set(window) & set(made):
        raise StackError(
            f"there are no clicks in the {platform.settings.interactions.window_days} days before {day}; "
            f"those that were made are of {made[0]} … {made[-1]}"
        )


def forget(settings: Settings, user: str, console: Console) -> int:
    """Remove a user and print the proof. Returns 1 when something is left or a place could not be searched, else 0."""
    from recsys_assets.resources import Platform
    from recsys_core.forget import Places, forget_user

    platform = Platform(settings)
    with showing_progress(console), platform.redis() as redis:
        report = forget_user(Places(platform.lake, redis, platform.releases, platform.registry), user)
    rows: list[dict[str, object]] = [
        {"place": place, "removed": report.removed.get(place, 0), "found afterwards": report.remaining.get(place, 0)}
        for place in sorted({*report.removed, *report.remaining})
    ]
    console.print(table(f"User {report.user_hash} (hash), {report.seconds:.1f} s", rows))
    searched = ", ".join(f"{count:,} {what}" for what, count in sorted(report.looked_at.items()))
    console.print(f"The search afterwards went through {searched}.", highlight=False)
    for place, why in report.unsearched.items():
        console.print(f"{place} was not searched: {why}. Run the command again.", style="red", highlight=False, soft_wrap=True)
    if report.releases:
        console.print(
            f"{len(report.releases)} releases were fitted with this user among the others; they name no user. "
            "The next night makes one without, and `recsys prune` removes the old ones.",
            highlight=False,
        )
    return 1 if report.remaining or report.unsearched else 0
