"""Whatever happens to workers, brokers and Redis: state equals the topic's events applied once, the archive has each once."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable

from stream_world import World


def produce_for(world: World, chance: random.Random, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        world.send(*(world.event(chance) for _ in range(chance.randrange(1, 60))), flush=False)
        world.producer.poll(chance.random() * 0.03)
    world.flush()


def test_a_worker_applies_and_archives_everything(world: Callable[..., World]) -> None:
    one = world()
    chance = random.Random(0)
    one.send(*(one.event(chance) for _ in range(3000)))
    one.start()
    one.settle()
    one.prove()
