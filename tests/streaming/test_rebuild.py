"""A rebuild makes lost and broken records again while workers go on, and says what differs."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest
from stream_world import World

from recsys_core.online import user_key
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
