"""The Python clients: the same answers awaited, retries where they are safe, a second call where the first is slow."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from worlds import World

from serving import recsys_pb2 as pb
from serving.client import AsyncRecsysClient, ClientOptions, Filter, RecsysClient, RecsysError
from serving.recsys_pb2_grpc import RecommenderServicer, add_RecommenderServicer_to_server


class Scripted(RecommenderServicer):
    """Answers each call as told: a status, or the seconds to wait before an answer."""

    def __init__(self) -> None:
        self.script: list[grpc.StatusCode | float] = []
        self.calls = 0
        self.metadata: list[dict[str, str]] = []
        self._lock = threading.Lock()
        self.go_on = threading.Event()

    def Recommend(self, request: pb.RecommendRequest, context: grpc.ServicerContext) -> pb.RecommendResponse:
        with self._lock:
            step = self.script[min(self.calls, len(self.script) - 1)]
            self.calls += 1
            number = self.calls
        self.metadata.append(dict(context.invocation_metadata()))
        if isinstance(step, grpc.StatusCode):
            context.abort(step, f"as told, call {number}")
        if step:
            self.go_on.wait(step)
        return pb.RecommendResponse(
            items=[pb.ScoredItem(item_id=f"of-call-{number}")], tier=pb.CACHE, release_id=request.user_id
        )


@pytest.fixture
def scripted() -> Iterator[tuple[Scripted, str]]:
    servicer = Scripted()
    server = grpc.server(ThreadPoolExecutor(8))
    add_RecommenderServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    servicer.go_on.set()
    server.stop(None)


def ask(address: str, asynchronously: bool, **options: object) -> str:
    """The item of one Recommend."""
    made = ClientOptions(**{"timeout": 60.0, **options})  # type: ignore[arg-type]
    if not asynchronously:
        with RecsysClient(address, options=made) as client:
            return client.recommend("ann").items[0].item_id

    async def awaited() -> str:
        async with AsyncRecsysClient(address, options=made) as client:
            return (await client.recommend("ann")).items[0].item_id

    return asyncio.run(awaited())


BOTH = pytest.mark.parametrize("asynchronously", [False, True], ids=["sync", "asyncio"])


@BOTH
@pytest.mark.parametrize("status", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_a_call_that_may_succeed_later_is_tried_again(
    scripted: tuple[Scripted, str], asynchronously: bool, status: grpc.StatusCode
) -> None:
    servicer, address = scripted
    servicer.script = [status, status, 0.0]
    assert ask(address, asynchronously) == "of-call-3"


@BOTH
def test_the_attempts_have_an_end(scripted: tuple[Scripted, str], asynchronously: bool) -> None:
    servicer, address = scripted
    servicer.script = [grpc.StatusCode.UNAVAILABLE]
    with pytest.raises(RecsysError, match="UNAVAILABLE: as told, call 2"):
        ask(address, asynchronously, attempts=2)
    assert servicer.calls == 2


@BOTH
def test_a_call_that_is_wrong_is_not_tried_again(scripted: tuple[Scripted, str], asynchronously: bool) -> None:
    servicer, address = scripted
    servicer.script = [grpc.StatusCode.INVALID_ARGUMENT]
    with pytest.raises(RecsysError, match="INVALID_ARGUMENT: as told, call 1"):
        ask(address, asynchronously)
    assert servicer.calls == 1


@BOTH
def test_a_slow_call_is_sent_a_second_time_and_the_first_answer_taken(
    scripted: tuple[Scripted, str], asynchronously: bool
) -> None:
    servicer, address = scripted
    servicer.script = [55.0, 0.0]
    started = time.monotonic()
    assert ask(address, asynchronously, hedge_after=0.05) == "of-call-2"
    assert time.monotonic() - started < 50, "the slow one was not waited for"


@BOTH
def test_a_second_call_that_fails_leaves_the_first(scripted: tuple[Scripted, str], asynchronously: bool) -> None:
    servicer, address = scripted
    servicer.script = [0.5, grpc.StatusCode.INVALID_ARGUMENT]
    assert ask(address, asynchronously, hedge_after=0.05) == "of-call-1"


@BOTH
def test_a_quick_call_is_not_sent_twice(scripted: tuple[Scripted, str], asynchronously: bool) -> None:
    servicer, address = scripted
    servicer.script = [0.0]
    assert ask(address, asynchronously, hedge_after=30.0) == "of-call-1"
    assert servicer.calls == 1


@BOTH
def test_the_deadline_holds_for_all_of_it(scripted: tuple[Scripted, str], asynchronously: bool) -> None:
    servicer, address = scripted
    servicer.script = [55.0]
    with pytest.raises(RecsysError, match="DEADLINE_EXCEEDED"):
        ask(address, asynchronously, timeout=0.3, hedge_after=0.1)


def test_the_token_and_the_request_id_go_with_a_call(scripted: tuple[Scripted, str]) -> None:
    servicer, address = scripted
    servicer.script = [0.0]
    with RecsysClient(address, options=ClientOptions(timeout=60, token="t")) as client:
        client.recommend("ann", request_id="r-1")
    assert servicer.metadata[0]["authorization"] == "Bearer t"
    assert servicer.metadata[0]["x-request-id"] == "r-1"


async def test_both_clients_say_that_nobody_is_there() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        with RecsysClient(address) as client, pytest.raises(RecsysError, match=f"{address} does not answer after 0.2 s"):
            client.wait_until_ready(0.2)
        async with AsyncRecsysClient(address) as awaited:
            with pytest.raises(RecsysError, match=f"{address} does not answer after 0.2 s"):
                await awaited.wait_until_ready(0.2)


async def test_the_asyncio_client_gives_what_the_other_gives(world: World) -> None:
    world.put_cached_user("ann")

    async def users() -> AsyncIterator[str]:
        for user in ("ann", "bob"):
            yield user

    async with AsyncRecsysClient(world.address, timeout=60) as client:
        assert (await client.recommend("ann", 7)).items == world.client.recommend("ann", 7).items
        await client.wait_until_ready(60)
        batch = await client.recommend_batch(["ann", "bob"], 3, current_item="item-5")
        same = world.client.recommend_batch(["ann", "bob"], 3, current_item="item-5")
        assert [(a.tier, a.items) for a in batch] == [(a.tier, a.items) for a in same]
        assert same[1].tier == "REALTIME_ALS_ONLY"
        assert [a.tier async for a in client.recommend_stream(users())] == ["CACHE", "POPULAR"]
        assert (await client.similar_items("item-1", 3)).items == world.client.similar_items("item-1", 3).items
        assert (await client.trending(3)).items == world.client.trending(3).items
        assert (await client.get_release()).release_id == world.snapshot.release_id
        with pytest.raises(RecsysError, match="NOT_FOUND"):
            await client.similar_items("never")


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: client.recommend("ann", categories="sports"),
        lambda client: client.recommend("ann", exclude="item-1"),
        lambda client: client.recommend("ann", filter=Filter(attributes={"colour": "red"})),
        lambda client: client.recommend_batch("ann"),
        lambda client: client.recommend_batch(["ann"], exclude="item-1"),
        lambda client: client.similar_items("item-1", categories="sports"),
        lambda client: client.trending(exclude="item-1"),
    ],
)
def test_a_text_in_the_place_of_a_list_is_not_taken_letter_by_letter(ask: Callable[[RecsysClient], object]) -> None:
    with RecsysClient("127.0.0.1:1") as client, pytest.raises(TypeError, match=r"'.+'; it must be a list"):
        ask(client)
