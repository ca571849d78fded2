"""Filters, diversity, consumed items, streams and trends: what an answer may hold, and that it holds it when it can."""

from __future__ import annotations

import asyncio
import gc
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import numpy as np
import orjson
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from snapshots import make_snapshot
from typer.testing import CliRunner
from worlds import World, eventually

from recsys_cli.main import app
from recsys_core.online import UserRecord
from recsys_core.ranking import Snapshot
from serving import recsys_pb2 as pb
from serving.client import Diversity, Filter, Recommendation, RecsysError
from serving.filters import ItemFilters
from serving.server import STREAM_WINDOW
from serving.validation import ItemFilter

COLOURS = ("red", "blue", "green")


@pytest.fixture
def shop(empty_world: World) -> World:
    """500 items with prices 0, 1, 2, …, a colour and a size; every seventh without a price; 3 and 4 unavailable."""
    snapshot = make_snapshot(unavailable=(3, 4))
    items = snapshot.items
    attributes = [
        orjson.dumps(
            {"colour": COLOURS[i % 3], "size": i % 4, "new": i % 2 == 0, "categories": [f"of 5/{i % 5}", f"of 6/{i % 6}"]}
        ).decode()
        for i in range(500)
    ]
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
            ({"categories": ["of 5/1"]}, lambda i: i % 5 == 1),
            ({"categories": ["of 5/1", "of 6/2"]}, lambda i: i % 5 == 1 or i % 6 == 2),
        ],
    )
    def test_any_attribute_of_the_catalogue_can_be_asked_for(self, shop: World, attributes: dict, holds) -> None:
        found = numbers(shop.client.recommend("ann", 50, filter=Filter(attributes=attributes)))
        assert len(found) == 50
        assert all(map(holds, found))

    def test_no_call_waits_until_the_attributes_of_all_items_are_read(
        self, shop: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("serving.filters.Members", lambda _: 1 / 0)
        answer = shop.client.recommend("ann", 30, filter=Filter(attributes={"colour": ["red"]}))
        assert {number % 3 for number in numbers(answer)} == {0}

    def test_all_conditions_hold_together(self, shop: World) -> None:
        wanted = Filter(min_price=50, max_price=450, attributes={"colour": ["blue"]})
        found = numbers(shop.client.recommend("ann", 20, categories=["books"], filter=wanted))
        assert found
        assert all(50 <= i <= 450 and i % 3 == 1 and i % 5 in (2, 3) for i in found)

    @pytest.mark.parametrize("attributes", [{"colour": ["violet"]}, {"weight": ["1"]}, {"categories": ["of 5"]}])
    def test_what_no_item_has_is_an_empty_answer_that_is_counted(self, shop: World, attributes: dict) -> None:
        assert numbers(shop.client.recommend("ann", filter=Filter(attributes=attributes))) == []
        assert shop.server.metrics.events["filters_without_items"] == 1

    @pytest.mark.parametrize("call", ["recommend", "similar", "trending", "batch"])
    def test_prices_between_which_there_is_none_are_refused_by_name(self, shop: World, call: str) -> None:
        wanted = Filter(min_price=3, max_price=2)
        ask = {
            "recommend": lambda: shop.client.recommend("ann", filter=wanted),
            "similar": lambda: shop.client.similar_items("item-1", filter=wanted),
            "trending": lambda: shop.client.trending(filter=wanted),
            "batch": lambda: shop.client.recommend_batch(["ann"], filter=wanted),
        }[call]
        with pytest.raises(RecsysError, match=r"INVALID_ARGUMENT.*filter\.min_price is 3\.0 and filter\.max_price 2\.0"):
            ask()
        assert len(shop.client.recommend("ann", filter=Filter(min_price=50, max_price=50)).items) == 1

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


def with_attributes(texts: list[str | None], **columns: list[object]) -> ItemFilters:
    """Filters over items of which only the attributes matter."""
    items = pa.table(
        {
            "item_id": [f"item-{i}" for i in range(len(texts))],
            "category": pa.nulls(len(texts), pa.string()),
            "attributes": pa.array(texts, pa.string()),
            **columns,
        }
    )
    return ItemFilters(cast(Snapshot, SimpleNamespace(items=items, available=np.ones(len(texts), bool))))


def passing(filters: ItemFilters, name: str, *values: str) -> list[int]:
    mask = filters.mask(ItemFilter(attributes=((name, values),)))
    assert mask is not None
    return np.flatnonzero(mask).tolist()


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("ab", max_size=2)
)
members = st.dictionaries(st.sampled_from("xyz"), scalars | st.lists(scalars, max_size=3) | st.just({"x": 1}), max_size=3)


class TestAttributes:
    @given(st.lists(st.none() | members, min_size=1, max_size=8))
    def test_an_item_passes_where_one_of_its_values_is_asked_for(self, of_items: list[dict | None]) -> None:
        filters = with_attributes([None if one is None else orjson.dumps(one).decode() for one in of_items])
        for name in "xyz":
            values = [one.get(name, []) if one else [] for one in of_items]
            written = [[written_as(v) for v in (value if isinstance(value, list) else [value])] for value in values]
            for asked in {text for texts in written for text in texts} | {"none of them"}:
                assert passing(filters, name, asked) == [row for row, texts in enumerate(written) if asked in texts]

    def test_text_that_is_no_object_has_no_attributes(self) -> None:
        filters = with_attributes(["", "{", "[1]", '"x"', "null", '{"x": "1"}'])
        assert passing(filters, "x", "1") == [5]

    def test_a_further_column_of_the_catalogue_is_an_attribute(self) -> None:
        filters = with_attributes([None] * 3, brand=["a", None, "b"], size=[1, 2, 3])
        assert passing(filters, "brand", "a", "b") == [0, 2]
        assert passing(filters, "size", "2") == [1]
        assert passing(filters, "title", "2") == []

    def test_thousands_of_names_cost_what_the_values_cost(self) -> None:
        """A column of codes for each of 5,000 names took 400 MB."""
        filters = with_attributes([f'{{"name-{i % 5000}": "value-{i}", "colour": "{COLOURS[i % 3]}"}}' for i in range(20_000)])
        tracemalloc.start()
        try:
            assert len(passing(filters, "colour", "red")) == 6667
            assert passing(filters, "name-7", "value-5007") == [5007]
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 20e6

    def test_masks_that_are_kept_are_bounded_by_their_bytes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("serving.filters.KEPT_BYTES", 4000)
        filters = with_attributes([f'{{"x": "{i}"}}' for i in range(1000)])
        wanted = [ItemFilter(attributes=(("x", (str(i),)),)) for i in range(20)]
        for one in wanted:
            assert filters.mask(one) is not None
        assert sum(filters.known(one) is not None for one in wanted) == 4


def written_as(value: object) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()


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
        assert [a.title for a in answer.last_actions] == ["Title 25", "Title 17"]
        assert {m.title for item in answer for m in item.moved_by} <= {"Title 25", "Title 17"}

    def test_what_the_actions_add_is_the_sessions_share_of_the_score(self, world: World) -> None:
        last = tuple((f"item-{at}", "view", 1_000 - at) for at in (25, 17, 35))
        world.put_record("ann", UserRecord(last=last, last_ts=1_000))
        answer = world.client.recommend("ann", 50, explain=True)
        assert answer.weights is not None
        checked = 0
        for item in answer:
            if len(item.moved_by) == len(last):
                assert item.parts is not None
                share = answer.weights["session"] * item.parts["session"]
                assert sum(m.strength for m in item.moved_by) == pytest.approx(share, abs=1e-5)
                checked += 1
        assert checked > 5

    def test_an_influence_without_weight_is_not_claimed(self, empty_world: World) -> None:
        snapshot = make_snapshot()
        ranking = snapshot.ranking.model_copy(update={"session_weight": 0.0})
        object.__setattr__(snapshot, "ranking", ranking)
        empty_world.promote(snapshot)
        empty_world.start()
        empty_world.put_record("ann", UserRecord(last=(("item-25", "click", 2_000),), last_ts=2_000))
        answer = empty_world.client.recommend("ann", 20, explain=True)
        assert answer.weights is not None
        assert answer.weights["session"] == 0
        assert not [item for item in answer if item.moved_by]
        assert [a.item_id for a in answer.last_actions] == ["item-25"]

    def test_the_command_line_shows_the_weights_beside_the_parts_and_what_moved_an_item(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "250")
        world.put_record("ann", UserRecord(last=(("item-25", "click", 2_000),), last_ts=2_000))
        shown = CliRunner().invoke(app, ["recommend", "ann", "--explain", "--address", world.address])
        assert shown.exit_code == 0, shown.stderr
        assert "score = 0.70 · als + 0.30 · two_tower + 0.50 · session + 0.50 · trend + 0.10 · popular" in shown.stdout
        assert "Title 25 (+" in shown.stdout
        plain = CliRunner().invoke(app, ["recommend", "ann", "--address", world.address])
        assert "score =" not in plain.stdout
        assert "moved by" not in plain.stdout
