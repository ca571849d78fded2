"""Live trends of the speed layer go before the hourly ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from worlds import World, eventually, now_ms

from recsys_core.live_trends import SOURCES_KEY, announce_sources, bucket_key

SOURCE = "0000abcd.0"


def leaders(world: World) -> list[str]:
    return [item.item_id for item in world.client.trending(2)]


def live_bucket(world: World) -> str:
    """The key of a bucket of this moment, its source announced."""
    now = now_ms()
    announce_sources(world.redis.client, [SOURCE], world.settings, now)
    return bucket_key(SOURCE, now // (world.settings.stream.bucket_minutes * 60_000))


def test_live_buckets_lead_and_without_them_the_hourly_value_is_used(world: World) -> None:
    world.put_trend({"item-400": 50.0, "item-401": 20.0})
    eventually(lambda: leaders(world) == ["item-400", "item-401"])
    world.redis.client.hset(live_bucket(world), mapping={"item-300": 9000, "item-301": 4000})
    eventually(lambda: leaders(world) == ["item-300", "item-301"])
    world.redis.client.flushall()
    world.put_trend({"item-400": 50.0, "item-401": 20.0})
    eventually(lambda: leaders(world) == ["item-400", "item-401"])


def test_a_few_live_events_do_not_take_the_place_of_what_an_hour_has_counted(world: World) -> None:
    half_lives = world.settings.trends.half_lives_hours
    world.put_trend({"item-400": [50.0] * len(half_lives), "item-401": [20.0] * len(half_lives)})
    world.redis.client.hset(live_bucket(world), mapping={"item-300": 4000, "item-401": 1000})
    eventually(lambda: [item.item_id for item in world.client.trending(3)] == ["item-400", "item-401", "item-300"])
    world.redis.client.hset(live_bucket(world), mapping={"item-300": 900_000})
    eventually(lambda: leaders(world) == ["item-300", "item-400"])


JUNK: dict[str, Callable[[World], object]] = {
    "a source that is no JSON": lambda world: world.redis.client.hset(SOURCES_KEY, SOURCE, b"{"),
    "a source that says too little": lambda world: world.redis.client.hset(SOURCES_KEY, SOURCE, b"5"),
    "a source of very short buckets": lambda world: world.redis.client.hset(SOURCES_KEY, SOURCE, b"[0, 1, 86400000]"),
    "sources of another type": lambda world: world.redis.client.set(SOURCES_KEY, b"text"),
    "a count that is no number": lambda world: world.redis.client.hset(live_bucket(world), "item-1", "many"),
    "a bucket of another type": lambda world: world.redis.client.set(live_bucket(world), b"text"),
}


@pytest.mark.parametrize("junk", JUNK)
def test_live_buckets_that_cannot_be_read_are_counted_and_the_hourly_value_is_used(world: World, junk: str) -> None:
    JUNK[junk](world)
    eventually(lambda: world.server.store.counts["corrupt_values"])
    world.put_trend({"item-400": 50.0, "item-401": 20.0})
    eventually(lambda: leaders(world) == ["item-400", "item-401"])
    assert not world.server.store.breaker.opened, "Redis answers, and the cache goes on"
    world.redis.client.flushall()
    world.redis.client.hset(live_bucket(world), mapping={"item-300": 9000, "item-301": 4000})
    eventually(lambda: leaders(world) == ["item-300", "item-301"])
