"""`recsys release rollback` and `promote` reach a running server within seconds, without a failed call."""

from __future__ import annotations

import threading

from snapshots import make_snapshot
from typer.testing import CliRunner
from worlds import World, eventually

from recsys_cli.main import app
from serving.client import RecsysError


def recsys_release(world: World, *arguments: str) -> None:
    result = CliRunner().invoke(app, ["release", *arguments, "--home", str(world.settings.home)])
    assert result.exit_code == 0, result.output


def test_a_rollback_and_a_promotion_reach_the_running_server_while_it_answers(world: World) -> None:
    old, new = world.snapshot.release_id, "2026-01-02.b"
    world.promote(make_snapshot(new))
    eventually(lambda: world.client.get_release().release_id == new)
    failures: list[str] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            try:
                answer = world.client.recommend("nobody")
            except RecsysError as error:
                failures.append(repr(error))
                return
            if len(answer) != 10 or answer.release_id not in (old, new):
                failures.append(repr(answer))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        recsys_release(world, "rollback")
        eventually(lambda: world.client.get_release().release_id == old)
        recsys_release(world, "promote", new)
        eventually(lambda: world.client.get_release().release_id == new)
    finally:
        over.set()
        asking.join()
    assert failures == []
