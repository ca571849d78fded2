"""A Redis master with replicas and Sentinels for tests, from the binary that they run a single Redis with."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import redis

from recsys_cli.processes import free_port, wait_until
from recsys_cli.stack import redis_binary

NAME = "recsys"
DOWN_MS = 500
"""A server that is silent for so long is down."""


@dataclass(frozen=True)
class Watched:
    """Ports, and the process of each."""

    master: int
    replicas: list[int]
    sentinels: list[int]
    processes: dict[int, subprocess.Popen[bytes]]

    def signal(self, port: int, number: int) -> None:
        self.processes[port].send_signal(number)

    def kill_master(self) -> None:
        self.processes[self.master].kill()
        self.processes[self.master].wait()

    def masters(self) -> set[int]:
        """Which server each Sentinel takes for the master."""
        found = set()
        for port in self.sentinels:
            with redis.Redis(port=port) as sentinel:
                found.add(int(sentinel.sentinel_get_master_addr_by_name(NAME)[1]))
        return found


@contextmanager
def watched_redis(home: Path, replicas: int = 1, sentinels: int = 1) -> Iterator[Watched]:
    """A master named NAME, its replicas, and Sentinels of which most together fail over within seconds."""
    master, *others = (free_port() for _ in range(1 + replicas + sentinels))
    followers, watchers = others[:replicas], others[replicas:]
    processes: dict[int, subprocess.Popen[bytes]] = {}
    with ExitStack() as held:
        processes[master] = held.enter_context(_server(home / "m", master, "--save", ""))
        for port in followers:
            options = ("--save", "", "--replicaof", "127.0.0.1", str(master))
            processes[port] = held.enter_context(_server(home / f"r{port}", port, *options))
            wait_until(partial(_linked, port), "the replica", 20, lambda: None)
        for port in watchers:
            config = home / f"sentinel-{port}.conf"
            config.write_text(
                f"sentinel monitor {NAME} 127.0.0.1 {master} {sentinels // 2 + 1}\n"
                f"sentinel down-after-milliseconds {NAME} {DOWN_MS}\n"
                f"sentinel failover-timeout {NAME} 3000\n"
            )
            processes[port] = held.enter_context(_server(home / f"s{port}", port, str(config), "--sentinel"))
        for port in watchers:
            wait_until(partial(_knows_all, port, replicas, sentinels), "the sentinel", 30, lambda: None)
        yield Watched(master, followers, watchers, processes)


@contextmanager
def _server(folder: Path, port: int, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    folder.mkdir(parents=True, exist_ok=True)
    command = [str(redis_binary()), *options, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: _answers(port), "a redis", 20, lambda: None)
        yield running
    finally:
        running.send_signal(signal.SIGCONT)
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


def _knows_all(port: int, replicas: int, sentinels: int) -> bool:
    """Whether a Sentinel knows the others, is connected to the replicas and has seen that they follow the master."""
    with redis.Redis(port=port) as probe:
        found: list[dict[str, Any]] = probe.sentinel_slaves(NAME)
        following = [state for state in found if state["flags"] == "slave" and state["master-link-status"] == "ok"]
        return len(following) == replicas and len(probe.sentinel_sentinels(NAME)) == sentinels - 1
