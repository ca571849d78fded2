"""The `recsys` command. Heavy imports are inside the commands, so that `recsys --help` is quick."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from recsys_cli import kafka, releases, stream

if TYPE_CHECKING:
    from rich.console import Console

    from recsys_core.settings import Settings
    from serving.client import ClientOptions, Recommendation, SimilarItems

DEMO_HOME = Path(".recsys/demo")

Home = Annotated[Path | None, typer.Option(help="Folder of the installation. Default: RECSYS_HOME, else .recsys.")]
Count = Annotated[int, typer.Option("--count", "-n", help="Number of items.")]
Address = Annotated[str | None, typer.Option(help="The server. Default: the running stack's, else the settings'.")]
Ca = Annotated[
    str | None, typer.Option(envvar="RECSYS_CA", help="Call by TLS: PEM file of the CA of the server's certificate.")
]
Certificate = Annotated[str | None, typer.Option(envvar="RECSYS_CERTIFICATE", help="PEM file of an own certificate.")]
Key = Annotated[str | None, typer.Option(envvar="RECSYS_KEY", help="PEM file of its key.")]
IDS = {"ignore_unknown_options": True}
"""An id may begin like an option: those of Deskdrop are numbers, half of them negative."""


class TimeUnit(StrEnum):
    """Units of a time column."""

    S = "s"
    MS = "ms"
    US = "us"
    NS = "ns"
    ISO = "iso"
    DMY = "dmy"
    MDY = "mdy"


class _Commands(TyperGroup):
    """Prints what a user can mend as one red message and exits with 2; a bug is a line that says where its traceback is."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.TyperException, typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:  # noqa: BLE001  what it was is printed, and the traceback of a bug is kept
            from recsys_cli.errors import BUG, MENDABLE, explain, explain_bug

            message = explain(error)
            code = BUG if message is None else MENDABLE
            _print_red(message or explain_bug(error))
            raise typer.Exit(code) from None


def _print_red(message: str) -> None:
    from rich.console import Console

    from recsys_core.masking import masked_text

    Console(stderr=True).print(masked_text(message), style="red", markup=False, highlight=False, soft_wrap=True)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.add_typer(kafka.app, name="kafka")
app.add_typer(stream.app, name="stream")
app.add_typer(releases.app, name="release")


@app.callback()
def recsys(
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=lambda on: _show_version(on))
    ] = False,
) -> None:
    """From clickstream to served recommendations: run the platform, bring data to it, ask it."""
    from recsys_cli.processes import heed_interrupts

    heed_interrupts()


def _show_version(wanted: bool) -> None:
    from importlib.metadata import version

    if wanted:
        typer.echo(f"recsys {version('recsys')}")
        raise typer.Exit


def _settings(home: Path | None) -> Settings:
    from recsys_core.settings import load_settings

    return load_settings(home)


def _console() -> Console:
    from recsys_cli.console import plain_console

    return plain_console()


@app.command()
def up(home: Home = None) -> None:
    """Run the local stack until Ctrl-C: Redis, a broker, the speed layer, serving, the web UI and the daemon."""
    from recsys_cli import stack

    raise typer.Exit(stack.up(_settings(home), _console()))


@app.command()
def status(home: Home = None) -> None:
    """Say what of the local stack is up, and where. Exit code 0: all of it."""
    from recsys_cli import stack

    raise typer.Exit(stack.status(_settings(home), _console()))


@app.command()
def config(
    home: Home = None,
    toml: Annotated[bool, typer.Option("--toml", help="Print the settings as a documented recsys.toml.")] = False,
) -> None:
    """Show every setting in effect; those that differ from the default stand out."""
    from recsys_cli.config import documented_toml, settings_table

    settings = _settings(home)
    if toml:
        typer.echo(documented_toml(settings), nl=False)
    else:
        _console().print(settings_table(settings))


@app.command()
def doctor() -> None:
    """Find Java and Redis, or install them where the system's package manager can; else say what to do."""
    from recsys_cli.java import ensure_java
    from recsys_cli.stack import ensure_redis

    java = ensure_java()
    typer.echo(f"Java {java.version}: {java.path}")
    typer.echo(f"Redis: {ensure_redis()}")


@app.command()
def demo(
    data: Annotated[Path | None, typer.Option(help="A file or folder of events; without it a clickstream is made up.")] = None,
    mapping: Annotated[str | None, typer.Option(help="Name of the mapping of the columns; without it, it is detected.")] = None,
    catalog: Annotated[
        Path | None, typer.Option(help="A file or folder of the items of --data, if it does not hold them.")
    ] = None,
    home: Annotated[Path, typer.Option(help="Folder of everything the demo writes.")] = DEMO_HOME,
    live: Annotated[bool, typer.Option("--live", help="Only its end, in the folder of an earlier demo.")] = False,
) -> None:
    """Carry a clickstream from its files to answers of the server, click live, then stop what was started."""
    from recsys_cli import demo as demonstration

    if live:
        demonstration.run_live(home)
    else:
        demonstration.run(data, mapping, home, catalog)


@app.command()
def broker(
    home: Home = None,
    address_file: Annotated[Path | None, typer.Option(help="File that gets the broker's address while it runs.")] = None,
) -> None:
    """Run the embedded Kafka-protocol broker until Ctrl-C. It is for trying out and keeps a few megabytes."""
    from recsys_cli.processes import run_folder
    from streaming.broker import run_broker

    file = address_file or run_folder(_settings(home).home.absolute()) / "broker.address"
    run_broker(lambda address: typer.echo(f"broker at {address}"), file)


@app.command()
def serve(home: Home = None) -> None:
    """Run the gRPC server of the current release."""
    from serving import server

    raise typer.Exit(server.main(_settings(home)))


@app.command()
def prune(
    home: Home = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go, and remove nothing.")] = False,
) -> None:
    """Remove what the retention settings let go: landing, partitions, releases, runs; never the champion or its sources."""
    from recsys_cli import prune as pruning

    pruning.prune(_settings(home), _console(), dry_run)


@app.command()
def simulate(
    home: Home = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed makes the same clickstream.")] = 7,
    users: Annotated[int, typer.Option(min=1, help="Users on the first day.")] = 5_000,
    items: Annotated[int, typer.Option(min=54, help="Items on the first day.")] = 3_000,
    days: Annotated[int, typer.Option(min=1, help="Days of history; it ends with the last full hour.")] = 14,
    events: Annotated[int, typer.Option(min=1, help="Expected number of events.")] = 600_000,
    late: Annotated[float, typer.Option(min=0, max=1, help="Share of events that arrive late.")] = 0.01,
    duplicates: Annotated[float, typer.Option(min=0, max=1, help="Share of events that arrive twice.")] = 0.005,
    kafka: Annotated[bool, typer.Option("--kafka", help="Produce to the Kafka topic instead of the landing zone.")] = False,
    rate: Annotated[
        float | None, typer.Option(min=0.1, help="With --kafka: events a second; without, as fast as it goes.")
    ] = None,
) -> None:
    """Make up a clickstream with known tastes. Its truth goes to <home>/truth, for measuring."""
    from recsys_cli.console import showing_progress
    from recsys_core.lake import Lake
    from recsys_core.landing import Landing
    from recsys_core.masking import masked_text
    from recsys_core.progress import track
    from recsys_core.simulate import Simulation, SimulationConfig

    settings = _settings(home)
    counts = {"seed": seed, "users": users, "items": items, "days": days, "events": events}
    made = Simulation(SimulationConfig.model_validate({**counts, "late_rate": late, "duplicate_rate": duplicates}))
    lake = Lake(settings.lake_uri, settings.lake.keep_versions)
    with showing_progress():
        made.write_catalog(lake)
        if kafka:
            from streaming.producer import produce

            hours = track(made.batches(), "producing hours", 24 * days)
            produce((hour.events for hour in hours), settings.kafka, rate)
        else:
            made.write_landing(Landing(lake))
        made.write_truth(settings.home / "truth")
    target = f"topic {settings.kafka.topic}" if kafka else f"{masked_text(settings.lake_uri)}/landing"
    typer.echo(f"A clickstream of {days} days is in {target}; its truth is in {settings.home / 'truth'}.")


@app.command()
def ingest(
    path: Annotated[str, typer.Argument(help="A file or folder: delimited text, JSON or Parquet, plain or gzip.")],
    home: Home = None,
    mapping: Annotated[
        str | None, typer.Option(help="A ready mapping, or one of mappings.<name> in recsys.toml. Default: those that fit.")
    ] = None,
    catalog: Annotated[bool, typer.Option("--catalog", help="The rows are items, not events.")] = False,
    user: Annotated[str | None, typer.Option(help="Column of the user.")] = None,
    item: Annotated[str | None, typer.Option(help="Column of the item.")] = None,
    type_: Annotated[str | None, typer.Option("--type", help="Column of the event type; without one all are views.")] = None,
    time: Annotated[str | None, typer.Option(help="Column of the time.")] = None,
    unit: Annotated[
        TimeUnit | None,
        typer.Option(help="Of numbers (default: ms), or what a date begins with: iso year, dmy day, mdy month."),
    ] = None,
    session: Annotated[str | None, typer.Option(help="Column of the session.")] = None,
    device: Annotated[str | None, typer.Option(help="Column of the device.")] = None,
    country: Annotated[str | None, typer.Option(help="Column of the country.")] = None,
    value: Annotated[str | None, typer.Option(help="Column of the value: a price paid, a rating.")] = None,
    title: Annotated[str | None, typer.Option(help="Catalogue: column of the title.")] = None,
    category: Annotated[str | None, typer.Option(help="Catalogue: column of the category.")] = None,
    price: Annotated[str | None, typer.Option(help="Catalogue: column of the price.")] = None,
    available: Annotated[str | None, typer.Option(help="Catalogue: column that says whether an item can be had.")] = None,
    attributes: Annotated[
        str | None, typer.Option(help="Catalogue: further columns, with commas between; *: all others.")
    ] = None,
    delimiter: Annotated[str | None, typer.Option(help="Between fields of text. Default: what the first lines show.")] = None,
    header: Annotated[str | None, typer.Option(help="Columns of a file without a header line, with commas between.")] = None,
    shift_to_now: Annotated[bool, typer.Option("--shift-to-now", help="Move history so that its end is the present.")] = False,
) -> None:
    """Bring your own events or items. What can't be one goes to quarantine, with file, row and reason.

    Exit code 1: nothing landed, or no file of one of several kinds.
    """
    from recsys_cli import ingesting
    from recsys_cli.console import showing_progress
    from recsys_core.events import now_ms

    settings, console = _settings(home), _console()
    events = {"user_id": user, "item_id": item, "event_type": type_, "ts": time, "ts_unit": unit.value if unit else None}
    events |= {"session_id": session, "device": device, "country": country, "value": value}
    items = {"title": title, "category": category, "price": price, "available": available, "attributes": _names(attributes)}
    fields = {**events, **items, "delimiter": delimiter and delimiter.replace("\\t", "\t"), "header": _names(header)}
    given = {name: column for name, column in fields.items() if column}
    chosen = ingesting.chosen_mappings(settings, path, mapping, catalog, given, console)
    with showing_progress(console):
        reports = ingesting.take_in(path, chosen, settings, now_ms() if shift_to_now else None)
    if not ingesting.show(reports, settings, console, settings.partitions):
        raise typer.Exit(1)


def _names(text: str | None) -> list[str] | None:
    return [name.strip() for name in text.split(",")] if text else None


@app.command()
def check(
    asset: Annotated[str | None, typer.Argument(help="An asset; without one all that were made.")] = None,
    partition: Annotated[list[str] | None, typer.Option(help="A partition; may be given often. Default: the latest.")] = None,
    accept: Annotated[
        bool, typer.Option("--accept", help="Say that these hours, or the catalogue, are right as they are.")
    ] = False,
    home: Home = None,
) -> None:
    """Run the checks on data, models and caches. Exit code 1: one of them failed."""
    from recsys_cli import checks

    raise typer.Exit(checks.run(_settings(home), asset, partition or [], accept, _console()))


@app.command()
def backfill(
    asset: Annotated[str, typer.Argument(help="An asset with partitions.")],
    first: Annotated[str, typer.Argument(help="First partition: 2026-01-31 or 2026-01-31T09.")],
    last: Annotated[str, typer.Argument(help="Last partition.")],
    home: Home = None,
) -> None:
    """Make a range of an asset's partitions again: tables in one run, models one after the other."""
    from recsys_cli import backfill as backfilling

    raise typer.Exit(backfilling.run(_settings(home).home, asset, first, last, _console()))


@app.command()
def replay(
    day: Annotated[str, typer.Option(help="The day: 2026-01-31.")],
    user: Annotated[list[str] | None, typer.Option(help="A user; may be given often. Default: some of the day.")] = None,
    count: Count = 10,
    home: Home = None,
) -> None:
    """Show what would have been recommended on a past day, from the data before it."""
    from recsys_cli import history

    history.replay(_settings(home), day, user or [], count, _console())


@app.command(context_settings=IDS)
def forget(user: Annotated[str, typer.Argument(help="Id of the user.")], home: Home = None) -> None:
    """Remove a user from landing, tables and caches, and prove it. Exit code 1: something is left."""
    from recsys_cli import history

    raise typer.Exit(history.forget(_settings(home), user, _console()))


@app.command(context_settings=IDS)
def recommend(
    user: Annotated[str, typer.Argument(help="Id of the user.")],
    count: Count = 10,
    explain: Annotated[bool, typer.Option("--explain", help="Show the parts of each score.")] = False,
    address: Address = None,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    home: Home = None,
) -> None:
    """Ask the server what to recommend to a user. RECSYS_TOKEN holds the bearer token, where one is needed."""
    from serving.client import RecsysClient

    with RecsysClient(address or _serving_address(home), options=_call_options(ca, certificate, key)) as client:
        answer = client.recommend(user, count, explain=explain)
    _show_answer(answer, f"For user {user}", _titles(home, answer), answer.tier)
    if answer.weights:
        typer.echo("score = " + " + ".join(f"{weight:.2f} · {name}" for name, weight in answer.weights.items()))


@app.command(context_settings=IDS)
def similar(
    item: Annotated[str, typer.Argument(help="Id of the item.")],
    count: Count = 10,
    address: Address = None,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    home: Home = None,
) -> None:
    """Ask the server which items are like one item. RECSYS_TOKEN holds the bearer token, where one is needed."""
    from serving.client import RecsysClient

    with RecsysClient(address or _serving_address(home), options=_call_options(ca, certificate, key)) as client:
        answer = client.similar_items(item, count)
    _show_answer(answer, f"Similar to item {item}", _titles(home, answer))


@app.command()
def inspect(
    address: Address = None,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0: any free one.")] = 0,
    dagster: Annotated[str | None, typer.Option(help="URL of the Dagster web UI. Default: the running stack's.")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another name by which browsers reach the page, such as a proxy's.")
    ] = None,
    home: Home = None,
) -> None:
    """Serve a page that shows why a user gets an answer, on loopback, until Ctrl-C. RECSYS_TOKEN holds the bearer token."""
    from recsys_cli.stack import running_services
    from serving import inspection

    settings = _settings(home)
    running = {service.name: service.where for service in running_services(settings.home.absolute())}
    web = dagster or running.get("webserver", f"http://{settings.dagster.host}:{settings.dagster.port}")
    server = address or _serving_address(home)
    options = _call_options(ca, certificate, key, timeout=10.0)
    said = lambda url: typer.echo(f"Open {url} (Ctrl-C ends it).")  # noqa: E731
    inspection.run(settings, server, options, "127.0.0.1", port, web, said, allow_host or ())


def _call_options(ca: str | None, certificate: str | None, key: str | None, timeout: float = 1.0) -> ClientOptions:
    from serving.client import ClientOptions, Tls

    if bool(certificate) != bool(key):
        raise typer.BadParameter("a certificate and its key go together", param_hint="--certificate and --key")
    tls = Tls(ca, certificate, key) if ca or certificate else None
    return ClientOptions(timeout, token=os.environ.get("RECSYS_TOKEN", ""), tls=tls)


def _serving_address(home: Path | None) -> str:
    from recsys_cli.stack import running_services

    settings = _settings(home)
    running = {service.name: service.where for service in running_services(settings.home.absolute())}
    return running.get("serving", f"{settings.serving.host}:{settings.serving.port}")


def _titles(home: Path | None, answer: Recommendation | SimilarItems) -> dict[str, str]:
    """Titles of the items by the answer, else by the catalogue of this home: an answer out of the cache has ids alone."""
    from recsys_core.catalog import names_of
    from recsys_core.lake import Lake

    known = {item.item_id: item.title for item in answer if item.title}
    if known:
        return known
    names = names_of(Lake(_settings(home).lake_uri), [item.item_id for item in answer])
    return {item: name for item, name in names.items() if name != item}


def _show_answer(answer: Recommendation | SimilarItems, title: str, titles: dict[str, str], tier: str = "") -> None:
    from recsys_cli.console import table

    rows: list[dict[str, object]] = []
    for rank, item in enumerate(answer, start=1):
        row: dict[str, object] = {"#": rank, "item": item.item_id}
        if titles:
            row["title"] = titles.get(item.item_id, "")
        row = {**row, "score": item.score, **(item.parts or {})}
        if any(other.moved_by for other in answer):
            row["moved by"] = ", ".join(f"{by.title or by.item_id} (+{by.strength:.2f})" for by in item.moved_by)
        rows.append(row)
    by = f"{tier}, " if tier else ""
    _console().print(table(f"{title} ({by}release {answer.release_id or 'none'}, {answer.milliseconds:.1f} ms)", rows))


if __name__ == "__main__":
    app()
