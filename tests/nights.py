"""Small nights without Spark: everything that a day's release is made from, by two groups of users with tastes of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
from builders import write_clicks, write_interactions

from recsys_core.bundle import POPULAR_ITEMS, build_item_index, fit_als_factors, publish_release
from recsys_core.evaluation import EVALUATION, SERVED
from recsys_core.lake import Lake
from recsys_core.popularity import popular_items
from recsys_core.release import Manifest, Releases
from recsys_core.settings import Settings
from recsys_core.tables import INTERACTIONS

USERS, ITEMS, HAD = 120, 24, 8
GOOD = {"ndcg@10": 0.4, "coverage@10": 0.6}


def small(settings: Settings) -> Settings:
    """So few users need less regularisation, and a busy test machine more time to rank, than the defaults allow."""
    als = settings.als.model_copy(update={"rank": 4, "regularization": 0.1})
    gate = settings.gate.model_copy(update={"max_latency_ms": 2000.0})
    return settings.model_copy(update={"als": als, "gate": gate})


def prepare_night(lake: Lake, day: str, settings: Settings, served: dict[str, float] | None = None) -> None:
    """All parts of a release of `day`; `served` are the metrics that its evaluation gives, None: it was not evaluated."""
    random = np.random.default_rng(3)
    rows, clicks = [], []
    for user in range(USERS):
        items = random.permutation(ITEMS // 2)
        group = user % 2
        rows += [(f"u{user}", f"g{group}-{item}", 1.0) for item in items[:HAD]]
        clicks += [(f"u{user}", f"g{group}-{item}", f"{day}T10") for item in items[HAD : HAD + 2]]
    write_interactions(lake, day, rows)
    write_clicks(lake, clicks)
    fit_als_factors(lake, day, settings, None, "numpy")
    build_item_index(lake, day, settings)
    window = lake.dataset(INTERACTIONS, [day])
    assert window is not None
    lake.write(POPULAR_ITEMS, day, popular_items(window))
    evaluate_as(lake, day, served)


def evaluate_as(
    lake: Lake, day: str, served: dict[str, float] | None, segments: dict[str, dict[str, float]] | None = None
) -> None:
    """Let the evaluation of a day say this."""
    content: dict[str, Any] = {"day": day, "metrics": {SERVED: served} if served else {}}
    if served:
        around = [served["ndcg@10"] - 0.05, served["ndcg@10"] + 0.05]
        content |= {"headline": "ndcg@10", "intervals": {SERVED: around}, "segments": segments or {}}
    lake.write_blobs(EVALUATION, day, {"evaluation.json": b"{}"}, 1, content)


def make_release(lake: Lake, releases: Releases, day: str, settings: Settings) -> Manifest:
    manifest, _ = publish_release(lake, releases, day, settings, {"release": "run-1"})
    return manifest
