"""A caller gets the answer to its own request, whatever shares its batch and whatever lies in the cache."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import grpc
import pyarrow as pa
import pytest
from google.protobuf.descriptor import Descriptor
from snapshots import make_snapshot, with_two_tower
from worlds import World, eventually

from recsys_core.online import CachedAnswer, UserRecord, recs_key
from recsys_core.ranking import Snapshot
from serving import recsys_pb2 as pb
from serving.recsys_pb2_grpc import RecommenderStub
from serving.validation import options_of

LAST = (("item-3", "view", 1_000), ("item-5", "view", 900))
NOON = 1_770_000_000_000
MATTERS: dict[str, dict[str, Any]] = {
    "count": {"count": 3},
    "context.device": {"context": {"device": "desktop"}},
    "context.ts_ms": {"context": {"ts_ms": NOON}},
    "context.current_item_id": {"context": {"current_item_id": "item-9"}},
    "context.country": {"context": {"country": "FR"}},
    "categories": {"categories": ["sports"]},
    "exclude_item_ids": {"exclude_item_ids": [f"item-{n}" for n in range(250)]},
    "explain": {"explain": True},
    "filter.min_price": {"filter": {"min_price": 50.0}},
    "filter.max_price": {"filter": {"max_price": 50.0}},
    "filter.attributes.name": {"filter": {"attributes": [{"name": "colour", "values": ["red"]}]}},
    "filter.attributes.values": {"filter": {"attributes": [{"name": "size", "values": ["1", "2"]}]}},
    "filter.include_unavailable": {"filter": {"include_unavailable": True}},
    "diversity.relevance": {"diversity": {"relevance": 0.1}},
    "diversity.max_per_category": {"diversity": {"max_per_category": 1}},
    "include_consumed": {"include_consumed": True},
}
"""Every field of a request apart from whom it is for, with a value that changes the answer."""


def leaves(message: Descriptor, prefix: str = "") -> Iterator[str]:
    """The fields of a message and of those in it."""
    for field in message.fields:
        if field.message_type is None:
            yield prefix + field.name
        else:
            yield from leaves(field.message_type, f"{prefix}{field.name}.")


def test_every_field_of_a_request_is_known_here() -> None:
    """A new field fails this test until it stands in MATTERS, where the tests below hold it."""
    assert set(leaves(pb.RecommendRequest.DESCRIPTOR)) == {"user_id", *MATTERS}
    assert set(leaves(pb.RecommendBatchRequest.DESCRIPTOR)) == {"user_ids", *MATTERS}


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    """A release whose user tower has much to say, with unavailable items and attributes."""
    made = make_snapshot(unavailable=tuple(range(10, 500, 3)))
    weights = {"als_weight": 0.1, "two_tower_weight": 5.0, "popular_weight": 0.0, "trend_weight": 0.0}
    values = [json.dumps({"colour": "red" if n % 3 else "blue", "size": n % 4}) for n in range(made.items.num_rows)]
    at = made.items.schema.get_field_index("attributes")
    items = made.items.set_column(at, "attributes", pa.array(values))
    return with_two_tower(replace(made, items=items, ranking=made.ranking.model_copy(update=weights)), ["ann", "bob"])


@pytest.fixture
def served(empty_world: World, snapshot: Snapshot) -> World:
    empty_world.promote(snapshot)
    empty_world.start()
    for user in ("ann", "bob"):
        empty_world.put_record(user, UserRecord(last=LAST, last_ts=1_000))
        best = empty_world.client.recommend(user, 3)
        empty_world.put_record(user, UserRecord(seen=tuple(item.item_id for item in best)))
    return empty_world


@pytest.fixture
def stub(served: World) -> Iterator[RecommenderStub]:
    with grpc.insecure_channel(served.address) as channel:
        yield RecommenderStub(channel)


def items_of(response: pb.RecommendResponse) -> dict[str, Any]:
    return {item.item_id: pytest.approx(item.score, rel=1e-3, abs=1e-4) for item in response.items}


def forget_answers(world: World) -> None:
    """Empty the cache once all write-backs are over."""
    eventually(lambda: not world.server.ladder._writes)
    world.redis.client.delete(recs_key("ann"), recs_key("bob"))


@pytest.mark.parametrize("field", MATTERS)
def test_a_field_that_changes_an_answer_never_changes_another_callers(served: World, stub: RecommenderStub, field: str) -> None:
    plain, other = pb.RecommendRequest(user_id="ann"), pb.RecommendRequest(user_id="ann", **MATTERS[field])
    alone = {}
    for name, request in (("plain", plain), ("other", other)):
        forget_answers(served)
        alone[name] = stub.Recommend(request, timeout=60)
    assert alone["plain"].tier == alone["other"].tier == pb.REALTIME
    assert field == "explain" or items_of(alone["plain"]) != items_of(alone["other"]), "the field matters"

    for first, second in ((plain, other), (other, plain)):
        forget_answers(served)
        stub.Recommend(first, timeout=60)
        eventually(lambda: not served.server.ladder._writes)
        wanted = alone["other" if second is other else "plain"]
        found = stub.Recommend(second, timeout=60)
        assert items_of(found) == items_of(wanted), "what lies in the cache now is not for it"
        assert found.HasField("explanation") == wanted.HasField("explanation")

    forget_answers(served)
    answers = together(served, stub, [plain, other, pb.RecommendRequest(user_id="bob"), plain])
    assert [items_of(answers[at]) for at in (0, 1, 3)] == [items_of(alone[name]) for name in ("plain", "other", "plain")]


def together(world: World, stub: RecommenderStub, requests: list[pb.RecommendRequest]) -> list[pb.RecommendResponse]:
    """The answers of calls that wait for the ranking threads at the same time."""
    rankers, hold = world.server.ladder.rankers, threading.Event()
    for ranker in rankers:
        ranker._thread.submit(hold.wait, 60)
    zed = {"user_id": "zed", "context": {"current_item_id": "item-1"}}
    calls = [stub.Recommend.future(pb.RecommendRequest(**zed, explain=explain), timeout=60) for explain in (False, True)]
    eventually(lambda: sum(ranker._running is not None and not ranker._waiting for ranker in rankers) == len(calls))
    for number, request in enumerate(requests, 1):
        calls.append(stub.Recommend.future(request, timeout=60))
        eventually(lambda number=number: sum(len(ranker._waiting) for ranker in rankers) == number)
    hold.set()
    return [call.result() for call in calls][2:]


@pytest.mark.parametrize("field", MATTERS)
def test_a_batch_is_answered_as_the_single_calls_are(served: World, stub: RecommenderStub, field: str) -> None:
    single = []
    for user in ("ann", "bob"):
        forget_answers(served)
        single.append(stub.Recommend(pb.RecommendRequest(user_id=user, **MATTERS[field]), timeout=60))
    forget_answers(served)
    batch = stub.RecommendBatch(pb.RecommendBatchRequest(user_ids=["ann", "bob"], **MATTERS[field]), timeout=60)
    assert [items_of(answer) for answer in batch.responses] == [items_of(answer) for answer in single]


def test_a_cached_answer_has_no_context(served: World, stub: RecommenderStub) -> None:
    forget_answers(served)
    stub.Recommend(pb.RecommendRequest(user_id="ann", context={"ts_ms": 2**62, "device": "toaster"}), timeout=60)
    eventually(lambda: not served.server.ladder._writes)
    assert not served.redis.client.exists(recs_key("ann"))
    plain = stub.Recommend(pb.RecommendRequest(user_id="ann"), timeout=60)
    eventually(lambda: served.redis.client.exists(recs_key("ann")))
    cached = CachedAnswer.decode(served.redis.client.get(recs_key("ann")))
    assert [item for item, _ in cached.items()][:10] == [item.item_id for item in plain.items]


def test_a_release_that_takes_no_notice_of_place_and_time_answers_from_the_cache_whatever_they_are(world: World) -> None:
    world.put_cached_user("ann")
    with grpc.insecure_channel(world.address) as channel:
        context = {"device": "mobile", "country": "DE", "ts_ms": NOON}
        assert RecommenderStub(channel).Recommend(pb.RecommendRequest(user_id="ann", context=context)).tier == pb.CACHE


@pytest.mark.parametrize("field", MATTERS)
def test_every_field_is_part_of_the_options_and_makes_an_answer_uncacheable_or_is_the_count(served: World, field: str) -> None:
    plain = options_of(pb.RecommendRequest(user_id="ann"), served.settings)
    other = options_of(pb.RecommendRequest(user_id="ann", **MATTERS[field]), served.settings)
    assert other != plain
    assert other.plain == (field == "count")
