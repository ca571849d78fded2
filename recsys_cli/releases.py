"""`recsys release`: what releases there are, what they are made of, which one is served, and how to change that."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from recsys_core.gate import Verdict
    from recsys_core.release import Manifest, Pointer, Releases
    from recsys_core.settings import Settings

CHAMPION = "champion"

app = typer.Typer(no_args_is_help=True, help="List, compare, promote and roll back releases.")

Home = Annotated[Path | None, typer.Option(help="Folder of the installation. Default: RECSYS_HOME, else .recsys.")]
Name = Annotated[str, typer.Argument(help="A release: its id, an unambiguous start of it, or `champion`.")]
Reason = Annotated[str, typer.Option(help="Why; kept in the pointer file.")]


@app.command("list")
def list_releases(home: Home = None) -> None:
    """All releases, newest first: how the served ranking did, what the gate said, and which one is served."""
    from recsys_cli.console import table
    from recsys_cli.stack import NEXT_STEP
    from recsys_core.masking import masked_text

    settings, releases, console = _open(home)
    where = masked_text(releases.uri)
    pointer = releases.champion()
    rows = [_row(releases, settings, name, pointer) for name in sorted(releases.names(), reverse=True)]
    if rows:
        console.print(
            table(
                f"Releases in {where}",
                rows,
                ["release", "role", "two-tower", settings.gate.metric, "gate"],
                whole="release",
            )
        )
    else:
        console.print(f"There is no release in {where}. {NEXT_STEP}", soft_wrap=True, highlight=False)


@app.command()
def show(release: Name = CHAMPION, home: Home = None) -> None:
    """What a release was made from and by which runs, how it did, and what the gate said."""
    from recsys_cli.console import table

    settings, releases, console = _open(home)
    manifest = releases.manifest(_resolve(releases, release))
    pointer = releases.champion()
    facts: dict[str, object] = {
        "day": manifest.day,
        "made": _moment(manifest.created_at),
        "role": _role(manifest.release_id, pointer),
        "megabytes": _megabytes(manifest),
        **{f"{asset} run": run for asset, run in manifest.run_ids.items()},
    }
    if pointer is not None and pointer.release_id == manifest.release_id:
        facts |= {"promoted": f"{_moment(pointer.promoted_at)}, {pointer.reason}"}
    console.print(table(f"Release {manifest.release_id}", [{"": name, "value": value} for name, value in facts.items()]))
    sources = [{"asset": name, **source} for name, source in manifest.sources.items()]
    console.print(table("Made from", sources, ["asset", "partition", "data_version"]))
    console.print(table("Models and ranking", _pairs({**manifest.models, "ranking": manifest.ranking})))
    scores = _scores(manifest)
    if scores:
        names = sorted({name for values in scores.values() for name in values}, key=_metric_order)
        of_metrics = [{"metric": name, **{model: values.get(name) for model, values in scores.items()}} for name in names]
        console.print(table("Metrics", of_metrics, ["metric", *scores], whole="metric"))
    verdict = _verdict(settings, manifest)
    if verdict is not None:
        _show_verdict(console, verdict)


@app.command()
def diff(
    first: Annotated[str, typer.Argument(help="A release: its id, an unambiguous start of it, or `champion`.")],
    second: Annotated[str, typer.Argument(help="The other one.")] = CHAMPION,
    home: Home = None,
) -> None:
    """Where two releases differ: sources, models, ranking, metrics and items."""
    from recsys_cli.console import table

    _, releases, console = _open(home)
    names = [_resolve(releases, name) for name in (first, second)]
    one, other = (_comparable(releases.manifest(name)) for name in names)
    rows: list[dict[str, object]] = [
        {"": key, names[0]: one.get(key), names[1]: other.get(key)}
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
    ]
    ids = [set(releases.item_ids(name)) for name in names]
    rows.append({"": "items", names[0]: len(ids[0]), names[1]: len(ids[1])})
    rows.append({"": "items only here", names[0]: len(ids[0] - ids[1]), names[1]: len(ids[1] - ids[0])})
    console.print(table("Differences", rows))


@app.command()
def promote(release: Name, reason: Reason = "promoted by hand", home: Home = None) -> None:
    """Serve a release, whatever the gate said of it, after all of it was read and verified."""
    settings, releases, console = _open(home)
    pointer = releases.promote(_resolve(releases, release), reason)
    _tell(console, settings, releases, pointer)


@app.command()
def rollback(reason: Reason = "rolled back by hand", home: Home = None) -> None:
    """Serve the champion before this one again; a second rollback goes one further back."""
    settings, releases, console = _open(home)
    pointer, passed_over = releases.roll_back(reason)
    for why in passed_over.values():
        console.print(f"passed over: {why}", soft_wrap=True, highlight=False)
    _tell(console, settings, releases, pointer)


def _open(home: Path | None) -> tuple[Settings, Releases, Console]:
    from recsys_cli.console import plain_console
    from recsys_core.release import Releases
    from recsys_core.settings import load_settings

    settings = load_settings(home)
    return settings, Releases(settings.releases_uri), plain_console()


def _resolve(releases: Releases, name: str) -> str:
    """The id that an id, its start or `champion` means. Raises ReleaseError."""
    from recsys_core.release import ReleaseError

    if name == CHAMPION:
        pointer = releases.champion()
        if pointer is None:
            raise ReleaseError("no release has been promoted yet")
        return pointer.release_id
    names = releases.names()
    found = [name] if name in names else [known for known in names if known.startswith(name)]
    if len(found) != 1:
        several = f"{len(found)} releases start with {name!r}: {', '.join(found)}"
        raise ReleaseError(several if found else f"there is no release {name!r} (`recsys release list`)")
    return found[0]


def _tell(console: Console, settings: Settings, releases: Releases, pointer: Pointer) -> None:
    """Say what is served now, and let the alias in MLflow follow the pointer, which is what counts."""
    from recsys_core.registry import Registry, RegistryError
    from recsys_core.release import ReleaseError

    name = pointer.release_id
    console.print(f"{name} is the champion; servers follow within {settings.serving.pointer_poll_seconds:g} s", soft_wrap=True)
    try:
        Registry(settings).follow(releases)
    except (RegistryError, ReleaseError) as error:
        console.print(f"the alias in the registry stays behind until the next night: {error}", soft_wrap=True, style="yellow")


# -- rows ---------------------------------------------------------------------------------------------------------------


def _row(releases: Releases, settings: Settings, name: str, pointer: Pointer | None) -> dict[str, object]:
    from recsys_core.evaluation import SERVED
    from recsys_core.release import ReleaseError

    row: dict[str, object] = {"release": name, "role": _role(name, pointer)}
    try:
        manifest = releases.manifest(name)
    except ReleaseError as error:
        return {**row, "gate": str(error)}
    verdict = _verdict(settings, manifest)
    judged = "" if verdict is None else verdict.reason if verdict.passed else f"failed: {verdict.reason}"
    metric = settings.gate.metric
    return {
        **row,
        "two-tower": bool(manifest.models.get("two_tower")),
        metric: _scores(manifest).get(SERVED, {}).get(metric),
        "gate": judged,
    }


def _role(name: str, pointer: Pointer | None) -> str:
    if pointer is None:
        return ""
    if name == pointer.release_id:
        return CHAMPION
    return f"{pointer.previous.index(name) + 1} back" if name in pointer.previous else ""


def _verdict(settings: Settings, manifest: Manifest) -> Verdict | None:
    """What the gate said, None when it never judged this release or has judged a newer one of its day."""
    from recsys_core.gate import read_verdict
    from recsys_core.lake import Lake

    found = read_verdict(Lake(settings.lake_uri), manifest.day)
    return found if found is not None and found.release_id == manifest.release_id else None


def _show_verdict(console: Console, verdict: Verdict) -> None:
    from recsys_cli.console import table

    said = "passed" if verdict.passed else "failed"
    rows = [
        {"score": c.name, "this": c.challenger, "champion": c.champion, "bound": c.bound, "held": c.held}
        for c in verdict.claims
    ]
    against = f" against {verdict.champion_id}" if verdict.champion_id else ""
    console.print(table(f"The gate{against}: {said}, {verdict.reason}", rows))


def _scores(manifest: Manifest) -> dict[str, dict[str, float]]:
    """Numbers by model and metric."""
    return {
        model: {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        for model, values in manifest.metrics.items()
        if isinstance(values, Mapping)
    }


def _metric_order(name: str) -> tuple[str, int, str]:
    """By the metric, then by its cut-off: ndcg@10 before ndcg@20 and ndcg@100."""
    of, _, k = name.partition("@")
    return of, int(k) if k.isdigit() else 0, k


def _comparable(manifest: Manifest) -> dict[str, object]:
    """Everything of a manifest that says how the release differs from another, by dotted name."""
    parts = {"sources": manifest.sources, "models": manifest.models, "ranking": manifest.ranking, "metrics": _scores(manifest)}
    return {"day": manifest.day, **{str(row[""]): row["value"] for row in _pairs(parts)}}


def _pairs(values: Mapping[str, Any], prefix: str = "") -> Sequence[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _pairs(value, f"{prefix}{key}.")
        else:
            rows.append({"": f"{prefix}{key}", "value": value})
    return rows


def _megabytes(manifest: Manifest) -> float:
    return round(sum(file["bytes"] for file in manifest.files.values()) / 1e6, 1)


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds)) + " UTC"
