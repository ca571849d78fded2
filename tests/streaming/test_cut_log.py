"""Brokers that lost the newest messages give their offsets again, to messages that are applied and archived as well."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import redis as redis_module
from hypothesis import given
from hypothesis import strategies as st
from stream_world import World, in_this_process, wait_for

from recsys_core.landing import ARCHIVE_SCHEMA, OffsetRange, offset_faults
from recsys_core.online import read_records, user_key
from streaming import archive as archive_module
from streaming import worker as worker_module
from streaming.archive import quarantine_rows
from streaming.incarnations import incarnation, read_cuts, valid_ranges
from streaming.progress import advance
from streaming.rebuild import rebuild

LOST = 1_000
"""Messages that Redis and the archive have had of the only partition, and the brokers have no longer."""


def pretend_that_more_was_there(one: World, in_the_archive: bool = True) -> int:
    """Redis, and the archive, as if LOST more messages had been in the topic. Returns its end."""
    source, end = f"{one.identity()}.0", one.ends()[0]
    advance(one.redis, {source: end + LOST}, one.settings.cache.feature_ttl_seconds)
    for key in one.redis.scan_iter(match="user:*"):
        if one.redis.hget(key, f"@{source}") is not None:
            one.redis.hset(key, f"@{source}", end + LOST - 1)
    if in_the_archive:
        held = OffsetRange(one.settings.kafka.topic, one.identity(), 0, end, end + LOST - 1)
        one.landing.write_archive(held, 0, ARCHIVE_SCHEMA.empty_table(), quarantine_rows(held.topic, []))
    return end


@pytest.mark.parametrize("archive_is_behind", [False, True])
def test_what_comes_after_brokers_lost_messages_is_applied_and_archived(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, archive_is_behind: bool
) -> None:
    monkeypatch.setattr(archive_module, "GRACE_MS", 100)
    monkeypatch.setattr(worker_module, "CUT_MARGIN_MS", 0)
    one = world(kafka={"partitions": 1})
    chance = random.Random(1)
    with in_this_process(one.settings):
        one.send(*(one.event(chance) for _ in range(200)))
        one.settle()
    end = pretend_that_more_was_there(one, in_the_archive=not archive_is_behind)
    base = one.identity()
    users = [f"{one.prefix}-new-{n}" for n in range(5)]
    old_users = [f"{one.prefix}-{n}" for n in range(40)]
    before = [record.last_ts for record in read_records(one.redis, old_users)]
    for _ in range(1 if archive_is_behind else 2):
        with in_this_process(one.settings):
            one.send(*(one.event(chance, user_id=user) for user in users for _ in range(10)))
            one.send(*(one.event(chance) for _ in range(100)))
            second = incarnation(base, 0, [end])
            wait_for(
                "all is applied", lambda second=second: one.redis.get(f"applied:{{{second.source}}}") == b"%d" % one.ends()[0]
            )
            wait_for("all is archived", lambda second=second: ends_of(one, second.identity) == (end, one.ends()[0]))
    assert all(len(record.last) >= 5 for record in read_records(one.redis, users))
    after = [record.last_ts for record in read_records(one.redis, old_users)]
    assert all(late >= early for early, late in zip(before, after, strict=True))
    assert after != before
    assert read_cuts(one.redis, base, [0]) == {0: [end]}
    assert offset_faults(one.landing.archived(one.settings.kafka.topic)) == []
    assert "the brokers lost messages" in caplog.text
    for from_landing in (False, True):
        one.redis.delete(user_key(users[0]))
        report = rebuild(one.settings, 0, from_landing)
        assert (report.events, report.differences.different) == (one.ends()[0], [])
        assert len(read_records(one.redis, users[:1])[0].last) >= 5


def ends_of(one: World, identity: str) -> tuple[int, int]:
    held = [held for held in one.landing.archived(one.settings.kafka.topic) if held.identity == identity]
    return min((r.first for r in held), default=-1), max((r.last + 1 for r in held), default=-1)


@given(st.lists(st.integers(0, 50), max_size=4), st.integers(0, 60))
def test_however_often_a_log_is_cut_each_of_its_offsets_is_of_one_incarnation(cuts: list[int], grown: int) -> None:
    """A log that grows to some length, is cut, grows, and so on: what is left of each growth is what `valid_ranges` says."""
    chance = np.random.default_rng(len(cuts))
    log: list[int] = []
    found: list[int] = []
    for at in [*cuts, None]:
        log += [len(found)] * (int(chance.integers(0, 60)) if at is not None else grown)
        found.append(len(log) if at is None else min(at, len(log)))
        if at is not None:
            del log[at:]
    real = found[:-1]
    for number, (one, before) in enumerate(valid_ranges("0abcdef0", 3, real)):
        own = [offset for offset, incarnated in enumerate(log) if incarnated == number]
        end = len(log) if before is None else before
        assert own == list(range(one.start, max(one.start, min(end, len(log)))))


def test_an_incarnation_has_a_name_of_its_own(redis_url: str) -> None:
    names = [incarnation("0abcdef0", number, [5] * count) for number in (0, 1) for count in range(3)]
    assert len({one.source for one in names}) == 6
    assert len({(one.identity, number) for number, one in enumerate(names)}) == 6
    assert names[0].source == "0abcdef0.0"
    assert names[0].identity == names[3].identity == "0abcdef0"
    assert all(OffsetRange.parse(f"t/{OffsetRange('t', one.identity, 0, 1, 2).name}.parquet") for one in names)
    with redis_module.Redis.from_url(redis_url) as store:
        assert read_cuts(store, "0abcdef0", []) == {}
