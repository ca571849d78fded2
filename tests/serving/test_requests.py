"""Requests that break a rule get a status that names the rule; nothing gets UNKNOWN or INTERNAL."""

from __future__ import annotations

import re

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from snapshots import make_snapshot
from worlds import World, eventually

from serving import recsys_pb2 as pb
from serving.client import RecsysError

RECOMMENDER = "/recsys.v1.Recommender/"
ALLOWED = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
REQUESTS = {
    "Recommend": pb.RecommendRequest,
    "RecommendBatch": pb.RecommendBatchRequest,
    "RecommendStream": pb.RecommendRequest,
    "SimilarItems": pb.SimilarItemsRequest,
    "Trending": pb.TrendingRequest,
    "GetRelease": pb.GetReleaseRequest,
}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "user_id is empty"),
        ({"user_id": "a" * 257}, "user_id has 257 bytes; 256 are allowed"),
        ({"user_id": "é" * 129}, "user_id has 258 bytes"),
        ({"user_id": "a", "count": 0}, "count is 0; it must be 1 to 500"),
        ({"user_id": "a", "count": -3}, "count is -3"),
        ({"user_id": "a", "count": 10_000}, "count is 10000; it must be 1 to 500"),
        ({"user_id": "a", "categories": ["sports", ""]}, r"categories\[1\] is empty"),
        ({"user_id": "a", "categories": ["c"] * 51}, "categories holds 51 values; 50 are allowed"),
        ({"user_id": "a", "exclude_item_ids": ["i"] * 1001}, "exclude_item_ids holds 1001 values; 1000 are allowed"),
        ({"user_id": "a", "exclude_item_ids": ["i" * 300]}, r"exclude_item_ids\[0\] has 300 bytes"),
        ({"user_id": "a", "context": {"current_item_id": "i" * 300}}, "context.current_item_id has 300 bytes"),
        ({"user_id": "a", "context": {"country": "c" * 300}}, "context.country has 300 bytes"),
        ({"user_id": "a", "filter": {"min_price": float("nan")}}, "filter.min_price is not a number"),
        ({"user_id": "a", "filter": {"attributes": [{"name": ""}]}}, r"filter.attributes\[0\].name is empty"),
        ({"user_id": "a", "filter": {"attributes": [{"name": "n"}] * 21}}, "filter.attributes holds 21 attributes"),
        ({"user_id": "a", "diversity": {"relevance": 1.5}}, "diversity.relevance is 1.5; it must be 0 to 1"),
        ({"user_id": "a", "diversity": {"max_per_category": -1}}, "diversity.max_per_category is -1"),
    ],
)
def test_a_bad_recommend_request_names_its_field(world: World, request_: dict[str, object], message: str) -> None:
    status, said = call_raw(world, "Recommend", pb.RecommendRequest(**request_).SerializeToString())
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert re.search(message, said)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "user_ids holds 0 users; it must hold 1 to 10000"),
        ({"user_ids": ["a"] * 10_001}, "user_ids holds 10001 users"),
        ({"user_ids": ["a", ""]}, r"user_ids\[1\] is empty"),
        ({"user_ids": ["a"], "count": 0}, "count is 0"),
        ({"user_ids": ["a"] * 5000, "count": 500}, "user_ids × count is 2500000 items; it may be 1000000 at most"),
    ],
)
def test_a_bad_batch_names_its_field(world: World, request_: dict[str, object], message: str) -> None:
    status, said = call_raw(world, "RecommendBatch", pb.RecommendBatchRequest(**request_).SerializeToString())
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert re.search(message, said)


@pytest.mark.parametrize(
    ("request_", "message"),
    [({}, "item_id is empty"), ({"item_id": "i", "count": 0}, "count is 0"), ({"item_id": "i" * 300}, "item_id has 300 bytes")],
)
def test_a_bad_similar_request_names_its_field(world: World, request_: dict[str, object], message: str) -> None:
    status, said = call_raw(world, "SimilarItems", pb.SimilarItemsRequest(**request_).SerializeToString())
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert re.search(message, said)


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a\x03\xff\xfe\xfd",  # an id that is not UTF-8
        b"\x0a\x7fab",  # a length beyond the end
        b"\x12\x03abc",  # text where the count is
        b"\xff" * 50,
    ],
)
@pytest.mark.parametrize("method", ["Recommend", "RecommendBatch", "RecommendStream", "SimilarItems"])
def test_bytes_that_are_no_request_are_an_invalid_argument(world: World, method: str, data: bytes) -> None:
    status, message = call_raw(world, method, data)
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert message


def call_raw(world: World, method: str, data: bytes) -> tuple[grpc.StatusCode, str]:
    try:
        if method == "RecommendStream":
            list(world.client._channel.stream_stream(RECOMMENDER + method)(iter([data]), timeout=60))
        else:
            world.client._channel.unary_unary(RECOMMENDER + method)(data, timeout=60)
    except grpc.RpcError as error:
        return error.code(), error.details()
    return grpc.StatusCode.OK, ""


ids = st.one_of(st.just("item-1"), st.text(max_size=20), st.text(min_size=250, max_size=300))
counts = st.one_of(st.integers(-2, 600), st.sampled_from([-(2**31), 2**31 - 1]))
fields = {
    "count": counts,
    "categories": st.lists(st.one_of(st.just("sports"), st.text(max_size=10)), max_size=4),
    "exclude_item_ids": st.lists(ids, max_size=4),
}
number = st.one_of(st.floats(), st.floats(0, 100))
attribute = st.builds(pb.AttributeFilter, name=ids, values=st.lists(ids, max_size=3))
item_filter = st.builds(
    pb.Filter, min_price=number, max_price=number, attributes=st.lists(attribute, max_size=3), include_unavailable=st.booleans()
)
fields["filter"] = st.one_of(st.none(), item_filter)
diversity = st.builds(pb.Diversity, relevance=st.floats(-1, 2, width=32), max_per_category=st.integers(-2, 5))
shaped = {"diversity": st.one_of(st.none(), diversity), "include_consumed": st.booleans(), "explain": st.booleans()}
context = st.builds(pb.Context, current_item_id=ids, ts_ms=st.integers(-(2**63), 2**63 - 1), device=st.text(max_size=5))
messages = st.one_of(
    st.builds(pb.RecommendRequest, user_id=ids, context=context, **fields, **shaped),
    st.builds(pb.RecommendBatchRequest, user_ids=st.lists(ids, max_size=5), context=context, **fields, **shaped),
    st.builds(pb.SimilarItemsRequest, item_id=ids, same_category=st.booleans(), **fields),
    st.builds(pb.TrendingRequest, **fields),
).map(lambda message: message.SerializeToString())


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(messages))
    for _ in range(draw(st.integers(0, 4))):
        if data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))]) if draw(st.booleans()) else bytes(data)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(method=st.sampled_from(sorted(REQUESTS)), data=st.one_of(st.binary(max_size=200), mutated()))
def test_no_bytes_at_all_make_the_server_fail(world: World, method: str, data: bytes) -> None:
    status, _ = call_raw(world, method, data)
    assert status in ALLOWED
    assert world.server.ladder.counts["unexpected_failures"] == 0
    assert world.server.ladder.counts["failed_rankings"] == 0


def test_a_fault_in_a_method_is_logged_and_not_internal(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("serving.ladder.similar_items", lambda *_: 1 / 0)
    with pytest.raises(RecsysError, match="UNAVAILABLE"):
        world.client.similar_items("item-1")
    assert "ZeroDivisionError" in caplog.text


def test_a_fault_in_an_answer_is_logged_and_popular_is_served(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("serving.ladder.is_known", lambda *_: 1 / 0)
    assert world.client.recommend("ann").tier == "POPULAR"
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("where", ["is_known", "rank"])
def test_what_fails_with_every_call_is_told_now_and_then(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    world.put_known_user("ann")
    monkeypatch.setattr(f"serving.ladder.{where}", lambda *_: 1 / 0)
    monkeypatch.setattr("serving.ladder.similar_items", lambda *_: {}["x"])
    for _ in range(20):
        assert world.client.recommend("ann").tier == "POPULAR"
        with pytest.raises(RecsysError):
            world.client.similar_items("item-1")
    told = [record.exc_info[0] for record in caplog.records if record.exc_info]
    assert sorted(kind.__name__ for kind in told) == ["KeyError", "ZeroDivisionError"]


def test_an_unknown_method_is_unimplemented(world: World) -> None:
    assert call_raw(world, "Guess", b"")[0] is grpc.StatusCode.UNIMPLEMENTED


def test_every_method_of_the_proto_is_served(world: World) -> None:
    for method in pb.DESCRIPTOR.services_by_name["Recommender"].methods:
        assert method.input_type._concrete_class is REQUESTS[method.name]
        assert call_raw(world, method.name, b"")[0] is not grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("service", ["", "recsys.v1.Recommender"])
def test_health_follows_the_release(empty_world: World, service: str) -> None:
    def status() -> int:
        stub = health_pb2_grpc.HealthStub(empty_world.client._channel)
        return int(stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=60).status)

    empty_world.start()
    assert status() == health_pb2.HealthCheckResponse.NOT_SERVING
    empty_world.promote(make_snapshot())
    eventually(lambda: status() == health_pb2.HealthCheckResponse.SERVING)


def test_reflection_describes_the_service(world: World) -> None:
    database = ProtoReflectionDescriptorDatabase(world.client._channel)
    assert "recsys.v1.Recommender" in database.get_services()
    service = DescriptorPool(database).FindServiceByName("recsys.v1.Recommender")
    assert {m.name for m in service.methods} == set(REQUESTS)
