"""The demo: a clickstream, made up or the user's own, carried through the whole graph to answers of the server."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from recsys_cli.console import plain_console, showing_progress, table
from recsys_cli.java import ensure_java
from recsys_cli.live_demo import click_live
from recsys_cli.processes import StackError, home_lock, quiet, run_folder
from recsys_cli.stack import dagster_environment, redis_server, serving_process
from recsys_core.settings import HOME_VARIABLE, Settings, load_settings
from recsys_core.spark import stop_session

if TYPE_CHECKING:
    from recsys_core.lake import Lake
    from recsys_core.landing import Landing

MARKER = ".demo"
OWN = ("lake", "releases", "dagster", "mlflow", "redis", "spark", "truth", "kafka")
LOG = "demo.log"
USERS = 5
MAX_EXAMPLES = 1_000_000
"""The newest ones, of which the two-tower model of a day learns here: three days are trained while somebody waits."""
SHOP = "epochs = 2\nlearning_rate = 0.004\npropensity_power = 0.25\n"
"""Further settings of the two-tower model where the clicks are made up, chosen on clicks of the same generator: it gains by
what news lose by (docs/decisions.md)."""
STRANGER = "someone-new"
UNUSUAL_SHOWN = 3


@dataclass
class Steps:
    """The seconds of each step, for the summary."""

    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.console.rule(Text(name, style="bold"), align="left", style="dim")
        started = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started


def run(data: Path | None, mapping: str | None, home: Path, catalog: Path | None = None) -> None:
    """Run the demo in a home of its own. Raises StackError when that folder holds something else, or is in use twice.

    Raises FileNotFoundError and MappingError for data, or a catalogue of its items, that can't be read.
    """
    for path in (data, catalog):
        if path is not None and not path.exists():
            raise FileNotFoundError(2, "No such file or folder", str(path))
    if catalog is not None and data is None:
        raise StackError("--catalog names the items of --data; name both")
    console = plain_console()
    steps = Steps(console)
    with _own_home(home.absolute()) as home:
        _empty(home)
        os.environ["JAVA_HOME"] = str(ensure_java().path)
        os.environ |= dagster_environment(home)
        os.environ[HOME_VARIABLE] = str(home)
        with redis_server(home) as redis_url, showing_progress(console):
            os.environ["RECSYS_REDIS__URL"] = redis_url
            settings = load_settings(home)
            with steps.step("landing"):
                day = _land(settings, data, mapping, catalog, console)
            try:
                metrics = materialize_line(home, day, steps, history=data is not None)
            finally:
                stop_session()
            with serving_process(home) as address:
                with steps.step("answers"):
                    _ask(address, load_settings(home), day, console)
                with steps.step("live"):
                    click_live(address, load_settings(home), console)
        _evaluation(metrics, day, console)
        _summary(steps, home, console)


def run_live(home: Path) -> None:
    """Only the live end, in the folder of a demo that was made. Raises StackError without one, or when it is in use."""
    home = home.absolute()
    if not (home / MARKER).exists():
        raise StackError(f"{home} holds no demo; run `recsys demo` first")
    console = plain_console()
    os.environ[HOME_VARIABLE] = str(home)
    with home_lock(home), redis_server(home) as redis_url:
        os.environ["RECSYS_REDIS__URL"] = redis_url
        with serving_process(home) as address:
            click_live(address, load_settings(home), console)


# -- the folder -------------------------------------------------------------------------------------------------


@contextmanager
def _own_home(wanted: Path) -> Iterator[Path]:
    """Hold `wanted`, or the next folder beside it while that is in use by a running stack or another demo."""
    for home in (wanted, *(wanted.with_name(f"{wanted.name}-{number}") for number in range(2, 10))):
        if home.exists() and not (home / MARKER).exists() and any(home.iterdir()):
            raise StackError(f"{home} holds something that no demo made; choose another folder by --home")
        home.mkdir(parents=True, exist_ok=True)
        (home / MARKER).touch()
        with ExitStack() as held:
            try:
                held.enter_context(home_lock(home))
            except StackError:
                continue
            yield home
            return
    raise StackError(f"{wanted} and the folders beside it are in use by other demos")


def _empty(home: Path) -> None:
    for name in OWN:
        shutil.rmtree(home / name, ignore_errors=True)
    for name in ("recsys.toml", "mlflow.db"):
        (home / name).unlink(missing_ok=True)


# -- the line ---------------------------------------------------------------------------------------------------


def _land(settings: Settings, data: Path | None, mapping: str | None, catalog: Path | None, console: Console) -> str:
    """Fill the landing zone, fix the partitions of the home, and return the last day that is complete."""
    from recsys_core.lake import Lake
    from recsys_core.landing import Landing

    lake = Lake(settings.lake_uri, settings.lake.keep_versions)
    landing = Landing(lake)
    if data is None:
        _simulate(settings, landing, console)
    else:
        _ingest(settings, data, mapping, catalog, console)
    day = landing.last_busy_day()
    extent = landing.extent()
    if day is None or extent is None:
        raise StackError("no event landed; the quarantine says why: " + lake.path("quarantine"))
    fix_partitions(settings.home, *extent)
    with (settings.home / "recsys.toml").open("a") as out:
        out.write(f"[two_tower]\nmax_examples = {MAX_EXAMPLES}\n")
        if data is None:
            out.write(SHOP)
    return day


def _simulate(settings: Settings, landing: Landing, console: Console) -> None:
    from recsys_core.events import DAY_MS, now_ms
    from recsys_core.simulate import Simulation, SimulationConfig

    made = Simulation(SimulationConfig(end=now_ms() // DAY_MS * DAY_MS))
    made.write_catalog(landing.lake)
    rows = made.write_landing(landing)
    made.write_truth(settings.home / "truth")
    console.print(f"{rows:,} events of {made.config.days} days by about {made.config.users:,} users, made up", highlight=False)


def _ingest(settings: Settings, data: Path, mapping: str | None, catalog: Path | None, console: Console) -> None:
    from recsys_cli.ingesting import chosen_mappings, show, take_in

    chosen = chosen_mappings(settings, str(data), mapping, False, {}, console)
    if not any(one.kind == "events" for one in chosen.values()):
        raise StackError(f"{data} fits {', '.join(chosen)}, which describes items; the demo needs events")
    show(take_in(str(data), chosen, settings), settings, console, partitions=None)
    if catalog is not None:
        items = chosen_mappings(settings, str(catalog), None, True, {}, console)
        show(take_in(str(catalog), items, settings), settings, console, partitions=None)


def fix_partitions(home: Path, first_ts: int, last_ts: int) -> None:
    """Write the days of the data into the home's settings; partitions of a history that is over end with it."""
    from recsys_core.events import DAY_MS, day_key, now_ms

    lines = ["[partitions]", f"start = {day_key(first_ts)}"]
    if last_ts < now_ms() - DAY_MS:
        lines.append(f"end = {day_key(last_ts + DAY_MS)}")
    (home / "recsys.toml").write_text("\n".join(lines) + "\n")


def materialize_line(home: Path, day: str, steps: Steps, history: bool = False) -> dict[str, Any]:
    """Run the jobs of the graph in this process, recorded in the home's Dagster instance; return the evaluation.

    Unusual hours of a `history` that is over are accepted and told; in clicks that were made up there are none.
    """
    import dagster as dg

    from recsys_core.events import DAY_MS, HOUR_MS, day_key, hour_key, hour_keys, key_start_ms
    from recsys_core.landing import Landing

    with quiet(run_folder(home) / LOG), dg.DagsterInstance.get() as instance:
        # The partitions are read from the settings when the graph is imported, so that must come after the landing.
        from recsys_assets.definitions import build_definitions
        from recsys_assets.resources import Platform

        settings = load_settings(home)
        definitions = build_definitions(settings)
        platform = Platform(settings)
        first, last = Landing(platform.lake).extent() or (0, 0)
        end = key_start_ms(day) + DAY_MS
        hours = (hour_key(first), max(hour_key(last), hour_key(end - HOUR_MS)))
        # The day is predicted with what was known the day before; the weights for that are tuned with what was known before it.
        days = [known for ago in (3, 2, 1) if (known := day_key(end - ago * DAY_MS)) >= day_key(first)]
        last_hour = hour_key(end - HOUR_MS)

        def materialize(job: str, assets: list[str], span: tuple[str, str]) -> None:
            with steps.step(", ".join(assets)):
                definitions.resolve_job_def(job).execute_in_process(
                    instance=instance,
                    asset_selection=[dg.AssetKey(name) for name in assets],
                    partition_key=span[0] if span[0] == span[1] else None,
                    tags={} if span[0] == span[1] else _range_tags(*span),
                )

        definitions.resolve_job_def("arrivals").execute_in_process(instance=instance)
        materialize("hourly", ["clicks_hourly"], hours)
        if history:
            take_history_as_it_is(platform.lake, settings, hour_keys(first, end), steps.console)
        materialize("nightly", ["interactions"], (days[0], day))
        materialize("nightly", ["user_features", "item_features", "training_examples"], (days[0], day))
        for known in days:
            materialize("nightly", ["two_tower"], (known, known))
        for asset in ("als_factors", "item_index", "popular_items", "evaluation", "release", "champion", "online_features"):
            materialize("nightly", [asset], (day, day))
        materialize("hourly", ["trending_items", "rec_cache"], (last_hour, last_hour))
        return platform.lake.get("evaluation", day).extra


def take_history_as_it_is(lake: Lake, settings: Settings, hours: list[str], console: Console) -> list[str]:
    """Accept the hours of a history that its checks find unusual, such as an outage long ago, and tell them; returns them.

    Nobody can mend them any more, and the demo shows what can be made of the data that there is.
    """
    from recsys_core.profiles import Profiles, accept, unsound_hours

    profiles = Profiles(lake, settings.quality)
    unusual = unsound_hours(profiles, hours)
    if unusual:
        console.print(
            f"{len(unusual)} of {len(hours):,} hours are unusual and are taken as they are, because this history is over:",
            highlight=False,
            soft_wrap=True,
        )
    for hour, why in list(unusual.items())[:UNUSUAL_SHOWN]:
        console.print(f"  {hour} {why}", highlight=False, soft_wrap=True, markup=False)
    return accept(profiles, unusual)


def _range_tags(first: str, last: str) -> dict[str, str]:
    return {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}


# -- what is shown ----------------------------------------------------------------------------------------------


def _ask(address: str, settings: Settings, day: str, console: Console) -> None:
    """Ask the server for a handful of users and a stranger, and print the answers beside what each did last."""
    from recsys_core.catalog import names_of
    from recsys_core.events import DAY_MS, HOUR_MS, hour_key, key_start_ms
    from recsys_core.lake import Lake
    from recsys_core.online import read_records
    from recsys_core.redis_client import client
    from recsys_core.tables import ACTIVE_USERS
    from serving.client import RecsysClient

    lake = Lake(settings.lake_uri)
    active = lake.dataset(ACTIVE_USERS, [hour_key(key_start_ms(day) + DAY_MS - HOUR_MS)])
    users = [*(active.head(USERS, columns=["user_id"])["user_id"].to_pylist() if active else []), STRANGER]
    with client(settings.redis) as redis:
        records = read_records(redis, users)
    with RecsysClient(address, timeout=5.0) as server:
        server.recommend(STRANGER)
        answers = [server.recommend(user, 5) for user in users]
    done, given = [record.last[:3] for record in records], [answer.items[:3] for answer in answers]
    shown = [*(item for last in done for item, _, _ in last), *(item.item_id for items in given for item in items)]
    names = names_of(lake, shown)
    rows = [
        {
            "user": user,
            "did last": "\n".join(f"{kind} {names[item]}" for item, kind, _ in last),
            "is recommended": "\n".join(names[item.item_id] for item in items),
            "tier": answer.tier,
            "ms": round(answer.milliseconds, 2),
        }
        for user, last, items, answer in zip(users, done, given, answers, strict=True)
    ]
    console.print(table(f"Answers of release {answers[0].release_id}", rows), soft_wrap=False)


def _evaluation(found: dict[str, Any], day: str, console: Console) -> None:
    if not found["metrics"]:
        console.print(f"Not evaluated: {found['reason']}", highlight=False)
        return
    headline = found["headline"]
    shown = {f"{name}@10": name for name in ("recall", "coverage")}

    def row(model: str, values: dict[str, float]) -> dict[str, str]:
        low, high = found["intervals"][model]
        gain = found["differences"].get(model)
        gained = "" if gain is None else f"{gain[0]:+.3f} ({gain[1]:.3f} … {gain[2]:.3f})"
        first = {headline.partition("@")[0]: f"{values[headline]:.4f}", "95 %": f"{low:.3f} … {high:.3f}"}
        rest = {title: f"{values[metric]:.4f}" for metric, title in shown.items() if metric in values}
        return {"model": model, **first, **rest, "served gains": gained}

    rows = [row(model, values) for model, values in found["metrics"].items()]
    title = f"{day} predicted from the days before it: {found['users']:,} users, {found['items']:,} items, metrics @10"
    console.print(table(title, rows))
    weights = ", ".join(f"{name.removesuffix('_weight')} {value:.2f}" for name, value in _weights(found["ranking"]).items())
    note = found["tuning"]["note"] or f"tuned on {found['tuning']['users']:,} users at moments before the day"
    console.print(f"Weights of the served ranking: {weights} ({note})", highlight=False)
    if found["two_tower"].startswith("not evaluated"):
        console.print(f"Two-tower {found['two_tower']}", highlight=False)


def _weights(ranking: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in ranking.items() if name.endswith("_weight")}


def _summary(steps: Steps, home: Path, console: Console) -> None:
    rows = [{"step": name, "seconds": round(seconds, 1)} for name, seconds in steps.seconds.items()]
    rows.append({"step": "all", "seconds": round(sum(steps.seconds.values()), 1)})
    console.print(table("Time", rows))
    there = f"--home {os.path.relpath(home)}"
    advice = [
        (f".venv/bin/recsys up {there}", "the web UI with this graph and these runs, and the server"),
        (f".venv/bin/recsys recommend USER --explain {there}", "ask it, while that runs"),
        ("make demo DATA=<file or folder>", "the same with your own clickstream"),
        (".venv/bin/recsys ingest --help", "bring your own data to stay"),
    ]
    width = max(len(command) for command, _ in advice)
    console.print(
        "What next:", *(f"  {command:{width}}  {what}" for command, what in advice), sep="\n", markup=False, soft_wrap=True
    )
