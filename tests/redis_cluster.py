"""A Redis Cluster for tests, from the binary that they run a single Redis with."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis

from recsys_cli.processes import wait_until
from recsys_cli.stack import redis_binary


@contextmanager
def redis_cluster(home: Path) -> Iterator[list[str]]:
    """Three masters on loopback; yields their addresses."""
    ports = [_free() for _ in range(3)]
    servers = []
    for port in ports:
        folder = home / str(port)
        folder.mkdir()
        options = ["--cluster-enabled", "yes", "--cluster-config-file", str(folder / "nodes.conf"), "--save", ""]
        command = [str(redis_binary()), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), *options]
        servers.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
    try:
        _join(ports)
        yield [f"127.0.0.1:{port}" for port in ports]
    finally:
        for running in servers:
            running.kill()
            running.wait()


def _free() -> int:
    """A port whose cluster bus, 10,000 above it, is a port as well."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port < 55_000:
            return port


def _join(ports: list[int]) -> None:
    nodes = [redis.Redis(port=port) for port in ports]
    for node in nodes:
        wait_until(lambda node=node: _answers(node), "a node", 20, lambda: None)
    share = 16384 // len(nodes) + 1
    for at, node in enumerate(nodes):
        node.execute_command("CLUSTER", "ADDSLOTS", *range(at * share, min((at + 1) * share, 16384)))
        node.execute_command("CLUSTER", "MEET", "127.0.0.1", ports[0])
    wait_until(lambda: all(_info(node)["cluster_state"] == "ok" for node in nodes), "the cluster", 30, lambda: None)
    wait_until(lambda: all(_info(node)["cluster_known_nodes"] == "3" for node in nodes), "the cluster", 30, lambda: None)


def _info(node: Any) -> dict[str, str]:
    found: dict[str, str] = node.cluster("INFO")
    return found


def _answers(node: Any) -> bool:
    try:
        return bool(node.ping())
    except redis.RedisError:
        return False
