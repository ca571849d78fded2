"""gRPC's count of the calls that wait, at a real server that is behind."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from worlds import World, eventually

from serving import crowd
from serving import recsys_pb2 as pb
from serving.crowd import GATHERED_USERS, QUEUE

STREAMS = 3


def waiting(world: World) -> float:
    return world.server.metrics.gauges["calls_waiting"]()


def test_calls_that_no_handler_has_seen_are_counted_and_share_their_reads(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crowd, "GATHER_SECONDS", 1.0)  # however slow the machine, all calls come within it
    calls = 4 * QUEUE
    world.put_cached_user("ann")
    go_on = threading.Event()
    world.call_soon(go_on.wait, 60)
    asked = [world.client._stub.Recommend.future(pb.RecommendRequest(user_id="ann"), timeout=60) for _ in range(calls)]
    eventually(lambda: waiting(world) == calls)
    before = sum(world.server.metrics.steps["redis"].counts)
    go_on.set()
    assert {call.result().tier for call in asked} == {pb.CACHE}
    assert sum(world.server.metrics.steps["redis"].counts) - before == math.ceil(calls / GATHERED_USERS)
    eventually(lambda: waiting(world) == 0)


def test_open_streams_and_watchers_of_the_health_do_not_wait(world: World) -> None:
    go_on = threading.Event()

    def requests() -> Iterator[pb.RecommendRequest]:
        yield pb.RecommendRequest(user_id="ann")
        go_on.wait(60)

    streams = [world.client._stub.RecommendStream(requests()) for _ in range(STREAMS)]
    assert [next(stream).tier for stream in streams] == [pb.POPULAR] * STREAMS
    with grpc.insecure_channel(world.address) as channel:
        watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
        eventually(lambda: waiting(world) == 0)
        assert world.server.metrics.gauges["calls_under_way"]() == 0
        watched.cancel()
    go_on.set()
    assert [list(stream) for stream in streams] == [[]] * STREAMS
    eventually(lambda: waiting(world) == 0)
