"""Clients by configuration against real servers: ACL users, a Sentinel's master over a fail-over, a Cluster."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import redis
from pydantic import SecretStr, ValidationError
from redis_cluster import redis_cluster
from redis_sentinel import watched_redis

from recsys_cli.stack import redis_server
from recsys_core.online import UserRecord, read_records, write_records
from recsys_core.redis_client import client, is_cluster
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


def test_a_sentinels_client_follows_the_master(tmp_path: Path) -> None:
    with watched_redis(tmp_path) as watched:
        settings = RedisSettings(mode="sentinel", nodes=[f"127.0.0.1:{watched.sentinels[0]}"])
        assert writes_and_reads(settings)
        with client(settings) as connected:
            assert connected.wait(1, 5000) == 1
        watched.kill_master()
        deadline = time.monotonic() + 30
        while not follows(settings):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert writes_and_reads(settings)


def follows(settings: RedisSettings) -> bool:
    try:
        return writes_and_reads(settings)
    except redis.RedisError:
        return False


def test_a_clusters_client_connects_when_it_is_needed_and_fails_as_the_others_do(tmp_path: Path) -> None:
    nobody = client(RedisSettings(mode="cluster", nodes=["127.0.0.1:1"]))
    for call in (lambda: nobody.get("x"), lambda: nobody.pipeline(transaction=False), lambda: nobody.get_primaries()):
        with pytest.raises(redis.RedisError, match="cannot be connected"):
            call()
    nobody.close()
    with redis_cluster(tmp_path) as nodes:
        settings = RedisSettings(mode="cluster", nodes=nodes)
        with client(settings) as connected:
            assert is_cluster(connected)
            write_records(connected, [("u", RECORD)], 60)
            assert read_records(connected, ["u"]) == [RECORD]
            with pytest.raises(redis.RedisError, match="slot"):
                connected.pipeline(transaction=False).execute_command("RENAME", "a", "b").execute()


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
