"""At most one rebuild at a time: a lock in Redis that its owner renews, and that ends by itself after its owner did.

rebuild:lock   string: token of the owner, machine and process; it expires LOCK_SECONDS after it was renewed last
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from types import TracebackType
from typing import Any

from redis.exceptions import RedisError

from recsys_core.errors import UserError
from recsys_core.online import REBUILD_LOCK_KEY
from recsys_core.redis_client import Script, run_calls

log = logging.getLogger(__name__)

LOCK_SECONDS = 30.0

_RENEW = Script("""
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
""")
_RELEASE = Script("if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0")


class RebuildRefused(UserError):
    """A rebuild may not begin, or not go on; the message says why and what to do."""


class RebuildLock:
    """The lock while the block is open; another thread renews it. `token` is of this owner alone."""

    def __init__(self, redis: Any) -> None:
        self._redis = redis
        self.token = uuid.uuid4().hex[:8]
        self._value = f"{self.token} {socket.gethostname()} {os.getpid()}".encode()
        self._held_until = 0.0
        self._ending = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="rebuild lock", daemon=True)

    def __enter__(self) -> RebuildLock:
        """Raises RebuildRefused when another rebuild runs, redis.RedisError."""
        begun = time.monotonic()
        if not self._redis.set(REBUILD_LOCK_KEY, self._value, nx=True, px=int(LOCK_SECONDS * 1000)):
            _, host, process = (self._redis.get(REBUILD_LOCK_KEY) or b"- - -").decode().split(" ")
            raise RebuildRefused(
                f"another rebuild runs on {host}, process {process}: wait for its end. "
                f"The lock of one that was killed ends by itself within {LOCK_SECONDS:.0f} s"
            )
        self._held_until = begun + LOCK_SECONDS
        self._renewing.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ending.set()
        self._renewing.join()
        try:
            run_calls(self._redis, [_RELEASE.call([REBUILD_LOCK_KEY], self._value)], [_RELEASE])
        except RedisError as failed:
            log.warning("the lock of the rebuild could not be given back and ends by itself: %s", failed)

    def check(self) -> None:
        """Raises RebuildRefused when the lock may be another's by now, as after a long standstill of this process."""
        if time.monotonic() >= self._held_until:
            raise RebuildRefused("this rebuild stood still for too long and another one may run now: start it again")

    def _renew(self) -> None:
        while not self._ending.wait(LOCK_SECONDS / 5):
            begun = time.monotonic()
            try:
                [held] = run_calls(
                    self._redis, [_RENEW.call([REBUILD_LOCK_KEY], self._value, int(LOCK_SECONDS * 1000))], [_RENEW]
                )
            except RedisError as error:
                log.warning("the lock of the rebuild could not be renewed: %s", error)
                continue
            self._held_until = begun + LOCK_SECONDS if held else 0.0
            if not held:
                return
