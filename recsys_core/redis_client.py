"""Redis clients by configuration: standalone, Sentinel or Cluster, with TLS and ACL.

Every process but the serving ones, which read over connections of their own (`serving.topology`), makes its clients here, so
that one section of the settings describes the installation to all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha1
from typing import Any

from recsys_core.settings import RedisSettings

CONNECT_SECONDS = 5.0
WRONG_TYPE = "WRONGTYPE"
"""How Redis's answer begins for a key that holds another kind of value than the command is for."""


def client(settings: RedisSettings, **options: Any) -> Any:
    """A redis-py client for writers and batch reads: `Redis` or `RedisCluster`. It connects at the first command.

    Every failure of it is a redis.RedisError. `options` are further arguments of its connections, such as `socket_timeout`
    in seconds. With Sentinel it follows the master over a fail-over.
    """
    import redis

    chosen = {"socket_connect_timeout": CONNECT_SECONDS, **_login(settings), **options}
    if settings.mode == "cluster":
        from redis.cluster import ClusterNode

        from recsys_core.redis_cluster import LazyCluster

        nodes = [ClusterNode(host, port) for host, port in _nodes(settings)]
        return LazyCluster(startup_nodes=nodes, **chosen, **_tls(settings))
    if settings.mode == "sentinel":
        from redis.sentinel import Sentinel

        watchers = Sentinel(_nodes(settings), sentinel_kwargs=_sentinel_login(settings), **chosen, **_tls(settings))
        return watchers.master_for(settings.service)
    return redis.Redis.from_url(settings.url, **chosen, **_url_tls(settings))


def is_cluster(redis: Any) -> bool:
    """Whether a client speaks to a Redis Cluster, where the keys of one command must share a slot."""
    from redis.cluster import RedisCluster

    return isinstance(redis, RedisCluster)


def is_of_wrong_type(error: Exception) -> bool:
    """Whether an error says that a key holds another kind of value than the command is for."""
    return str(error).startswith(WRONG_TYPE)


def clear_unless_hash(redis: Any, key: str) -> None:
    """Delete a key that holds another kind of value, so that it can be a hash."""
    if redis.type(key) not in (b"hash", b"none"):
        redis.delete(key)


@dataclass(frozen=True)
class Script:
    """A Lua script and its SHA-1, by which servers that have it run it."""

    text: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha", sha1(self.text.encode(), usedforsecurity=False).hexdigest())

    def call(self, keys: Sequence[bytes | str], *arguments: object) -> tuple[object, ...]:
        """The words of a command for a pipeline."""
        return ("EVALSHA", self.sha, len(keys), *keys, *arguments)


def run_calls(redis: Any, calls: Iterable[tuple[object, ...]], scripts: Sequence[Script]) -> list[Any]:
    """Run calls of `scripts` in one pipeline and return their answers in order; all answered, or an error is raised.

    A server that does not know the scripts gets them. Raises redis.RedisError; calls are then to be made again.
    """
    from redis.exceptions import NoScriptError

    commands = list(calls)
    for attempt in range(2):
        pipeline = redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        answers = pipeline.execute(raise_on_error=False)
        errors = [answer for answer in answers if isinstance(answer, Exception)]
        if not errors:
            return list(answers)
        if attempt or not any(isinstance(error, NoScriptError) for error in errors):
            raise errors[0]
        for script in scripts:
            redis.script_load(script.text)
    raise AssertionError("unreachable")


def _nodes(settings: RedisSettings) -> list[tuple[str, int]]:
    return [(host, int(port)) for host, _, port in (node.rpartition(":") for node in settings.nodes)]


def _login(settings: RedisSettings) -> dict[str, Any]:
    """What is set here wins over the user and password of a URL."""
    found: dict[str, Any] = {}
    if settings.username:
        found["username"] = settings.username
    if password := settings.password.get_secret_value():
        found["password"] = password
    return found


def _sentinel_login(settings: RedisSettings) -> dict[str, Any]:
    password = settings.sentinel_password.get_secret_value()
    return {"socket_connect_timeout": CONNECT_SECONDS, **({"password": password} if password else {}), **_tls(settings)}


def _tls(settings: RedisSettings) -> dict[str, Any]:
    return {"ssl": True, **_certificates(settings)} if settings.tls else {}


def _url_tls(settings: RedisSettings) -> dict[str, Any]:
    return _certificates(settings) if settings.url.startswith("rediss://") else {}


def _certificates(settings: RedisSettings) -> dict[str, Any]:
    files = {"ssl_ca_certs": settings.ca_file, "ssl_certfile": settings.cert_file, "ssl_keyfile": settings.key_file}
    return {name: file for name, file in files.items() if file}
