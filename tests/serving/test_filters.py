"""Filters, diversity, consumed items, streams and trends: what an answer may hold, and that it holds it when it can."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections import Counter
from collections.abc import Iterator

import numpy as np
import orjson
import pyarrow as pa
import pytest
from snapshots import make_snapshot
from worlds import World, eventually

from recsys_core.online import UserRecord
from serving import recsys_pb2 as pb
from serving.client import Diversity, Filter, Recommendation, RecsysError
from serving.server import STREAM_WINDOW

COLOURS = ("red", "blue", "green")


@pytest.fixture
def shop(empty_world: World) -> World:
    """500 items with prices 0, 1, 2, …, a colour and a size; every seventh without a price; 3 and 4 unavailable."""
    snapshot = make_snapshot(unavailable=(3, 4))
    items = snapshot.items
    attributes = [orjson.dumps({"colour": COLOURS[i % 3], "size": i % 4, "new": i % 2 == 0}).decode() for i in range(500)]
    prices = pa.array([None if i % 7 == 0 else float(i) for i in range(500)], pa.float64())
    items = items.set_column(items.schema.get_field_index("price"), "price", prices)
    items = items.set_column(items.schema.get_field_index("attributes"), "attributes", pa.array(attributes))
    object.__setattr__(snapshot, "items", items)
    empty_world.promote(snapshot)
    empty_world.start()
    empty_world.put_known_user("ann")
    return empty_world


def numbers(answer: Recommendation) -> list[int]:
    return [int(item.item_id.removeprefix("item-")) for item in answer]


class TestFilters:
    @pytest.mark.parametrize("user", ["ann", "nobody"])
    def test_a_price_range_is_kept_and_the_answer_is_full(self, shop: World, user: str) -> None:
        found = numbers(shop.client.recommend(user, 40, filter=Filter(min_price=100, max_price=200)))
        assert len(found) == 40
        assert all(100 <= i <= 200 and i % 7 for i in found), "an item without a price is in no range"

    @pytest.mark.parametrize(
        ("attributes", "holds"),
        [
            ({"colour": ["red"]}, lambda i: i % 3 == 0),
            ({"colour": ["red", "blue"]}, lambda i: i % 3 in (0, 1)),
            ({"size": ["2"]}, lambda i: i % 4 == 2),
            ({"new": ["true"], "colour": ["green"]}, lambda i: i % 2 == 0 and i % 3 == 2),
        ],
    )
    def test_any_attribute_of_the_catalogue_can_be_asked_for(self, shop: World, attributes: dict, holds) -> None:
        found = numbers(shop.client.recommend("ann", 50, filter=Filter(attributes=attributes)))
        assert len(found) == 50
        assert all(map(holds, found))

    def test_all_conditions_hold_together(self, shop: World) -> None:
        wanted = Filter(min_price=50, max_price=450, attributes={"colour": ["blue"]})
        found = numbers(shop.client.recommend("ann", 20, categories=["books"], filter=wanted))
        assert found
        assert all(50 <= i <= 450 and i % 3 == 1 and i % 5 in (2, 3) for i in found)

    @pytest.mark.parametrize("attributes", [{"colour": ["violet"]}, {"weight": ["1"]}])
    def test_what_no_item_has_is_an_empty_answer(self, shop: World, attributes: dict) -> None:
        assert numbers(shop.client.recommend("ann", filter=Filter(attributes=attributes))) == []

    def test_unavailable_items_come_only_when_they_are_asked_for(self, shop: World) -> None:
        everything = Filter(include_unavailable=True)
        assert {3, 4} <= set(numbers(shop.client.recommend("nobody", 500, filter=everything)))
        assert not {3, 4} & set(numbers(shop.client.recommend("nobody", 500)))

    def test_a_filtered_answer_is_not_kept_as_the_plain_one(self, shop: World) -> None:
        shop.client.recommend("ann", filter=Filter(max_price=10))
        assert max(numbers(shop.client.recommend("ann", 50))) > 10

    def test_similar_items_and_trends_take_the_same_filters(self, shop: World) -> None:
        cheap = Filter(max_price=100, attributes={"colour": ["red"]})
        similar = [int(i.item_id.removeprefix("item-")) for i in shop.client.similar_items("item-20", 20, filter=cheap)]
        trending = [int(i.item_id.removeprefix("item-")) for i in shop.client.trending(20, filter=cheap)]
        for found in (similar, trending):
            assert len(found) == 20
            assert all(i <= 100 and i % 3 == 0 and i % 7 for i in found)

    def test_similar_items_of_the_same_category(self, world: World) -> None:
        found = world.client.similar_items("item-21", 30, same_category=True)
        assert {item.category for item in found} == {"sports/balls"}


class TestDiversity:
    def test_no_category_has_more_than_its_share(self, world: World) -> None:
        world.put_known_user("ann")
        answer = world.client.recommend("ann", 12, diversity=Diversity(max_per_category=3), explain=True)
        counts = Counter(item.category for item in answer if item.category)
        assert len(answer) == 12
        assert max(counts.values()) <= 3

    def test_the_same_holds_for_what_is_popular(self, world: World) -> None:
        answer = world.client.recommend("nobody", 10, diversity=Diversity(max_per_category=2), explain=True)
        counts = Counter(item.category for item in answer if item.category)
        assert len(answer) == 10
        assert max(counts.values()) <= 2

    def test_less_relevance_is_less_likeness(self, world: World) -> None:
        world.put_known_user("ann")

        def likeness(relevance: float) -> float:
            answer = world.client.recommend("ann", 20, diversity=Diversity(relevance=relevance))
            at = [int(item.item_id.removeprefix("item-")) for item in answer]
            vectors = world.snapshot.als_items[at]
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
            cosines = vectors @ vectors.T
            return float(cosines[np.triu_indices(len(at), 1)].mean())

        assert likeness(0.3) < likeness(0.7) - 0.01 < likeness(1.0)

    def test_full_relevance_is_the_plain_order(self, world: World) -> None:
        world.put_known_user("ann")
        plain = [item.item_id for item in world.client.recommend("ann", 20)]
        assert [i.item_id for i in world.client.recommend("ann", 20, diversity=Diversity(max_per_category=500))] == plain


class TestConsumed:
    def test_consumed_items_come_back_when_they_are_asked_for(self, world: World) -> None:
        seen = [f"item-{i}" for i in range(0, 100, 10)]
        world.put_known_user("ann", taste=0, seen=seen)
        without = {item.item_id for item in world.client.recommend("ann", 50)}
        having = {item.item_id for item in world.client.recommend("ann", 50, include_consumed=True)}
        assert not without & set(seen)
        assert having & set(seen)


class TestTrending:
    def test_what_trends_comes_first_with_its_strength_then_what_is_popular(self, world: World) -> None:
        world.put_trend({"item-400": 50.0, "item-401": 20.0, "item-3": 99.0})
        eventually(lambda: world.client.trending(1).items[0].item_id == "item-400")
        found = world.client.trending(4)
        assert [item.item_id for item in found] == ["item-400", "item-401", "item-0", "item-1"], "3 is unavailable"
        assert found.items[0].score > found.items[1].score > found.items[2].score == 0
        assert found.release_id == world.snapshot.release_id

    def test_excluded_items_and_other_categories_are_left_out(self, world: World) -> None:
        world.put_trend({"item-400": 50.0, "item-402": 20.0})
        eventually(lambda: world.client.trending(1).items[0].item_id == "item-400")
        found = world.client.trending(10, categories=["books"], exclude=["item-402"])
        assert {item.category for item in found} == {"books/novels", "books/comics"}
        assert "item-402" not in {item.item_id for item in found}


class TestStream:
    def test_answers_come_in_the_order_of_the_requests(self, world: World) -> None:
        users = [f"user-{i}" for i in range(100)]
        for i, user in enumerate(users):
            if i % 2:
                world.put_cached_user(user, taste=i)
        streamed = list(world.client.recommend_stream(users, 5))
        single = [world.client.recommend(user, 5) for user in users]
        assert [[i.item_id for i in a] for a in streamed] == [[i.item_id for i in a] for a in single]

    def test_an_answer_comes_while_the_stream_is_open(self, world: World) -> None:
        answered = threading.Event()

        def users() -> Iterator[str]:
            yield "ann"
            assert answered.wait(60), "the first answer is there before the second request is sent"
            yield "bob"

        tiers = []
        for answer in world.client.recommend_stream(users()):
            tiers.append(answer.tier)
            answered.set()
        assert tiers == ["POPULAR", "POPULAR"]

    def test_a_bad_request_ends_the_stream_after_the_answers_before_it(self, world: World) -> None:
        answers: list[str] = []
        with pytest.raises(RecsysError, match="INVALID_ARGUMENT: user_id is empty"):
            answers.extend(answer.tier for answer in world.client.recommend_stream(["ann", "bob", "", "eve"]))
        assert answers == ["POPULAR", "POPULAR"]

    def test_what_reads_a_refused_stream_ends_with_it_though_the_client_goes_on(self, world: World) -> None:
        """It is not cancelled, which leaks in gRPC (`benchmarks/serving_fuzz.py` measures that)."""
        answered, done = threading.Event(), threading.Event()

        def readers() -> list[str]:
            tasks = asyncio.all_tasks(world._loop.loop)
            return [name for t in tasks if (name := t.get_coro().__qualname__).endswith("_in_order.<locals>.read")]

        def users() -> Iterator[str]:
            yield "ann"
            assert answered.wait(60)
            yield ""
            done.wait(60)

        answers = world.client.recommend_stream(users())
        assert next(answers).tier == "POPULAR"
        assert len(readers()) == 1
        answered.set()
        with pytest.raises(RecsysError, match="INVALID_ARGUMENT"):
            next(answers)
        eventually(lambda: not readers())
        done.set()

    def test_a_stream_that_is_given_up_leaves_nothing_behind(self, world: World) -> None:
        call = world.client._stub.RecommendStream(iter([pb.RecommendRequest(user_id="ann")] * 5))
        next(call)
        call.cancel()
        eventually(lambda: world.server.metrics.gauges["calls_under_way"]() == 0)
        assert world.client.recommend("ann").tier == "POPULAR"

    def test_what_is_under_way_ends_with_the_stream_and_is_counted_as_given_up(
        self, world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        go_on = threading.Event()
        monkeypatch.setattr("serving.ladder.rank", lambda *_: go_on.wait(60))
        world.put_known_user("ann")
        requests = [pb.RecommendRequest(user_id=user_id) for user_id in ["ann", "", "", *["ann"] * 40]]
        call = world.client._stub.RecommendStream(iter(requests))
        eventually(lambda: world.server.metrics.gauges["calls_under_way"]() == STREAM_WINDOW - 2)
        call.cancel()
        eventually(lambda: dict(world.server.metrics.calls) == {("RecommendStream", "CANCELLED"): 1})
        assert world.server.metrics.gauges["calls_under_way"]() == 0
        go_on.set()
        gc.collect()
        assert not [record for record in caplog.records if record.name == "asyncio"]


class TestExplained:
    def test_who_proposed_an_item_and_which_actions_speak_for_it(self, world: World) -> None:
        last = (("item-25", "click", 2_000), ("item-17", "view", 1_000))
        world.put_record("ann", UserRecord(last=last, last_ts=2_000))
        answer = world.client.recommend("ann", 20, explain=True)
        assert [(a.item_id, a.event_type, a.ts_ms) for a in answer.last_actions] == list(last)
        of_cluster = [item for item in answer if int(item.item_id.removeprefix("item-")) % 10 == 5]
        assert of_cluster
        for item in of_cluster:
            assert item.moved_by[0].item_id == "item-25"
            assert {"als", "session"} & set(item.sources)
        assert all(item.sources for item in answer)
