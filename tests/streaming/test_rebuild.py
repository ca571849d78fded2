"""A rebuild makes lost and broken records again while workers go on, and says what differs."""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from builders import archived_as, event
from redis_cluster import redis_cluster
from stream_world import World, wait_for

import streaming.rebuild
import streaming.rebuild_lock
from recsys_core.events import now_ms
from recsys_core.lake import Lake
from recsys_core.landing import ARCHIVE_SCHEMA, QUARANTINE_SCHEMA, Landing, OffsetRange
from recsys_core.live import Batch
from recsys_core.online import REBUILD_LOCK_KEY, user_key
from recsys_core.redis_client import client
from recsys_core.settings import Settings
from recsys_core.tombstones import TombstoneLog, hash_of
from streaming.rebuild import LandingSource, rebuild
from streaming.rebuild_lock import RebuildRefused
from streaming.topics import Topic, TopicError


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
    # The clock of some senders is ahead.
    one.send(*(one.event(chance, now_ms() + at % 2 * 1_800_000, user_id=user) for user in (gone, stays) for at in range(20)))
    lake = Lake(one.settings.lake_uri)
    TombstoneLog(lake).add(hash_of(gone), now_ms())
    if again == "rebuild":
        assert rebuild(one.settings, 0).users == 1
    else:
        one.start()
        one.settle()
        held = one.landing.archived(one.settings.kafka.topic)
        facts = [archived_as(one.landing, file) for file in held]
        assert sum(f.messages for f in facts) == 40
        assert (sum(f.rows for f in facts), sum(f.forgotten for f in facts)) == (20, 20)
    assert not one.redis.exists(user_key(gone))
    assert one.redis.exists(user_key(stays))


def test_a_removal_from_an_old_file_of_the_archive_makes_it_no_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoTopic:
        def __init__(self, *_: Any) -> None:
            self.places: dict[int, int] = {}

        def skip_to(self, number: int, offset: int) -> None:
            self.places[number] = offset

        def read(self) -> Iterator[Batch]:
            yield from ()

    monkeypatch.setattr(streaming.rebuild, "TopicSource", NoTopic)
    settings = Settings(home=tmp_path)
    landing = Landing(Lake(settings.lake_uri))
    moments = iter([1, 2, now_ms()])
    with monkeypatch.context() as patch:
        patch.setattr("recsys_core.landing.now_ms", lambda: next(moments))
        for n in range(3):
            table = pa.Table.from_pylist([{**event(f"e{n}", "u", "i", "2026-03-02T10"), "offset": n}], schema=ARCHIVE_SCHEMA)
            landing.write_archive(OffsetRange("clicks", "0" * 8, 0, n, n), 1, table, QUARANTINE_SCHEMA.empty_table())
    first = landing.files()[0]
    landing.take_out(first.path, lambda rows: pa.array([True] * rows.num_rows), landing.ledger.read())
    now = landing.files()[0]
    assert (now.rows, now.forgotten, now.arrived, now.since) == (0, 1, first.arrived, first.since)
    source = LandingSource(settings, Topic("clicks", "0" * 8, 1), now_ms() - 600_000, {0: ()})
    assert [batch.events["event_id"].to_pylist() for batch in source.read()] == [["e2"]]


@pytest.mark.parametrize("when", ["while events are applied", "before records are put in place", "between the rounds"])
def test_a_user_who_is_forgotten_during_a_rebuild_does_not_come_back(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    monkeypatch.setattr(streaming.rebuild, "REREAD_SECONDS", 0.0, raising=False)
    one = world(stream={"batch_events": 200})
    chance = random.Random(10)
    gone, stays = f"{one.prefix}-1", f"{one.prefix}-2"
    step = {
        "while events are applied": "_apply",
        "before records are put in place": "_promote",
        "between the rounds": "_promote",
    }
    own, left = getattr(streaming.rebuild, step[when]), [1]

    def send() -> None:
        one.send(*(one.event(chance, user_id=user) for user in (gone, stays) for _ in range(300)))

    def forget() -> None:
        if left and left.pop():
            TombstoneLog(Lake(one.settings.lake_uri)).add(hash_of(gone), now_ms())
            one.redis.delete(user_key(gone))

    def beside(*arguments: Any) -> Any:
        if when == "before records are put in place":
            forget()
        done = own(*arguments)
        if when == "between the rounds" and left:
            done = (done[0], [f"{arguments[3]}{user_key(stays)}".encode()])
            send()
            forget()
        elif when == "while events are applied":
            forget()
        return done

    send()
    monkeypatch.setattr(streaming.rebuild, step[when], beside)
    report = rebuild(one.settings, 0)
    assert not one.redis.exists(user_key(gone))
    assert one.redis.exists(user_key(stays))
    assert report.differences.different == []
    assert list(one.redis.scan_iter(match="rebuild*")) == []


def test_a_difference_is_told(world: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    one = world()
    chance = random.Random(9)
    one.send(*(one.event(chance) for _ in range(100)))
    monkeypatch.setattr("streaming.rebuild._promote", lambda *_: (0, []))
    report = rebuild(one.settings, 0)
    assert len(report.differences.different) == report.differences.compared > 0


ODD_USERS = ["}", "}x", "}{", "{", "{}", "a}b", "{1", "ann"]


def test_ids_with_braces_are_rebuilt_on_a_cluster(world: Callable[..., World], tmp_path: Path) -> None:
    with redis_cluster(tmp_path) as nodes:
        one = world(redis={"mode": "cluster", "nodes": nodes})
        one.redis = client(one.settings.redis)
        chance = random.Random(11)
        one.send(*(one.event(chance, user_id=user) for user in ODD_USERS for _ in range(5)))
        one.start()
        one.settle(landing=False)
        written = {user: one.redis.hget(user_key(user), "last") for user in ODD_USERS}
        assert len(set(written.values())) == len(ODD_USERS)
        one.redis.delete(user_key("}x"))
        report = rebuild(one.settings, 0)
        assert (report.users, report.differences.different) == (len(ODD_USERS), [])
        assert {user: one.redis.hget(user_key(user), "last") for user in ODD_USERS} == written


def test_the_count_of_an_item_is_never_taken_for_a_fence(world: Callable[..., World]) -> None:
    one = world(kafka={"partitions": 1})
    chance = random.Random(16)
    one.send(*(one.event(chance, item_id=item) for item in ("@a", "@b", "a", "'", " ") for _ in range(5)))
    rebuild(one.settings, 0)
    [key, *_] = one.redis.scan_iter(match=f"trend:{{{one.identity()}.0}}:*")
    one.redis.hset(key, mapping={"@a": 10**9, "@c": 1})
    assert rebuild(one.settings, 0).differences.different == []
    assert not one.redis.hexists(key, "@c")


def test_a_second_rebuild_is_refused_while_one_runs_and_takes_nothing_from_it(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = world(stream={"batch_events": 500})
    chance = random.Random(12)
    one.send(*(one.event(chance) for _ in range(3000)))
    refused: list[str] = []
    apply = streaming.rebuild._apply

    def apply_while_another_tries(*arguments: Any) -> None:
        apply(*arguments)
        with pytest.raises(RebuildRefused) as told:
            rebuild(one.settings, 0)
        refused.append(str(told.value))

    monkeypatch.setattr(streaming.rebuild, "_apply", apply_while_another_tries)
    report = rebuild(one.settings, 0)
    assert (report.events, report.differences.different) == (3000, [])
    assert len(refused) > 2
    assert set(refused) == {
        f"another rebuild runs on {socket.gethostname()}, process {os.getpid()}: wait for its end. "
        "The lock of one that was killed ends by itself within 30 s"
    }
    monkeypatch.undo()
    assert rebuild(one.settings, 0).differences.different == []


def test_a_rebuild_that_stood_still_gives_up_and_what_a_dead_one_left_is_removed(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = world()
    chance = random.Random(13)
    one.send(*(one.event(chance) for _ in range(300)))
    one.redis.hset("rebuild-dead-user:{ann}", "last", "[]")
    apply = streaming.rebuild._apply

    def apply_and_lose_the_lock(*arguments: Any) -> None:
        apply(*arguments)
        one.redis.set(REBUILD_LOCK_KEY, b"other elsewhere 1", px=60_000)
        wait_for("the lock is known to be lost", lambda: not renewing())

    def renewing() -> bool:
        return any(thread.name == "rebuild lock" for thread in threading.enumerate())

    monkeypatch.setattr(streaming.rebuild, "_apply", apply_and_lose_the_lock)
    monkeypatch.setattr(streaming.rebuild_lock, "LOCK_SECONDS", 0.5)
    with pytest.raises(RebuildRefused, match="stood still for too long"):
        rebuild(one.settings, 0)
    assert one.redis.get(REBUILD_LOCK_KEY) == b"other elsewhere 1"
    assert list(one.redis.scan_iter(match="rebuild-*")) == []
    assert not one.redis.exists(user_key(f"{one.prefix}-1"))
    one.redis.delete(REBUILD_LOCK_KEY)


def test_without_a_topic_there_is_nothing_to_rebuild_from(world: Callable[..., World]) -> None:
    one = world()
    settings = one.settings.model_copy(update={"kafka": one.settings.kafka.model_copy(update={"topic": "nowhere"})})
    with pytest.raises(TopicError, match="there is no topic nowhere"):
        rebuild(settings, 0)
