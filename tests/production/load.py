"""Clicks at a steady pace while something is done to the engines, and for how long a user's clicks were not visible."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import redis
from stream_world import World

from recsys_core.events import now_ms
from recsys_core.online import read_records
from recsys_core.redis_client import client

TICK_SECONDS = 0.02
LOOK_SECONDS = 0.25
USERS_SEEN = 20


@dataclass
class Stall:
    """For how long (s) the newest click of some user was not visible in Redis, to LOOK_SECONDS: at most, and at last."""

    seconds: float = 0.0
    now: float = 0.0


@contextmanager
def clicks(world: World, per_second: int = 1000, seed: int = 1) -> Iterator[None]:
    """Events of the world, at that pace, until the block ends and the brokers have taken all of them."""
    stop = threading.Event()

    def feed() -> None:
        chance, began, sent = random.Random(seed), time.monotonic(), 0
        while not stop.wait(TICK_SECONDS):
            due = int((time.monotonic() - began) * per_second) - sent
            world.send(*(world.event(chance) for _ in range(due)), flush=False)
            world.producer.poll(0)
            sent += due

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        yield
    finally:
        stop.set()
        feeder.join()
    world.flush()


@contextmanager
def stalls(world: World) -> Iterator[Stall]:
    """The longest stall of the block, in which each of the world's users clicks many times a second."""
    found, stop = Stall(), threading.Event()
    users = [f"{world.prefix}-{number}" for number in range(USERS_SEEN)]
    newest = dict.fromkeys(users, now_ms())

    def watch() -> None:
        connected = client(world.settings.redis, socket_timeout=LOOK_SECONDS)
        while not stop.wait(LOOK_SECONDS):
            for user in users:
                try:
                    (record,) = read_records(connected, [user])
                    newest[user] = max(newest[user], record.last_ts)
                except redis.RedisError:
                    pass
            found.now = (now_ms() - min(newest.values())) / 1000
            found.seconds = max(found.seconds, found.now)
        connected.close()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        stop.set()
        watcher.join()


def passes(seconds: float) -> None:
    """Let time pass while clicks and calls go on."""
    time.sleep(seconds)
