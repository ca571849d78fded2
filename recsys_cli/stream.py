"""`recsys stream`: the speed layer's worker, and the rebuilding of what it keeps in Redis."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
