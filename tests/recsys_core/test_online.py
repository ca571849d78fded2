"""The Redis contract: what is written is what is read, and what is no value of ours is a CorruptValue."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import redis as redis_py
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from redis.crc import key_slot
from snapshots import make_snapshot, with_two_tower

from recsys_cli.stack import redis_server
from recsys_core.events import now_ms
from recsys_core.features import OnlineFeatures
from recsys_core.item_ids import ItemIds
from recsys_core.online import (
    CLOCK_MS,
    RECORD_FIELDS,
    AnswerEncoder,
    CachedAnswer,
    CorruptValue,
    TrendingValue,
    UserRecord,
    consumed,
    first_items,
    recs_key,
    user_key,
    users_of,
    write_answers,
    write_records,
)
from recsys_core.ranking import Snapshot
from recsys_core.settings import RankingSettings, Settings
from recsys_core.tower import TowerInputs
from serving import recsys_pb2 as pb

IDS = ["a", "ü-item", "x" * 200, "item-4"]
MOMENTS = st.integers(0, 400_000)


def values_of(record: UserRecord) -> list[bytes | None]:
    fields = record.encode()
    return [fields.get(name) for name in RECORD_FIELDS]


def encode_one(positions: list[int], scores: list[float], release: str = "r1", at: int = 123) -> bytes:
    rows = np.array([positions]), np.array([scores], np.float32)
    return AnswerEncoder(release, ItemIds(IDS)).encode(*rows, at)[0]


def test_both_keys_of_a_user_share_their_hash_tag() -> None:
    assert user_key("ann") == "user:{ann}"
    assert recs_key("ann") == "recs:{ann}"


def read_back(tag: str) -> str:
    """The id of a hash tag."""
    return re.sub(r"\{[01]", lambda found: "{}"[int(found[0][1])], tag)


BRACED = st.text(st.one_of(st.sampled_from("{}{}01"), st.characters(exclude_categories=["Cs"])), min_size=1, max_size=12)


@given(BRACED)
@example("}")
@example("}x")
@example("}{")
@example("{")
@example("{}")
@example("{1")
@example("{{0}}1")
def test_all_keys_of_a_user_lie_in_one_slot_and_are_of_no_other_user(user: str) -> None:
    keys = [user_key(user), recs_key(user), user_key(user, "rebuild-1234-user")]
    assert len({key_slot(key.encode()) for key in keys}) == 1
    area, tag = user_key(user)[:6], user_key(user)[6:-1]
    assert (area, read_back(tag)) == ("user:{", user)
    if not {"{", "}"} & set(user):
        assert keys[:2] == [f"user:{{{user}}}", f"recs:{{{user}}}"]


@settings(deadline=None)
@given(
    ids=st.lists(st.text(min_size=1, max_size=300), min_size=1, max_size=6, unique=True),
    rows=st.lists(st.lists(st.integers(-1, 5), min_size=4, max_size=4), min_size=1, max_size=5),
    at=st.integers(0, 2**53),
)
def test_an_encoded_answer_is_a_protobuf_response_of_the_same_items(ids: list[str], rows: list[list[int]], at: int) -> None:
    positions = np.array([[p if p < len(ids) else -1 for p in row] for row in rows])
    scores = np.linspace(-2, 2, positions.size, dtype=np.float32).reshape(positions.shape)
    values = AnswerEncoder("release-1", ItemIds(ids)).encode(positions, scores, at)
    assert len(values) == len(rows)
    for value, row, row_scores in zip(values, positions, scores, strict=True):
        answer = CachedAnswer.decode(value)
        wanted = [(ids[p], float(s)) for p, s in zip(row, row_scores, strict=True) if p >= 0]
        assert (answer.release_id, answer.computed_at) == ("release-1", at)
        assert answer.items() == wanted
        parsed = pb.RecommendResponse.FromString(answer.wire)
        assert [(i.item_id, i.score) for i in parsed.items] == wanted


@pytest.mark.parametrize("n", [0, 1, 2, 3, 9])
def test_the_first_items_parse_alone_and_with_fields_after_them(n: int) -> None:
    answer = CachedAnswer.decode(encode_one([2, 0, 1], [3.0, 2.0, 1.0]))
    rest = pb.RecommendResponse(tier=pb.CACHE, release_id="r1").SerializeToString()
    parsed = pb.RecommendResponse.FromString(answer.first(n) + rest)
    assert [i.item_id for i in parsed.items] == [IDS[p] for p in (2, 0, 1)][:n]
    assert (parsed.tier, parsed.release_id) == (pb.CACHE, "r1")


def test_an_answer_of_no_items_is_one() -> None:
    answer = CachedAnswer.decode(encode_one([-1, -1], [0, 0]))
    assert (answer.items(), answer.first(3)) == ([], b"")


def test_every_truncation_is_corrupt() -> None:
    value = encode_one([0, 1, 2], [3.0, 2.0, 1.0])
    for end in range(len(value)):
        with pytest.raises(CorruptValue):
            CachedAnswer.decode(value[:end])


def test_an_answer_of_another_format_is_corrupt() -> None:
    value = encode_one([0], [1.0])
    with pytest.raises(CorruptValue, match="format 1, this process reads 3"):
        CachedAnswer.decode(b"\x01" + value[1:])


@settings(deadline=None, max_examples=200)
@given(at=st.integers(0, 10_000), to=st.integers(1, 255), count=st.integers(1, 3), long=st.booleans())
def test_any_byte_that_is_changed_is_noticed(at: int, to: int, count: int, long: bool) -> None:
    value = bytearray(encode_one([2, 0, 1] if long else [0, 1, 3], [3.0, 2.0, 1.0]))
    assert first_items(bytes(value), b"r1", count, 200, 100, 50) is not None
    value[at % len(value)] ^= to
    assert first_items(bytes(value), b"r1", count, 200, 100, 50) is None
    with pytest.raises(CorruptValue):
        CachedAnswer.decode(bytes(value))


@settings(deadline=None)
@given(at=MOMENTS, acted=MOMENTS, oldest=MOMENTS, last_ts=MOMENTS, now=MOMENTS)
def test_the_fast_path_takes_exactly_what_is_fresh(at: int, acted: int, oldest: int, last_ts: int, now: int) -> None:
    positions, scores = np.array([[0, 1, 3]]), np.array([[3.0, 2.0, 1.0]], np.float32)
    [value] = AnswerEncoder("r1", ItemIds(IDS)).encode(positions, scores, at, [acted])
    answer = CachedAnswer.decode(value)
    fast = first_items(value, b"r1", 2, now, oldest, last_ts)
    assert (fast is not None) == answer.is_fresh(now, oldest, last_ts) == (oldest <= at <= now + CLOCK_MS and last_ts <= acted)
    assert fast is None or fast == (answer.first(2), at)
    assert first_items(value, b"r1", 4, now, oldest, last_ts) is first_items(value, b"r2", 2, now, oldest, last_ts) is None


def test_an_answer_is_fresh_up_to_what_two_clocks_may_differ_by() -> None:
    answer = CachedAnswer.decode(encode_one([0], [1.0], at=1_000_000))
    assert answer.is_fresh(1_000_000 - CLOCK_MS, 0, 0)
    assert not answer.is_fresh(1_000_000 - CLOCK_MS - 1, 0, 0)


class TestWritingAnswers:
    """Against a real Redis: which of two answers stays, and whether one may be written at all."""

    @pytest.fixture(scope="class")
    def redis(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
        with redis_server(tmp_path_factory.mktemp("redis")) as url, redis_py.Redis.from_url(url) as connected:
            yield connected

    def lying(self, redis: Any) -> int:
        return CachedAnswer.decode(redis.get(recs_key("u"))).computed_at

    def answer(self, at: int) -> bytes:
        return encode_one([0], [1.0], at=at)

    @settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.differing_executors])
    @given(times=st.permutations(range(6)))
    def test_the_newest_stays_in_whatever_order_they_are_written(self, redis: Any, times: list[int]) -> None:
        redis.flushall()
        for moment in times:
            write_answers(redis, [("u", self.answer(now_ms() - 10_000 + moment))], 60)
        last = self.lying(redis)
        write_answers(redis, [("u", self.answer(last - 1))], 60)
        assert self.lying(redis) == last

    def test_what_a_wrong_clock_dated_ahead_gives_way(self, redis: Any) -> None:
        now = now_ms()
        write_answers(redis, [("u", self.answer(now + 24 * 3_600_000))], 60)
        write_answers(redis, [("u", self.answer(now))], 60)
        assert self.lying(redis) == now

    @pytest.mark.parametrize("junk", [b"", b"\x01", b"\x02", b"\x02" * 40, b"\x01" * 40])
    def test_what_is_no_answer_gives_way(self, redis: Any, junk: bytes) -> None:
        redis.set(recs_key("u"), junk)
        write_answers(redis, [("u", self.answer(now_ms()))], 60)
        assert self.lying(redis) <= now_ms()

    def test_a_key_of_another_type_gives_way(self, redis: Any) -> None:
        redis.delete(recs_key("u"))
        redis.hset(recs_key("u"), "a", "hash")
        write_answers(redis, [("u", self.answer(5))], 60)
        assert self.lying(redis) == 5

    def test_what_was_made_from_a_record_is_written_beside_it_only(self, redis: Any) -> None:
        redis.flushall()
        assert write_answers(redis, [("u", self.answer(5))], 60, beside_record=True) == 1
        assert not redis.exists(recs_key("u"))
        write_records(redis, [("u", UserRecord(last_ts=1))], 60)
        write_answers(redis, [("u", self.answer(5))], 60, beside_record=True)
        assert self.lying(redis) == 5
        assert 0 < redis.ttl(recs_key("u")) <= 60


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_junk_is_corrupt_or_an_answer_and_nothing_else(junk: bytes) -> None:
    for data in (junk, b"\x02" + junk):
        try:
            found = CachedAnswer.decode(data).items()
        except CorruptValue:
            continue
        assert all(isinstance(item, str) and isinstance(score, float) for item, score in found)


def test_items_that_are_not_where_the_header_says_are_corrupt() -> None:
    value = encode_one([0, 1, 2], [3.0, 2.0, 1.0])
    ends = CachedAnswer.decode(value).ends
    at = value.index(np.asarray(ends).tobytes())
    wrong = value[:at] + struct.pack("<3i", 2, 3, int(ends[-1])) + value[at + 12 : -4]
    with pytest.raises(CorruptValue, match="item 0"):
        CachedAnswer.decode(wrong + struct.pack("<I", crc32(wrong))).items()


def test_a_record_is_read_as_it_was_written() -> None:
    features = OnlineFeatures(20, 90, 17, ((1, 2),), ((1, 2),), "home", None, "SE")
    factor = np.array([1.5, -2.0], np.float32)
    record = UserRecord((("i1", "view", 17), ("ü", "cart", 3)), 17, ("i1", "i0"), "v1", factor, features)
    read = UserRecord.decode(values_of(record))
    assert read.features == features
    assert (read.last, read.last_ts, read.seen, read.als_version) == (record.last, 17, ("i1", "i0"), "v1")
    np.testing.assert_array_equal(read.als, record.als)


def test_a_user_of_whom_nothing_is_stored_has_an_empty_record() -> None:
    assert UserRecord.decode([None] * 5) == UserRecord()
    assert UserRecord().encode() == {}


@pytest.mark.parametrize(
    "values",
    [
        (b"{", None, None, None, None),
        (b'[["i"]]', None, None, None, None),
        (b'[["i", "view", "x"]]', None, None, None, None),
        (None, b"now", None, None, None),
        (None, None, b"7", None, None),
        (None, None, b'["a"]\x0012345', None, None),
        (None, None, None, b"v\0abc", None),
        (None, None, None, b"\xff\0abcd", None),
        *(
            (None, None, None, None, bad)
            for bad in (b"{", b"[]", b"7", b'{"at": 1}', b'{"at": 1, "window_days": 1, "hours": [1]}')
        ),
    ],
)
def test_a_record_that_is_none_is_corrupt(values: tuple[bytes | None, ...]) -> None:
    with pytest.raises(CorruptValue):
        UserRecord.decode(values)


def test_users_are_put_together_from_what_the_release_knows() -> None:
    snapshot = make_snapshot(items=60)
    factor = np.ones(16, np.float32)
    records = [
        UserRecord((("item-5", "view", 9), ("gone", "view", 8), ("item-6", "view", 7)), 9, ("item-7",), "factors-1", factor),
        UserRecord(als_version="factors-0", als=factor),
        UserRecord(als_version="factors-1", als=np.ones(3, np.float32)),
    ]
    users = users_of(snapshot, records, RankingSettings(last_items=3), [["item-1"], [], ["gone", "item-2"]])
    assert users.last_items.tolist() == [[5, 6, 7], [-1, -1, -1], [-1, -1, -1]]
    assert users.excluded.tolist() == [[5, 6, 1, 7], [-1, -1, -1, -1], [2, -1, -1, -1]]
    np.testing.assert_array_equal(users.als.any(axis=1), [True, False, False])


def test_what_was_consumed_may_come_again_when_the_settings_say_so() -> None:
    snapshot = make_snapshot(items=60)
    record = UserRecord((("item-5", "view", 9),), 9, ("item-7", "item-8"))
    assert users_of(snapshot, [record], RankingSettings(exclude_consumed=False)).excluded.tolist() == [[]]
    assert users_of(snapshot, [record], RankingSettings(max_consumed=1)).excluded.tolist() == [[5]]


def test_everything_a_user_had_is_left_out_and_the_newest_of_it_stays_readable() -> None:
    snapshot = make_snapshot(items=900)
    items = [f"item-{at}" for at in range(400)]
    record = UserRecord.decode(values_of(UserRecord.with_items(items, 50, 10_000, last=(("item-800", "view", 9),))))
    assert (record.seen, record.items_had) == (tuple(items[:50]), 400)
    assert sorted(consumed(snapshot, record, 10_000).tolist()) == [*range(400), 800]
    [excluded], had = (
        users_of(snapshot, [record], RankingSettings()).excluded,
        users_of(snapshot, [record], RankingSettings()).had,
    )
    assert sorted([*excluded.tolist(), *had[0].tolist()]) == [*range(400), 800]
    few = users_of(snapshot, [record, UserRecord.with_items(items[:90], 50, 10_000)], RankingSettings(max_consumed=120))
    assert sorted(few.excluded[0].tolist()) == [*range(119), 800], "no more than the settings say"
    assert few.excluded[1][few.excluded[1] >= 0].tolist() == [*range(90)]
    assert not few.had
    again = users_of(snapshot, [record], RankingSettings(exclude_consumed=False))
    assert (again.excluded.tolist(), again.had) == ([[]], {})


@pytest.fixture(scope="module")
def snapshot_of_60() -> Snapshot:
    return make_snapshot(items=60)


@settings(deadline=None)
@given(
    acted=st.lists(st.integers(0, 30), max_size=30),
    had=st.lists(st.integers(0, 30), unique=True, max_size=30),
    named=st.integers(0, 30),
    most=st.integers(0, 40),
    last_items=st.integers(1, 8),
)
def test_of_all_that_a_user_had_the_newest_are_left_out_and_the_newest_of_those_are_the_last(
    snapshot_of_60: Snapshot, acted: list[int], had: list[int], named: int, most: int, last_items: int
) -> None:
    """Every second item is known to the release. Of an item without a name nobody can say that `last` has it as well."""
    names = {number: f"item-{number}" if number % 2 else f"gone-{number}" for number in range(31)}
    last = tuple((names[number], "view", 100 - at) for at, number in enumerate(acted))
    record = UserRecord.with_items([names[number] for number in had], named, 10_000, last=last)
    newest = list(dict.fromkeys([*acted, *had[:named]]))
    everything = list(dict.fromkeys([*acted, *had]))
    wanted = {number for number in everything[:most] if number % 2}
    snapshot, settings = snapshot_of_60, RankingSettings(max_consumed=most, last_items=last_items)
    users = users_of(snapshot, [record, UserRecord()], settings)
    found = {*users.excluded[0].tolist(), *consumed(snapshot, record, most).tolist()} - {-1}
    assert found == set(users.excluded[0].tolist()) - {-1} == set(consumed(snapshot, record, most).tolist())
    assert found <= wanted
    twice = len(set(acted) & set(had[named:]))
    assert {number for number in everything[: max(0, most - twice)] if number % 2} <= found
    last_known = [number for number in newest if number % 2][:last_items]
    assert users.last_items[0].tolist() == [*last_known, *[-1] * (last_items - len(last_known))]


def test_a_record_of_very_many_items_is_bounded() -> None:
    settings = Settings()
    items = [f"a-rather-long-item-id-{at:07}" for at in range(30_000)]
    record = UserRecord.with_items(items, settings.features.history, settings.ranking.max_consumed)
    assert record.items_had == settings.ranking.max_consumed == 10_000
    assert len(record.encode()[b"seen"]) < 62_000


def test_the_last_items_are_distinct_and_go_on_where_the_last_actions_end() -> None:
    snapshot = make_snapshot(items=60)
    last = (("item-5", "purchase", 9), ("item-5", "view", 8), ("gone", "view", 7), ("item-6", "view", 6))
    records = [
        UserRecord(last, 9, ("item-6", "item-7", "lost", "item-5", "item-8")),
        UserRecord(seen=("item-9",)),
        UserRecord(),
    ]
    users = users_of(snapshot, records, RankingSettings(last_items=4))
    assert users.last_items.tolist() == [[5, 6, 7, 8], [9, -1, -1, -1], [-1] * 4]


def test_trends_are_read_as_they_were_written() -> None:
    value = TrendingValue(5, "2026-01-01-00", {"a": (1.5, 3.0), "ü": (0.5, 0.25)})
    assert TrendingValue.decode(value.encode()) == value
    one = TrendingValue(5, "2026-01-01-00", {"a": 1.5})
    assert TrendingValue.decode(one.encode()).scores == {"a": (1.5,)}


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"computed_at": 1, "hour": "h", "items": [["a"]]}', b"\xff"])
def test_trends_that_are_none_are_corrupt(data: bytes) -> None:
    with pytest.raises(CorruptValue):
        TrendingValue.decode(data)


def test_the_user_tower_is_asked_with_what_the_record_and_the_request_say() -> None:
    snapshot = with_two_tower(make_snapshot(items=60), ["ann"])
    features = OnlineFeatures(8000, 90, 7000, ((1, 2),), ((1, 2),), "home", "tv", "SE")
    last = (("item-5", "view", 9000), ("item-6", "view", 7000))
    records = [UserRecord(last, 9000, ("item-7", "item-5"), features=features), UserRecord()]
    users = users_of(snapshot, records, RankingSettings(), user_ids=["ann", "guest"], now=50_000, device="mobile")
    inputs = TowerInputs(
        user_ids=["ann", "guest"],
        history=[["item-5", "item-6", "item-7"], []],
        ts_ms=np.array([50_000, 50_000]),
        device=["mobile", "mobile"],
        country=["SE", None],
        category=["home", None],
        counts=np.array([features.counts(50_000, [9000, 7000]), (0, 0, 0, np.nan)], np.float32),
    )
    np.testing.assert_array_equal(users.two_tower, snapshot.tower.vectors(inputs))
    assert users.two_tower.any(axis=1).tolist() == [True, False]
    assert users_of(make_snapshot(items=60), records, RankingSettings()).two_tower is None
