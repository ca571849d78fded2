"""Pointers under several writers: on a disk between processes, in memory between threads, in S3 over HTTP."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from together import in_processes, in_threads

from recsys_core import stores
from recsys_core.stores import LOCK, delete_pointer, open_filesystem, read_pointer, sync_files, update, write_atomically

WRITERS, TIMES = 4, 25


@pytest.fixture
def place(any_store: str) -> tuple[Any, str]:
    """A store of each kind and a path in it where nothing is."""
    fs, root = open_filesystem(any_store)
    return fs, f"{root}/folder/pointer.json"


def add(name: str) -> stores.Change:
    """Note a name among those that are there, each under a number of its own."""

    def change(said: bytes | None) -> bytes:
        names = json.loads(said or b"[]")
        return json.dumps([*names, name]).encode()

    return change


def add_often(path: str, writer: str) -> None:
    fs, inside = open_filesystem(path)
    for time in range(TIMES):
        update(fs, inside, add(f"{writer}-{time}"))


ALL = sorted(f"{writer}-{time}" for writer in range(WRITERS) for time in range(TIMES))


def test_processes_that_change_a_pointer_of_a_disk_lose_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "a" / "pointer.json")
    in_processes(add_often, [(path, str(n)) for n in range(WRITERS)])
    assert sorted(json.loads(Path(path).read_bytes())) == ALL


def test_threads_that_change_a_pointer_lose_nothing(place: tuple[Any, str]) -> None:
    fs, path = place
    in_threads([lambda n=n: [update(fs, path, add(f"{n}-{time}")) for time in range(TIMES)] for n in range(WRITERS)])
    assert sorted(json.loads(read_pointer(fs, path) or b"")) == ALL


def test_s3_alone_refuses_a_writer_that_was_overtaken(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As between processes of two machines, which share no lock."""
    monkeypatch.setattr(stores, "_guards", [Unlocked()])
    fs, path = open_filesystem(f"{s3}/pointer.json")
    in_threads([lambda n=n: [update(fs, path, add(f"{n}-{time}")) for time in range(TIMES)] for n in range(WRITERS)])
    assert sorted(json.loads(read_pointer(fs, path) or b"")) == ALL


class Unlocked:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_a_write_to_s3_whose_answer_was_lost_is_not_made_twice(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fs, path = open_filesystem(f"{s3}/pointer.json")
    put = type(fs).pipe_file

    def put_twice(self: Any, *args: Any, **kwargs: Any) -> Any:
        put(self, *args, **kwargs)
        return put(self, *args, **kwargs)

    monkeypatch.setattr(type(fs), "pipe_file", put_twice)
    update(fs, path, add("once"))
    update(fs, path, add("again"))
    assert json.loads(read_pointer(fs, path) or b"") == ["once", "again"]


def test_a_change_that_is_refused_leaves_the_pointer(place: tuple[Any, str]) -> None:
    fs, path = place
    update(fs, path, lambda _: b"kept")

    def refuse(said: bytes | None) -> bytes:
        assert said == b"kept"
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        update(fs, path, refuse)
    assert update(fs, path, lambda _: None) == b"kept" == read_pointer(fs, path)
    assert update(fs, path, lambda _: b"new") == b"new"


def test_a_pointer_is_deleted_only_while_it_says_what_may_go(place: tuple[Any, str]) -> None:
    fs, path = place
    assert delete_pointer(fs, path, lambda _: False), "there was none"
    update(fs, path, lambda _: b"kept")
    assert not delete_pointer(fs, path, lambda said: said == b"another")
    assert read_pointer(fs, path) == b"kept"
    assert delete_pointer(fs, path, lambda said: said == b"kept")
    assert read_pointer(fs, path) is None
    if stores.is_local(fs):
        assert os.listdir(os.path.dirname(path)) == []


def test_a_pointer_that_is_deleted_and_made_by_many_is_never_lost_between_them(tmp_path: Path) -> None:
    """The lock goes with the pointer, and nobody works under a lock that is gone."""
    fs, path = open_filesystem(str(tmp_path / "a" / "pointer"))
    inside: list[int] = []

    def change(_: bytes | None) -> bytes:
        inside.append(1)
        assert len(inside) == 1, "two at once"
        inside.pop()
        return b"there"

    def writer() -> None:
        for _ in range(50):
            update(fs, path, change)

    def deleter() -> None:
        for _ in range(50):
            delete_pointer(fs, path, lambda _: True)

    in_threads([writer, writer, deleter, deleter])
    update(fs, path, change)
    assert read_pointer(fs, path) == b"there"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    fs, path = open_filesystem(str(tmp_path / "file"))
    write_atomically(fs, path, b"old")

    def fail(_: int) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(type(error)):
            write_atomically(fs, path, b"new")
    assert os.listdir(tmp_path) == ["file"]
    assert Path(path).read_bytes() == b"old"


def test_what_is_written_is_on_the_disk_before_it_is_named_and_its_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, path = open_filesystem(str(tmp_path / "a" / "file"))
    done = recorded(monkeypatch)
    write_atomically(fs, path, b"content")
    kinds = [(what, os.path.basename(of)) for what, of in done]
    assert [kind for kind, _ in kinds] == ["fsync", "replace", "fsync"]
    assert kinds[0][1].startswith("file."), "the content"
    assert kinds[1:] == [("replace", "file"), ("fsync", "a")]


def test_files_are_seen_onto_the_disk_with_the_folders_that_name_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "partition" / "version"
    folder.mkdir(parents=True)
    paths = [str(folder / name) for name in ("a", "b")]
    for path in paths:
        Path(path).write_bytes(b"x")
    done = recorded(monkeypatch)
    sync_files(open_filesystem(str(tmp_path))[0], paths)
    assert [of for _, of in done] == [*paths, str(folder), str(folder.parent)]
    sync_files(open_filesystem("memory://x")[0], ["nowhere"])


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Syncs and renames from now on, with the path that each is of."""
    done: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace
    path_of = lambda opened: os.readlink(f"/proc/self/fd/{opened}")  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda opened: (done.append(("fsync", path_of(opened))), fsync(opened)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append(("replace", new)), replace(old, new)))
    return done


def test_a_lock_beside_a_pointer_is_no_part_of_it(tmp_path: Path) -> None:
    fs, path = open_filesystem(str(tmp_path / "p"))
    update(fs, path, lambda _: b"1")
    assert sorted(os.listdir(tmp_path)) == ["p", "p" + LOCK]
