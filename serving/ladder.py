"""How an answer is made: from the cache, else computed, else stale, else what is popular; every step labelled.

Answers are bytes in protobuf's wire format: items that lie encoded in the cache are passed on without being parsed,
and the fields around them are appended (a concatenation of messages is their merge).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from recsys_core.index import Part, unit_rows
from recsys_core.online import (
    RECORD_FIELDS,
    CachedAnswer,
    CorruptValue,
    UserRecord,
    consumed,
    first_items,
    recs_key,
    user_key,
    users_of,
)
from recsys_core.ranking import Ranked, Snapshot, Users, proposals, rank
from recsys_core.settings import RankingSettings, Settings
from serving import recsys_pb2 as pb
from serving.champion import Champion, Loaded
from serving.diversity import POOL, diversified
from serving.explain import add_items, asset_versions, described, last_actions, parts_message, weights
from serving.filters import ItemFilters
from serving.metrics import Metrics
from serving.ranker import Batch, Computed, Ranker, TooSlow
from serving.seldom import Seldom
from serving.store import LAST_TS_AT, Raw, Store, UserState
from serving.validation import EVERY_ITEM, NO_DIVERSITY, ItemFilter, Options
from serving.wire import tail

log = logging.getLogger(__name__)

BATCH_USERS = 256
"""Users of a batch that are read and ranked at a time, between which other calls get their turn."""
MICRO_BATCH = 32
"""Most users of single calls that are ranked together: a bound of the wait of the calls behind them."""
COSTLY_USERS, COSTLY_ITEMS = 16, 1000
"""The same for answers whose items cost more than plain ones: some 30 ms of work, after which other calls get their turn."""
ANSWER_SHARE = 0.8
"""Of the time that the caller still waits, what an answer may be computed in; the rest is for a lower tier and the way back."""
TURN = 16
"""Users answered on the event loop in one go: up to a millisecond each, of those who had thousands of items."""
DIVERSE_FROM = 2000
"""Popular items from which an answer with a limit for each category is chosen."""
MAX_WRITES = 1000
"""Write-backs under way; more are dropped and counted."""

TIER_NAMES: dict[int, str] = {number: name for name, number in pb.Tier.items()}


Remaining = Callable[[], float | None]
"""Tells how many seconds the caller still waits, None when it has set no deadline."""


def no_deadline() -> None:
    """The caller waits for ever."""


class UnknownItem(LookupError):
    """The release in service does not know an item."""


@dataclass(frozen=True)
class Call:
    """What stays the same while one call is answered. `now` is in ms, `remaining` in seconds (None: no deadline)."""

    loaded: Loaded
    options: Options
    now: int
    remaining: float | None = None

    @cached_property
    def excluded(self) -> np.ndarray:
        """int64: positions of the items that the call leaves out."""
        return self.loaded.snapshot.positions_of(self.options.excluded)


class Ladder:
    """Answers for users, one or many by the same path.

    Attributes:
        counts: answers by tier, and failures, since the start.
    """

    def __init__(self, champion: Champion, store: Store, settings: Settings, metrics: Metrics | None = None) -> None:
        self.metrics = metrics or store.metrics
        self.counts = self.metrics.events
        self._champion = champion
        self._store = store
        self._settings = settings
        self._fresh_ms = settings.cache.fresh_seconds * 1000
        timeouts = settings.serving
        self.single = Ranker("rank", self._ranked, timeouts.rank_timeout_ms / 1000, MICRO_BATCH, self.metrics)
        self.bulk = Ranker("rank-bulk", self._ranked, timeouts.batch_timeout_ms / 1000, BATCH_USERS, self.metrics)
        self.costly = Ranker("rank-costly", self._ranked, timeouts.batch_timeout_ms / 1000, COSTLY_USERS, self.metrics)
        self.rankers = (self.single, self.bulk, self.costly)
        self._writes: set[asyncio.Task[None]] = set()
        self._faults = Seldom(log)

    async def recommend(self, user_id: bytes, options: Options, remaining: Remaining = no_deadline) -> bytes:
        """A RecommendResponse. `user_id` is checked UTF-8. Raises NotReady."""
        loaded = self._champion.get()
        options = _options_for(loaded, options)
        # Before the read: an action that comes in after it must be later than the answer that does not know it.
        now = int(time.time() * 1000)
        [raw] = await self._store.read((user_id,))
        if options.plain:
            hit = self._hit(loaded, raw, options.count, now)
            if hit is not None:
                return hit
        call = Call(loaded, options, now, remaining())
        ranker = self.single if options.cost == 1 else self.costly
        return (await self._answers(call, [user_id.decode()], [raw], ranker))[0]

    async def recommend_batch(
        self, user_ids: Sequence[bytes], options: Options, remaining: Remaining = no_deadline
    ) -> list[bytes]:
        """RecommendResponses in the order of the users. Raises NotReady."""
        loaded = self._champion.get()
        options = _options_for(loaded, options)
        responses: list[bytes] = []
        ranker, together = self.bulk, BATCH_USERS
        if options.cost > 1:
            ranker, together = self.costly, max(1, min(COSTLY_USERS, COSTLY_ITEMS // options.count))
        for at in range(0, len(user_ids), together):
            users = user_ids[at : at + together]
            now = int(time.time() * 1000)
            raws = await self._store.read(users)
            plain = options.plain
            made = [self._hit(loaded, raw, options.count, now) if plain else None for raw in raws]
            missing = [k for k, response in enumerate(made) if response is None]
            if missing:
                call = Call(loaded, options, now, remaining())
                some = [users[k].decode() for k in missing]
                for k, response in zip(
                    missing, await self._answers(call, some, [raws[k] for k in missing], ranker), strict=True
                ):
                    made[k] = response
            responses += [response for response in made if response is not None]
        return responses

    async def similar(self, item_id: str, options: Options, same_category: bool, remaining: Remaining = no_deadline) -> bytes:
        """A SimilarItemsResponse. Raises NotReady, UnknownItem, TooSlow."""
        loaded = self._champion.get()
        return await self.single.run(lambda: similar_items(loaded, item_id, options, same_category), remaining())

    async def trending(self, options: Options, remaining: Remaining = no_deadline) -> bytes:
        """A TrendingResponse. Raises NotReady, TooSlow."""
        loaded = self._champion.get()
        return await self.single.run(lambda: trending_items(loaded, options), remaining())

    def _hit(self, loaded: Loaded, raw: Raw, count: int, now: int) -> bytes | None:
        """The cached answer of the release in service, when it is fresh and long enough."""
        fields, value = raw
        if type(value) is not bytes or type(fields) not in (list, tuple) or len(fields) != len(RECORD_FIELDS):
            return None
        acted = fields[LAST_TS_AT]
        if acted is None:
            last_ts = 0
        elif type(acted) is bytes and len(acted) < 20 and acted.isdigit():
            last_ts = int(acted)
        else:
            return None
        found = first_items(value, loaded.release, count, now, now - self._fresh_ms, last_ts)
        if found is None:
            return None
        self.counts["CACHE"] += 1
        return found[0] + tail(pb.CACHE, loaded.snapshot.release_id, found[1])

    async def _answers(self, call: Call, user_ids: Sequence[str], raws: Sequence[Raw], ranker: Ranker) -> list[bytes]:
        try:
            states = [self._store.state(user_id, raw) for user_id, raw in zip(user_ids, raws, strict=True)]
            cached = [self._from_cache(call, user_id, state) for user_id, state in zip(user_ids, states, strict=True)]
            missing = [at for at, response in enumerate(cached) if response is None]
            if not missing:
                return [response for response in cached if response is not None]
            made = await self._without_cache(call, [user_ids[at] for at in missing], [states[at] for at in missing], ranker)
            rest = iter(made)
            return [next(rest) if response is None else response for response in cached]
        except Exception as error:  # noqa: BLE001
            self.counts["unexpected_failures"] += 1
            self._faults.fail(error, "an answer failed; what is popular is served instead")
            return [self._popular(call, UserRecord()) for _ in user_ids]

    # -- the tiers ----------------------------------------------------------------------------------------------

    def _from_cache(self, call: Call, user_id: str, state: UserState) -> bytes | None:
        """The cached answer, when it is fresh and holds all that is asked for."""
        answer = state.answer
        if answer is None or call.options.needs_computing or not self._is_fresh(call, answer, state):
            return None
        wire, items = self._kept(call, user_id, answer, call.excluded)
        if items < call.options.count:
            return None
        return self._response(wire, pb.CACHE, answer.release_id, answer.computed_at)

    async def _without_cache(
        self, call: Call, user_ids: Sequence[str], states: Sequence[UserState], ranker: Ranker
    ) -> list[bytes]:
        records = [self._record(call, user_id, state) for user_id, state in zip(user_ids, states, strict=True)]
        filtered = call.options.filter != EVERY_ITEM
        wanted = [at for at, r in enumerate(records) if filtered or is_known(call.loaded.snapshot, r)]
        some = [user_ids[at] for at in wanted]
        made = await self._compute(call, some, [records[at] for at in wanted], ranker) if wanted else []
        computed = dict(zip(wanted, made, strict=True)) if made else {}
        for answer in computed.values():
            self.counts[TIER_NAMES[answer.tier]] += 1
        self._write_back([(user_ids[at], answer.value) for at, answer in computed.items() if answer.value is not None])
        answers: list[bytes | None] = []
        for at, user_id in enumerate(user_ids):
            if at in computed:
                answers.append(computed[at].response)
            else:
                answers.append(self._stale(call, user_id, states[at], records[at]))
                await _let_others(at)
        missing = [record for record, answer in zip(records, answers, strict=True) if answer is None]
        popular = iter(await self._popular_for(call, missing, ranker) if missing else ())
        return [next(popular) if answer is None else answer for answer in answers]

    async def _popular_for(self, call: Call, records: Sequence[UserRecord], ranker: Ranker) -> list[bytes]:
        """What is popular for some users. Plain answers lie ready; the event loop is no place to make others."""
        if call.options.cost > 1:
            with suppress(TooSlow):
                return await ranker.run(lambda: [self._popular(call, record, True) for record in records], call.remaining)
        answers = []
        for at, record in enumerate(records):
            answers.append(self._popular(call, record))
            await _let_others(at)
        return answers

    async def _compute(
        self, call: Call, user_ids: Sequence[str], records: Sequence[UserRecord], ranker: Ranker
    ) -> list[Computed]:
        """Ranked answers; none at all when ranking fails or lasts too long."""
        remaining = None if call.remaining is None else call.remaining * ANSWER_SHARE
        try:
            return await ranker.compute(call.loaded, call.options, user_ids, records, call.now, remaining)
        except TooSlow as error:
            log.debug("%s", error)
        except Exception as error:  # noqa: BLE001
            self.counts["failed_rankings"] += 1
            self._faults.fail(error, "ranking failed")
        return []

    def _ranked(self, batch: Batch) -> list[Computed]:
        """Rank users and render their answers; runs in a ranker's thread."""
        loaded, options = batch.loaded, batch.options
        snapshot, keep = loaded.snapshot, self._settings.cache.items
        ranking = snapshot.ranking
        if options.include_consumed:
            ranking = ranking.model_copy(update={"exclude_consumed": False})
        context = options.context
        users = users_of(
            snapshot,
            batch.records,
            ranking,
            batch.excluded,
            user_ids=batch.user_ids,
            now=context.ts_ms or batch.now,
            device=context.device or None,
            country=context.country or None,
        )
        wanted = max(options.count, keep)  # among as many candidates, whatever is asked for
        if options.diversity != NO_DIVERSITY:
            wanted = max(wanted, POOL * options.count)
        servable, allowed = self._allowed(loaded, options.filter)
        ranked = rank(servable, loaded.trend, users, wanted, ranking, allowed)
        if options.diversity != NO_DIVERSITY:
            ranked = diversified(snapshot, loaded.filters, ranked, options.diversity, options.count)
        acted = [record.last_ts for record in batch.records]
        values = loaded.encoder.encode(ranked.positions, ranked.scores, batch.now, acted)
        cacheable = options.plain and options.count <= keep
        personal = has_two_tower(users)
        computed = []
        for row, (record, value) in enumerate(zip(batch.records, values, strict=True)):
            tier = pb.REALTIME_ALS_ONLY if is_known(snapshot, record) else pb.POPULAR
            if personal[row]:
                tier = pb.REALTIME
            answer = CachedAnswer.decode(value)
            if options.explain:
                user = users.rows(slice(row, row + 1))
                proposed = proposals(servable, loaded.trend, user, wanted, ranking, allowed)
                last, at = user.last_items[0], answer.computed_at
                response = self._explained(loaded, options, ranked, row, tier, at, record, last, proposed, ranking)
            else:
                response = answer.first(options.count) + tail(tier, answer.release_id, answer.computed_at)
            computed.append(Computed(response, value if cacheable else None, tier))
        return computed

    def _allowed(self, loaded: Loaded, wanted: ItemFilter) -> tuple[Snapshot, np.ndarray | None]:
        """The snapshot to rank with and the mask of a filter; unavailable items are in only when it asks for them."""
        mask = loaded.filters.mask(wanted)
        if mask is not None and not mask.any():
            self.counts["filters_without_items"] += 1
        return (loaded.with_unavailable if wanted.include_unavailable else loaded.snapshot), mask

    def _stale(self, call: Call, user_id: str, state: UserState, record: UserRecord) -> bytes | None:
        """What is left of the cached answer when nothing better can be made; it can't serve a filter or a limit."""
        answer, options = state.answer, call.options
        if answer is None or options.filter != EVERY_ITEM or options.diversity.max_per_category:
            return None
        if answer.release_id in call.loaded.withdrawn:
            return None
        wire, items = self._kept(call, user_id, answer, unwanted(call, record))
        if not items:
            return None
        tier = pb.CACHE if self._is_fresh(call, answer, state) else pb.STALE_CACHE
        return self._response(wire, tier, answer.release_id, answer.computed_at)

    def _popular(self, call: Call, record: UserRecord, with_time: bool = False) -> bytes:
        """What is trending and popular, from the list that lies ready. `with_time`: it may take some; no event loop waits."""
        loaded, options = call.loaded, call.options
        answer, ranked = loaded.popular_answer, loaded.popular
        without = unwanted(call, record)
        if len(without) or options.filter != EVERY_ITEM or options.diversity != NO_DIVERSITY:
            ranked = _filtered(loaded, ranked, without, options, with_time)
            answer = CachedAnswer.decode(loaded.encoder.encode(ranked.positions, ranked.scores, answer.computed_at)[0])
        self.counts["POPULAR"] += 1
        if options.explain:
            ranking, wanted, nobody = loaded.snapshot.ranking, loaded.popular.positions.shape[1], loaded.nobody
            proposed = proposals(loaded.snapshot, loaded.trend, nobody, wanted, ranking)
            last, at = nobody.last_items[0], answer.computed_at
            return self._explained(loaded, options, ranked, 0, pb.POPULAR, at, UserRecord(), last, proposed, ranking)
        return answer.first(options.count) + tail(pb.POPULAR, answer.release_id, answer.computed_at)

    # -- parts of them ------------------------------------------------------------------------------------------

    def _is_fresh(self, call: Call, answer: CachedAnswer, state: UserState) -> bool:
        """Whether a cached answer is young enough, the user has not acted since, and its release was not rolled back."""
        return answer.release_id not in call.loaded.withdrawn and answer.is_fresh(
            call.now, call.now - self._fresh_ms, state.last_ts
        )

    def _kept(self, call: Call, user_id: str, answer: CachedAnswer, without: np.ndarray) -> tuple[bytes, int]:
        """Wire format and number of the first `count` items that are still served and not at the positions `without`.

        The answer of another release is checked item by item: what that release had may be gone or unavailable by now.
        """
        snapshot, count = call.loaded.snapshot, call.options.count
        if not len(without) and answer.release_id == snapshot.release_id:
            return answer.first(count), min(count, len(answer.ends))
        try:
            items = answer.items()
        except CorruptValue as error:
            self._store.note_corrupt(recs_key(user_id), error)
            return b"", 0
        positions = snapshot.item_ids.positions([item for item, _ in items])
        served = (positions >= 0) & snapshot.available[positions] & ~np.isin(positions, without)
        kept = []
        start = 0
        for wanted, end in zip(served.tolist(), answer.ends.tolist(), strict=True):
            if wanted:
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
        if current := call.options.context.current_item:
            record = replace(record, last=((current, "view", call.now), *record.last))
        return record

    def _response(self, wire: bytes, tier: pb.Tier, release_id: str, computed_at: int) -> bytes:
        self.counts[TIER_NAMES[tier]] += 1
        return wire + tail(tier, release_id, computed_at)

    def _explained(
        self,
        loaded: Loaded,
        options: Options,
        ranked: Ranked,
        row: int,
        tier: int,
        computed_at: int,
        record: UserRecord,
        last_items: np.ndarray,
        proposed: Mapping[str, np.ndarray],
        ranking: RankingSettings,
    ) -> bytes:
        snapshot = loaded.snapshot
        response = pb.RecommendResponse(tier=pb.Tier.Name(tier), release_id=snapshot.release_id, computed_at_ms=computed_at)
        add_items(response, snapshot, ranked, row, record, last_items, proposed, ranking, options.count)
        response.explanation.weights.MergeFrom(parts_message(weights(ranking)))
        response.explanation.sources.extend(asset_versions(loaded.manifest.sources))
        response.explanation.last_actions.extend(last_actions(snapshot, record, ranking))
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
        for ranker in self.rankers:
            ranker.close()


async def _let_others(at: int) -> None:
    """Give other calls their turn after every TURN users whose answers are made on the event loop."""
    if at % TURN == TURN - 1:
        await asyncio.sleep(0)


def _options_for(loaded: Loaded, options: Options) -> Options:
    """What is asked for, without what this release takes no notice of."""
    return options if loaded.snapshot.tower is not None else options.without_place_and_time


def has_two_tower(users: Users) -> np.ndarray:
    """bool (b,): users whose two-tower vector is known."""
    return np.zeros(len(users), bool) if users.two_tower is None else np.asarray(users.two_tower.any(axis=1))


def is_known(snapshot: Snapshot, record: UserRecord) -> bool:
    """Whether there is anything personal to rank by: a factor of the snapshot's model, or items had last that it knows."""
    if record.als is not None and record.als_version == snapshot.als_version:
        return True
    known = snapshot.item_ids
    return any(item in known for item, _, _ in record.last) or any(item in known for item in record.seen)


def unwanted(call: Call, record: UserRecord) -> np.ndarray:
    """int64: positions that a call leaves out, and those of what the user had already."""
    snapshot = call.loaded.snapshot
    if not snapshot.ranking.exclude_consumed or call.options.include_consumed:
        return call.excluded
    return np.concatenate([call.excluded, consumed(snapshot, record, snapshot.ranking.max_consumed)])


def similar_items(loaded: Loaded, item_id: str, options: Options, same_category: bool) -> bytes:
    """A SimilarItemsResponse: the items of highest cosine similarity. Raises UnknownItem."""
    snapshot, filters = loaded.snapshot, loaded.filters
    position = snapshot.item_ids.position(item_id)
    if position < 0:
        raise UnknownItem(f"item_id {item_id!r} is not in release {snapshot.release_id}")
    response = pb.SimilarItemsResponse(release_id=snapshot.release_id)
    vector = snapshot.als_items[[position]]
    if not vector.any():
        return response.SerializeToString()
    part = snapshot.servable
    if same_category or options.excluded or options.filter != EVERY_ITEM:
        servable = _mask(filters, options.filter, snapshot).copy()
        servable[snapshot.positions_of(options.excluded)] = False
        if same_category:
            servable &= filters.mask_of_category(position)
        part = Part.of(servable)
    found = snapshot.indexes["cosine"].search(vector, options.count + 1, part)[0]
    found = found[(found >= 0) & (found != position)][: options.count]
    similarities = unit_rows(snapshot.als_items[found]) @ unit_rows(vector)[0]
    for item, similarity in zip(described(snapshot, found), similarities.tolist(), strict=True):
        response.items.add(**item, similarity=similarity)
    return response.SerializeToString()


def trending_items(loaded: Loaded, options: Options) -> bytes:
    """A TrendingResponse: what trends, strongest first, then what is popular."""
    snapshot, trend = loaded.snapshot, loaded.trend
    servable = _mask(loaded.filters, options.filter, snapshot).copy()
    servable[snapshot.positions_of(options.excluded)] = False
    found = trend.order[servable[trend.order]][: options.count]
    if len(found) < options.count:
        servable[found] = False
        popular = snapshot.by_popularity
        found = np.append(found, popular[servable[popular]][: options.count - len(found)])
    response = pb.TrendingResponse(release_id=snapshot.release_id, computed_at_ms=loaded.trend_at)
    for item, part in zip(described(snapshot, found), trend.part[found].tolist(), strict=True):
        response.items.add(**item, trend=part)
    return response.SerializeToString()


def _mask(filters: ItemFilters, wanted: ItemFilter, snapshot: Snapshot) -> np.ndarray:
    mask = filters.mask(wanted)
    return snapshot.available if mask is None else mask


def _filtered(loaded: Loaded, ranked: Ranked, without: np.ndarray, options: Options, with_time: bool) -> Ranked:
    """One ranked row without some positions and those that a filter leaves out, as long as the answer is chosen from.

    Without time a filter whose mask is not there yet lets nothing pass, and of the diversity only the limit is kept.
    """
    positions, diversity = ranked.positions[0], options.diversity
    keep = (positions >= 0) & ~np.isin(positions, without)
    if options.filter != EVERY_ITEM:
        mask = loaded.filters.known(options.filter)
        keep &= np.zeros(len(positions), bool) if mask is None else mask[positions]
    if not with_time:
        diversity = replace(diversity, relevance=1.0)
    pool = options.count if diversity == NO_DIVERSITY else POOL * options.count
    first = np.flatnonzero(keep)[: DIVERSE_FROM if diversity.max_per_category else pool]
    kept = Ranked(ranked.positions[:, first], ranked.scores[:, first], ranked.parts[:, first])
    return kept if diversity == NO_DIVERSITY else diversified(loaded.snapshot, loaded.filters, kept, diversity, options.count)
