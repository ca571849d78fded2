"""Redis killed, frozen, or full of nonsense: answers go on from lower tiers and return to CACHE by themselves."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from snapshots import make_snapshot
from worlds import World, eventually, now_ms

from recsys_core.online import TRENDING_KEY, TrendingValue, recs_key, user_key
from serving.client import RecsysClient


def tier(world: World, user_id: str = "ann") -> str:
    return world.client.recommend(user_id).tier


def test_a_killed_redis_lowers_the_tier_and_a_restarted_one_raises_it(world: World) -> None:
    world.put_cached_user("ann")
    assert tier(world) == "CACHE"
    world.redis.kill()
    assert {tier(world) for _ in range(20)} == {"POPULAR"}
    assert world.client.recommend("ann", current_item="item-5").tier == "REALTIME_ALS_ONLY", "no Redis is needed for that"
    world.redis.start()
    world.put_cached_user("ann")
    eventually(lambda: tier(world) == "CACHE")


def test_the_server_starts_without_redis(empty_world: World) -> None:
    empty_world.promote(make_snapshot())
    empty_world.redis.kill()
    empty_world.start()
    assert tier(empty_world) == "POPULAR"
    empty_world.redis.start()
    empty_world.put_cached_user("ann")
    eventually(lambda: tier(empty_world) == "CACHE")


def test_a_frozen_redis_costs_a_deadline_now_and_then_and_never_hangs(hasty_world: World) -> None:
    world = hasty_world
    world.put_cached_user("ann")
    eventually(lambda: tier(world) == "CACHE")
    world.redis.signal(signal.SIGSTOP)
    assert {tier(world) for _ in range(5)} == {"POPULAR"}
    skipped = world.server.store.counts["redis_skipped"]
    assert {tier(world) for _ in range(50)} == {"POPULAR"}
    assert world.server.store.counts["redis_skipped"] - skipped >= 25, "most calls do not wait for what does not answer"
    world.redis.signal(signal.SIGCONT)
    eventually(lambda: tier(world) == "CACHE")


def test_a_batch_is_answered_while_redis_is_frozen(hasty_world: World) -> None:
    hasty_world.redis.signal(signal.SIGSTOP)
    answers = hasty_world.client.recommend_batch([f"user-{i}" for i in range(1000)])
    assert {a.tier for a in answers} == {"POPULAR"}


def test_a_flushed_redis_is_only_a_cache_miss(world: World) -> None:
    world.put_cached_user("ann")
    world.redis.client.flushall()
    assert tier(world) == "POPULAR"
    world.put_cached_user("ann")
    assert tier(world) == "CACHE"


@pytest.mark.parametrize("junk", [b"", b"\x01", b"\xff" * 100, b"\x01\xff\xff" + b"a" * 40])
def test_a_corrupt_answer_is_counted_and_computed_anew(world: World, junk: bytes) -> None:
    world.put_known_user("ann")
    world.redis.client.set(recs_key("ann"), junk)
    assert tier(world) == "REALTIME_ALS_ONLY"
    assert world.server.store.counts["corrupt_values"] == 1
    eventually(lambda: tier(world) == "CACHE")


def test_a_truncated_answer_is_computed_anew(world: World) -> None:
    world.put_cached_user("ann")
    world.redis.client.set(recs_key("ann"), world.redis.client.get(recs_key("ann"))[:-1])
    assert tier(world) == "REALTIME_ALS_ONLY"


@pytest.mark.parametrize(
    ("field", "value"), [("last", b"{"), ("last", b"[1]"), ("seen", b"\xff"), ("als", b"v\0abc"), ("last_ts", b"soon")]
)
def test_a_corrupt_record_is_counted_and_passed_over(world: World, field: str, value: bytes) -> None:
    world.redis.client.hset(user_key("ann"), field, value)
    assert tier(world) == "POPULAR"
    assert world.server.store.counts["corrupt_values"] >= 1
    assert world.server.ladder.counts["unexpected_failures"] == 0


@pytest.mark.parametrize(("field", "value"), [("last", b"{"), ("last_ts", b"soon"), ("last_ts", b"9" * 5000)])
def test_a_corrupt_record_does_not_spoil_a_fresh_answer(world: World, field: str, value: bytes) -> None:
    world.put_cached_user("ann")
    world.redis.client.hset(user_key("ann"), field, value)
    assert tier(world) == "CACHE"


def test_answers_that_a_full_redis_does_not_take_are_counted_and_said_once(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.put_known_user("ann")
    world.redis.client.config_set("maxmemory", 1)
    for number in range(1, 4):
        assert tier(world) == "REALTIME_ALS_ONLY"
        eventually(lambda number=number: world.server.store.counts["redis_failures"] == number)
    assert [r.getMessage()[:22] for r in caplog.records if "OOM" in r.getMessage()] == ["Redis takes no answers"]
    world.redis.client.config_set("maxmemory", 0)
    eventually(lambda: tier(world) == "CACHE")


def test_keys_of_another_type_are_counted_and_passed_over(world: World) -> None:
    world.redis.client.set(user_key("ann"), b"a string")
    world.redis.client.hset(recs_key("ann"), "a", "hash")
    world.redis.client.hset(TRENDING_KEY, "a", "hash")
    assert tier(world) == "POPULAR"
    assert world.server.store.counts["corrupt_values"] >= 2
    assert world.server.ladder.counts["unexpected_failures"] == 0


def test_a_corrupt_trend_leaves_the_last_known_one(world: World) -> None:
    world.put_trend({"item-400": 1.0})
    eventually(lambda: world.client.recommend("nobody", 1).items[0].item_id == "item-400")
    world.redis.client.set(TRENDING_KEY, b"{}")
    eventually(lambda: world.server.store.counts["corrupt_values"])
    assert world.client.recommend("nobody", 1).items[0].item_id == "item-400"


def test_of_a_trend_that_does_not_fit_together_the_rest_is_taken(world: World) -> None:
    world.put_trend({"item-400": 1.0})
    eventually(lambda: world.client.recommend("nobody", 1).items[0].item_id == "item-400")
    world.redis.client.set(TRENDING_KEY, TrendingValue(now_ms(), "", {"item-1": (1.0,), "item-2": (1.0, 2.0)}).encode())
    eventually(lambda: world.client.recommend("nobody", 1).items[0].item_id == "item-1")
    assert not world.server.store.counts["unexpected_failures"]
    world.put_trend({"item-401": 1.0})
    eventually(lambda: world.client.recommend("nobody", 1).items[0].item_id == "item-401")


def test_an_answer_whose_items_are_corrupt_is_noticed_where_they_are_read(world: World) -> None:
    world.put_cached_user("ann")
    value = world.redis.client.get(recs_key("ann"))
    world.redis.client.set(recs_key("ann"), value[:-600] + b"\xff" * 600)
    answer = world.client.recommend("ann", 40, exclude=["item-1"])
    assert answer.tier == "REALTIME_ALS_ONLY"
    assert world.server.store.counts["corrupt_values"] == 1


def test_an_answer_from_a_clock_ahead_of_this_one_is_fresh(world: World) -> None:
    world.put_cached_user("ann", computed_at=now_ms() + 2000)
    assert tier(world) == "CACHE"


def test_calls_that_share_a_round_trip_get_their_own_answers(world: World) -> None:
    users = [f"user-{i}" for i in range(40)]
    world.put_answers({user: world.put_known_user(user, taste=i * 7) for i, user in enumerate(users)})
    alone = {user: [item.item_id for item in world.client.recommend(user)] for user in users}
    assert len(set(map(tuple, alone.values()))) == len(users)
    with ThreadPoolExecutor(16) as threads:
        together = list(threads.map(world.client.recommend, users * 20))
    assert {answer.tier for answer in together} == {"CACHE"}
    for user, answer in zip(users * 20, together, strict=True):
        assert [item.item_id for item in answer] == alone[user]


def test_a_call_that_is_given_up_leaves_the_others_alone(hasty_world: World) -> None:
    world = hasty_world
    world.put_cached_user("ann")
    world.redis.signal(signal.SIGSTOP)
    with ThreadPoolExecutor(8) as threads:
        with RecsysClient(world.address, timeout=0.02) as hasty:
            given_up = [threads.submit(hasty.recommend, "ann") for _ in range(4)]
            patient = [threads.submit(world.client.recommend, "ann") for _ in range(4)]
            assert {p.result().tier for p in patient} == {"POPULAR"}
            assert all(g.exception() is None or g.exception().status == "DEADLINE_EXCEEDED" for g in given_up)
    world.redis.signal(signal.SIGCONT)
    eventually(lambda: tier(world) == "CACHE")
