"""redis-py's client of a Redis Cluster that connects when it is needed and fails as the other clients of redis-py do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from redis.cluster import RedisCluster
from redis.exceptions import ClusterError, RedisClusterException
from redis.exceptions import ConnectionError as RedisConnectionError

R = TypeVar("R")


class LazyCluster(RedisCluster):
    """Connects at its first command. Every failure is a redis.RedisError, which RedisClusterException is not."""

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._connecting = threading.RLock()
        self._connected = self._under_way = False

    def __getattr__(self, name: str) -> Any:
        """What only a connected client has. Raises redis.ConnectionError."""
        if name.startswith("__") or name in ("_options", "_connecting", "_connected", "_under_way"):
            raise AttributeError(name)
        with self._connecting:
            if self._connected or self._under_way:
                return object.__getattribute__(self, name)
            self._connect()
        return getattr(self, name)

    def _connect(self) -> None:
        self._under_way = True
        try:
            super().__init__(**self._options)
            self._connected = True
        except RedisClusterException as error:
            raise RedisConnectionError(str(error)) from error
        finally:
            self._under_way = False

    def _ready(self) -> None:
        with self._connecting:
            if not (self._connected or self._under_way):
                self._connect()

    def execute_command(self, *args: Any, **kwargs: Any) -> Any:
        """Raises redis.RedisError."""
        self._ready()
        return _as_redis_error(super().execute_command)(*args, **kwargs)

    def pipeline(self, transaction: Any = None, shard_hint: Any = None) -> Any:
        """Its `execute` raises redis.RedisError."""
        self._ready()
        made: Any = super().pipeline(transaction, shard_hint)
        made.execute = _as_redis_error(made.execute)
        return made

    def close(self) -> None:
        if self._connected:
            super().close()


def _as_redis_error(call: Callable[..., R]) -> Callable[..., R]:
    def called(*args: Any, **kwargs: Any) -> R:
        try:
            return call(*args, **kwargs)
        except RedisClusterException as error:
            raise ClusterError(str(error)) from error

    return called
