"""Clicks at a steady pace while something is done to the engines, and how long nothing of them arrived."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import redis
from stream_world import World

from streaming.progress import read_positions

TICK_SECONDS = 0.02


@dataclass
class Stall:
    """The longest time (s) for which no event became visible in Redis while events were sent."""

    seconds: float = 0.0


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
    """The longest stall of the block; for use inside of `clicks`."""
    found, stop = Stall(), threading.Event()
    identity = world.identity()
    sources = [f"{identity}.{number}" for number in world.ends()]

    def watch() -> None:
        last, since = -1, time.monotonic()
        while not stop.wait(TICK_SECONDS):
            try:
                at = sum(position or 0 for position in read_positions(world.redis, sources).values())
            except redis.RedisError:
                at = last
            if at > last:
                last, since = at, time.monotonic()
            found.seconds = max(found.seconds, time.monotonic() - since)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        stop.set()
        watcher.join()


def passes(seconds: float, check: Callable[[], object] = lambda: None) -> None:
    """Let time pass, looking again and again whether all is well."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        check()
        time.sleep(TICK_SECONDS)
