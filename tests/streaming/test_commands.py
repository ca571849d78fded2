"""`recsys kafka init` and `recsys stream rebuild` from the command line."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from stream_world import World
from typer.testing import CliRunner

from recsys_cli.main import app
from recsys_cli.stream import _since_ms
from recsys_core.events import DAY_MS, HOUR_MS, key_start_ms, now_ms
from recsys_core.online import REBUILD_LOCK_KEY


@pytest.fixture
def one(world: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> World:
    """A world that the environment describes."""
    made = world()
    for name in ("bootstrap_servers", "topic", "dead_letter_topic"):
        monkeypatch.setenv(f"RECSYS_KAFKA__{name.upper()}", getattr(made.settings.kafka, name))
    monkeypatch.setenv("RECSYS_REDIS__URL", made.settings.redis.url)
    monkeypatch.setenv("RECSYS_HOME", str(made.settings.home))
    return made


def test_init_says_what_there_is_and_refuses_other_partitions(one: World, monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(app, ["kafka", "init"])
    assert done.exit_code == 0, done.output
    assert f"{one.settings.kafka.topic}: 4 partitions, identity {one.identity()}" in done.output
    monkeypatch.setenv("RECSYS_KAFKA__PARTITIONS", "8")
    refused = CliRunner().invoke(app, ["kafka", "init"])
    assert refused.exit_code == 2
    assert "has 4 partitions and the settings say 8" in refused.output


def test_rebuild_ends_with_what_differs(one: World) -> None:
    chance = random.Random(1)
    one.send(*(one.event(chance) for _ in range(300)))
    done = CliRunner().invoke(app, ["stream", "rebuild", "--since", "1d"])
    assert done.exit_code == 0, done.output
    rows = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in done.output.splitlines() if "│" in line}
    assert (rows["events applied"], rows["users made again"], rows["different"]) == ("300", "40", "0")


def test_a_rebuild_that_can_not_be_ends_with_one_line(one: World, monkeypatch: pytest.MonkeyPatch) -> None:
    one.redis.set(REBUILD_LOCK_KEY, b"0abcdef0 there 7", px=60_000)
    busy = CliRunner().invoke(app, ["stream", "rebuild"])
    assert (busy.exit_code, "another rebuild runs on there, process 7" in busy.output) == (2, True)
    one.redis.delete(REBUILD_LOCK_KEY)
    monkeypatch.setenv("RECSYS_REDIS__URL", "redis://127.0.0.1:1/0")
    away = CliRunner().invoke(app, ["stream", "rebuild"])
    assert (away.exit_code, "Redis is away" in away.output) == (2, True)


def test_since_is_an_age_a_time_or_all() -> None:
    assert _since_ms("all") == 0
    assert abs(now_ms() - 36 * HOUR_MS - _since_ms("36h")) < 10_000
    assert abs(now_ms() - 7 * DAY_MS - _since_ms("7d")) < 10_000
    assert _since_ms("2026-01-31T09") == key_start_ms("2026-01-31T09")
    wrong = CliRunner().invoke(app, ["stream", "rebuild", "--since", "yesterday"])
    assert wrong.exit_code == 2
    assert "neither all, an age" in " ".join(wrong.output.split())
