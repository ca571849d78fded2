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

if TYPE_CHECKING:
    from recsys_core.forget import Forgotten

MENTIONS_SHOWN = 10


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
    """Remove a user and print the proof. Returns 1 when something is left or a place could not be searched, else 0.

    Raises StackError for an id that is empty.
    """
    from recsys_assets.resources import Platform
    from recsys_core.forget import Places, forget_user
    from recsys_core.mappings import BUILTIN

    if not user.strip():
        raise StackError("name the user to forget: an id is not empty")
    platform = Platform(settings)
    mappings = {**BUILTIN, **settings.mappings}.values()
    with showing_progress(console), platform.redis() as redis:
        places = Places(
            platform.lake,
            redis,
            platform.releases,
            platform.registry,
            user_fields={mapping.user_id for mapping in mappings if mapping.user_id},
            unsearched=_under_way(settings),
            outside=_elsewhere(settings),
        )
        report = forget_user(places, user)
    _show(report, console)
    return 1 if report.remaining or report.unsearched else 0


def _show(report: Forgotten, console: Console) -> None:
    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, highlight=False, soft_wrap=True)

    searched = ", ".join(f"{count:,} {what}" for what, count in sorted(report.looked_at.items()))
    if report.is_known:
        rows: list[dict[str, object]] = [
            {"place": place, "removed": report.removed.get(place, 0), "found afterwards": report.remaining.get(place, 0)}
            for place in sorted({*report.removed, *report.remaining})
        ]
        console.print(table(f"User {report.user_hash} (hash), {report.seconds:.1f} s", rows))
        say(f"The search afterwards went through {searched}.")
    else:
        say(f"There is no trace of this user in {searched} ({report.seconds:.1f} s).")
    for place, why in report.unsearched.items():
        say(f"{place} was not searched: {why}. Run the command again.", "red")
    if report.mentioned:
        shown = list(report.mentioned)[:MENTIONS_SHOWN]
        more = f" and {len(report.mentioned) - len(shown)} more" if len(report.mentioned) > len(shown) else ""
        say(
            "The same word stands in texts that name no user by a field and were left as they are, because it may mean "
            f"something else. Look at: {', '.join(shown)}{more}.",
            "yellow",
        )
    if report.is_known and report.releases:
        say(
            f"{len(report.releases)} releases were fitted with this user among the others; they name no user. "
            "The next night makes one without, and `recsys prune` removes the old ones."
        )
    say("What the user did up to now is not taken in again.")
    for place, how_long in report.outside.items():
        say(f"{place}: {how_long}.")


def _under_way(settings: Settings) -> dict[str, str]:
    """Runs that have read the tables before the removal and may write what they read after it."""
    import dagster as dg

    from recsys_cli.stack import prepare_dagster_home

    os.environ.setdefault("DAGSTER_HOME", str(prepare_dagster_home(settings.home)))
    with dg.DagsterInstance.get() as instance:
        runs = instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]))
    if not runs:
        return {}
    jobs = ", ".join(sorted({run.job_name for run in runs}))
    return {"What runs write that were under way": f"{len(runs)} of {jobs} began before the removal; wait for their end"}


def _elsewhere(settings: Settings) -> dict[str, str]:
    """Who keeps what was sent to them, and for how long."""
    kafka = settings.kafka
    kept = f"messages stay for {kafka.retention_hours} hours or as the brokers say, and their readers leave this user's out"
    return {
        f"Kafka's topics {kafka.topic} and {kafka.dead_letter_topic}": kept,
        "Logs of processes": "they name users whose records could not be read, and stay for as long as logs are kept",
    }
