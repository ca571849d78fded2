"""What goes wrong around the server: a slow Redis, a full disk, a folder that is gone, ten times the load it can bear."""

from __future__ import annotations

import asyncio
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from snapshots import make_manifest, make_snapshot
from worlds import RedisServer, World, eventually, now_ms

from recsys_core.ranking import rank
from recsys_core.release import LocalFiles, Releases
from recsys_core.settings import Settings
from serving import recsys_pb2 as pb
from serving.client import ClientOptions, RecsysClient, RecsysError


class SlowProxy:
    """Passes bytes on to a port, after `seconds`."""

    def __init__(self, port: int) -> None:
        self.seconds = 0.0
        self._target = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=(source, target), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                if self.seconds:
                    time.sleep(self.seconds)
                target.sendall(data)
        except OSError:
            pass
        finally:
            target.close()

    def close(self) -> None:
        self._listening.close()


@pytest.fixture
def proxied(serving_settings: Settings, redis_server: RedisServer) -> Iterator[tuple[World, SlowProxy]]:
    """A running world that reaches Redis through a proxy, with a deadline of 100 ms."""
    proxy = SlowProxy(redis_server.port)
    redis = serving_settings.redis.model_copy(update={"url": f"redis://127.0.0.1:{proxy.port}/0", "timeout_ms": 100})
    world = World(serving_settings.model_copy(update={"redis": redis}), redis_server)
    world.promote(make_snapshot())
    world.start()
    yield world, proxy
    world.stop()
    proxy.close()


def test_a_redis_that_takes_too_long_is_left_out_until_it_is_fast_again(proxied: tuple[World, SlowProxy]) -> None:
    world, proxy = proxied
    world.put_cached_user("ann")
    eventually(lambda: world.client.recommend("ann").tier == "CACHE")
    proxy.seconds = 0.3
    eventually(lambda: world.server.store.breaker.open or world.client.recommend("ann").tier == "CACHE")
    assert {world.client.recommend("ann").tier for _ in range(30)} == {"POPULAR"}
    assert world.server.metrics.events["redis_skipped"] > 0
    proxy.seconds = 0.0
    eventually(lambda: world.client.recommend("ann").tier == "CACHE")


def test_a_release_that_the_disk_has_no_room_for_is_refused_and_taken_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.champion.RETRY_SECONDS", 0.2)
    full = threading.Event()
    full.set()

    def opened(path: Path, mode: str = "r", **options: Any) -> Any:
        if full.is_set() and mode == "wb" and "similar.npy" in str(path):
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        return open(path, mode, **options)

    monkeypatch.setattr("recsys_core.release.open", opened, raising=False)
    world.promote(make_snapshot("2026-01-02.b"))
    refused = eventually(lambda: world.client.get_release().last_refused)
    assert "No space left on device" in refused.reason
    assert world.client.recommend("nobody").release_id == "2026-01-01.a"
    local = world.settings.home / "serving" / "releases" / "2026-01-02.b"
    assert not list(local.rglob("*.part"))
    full.clear()
    eventually(lambda: world.client.get_release().release_id == "2026-01-02.b")


def test_the_release_folder_and_the_servers_own_copy_may_vanish_under_it(world: World) -> None:
    world.put_known_user("ann")
    before = [item.item_id for item in world.client.recommend("ann", 30, explain=True)]
    shutil.rmtree(world.releases.root)
    shutil.rmtree(world.settings.home / "serving")
    assert [item.item_id for item in world.client.recommend("ann", 30, explain=True)] == before
    assert len(world.client.similar_items("item-1", 400)) == 400


class TestLocalFiles:
    def load(self, releases: Releases, local: Path) -> Any:
        return releases.load("2026-01-01.a", None, local)

    @pytest.fixture
    def releases(self, tmp_path: Path) -> Releases:
        releases = Releases(str(tmp_path / "releases"))
        snapshot = make_snapshot()
        releases.write(make_manifest(snapshot), snapshot)
        return releases

    def test_what_was_verified_is_not_copied_and_hashed_again(
        self, releases: Releases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.load(releases, tmp_path / "local")
        monkeypatch.setattr(LocalFiles, "_copied", lambda *_: 1 / 0)
        _, snapshot = self.load(releases, tmp_path / "local")
        assert snapshot.items.num_rows == 500

    def test_a_local_file_that_was_touched_is_brought_anew(self, releases: Releases, tmp_path: Path) -> None:
        self.load(releases, tmp_path / "local")
        file = tmp_path / "local" / "2026-01-01.a" / "popular.npy"
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content[:-1] + b"\xff")
        _, snapshot = self.load(releases, tmp_path / "local")
        assert file.read_bytes() == content
        assert snapshot.popular[0] == 1000

    def test_mapped_arrays_can_not_be_written_to(self, releases: Releases, tmp_path: Path) -> None:
        _, snapshot = self.load(releases, tmp_path / "local")
        for array in (snapshot.als_items, snapshot.similar, snapshot.popular):
            assert not array.flags.writeable

    def test_an_object_store_is_fetched_from(self, tmp_path: Path) -> None:
        snapshot = make_snapshot()
        far = Releases("memory://bucket/releases")
        far.write(make_manifest(snapshot), snapshot)
        _, loaded = far.load(snapshot.release_id, None, tmp_path / "local")
        assert (loaded.als_items == snapshot.als_items).all()
        assert (tmp_path / "local" / snapshot.release_id / "index" / "cosine.faiss").is_file()

    def test_only_named_releases_are_kept(self, releases: Releases, tmp_path: Path) -> None:
        self.load(releases, tmp_path / "local")
        releases.forget(tmp_path / "local", {"2026-01-01.a"})
        assert (tmp_path / "local" / "2026-01-01.a").is_dir()
        releases.forget(tmp_path / "local", {"other"})
        assert not (tmp_path / "local" / "2026-01-01.a").exists()


def test_ten_times_the_load_is_shed_or_answered_and_it_recovers_by_itself(
    serving_settings: Settings, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = serving_settings.serving.model_copy(update={"max_concurrent": 32, "rank_timeout_ms": 200})
    world = World(serving_settings.model_copy(update={"serving": serving}), redis_server)
    world.promote(make_snapshot())

    def slow_rank(*arguments: Any) -> Any:
        time.sleep(0.02)
        return rank(*arguments)

    monkeypatch.setattr("serving.ladder.rank", slow_rank)
    world.start()
    try:
        world.put_known_user("ann")
        request = pb.RecommendRequest(user_id="ann", context={"current_item_id": "item-7"}).SerializeToString()
        statuses = asyncio.run(flood(world.address, request, callers=320, calls=10))
        assert set(statuses) <= {"OK", "RESOURCE_EXHAUSTED"}, statuses
        assert statuses["OK"] > 0
        assert statuses["RESOURCE_EXHAUSTED"] > 0
        eventually(lambda: world.client.recommend("ann", current_item="item-7").tier == "REALTIME_ALS_ONLY", seconds=30)
    finally:
        world.stop()


async def flood(address: str, request: bytes, callers: int, calls: int) -> dict[str, int]:
    """Calls by status, of so many callers at a time."""
    statuses: dict[str, int] = {}
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_unary("/recsys.v1.Recommender/Recommend")

        async def caller() -> None:
            for _ in range(calls):
                try:
                    await call(request, timeout=60)
                    status = "OK"
                except grpc.RpcError as error:
                    status = error.code().name
                statuses[status] = statuses.get(status, 0) + 1

        await asyncio.gather(*(caller() for _ in range(callers)))
    return statuses


def test_the_online_miss_of_a_thousand_users_is_the_hourly_precompute(world: World) -> None:
    records = {f"user-{i}": world.put_known_user(f"user-{i}", taste=i % 500) for i in range(1000)}
    misses = world.client.recommend_batch(list(records), 50)
    assert {answer.tier for answer in misses} == {"REALTIME_ALS_ONLY"}
    world.put_answers(records, computed_at=now_ms() + 60_000)
    hits = world.client.recommend_batch(list(records), 50)
    assert {answer.tier for answer in hits} == {"CACHE"}
    for miss, hit in zip(misses, hits, strict=True):
        assert [item.item_id for item in miss] == [item.item_id for item in hit]
        assert max(abs(a.score - b.score) for a, b in zip(miss, hit, strict=True)) < 1e-4


def test_hundreds_of_callers_at_once_each_get_their_own_answer(world: World) -> None:
    users = {f"user-{i}": world.put_known_user(f"user-{i}", taste=i * 7 % 500) for i in range(60)}
    with RecsysClient(world.address, options=ClientOptions(timeout=60, attempts=1)) as client, ThreadPoolExecutor(60) as pool:
        alone = {user: [i.item_id for i in client.recommend(user, 7, current_item="item-3")] for user in users}
        together = list(pool.map(lambda user: client.recommend(user, 7, current_item="item-3"), list(users) * 5))
    assert [[i.item_id for i in answer] for answer in together] == [alone[user] for user in list(users) * 5]
    rankings = sum(world.server.metrics.steps["rank"].counts)
    assert rankings < 60 + 300, "calls that waited together were ranked together"


def test_an_error_of_the_client_names_the_status(empty_world: World) -> None:
    empty_world.start()
    with pytest.raises(RecsysError) as caught:
        empty_world.client.recommend("ann")
    assert caught.value.status == "UNAVAILABLE"
