"""Live trends of the speed layer go before the hourly ones."""

from __future__ import annotations

from worlds import World, eventually, now_ms

from recsys_core.live_trends import announce_sources, bucket_key

SOURCE = "0000abcd.0"


def leaders(world: World) -> list[str]:
    return [item.item_id for item in world.client.trending(2)]


def test_live_buckets_lead_and_without_them_the_hourly_value_is_used(world: World) -> None:
    world.put_trend({"item-400": 50.0, "item-401": 20.0})
    eventually(lambda: leaders(world) == ["item-400", "item-401"])
    now = now_ms()
    length = world.settings.stream.bucket_minutes * 60_000
    announce_sources(world.redis.client, [SOURCE], world.settings, now)
    bucket = bucket_key(SOURCE, now // length)
    world.redis.client.hset(bucket, mapping={"item-300": 9000, "item-301": 4000})
    eventually(lambda: leaders(world) == ["item-300", "item-301"])
    world.redis.client.flushall()
    world.put_trend({"item-400": 50.0, "item-401": 20.0})
    eventually(lambda: leaders(world) == ["item-400", "item-401"])
