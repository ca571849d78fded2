"""`recsys stream`: the speed layer's worker, and the rebuilding of what it keeps in Redis."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Source(StrEnum):
    """Where a rebuild reads events from."""

    TOPIC = "topic"
    LANDING = "landing"


app = typer.Typer(invoke_without_command=True, help="Run a worker of the speed layer: Kafka to Redis and to the landing zone.")
Home = Annotated[Path | None, typer.Option(help="Folder of the installation. Default: RECSYS_HOME, else .recsys.")]


@app.callback()
def stream(context: typer.Context, home: Home = None) -> None:
    """Run a worker of the speed layer until Ctrl-C. Workers of one group share the partitions of the topic."""
    context.obj = home
    if context.invoked_subcommand is None:
        from recsys_core.settings import load_settings
        from streaming.run import main

        raise typer.Exit(main(load_settings(home)))


@app.command()
def rebuild(
    context: typer.Context,
    since: Annotated[
        str, typer.Option(help="From when on: all, an age such as 36h or 7d, or a time such as 2026-01-31T09.")
    ] = "all",
    source: Annotated[Source, typer.Option("--from", help="Where the events are read from.")] = Source.TOPIC,
) -> None:
    """Make users' records and trends in Redis again, while workers go on; then compare with a computation of its own.

    Exit code 1: something differs. A record is replaced by what the events since then give, so choose a time at least as
    long ago as records live.
    """
    from confluent_kafka import KafkaException
    from redis.exceptions import RedisError
    from rich.console import Console

    from recsys_cli.console import table
    from recsys_cli.processes import StackError
    from recsys_core.settings import load_settings
    from streaming.rebuild import rebuild as run

    try:
        done = run(load_settings(context.obj), _since_ms(since), source is Source.LANDING)
    except KafkaException as error:
        raise StackError(f"Kafka is away, run the rebuild again when it is back: {error.args[0].str()}") from error
    except RedisError as error:
        raise StackError(f"Redis is away, run the rebuild again when it is back: {error}") from error
    found = done.differences
    facts = {
        "events applied": done.events,
        "users made again": done.users,
        "trend buckets made again": done.buckets,
        "seconds": round(done.seconds, 1),
        "compared": found.compared,
        "taken further by live workers, not compared": found.ahead,
        "different": len(found.different),
    }
    Console().print(table(f"Rebuilt from the {source.value}", [{"": name, "count": count} for name, count in facts.items()]))
    for key in found.different[:20]:
        typer.echo(f"differs: {key}", err=True)
    raise typer.Exit(1 if found.different else 0)


def _since_ms(since: str) -> int:
    """A moment in ms since 1970 (UTC) from what a user wrote. Raises typer.BadParameter."""
    from recsys_core.events import DAY_MS, HOUR_MS, MINUTE_MS, key_start_ms, now_ms

    if since == "all":
        return 0
    units = {"m": MINUTE_MS, "h": HOUR_MS, "d": DAY_MS}
    if since[:-1].isdigit() and since[-1] in units:
        return max(0, now_ms() - int(since[:-1]) * units[since[-1]])
    try:
        return key_start_ms(since)
    except ValueError:
        raise typer.BadParameter(f"{since!r} is neither all, an age such as 36h, nor a time such as 2026-01-31T09") from None
