"""A new release is taken without a restart, a broken one is refused by name while the old one stays."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from snapshots import make_manifest, make_snapshot
from worlds import World, eventually

from recsys_core.release import CHAMPION, Pointer, Releases
from recsys_core.stores import write_atomically
from serving.client import RecsysClient, RecsysError

OLD = "2026-01-01.a"
NEW = "2026-01-02.b"


def serves(world: World, release_id: str) -> bool:
    return world.client.get_release().release_id == release_id


def folder(world: World) -> Path:
    return Path(world.releases.path(NEW))


def point_at_new(world: World) -> None:
    """What a promotion writes, without the verification that comes before."""
    digest = hashlib.sha256((folder(world) / "manifest.json").read_bytes()).hexdigest()
    pointer = Pointer(NEW, digest, time.time())
    write_atomically(world.releases.fs, world.releases.path(CHAMPION), json.dumps(asdict(pointer)).encode())


def write_new(world: World) -> None:
    snapshot = make_snapshot(NEW)
    world.releases.write(make_manifest(snapshot), snapshot)


def rewrite(world: World, name: str, data: bytes) -> None:
    """Replace a file and make size and checksum of the manifest agree with it."""
    (folder(world) / name).write_bytes(data)
    manifest = json.loads((folder(world) / "manifest.json").read_bytes())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder(world) / "manifest.json").write_text(json.dumps(manifest))


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(bytes(data))


FILES = [
    "items.parquet",
    "als/items.npy",
    "als/gram.npy",
    "popular.npy",
    "similar.npy",
    "index/inner_product.faiss",
    "index/cosine.faiss",
]


def test_a_promoted_release_is_in_service_without_a_restart(world: World) -> None:
    assert serves(world, OLD)
    world.promote(make_snapshot(NEW, items=300))
    eventually(lambda: serves(world, NEW))
    assert world.client.recommend("nobody").release_id == NEW
    assert world.client.get_release().item_count == 300


def test_calls_do_not_fail_while_releases_change(world: World) -> None:
    users = [f"user-{i}" for i in range(20)]
    for i, user in enumerate(users):
        world.put_known_user(user, taste=i)
    stop = threading.Event()
    failed: list[RecsysError] = []
    answered: list[str] = []

    def call() -> None:
        with RecsysClient(world.address, timeout=60) as client:
            while not stop.is_set():
                for user in users:
                    try:
                        answered.append(client.recommend(user, 60).release_id)
                    except RecsysError as error:
                        failed.append(error)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for name in (NEW, "2026-01-03.c"):
        world.promote(make_snapshot(name))
        eventually(lambda name=name: serves(world, name))
    stop.set()
    for caller in callers:
        caller.join()
    assert not failed
    assert {OLD, NEW} <= set(answered)


def test_a_rollback_is_a_promotion_of_the_old_release(world: World) -> None:
    world.promote(make_snapshot(NEW))
    eventually(lambda: serves(world, NEW))
    world.releases.promote(OLD, reason="rollback")
    eventually(lambda: serves(world, OLD))


def assert_refused(world: World, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """The new release is refused for its file `name`, said once, and the old one goes on."""
    point_at_new(world)
    refused = eventually(lambda: world.client.get_release().last_refused)
    assert refused.release_id == NEW
    assert name in refused.reason
    assert serves(world, OLD)
    assert len(world.client.recommend("nobody")) == 10
    time.sleep(0.3)
    said = [r for r in caplog.records if r.name == "serving.champion" and name in r.getMessage()]
    assert len(said) == 1, "a refusal is logged once, not at every look"
    assert f"{OLD} stays in service" in said[0].getMessage()


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_flipped_byte_is_refused(world: World, name: str, caplog: pytest.LogCaptureFixture) -> None:
    write_new(world)
    original = (folder(world) / "manifest.json").read_bytes()
    flip_byte(folder(world) / name)
    if name == "manifest.json":
        digest = hashlib.sha256(original).hexdigest()
        pointer = json.dumps(asdict(Pointer(NEW, digest, time.time()))).encode()
        write_atomically(world.releases.fs, world.releases.path(CHAMPION), pointer)
        refused = eventually(lambda: world.client.get_release().last_refused)
        assert "manifest.json" in refused.reason
        assert serves(world, OLD)
    else:
        assert_refused(world, name, caplog)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(world: World, name: str, caplog: pytest.LogCaptureFixture) -> None:
    write_new(world)
    (folder(world) / name).unlink()
    assert_refused(world, name, caplog)


WRONG: dict[str, Callable[[World], tuple[str, bytes]]] = {
    "fewer factors than items": lambda _: ("als/items.npy", npy(np.zeros((499, 16), np.float32))),
    "factors of another rank": lambda _: ("als/items.npy", npy(np.zeros((500, 8), np.float32))),
    "a gram of another rank": lambda _: ("als/gram.npy", npy(np.zeros((8, 8)))),
    "popularity of fewer items": lambda _: ("popular.npy", npy(np.zeros(499, np.float32))),
    "factors that are not finite": lambda _: ("als/items.npy", npy(np.full((500, 16), np.nan, np.float32))),
    "similar items that are none": lambda _: ("similar.npy", npy(np.full((500, 50), 500, np.int32))),
    "similar items of fewer items": lambda _: ("similar.npy", npy(np.zeros((499, 50), np.int32))),
    "an index of another dimension": lambda _: (
        "index/cosine.faiss",
        make_snapshot(items=500, rank=8).indexes["cosine"].serialize(),
    ),
    "an index of fewer items": lambda _: ("index/cosine.faiss", make_snapshot(items=400).indexes["cosine"].serialize()),
    "an index that is none": lambda _: ("index/cosine.faiss", b"not an index at all"),
    "a table that is none": lambda _: ("items.parquet", b"not Parquet"),
    "pickled factors": lambda _: ("als/items.npy", npy(np.array([{}], dtype=object))),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_consistent_release_of_wrong_content_is_refused(world: World, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    write_new(world)
    name, data = WRONG[fault](world)
    rewrite(world, name, data)
    assert_refused(world, name, caplog)


@pytest.mark.parametrize("fault", ["duplicate ids", "a missing column"])
def test_a_wrong_item_table_is_refused(world: World, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    write_new(world)
    items = make_snapshot(NEW).items
    if fault == "duplicate ids":
        items = items.set_column(0, "item_id", pa.array(["item-0", *items["item_id"].to_pylist()[:-1]]))
    else:
        items = items.drop_columns(["available"])
    out = io.BytesIO()
    pq.write_table(items, out)
    rewrite(world, "items.parquet", out.getvalue())
    assert_refused(world, "items.parquet", caplog)


@pytest.mark.parametrize(
    "change", [{"schema_version": 2}, {"release_id": "other"}, {"files": {}}, {"surprise": 1}, {"index": {}}]
)
def test_a_manifest_that_does_not_fit_is_refused(world: World, change: dict[str, Any]) -> None:
    write_new(world)
    path = folder(world) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    point_at_new(world)
    refused = eventually(lambda: world.client.get_release().last_refused)
    assert "manifest.json" in refused.reason or "faiss" in refused.reason
    assert serves(world, OLD)


def test_a_pointer_that_is_no_pointer_leaves_the_release_in_service(world: World) -> None:
    Path(world.releases.path(CHAMPION)).write_text("{")
    refused = eventually(lambda: world.client.get_release().last_refused)
    assert "champion.json" in refused.reason
    assert serves(world, OLD)
    world.promote(make_snapshot(NEW))
    eventually(lambda: serves(world, NEW))


def test_a_release_folder_that_vanishes_under_the_server_is_not_missed(world: World) -> None:
    shutil.rmtree(world.releases.root)
    time.sleep(0.3)
    assert len(world.client.recommend("nobody")) == 10
    assert len(world.client.similar_items("item-1")) == 10


def test_a_refused_release_is_not_read_again_at_every_look(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    load = Releases.load

    def counted(releases: Releases, release_id: str, *rest: Any) -> Any:
        reads.append(release_id)
        return load(releases, release_id, *rest)

    monkeypatch.setattr(Releases, "load", counted)
    write_new(world)
    flip_byte(folder(world) / "popular.npy")
    point_at_new(world)
    eventually(lambda: world.client.get_release().last_refused)
    time.sleep(10 * world.settings.serving.pointer_poll_seconds)
    assert reads == [NEW]


def test_a_repaired_release_is_taken(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.champion.RETRY_SECONDS", 0.2)
    write_new(world)
    path = folder(world) / "popular.npy"
    flip_byte(path)
    point_at_new(world)
    eventually(lambda: world.client.get_release().last_refused)
    flip_byte(path)
    eventually(lambda: serves(world, NEW))


class EndpointConnectionError(Exception):
    """Like that of an object store's client: no OSError."""


def told(caplog: pytest.LogCaptureFixture, text: str) -> int:
    return sum(text in r.getMessage() for r in caplog.records if r.name == "serving.champion")


def test_a_store_that_is_away_is_told_when_it_goes_and_when_it_comes_back(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each failure has another message, as object stores give each request a number."""
    caplog.set_level("INFO", "serving.champion")
    events = world.server.metrics.events
    for times in (1, 2):
        failures = itertools.count()

        def away(*_: object, failures: Iterator[int] = failures) -> bytes:
            raise EndpointConnectionError(f"no route to https://u:hush@s3.example, request {next(failures)}")

        with monkeypatch.context() as patch:
            patch.setattr(world.server.champion._releases.fs, "cat_file", away)
            before = events["release_store_failures"]
            eventually(lambda before=before: events["release_store_failures"] >= before + 3)
            assert len(world.client.recommend("nobody")) == 10
        eventually(lambda times=times: told(caplog, "answers again") == times)
        assert told(caplog, f"{OLD} stays in service") == times
    assert events["refused_releases"] == 0
    assert world.client.get_release().last_refused is None
    assert "hush" not in caplog.text
    assert "Traceback" not in caplog.text
    world.promote(make_snapshot(NEW))
    eventually(lambda: serves(world, NEW))


def test_a_server_that_starts_while_the_store_is_away_says_so_and_takes_the_release_later(
    empty_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty_world.promote(make_snapshot())

    def away(*_: object) -> bytes:
        raise EndpointConnectionError("no route")

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "cat_file", away)
        empty_world.start()
        with pytest.raises(RecsysError, match=r"UNAVAILABLE: no release is in service: .*no route"):
            empty_world.client.recommend("ann")
    eventually(lambda: empty_world.server.champion.current)
    assert len(empty_world.client.recommend("ann")) == 10


def test_an_equal_refusal_after_another_release_was_served_is_told_again(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    write_new(world)
    flip_byte(folder(world) / "popular.npy")
    for times in (1, 2):
        point_at_new(world)
        eventually(lambda times=times: world.server.metrics.events["refused_releases"] == times)
        world.releases.promote(OLD)
        eventually(lambda: world.server.champion._refused_pointer is None)
    assert told(caplog, "popular.npy is corrupt") == 2


def test_a_fault_while_loading_is_logged_once_with_its_place(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.champion.RETRY_SECONDS", 0.05)
    monkeypatch.setattr("serving.champion.derive", lambda *_: 1 / 0)
    world.promote(make_snapshot(NEW))
    eventually(lambda: world.client.get_release().last_refused)
    time.sleep(0.5)
    assert told(caplog, "ZeroDivisionError") == 1
    assert caplog.text.count("Traceback") == 1


def test_without_a_release_calls_are_unavailable_until_one_is_promoted(empty_world: World) -> None:
    empty_world.start()
    for call in (
        lambda: empty_world.client.recommend("ann"),
        lambda: empty_world.client.recommend_batch(["ann"]),
        lambda: empty_world.client.similar_items("item-1"),
        lambda: empty_world.client.get_release(),
    ):
        with pytest.raises(RecsysError, match="UNAVAILABLE: no release has been promoted yet"):
            call()
    empty_world.promote(make_snapshot())
    eventually(lambda: empty_world.server.champion.current)
    assert len(empty_world.client.recommend("ann")) == 10


def test_a_first_release_that_is_broken_is_named_in_the_status(empty_world: World) -> None:
    write_new(empty_world)
    flip_byte(folder(empty_world) / "popular.npy")
    point_at_new(empty_world)
    empty_world.start()
    with pytest.raises(RecsysError, match=r"UNAVAILABLE.*popular\.npy is corrupt"):
        empty_world.client.recommend("ann")


def test_what_the_release_is_made_from_is_told(world: World) -> None:
    release = world.client.get_release()
    assert release.models == {"als": "factors-1", "two_tower": None}
    assert release.metrics == {"als.ndcg@10": 0.4, "users": 100.0}
    assert (release.day, release.item_count, release.last_refused) == ("2026-01-01", 500, None)
    assert release.created_at <= release.promoted_at <= release.loaded_at
    assert [s.asset for s in release.sources] == ["als_factors", "item_catalog"]


def test_factors_of_another_version_are_not_mixed_with_the_release(world: World) -> None:
    record = world.put_known_user("ann")
    world.put_record("ann", replace(record, als_version="factors-0"))
    assert world.client.recommend("ann").tier == "POPULAR", "an old factor is no knowledge of this release's space"
