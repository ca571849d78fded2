"""Why an item is in an answer: the parts of its score, who proposed it, which live actions speak for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recsys_core.index import unit_rows
from recsys_core.online import UserRecord
from recsys_core.ranking import PARTS, Ranked, Snapshot
from recsys_core.settings import RankingSettings
from serving import recsys_pb2 as pb

NAMED_PARTS = tuple(name for name in PARTS if name in pb.Parts.DESCRIPTOR.fields_by_name)
INFLUENCES = 3
"""Most actions named for an item."""


def parts_message(values: Mapping[str, float]) -> pb.Parts:
    """Parts of a score, or their weights, by name."""
    message = pb.Parts()
    for name in NAMED_PARTS:
        setattr(message, name, values.get(name, 0.0))
    for name in values.keys() - set(NAMED_PARTS):
        message.others[name] = values[name]
    return message


def weights(settings: RankingSettings) -> dict[str, float]:
    """The weight of each part."""
    return {part: float(getattr(settings, f"{part}_weight")) for part in PARTS}


def described(snapshot: Snapshot, positions: np.ndarray) -> list[dict[str, Any]]:
    """Item id, title and category of some items."""
    rows = snapshot.items.select(["item_id", "title", "category"]).take(positions).to_pylist()
    return [{name: value or "" for name, value in row.items()} for row in rows]


def asset_versions(sources: Mapping[str, Mapping[str, str]]) -> list[pb.AssetVersion]:
    """The assets behind a release, by name."""
    return [
        pb.AssetVersion(asset=asset, partition=source.get("partition", ""), data_version=source.get("data_version", ""))
        for asset, source in sorted(sources.items())
    ]


def add_items(
    response: pb.RecommendResponse,
    snapshot: Snapshot,
    ranked: Ranked,
    row: int,
    record: UserRecord,
    last_items: np.ndarray,
    proposed: Mapping[str, np.ndarray],
    settings: RankingSettings,
    count: int,
) -> None:
    """Put the first `count` items of a ranked row into the response, each with everything that is known of it.

    `last_items` are those of the row's user, `proposed` what the generators proposed, by name.
    """
    positions = ranked.positions[row][ranked.positions[row] >= 0][:count]
    scores, parts = ranked.scores[row].tolist(), ranked.parts[row].tolist()
    sources = {name: set(found.tolist()) for name, found in proposed.items()}
    influences = moved_by(snapshot, positions, record, last_items, settings)
    for at, item in enumerate(described(snapshot, positions)):
        added = response.items.add(**item, score=scores[at], parts=parts_message(dict(zip(PARTS, parts[at], strict=True))))
        position = int(positions[at])
        added.sources.extend(name for name, found in sources.items() if position in found)
        added.moved_by.extend(influences[at])


def moved_by(
    snapshot: Snapshot, positions: np.ndarray, record: UserRecord, last_items: np.ndarray, settings: RankingSettings
) -> list[list[pb.Influence]]:
    """For each item the user's last actions that raise its score, strongest first; none where the session has no weight.

    The session's vector is a sum over the last items, so that the newest action of each has its share of the session's part.
    Items that the user had before those actions have theirs too, and are not named.
    """
    newest: dict[int, int] = {}
    for at, position in enumerate(snapshot.item_ids.positions([item for item, _, _ in record.last]).tolist()):
        newest.setdefault(position, at)
    last = last_items[last_items >= 0]
    acted = [(at, newest[position]) for at, position in enumerate(last.tolist()) if position in newest]
    if not acted or not len(positions) or settings.session_weight == 0:
        return [[] for _ in positions]
    vectors = unit_rows(snapshot.als_items[last]) * settings.session_decay ** np.arange(len(last))[:, None]
    length = float(np.linalg.norm(vectors.sum(axis=0))) or 1.0
    strengths = settings.session_weight / length * (unit_rows(snapshot.als_items[positions]) @ vectors.T)
    places, actions = zip(*acted, strict=True)
    titles = titles_of(snapshot, last[list(places)])
    influences = []
    for of_item in strengths[:, list(places)]:
        strongest = [k for k in np.argsort(-of_item)[:INFLUENCES] if of_item[k] > 0]
        influences.append([action_message(record.last[actions[k]], titles[k], float(of_item[k])) for k in strongest])
    return influences


def titles_of(snapshot: Snapshot, positions: np.ndarray) -> list[str]:
    """Titles of some items; empty where there is none, or no item (position -1)."""
    titles = snapshot.items["title"].take(np.maximum(positions, 0)).to_pylist()
    return [title or "" if position >= 0 else "" for title, position in zip(titles, positions.tolist(), strict=True)]


def last_actions(snapshot: Snapshot, record: UserRecord, settings: RankingSettings) -> list[pb.Influence]:
    """The actions that an answer takes into account, newest first."""
    actions = record.last[: settings.last_items]
    titles = titles_of(snapshot, snapshot.item_ids.positions([item for item, _, _ in actions]))
    return [action_message(action, title) for action, title in zip(actions, titles, strict=True)]


def action_message(action: Sequence[Any], title: str, strength: float = 0.0) -> pb.Influence:
    """One of a record's last actions."""
    item, event_type, ts = action
    return pb.Influence(item_id=item, event_type=event_type, ts_ms=int(ts), strength=strength, title=title)
