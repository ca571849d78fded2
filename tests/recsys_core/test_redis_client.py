"""Clients by configuration against real servers: ACL users, a Sentinel's master over a fail-over, a Cluster."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from pydantic import SecretStr, ValidationError

from recsys_cli.processes import free_port, wait_until
from recsys_cli.stack import redis_binary, redis_server
from recsys_core.online import UserRecord, read_records, write_records
from recsys_core.redis_client import async_client, client, is_cluster
from recsys_core.settings import RedisSettings

RECORD = UserRecord(last=(("i", "view", 1_772_000_000_000),), last_ts=1_772_000_000_000)
ACL = ["+@read", "+@write", "+@scripting", "+@connection", "+wait", "~*"]
"""What docs/how-to.md says."""


def writes_and_reads(settings: RedisSettings) -> bool:
    with client(settings) as connected:
        write_records(connected, [("u", RECORD)], 60)
        found = read_records(connected, ["u"]) == [RECORD]
        return found and list(connected.scan_iter("user:*")) == [b"user:{u}"]


def test_an_acl_user_needs_no_more_than_the_documented_rights(tmp_path: Path) -> None:
    with redis_server(tmp_path) as url:
        with redis.Redis.from_url(url) as admin:
            admin.execute_command("ACL", "SETUSER", "recsys", "on", ">secret", *ACL)
            admin.execute_command("ACL", "SETUSER", "default", "off")
        settings = RedisSettings(url=url, username="recsys", password=SecretStr("secret"))
        assert writes_and_reads(settings)
        with pytest.raises(redis.RedisError):
            client(RedisSettings(url=url)).get("x")


async def test_the_asynchronous_client_reads_the_same(tmp_path: Path) -> None:
    with redis_server(tmp_path) as url:
        settings = RedisSettings(url=url)
        assert writes_and_reads(settings)
        connected = async_client(settings, max_connections=2)
        assert await connected.hget("user:{u}", "last_ts") == b"1772000000000"
        await connected.aclose()


@contextmanager
def server(folder: Path, port: int, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    folder.mkdir(parents=True, exist_ok=True)
    command = [str(redis_binary()), *options, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: answers(port), "a redis", 20, lambda: None)
        yield running
    finally:
        running.kill()
        running.wait()


def answers(port: int) -> bool:
    try:
        with redis.Redis(port=port) as probe:
            return bool(probe.ping())
    except redis.RedisError:
        return False


def test_a_sentinels_client_follows_the_master(tmp_path: Path) -> None:
    master, replica, sentinel = free_port(), free_port(), free_port()
    config = tmp_path / "sentinel.conf"
    config.write_text(
        f"sentinel monitor recsys 127.0.0.1 {master} 1\n"
        "sentinel down-after-milliseconds recsys 500\n"
        "sentinel failover-timeout recsys 3000\n"
    )
    with ExitStack() as held:
        first = held.enter_context(server(tmp_path / "m", master, "--save", ""))
        held.enter_context(server(tmp_path / "r", replica, "--save", "", "--replicaof", "127.0.0.1", str(master)))
        wait_until(lambda: linked(replica), "the replica", 20, lambda: None)
        held.enter_context(server(tmp_path / "s", sentinel, str(config), "--sentinel"))
        settings = RedisSettings(mode="sentinel", nodes=[f"127.0.0.1:{sentinel}"])
        wait_until(lambda: knows_replica(sentinel), "the sentinel", 20, lambda: None)
        assert writes_and_reads(settings)
        with client(settings) as connected:
            assert connected.wait(1, 5000) == 1
        first.kill()
        deadline = time.monotonic() + 30
        while not follows(settings):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert writes_and_reads(settings)


def linked(port: int) -> bool:
    with redis.Redis(port=port) as probe:
        return bool(probe.info("replication")["master_link_status"] == "up")


def knows_replica(port: int) -> bool:
    with redis.Redis(port=port) as probe:
        found: dict[str, Any] = probe.execute_command("SENTINEL MASTERS")
        return any(int(state["num-slaves"]) == 1 for state in found.values())


def follows(settings: RedisSettings) -> bool:
    try:
        return writes_and_reads(settings)
    except redis.RedisError:
        return False


def test_nodes_are_named_with_their_ports() -> None:
    with pytest.raises(ValidationError, match="needs the host:port"):
        RedisSettings(mode="cluster")
    with pytest.raises(ValidationError, match="every node is host:port"):
        RedisSettings(mode="cluster", nodes=["redis"])
    assert not is_cluster(redis.Redis())


def test_a_password_is_never_shown() -> None:
    assert "secret" not in repr(RedisSettings(password=SecretStr("secret")))


def test_waiting_for_replicas_is_refused_where_it_would_prove_nothing() -> None:
    with pytest.raises(ValidationError, match="wait_replicas is for a single master"):
        RedisSettings(mode="cluster", nodes=["redis:6379"], wait_replicas=1)
    assert RedisSettings(mode="sentinel", nodes=["sentinel:26379"], wait_replicas=1).wait_replicas == 1
