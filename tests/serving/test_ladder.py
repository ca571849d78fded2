"""Each tier is reached and labelled, and no answer holds what it must not."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from snapshots import make_snapshot, with_two_tower
from worlds import World, eventually, now_ms

from recsys_core.online import CachedAnswer, UserRecord, recs_key, user_key
from recsys_core.ranking import Snapshot
from serving import ladder, validation
from serving import recsys_pb2 as pb
from serving.client import Diversity, Filter, Recommendation, RecsysError
from serving.ladder import BATCH_USERS

HOUR_MS = 3_600_000


def ids(answer: Recommendation) -> list[str]:
    return [item.item_id for item in answer]


def cached_ids(world: World, user_id: str) -> list[str]:
    return [item for item, _ in CachedAnswer.decode(world.redis.client.get(recs_key(user_id))).items()]


class TestTiers:
    def test_a_fresh_cached_answer_is_passed_on_as_it_lies_there(self, world: World) -> None:
        world.put_cached_user("ann")
        lying = CachedAnswer.decode(world.redis.client.get(recs_key("ann")))
        answer = world.client.recommend("ann", 7)
        assert answer.tier == "CACHE"
        assert [(i.item_id, i.score) for i in answer] == lying.items()[:7]
        assert answer.release_id == world.snapshot.release_id
        assert int(answer.computed_at.timestamp() * 1000) == lying.computed_at

    def test_a_user_without_cached_answer_is_computed_and_then_cached(self, world: World) -> None:
        world.put_known_user("ann")
        first = world.client.recommend("ann", 10)
        assert first.tier == "REALTIME_ALS_ONLY"
        eventually(lambda: world.redis.client.exists(recs_key("ann")))
        assert 0 < world.redis.client.ttl(recs_key("ann")) <= world.settings.cache.ttl_seconds
        second = world.client.recommend("ann", 10)
        assert second.tier == "CACHE"
        assert ids(second) == ids(first)

    def test_a_user_of_whom_only_actions_are_known_is_folded_in(self, world: World) -> None:
        world.put_record("new", UserRecord(last=(("item-20", "view", 1), ("item-30", "view", 1)), last_ts=1))
        answer = world.client.recommend("new", 10)
        assert answer.tier == "REALTIME_ALS_ONLY"
        alike = [item for item in ids(answer) if int(item.removeprefix("item-")) % 10 == 0]
        assert len(alike) >= 8, "items of the cluster that both actions are of"

    def test_a_user_of_whose_items_only_older_ones_are_known_is_answered_as_the_caches_are(self, world: World) -> None:
        """A release that is a day behind: the factor is of another one, and what the user did last is newer than its items."""
        record = UserRecord(
            last=(("of today", "view", 5),),
            last_ts=5,
            seen=("item-20", "item-30"),
            als_version="another",
            als=world.snapshot.als_items[1],
        )
        world.put_record("ann", record)
        computed = world.client.recommend("ann", 50)
        eventually(lambda: world.redis.client.exists(recs_key("ann")))
        world.put_answers({"ann": record})
        cached = world.client.recommend("ann", 50)
        assert (computed.tier, cached.tier) == ("REALTIME_ALS_ONLY", "CACHE")
        assert ids(computed) == ids(cached)

    def test_a_stale_answer_is_recomputed_when_the_record_allows_it(self, world: World) -> None:
        world.put_cached_user("ann", computed_at=now_ms() - 2 * HOUR_MS)
        assert world.client.recommend("ann").tier == "REALTIME_ALS_ONLY"

    def test_a_stale_answer_is_served_as_such_when_nothing_better_can_be_made(self, world: World) -> None:
        made = now_ms() - 2 * HOUR_MS
        world.put_cached_user("ann", computed_at=made)
        world.redis.client.delete(user_key("ann"))
        answer = world.client.recommend("ann", 5)
        assert answer.tier == "STALE_CACHE"
        assert int(answer.computed_at.timestamp() * 1000) == made
        assert ids(answer) == cached_ids(world, "ann")[:5]

    def test_an_unknown_user_gets_what_is_popular(self, world: World) -> None:
        answer = world.client.recommend("nobody", 5)
        assert answer.tier == "POPULAR"
        assert ids(answer) == ["item-0", "item-1", "item-2", "item-5", "item-6"], "3 and 4 are unavailable"
        time.sleep(0.1)
        assert not world.redis.client.exists(recs_key("nobody")), "made-up users don't fill Redis"

    def test_no_tier_gives_a_heavy_user_what_they_had(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        had = [f"item-{at}" for at in range(300)]
        world.put_answers({"ann": UserRecord()}, computed_at=now_ms() - 2 * HOUR_MS)
        for user in ("ann", "bob"):
            world.put_record(user, UserRecord.with_items([*had, "item-310"], 50, 10_000))
        with monkeypatch.context() as patched:
            patched.setattr("serving.ladder.rank", lambda *_: 1 / 0)
            stale = world.client.recommend("ann", 5)
            assert set(cached_ids(world, "ann")) < {*had}
            popular = world.client.recommend("bob", 5, exclude=["item-301"])
        assert (stale.tier, popular.tier) == ("POPULAR", "POPULAR"), "nothing of the old answer is left"
        assert ids(popular) == ["item-300", "item-302", "item-303", "item-304", "item-305"]
        world.put_record("eve", UserRecord.with_items(had, 50, 10_000, last=(("item-7", "view", 1),), last_ts=1))
        computed = world.client.recommend("eve", 100)
        assert (computed.tier, len(computed)) == ("REALTIME_ALS_ONLY", 100)
        for answer in (stale, computed):
            assert not set(ids(answer)) & {*had}

    def test_what_trends_leads_the_popular_answer_as_soon_as_it_is_known(self, world: World) -> None:
        world.put_trend({"item-400": 50.0, "item-401": 20.0, "item-3": 99.0, "gone": 5.0})
        eventually(lambda: ids(world.client.recommend("nobody", 2)) == ["item-400", "item-401"])

    def test_trends_stay_in_use_when_their_key_is_gone(self, world: World) -> None:
        world.put_trend({"item-400": 50.0})
        eventually(lambda: ids(world.client.recommend("nobody", 1)) == ["item-400"])
        world.redis.client.flushall()
        time.sleep(0.4)
        assert ids(world.client.recommend("nobody", 1)) == ["item-400"]

    def test_a_failing_ranking_falls_to_the_stale_answer_and_then_to_popular(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        world.put_cached_user("ann", computed_at=now_ms() - 2 * HOUR_MS)
        world.put_known_user("bob")

        def broken(*_: object) -> None:
            raise MemoryError("no memory for candidates")

        monkeypatch.setattr("serving.ladder.rank", broken)
        assert world.client.recommend("ann").tier == "STALE_CACHE"
        assert world.client.recommend("bob").tier == "POPULAR"
        assert world.server.ladder.counts["failed_rankings"] == 2

    def test_a_slow_ranking_is_not_waited_for(self, hasty_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        world = hasty_world
        world.put_known_user("bob")
        asked = threading.Event()
        monkeypatch.setattr("serving.ladder.rank", lambda *_: asked.wait(60))
        answer = world.client.recommend("bob", current_item="item-5")
        assert not asked.is_set(), "the answer came while the ranking still ran"
        asked.set()
        assert answer.tier == "POPULAR"
        assert world.server.ladder.counts["late_rankings"] == 1

    def test_tiers_are_counted(self, world: World) -> None:
        world.put_cached_user("ann")
        world.client.recommend_batch(["ann", "ann", "nobody"])
        assert world.server.ladder.counts["CACHE"] == 2
        assert world.server.ladder.counts["POPULAR"] == 1


class TestFreshActions:
    def test_a_click_after_the_answer_was_made_recomputes_it_without_the_clicked_item(self, world: World) -> None:
        world.put_cached_user("ann", computed_at=now_ms() - 1000)
        clicked = ids(world.client.recommend("ann"))[0]
        world.put_record("ann", UserRecord(last=((clicked, "click", now_ms()),), last_ts=now_ms()))
        answer = world.client.recommend("ann")
        assert answer.tier == "REALTIME_ALS_ONLY"
        assert clicked not in ids(answer)
        eventually(lambda: clicked not in cached_ids(world, "ann"))
        assert world.client.recommend("ann").tier == "CACHE"

    def test_a_click_that_the_answer_knows_leaves_it_fresh(self, world: World) -> None:
        clicked = UserRecord(last=(("item-5", "click", now_ms() - 60_000),), last_ts=now_ms() - 60_000)
        world.put_record("ann", clicked)
        world.put_answers({"ann": clicked})
        assert world.client.recommend("ann").tier == "CACHE"

    def test_a_click_that_arrives_after_the_answer_that_follows_it_is_not_overlooked(self, world: World) -> None:
        """A page asks for recommendations at once, while its own view is still on its way."""
        world.put_known_user("ann")
        clicked, moment = ids(world.client.recommend("ann"))[0], now_ms()
        time.sleep(0.005)
        world.put_record("ann", UserRecord(last=(("item-5", "view", moment - 10),), last_ts=moment - 10))
        before = world.client.recommend("ann")
        assert (before.tier, clicked in ids(before)) == ("REALTIME_ALS_ONLY", True)
        eventually(lambda: CachedAnswer.decode(world.redis.client.get(recs_key("ann"))).computed_at > moment)
        world.put_record("ann", UserRecord(last=((clicked, "click", moment),), last_ts=moment))
        after = world.client.recommend("ann")
        assert (after.tier, clicked in ids(after)) == ("REALTIME_ALS_ONLY", False)

    def test_the_item_that_is_looked_at_moves_the_answer_and_is_not_in_it(self, world: World) -> None:
        world.put_cached_user("ann", taste=1)
        answer = world.client.recommend("nobody", current_item="item-25")
        assert answer.tier == "REALTIME_ALS_ONLY"
        assert "item-25" not in ids(answer)
        assert sum(int(i.removeprefix("item-")) % 10 == 5 for i in ids(answer)) >= 8
        assert ids(world.client.recommend("ann", current_item="item-25")) != ids(world.client.recommend("ann"))


class TestLeftOut:
    def test_excluded_items_are_dropped_from_the_cached_answer_while_enough_remain(self, world: World) -> None:
        world.put_cached_user("ann")
        lying = cached_ids(world, "ann")
        answer = world.client.recommend("ann", 10, exclude=[lying[0], lying[3], "never-heard-of"])
        assert answer.tier == "CACHE"
        assert ids(answer) == [i for i in lying if i not in (lying[0], lying[3])][:10]

    def test_too_many_exclusions_for_the_cached_answer_compute_one(self, world: World) -> None:
        world.put_cached_user("ann")
        lying = cached_ids(world, "ann")
        answer = world.client.recommend("ann", 20, exclude=lying[:40])
        assert answer.tier == "REALTIME_ALS_ONLY"
        assert len(answer) == 20
        assert not set(ids(answer)) & set(lying[:40])

    def test_excluding_all_that_is_popular_still_fills_the_answer(self, world: World) -> None:
        popular = [f"item-{i}" for i in range(400)]
        for user, tier in (("nobody", "POPULAR"), ("ann", "REALTIME_ALS_ONLY")):
            if user == "ann":
                world.put_known_user("ann")
            answer = world.client.recommend(user, 30, exclude=popular)
            assert (answer.tier, len(answer)) == (tier, 30)
            assert not set(ids(answer)) & set(popular)

    def test_unavailable_items_are_never_returned(self, world: World) -> None:
        world.put_known_user("ann", taste=3)
        for answer in (world.client.recommend("ann", 500), world.client.recommend("nobody", 500)):
            assert not {"item-3", "item-4"} & set(ids(answer))
        assert len(world.client.recommend("nobody", 500)) == 498

    def test_an_item_that_the_new_release_no_longer_offers_leaves_the_old_releases_answers(self, world: World) -> None:
        world.put_cached_user("ann")
        lying = cached_ids(world, "ann")
        gone = int(lying[0].removeprefix("item-"))
        world.promote(make_snapshot("2026-01-02.b", unavailable=(gone,)))
        eventually(lambda: world.client.get_release().release_id == "2026-01-02.b")
        answer = world.client.recommend("ann", 10)
        assert (answer.tier, answer.release_id) == ("CACHE", "2026-01-01.a")
        assert ids(answer) == lying[1:11]

    def test_consumed_items_are_never_returned(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = [f"item-{i}" for i in range(0, 200, 10)]
        world.put_known_user("ann", taste=0, seen=seen)
        for user in ("bob", "eve"):
            world.put_record(user, UserRecord(seen=("item-0", "item-1")))
        assert not set(seen) & set(ids(world.client.recommend("ann", 100)))
        computed = world.client.recommend("bob", 5)
        monkeypatch.setattr("serving.ladder.rank", lambda *_: 1 / 0)
        popular = world.client.recommend("eve", 5)
        assert (computed.tier, popular.tier) == ("REALTIME_ALS_ONLY", "POPULAR")
        for answer in (computed, popular):
            assert not {"item-0", "item-1"} & set(ids(answer))

    @pytest.mark.parametrize("computed_at", [None, now_ms() - 3 * HOUR_MS], ids=["nothing cached", "cached and stale"])
    def test_nothing_that_a_user_did_since_the_night_is_returned(
        self, world: World, monkeypatch: pytest.MonkeyPatch, computed_at: int | None
    ) -> None:
        """Forty actions on what would be recommended and on what is popular, and the last ones all on one item."""
        record = world.put_known_user("ann")
        world.put_answers({"ann": record}, now_ms() - 3 * HOUR_MS)
        done = [*cached_ids(world, "ann")[:20], *ids(world.client.recommend("nobody", 20))]
        if computed_at is None:
            world.redis.client.delete(recs_key("ann"))
        world.act("ann", done[:25])
        world.act("ann", [*done[25:], *done[:1] * 6], 25)
        computed = world.client.recommend("ann", 100)
        assert (computed.tier, len(computed)) == ("REALTIME_ALS_ONLY", 100)
        monkeypatch.setattr("serving.ladder.rank", lambda *_: 1 / 0)
        fallen = world.client.recommend("ann", 20)
        assert fallen.tier == ("POPULAR" if computed_at is None else "STALE_CACHE")
        assert len(fallen) == 20
        popular = world.client.recommend("ann", 30, categories=["sports"])
        assert (popular.tier, len(popular)) == ("POPULAR", 30)
        for answer in (computed, fallen, popular):
            assert not set(done) & set(ids(answer))

    @pytest.mark.parametrize("user", ["ann", "nobody"])
    def test_a_category_holds_those_below_it_and_no_other(self, world: World, user: str) -> None:
        world.put_cached_user("ann")
        answer = world.client.recommend(user, 50, categories=["sports"], explain=True)
        assert len(answer) == 50
        assert {item.category for item in answer} == {"sports/shoes", "sports/balls"}
        assert answer.tier == ("REALTIME_ALS_ONLY" if user == "ann" else "POPULAR")

    def test_a_category_of_which_the_popular_items_are_excluded_still_fills_the_answer(self, world: World) -> None:
        shoes_and_balls = [i for i in range(500) if i % 5 in (0, 1)]
        excluded = [f"item-{i}" for i in shoes_and_balls[:150]]
        answer = world.client.recommend("nobody", 30, categories=["sports"], exclude=excluded)
        assert len(answer) == 30
        assert not set(ids(answer)) & set(excluded)

    def test_an_unknown_category_is_an_empty_answer(self, world: World) -> None:
        assert len(world.client.recommend("nobody", categories=["no/such"])) == 0

    def test_a_category_is_kept_when_ranking_fails(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("serving.ladder.rank", lambda *_: 1 / 0)
        answer = world.client.recommend("nobody", 5, categories=["books/comics"])
        assert [int(i.removeprefix("item-")) % 5 for i in ids(answer)] == [3] * 5


class TestDiversity:
    def test_a_limit_for_categories_holds_in_every_tier(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        world.put_cached_user("ann", computed_at=now_ms() - 2 * HOUR_MS)
        shape = Diversity(max_per_category=1)
        tiers = [world.client.recommend("ann", 5, diversity=shape, explain=True)]
        monkeypatch.setattr("serving.ladder.rank", lambda *_: 1 / 0)
        tiers += [world.client.recommend(user, 5, diversity=shape, explain=True) for user in ("ann", "nobody")]
        assert [answer.tier for answer in tiers] == ["REALTIME_ALS_ONLY", "POPULAR", "POPULAR"]
        for answer in tiers:
            assert max(Counter(item.category for item in answer if item.category).values()) == 1

    def test_what_is_popular_differs_as_much_as_is_asked_for(self, world: World) -> None:
        plain = ids(world.client.recommend("nobody", 10))
        chosen = ids(world.client.recommend("nobody", 10, diversity=Diversity(relevance=0.1)))
        assert chosen[0] == plain[0]
        units = world.snapshot.als_items / np.linalg.norm(world.snapshot.als_items, axis=1, keepdims=True)

        def likeness(items: list[str]) -> float:
            vectors = units[[world.snapshot.item_ids.position(item) for item in items]]
            return float((vectors @ vectors.T).sum())

        assert likeness(chosen) < likeness(plain) / 2


class TestCounts:
    def test_more_than_the_cache_holds_is_computed(self, world: World) -> None:
        world.put_cached_user("ann")
        answer = world.client.recommend("ann", 100)
        assert (answer.tier, len(answer)) == ("REALTIME_ALS_ONLY", 100)
        assert world.client.recommend("ann", 50).tier == "CACHE", "the larger answer has not replaced the cached one"

    def test_without_a_count_there_are_ten(self, world: World) -> None:
        request = pb.RecommendRequest(user_id="nobody")
        assert len(world.client._stub.Recommend(request, timeout=60).items) == validation.DEFAULT_COUNT

    def test_a_short_cached_answer_is_served_when_no_longer_one_can_be_made(self, world: World) -> None:
        world.put_cached_user("ann")
        world.redis.client.delete(user_key("ann"))
        answer = world.client.recommend("ann", 100)
        assert (answer.tier, len(answer)) == ("CACHE", 50)


class TestExplain:
    def test_the_parts_times_the_weights_are_the_score(self, world: World) -> None:
        world.put_cached_user("ann")
        world.put_trend({"item-9": 3.0})
        eventually(lambda: world.client.recommend("nobody", 1).items[0].item_id == "item-9")
        for user in ("ann", "nobody"):
            answer = world.client.recommend(user, 10, explain=True)
            assert answer.weights is not None
            for item in answer:
                assert item.parts is not None
                assert sum(answer.weights[p] * item.parts[p] for p in item.parts) == pytest.approx(item.score, abs=1e-5)
        assert answer.items[0].parts["trend"] == pytest.approx(1)

    def test_titles_and_the_assets_behind_the_answer_are_told(self, world: World) -> None:
        answer = world.client.recommend("nobody", 3, explain=True)
        assert [item.title for item in answer] == ["", "Title 1", "Title 2"]
        assert [(s.asset, s.partition, s.data_version) for s in answer.sources] == [
            ("als_factors", "2026-01-01", "abc"),
            ("item_catalog", "", "def"),
        ]

    def test_every_user_of_a_batch_is_explained_as_alone(self, world: World) -> None:
        for taste, user in enumerate(("ann", "bob", "eve")):
            world.put_known_user(user, taste=taste, seen=[f"item-{taste}"])
        batch = world.client.recommend_batch(["ann", "bob", "eve"], 5, explain=True)
        for user, answer in zip(("ann", "bob", "eve"), batch, strict=True):
            alone = world.client.recommend(user, 5, explain=True)
            assert answer.tier == alone.tier == "REALTIME_ALS_ONLY"
            assert [(item.item_id, item.sources) for item in answer] == [(item.item_id, item.sources) for item in alone]
            assert any("als" in item.sources for item in answer)

    def test_items_had_before_the_last_actions_have_their_share_and_are_not_named(self, world: World) -> None:
        last, seen = ("item-25", "item-17"), ("item-2", "item-400", "item-33", "item-34")
        actions = tuple((item, "view", 9 - at) for at, item in enumerate([last[0], last[0], last[0], last[1]]))
        world.put_record("ann", UserRecord(last=actions, last_ts=9, seen=seen))
        snapshot, ranking = world.snapshot, world.snapshot.ranking
        units = snapshot.als_items / np.linalg.norm(snapshot.als_items, axis=1, keepdims=True)
        of_last = [snapshot.item_ids.position(item) for item in (*last, *seen)][: ranking.last_items]
        vectors = units[of_last] * ranking.session_decay ** np.arange(len(of_last))[:, None]
        vectors *= ranking.session_weight / np.linalg.norm(vectors.sum(axis=0))
        answer = world.client.recommend("ann", 20, explain=True)
        assert answer.weights is not None
        for item in answer:
            assert item.parts is not None
            added = dict(zip(of_last, vectors @ units[snapshot.item_ids.position(item.item_id)], strict=True))
            assert sum(added.values()) == pytest.approx(answer.weights["session"] * item.parts["session"], abs=1e-5)
            assert item.moved_by
            for action in item.moved_by:
                assert action.item_id in last
                assert action.strength == pytest.approx(added[snapshot.item_ids.position(action.item_id)], abs=1e-5)

    @pytest.mark.parametrize("had", [0, 120], ids=["few items had", "many of the nearest had"])
    def test_every_item_has_the_generators_that_proposed_it_under_any_filter(self, empty_world: World, had: int) -> None:
        snapshot = with_two_tower(make_snapshot(unavailable=(3, 4)), ["ann"])
        ranking = snapshot.ranking.model_copy(update={"popular": 5, "candidates": 100})
        empty_world.promote(replace(snapshot, ranking=ranking))
        empty_world.start()
        nearest = np.argsort(-snapshot.als_items @ snapshot.als_items[0])[:had]
        empty_world.put_known_user("ann", seen=[f"item-{at}" for at in nearest])
        empty_world.put_record("ann", UserRecord(last=(("item-25", "view", 1),), last_ts=1))
        found: set[str] = set()
        for wanted in (None, Filter(min_price=80), Filter(include_unavailable=True)):
            for shape in (None, Diversity(relevance=0.5)):
                for user in ("ann", "nobody"):
                    answer = empty_world.client.recommend(user, 15, filter=wanted, diversity=shape, explain=True)
                    assert len(answer) == 15
                    assert all(item.sources for item in answer)
                    found.update(*(item.sources for item in answer))
        assert found == {"als", "two_tower", "session", "popular"}

    def test_an_explained_answer_is_the_computed_one_however_few_candidates_there_are(self, empty_world: World) -> None:
        snapshot = make_snapshot()
        ranking = snapshot.ranking.model_copy(update={"popular": 1, "candidates": 10, "trending": 0, "session_neighbours": 1})
        empty_world.promote(replace(snapshot, ranking=ranking))
        empty_world.start()
        for taste in range(20):
            user = f"user-{taste}"
            empty_world.put_known_user(user, taste)
            explained = empty_world.client.recommend(user, 5, explain=True)
            under_a_filter = empty_world.client.recommend(user, 5, filter=Filter(min_price=0))
            assert ids(explained) == ids(under_a_filter) == ids(empty_world.client.recommend(user, 5))


class TestBatch:
    def test_one_user_and_many_users_get_the_same(self, world: World) -> None:
        users = [f"user-{i}" for i in range(150)]
        for i, user in enumerate(users):
            if i % 3 == 0:
                world.put_known_user(user, taste=i, seen=[f"item-{j}" for j in range(i, i + 20)])
            elif i % 3 == 1:
                world.put_record(user, UserRecord(last=((f"item-{i}", "view", 1),), last_ts=1))
        options = {"categories": ["sports", "books"], "exclude": ["item-10", "item-11"]}
        batch = world.client.recommend_batch(users, 20, **options)
        assert {answer.tier for answer in batch} == {"REALTIME_ALS_ONLY", "POPULAR"}
        for user, of_batch in zip(users, batch, strict=True):
            alone = world.client.recommend(user, 20, **options)
            assert (alone.tier, ids(alone)) == (of_batch.tier, ids(of_batch))
            np.testing.assert_allclose([i.score for i in alone], [i.score for i in of_batch], atol=1e-5)

    def test_hits_and_misses_keep_their_places(self, world: World) -> None:
        world.put_cached_user("ann")
        world.put_known_user("bob", taste=7)
        answers = world.client.recommend_batch(["nobody", "ann", "bob", "ann", "else"])
        assert [a.tier for a in answers] == ["POPULAR", "CACHE", "REALTIME_ALS_ONLY", "CACHE", "POPULAR"]
        eventually(lambda: world.redis.client.exists(recs_key("bob")))

    def test_the_online_miss_equals_the_precomputed_answer(self, world: World) -> None:
        records = {f"user-{i}": world.put_known_user(f"user-{i}", taste=i) for i in range(40)}
        missed = world.client.recommend_batch(list(records), 50)
        eventually(lambda: world.redis.client.exists(recs_key("user-39")))
        world.put_answers(records)
        hit = world.client.recommend_batch(list(records), 50)
        assert {a.tier for a in hit} == {"CACHE"}
        assert [ids(a) for a in hit] == [ids(a) for a in missed]

    def test_what_is_left_out_for_all_is_looked_up_once(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        records = {f"user-{at}": world.put_known_user(f"user-{at}", taste=at) for at in range(100)}
        world.put_answers(records)
        asked = 0
        positions_of = Snapshot.positions_of

        def counted(snapshot: Snapshot, item_ids: Iterable[str]) -> np.ndarray:
            nonlocal asked
            asked += len(list(item_ids)) == 400
            return positions_of(snapshot, item_ids)

        monkeypatch.setattr(Snapshot, "positions_of", counted)
        excluded = [f"item-{at}" for at in range(50, 250)] + [f"other-{at}" for at in range(200)]
        answers = world.client.recommend_batch(list(records), 5, exclude=excluded)
        assert {answer.tier for answer in answers} == {"CACHE"}
        assert asked == 1

    @pytest.mark.parametrize("stale", [True, False], ids=["stale answers", "popular items"])
    def test_other_calls_get_their_turn_while_many_users_are_answered_without_ranking(
        self, world: World, monkeypatch: pytest.MonkeyPatch, stale: bool
    ) -> None:
        users = [f"user-{at}" for at in range(BATCH_USERS)]
        records = {user: world.put_known_user(user, seen=("item-7",)) for user in users}
        if stale:
            world.put_answers(records, computed_at=now_ms() - 2 * HOUR_MS)
        monkeypatch.setattr("serving.ladder.rank", lambda *_: 1 / 0)
        turns, begun = 0, False
        of_user = ladder.unwanted

        def turn() -> None:
            nonlocal turns
            turns += 1
            world.call_soon(turn) if turns < 10_000 else None

        def unwanted(*of: Any) -> np.ndarray:
            nonlocal begun, turns
            if not begun:
                begun, turns = True, 0
                world.call_soon(turn)
            last.append(turns)
            return of_user(*of)

        last: list[int] = []
        monkeypatch.setattr(ladder, "unwanted", unwanted)
        answers = world.client.recommend_batch(users, 5)
        assert {answer.tier for answer in answers} == {"STALE_CACHE" if stale else "POPULAR"}
        assert last[-1] >= BATCH_USERS / ladder.TURN - 1


class TestSimilarItems:
    def test_the_nearest_by_cosine_come_first_and_not_the_item_itself(self, world: World) -> None:
        vectors = world.snapshot.als_items / np.linalg.norm(world.snapshot.als_items, axis=1, keepdims=True)
        exact = vectors @ vectors[20]
        exact[[3, 4, 20]] = -2
        found = world.client.similar_items("item-20", 10)
        assert [i.item_id for i in found] == [f"item-{p}" for p in np.argsort(-exact)[:10]]
        np.testing.assert_allclose([i.score for i in found], np.sort(exact)[::-1][:10], atol=1e-5)
        assert found.release_id == world.snapshot.release_id

    def test_filters_hold(self, world: World) -> None:
        first = world.client.similar_items("item-20", 3)
        found = world.client.similar_items("item-20", 400, categories=["sports"], exclude=[i.item_id for i in first])
        assert {i.category for i in found} == {"sports/shoes", "sports/balls"}
        assert not {i.item_id for i in first} & {i.item_id for i in found}

    def test_an_unknown_item_is_not_found(self, world: World) -> None:
        with pytest.raises(RecsysError, match=r"NOT_FOUND.*'never'"):
            world.client.similar_items("never")

    def test_an_item_without_a_vector_has_nothing_similar(self, empty_world: World) -> None:
        snapshot = make_snapshot()
        vectors = snapshot.als_items.copy()
        vectors[8] = 0
        empty_world.promote(replace(snapshot, als_items=vectors))
        empty_world.start()
        assert len(empty_world.client.similar_items("item-8")) == 0
