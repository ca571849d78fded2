"""Answers of a release with a two-tower model: computed with it, or without it where its scores do not come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from snapshots import make_snapshot
from test_tensorflow_serving import Process
from towers import make_tower
from worlds import RedisServer, World, eventually

from recsys_core.index import ExactIndex, unit_rows
from recsys_core.online import UserRecord
from recsys_core.ranking import Snapshot
from recsys_core.settings import Settings

LAST = (("item-3", "view", 1_000), ("item-5", "view", 900))


def with_two_tower(snapshot: Snapshot) -> Snapshot:
    """The snapshot with random item vectors of 8 dimensions and a tower that knows some users and items."""
    vectors = unit_rows(np.random.default_rng(3).normal(size=(snapshot.items.num_rows, 8)).astype(np.float32))
    tower = make_tower(["ann", "bob"], [f"item-{i}" for i in range(15)], dimension=8)
    return replace(snapshot, two_tower_items=vectors, two_tower_index=ExactIndex(vectors, "inner_product"), tower=tower)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    made = Process(tmp_path_factory.mktemp("model"))
    yield made
    made.kill()


def answer_of(world: World) -> tuple[str, float]:
    """Tier, and the sum of the two-tower parts."""
    world.put_record("ann", UserRecord(last=LAST, last_ts=1_000))
    answer = world.client.recommend("ann", explain=True)
    return answer.tier, sum(abs(item.parts["two_tower"]) for item in answer if item.parts)


def test_the_process_scores_by_itself(empty_world: World) -> None:
    empty_world.promote(with_two_tower(make_snapshot()))
    empty_world.start()
    tier, parts = answer_of(empty_world)
    assert tier == "REALTIME"
    assert parts > 0


def test_a_model_server_scores_and_is_done_without_when_it_is_gone(
    serving_settings: Settings, redis_server: RedisServer, process: Process
) -> None:
    scorer = serving_settings.tensorflow_serving.model_copy(
        update={"address": f"127.0.0.1:{process.port}", "timeout_ms": 60_000}
    )
    world = World(serving_settings.model_copy(update={"tensorflow_serving": scorer}), redis_server)
    world.promote(with_two_tower(make_snapshot()))
    world.start()
    try:
        assert answer_of(world)[0] == "REALTIME"
        scored = sum(world.server.metrics.steps["two_tower"].counts)
        assert scored > 0
        assert world.client.recommend("nobody", explain=True).tier == "POPULAR"
        assert sum(world.server.metrics.steps["two_tower"].counts) == scored, "nobody's vector lies ready"
        process.kill()
        eventually(lambda: answer_of(world) == ("REALTIME_ALS_ONLY", 0.0))
    finally:
        world.stop()
