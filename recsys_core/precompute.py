"""The online side of the batch layer: user records and precomputed answers, streamed from the lake into Redis."""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from recsys_core import progress
from recsys_core.bundle import TRENDING_ITEMS
from recsys_core.errors import UserError
from recsys_core.events import DAY_MS, EVENT_TYPE, ITEM_ID, TS, USER_ID, key_start_ms, now_ms
from recsys_core.features import OnlineFeatures
from recsys_core.lake import Lake, Partition
from recsys_core.online import (
    TRENDING_KEY,
    AnswerEncoder,
    CachedAnswer,
    CorruptValue,
    TrendingValue,
    UserRecord,
    read_each_record,
    recs_key,
    users_of,
    write_answers,
    write_records,
)
from recsys_core.ranking import Ranked, Snapshot, Trend, rank
from recsys_core.release import Manifest, Pointer
from recsys_core.settings import Settings
from recsys_core.tables import ACTIVE_USERS, ONLINE_FEATURES
from recsys_core.tombstones import Tombstones

CACHE_SHARDS = "rec_cache_shards"
"""Lake table of the caches' newest plan and of what was done of each of its shards."""
PLAN = "plan"
SAMPLES, SHOWN = 10, 5
"""Users that are shown, and last and recommended items of each."""
NAMED = 10
"""Users that are left out of a shard or a day and named in the log, and reasons that are counted apart."""
REASON_LENGTH = 100
OTHER_REASONS = "other reasons"

log = logging.getLogger(__name__)


class UnfinishedCaches(UserError, RuntimeError):
    """Some shards of a plan were not written."""


class NewerCaches(RuntimeError):
    """The caches are those of a later hour already."""


class NewerRecords(UserError, RuntimeError):
    """The users' records are those of a later day already."""


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
    """What was done of a shard: users written, those of them without an item, when (seconds since 1970), and how many users
    were left out, by what was wrong with their records."""

    attempt: str
    users: int
    empty: int
    started: float
    ended: float
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """A user's last items beside the first of what was computed for them, as item ids."""

    user_id: str
    last: tuple[str, ...]
    recommended: tuple[str, ...]


@dataclass(frozen=True)
class WriteReport:
    """Users written to Redis, how many of them got no item, the seconds in which at least one step wrote, and how many users
    were left out by what was wrong with their records. The log names those."""

    users: int
    empty: int
    seconds: float
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def users_per_second(self) -> float:
        return self.users / self.seconds if self.seconds else 0.0


class LeftOut:
    """Users whose records can't be used. They are counted by the reason, and the first of them named in the log."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.reasons: Counter[str] = Counter()

    def add(self, user_id: str, error: Exception) -> None:
        reason = str(error)[:REASON_LENGTH]
        if self.reasons.total() < NAMED:
            log.warning("%s: user %r is left out: %s", self.where, user_id, reason)
        self.reasons[reason if len(self.reasons) < NAMED or reason in self.reasons else OTHER_REASONS] += 1


def check_day_of_records(day: str, als_version: str, served: Manifest | None) -> None:
    """Raises NewerRecords when the release that is served is of a later day and of other factors.

    Records of `day` would take the place of newer ones: of what users had since nothing would be left out any more. The day of
    the release that is served may be written again, after a rollback too.
    """
    if served and served.day > day and (served.models.get("als") or {}).get("version") != als_version:
        raise NewerRecords(
            f"users' records stay: {day} is over, release {served.release_id} is served; materialize {served.day} instead"
        )


def write_online_features(redis: Any, lake: Lake, day: str, als_version: str, settings: Settings) -> WriteReport:
    """Stream partition `day` of `online_features` into users' records. Factors are marked with `als_version`."""
    started = time.perf_counter()
    users = 0
    left_out = LeftOut(f"online features of {day}")
    keep, end = settings.ranking.last_items, key_start_ms(day) + DAY_MS
    for batch in _batches(lake, ONLINE_FEATURES, day, settings.cache.batch_users, "user records"):
        records = _records(batch, als_version, settings, left_out)
        users += write_records(redis, records, settings.cache.feature_ttl_seconds, keep, end)
    return WriteReport(users, 0, time.perf_counter() - started, dict(left_out.reasons))


def plan_caches(lake: Lake, hour: str, champion: Pointer, settings: Settings, run: str) -> CachePlan:
    """Write down how the answers of the partition `hour` of `active_users` are to be made for a run.

    What a run that broke off had done of the same hour, users and release is not done again. Raises NewerCaches when there is
    a plan of a later hour.
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

    def put(part: Partition | None) -> CachePlan:
        before = CachePlan(**part.extra) if part else None
        if before and before.hour > hour:
            raise NewerCaches(f"caches of {hour}: those of {before.hour} are made or in the making")
        made = plan
        if before and replace(plan, attempt=before.attempt, steps=before.steps, run=before.run) == before:
            made = replace(plan, attempt=before.attempt)
        return _write_plan(lake, made, part)

    return lake.revise(CACHE_SHARDS, PLAN, put)


def read_plan(lake: Lake) -> CachePlan | None:
    """The newest plan, None before the first."""
    found = lake.find(CACHE_SHARDS, PLAN)
    return CachePlan(**found.extra) if found else None


def _write_plan(lake: Lake, plan: CachePlan, instead_of: Partition | None) -> CachePlan:
    lake.write_blobs(CACHE_SHARDS, PLAN, {}, plan.active, asdict(plan), instead_of)
    return plan


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
        if not _is_newest(lake, plan):
            return
        written = _write_shard(redis, lake, plan, shard, snapshot, trend, encoder, settings)
        if not lake.revise(CACHE_SHARDS, _shard_key(shard), partial(_record_shard, lake, plan, shard, written)):
            return
        yield shard, written


def _record_shard(lake: Lake, plan: CachePlan, shard: int, written: Shard, before: Partition | None) -> bool:
    """Note what was done of a shard, unless another plan has taken the place. Returns whether it was noted."""
    if not _is_newest(lake, plan):
        return False
    lake.write_blobs(CACHE_SHARDS, _shard_key(shard), {}, written.users, asdict(written), before)
    return True


def _is_newest(lake: Lake, plan: CachePlan) -> bool:
    newest = read_plan(lake)
    return newest is not None and newest.attempt == plan.attempt


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
    lake.revise(CACHE_SHARDS, PLAN, partial(_finish, lake, plan))
    seconds = _covered((shard.started, shard.ended) for shard in done.values())
    left_out = sum((Counter(shard.left_out) for shard in done.values()), Counter[str]())
    return WriteReport(sum(s.users for s in done.values()), sum(s.empty for s in done.values()), seconds, dict(left_out))


def _finish(lake: Lake, plan: CachePlan, part: Partition | None) -> None:
    if part and CachePlan(**part.extra) == plan:
        _write_plan(lake, replace(plan, finished=True), part)


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
) -> Shard:
    """Rank for the users of a shard, and write their answers while the next ones are ranked. Memory holds two batches."""
    started, users, empty = time.time(), 0, 0
    left_out = LeftOut(f"caches of {plan.hour}")
    with ThreadPoolExecutor(1, "answers") as writer:
        writing: Future[int] | None = None
        for ids in _users_of_shard(lake, plan, shard, settings.cache.batch_users):
            computed_at = now_ms()
            read = read_each_record(redis, ids, features=snapshot.tower is not None)
            sound = []
            for user_id, record in zip(ids, read, strict=True):
                if isinstance(record, UserRecord):
                    sound.append((user_id, record))
                else:
                    left_out.add(user_id, record)
            for some, ranked in _ranked(snapshot, trend, sound, settings.cache.items, computed_at, left_out):
                acted = [record.last_ts for _, record in some]
                answers = encoder.encode(ranked.positions, ranked.scores, computed_at, acted)
                empty += int(np.count_nonzero((ranked.positions < 0).all(axis=1)))
                users += writing.result() if writing else 0
                writing = writer.submit(_write_answers, redis, lake, some, answers, settings.cache.ttl_seconds)
        users += writing.result() if writing else 0
    return Shard(plan.attempt, users, empty, started, time.time(), dict(left_out.reasons))


def _ranked(
    snapshot: Snapshot, trend: Trend, users: list[tuple[str, UserRecord]], count: int, now: int, left_out: LeftOut
) -> Iterator[tuple[list[tuple[str, UserRecord]], Ranked]]:
    """Rank for users together; where one of them can't be ranked for, for the rest without that one.

    Raises what ranking raises when it does so for each of several users: then it is not for what they are.
    """
    waiting, failed = [users] if users else [], []
    while waiting:
        some = waiting.pop()
        ids = [user_id for user_id, _ in some]
        try:
            state = users_of(snapshot, [record for _, record in some], snapshot.ranking, user_ids=ids, now=now)
            ranked = rank(snapshot, trend, state, count, snapshot.ranking)
        except (ValueError, OverflowError) as error:
            if len(some) > 1:
                waiting += [some[len(some) // 2 :], some[: len(some) // 2]]
                continue
            failed.append((ids[0], error))
            if len(failed) == len(users) > 1:
                raise
            continue
        yield some, ranked
    for user_id, reason in failed:
        left_out.add(user_id, reason)


def _write_answers(
    redis: Any, lake: Lake, users: Sequence[tuple[str, UserRecord]], answers: Sequence[bytes], ttl_seconds: int
) -> int:
    """Write the users' answers but for those who were forgotten since the hour was counted. Returns how many.

    What was made from a record is written beside it only. Who has none may have been forgotten, which the tombstones tell.
    """
    made = [(user, record.known, answer) for (user, record), answer in zip(users, answers, strict=True)]
    from_records = [(user, answer) for user, known, answer in made if known]
    others = [(user, answer) for user, known, answer in made if not known]
    written = write_answers(redis, from_records, ttl_seconds, beside_record=True) if from_records else 0
    if others:
        forgotten = Tombstones.read(lake)
        written += write_answers(redis, [pair for pair in others if not forgotten.covers_one(pair[0], 0)], ttl_seconds)
    return written


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
    """Some active users of an hour: what they did last, and what the caches have for them; unreadable is nothing."""
    active = lake.dataset(ACTIVE_USERS, [hour])
    ids = active.head(SAMPLES, columns=[USER_ID])[USER_ID].to_pylist() if active else []
    pipeline = redis.pipeline(transaction=False)
    for user_id in ids:
        pipeline.get(recs_key(user_id))
    answers = pipeline.execute() if ids else []
    return [
        Sample(
            user_id,
            tuple(item for item, _, _ in record.last[:SHOWN]) if isinstance(record, UserRecord) else (),
            _items_of(answer) if answer else (),
        )
        for user_id, record, answer in zip(ids, read_each_record(redis, ids) if ids else [], answers, strict=True)
    ]


def _items_of(answer: bytes) -> tuple[str, ...]:
    try:
        return tuple(item for item, _ in CachedAnswer.decode(answer).items()[:SHOWN])
    except CorruptValue:
        return ()


def read_trend(lake: Lake, hour: str) -> TrendingValue:
    """Partition `hour` of `trending_items` as serving reads it."""
    found = lake.get(TRENDING_ITEMS, hour)
    table = lake.read(TRENDING_ITEMS, hour) if found.rows else None
    rows = zip(table[ITEM_ID].to_pylist(), table["scores"].to_pylist(), strict=True) if table else ()
    return TrendingValue(now_ms(), hour, {item: tuple(scores) for item, scores in rows if np.isfinite(scores).all()})


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


def _records(
    batch: pa.RecordBatch, als_version: str, settings: Settings, left_out: LeftOut
) -> Iterator[tuple[str, UserRecord]]:
    for row in batch.to_pylist():
        try:
            yield row[USER_ID], _record(row, als_version, settings)
        except (ValueError, TypeError) as error:
            left_out.add(row[USER_ID], error)


def _record(row: dict[str, Any], als_version: str, settings: Settings) -> UserRecord:
    last = tuple((action[ITEM_ID], action[EVENT_TYPE], action[TS]) for action in row["last"])
    factor = None if row["factor"] is None else np.asarray(row["factor"], np.float32)
    if factor is not None and not np.isfinite(factor).all():
        factor = None
    version = als_version if factor is not None else ""
    features = OnlineFeatures.decode(row["features"])
    others = {"last": last, "last_ts": row["last_ts"], "als_version": version, "als": factor, "features": features}
    return UserRecord.with_items(row["seen"] or (), settings.features.history, settings.ranking.max_consumed, **others)
