"""The online side of the batch layer: user records and precomputed answers, streamed from the lake into Redis."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from recsys_core import progress
from recsys_core.bundle import TRENDING_ITEMS
from recsys_core.errors import UserError
from recsys_core.events import EVENT_TYPE, ITEM_ID, TS, USER_ID, now_ms
from recsys_core.features import OnlineFeatures
from recsys_core.lake import Lake
from recsys_core.online import (
    TRENDING_KEY,
    AnswerEncoder,
    CachedAnswer,
    TrendingValue,
    UserRecord,
    read_records,
    recs_key,
    users_of,
    write_answers,
    write_records,
)
from recsys_core.ranking import Snapshot, Trend, rank
from recsys_core.release import Pointer
from recsys_core.settings import Settings
from recsys_core.tables import ACTIVE_USERS, ONLINE_FEATURES

CACHE_SHARDS = "rec_cache_shards"
"""Lake table of the caches' newest plan and of what was done of each of its shards."""
PLAN = "plan"
SAMPLES, SHOWN = 10, 5
"""Users that are shown, and items of each."""


class UnfinishedCaches(UserError, RuntimeError):
    """Some shards of a plan were not written."""


@dataclass(frozen=True)
class CachePlan:
    """What the caches of an hour are made from and in which parts; every step finds it in the lake.

    Attributes:
        hour: partition of `active_users` and `trending_items`.
        release_id, manifest_sha256: the release that is ranked with.
        users: data version of `active_users`.
        active: how many users that are.
        shards: parts of the users, by a hash of their id.
        steps: over which so many steps are spread.
        run: who asked for it, and sums it up.
        attempt: names what was done for this plan; one that broke off is gone on with under the same name.
        finished: all shards were written and summed up.
    """

    hour: str
    release_id: str
    manifest_sha256: str
    users: str
    active: int
    shards: int
    steps: int
    run: str
    attempt: str
    finished: bool = False


@dataclass(frozen=True)
class Shard:
    """What was done of a shard: users written, those of them without an item, and when (seconds since 1970)."""

    attempt: str
    users: int
    empty: int
    started: float
    ended: float


@dataclass(frozen=True)
class Sample:
    """A user's last items beside the first of what was computed for them, as item ids."""

    user_id: str
    last: tuple[str, ...]
    recommended: tuple[str, ...]


@dataclass(frozen=True)
class WriteReport:
    """Users written to Redis, how many of them got no item, and the seconds in which at least one step wrote."""

    users: int
    empty: int
    seconds: float

    @property
    def users_per_second(self) -> float:
        return self.users / self.seconds if self.seconds else 0.0


def write_online_features(redis: Any, lake: Lake, day: str, als_version: str, settings: Settings) -> WriteReport:
    """Stream partition `day` of `online_features` into users' records. Factors are marked with `als_version`."""
    started = time.perf_counter()
    users = 0
    for batch in _batches(lake, ONLINE_FEATURES, day, settings.cache.batch_users, "user records"):
        records = _records(batch, als_version)
        users += write_records(redis, records, settings.cache.feature_ttl_seconds, settings.ranking.last_items)
    return WriteReport(users, 0, time.perf_counter() - started)


def plan_caches(lake: Lake, hour: str, champion: Pointer, settings: Settings, run: str) -> CachePlan:
    """Write down how the answers of the partition `hour` of `active_users` are to be made for a run.

    What a run that broke off had done of the same hour, users and release is not done again.
    """
    active = lake.get(ACTIVE_USERS, hour)
    shards = settings.cache.shards
    plan = CachePlan(
        hour=hour,
        release_id=champion.release_id,
        manifest_sha256=champion.manifest_sha256,
        users=active.data_version,
        active=active.rows,
        shards=shards,
        steps=min(settings.cache.parallel_steps, shards),
        run=run,
        attempt=uuid.uuid4().hex,
    )
    before = read_plan(lake)
    if before and replace(plan, attempt=before.attempt, steps=before.steps, run=before.run) == before:
        plan = replace(plan, attempt=before.attempt)
    _write_plan(lake, plan)
    return plan


def read_plan(lake: Lake) -> CachePlan | None:
    """The newest plan, None before the first."""
    found = lake.find(CACHE_SHARDS, PLAN)
    return CachePlan(**found.extra) if found else None


def _write_plan(lake: Lake, plan: CachePlan) -> None:
    lake.write_blobs(CACHE_SHARDS, PLAN, {}, plan.active, asdict(plan))


def write_shards(
    redis: Any, lake: Lake, plan: CachePlan, step: int, snapshot: Snapshot, trend: Trend, settings: Settings
) -> Iterator[tuple[int, Shard]]:
    """Rank for the users of a step's shards from their records in Redis and write their answers.

    Yields each shard that was written. Those that the attempt has done already are left out, and the step ends where
    another plan has taken the place of this one.
    """
    encoder = AnswerEncoder(snapshot.release_id, snapshot.item_ids)
    mine = range(step, plan.shards, plan.steps)
    done = {} if plan.finished else shards_done(lake, plan)
    for shard in progress.track(mine, "shards of users"):
        if shard in done:
            continue
        newest = read_plan(lake)
        if newest is None or newest.attempt != plan.attempt:
            return
        started = time.time()
        users, empty = _write_shard(redis, lake, plan, shard, snapshot, trend, encoder, settings)
        written = Shard(plan.attempt, users, empty, started, time.time())
        lake.write_blobs(CACHE_SHARDS, _shard_key(shard), {}, users, asdict(written))
        yield shard, written


def shards_done(lake: Lake, plan: CachePlan) -> dict[int, Shard]:
    """The shards that the plan's attempt has written."""
    keys = {_shard_key(shard): shard for shard in range(plan.shards)}
    found = {keys[key]: Shard(**part.extra) for key, part in lake.find_all(CACHE_SHARDS, keys).items()}
    return {shard: written for shard, written in found.items() if written.attempt == plan.attempt}


def _shard_key(shard: int) -> str:
    return f"shard-{shard:05}"


def finish_caches(lake: Lake, plan: CachePlan) -> WriteReport:
    """Sum up the shards of a plan and mark it finished, unless a newer one has taken its place. Raises UnfinishedCaches."""
    done = shards_done(lake, plan)
    missing = sorted(set(range(plan.shards)) - set(done))
    if missing:
        raise UnfinishedCaches(
            f"caches of {plan.hour}: shards {', '.join(map(str, missing))} of {plan.shards} were not written"
        )
    if read_plan(lake) == plan:
        _write_plan(lake, replace(plan, finished=True))
    seconds = _covered((shard.started, shard.ended) for shard in done.values())
    return WriteReport(sum(s.users for s in done.values()), sum(s.empty for s in done.values()), seconds)


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that lie in at least one of the spans."""
    total, reached = 0.0, float("-inf")
    for started, ended in sorted(spans):
        total += max(0.0, ended - max(started, reached))
        reached = max(reached, ended)
    return total


def _write_shard(
    redis: Any,
    lake: Lake,
    plan: CachePlan,
    shard: int,
    snapshot: Snapshot,
    trend: Trend,
    encoder: AnswerEncoder,
    settings: Settings,
) -> tuple[int, int]:
    """Users written, and those of them without an item. Memory holds a batch of users."""
    users = empty = 0
    for ids in _users_of_shard(lake, plan, shard, settings.cache.batch_users):
        computed_at = now_ms()
        records = read_records(redis, ids, features=snapshot.tower is not None)
        state = users_of(snapshot, records, snapshot.ranking, user_ids=ids, now=computed_at)
        ranked = rank(snapshot, trend, state, settings.cache.items, snapshot.ranking)
        answers = encoder.encode(ranked.positions, ranked.scores, computed_at)
        users += write_answers(redis, zip(ids, answers, strict=True), settings.cache.ttl_seconds)
        empty += int(np.count_nonzero((ranked.positions < 0).all(axis=1)))
    return users, empty


def _users_of_shard(lake: Lake, plan: CachePlan, shard: int, size: int) -> Iterator[list[str]]:
    """The active users whose hash falls into the shard, `size` at a time."""
    waiting: list[str] = []
    for batch in _batches(lake, ACTIVE_USERS, plan.hour, size, f"recommendations, shard {shard}"):
        ids = batch[USER_ID].to_numpy(zero_copy_only=False)
        waiting += ids[pd.util.hash_array(ids, categorize=False) % np.uint64(plan.shards) == shard].tolist()
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
    if waiting:
        yield waiting


def read_samples(redis: Any, lake: Lake, hour: str) -> list[Sample]:
    """Some active users of an hour: what they did last, and what the caches have for them. Raises CorruptValue."""
    active = lake.dataset(ACTIVE_USERS, [hour])
    ids = active.head(SAMPLES, columns=[USER_ID])[USER_ID].to_pylist() if active else []
    pipeline = redis.pipeline(transaction=False)
    for user_id in ids:
        pipeline.get(recs_key(user_id))
    answers = pipeline.execute() if ids else []
    return [
        Sample(
            user_id,
            tuple(item for item, _, _ in record.last),
            tuple(item for item, _ in CachedAnswer.decode(answer).items()[:SHOWN]) if answer else (),
        )
        for user_id, record, answer in zip(ids, read_records(redis, ids) if ids else [], answers, strict=True)
    ]


def read_trend(lake: Lake, hour: str) -> TrendingValue:
    """Partition `hour` of `trending_items` as serving reads it."""
    found = lake.get(TRENDING_ITEMS, hour)
    table = lake.read(TRENDING_ITEMS, hour) if found.rows else None
    scores = dict(zip(table[ITEM_ID].to_pylist(), map(tuple, table["scores"].to_pylist()), strict=True)) if table else {}
    return TrendingValue(now_ms(), hour, scores)


def write_trend(redis: Any, trending: TrendingValue, ttl_seconds: int) -> None:
    """Put the trending items where serving reads them."""
    redis.set(TRENDING_KEY, trending.encode(), ex=ttl_seconds)


def _batches(lake: Lake, table: str, key: str, rows: int, description: str) -> Iterator[pa.RecordBatch]:
    """The rows of a partition with a bar that counts them."""
    total = lake.get(table, key).rows
    dataset = lake.dataset(table, [key])
    done = 0
    with progress.task(description, total) as bar:
        for batch in dataset.to_batches(batch_size=rows, batch_readahead=1, fragment_readahead=1) if dataset else ():
            if batch.num_rows:
                yield batch
                done += batch.num_rows
                bar.update(done, total)


def _records(batch: pa.RecordBatch, als_version: str) -> Iterator[tuple[str, UserRecord]]:
    for row in batch.to_pylist():
        last = tuple((action[ITEM_ID], action[EVENT_TYPE], action[TS]) for action in row["last"])
        factor = None if row["factor"] is None else np.asarray(row["factor"], np.float32)
        version = als_version if factor is not None else ""
        features = OnlineFeatures.decode(row["features"])
        yield row[USER_ID], UserRecord(last, row["last_ts"], tuple(row["seen"] or ()), version, factor, features)
