"""What a person wants to see in the metadata: Markdown tables and plots."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa

from recsys_core.catalog import names_of
from recsys_core.evaluation import Evaluation
from recsys_core.gate import Verdict
from recsys_core.index import IndexReport
from recsys_core.lake import Lake, Partition
from recsys_core.precompute import Sample
from recsys_core.ranking import PARTS
from recsys_core.settings import METRICS

TOLD_BY_PARTITION = 2000


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> dg.MarkdownMetadataValue:
    """A Markdown table; floats with four digits."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return dg.MetadataValue.md("\n".join(lines))


def _cell(value: object) -> str:
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def tell_by_partition(
    context: dg.AssetExecutionContext, made: Sequence[Partition], more: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Give each partition that a run made its own rows and bytes, and `more` of it by key.

    What an asset returns, Dagster keeps with every partition of the run. Of a run over very many partitions it keeps no
    numbers of each: adding them takes time with the square of their number.
    """
    if len(made) > TOLD_BY_PARTITION:
        return
    for part in made:
        metadata = {"dagster/row_count": part.rows, "bytes": part.bytes, **(more or {}).get(part.key, {})}
        context.add_asset_metadata(metadata, partition_key=part.key)


def schema(arrow: pa.Schema | dict[str, str]) -> dg.TableSchema:
    """A column schema for the catalogue pages of the web UI."""
    columns = arrow.items() if isinstance(arrow, dict) else ((field.name, str(field.type)) for field in arrow)
    return dg.TableSchema(columns=[dg.TableColumn(name, kind) for name, kind in columns])


def evaluation_table(evaluation: Evaluation) -> dg.MarkdownMetadataValue:
    """The models side by side, with the 95 % interval of the first metric and what the served ranking gains over each."""
    names = [f"{name}@10" for name in METRICS]
    shown = [name for name in names if name in next(iter(evaluation.metrics.values()))]

    def row(model: str) -> list[object]:
        low, high = evaluation.intervals[model]
        gain = evaluation.differences.get(model)
        gained = "" if gain is None else f"{gain[0]:+.4f} ({gain[1]:+.4f} … {gain[2]:+.4f})"
        return [model, *(evaluation.metrics[model][n] for n in shown), f"{low:.4f} … {high:.4f}", gained]

    head = ["model", *shown, f"{evaluation.headline}, 95 %", "served gains (95 %)"]
    return table(head, map(row, evaluation.metrics))


def segments_table(evaluation: Evaluation) -> dg.MarkdownMetadataValue:
    """The first metric of each model for cold, light and heavy users, and for cold items."""
    models = list(evaluation.metrics)
    rows = [[name, int(found["users"]), *(found[m] for m in models)] for name, found in evaluation.segments.items()]
    return table([evaluation.headline, "users", *models], rows)


def weights_table(ranking: dict[str, Any], half_lives_hours: Sequence[float]) -> dg.MarkdownMetadataValue:
    """The tuned weight of each part, the trend's by half-life."""
    rows: list[list[object]] = [[part, float(ranking[f"{part}_weight"])] for part in PARTS if part != "trend"]
    mix = ranking["trend_mix"]
    if len(mix) != len(half_lives_hours):
        mix, half_lives_hours = [1.0], half_lives_hours[:1]
    rows += [
        [f"trend, half-life {hours:g} h", float(ranking["trend_weight"] * share)]
        for hours, share in zip(half_lives_hours, mix, strict=True)
    ]
    return table(["part", "weight"], rows)


def epochs_table(epochs: Sequence[Mapping[str, float]]) -> dg.MarkdownMetadataValue:
    """The metrics of each epoch of a training."""
    names = list(dict.fromkeys(name for epoch in epochs for name in epoch))
    return table(["epoch", *names], [[at, *(epoch.get(n, "") for n in names)] for at, epoch in enumerate(epochs, start=1)])


def verdict_table(verdict: Verdict) -> dg.MarkdownMetadataValue:
    """Each claim of the gate: both releases, the bound, whether it was held."""
    rows: list[list[object]] = []
    for claim in verdict.claims:
        values = ["" if value is None else value for value in (claim.challenger, claim.champion, claim.bound)]
        interval = "{:.4f} … {:.4f}".format(*claim.interval) if claim.interval else ""
        rows.append([claim.name, values[0], interval, *values[1:], "yes" if claim.held else "**no**"])
    return table(["score", "challenger", "95 %", "champion", "bound", "held"], rows)


def recommendations_table(lake: Lake, samples: Sequence[Sample]) -> dg.MarkdownMetadataValue:
    """Some users: what they did last, and what they get. Who they are is kept out of Dagster's store."""
    names = names_of(lake, [item for s in samples for item in (*s.last, *s.recommended)])

    def named(items: Sequence[str]) -> str:
        return ", ".join(names[item] for item in items)

    return table(["last items", "recommended"], [[named(s.last), named(s.recommended)] for s in samples])


def top_items_per_factor(
    lake: Lake, item_ids: np.ndarray, vectors: np.ndarray, factors: int = 8, top: int = 5
) -> dg.MarkdownMetadataValue:
    """The items with the largest weight on the factors of largest variance."""
    strongest = np.argsort(-vectors.var(axis=0))[:factors]
    best = item_ids[np.argsort(-vectors[:, strongest], axis=0)[:top]].T
    names = names_of(lake, best.ravel().tolist())
    rows = [[int(factor), ", ".join(names[item] for item in items)] for factor, items in zip(strongest, best, strict=True)]
    return table(["factor", "items"], rows)


def recall_plot(reports: Sequence[IndexReport], target: float) -> dg.MarkdownMetadataValue:
    """Recall@50 against milliseconds a query, a point for each efSearch that was tried."""
    figure, axes = _figure()
    for report in reports:
        axes.plot(
            [p.milliseconds for p in report.curve],
            [p.recall for p in report.curve],
            "o-",
            label=report.metric.replace("_", " "),
        )
        for point in report.curve:
            axes.annotate(
                str(point.ef_search), (point.milliseconds, point.recall), fontsize=7, xytext=(3, -8), textcoords="offset points"
            )
    axes.axhline(target, color="grey", linestyle="--", linewidth=1, label=f"target {target}")
    axes.set(xlabel="ms a query, one thread", ylabel="recall@50", title="efSearch: recall and latency")
    axes.legend()
    return _image(figure)


def evaluation_plot(evaluation: Evaluation) -> dg.MarkdownMetadataValue:
    """The first metric of all models as bars with their 95 % intervals."""
    figure, axes = _figure()
    names = list(evaluation.metrics)
    values = [evaluation.metrics[name][evaluation.headline] for name in names]
    bounds = np.array([evaluation.intervals[name] for name in names]).T
    axes.barh(names, values, xerr=np.abs(bounds - values), error_kw={"capsize": 3, "linewidth": 1})
    axes.margins(x=0.15)
    axes.invert_yaxis()
    for place, value in enumerate(values):
        axes.annotate(f"{value:.4f}", (bounds[1, place], place), va="center", xytext=(3, 0), textcoords="offset points")
    axes.set(xlabel=f"{evaluation.headline}, 95 % interval", title=f"{evaluation.day}: {evaluation.users} users")
    return _image(figure)


def _figure():  # type: ignore[no-untyped-def]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    return figure, figure.subplots()


def _image(figure) -> dg.MarkdownMetadataValue:  # type: ignore[no-untyped-def]
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=90)
    return dg.MetadataValue.md(f"![plot](data:image/png;base64,{base64.b64encode(out.getvalue()).decode()})")
