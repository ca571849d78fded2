"""A rebuild makes lost and broken records again while workers go on, and says what differs."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest
from stream_world import World

from recsys_core.events import now_ms
from recsys_core.lake import Lake
from recsys_core.online import user_key
from recsys_core.tombstones import TombstoneLog, hash_of
from streaming.rebuild import rebuild
from streaming.topics import TopicError


@pytest.mark.parametrize("from_landing", [False, True])
def test_a_rebuild_mends_what_was_lost_while_workers_go_on(world: Callable[..., World], from_landing: bool) -> None:
    one = world()
    chance = random.Random(8)
    one.send(*(one.event(chance) for _ in range(3000)))
    one.start()
    one.settle()
    broken = [user_key(f"{one.prefix}-{n}") for n in range(20)]
    one.redis.hset(broken[0], "last", "[]")
    one.redis.delete(*broken[1:10])
    one.redis.set(broken[10], "not a hash")
    one.redis.hset(broken[11], mapping={"als": b"v\0" + bytes(8), "stream": b"junk"})
    stop = threading.Event()

    def go_on() -> None:
        while not stop.wait(0.01):
            one.send(*(one.event(chance) for _ in range(5)))

    clicking = threading.Thread(target=go_on)
    clicking.start()
    try:
        report = rebuild(one.settings, 0, from_landing)
    finally:
        stop.set()
        clicking.join()
    assert report.differences.different == []
    assert report.users >= 40
    assert report.events >= 3000
    one.settle()
    one.prove()
    assert one.redis.hget(broken[11], "als") == b"v\0" + bytes(8)
    assert list(one.redis.scan_iter(match="rebuild-*")) == []


@pytest.mark.parametrize("again", ["rebuild", "replay"])
def test_a_user_who_was_forgotten_does_not_come_back(world: Callable[..., World], again: str) -> None:
    one = world()
    chance = random.Random(10)
    gone, stays = f"{one.prefix}-1", f"{one.prefix}-2"
    one.send(*(one.event(chance, user_id=user) for user in (gone, stays) for _ in range(20)))
    lake = Lake(one.settings.lake_uri)
    TombstoneLog(lake).add(hash_of(gone), now_ms())
    if again == "rebuild":
        assert rebuild(one.settings, 0).users == 1
    else:
        one.start()
        one.settle()
        held = one.landing.archived(one.settings.kafka.topic)
        facts = [one.landing.archive_facts(file) for file in held]
        assert sum(f["messages"] for f in facts) == 40
        assert (sum(f["events"] for f in facts), sum(f.get("forgotten", 0) for f in facts)) == (20, 20)
    assert not one.redis.exists(user_key(gone))
    assert one.redis.exists(user_key(stays))


def test_a_difference_is_told(world: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    one = world()
    chance = random.Random(9)
    one.send(*(one.event(chance) for _ in range(100)))
    monkeypatch.setattr("streaming.rebuild._promote", lambda *_: (0, []))
    report = rebuild(one.settings, 0)
    assert len(report.differences.different) == report.differences.compared > 0


def test_without_a_topic_there_is_nothing_to_rebuild_from(world: Callable[..., World]) -> None:
    one = world()
    settings = one.settings.model_copy(update={"kafka": one.settings.kafka.model_copy(update={"topic": "nowhere"})})
    with pytest.raises(TopicError, match="there is no topic nowhere"):
        rebuild(settings, 0)
