"""Cached answers: none of the future is served, none that was changed, none of a release that was rolled back; and no
answer is written over a newer one, or for a user who was forgotten."""

from __future__ import annotations

import random
import threading
from concurrent.futures import Future

import pytest
from snapshots import make_snapshot
from worlds import World, eventually, now_ms

from recsys_core.online import CachedAnswer, UserRecord, recs_key, user_key
from serving.client import Recommendation

HOUR_MS = 3_600_000


def ids(answer: Recommendation) -> list[str]:
    return [item.item_id for item in answer]


@pytest.mark.parametrize("ahead", [2 * 60_000, HOUR_MS, 24 * HOUR_MS, 10**15])
def test_an_answer_of_the_future_is_computed_anew_and_replaced(world: World, ahead: int) -> None:
    world.put_cached_user("ann")
    world.redis.client.delete(recs_key("ann"))
    world.put_answers({"ann": UserRecord()}, computed_at=now_ms() + ahead)
    assert world.client.recommend("ann", exclude=["item-1"]).tier == "REALTIME_ALS_ONLY"
    assert world.client.recommend("ann").tier == "REALTIME_ALS_ONLY"
    eventually(lambda: world.client.recommend("ann").tier == "CACHE")
    assert CachedAnswer.decode(world.redis.client.get(recs_key("ann"))).computed_at <= now_ms()


def test_a_changed_byte_is_never_passed_on(world: World) -> None:
    world.put_cached_user("ann")
    right = world.client.recommend("ann")
    value = world.redis.client.get(recs_key("ann"))
    chance = random.Random(1)
    for _ in range(100):
        changed = bytearray(value)
        changed[chance.randrange(len(value))] ^= chance.randrange(1, 256)
        world.redis.client.set(recs_key("ann"), bytes(changed))
        answer = world.client.recommend("ann", exclude=["never-heard-of"] if chance.random() < 0.3 else [])
        assert (answer.tier, ids(answer)) == ("REALTIME_ALS_ONLY", ids(right))
        eventually(lambda: not world.server.ladder._writes)
    world.redis.client.set(recs_key("ann"), value)
    assert world.client.recommend("ann").tier == "CACHE"


def computed_later(world: World, user: str) -> tuple[threading.Event, Future[Recommendation]]:
    """A call that is computed once the event is set; it has read Redis already."""
    hold, found = threading.Event(), Future[Recommendation]()
    ranker = world.server.ladder.single
    ranker._thread.submit(hold.wait, 60)
    threading.Thread(target=lambda: found.set_result(world.client.recommend(user)), daemon=True).start()
    eventually(lambda: ranker._running is not None)
    return hold, found


def test_an_older_answer_that_is_written_later_does_not_replace_a_newer_one(world: World) -> None:
    record = world.put_known_user("ann")
    hold, found = computed_later(world, "ann")
    newer = now_ms() + 1
    eventually(lambda: now_ms() > newer)
    world.put_answers({"ann": record}, computed_at=newer)
    hold.set()
    assert found.result(60).tier == "REALTIME_ALS_ONLY"
    eventually(lambda: not world.server.ladder._writes)
    assert CachedAnswer.decode(world.redis.client.get(recs_key("ann"))).computed_at == newer


def test_a_call_under_way_does_not_take_a_forgotten_user_in_again(world: World) -> None:
    world.put_known_user("bob")
    hold, found = computed_later(world, "bob")
    world.redis.client.delete(user_key("bob"))
    world.redis.client.delete(recs_key("bob"))
    hold.set()
    assert found.result(60).tier == "REALTIME_ALS_ONLY"
    eventually(lambda: not world.server.ladder._writes)
    assert not world.redis.client.exists(user_key("bob"), recs_key("bob"))


@pytest.mark.parametrize("answered", ["fresh", "stale"])
def test_no_answer_of_a_release_that_was_rolled_back_is_served(world: World, answered: str) -> None:
    old, harmful = world.snapshot, make_snapshot("2026-01-02.b", seed=5)
    world.promote(harmful)
    eventually(lambda: world.client.get_release().release_id == harmful.release_id)
    world.put_cached_user("known", now_ms() - (2 * HOUR_MS if answered == "stale" else 0))
    world.put_cached_user("lost", now_ms() - (2 * HOUR_MS if answered == "stale" else 0))
    world.redis.client.delete(user_key("lost"))
    assert world.client.recommend("lost").tier == ("STALE_CACHE" if answered == "stale" else "CACHE")
    world.releases.roll_back()
    eventually(lambda: world.client.get_release().release_id == old.release_id)
    assert world.client.recommend("known").tier == "REALTIME_ALS_ONLY"
    assert world.client.recommend("lost").tier == "POPULAR"
    for user in ("known", "lost"):
        assert world.client.recommend(user, exclude=["item-1"]).release_id == old.release_id
    world.releases.promote(harmful.release_id)
    eventually(lambda: world.client.get_release().release_id == harmful.release_id)
    assert world.client.recommend("lost").tier == ("STALE_CACHE" if answered == "stale" else "CACHE"), "promoted again"


def test_answers_of_the_release_before_are_served_after_a_promotion(world: World) -> None:
    world.put_cached_user("ann")
    before = world.snapshot.release_id
    world.promote(make_snapshot("2026-01-02.b"))
    eventually(lambda: world.client.get_release().release_id == "2026-01-02.b")
    answer = world.client.recommend("ann")
    assert (answer.tier, answer.release_id) == ("CACHE", before)
