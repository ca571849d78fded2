"""Serving over a real Redis Cluster: one that is whole, one that loses a node, one that moves slots and fails over."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis_cluster import Cluster, cluster
from worlds import World, eventually, serving_on

from recsys_core.online import recs_key, user_key
from recsys_core.settings import Settings, load_settings
from serving.client import RecsysClient

USERS = [f"user-{n}" for n in range(60)]
RIGHTS = ["+@read", "+@write", "+@scripting", "+@connection", "+wait", "+cluster|slots", "+readonly", "+asking", "~*"]
"""What docs/how-to.md says."""
PATIENT_MS = 5000
"""A node answers nobody while it writes a change of the cluster to disk, which may take longer than a caller waits."""
LOGIN = {"username": "recsys", "password": "secret"}


def settings_of(home: Path, nodes: list[str], **redis: object) -> Settings:
    return load_settings(
        home=home / "home",
        redis={"mode": "cluster", "nodes": nodes, "timeout_ms": PATIENT_MS, **redis},
        serving={"port": 0, "pointer_poll_seconds": 0.05, "rank_timeout_ms": 30_000, "batch_timeout_ms": 60_000},
    )


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("RECSYS_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def parts(here: Path) -> Iterator[Cluster]:
    """Three masters without replicas; the death of one leaves the others at work."""
    with cluster(here, options=["--cluster-require-full-coverage", "no", "--user", "recsys", "on", ">secret", *RIGHTS]) as made:
        yield made


@pytest.fixture
def world(here: Path, parts: Cluster) -> Iterator[World]:
    with serving_on(settings_of(here, parts.nodes[:2], **LOGIN)) as made:
        yield made


def tiers(client: RecsysClient, users: list[str] = USERS) -> Counter[str]:
    return Counter(client.recommend(user).tier for user in users)


def test_a_cluster_serves_cached_answers_takes_new_ones_and_tells_what_trends(world: World) -> None:
    for user in USERS:
        world.put_cached_user(user)
    assert tiers(world.client) == {"CACHE": len(USERS)}
    assert Counter(answer.tier for answer in world.client.recommend_batch(USERS)) == {"CACHE": len(USERS)}
    world.put_known_user("new")
    assert world.client.recommend("new").tier == "REALTIME_ALS_ONLY"
    eventually(lambda: world.client.recommend("new").tier == "CACHE")
    world.put_trend({"item-400": 9.0})
    eventually(lambda: world.client.recommend("nobody", 1).items[0].item_id == "item-400")
    assert world.server.metrics.events["unexpected_failures"] == 0
    assert world.server.metrics.events["redis_failures"] == 0


def test_users_of_the_other_nodes_do_not_suffer_from_a_dead_one(world: World, parts: Cluster) -> None:
    for user in USERS:
        world.put_cached_user(user)
    homes = {user: parts.master_of(user_key(user)) for user in USERS}
    dead = homes[USERS[0]]
    parts.kill(dead)
    for _ in range(5):
        for user in USERS:
            assert world.client.recommend(user).tier == ("POPULAR" if homes[user] == dead else "CACHE")
    for answer, user in zip(world.client.recommend_batch(USERS), USERS, strict=True):
        assert answer.tier == ("POPULAR" if homes[user] == dead else "CACHE")
    assert world.server.store.breaker == (True, 1)
    parts.start(dead)
    lost = [user for user in USERS if homes[user] == dead]
    eventually(lambda: parts.node(dead).cluster("INFO")["cluster_state"] == "ok")
    for user in lost:
        world.put_cached_user(user)
    eventually(lambda: tiers(world.client) == {"CACHE": len(USERS)})


def test_a_frozen_node_costs_its_own_users_a_deadline_now_and_then_and_nobody_else_anything(here: Path, parts: Cluster) -> None:
    with serving_on(settings_of(here, parts.nodes, timeout_ms=100)) as world:
        for user in USERS:
            world.put_cached_user(user)
        eventually(lambda: tiers(world.client) == {"CACHE": len(USERS)})
        frozen = parts.master_of(user_key(USERS[0]))
        mine = [user for user in USERS if parts.master_of(user_key(user)) == frozen]
        others = [user for user in USERS if user not in mine]
        parts.signal(frozen, signal.SIGSTOP)
        try:
            assert tiers(world.client, mine[:5]) == {"POPULAR": 5}
            began = time.monotonic()
            assert tiers(world.client, mine * 5) == {"POPULAR": 5 * len(mine)}
            assert time.monotonic() - began < 5, "most of them do not wait for it"
            assert tiers(world.client, others)["CACHE"] >= 0.95 * len(others)
        finally:
            parts.signal(frozen, signal.SIGCONT)
        eventually(lambda: tiers(world.client) == {"CACHE": len(USERS)})


def test_a_server_starts_without_its_cluster_and_finds_it_later(here: Path) -> None:
    with cluster(here) as parts:
        for address in parts.nodes:
            parts.kill(address)
        with serving_on(settings_of(here, parts.nodes)) as world:
            assert world.client.recommend("ann").tier == "POPULAR"
            for address in parts.nodes:
                parts.start(address)
            eventually(lambda: parts.node(parts.nodes[0]).cluster("INFO")["cluster_state"] == "ok")
            world.put_cached_user("ann")
            eventually(lambda: world.client.recommend("ann").tier == "CACHE")
            assert world.server.metrics.events["unexpected_failures"] == 0


def test_a_replica_that_takes_the_place_of_a_dead_master_is_found_within_seconds(here: Path) -> None:
    options = ["--cluster-require-full-coverage", "no", "--cluster-node-timeout", "1000"]
    with cluster(here, replicated=True, options=options) as parts, serving_on(settings_of(here, parts.nodes)) as world:
        for user in USERS:
            world.put_cached_user(user)
        assert tiers(world.client) == {"CACHE": len(USERS)}
        dead = parts.master_of(user_key(USERS[0]))
        parts.kill(dead)
        replica = parts.node(parts.replicas[parts.nodes.index(dead)])
        eventually(lambda: replica.info("replication")["role"] == "master")
        began = time.monotonic()
        eventually(lambda: tiers(world.client) == {"CACHE": len(USERS)}, 20)
        assert time.monotonic() - began < 5
        replica.delete(recs_key(USERS[0]))
        assert world.client.recommend(USERS[0]).tier == "REALTIME_ALS_ONLY"
        eventually(lambda: world.client.recommend(USERS[0]).tier == "CACHE")


def test_users_whose_slot_is_moved_are_answered_during_the_move_and_after_it(world: World, parts: Cluster) -> None:
    world.put_cached_user("ann")
    assert world.client.recommend("ann").tier == "CACHE"
    source = parts.master_of(user_key("ann"))
    target = next(address for address in parts.nodes if address != source)
    slot = parts.node(source).execute_command("CLUSTER", "KEYSLOT", user_key("ann"))
    names = {address: parts.node(address).execute_command("CLUSTER", "MYID") for address in (source, target)}
    parts.node(target).execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", names[source])
    parts.node(source).execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", names[target])
    port = int(target.rpartition(":")[2])
    for key in (recs_key("ann"), user_key("ann")):
        assert world.client.recommend("ann").tier in ("CACHE", "REALTIME_ALS_ONLY")
        parts.node(source).execute_command("MIGRATE", "127.0.0.1", port, key, 0, 5000)
    assert world.client.recommend("ann").tier == "CACHE", "the source says ASK"
    for address in (target, source, *(address for address in parts.nodes if address not in names)):
        parts.node(address).execute_command("CLUSTER", "SETSLOT", slot, "NODE", names[target])
    assert world.client.recommend("ann").tier == "CACHE", "the source says MOVED"
    assert world.client.recommend_batch(["ann", *USERS])[0].tier == "CACHE"
    shard = world.server.store.topology
    eventually(lambda: shard.layout.shard(b"ann").master.breaker.name.endswith(target.rpartition(":")[2]))
    assert world.server.store.breaker == (False, 0)


def test_replicas_are_read_where_the_settings_say_so_and_writes_go_to_masters(here: Path) -> None:
    with cluster(here, replicated=True) as parts, serving_on(settings_of(here, parts.nodes, read_replicas=True)) as world:
        for user in USERS:
            world.put_known_user(user)
        eventually(lambda: tiers(world.client) == {"CACHE": len(USERS)})
        stats = [parts.node(address).info("commandstats") for address in parts.replicas]
        assert all(of_node["cmdstat_hmget"]["calls"] for of_node in stats)
        assert world.server.metrics.events["redis_failures"] == 0
