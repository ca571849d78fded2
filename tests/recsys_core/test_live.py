"""Users' live records and trends: any split of the events, in batches that may come again, comes to the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pytest
import redis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from redis.cluster import RedisCluster
from redis_cluster import redis_cluster

from recsys_cli.stack import redis_server
from recsys_core.events import DAY_MS, EVENT_SCHEMA, HOUR_MS, MINUTE_MS, now_ms
from recsys_core.live import (
    UPDATE,
    Batch,
    Guard,
    LiveEvent,
    StreamState,
    UserWriter,
    few_user_updates,
    not_yet_applied,
    user_updates,
)
from recsys_core.live_trends import (
    COUNT,
    SOURCES_KEY,
    LiveTrendReader,
    TrendWriter,
    announce_sources,
    bucket_key,
    live_trend,
    with_hourly,
)
from recsys_core.online import (
    LAST,
    LAST_ACTIONS,
    STREAM,
    TrendingValue,
    UserRecord,
    action_text,
    read_records,
    user_key,
    write_records,
)
from recsys_core.popularity import trending_items
from recsys_core.recompute import Recomputation
from recsys_core.redis_client import client, run_calls
from recsys_core.settings import RedisSettings, Settings

GAP_MS = 30 * MINUTE_MS
NOW = now_ms()
ARRIVED = NOW + 10
IDS = ["a", "b]", '],["', "ü\\", '"x"', "[1],[2]", "c\nd"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def store(server: str) -> Iterator[Any]:
    connected = redis.Redis.from_url(server)
    connected.flushall()
    yield connected
    connected.close()


def batch(rows: list[tuple[str, str, str, int]], first: int = 0, ahead: int = 0) -> Batch:
    """Events (user, item, type, time) of partition 0 from an offset on; they arrive at ARRIVED by clocks that are `ahead`."""
    rows = [(*row, ts + ahead) for *row, ts in rows]
    table = [
        {"event_id": f"e{at}", "user_id": u, "item_id": i, "event_type": k, "ts": ts} for at, (u, i, k, ts) in enumerate(rows)
    ]
    offset = np.arange(first, first + len(rows))
    arrived = np.full(len(rows), ARRIVED)
    return Batch(pa.Table.from_pylist(table, schema=EVENT_SCHEMA), np.zeros(len(rows), np.int64), offset, arrived)


def apply(redis: Any, settings: Settings, events: Batch, source: str = "0abcdef0.0") -> None:
    sources = {0: source}
    writer = UserWriter(redis, settings)
    while events.rows:
        updates = user_updates(events, LAST_ACTIONS, GAP_MS)
        answers = run_calls(redis, writer.calls(updates, sources, NOW), [UPDATE])
        _, behind = writer.behind(updates, answers)
        events = not_yet_applied(events, behind)


def count(redis: Any, settings: Settings, events: Batch) -> None:
    trends = TrendWriter(settings)
    while events.rows:
        counts = trends.counts(events, NOW)
        answers = run_calls(redis, trends.calls(counts, {0: "0abcdef0.0"}), [COUNT])
        _, behind = trends.behind(counts, answers)
        events = trends.not_yet_applied(events, behind)


events_of_users = st.lists(
    st.tuples(
        st.sampled_from(["u", "v"]),
        st.sampled_from(IDS),
        st.sampled_from(["view", "cart"]),
        st.sampled_from([NOW - d for d in (0, 1, 1000, GAP_MS, GAP_MS + 1, 3 * GAP_MS)]),
    ),
    min_size=1,
    max_size=30,
)


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=events_of_users,
    cuts=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), max_size=4),
    ahead=st.sampled_from([0, 500, 2 * GAP_MS]),
)
def test_any_split_with_repeats_equals_one_event_after_the_other(
    store: Any, settings: Settings, rows: list[tuple[str, str, str, int]], cuts: list[tuple[int, int]], ahead: int
) -> None:
    store.flushall()
    done = 0
    for start, size in [*cuts, (0, len(rows))]:
        start = min(start, done)
        end = min(start + size, len(rows))
        apply(store, settings, batch(rows[start:end], start, ahead))
        count(store, settings, batch(rows[start:end], start, ahead))
        done = max(done, end)
    computed = Recomputation(settings)
    computed.add(batch(rows, 0, ahead).events, "0abcdef0.0", range(len(rows)), [ARRIVED] * len(rows))
    assert all(user.last_ts <= ARRIVED for user in computed.users.values())
    found = computed.differences(store)
    assert (found.different, found.ahead) == ([], 0)


@hypothesis_settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=events_of_users,
    partitions=st.lists(st.integers(0, 2), min_size=30, max_size=30),
    came=st.lists(st.sampled_from([NOW - 2 * GAP_MS, NOW - 500, NOW + 500]), min_size=30, max_size=30),
    keep=st.integers(1, 5),
)
def test_a_handful_of_events_comes_to_the_same_as_columns_of_them(
    settings: Settings, rows: list[tuple[str, str, str, int]], partitions: list[int], came: list[int], keep: int
) -> None:
    of = np.array(partitions[: len(rows)], np.int64)
    arrived = np.array(came[: len(rows)], np.int64)
    columns = Batch(batch(rows).events, of, np.arange(len(rows)) * 3, arrived)
    events = [LiveEvent(p, 3 * at, *row, came[at]) for at, (p, row) in enumerate(zip(of.tolist(), rows, strict=True))]
    one, other = user_updates(columns, keep, GAP_MS), few_user_updates(events, keep, GAP_MS)
    assert sorted(zip(one.partition, one.users, one.payloads, strict=True)) == sorted(
        zip(other.partition, other.users, other.payloads, strict=True)
    )
    assert other.partition == sorted(other.partition)
    trends = TrendWriter(settings)
    for now in (NOW, NOW + settings.stream.trend_hours * HOUR_MS):
        counts = trends.few_counts(events, now)
        assert [
            (c.partition, c.bucket, c.first, c.last, dict(zip(c.items, c.counts, strict=True)))
            for c in trends.counts(columns, now)
        ] == [(c.partition, c.bucket, c.first, c.last, dict(zip(c.items, c.counts, strict=True))) for c in counts]


def test_nothing_is_applied_to_a_redis_that_is_behind_of_what_it_had(store: Any, settings: Settings) -> None:
    events = batch([("u", "a", "view", NOW), ("v", "b", "view", NOW)])
    users, trends = UserWriter(store, settings), TrendWriter(settings)
    updates, counts = user_updates(events, LAST_ACTIONS, GAP_MS), trends.counts(events, NOW)
    guards = {0: Guard("position", 7)}
    sources = {0: "0abcdef0.0"}
    calls = users.calls(updates, sources, NOW, guards) + trends.calls(counts, sources, guards)
    assert run_calls(store, calls, [UPDATE, COUNT]) == [[-1], [-1]]
    store.set("position", 6)
    assert run_calls(store, calls, [UPDATE, COUNT]) == [[-1], [-1]]
    assert list(store.scan_iter()) == [b"position"]
    store.set("position", 7)
    assert run_calls(store, calls, [UPDATE, COUNT]) == [[0], [0]]
    assert len(list(store.scan_iter())) == 4
    computed = Recomputation(settings)
    computed.add(events.events, sources[0], range(2))
    assert computed.differences(store).different == []


def test_every_key_expires(store: Any, settings: Settings) -> None:
    apply(store, settings, batch([("u", "a", "view", NOW)]))
    count(store, settings, batch([("u", "a", "view", NOW)]))
    announce_sources(store, ["0abcdef0.0"], settings, NOW)
    keys = list(store.scan_iter())
    assert len(keys) == 3
    assert all(store.ttl(key) > 0 for key in keys)


def test_a_value_that_is_none_of_ours_gives_way(store: Any, settings: Settings) -> None:
    store.set(user_key("u"), "text")
    store.hset(user_key("v"), mapping={"last": "junk", "stream": "short", "last_ts": "soon"})
    apply(store, settings, batch([("u", "a", "view", NOW), ("v", "a", "view", NOW)]))
    for record in read_records(store, ["u", "v"]):
        assert record.last == (("a", "view", NOW),)


def test_the_nightly_tables_never_take_live_actions_away(store: Any, settings: Settings) -> None:
    apply(store, settings, batch([("u", "new", "view", NOW), ("u", "newer", "cart", NOW + 5)]))
    old = tuple((f"old{n}", "view", NOW - 1000 * (n + 1)) for n in range(5))
    write_records(store, [("u", UserRecord(last=old, last_ts=old[0][2], seen=("x",)))], 60, 5, NOW)
    [record] = read_records(store, ["u"])
    assert [item for item, _, _ in record.last] == ["newer", "new", "old0", "old1", "old2"]
    assert record.last_ts == NOW + 5
    assert record.seen == ("x",)
    assert StreamState.decode(store.hget(user_key("u"), STREAM)) == StreamState(2, NOW, 2)


def in_order(actions: Iterable[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """Distinct actions, the newest first."""
    return sorted(set(actions), key=lambda action: (-action[2], action_text(*action)))[:LAST_ACTIONS]


nights = st.tuples(
    st.sampled_from([NOW - 2 * GAP_MS, NOW - 1000, NOW, NOW + 1]), st.integers(1, 5), st.lists(st.integers(0, 14))
)
batches = st.tuples(st.integers(0, 1), st.integers(0, 15), st.integers(1, 15))


@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(events_of_users, min_size=2, max_size=2),
    steps=st.lists(st.one_of(batches, nights), max_size=6),
    before=st.sampled_from([0, 4, LAST_ACTIONS - 3, LAST_ACTIONS]),
    age=st.sampled_from([0, 4 * GAP_MS]),
)
def test_the_last_actions_are_those_that_the_night_does_not_know_whatever_comes_when(
    store: Any, settings: Settings, rows: list[list[tuple[str, str, str, int]]], steps: list, before: int, age: int
) -> None:
    """A user's events from two partitions, some of them again and again, between nights that know all until a moment."""
    store.flushall()
    parts = [[("u", *row[1:]) for row in part] for part in rows]
    earlier = [("u", str(at % 40), "view", NOW - age - 7 * at) for at in range(before)]
    apply(store, settings, batch(earlier), "0abcdef0.2")
    known, applied = in_order(row[1:] for row in earlier), [0, 0]
    nightly = [row[1:] for part in parts for row in part]
    for step in [*steps, (0, 0, 30), (1, 0, 30)]:
        one, other, more = step
        if isinstance(more, list):
            last = in_order(nightly[at % len(nightly)] for at in more)[:other]
            write_records(store, [("u", UserRecord(last=tuple(last), seen=("x",)))], 60, other, one)
            if last and known:
                merged = in_order([*known, *last])
                known = merged[: max(other, sum(ts >= one for *_, ts in merged))]
            else:
                known = known or last
        else:
            start = min(other, applied[one])
            some = parts[one][start : start + more]
            apply(store, settings, batch(some, start), f"0abcdef0.{one}")
            new = parts[one][applied[one] : start + more]
            known, applied[one] = in_order([*known, *(row[1:] for row in new)]), max(applied[one], start + len(some))
        assert store.hget(user_key("u"), LAST) == (b"[" + b",".join(action_text(*a) for a in known) + b"]" if known else None)
    [record] = read_records(store, ["u"])
    assert list(record.last) == known


def test_what_the_night_wrote_before_the_stream_applies_it_is_not_doubled(store: Any, settings: Settings) -> None:
    write_records(store, [("u", UserRecord(last=(("a", "view", NOW),), last_ts=NOW))], 60, 5)
    apply(store, settings, batch([("u", "a", "view", NOW), ("u", "b", "view", NOW + 1)]))
    [record] = read_records(store, ["u"])
    assert record.last == (("b", "view", NOW + 1), ("a", "view", NOW))


def test_trends_decay_by_each_half_life_and_add_up_over_sources(store: Any, settings: Settings) -> None:
    assert live_trend(store, NOW, [1.0]) is None
    bucket = 5 * MINUTE_MS
    now = NOW // bucket * bucket + bucket // 2
    count(store, settings, batch([("u", "a", "purchase", now), ("v", "b", "view", now - 12 * bucket)]))
    announce_sources(store, ["0abcdef0.0", "0abcdef0.1"], settings, NOW)
    found = live_trend(store, now, [1.0, 0.5])
    assert found is not None
    scores = dict(zip(found.items, found.scores.tolist(), strict=True))
    assert scores == {"a": [8.0, 8.0], "b": [0.5, 0.25]}
    reader = LiveTrendReader([1.0])
    reader.read(store, now)
    count(store, settings, batch([("u", "a", "view", now)], first=2))
    again = reader.read(store, now)
    assert again is not None
    assert dict(zip(again.items, again.scores[:, 0].tolist(), strict=True)) == {"a": 9.0, "b": 0.5}


@pytest.mark.parametrize("junk", [b"{", b"5", b"[]", b'["soon", 1, 2]', None])
def test_sources_that_are_none_give_way(store: Any, settings: Settings, junk: bytes | None) -> None:
    if junk is None:
        store.set(SOURCES_KEY, "text")
    else:
        store.hset(SOURCES_KEY, "0abcdef0.7", junk)
    announce_sources(store, ["0abcdef0.0"], settings, NOW)
    assert store.hkeys(SOURCES_KEY) == [b"0abcdef0.0"]
    assert live_trend(store, NOW, [1.0]) is None


@pytest.mark.parametrize(
    ("field", "junk"),
    [(b"bad", b"x"), (b"bad", b"9" * 400), (b"bad", b"1e400"), (b"\xff", b"1000"), (None, b"a bucket of another type")]
    + [("source", source) for source in (b"x", b"[1]", b"[1, 0, 5]", b"[1, 1, 99999999999]", b"{}", b'["a", 1, 2]')],
)
def test_what_is_no_trend_hides_no_other_one(store: Any, settings: Settings, field: bytes | str | None, junk: bytes) -> None:
    count(store, settings, batch([("u", "a", "purchase", NOW), ("u", "b", "view", NOW - HOUR_MS)]))
    announce_sources(store, ["0abcdef0.0"], settings, NOW)
    before = live_trend(store, NOW, [1.0])
    [*_, key] = sorted(store.scan_iter(match="trend:{*"))
    if field == "source":
        store.hset(SOURCES_KEY, mapping={"0abcdef0.1": junk, b"\xff": b"[1, 300000, 86400000]"})
    elif field is None:
        store.set(bucket_key("0abcdef0.0", NOW // (5 * MINUTE_MS) - 3), junk)
    else:
        store.hset(key, field, junk)
    reader = LiveTrendReader([1.0])
    found = reader.read(store, NOW)
    assert reader.left_out if field != b"\xff" else reader.left_out == []
    assert before is not None
    assert found is not None
    scores, known = (dict(zip(one.items, one.scores.tolist(), strict=True)) for one in (found, before))
    assert {item: scores[item] for item in known} == known == {item: scores[item] for item in ("a", "b")}


def test_a_record_lives_on_after_a_worker_whose_clock_was_ahead(store: Any, settings: Settings) -> None:
    for at, now in enumerate((NOW + 365 * DAY_MS, NOW)):
        writer = UserWriter(store, settings)
        calls = writer.calls(few_user_updates([LiveEvent(0, at, "u", "i", "view", NOW)], 9, 1), {0: "0abcdef0.0"}, now)
        run_calls(store, calls, [UPDATE])
        if not at:
            store.expire(user_key("u"), 5)
    assert store.ttl(user_key("u")) > 60


HALF_LIVES = (1.0, 0.25, 24.0)


@hypothesis_settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["view", "cart"]), st.integers(0, 20 * 60)), min_size=1, max_size=30
    ),
    known_from=st.integers(0, 20 * 60),
    hourly_at=st.integers(0, 20 * 60),
)
def test_the_live_trend_is_the_trend_of_all_events_however_many_of_them_the_speed_layer_knows(
    rows: list[tuple[str, str, int]], known_from: int, hourly_at: int
) -> None:
    """Ages are in minutes. Only where neither side has an event is it missing."""
    weights = Settings().events.weights
    table = pa.table(
        [[i for i, _, _ in rows], [k for _, k, _ in rows], [NOW - age * MINUTE_MS for _, _, age in rows]],
        ["item_id", "event_type", "ts"],
    )
    exact = trending_items(ds.dataset(table), NOW, weights, HALF_LIVES, 100)
    before = trending_items(ds.dataset(table), NOW - hourly_at * MINUTE_MS, weights, HALF_LIVES, 100)
    hourly = TrendingValue(
        NOW - hourly_at * MINUTE_MS, "", dict(zip(before["item_id"].to_pylist(), before["scores"].to_pylist(), strict=True))
    )
    lately = table.filter(pc.greater_equal(table["ts"], NOW - known_from * MINUTE_MS))
    part = trending_items(ds.dataset(lately), NOW, weights, HALF_LIVES, 100)
    live = TrendingValue(NOW, "", dict(zip(part["item_id"].to_pylist(), part["scores"].to_pylist(), strict=True)))
    joined = with_hourly(live, hourly, HALF_LIVES).scores
    everything = dict(zip(exact["item_id"].to_pylist(), exact["scores"].to_pylist(), strict=True))
    for item, scores in everything.items():
        got = joined.get(item, (0.0,) * 3)
        assert all(have <= true * (1 + 1e-9) for have, true in zip(got, scores, strict=True))
        known = [age for i, _, age in rows if i == item]
        if max(known) <= known_from or min(known) >= hourly_at:
            assert got == pytest.approx(tuple(scores), rel=1e-9)


@hypothesis_settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from(IDS), st.sampled_from(["view", "cart"]), st.integers(0, 1400)), min_size=1, max_size=40)
)
def test_the_live_trend_is_the_hourly_one_to_the_length_of_a_bucket(
    store: Any, settings: Settings, rows: list[tuple[str, str, int]]
) -> None:
    """Ages are in minutes, within what is read of the shortest reach."""
    store.flushall()
    length = settings.stream.bucket_minutes * MINUTE_MS
    count(store, settings, batch([("u", item, kind, NOW - age * MINUTE_MS) for item, kind, age in rows]))
    announce_sources(store, ["0abcdef0.0"], settings, NOW)
    found = live_trend(store, NOW, HALF_LIVES)
    middles = [min(NOW, int(((NOW - age * MINUTE_MS) // length + 0.5) * length)) for _, _, age in rows]
    table = pa.table([[i for i, _, _ in rows], [k for _, k, _ in rows], middles], ["item_id", "event_type", "ts"])
    hourly = trending_items(ds.dataset(table), NOW, settings.events.weights, HALF_LIVES, 100)
    assert found is not None
    live = dict(zip(found.items, found.scores.tolist(), strict=True))
    expected = dict(zip(hourly["item_id"].to_pylist(), hourly["scores"].to_pylist(), strict=True))
    assert live == {item: pytest.approx(scores, rel=1e-9, abs=1e-12) for item, scores in expected.items()}


def test_a_cluster_holds_what_a_standalone_redis_holds(tmp_path: Path, settings: Settings) -> None:
    with redis_cluster(tmp_path) as nodes:
        connected = client(RedisSettings(mode="cluster", nodes=nodes))
        assert isinstance(connected, RedisCluster)
        rows = [(f"u{n % 50}", IDS[n % 7], "view", NOW - n % 13) for n in range(400)]
        for start in range(0, 400, 90):
            apply(connected, settings, batch(rows[max(0, start - 20) : start + 90], max(0, start - 20)))
            count(connected, settings, batch(rows[max(0, start - 20) : start + 90], max(0, start - 20)))
        computed = Recomputation(settings)
        computed.add(batch(rows).events, "0abcdef0.0", range(400))
        found = computed.differences(connected)
        assert (found.different, found.ahead, found.compared) == ([], 0, 50 + len(computed.buckets))
        connected.close()
