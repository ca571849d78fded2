"""How an answer is made: from the cache, else computed, else stale, else what is popular; every step labelled.

Answers are bytes in protobuf's wire format: items that lie encoded in the cache are passed on without being parsed,
and the fields around them are appended (a concatenation of messages is their merge).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from recsys_core.index import unit_rows
from recsys_core.online import CachedAnswer, CorruptValue, UserRecord, recs_key, user_key, users_of
from recsys_core.ranking import PARTS, Ranked, Snapshot, rank
from recsys_core.settings import RankingSettings, Settings
from serving import recsys_pb2 as pb
from serving.champion import Champion, Loaded, one_faiss_thread
from serving.store import Store, UserState
from serving.validation import Options

log = logging.getLogger(__name__)

BATCH_USERS = 128
"""Users of a batch that are read and ranked at a time, between which other calls get their turn."""
RANK_SECONDS = 0.25
"""Deadline of one computed answer, its wait for the thread included."""
BULK_RANK_SECONDS = 10.0
"""The same for BATCH_USERS users of a batch."""
MAX_WRITES = 1000
"""Write-backs under way; more are dropped and counted."""

T = TypeVar("T")


class UnknownItem(LookupError):
    """The release in service does not know an item."""


@dataclass(frozen=True)
class Computed:
    """A ranked answer.

    Attributes:
        response: for the caller.
        value: for the cache, None when the answer is not the user's plain one.
    """

    response: bytes
    value: bytes | None


@dataclass(frozen=True)
class Pace:
    """Where and how long an answer may be computed: one user's never waits behind a batch."""

    thread: ThreadPoolExecutor
    seconds: float


@dataclass(frozen=True)
class Call:
    """What stays the same while one call is answered. `now` is in ms."""

    loaded: Loaded
    options: Options
    now: int


class Ladder:
    """Answers for users, one or many by the same path.

    Attributes:
        counts: answers by tier, and failures, since the start.
    """

    def __init__(self, champion: Champion, store: Store, settings: Settings) -> None:
        self._champion = champion
        self._store = store
        self._settings = settings
        self._single = Pace(ThreadPoolExecutor(1, "rank", initializer=one_faiss_thread), RANK_SECONDS)
        self._bulk = Pace(ThreadPoolExecutor(1, "rank-bulk", initializer=one_faiss_thread), BULK_RANK_SECONDS)
        self._writes: set[asyncio.Task[None]] = set()
        self.counts: Counter[str] = Counter()

    async def recommend(self, user_id: str, options: Options) -> bytes:
        """A RecommendResponse. Raises NotReady."""
        [response] = await self._answers([user_id], options, self._single)
        return response

    async def recommend_batch(self, user_ids: Sequence[str], options: Options) -> list[bytes]:
        """RecommendResponses in the order of the users. Raises NotReady."""
        responses: list[bytes] = []
        for at in range(0, len(user_ids), BATCH_USERS):
            responses += await self._answers(user_ids[at : at + BATCH_USERS], options, self._bulk)
        return responses

    async def similar(self, item_id: str, options: Options) -> bytes:
        """A SimilarItemsResponse. Raises NotReady, UnknownItem, TimeoutError."""
        loaded = self._champion.get()
        return await _in_thread(self._single, lambda: similar_items(loaded.snapshot, item_id, options))

    async def _answers(self, user_ids: Sequence[str], options: Options, pace: Pace) -> list[bytes]:
        call = Call(self._champion.get(), options, time.time_ns() // 1_000_000)
        states = await self._store.read(user_ids)
        try:
            cached = [self._from_cache(call, user_id, state) for user_id, state in zip(user_ids, states, strict=True)]
            missing = [at for at, response in enumerate(cached) if response is None]
            if not missing:
                return [response for response in cached if response is not None]
            made = await self._without_cache(call, [user_ids[at] for at in missing], [states[at] for at in missing], pace)
            rest = iter(made)
            return [next(rest) if response is None else response for response in cached]
        except Exception:
            self.counts["unexpected_failures"] += 1
            log.exception("an answer failed; what is popular is served instead")
            return [self._popular(call, UserRecord()) for _ in user_ids]

    # -- the tiers ----------------------------------------------------------------------------------------------

    def _from_cache(self, call: Call, user_id: str, state: UserState) -> bytes | None:
        """The cached answer, when it is fresh and holds all that is asked for."""
        answer = state.answer
        if answer is None or call.options.needs_computing or not self._is_fresh(answer, state, call.now):
            return None
        wire, items = self._kept(call, user_id, answer, call.options.excluded)
        if items < call.options.count:
            return None
        return self._response(wire, pb.CACHE, answer.release_id, answer.computed_at)

    async def _without_cache(self, call: Call, user_ids: Sequence[str], states: Sequence[UserState], pace: Pace) -> list[bytes]:
        records = [self._record(call, user_id, state) for user_id, state in zip(user_ids, states, strict=True)]
        wanted = [at for at, r in enumerate(records) if call.options.categories or is_known(call.loaded.snapshot, r)]
        ids = [user_ids[at] for at in wanted]
        made = await self._compute(call, ids, [records[at] for at in wanted], pace) if wanted else []
        computed = dict(zip(wanted, made, strict=True)) if made else {}
        self._write_back([(user_ids[at], answer.value) for at, answer in computed.items() if answer.value is not None])
        return [
            computed[at].response
            if at in computed
            else self._stale(call, user_ids[at], states[at], records[at]) or self._popular(call, records[at])
            for at in range(len(user_ids))
        ]

    async def _compute(self, call: Call, user_ids: Sequence[str], records: Sequence[UserRecord], pace: Pace) -> list[Computed]:
        """Ranked answers; none at all when ranking fails or lasts too long."""
        try:
            return await _in_thread(pace, lambda: self._ranked(call, user_ids, records))
        except TimeoutError:
            self.counts["late_rankings"] += 1
            log.warning("ranking %d users took longer than %.2f s", len(records), pace.seconds)
        except Exception:
            self.counts["failed_rankings"] += 1
            log.exception("ranking failed")
        return []

    def _ranked(self, call: Call, user_ids: Sequence[str], records: Sequence[UserRecord]) -> list[Computed]:
        snapshot, options, ranking = call.loaded.snapshot, call.options, call.loaded.snapshot.ranking
        keep = self._settings.cache.items
        excluded = [options.excluded] * len(records)
        users = users_of(snapshot, records, ranking, excluded, user_ids=user_ids, now=call.now)
        allowed = snapshot.in_categories(options.categories) if options.categories else None
        wanted = max(options.count, keep) if options.plain else options.count + len(options.excluded)
        ranked = rank(snapshot, call.loaded.trend, users, wanted, ranking, allowed)
        values = call.loaded.encoder.encode(ranked.positions, ranked.scores, call.now)
        cacheable = options.plain and options.count <= keep
        realtime = pb.REALTIME_ALS_ONLY if snapshot.tower is None else pb.REALTIME
        computed = []
        for row, (record, value) in enumerate(zip(records, values, strict=True)):
            tier = realtime if is_known(snapshot, record) else pb.POPULAR
            response = self._rendered(call, ranked, row, CachedAnswer.decode(value), tier)
            computed.append(Computed(response, value if cacheable else None))
        return computed

    def _stale(self, call: Call, user_id: str, state: UserState, record: UserRecord) -> bytes | None:
        """What is left of the cached answer when nothing better can be made; it can't serve a category."""
        answer = state.answer
        if answer is None or call.options.categories:
            return None
        unwanted = {*call.options.excluded, *consumed(record, self._settings.ranking)}
        wire, items = self._kept(call, user_id, answer, unwanted)
        if not items:
            return None
        tier = pb.CACHE if self._is_fresh(answer, state, call.now) else pb.STALE_CACHE
        return self._response(wire, tier, answer.release_id, answer.computed_at)

    def _popular(self, call: Call, record: UserRecord) -> bytes:
        """What is trending and popular, from the list that lies ready."""
        loaded, categories = call.loaded, call.options.categories
        answer, ranked = loaded.popular_answer, loaded.popular
        unwanted = {*call.options.excluded, *consumed(record, self._settings.ranking)}
        if unwanted or categories:
            ranked = _filtered(loaded.snapshot, ranked, unwanted, categories)
            answer = CachedAnswer.decode(loaded.encoder.encode(ranked.positions, ranked.scores, answer.computed_at)[0])
        return self._rendered(call, ranked, 0, answer, pb.POPULAR)

    # -- parts of them ------------------------------------------------------------------------------------------

    def _is_fresh(self, answer: CachedAnswer, state: UserState, now: int) -> bool:
        """Whether a cached answer is young enough and the user has not acted since."""
        young = now - answer.computed_at <= self._settings.cache.fresh_seconds * 1000
        return young and state.last_ts <= answer.computed_at

    def _kept(self, call: Call, user_id: str, answer: CachedAnswer, unwanted: Collection[str]) -> tuple[bytes, int]:
        """Wire format and number of the first `count` items that are still served and not unwanted.

        The answer of another release is checked item by item: what that release had may be gone or unavailable by now.
        """
        snapshot, count = call.loaded.snapshot, call.options.count
        if not unwanted and answer.release_id == snapshot.release_id:
            return answer.first(count), min(count, len(answer.ends))
        try:
            items = answer.items()
        except CorruptValue as error:
            self._store.note_corrupt(recs_key(user_id), error)
            return b"", 0
        kept = []
        start = 0
        for (item, _), end in zip(items, answer.ends.tolist(), strict=True):
            position = snapshot.positions.get(item)
            if position is not None and snapshot.available[position] and item not in unwanted:
                kept.append(answer.wire[start:end])
            start = end
        return b"".join(kept[:count]), len(kept[:count])

    def _record(self, call: Call, user_id: str, state: UserState) -> UserRecord:
        """The user's record, with the item that the user looks at as the newest action."""
        try:
            record = state.record()
        except CorruptValue as error:
            self._store.note_corrupt(user_key(user_id), error)
            record = UserRecord()
        if call.options.current_item:
            record = replace(record, last=((call.options.current_item, "view", call.now), *record.last))
        return record

    def _rendered(self, call: Call, ranked: Ranked, row: int, answer: CachedAnswer, tier: pb.Tier) -> bytes:
        """The response of a ranked row, `answer` being the row encoded."""
        if call.options.explain:
            return self._explained(call, ranked, row, tier, answer.computed_at)
        return self._response(answer.first(call.options.count), tier, answer.release_id, answer.computed_at)

    def _response(self, wire: bytes, tier: pb.Tier, release_id: str, computed_at: int) -> bytes:
        self.counts[pb.Tier.Name(tier)] += 1
        rest = pb.RecommendResponse(tier=tier, release_id=release_id, computed_at_ms=computed_at)
        return wire + rest.SerializeToString()

    def _explained(self, call: Call, ranked: Ranked, row: int, tier: pb.Tier, computed_at: int) -> bytes:
        self.counts[pb.Tier.Name(tier)] += 1
        snapshot = call.loaded.snapshot
        positions = ranked.positions[row][ranked.positions[row] >= 0][: call.options.count]
        scores, parts = ranked.scores[row].tolist(), ranked.parts[row].tolist()
        response = pb.RecommendResponse(tier=tier, release_id=snapshot.release_id, computed_at_ms=computed_at)
        for at, item in enumerate(described(snapshot, positions)):
            response.items.add(**item, score=scores[at], parts=pb.Parts(**dict(zip(PARTS, parts[at], strict=True))))
        weights = {part: getattr(snapshot.ranking, f"{part}_weight") for part in PARTS}
        response.explanation.weights.MergeFrom(pb.Parts(**weights))
        response.explanation.sources.extend(asset_versions(call.loaded.manifest.sources))
        return response.SerializeToString()

    def _write_back(self, answers: Sequence[tuple[str, bytes]]) -> None:
        if not answers:
            return
        if len(self._writes) >= MAX_WRITES:
            self.counts["dropped_writes"] += len(answers)
            return
        task = asyncio.create_task(self._store.write_answers(answers))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def close(self) -> None:
        """Finish the write-backs under way, which have deadlines, and end the threads."""
        await asyncio.gather(*self._writes)
        for pace in (self._single, self._bulk):
            pace.thread.shutdown(wait=False, cancel_futures=True)


async def _in_thread(pace: Pace, work: Callable[[], T]) -> T:
    async with asyncio.timeout(pace.seconds):
        return await asyncio.get_running_loop().run_in_executor(pace.thread, work)


def is_known(snapshot: Snapshot, record: UserRecord) -> bool:
    """Whether there is anything personal to rank by: a factor of the snapshot's model, or last items that it knows."""
    if record.als is not None and record.als_version == snapshot.als_version:
        return True
    return any(item in snapshot.positions for item, _, _ in record.last)


def consumed(record: UserRecord, settings: RankingSettings) -> list[str]:
    """Items that the user had already and that are therefore left out."""
    if not settings.exclude_consumed:
        return []
    return [item for item, _, _ in record.last] + list(record.seen[: settings.max_consumed])


def described(snapshot: Snapshot, positions: np.ndarray) -> list[dict[str, Any]]:
    """Item id, title and category of some items."""
    rows = snapshot.items.select(["item_id", "title", "category"]).take(positions).to_pylist()
    return [{name: value or "" for name, value in row.items()} for row in rows]


def asset_versions(sources: dict[str, dict[str, str]]) -> list[pb.AssetVersion]:
    """The assets behind a release, by name."""
    return [
        pb.AssetVersion(asset=asset, partition=source.get("partition", ""), data_version=source.get("data_version", ""))
        for asset, source in sorted(sources.items())
    ]


def similar_items(snapshot: Snapshot, item_id: str, options: Options) -> bytes:
    """A SimilarItemsResponse: the items of highest cosine similarity. Raises UnknownItem."""
    position = snapshot.positions.get(item_id)
    if position is None:
        raise UnknownItem(f"item_id {item_id!r} is not in release {snapshot.release_id}")
    response = pb.SimilarItemsResponse(release_id=snapshot.release_id)
    vector = snapshot.als_items[[position]]
    if not vector.any():
        return response.SerializeToString()
    servable = snapshot.available & snapshot.in_categories(options.categories) if options.categories else snapshot.available
    unwanted = np.append(snapshot.positions_of(options.excluded), position)
    selection = None if servable.all() else np.flatnonzero(servable)
    found = snapshot.indexes["cosine"].search(vector, options.count + len(unwanted), selection)[0]
    found = found[(found >= 0) & ~np.isin(found, unwanted)][: options.count]
    similarities = unit_rows(snapshot.als_items[found]) @ unit_rows(vector)[0]
    for item, similarity in zip(described(snapshot, found), similarities.tolist(), strict=True):
        response.items.add(**item, similarity=similarity)
    return response.SerializeToString()


def _filtered(snapshot: Snapshot, ranked: Ranked, unwanted: Collection[str], categories: Sequence[str]) -> Ranked:
    """One ranked row without unwanted items and those of other categories."""
    positions = ranked.positions[0]
    keep = (positions >= 0) & ~np.isin(positions, snapshot.positions_of(unwanted))
    if categories:
        keep &= snapshot.in_categories(categories)[positions]
    return Ranked(ranked.positions[:, keep], ranked.scores[:, keep], ranked.parts[:, keep])
