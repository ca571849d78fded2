"""A past day again: from the data before it alone, with what is missing made, and nothing promoted."""

from __future__ import annotations

import pyarrow.compute as pc
import pytest
from builders import write_clicks
from nights import prepare_night, small
from pyspark.sql import SparkSession

from recsys_core.bundle import ALS_FACTORS, ITEM_INDEX, POPULAR_ITEMS
from recsys_core.lake import Lake, MissingPartition
from recsys_core.replay import Replay, replay_day
from recsys_core.settings import Settings
from recsys_core.tables import INTERACTIONS

BEFORE, DAY, AFTER = "2026-03-01", "2026-03-02", "2026-03-03"


def no_spark() -> SparkSession:
    raise AssertionError("everything is there: Spark is not needed")


def replay(lake: Lake, settings: Settings, *users: str) -> Replay:
    return replay_day(lake, DAY, small(settings), no_spark, "numpy", users, count=5)


def test_users_get_what_their_group_likes_and_not_what_they_had(lake: Lake, settings: Settings) -> None:
    prepare_night(lake, BEFORE, small(settings))
    found = replay(lake, settings, "u0", "u1")
    assert found.made == ()
    assert list(found.notes) == ["two_tower"]
    had = lake.read(INTERACTIONS, BEFORE)
    for user, group in zip(found.users, ("g0-", "g1-"), strict=True):
        items = set(had.filter(pc.equal(had["user_id"], user.user_id))["item_id"].to_pylist())
        assert len(user.recommended) == 5
        assert not items & set(user.recommended)
        assert {item for item in user.recommended if item.startswith(group)}, "of the group's 12 items 4 are new to each"
        assert len(user.last) == 2
        assert user.had == ()


def test_the_day_itself_and_what_came_after_it_change_no_answer(lake: Lake, settings: Settings) -> None:
    prepare_night(lake, BEFORE, small(settings))
    unknowing = replay(lake, settings, "u0", "u3", "stranger")
    liked = unknowing.users[0].recommended[0]
    write_clicks(lake, [("u0", liked, f"{DAY}T00"), ("u0", "g0-1", f"{DAY}T09"), ("u3", "g1-2", f"{AFTER}T09")])
    knowing = replay(lake, settings, "u0", "u3", "stranger")
    assert [(u.user_id, u.last, u.recommended) for u in knowing.users] == [
        (u.user_id, u.last, u.recommended) for u in unknowing.users
    ]
    assert knowing.users[0].hits == (liked,)
    assert set(knowing.users[0].had) == {liked, "g0-1"}
    assert knowing.users[1].had == ()
    assert len(knowing.users[2].recommended) == 5, "a stranger gets what is liked by many"


def test_without_names_users_of_the_day_are_shown(lake: Lake, settings: Settings) -> None:
    prepare_night(lake, BEFORE, small(settings))
    write_clicks(lake, [("u5", "g1-0", f"{DAY}T10"), ("u4", "g0-0", f"{DAY}T23")])
    assert [user.user_id for user in replay(lake, settings).users] == ["u4", "u5"]


def test_what_is_missing_is_made_from_the_clicks_before_the_day(lake: Lake, settings: Settings, spark: SparkSession) -> None:
    clicks = [(f"u{n}", f"i{(n + k) % 12}", f"{BEFORE}T{8 + k:02}") for n in range(40) for k in range(4)]
    write_clicks(lake, clicks)
    write_clicks(lake, [("u1", "later", f"{DAY}T10")])
    found = replay_day(lake, DAY, small(settings), lambda: spark, "numpy", ("u1",), count=5)
    assert found.made == (INTERACTIONS, ALS_FACTORS, ITEM_INDEX, POPULAR_ITEMS)
    assert "later" not in found.snapshot.item_ids
    assert found.users[0].had == ("later",)
    assert lake.keys(INTERACTIONS) == [BEFORE]
    again = replay_day(lake, DAY, small(settings), no_spark, "numpy", ("u1",), count=5)
    assert (again.made, again.users) == ((), found.users)


def test_a_day_without_a_past_is_refused(lake: Lake, settings: Settings) -> None:
    write_clicks(lake, [("ann", "tea", f"{DAY}T10")])
    with pytest.raises(MissingPartition, match="nothing to replay from"):
        replay(lake, settings)
    assert lake.keys(INTERACTIONS) == []
