"""The gate: whether a new release may take the champion's place, judged for the same users on the same day.

The challenger's scores are those of the day's holdout in `evaluation` (models fitted on the window before the day), the
champion's are its release ranked for the same users, or its own holdout when it is of the same day.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import orjson

from recsys_core.evaluation import EVALUATION, SERVED, NothingToEvaluate, by_segment, evaluate_snapshot
from recsys_core.lake import Lake, MissingPartition, Partition
from recsys_core.online import UserRecord, users_of
from recsys_core.ranking import Snapshot, Trend, rank
from recsys_core.release import Pointer, ReleaseError, Releases
from recsys_core.settings import GateSettings, Settings

GATE = "gate"
COVERAGE = "coverage@10"
LATENCY = "latency_ms"
OF = " of "
"""Between a metric and the segment it was taken over: `ndcg@10 of cold users`."""
SIZE = f"users{OF}"
"""How the name of a segment's size begins: `users of cold users`."""

TIMED_CALLS = 40
TIMED_ITEMS = 50


@dataclass(frozen=True)
class Claim:
    """One line of the verdict: a value of the challenger, with its 95 % interval where that is known, the champion's value,
    and the bound that the challenger had to keep."""

    name: str
    challenger: float | None
    champion: float | None
    bound: float | None
    held: bool
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Verdict:
    """What the gate says of a release, and why. `reason` is one sentence a claim that was not held, or why it passes.

    It holds against the champion of that moment alone: `champion_sequence` is the sequence of its pointer, 0 without one.
    """

    passed: bool
    reason: str
    claims: tuple[Claim, ...] = ()
    release_id: str = ""
    champion_id: str = ""
    champion_sequence: int = 0


def judge(challenger: Mapping[str, float], champion: Mapping[str, float] | None, settings: GateSettings) -> Verdict:
    """Judge two sets of scores by name: `[gate] metric`, `coverage@10`, `latency_ms` and the metric by segment.

    A score that is absent or not finite keeps no claim. Segments are judged by the metric they were measured by, the first of
    the evaluation's. Without a champion everything passes: there is nothing to protect.
    """
    if champion is None:
        return Verdict(True, "there is no champion yet")
    metric = settings.metric
    claims = [_at_least(metric, challenger, champion, _less(champion.get(metric), settings.tolerance))]
    claims.append(_at_least(COVERAGE, challenger, champion, settings.min_coverage))
    latency = _finite(challenger.get(LATENCY))
    held = latency is not None and latency <= settings.max_latency_ms
    claims.append(Claim(LATENCY, latency, _finite(champion.get(LATENCY)), settings.max_latency_ms, held))
    segments = [name for name in sorted(challenger.keys() & champion.keys()) if OF in name and not name.startswith(SIZE)]
    claims += [
        _at_least(name, challenger, champion, _less(champion[name], settings.max_segment_drop))
        for name in segments
        if not _users(name, challenger) < settings.min_segment_users
    ]
    broken = [_sentence(claim) for claim in claims if not claim.held]
    return Verdict(not broken, "; ".join(broken) or f"{metric} and every guardrail held", tuple(claims))


def _at_least(name: str, challenger: Mapping[str, float], champion: Mapping[str, float], bound: float | None) -> Claim:
    value = _finite(challenger.get(name))
    held = value is not None and bound is not None and value >= bound
    return Claim(name, value, _finite(champion.get(name)), bound, held)


def _less(value: float | None, share: float) -> float | None:
    known = _finite(value)
    return None if known is None else known * (1 - share)


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _users(name: str, scores: Mapping[str, float]) -> float:
    """Size of the segment of a score; one of unknown size, which may be NaN, counts as large enough."""
    return scores.get(SIZE + name.split(OF, 1)[1], math.inf)


def _sentence(claim: Claim) -> str:
    if claim.challenger is None:
        return f"the challenger has no {claim.name}"
    if claim.bound is None:
        return f"the champion has no {claim.name} to be compared with"
    than = "above" if claim.name == LATENCY else "below"
    beside = f" (champion {claim.champion:.4g})" if claim.champion is not None else ""
    return f"{claim.name} {claim.challenger:.4g} is {than} {claim.bound:.4g}{beside}"


# -- the releases -----------------------------------------------------------------------------------------------------


def challenge(lake: Lake, releases: Releases, day: str, settings: Settings) -> Verdict:
    """Judge the newest release of `day` against the champion and keep the verdict as partition `day` of `gate`.

    Raises ReleaseError when the release is not there or not whole.
    """
    release_id = releases.newest_of(day)
    _, snapshot = releases.load(release_id)
    evaluated = lake.find(EVALUATION, day)
    scores = served_scores(evaluated.extra) if evaluated else {}
    opponent = _opponent(lake, releases, day, release_id, settings)
    verdict = judge({**scores, LATENCY: ranking_milliseconds(snapshot)}, opponent.scores, settings.gate)
    if opponent.decides is not None:
        verdict = replace(verdict, passed=opponent.decides, reason=opponent.reason)
    intervals = {evaluated.extra.get("headline"): evaluated.extra.get("intervals", {}).get(SERVED)} if evaluated else {}
    claims = tuple(replace(c, interval=_pair(intervals.get(c.name))) for c in verdict.claims)
    verdict = replace(
        verdict,
        claims=claims,
        release_id=release_id,
        champion_id=opponent.release_id,
        champion_sequence=opponent.sequence,
    )
    write_verdict(lake, day, verdict)
    return verdict


def write_verdict(lake: Lake, day: str, verdict: Verdict) -> Partition:
    content = asdict(verdict)
    return lake.write_blobs(GATE, day, {"verdict.json": orjson.dumps(content)}, len(verdict.claims), content)


def read_verdict(lake: Lake, day: str) -> Verdict | None:
    """The last verdict over a release of `day`, None when the gate never judged one."""
    found = lake.find(GATE, day)
    if found is None:
        return None
    claims = tuple(Claim(**{**claim, "interval": _pair(claim["interval"])}) for claim in found.extra["claims"])
    return Verdict(**{**found.extra, "claims": claims})


def _pair(bounds: Sequence[float] | None) -> tuple[float, float] | None:
    return (float(bounds[0]), float(bounds[1])) if bounds else None


def served_scores(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """The scores of the served ranking out of what an evaluation says: `metrics` by model, and the headline by segment."""
    scores = {name: float(v) for name, v in evaluation["metrics"].get(SERVED, {}).items() if isinstance(v, int | float)}
    segments = {name: values for name, values in evaluation.get("segments", {}).items() if SERVED in values}
    return {**scores, **by_segment(segments, evaluation["headline"])} if segments else scores


@dataclass(frozen=True)
class _Opponent:
    """The champion as the gate meets it: its scores, or what decides without them and why."""

    release_id: str = ""
    scores: dict[str, float] | None = None
    decides: bool | None = None
    reason: str = ""
    sequence: int = 0


def _opponent(lake: Lake, releases: Releases, day: str, challenger_id: str, settings: Settings) -> _Opponent:
    pointer = releases.champion()
    if pointer is None:
        return _Opponent()
    return replace(_met(lake, releases, day, challenger_id, pointer, settings), sequence=pointer.sequence)


def _met(lake: Lake, releases: Releases, day: str, challenger_id: str, pointer: Pointer, settings: Settings) -> _Opponent:
    name = pointer.release_id
    if name == challenger_id:
        return _Opponent(name, decides=True, reason="it is the champion already")
    try:
        if releases.manifest(name).day > day:
            return _Opponent(name, decides=False, reason=f"the champion {name} knows a later day than {day}")
        manifest, snapshot = releases.load(name, pointer.manifest_sha256)
    except ReleaseError as error:
        return _Opponent(name, decides=True, reason=f"the champion can't be used, so there is nothing to protect: {error}")
    if manifest.day == day:
        return _Opponent(name, served_scores({"metrics": manifest.metrics}))
    try:
        scores = evaluate_snapshot(lake, day, snapshot, settings)
    except (NothingToEvaluate, MissingPartition) as error:
        return _Opponent(name, decides=False, reason=f"the champion {name} can't be scored on {day}: {error}")
    return _Opponent(name, {**scores, LATENCY: ranking_milliseconds(snapshot)})


def ranking_milliseconds(snapshot: Snapshot) -> float:
    """Median time to rank for one user with a factor and a last item, on this machine."""
    random = np.random.default_rng(0)
    trend = Trend.of(snapshot, {})
    taken = []
    for position in random.integers(0, snapshot.items.num_rows, TIMED_CALLS):
        last = ((snapshot.item_ids[position], "view", 0),)
        record = UserRecord(last, als_version=snapshot.als_version, als=snapshot.als_items[position])
        started = time.perf_counter()
        users = users_of(snapshot, [record], snapshot.ranking)
        rank(snapshot, trend, users, TIMED_ITEMS, snapshot.ranking)
        taken.append(time.perf_counter() - started)
    return float(np.median(taken)) * 1000
