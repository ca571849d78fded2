"""The online side of the batch layer: user records and precomputed answers, streamed from the lake into Redis."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from recsys_core import progress
from recsys_core.bundle import TRENDING_ITEMS
from recsys_core.events import EVENT_TYPE, ITEM_ID, TS, USER_ID, now_ms
from recsys_core.features import OnlineFeatures
from recsys_core.lake import Lake
from recsys_core.online import (
    TRENDING_KEY,
    AnswerEncoder,
    TrendingValue,
    UserRecord,
    read_records,
    users_of,
    write_answers,
    write_records,
)
from recsys_core.ranking import Snapshot, Trend, rank
from recsys_core.settings import Settings
from recsys_core.tables import ACTIVE_USERS, ONLINE_FEATURES

CACHE_SHARDS = "rec_cache_shards"
"""Lake table of what a run of `rec_cache` has done of its hour, while it runs."""
SAMPLES = 10


@dataclass(frozen=True)
class Sample:
    """A user's last items beside what was computed for them, as positions of the release."""

    user_id: str
    last: tuple[int, ...]
    recommended: tuple[int, ...]


@dataclass(frozen=True)
class WriteReport:
    """Users written to Redis, how many of them got no item, how long it took, and some of them to look at."""

    users: int
    empty: int
    seconds: float
    samples: tuple[Sample, ...] = ()

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


def write_rec_cache(redis: Any, lake: Lake, hour: str, snapshot: Snapshot, trend: Trend, settings: Settings) -> WriteReport:
    """Rank for the partition `hour` of `active_users` from their records in Redis and write their answers.

    Users are taken in shards by a hash of their id. What a run that broke off had done of the same hour, users and release
    is not done again.
    """
    started = time.perf_counter()
    encoder = AnswerEncoder(snapshot.release_id, snapshot.item_ids)
    work = {"release": snapshot.release_id, "users": lake.get(ACTIVE_USERS, hour).data_version, "shards": settings.cache.shards}
    done = _shards_done(lake, hour, work)
    samples: list[Sample] = []
    with progress.task("shards of users", settings.cache.shards) as bar:
        for shard in range(settings.cache.shards):
            if str(shard) not in done:
                users, empty, seen = _write_shard(redis, lake, hour, shard, snapshot, trend, encoder, settings)
                samples += seen[: SAMPLES - len(samples)]
                done[str(shard)] = [users, empty]
                lake.write_blobs(CACHE_SHARDS, hour, {}, users, {**work, "done": done})
            bar.update(len(done), settings.cache.shards)
    lake.write_blobs(CACHE_SHARDS, hour, {}, 0, {**work, "done": {}, "written": sum(n for n, _ in done.values())})
    users, empty = (sum(column) for column in zip(*done.values(), strict=True))
    return WriteReport(users, empty, time.perf_counter() - started, tuple(samples))


def _shards_done(lake: Lake, hour: str, work: dict[str, Any]) -> dict[str, list[int]]:
    """Users written, and those of them without an item, by finished shard of the same work that was broken off."""
    kept = lake.find(CACHE_SHARDS, hour)
    return dict(kept.extra["done"]) if kept and all(kept.extra[name] == value for name, value in work.items()) else {}


def _write_shard(
    redis: Any,
    lake: Lake,
    hour: str,
    shard: int,
    snapshot: Snapshot,
    trend: Trend,
    encoder: AnswerEncoder,
    settings: Settings,
) -> tuple[int, int, list[Sample]]:
    """Users written, those of them without an item, and samples. Memory holds a batch of users."""
    users = empty = 0
    samples: list[Sample] = []
    for ids in _users_of_shard(lake, hour, shard, settings):
        computed_at = now_ms()
        state = users_of(snapshot, read_records(redis, ids), snapshot.ranking, user_ids=ids, now=computed_at)
        ranked = rank(snapshot, trend, state, settings.cache.items, snapshot.ranking)
        answers = encoder.encode(ranked.positions, ranked.scores, computed_at)
        users += write_answers(redis, zip(ids, answers, strict=True), settings.cache.ttl_seconds)
        empty += int(np.count_nonzero((ranked.positions < 0).all(axis=1)))
        samples += [
            Sample(ids[row], _held(state.last_items[row]), _held(ranked.positions[row, :5]))
            for row in range(min(len(ids), SAMPLES - len(samples)))
        ]
    return users, empty, samples


def _users_of_shard(lake: Lake, hour: str, shard: int, settings: Settings) -> Iterator[list[str]]:
    """The active users of an hour whose hash falls into the shard, `batch_users` at a time."""
    waiting: list[str] = []
    for batch in _batches(lake, ACTIVE_USERS, hour, settings.cache.batch_users, f"recommendations, shard {shard}"):
        ids = batch[USER_ID].to_numpy(zero_copy_only=False)
        waiting += ids[pd.util.hash_array(ids, categorize=False) % np.uint64(settings.cache.shards) == shard].tolist()
        while len(waiting) >= settings.cache.batch_users:
            yield waiting[: settings.cache.batch_users]
            waiting = waiting[settings.cache.batch_users :]
    if waiting:
        yield waiting


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


def _held(positions: np.ndarray) -> tuple[int, ...]:
    return tuple(int(p) for p in positions if p >= 0)


def _records(batch: pa.RecordBatch, als_version: str) -> Iterator[tuple[str, UserRecord]]:
    for row in batch.to_pylist():
        last = tuple((action[ITEM_ID], action[EVENT_TYPE], action[TS]) for action in row["last"])
        factor = None if row["factor"] is None else np.asarray(row["factor"], np.float32)
        version = als_version if factor is not None else ""
        features = OnlineFeatures.decode(row["features"])
        yield row[USER_ID], UserRecord(last, row["last_ts"], tuple(row["seen"] or ()), version, factor, features)
