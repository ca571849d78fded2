"""What writes much to a Redis Cluster, while a master dies in the middle: the hour's caches, a rebuild, a removal."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import redis as redis_py
from partition import PartitionedCluster, partitioned_cluster
from rig import Drill, Note
from snapshots import make_snapshot
from speed_layer import NOWHERE
from stream_world import Broker
from stream_world import World as Stream
from test_redis_cluster import OPTIONS, is_master
from waiting import eventually

from recsys_core.events import now_ms
from recsys_core.forget import Places, forget_user
from recsys_core.lake import Lake
from recsys_core.online import UserRecord, recs_key, user_key, write_records
from recsys_core.precompute import CachePlan, finish_caches, plan_caches, write_shards
from recsys_core.ranking import Trend
from recsys_core.redis_client import client
from recsys_core.registry import Registry
from recsys_core.release import Pointer, Releases
from recsys_core.settings import Settings, load_settings
from recsys_core.tables import ACTIVE_USERS
from streaming.rebuild import RebuildReport, rebuild
from streaming.rebuild_lock import RebuildRefused

HOUR = "2026-03-02T10"
USERS = [f"user-{n}" for n in range(4_000)]
SNAPSHOT = make_snapshot()
NO_TREND = Trend.of(SNAPSHOT, {})


@pytest.fixture
def cluster(here: Path) -> Iterator[PartitionedCluster]:
    with partitioned_cluster(here, OPTIONS) as running:
        yield running


@pytest.fixture
def settings(here: Path, cluster: PartitionedCluster) -> Settings:
    return load_settings(
        here / "home",
        redis={"mode": "cluster", "nodes": cluster.nodes},
        cache={"shards": 16, "batch_users": 64},
    )


def replica_of(cluster: PartitionedCluster, master: str) -> str:
    return cluster.replicas[cluster.nodes.index(master)]


def test_the_caches_of_an_hour_are_finished_by_the_next_run_where_a_master_died_in_the_middle(
    cluster: PartitionedCluster, settings: Settings, here: Path, note: Note
) -> None:
    lake = Lake(str(here / "lake"))
    lake.write(ACTIVE_USERS, HOUR, pa.table({"user_id": pa.array(USERS, pa.string())}))
    redis = client(settings.redis)
    records = [(user, UserRecord(als_version=SNAPSHOT.als_version, als=SNAPSHOT.als_items[0])) for user in USERS]
    write_records(redis, records, 3600)
    lost = cluster.master_of(user_key(USERS[0]))

    def plan() -> CachePlan:
        return plan_caches(lake, HOUR, Pointer(SNAPSHOT.release_id, "", 0.0), settings, "a run")

    def write(made: CachePlan, die_after: int = -1) -> list[int]:
        shards = []
        for shard, _ in write_shards(redis, lake, made, 0, SNAPSHOT, NO_TREND, settings):
            shards.append(shard)
            if shard == die_after:
                cluster.kill(lost)
        return shards

    first = plan()
    with pytest.raises(redis_py.RedisError):
        write(first, die_after=4)
    redis.close()
    eventually(lambda: is_master(cluster, replica_of(cluster, lost)))
    redis = client(settings.redis)
    again = plan()
    assert again.attempt == first.attempt, "what the first run had done is not done again"
    made = write(again)
    assert 0 not in made
    assert made[-1] == 15
    assert finish_caches(lake, again).users == len(USERS)
    without = sum(not redis.exists(recs_key(user)) for user in USERS)
    redis.close()
    # What a master had taken and its replica not yet seen is gone with it, as replication is asynchronous.
    assert without <= 0.01 * len(USERS)
    note(
        Drill(
            "Redis Cluster, 3 masters + 3 replicas",
            "the hour's caches",
            "a master is killed",
            f"{without} of {len(USERS):,} answers until the next hour",
            "one more run, which went on where the first broke off",
        )
    )


def test_a_rebuild_makes_all_records_again_where_a_master_died_in_the_middle(
    broker: Broker, cluster: PartitionedCluster, here: Path, note: Note
) -> None:
    stream = Stream.make(broker.address, NOWHERE, here, redis={"mode": "cluster", "nodes": cluster.nodes})
    try:
        chance = random.Random(8)
        stream.send(*(stream.event(chance) for _ in range(5_000)))
        stream.start()
        stream.settle()
        broken = [user_key(f"{stream.prefix}-{n}") for n in range(20)]
        for key in broken:
            stream.redis.delete(key)
        lost = cluster.master_of(broken[0])
        killer = threading.Timer(0.3, cluster.kill, [lost])
        killer.start()
        attempts = 0

        def rebuilt() -> RebuildReport | None:
            """As a person does it: again after an error, and when the lock of the run that broke off has ended."""
            nonlocal attempts
            try:
                report = rebuild(stream.settings, 0)
            except RebuildRefused:
                return None
            except redis_py.RedisError:
                attempts += 1
                eventually(lambda: is_master(cluster, replica_of(cluster, lost)))
                return None
            return report

        report = eventually(rebuilt, 90)
        killer.join()
        eventually(lambda: is_master(cluster, replica_of(cluster, lost)))
        assert report.differences.different == []
        stream.settle()
        stream.prove()
    finally:
        stream.close()
    note(
        Drill(
            "Redis Cluster, 3 masters + 3 replicas",
            "recsys stream rebuild",
            "a master is killed",
            f"0 of {stream.sent:,} events",
            f"{attempts + 1} runs, the last one when the lock of the first had ended",
        )
    )


def test_a_user_is_forgotten_on_every_node(settings: Settings, here: Path) -> None:
    lake = Lake(str(here / "lake"))
    redis = client(settings.redis)
    write_records(redis, [(user, UserRecord(seen=("item-1",), last_ts=now_ms())) for user in USERS[:300]], 3600)
    places = Places(lake, redis, Releases(settings.releases_uri), Registry(settings))
    for user in USERS[:6]:
        report = forget_user(places, user)
        assert report.removed == {"redis": 1}
        assert report.remaining == report.unsearched == {}
        assert not redis.exists(user_key(user))
    assert all(redis.exists(user_key(user)) for user in USERS[6:300])
    redis.close()
