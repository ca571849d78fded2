"""A Redis master with a replica and a Sentinel for tests, from the binary that they run a single Redis with."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from recsys_cli.processes import free_port, wait_until
from recsys_cli.stack import redis_binary


@dataclass(frozen=True)
class Watched:
    """Ports, and the process of the master."""

    master: int
    replica: int
    sentinel: int
    process: subprocess.Popen[bytes]

    def kill_master(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def watched_redis(home: Path) -> Iterator[Watched]:
    """A master named `recsys`, its replica, and a Sentinel that fails over within seconds."""
    master, replica, sentinel = free_port(), free_port(), free_port()
    config = home / "sentinel.conf"
    config.write_text(
        f"sentinel monitor recsys 127.0.0.1 {master} 1\n"
        "sentinel down-after-milliseconds recsys 500\n"
        "sentinel failover-timeout recsys 3000\n"
    )
    with ExitStack() as held:
        first = held.enter_context(_server(home / "m", master, "--save", ""))
        held.enter_context(_server(home / "r", replica, "--save", "", "--replicaof", "127.0.0.1", str(master)))
        wait_until(lambda: _linked(replica), "the replica", 20, lambda: None)
        held.enter_context(_server(home / "s", sentinel, str(config), "--sentinel"))
        wait_until(lambda: _knows_replica(sentinel), "the sentinel", 20, lambda: None)
        yield Watched(master, replica, sentinel, first)


@contextmanager
def _server(folder: Path, port: int, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    folder.mkdir(parents=True, exist_ok=True)
    command = [str(redis_binary()), *options, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: _answers(port), "a redis", 20, lambda: None)
        yield running
    finally:
        running.kill()
        running.wait()


def _answers(port: int) -> bool:
    try:
        with redis.Redis(port=port) as probe:
            return bool(probe.ping())
    except redis.RedisError:
        return False


def _linked(port: int) -> bool:
    with redis.Redis(port=port) as probe:
        return bool(probe.info("replication")["master_link_status"] == "up")


def _knows_replica(port: int) -> bool:
    """Whether the Sentinel is connected to the replica and has seen that it follows the master."""
    with redis.Redis(port=port) as probe:
        found: list[dict[str, Any]] = probe.sentinel_slaves("recsys")
        return any(state["flags"] == "slave" and state["master-link-status"] == "ok" for state in found)
