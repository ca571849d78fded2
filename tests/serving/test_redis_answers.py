"""Whatever stands where Redis should be: answers go on in time from lower tiers, and come back, in all three modes."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from puppet import Puppet
from redis_sentinel import watched_redis
from snapshots import make_snapshot
from worlds import RedisServer, World, eventually

from recsys_core.online import recs_key
from recsys_core.redis_client import client
from recsys_core.settings import Settings, load_settings

MODES = ("standalone", "sentinel", "cluster")
ERRORS = (
    "NOAUTH Authentication required.",
    "LOADING Redis is loading the dataset in memory",
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    "CLUSTERDOWN The cluster is down",
    "NOPERM this user has no permissions to run the 'hmget' command",
    "BUSY Redis is busy running a script.",
    "ERR max number of clients reached",
)
WRONG = (b":5\r\n", b"+OK\r\n", b"*1\r\n:1\r\n", b"*5\r\n:1\r\n:2\r\n:3\r\n:4\r\n:5\r\n", b"*-1\r\n", b"*0\r\n", b"$1\r\nx\r\n")
DEADLINE_MS = 200
PATIENCE = 2.0
"""Seconds in which any call is answered: some deadlines of Redis, and what a busy test machine adds."""


def settings_of(home: Path, mode: str, address: str, **redis: object) -> Settings:
    where = {"url": f"redis://{address}/0"} if mode == "standalone" else {"mode": mode, "nodes": [address]}
    return load_settings(
        home=home / "home",
        redis={**where, "timeout_ms": DEADLINE_MS, **redis},
        serving={"port": 0, "pointer_poll_seconds": 0.05, "rank_timeout_ms": 30_000, "batch_timeout_ms": 60_000},
    )


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("RECSYS_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def puppet(redis_server: RedisServer) -> Iterator[Puppet]:
    made = Puppet(redis_server.port)
    yield made
    made.stop()


@pytest.fixture
def start(here: Path, redis_server: RedisServer, puppet: Puppet) -> Iterator[Callable[..., World]]:
    """Starts a server that has Redis behind the puppet, with a cached answer for ann."""
    worlds: list[World] = []

    def started(mode: str, trend_seconds: float = 0.1, **redis: object) -> World:
        world = World(settings_of(here, mode, puppet.address, **redis), redis_server)
        worlds.append(world)
        world.promote(make_snapshot())
        world.put_cached_user("ann")
        world.start(trend_seconds)
        return world

    yield started
    for world in worlds:
        world.stop()


def tier(world: World, user_id: str = "ann") -> str:
    """Of an answer that came in time."""
    began = time.monotonic()
    found = world.client.recommend(user_id).tier
    assert time.monotonic() - began < PATIENCE
    return found


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("serving")]


@pytest.mark.parametrize("mode", MODES)
def test_a_redis_that_refuses_hangs_or_answers_nonsense_lowers_the_tier_until_it_comes_back(
    start: Callable[..., World], puppet: Puppet, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    world = start(mode)
    faults: dict[str, Callable[[], None]] = {
        "refuses": puppet.refuse,
        "hangs": lambda: setattr(puppet, "answer", lambda _: b""),
        "closes": lambda: setattr(puppet, "answer", lambda _: None),
        "speaks something else": lambda: setattr(puppet, "answer", lambda _: b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        **{text: lambda text=text: setattr(puppet, "answer", lambda _: f"-{text}\r\n".encode()) for text in ERRORS},
    }
    eventually(lambda: tier(world) == "CACHE")
    for name, begin in faults.items():
        opened = world.server.store.breaker.opened
        caplog.clear()
        begin()
        eventually(lambda: world.server.store.breaker.open or tier(world) == "never")
        assert {tier(world, user) for user in ["ann", "bob"] * 10} == {"POPULAR"}, name
        assert {a.tier for a in world.client.recommend_batch([f"u{n}" for n in range(300)])} == {"POPULAR"}, name
        assert world.server.store.breaker.opened == opened + 1, name
        assert len(warnings(caplog)) <= 3, (name, warnings(caplog))
        puppet.answer = None
        if name == "refuses":
            puppet.listen()
        eventually(lambda: tier(world) == "CACHE")
    assert world.server.metrics.events["unexpected_failures"] == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_connection_that_was_cut_while_nobody_used_it_costs_nobody_an_answer(
    start: Callable[..., World], puppet: Puppet, mode: str
) -> None:
    def cut(_: list[bytes]) -> None:
        puppet.answer = None

    world = start(mode, trend_seconds=3600)
    eventually(lambda: tier(world) == "CACHE")
    for _ in range(10):
        puppet.answer = cut
        assert tier(world) == "CACHE"
        puppet.answer = cut
        assert world.client.recommend_batch(["ann"] * 100)[99].tier == "CACHE"
    assert world.server.store.breaker == (False, 0)


@pytest.mark.parametrize("mode", MODES)
def test_replies_of_wrong_types_are_counted_and_passed_over(
    start: Callable[..., World], puppet: Puppet, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    world = start(mode)
    eventually(lambda: tier(world) == "CACHE")
    for wrong in WRONG:
        puppet.answer = lambda _, wrong=wrong: wrong
        assert tier(world) == "POPULAR", wrong
    assert world.server.metrics.events["corrupt_values"] >= len(WRONG)
    puppet.answer = None
    eventually(lambda: tier(world) == "CACHE")
    assert world.server.metrics.events["unexpected_failures"] == 0
    assert len(warnings(caplog)) <= 5


@pytest.mark.parametrize("mode", MODES)
def test_a_server_starts_whatever_redis_is_doing_and_uses_it_once_it_works(
    start: Callable[..., World], puppet: Puppet, mode: str
) -> None:
    puppet.answer = lambda _: b"-LOADING Redis is loading the dataset in memory\r\n"
    world = start(mode)
    assert tier(world) == "POPULAR"
    puppet.answer = None
    eventually(lambda: tier(world) == "CACHE")


@pytest.mark.parametrize("mode", ["sentinel", "cluster"])
def test_who_says_where_keys_are_is_not_asked_by_every_call(start: Callable[..., World], puppet: Puppet, mode: str) -> None:
    asked = []
    puppet.answer = lambda words: asked.append(words[0]) or b"-LOADING Redis is loading the dataset in memory\r\n"
    world = start(mode)
    began, asked[:] = time.monotonic(), []
    assert {tier(world, f"user-{n}") for n in range(200)} == {"POPULAR"}
    questions = [name for name in asked if name in (b"SENTINEL", b"CLUSTER")]
    assert len(questions) <= 6 + 12 * (time.monotonic() - began), "a look in half a second, and that of the live trends"


def test_a_redis_that_is_a_node_of_a_cluster_is_named_so_once(
    start: Callable[..., World], puppet: Puppet, caplog: pytest.LogCaptureFixture
) -> None:
    world = start("standalone")
    puppet.answer = lambda _: b"-MOVED 866 127.0.0.1:7001\r\n"
    assert {tier(world) for _ in range(50)} == {"POPULAR"}
    said = [line for line in warnings(caplog) if 'set redis.mode = "cluster"' in line]
    assert len(said) == 1
    assert len(warnings(caplog)) <= 2
    assert world.server.metrics.events["corrupt_values"] == 0
    assert world.server.store.breaker.open


def test_a_password_that_was_changed_is_one_warning_and_no_fault_of_the_values(
    start: Callable[..., World], redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    world = start("standalone")
    assert tier(world) == "CACHE"
    redis_server.client.config_set("requirepass", "new")
    redis_server.client.execute_command("AUTH", "new")
    redis_server.client.client_kill_filter(_type="normal", skipme=True)
    assert {tier(world, f"user-{n}") for n in range(100)} == {"POPULAR"}
    assert len(warnings(caplog)) == 1, warnings(caplog)
    assert "NOAUTH" in warnings(caplog)[0]
    assert world.server.metrics.events["corrupt_values"] == 0
    redis_server.client.config_set("requirepass", "")
    eventually(lambda: tier(world) == "CACHE")


def test_corrupt_values_are_told_of_now_and_then_and_never_in_lines_of_their_own(
    start: Callable[..., World], redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    world = start("standalone")
    forged = "eve\n2026-01-01 00:00:00,000 CRITICAL serving.server: all is lost"
    redis_server.client.set(recs_key(forged), b"junk")
    for _ in range(50):
        assert world.client.recommend(forged).tier == "POPULAR"
    assert world.server.metrics.events["corrupt_values"] == 50
    [line] = warnings(caplog)
    assert "\n" not in line
    assert "recs:{eve\\n2026" in line


def test_callers_of_a_slow_redis_get_their_cached_answers_however_many_they_are(
    start: Callable[..., World], puppet: Puppet
) -> None:
    """Every reply comes 12 ms late, by a deadline of 20."""
    world = start("standalone", timeout_ms=20)
    users = [f"user-{n}" for n in range(64)]
    for user in users:
        world.put_cached_user(user)
    eventually(lambda: {tier(world, user) for user in users} == {"CACHE"})
    puppet.delay = 0.012
    best = 0.0
    for _ in range(4):  # a busy test machine may hold up one of them
        with ThreadPoolExecutor(16) as callers:
            found = Counter(callers.map(lambda n: tier(world, users[n % len(users)]), range(800)))
        best = max(best, found["CACHE"] / 800)
        if best >= 0.95:
            break
    assert best >= 0.95


def test_a_batch_has_the_deadline_of_many_users_and_not_that_of_one(start: Callable[..., World], puppet: Puppet) -> None:
    """Redis takes 450 ms for what may last 300 for one user."""
    world = start("standalone", timeout_ms=300)
    users = [f"user-{n}" for n in range(600)]
    world.put_answers({user: world.put_known_user(user) for user in users})
    eventually(lambda: tier(world, users[0]) == "CACHE")
    puppet.delay = 0.45
    eventually(lambda: tier(world, users[0]) == "POPULAR")
    puppet.delay = 0.0
    eventually(lambda: tier(world, users[0]) == "CACHE")
    puppet.delay = 0.45
    assert Counter(answer.tier for answer in world.client.recommend_batch(users)) == {"CACHE": len(users)}


@pytest.mark.parametrize("mode", MODES)
def test_no_reply_whatever_fails_a_call_or_holds_one_up(start: Callable[..., World], puppet: Puppet, mode: str) -> None:
    world = start(mode)
    chance = random.Random(mode)
    pieces = [
        *WRONG,
        *(f"-{text}\r\n".encode() for text in (*ERRORS, "MOVED 1 127.0.0.1:1", "ASK 1 here", "MOVED", "WRONGTYPE x")),
        b"$-1\r\n",
        b"*5\r\n$1\r\n{\r\n$4\r\nsoon\r\n$1\r\n\xff\r\n$3\r\na\0b\r\n$2\r\n{}\r\n",
        b"*2\r\n-ERR inside\r\n*1\r\n$-1\r\n",
        b"$20\r\ncut",
        b"",
        b"?\r\n",
        b":1\r\n:2\r\n:3\r\n",
        None,
    ]

    def answer(_: list[bytes]) -> bytes | None:
        return chance.choice(pieces)

    for turn in range(30):
        puppet.answer = answer if turn % 3 else None
        with ThreadPoolExecutor(8) as callers:
            found = set(callers.map(lambda user: tier(world, user), ["ann", "bob", *(f"u{n}" for n in range(14))]))
        assert found <= {"CACHE", "POPULAR", "REALTIME_ALS_ONLY"}
        assert len(world.client.recommend_batch([f"u{n}" for n in range(100)])) == 100
    puppet.answer = None
    eventually(lambda: tier(world) == "CACHE")
    assert world.server.metrics.events["unexpected_failures"] == 0


def test_a_sentinels_master_is_followed_over_a_fail_over(here: Path) -> None:
    with watched_redis(here) as watched:
        settings = settings_of(here, "sentinel", f"127.0.0.1:{watched.sentinels[0]}")
        writing = client(settings.redis)
        world = World(settings, SimpleNamespace(client=writing))  # type: ignore[arg-type]
        try:
            world.promote(make_snapshot())
            world.start()
            world.put_cached_user("ann")
            assert writing.wait(1, 5000) == 1
            eventually(lambda: tier(world) == "CACHE")
            watched.kill_master()
            assert tier(world) == "POPULAR"
            eventually(lambda: tier(world) == "CACHE", 30)
            eventually(lambda: _gone(writing, "ann"), 30)
            assert tier(world) == "REALTIME_ALS_ONLY"
            eventually(lambda: tier(world) == "CACHE")
        finally:
            world.stop()
            writing.close()


def _gone(writing: Any, user: str) -> bool:
    import redis

    try:
        writing.delete(recs_key(user))
    except redis.RedisError:
        return False
    return True


def test_replicas_of_a_sentinels_master_are_read_where_the_settings_say_so(here: Path) -> None:
    import redis

    with watched_redis(here) as watched:
        settings = settings_of(here, "sentinel", f"127.0.0.1:{watched.sentinels[0]}", read_replicas=True)
        writing = client(settings.redis)
        world = World(settings, SimpleNamespace(client=writing))  # type: ignore[arg-type]
        try:
            world.promote(make_snapshot())
            world.start()
            world.put_known_user("ann")
            eventually(lambda: {tier(world) for _ in range(4)} == {"CACHE"})
            with redis.Redis(port=watched.replicas[0]) as replica:
                assert replica.info("commandstats")["cmdstat_hmget"]["calls"] > 0
            assert world.server.metrics.events["redis_failures"] == 0, "what is written goes to the master"
        finally:
            world.stop()
            writing.close()
