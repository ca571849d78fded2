"""A release is read as it was written, verified to the last byte, and promoted only when it is whole."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from snapshots import make_manifest, make_snapshot, with_two_tower
from towers import random_inputs

from recsys_core.index import VectorIndex, build_index
from recsys_core.ranking import Snapshot
from recsys_core.release import CHAMPION, MANIFEST, Manifest, Pointer, ReleaseError, Releases, StoreAway, new_release_id
from recsys_core.settings import IndexSettings, RankingSettings

NAME = "2026-01-01.a"


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    return make_snapshot(NAME, items=60)


@pytest.fixture
def releases(tmp_path: Path, snapshot: Snapshot) -> Releases:
    """One release, not promoted."""
    found = Releases(str(tmp_path / "releases"))
    found.write(make_manifest(snapshot), snapshot)
    return found


def file_of(releases: Releases, name: str) -> Path:
    return Path(releases.path(NAME, name))


def test_a_release_is_read_as_it_was_written(releases: Releases, snapshot: Snapshot) -> None:
    manifest, read = releases.load(NAME)
    assert read.items.equals(snapshot.items)
    np.testing.assert_array_equal(read.als_items, snapshot.als_items)
    np.testing.assert_array_equal(read.als_gram, snapshot.als_gram)
    np.testing.assert_array_equal(read.popular, snapshot.popular)
    assert (read.release_id, read.als_version) == (NAME, "factors-1")
    assert (read.als_alpha, read.als_regularization) == (10.0, 0.1)
    queries = snapshot.als_items[:5]
    for metric, index in snapshot.indexes.items():
        np.testing.assert_array_equal(read.indexes[metric].search(queries, 10), index.search(queries, 10))
    assert manifest.sources["als_factors"] == {"partition": "2026-01-01", "data_version": "abc"}


def test_a_release_holds_no_pickle(releases: Releases) -> None:
    names = {p.relative_to(releases.path(NAME)).as_posix() for p in Path(releases.path(NAME)).rglob("*") if p.is_file()}
    assert names == {MANIFEST, *releases.manifest(NAME).files}
    assert {Path(name).suffix for name in names} == {".json", ".npy", ".parquet", ".faiss"}
    for name in names:
        if name.endswith(".npy"):
            np.load(releases.path(NAME, name), allow_pickle=False)


def test_a_release_is_never_written_twice(releases: Releases, snapshot: Snapshot) -> None:
    with pytest.raises(ReleaseError, match="exists already"):
        releases.write(make_manifest(snapshot), snapshot)


def test_a_folder_without_manifest_is_no_release(releases: Releases) -> None:
    file_of(releases, MANIFEST).unlink()
    assert releases.list() == []
    with pytest.raises(ReleaseError, match=r"manifest\.json is missing"):
        releases.load(NAME)


def test_releases_are_listed_oldest_first(releases: Releases, snapshot: Snapshot) -> None:
    older = replace(snapshot, release_id="2025-12-31.z")
    releases.write(replace(make_manifest(older), created_at=1.0), older)
    assert [m.release_id for m in releases.list()] == ["2025-12-31.z", NAME]


def test_no_releases_are_an_empty_list_and_no_champion(tmp_path: Path) -> None:
    empty = Releases(str(tmp_path / "none"))
    assert empty.list() == []
    assert empty.champion() is None


@pytest.mark.parametrize(
    "name", ["items.parquet", "als/items.npy", "als/gram.npy", "popular.npy", "similar.npy", "index/cosine.faiss"]
)
@pytest.mark.parametrize("at", [0.0, 0.5, 0.999])
def test_a_flipped_byte_anywhere_is_refused_and_never_promoted(releases: Releases, name: str, at: float) -> None:
    path = file_of(releases, name)
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ReleaseError, match=f"release {NAME}: {name} is corrupt"):
        releases.promote(NAME)
    assert releases.champion() is None


def test_the_manifest_that_is_verified_is_the_one_that_is_used(releases: Releases, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may write over it between two looks."""
    pointer, read, looks = releases.promote(NAME), releases._bytes, []
    other = json.dumps(json.loads(file_of(releases, MANIFEST).read_text()) | {"day": "2020-01-01"}).encode()

    def bytes_of(release_id: str, name: str) -> bytes:
        looks.append(name)
        return other if name == MANIFEST and looks.count(MANIFEST) == 1 else read(release_id, name)

    monkeypatch.setattr(releases, "_bytes", bytes_of)
    with pytest.raises(ReleaseError, match="not the one that was promoted"):
        releases.load(NAME, pointer.manifest_sha256)


def test_a_shorter_file_is_refused_with_both_sizes(releases: Releases) -> None:
    path = file_of(releases, "popular.npy")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ReleaseError, match=f"popular.npy has {size - 3} bytes, the manifest says {size}"):
        releases.load(NAME)


def test_a_manifest_other_than_the_promoted_one_is_refused(releases: Releases) -> None:
    pointer = releases.promote(NAME, reason="because")
    path = file_of(releases, MANIFEST)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"day": "2020-01-01"}))
    with pytest.raises(ReleaseError, match=r"manifest\.json is not the one that was promoted"):
        releases.load(NAME, pointer.manifest_sha256)


def test_the_champion_is_what_was_promoted_last(releases: Releases, snapshot: Snapshot) -> None:
    releases.promote(NAME)
    other = replace(snapshot, release_id="2026-01-02.b")
    releases.write(make_manifest(other), other)
    pointer = releases.promote("2026-01-02.b", reason="better")
    assert releases.champion() == pointer
    assert (pointer.release_id, pointer.reason) == ("2026-01-02.b", "better")


def with_releases(releases: Releases, snapshot: Snapshot, *names: str) -> None:
    """Further releases, each promoted."""
    for name in names:
        other = replace(snapshot, release_id=name)
        releases.write(make_manifest(other), other)
        releases.promote(name)


def test_a_rollback_returns_to_the_champions_before_one_after_the_other(releases: Releases, snapshot: Snapshot) -> None:
    releases.promote(NAME)
    with_releases(releases, snapshot, "2026-01-02.b", "2026-01-03.c")
    assert [releases.roll_back()[0].release_id for _ in range(2)] == ["2026-01-02.b", NAME]
    with pytest.raises(ReleaseError, match="no earlier champion"):
        releases.roll_back()
    assert releases.champion().release_id == NAME


def test_a_rollback_passes_over_a_release_that_is_gone_or_broken(releases: Releases, snapshot: Snapshot) -> None:
    releases.promote(NAME)
    with_releases(releases, snapshot, "2026-01-02.b", "2026-01-03.c")
    Path(releases.path("2026-01-02.b", "popular.npy")).write_bytes(b"")
    pointer, passed_over = releases.roll_back(reason="bad answers")
    assert (pointer.release_id, pointer.reason) == (NAME, "bad answers")
    assert list(passed_over) == ["2026-01-02.b"]
    assert "popular.npy" in passed_over["2026-01-02.b"]


def test_a_release_promoted_again_is_once_in_the_history(releases: Releases, snapshot: Snapshot) -> None:
    releases.promote(NAME)
    with_releases(releases, snapshot, "2026-01-02.b")
    releases.promote(NAME)
    releases.promote(NAME)
    assert releases.champion().previous == ("2026-01-02.b",)


def test_a_pointer_without_a_history_is_read(releases: Releases) -> None:
    Path(releases.path(CHAMPION)).write_text('{"release_id": "a", "manifest_sha256": "b", "promoted_at": 1.0}')
    assert releases.champion() == Pointer("a", "b", 1.0)
    Path(releases.path(CHAMPION)).write_text("[]")
    with pytest.raises(ReleaseError, match="not a pointer"):
        releases.champion()


@pytest.mark.parametrize(
    "odd",
    [
        {"manifest_sha256": ""},
        {"manifest_sha256": None},
        {"promoted_at": "yesterday"},
        {"promoted_at": float("nan")},
        {"sequence": "7"},
        {"previous": "2026-01-01.a"},
        {"withdrawn": {"2026-01-01.a": 1}},
        {"release_id": 5},
    ],
    ids=repr,
)
def test_a_pointer_that_says_odd_things_is_none(releases: Releases, odd: dict[str, object]) -> None:
    said = {"release_id": "a", "manifest_sha256": "b", "promoted_at": 1.0, "sequence": 3, "previous": ["c"], **odd}
    Path(releases.path(CHAMPION)).parent.mkdir(parents=True, exist_ok=True)
    Path(releases.path(CHAMPION)).write_text(json.dumps(said))
    with pytest.raises(ReleaseError, match="not a pointer"):
        releases.champion()


def test_the_release_of_a_day_that_was_made_last_is_found(releases: Releases, snapshot: Snapshot) -> None:
    with_releases(releases, snapshot, "2026-01-01.c", "2026-01-01.b", "2026-01-02.a")
    assert releases.newest_of("2026-01-01") == "2026-01-01.b"
    with pytest.raises(ReleaseError, match="no release of 2025-01-01"):
        releases.newest_of("2025-01-01")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not json", "is not JSON"),
        (b"[]", "is not JSON"),
        (b"{}", "schema version None, this process reads 1"),
        (b'{"schema_version": 2}', "schema version 2"),
        (b'{"schema_version": 1}', "does not fit its schema"),
    ],
)
def test_a_manifest_that_is_none_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ReleaseError, match=message):
        Manifest.from_bytes(data, "release x")


def test_a_release_made_by_a_newer_platform_is_refused(releases: Releases) -> None:
    path = file_of(releases, MANIFEST)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    with pytest.raises(ReleaseError, match="schema version 99"):
        releases.load(NAME)


def test_release_ids_sort_by_day_and_moment() -> None:
    ids = [new_release_id("2026-01-01", t) for t in (1.0e9, 1.1e9)] + [new_release_id("2026-01-02", 1.0e9)]
    assert ids == sorted(ids)
    assert len(set(ids)) == 3


def test_a_two_tower_model_is_read_as_it_was_written(tmp_path: Path, snapshot: Snapshot) -> None:
    made = with_two_tower(snapshot)
    tuned = replace(made, ranking=RankingSettings(als_weight=0.25, trend_mix=(0.5, -0.25, 0.25)))
    releases = Releases(str(tmp_path))
    releases.write(make_manifest(tuned), tuned)
    manifest, read = releases.load(NAME)
    assert {"two_tower/items.npy", "two_tower/tower.json", "two_tower/users.npy"} <= set(manifest.files)
    assert "two_tower/index.faiss" not in manifest.files, "so few items are scanned"
    assert read.ranking == tuned.ranking
    inputs = random_inputs(["someone"], list(snapshot.item_ids), 20)
    queries = made.tower.vectors(inputs)
    np.testing.assert_array_equal(read.tower.vectors(inputs), queries)
    np.testing.assert_array_equal(read.two_tower_index.search(queries, 9), made.two_tower_index.search(queries, 9))


def test_a_graph_over_the_item_tower_is_kept_where_there_is_one(tmp_path: Path, snapshot: Snapshot) -> None:
    made = with_two_tower(snapshot)
    graph, _ = build_index(made.two_tower_items, "inner_product", IndexSettings(ef_construction=64, tuning_queries=50))
    made = replace(made, two_tower_index=graph)
    releases = Releases(str(tmp_path))
    manifest = make_manifest(made)
    releases.write(replace(manifest, index={**manifest.index, "two_tower": {"ef_search": 64, "recall": 1.0}}), made)
    _, read = releases.load(NAME)
    assert isinstance(read.two_tower_index, VectorIndex)
    assert (read.two_tower_index.items, read.two_tower_index.ef_search) == (60, 64)


def test_a_two_tower_model_that_does_not_fit_is_refused(tmp_path: Path, snapshot: Snapshot) -> None:
    made = with_two_tower(snapshot)
    releases = Releases(str(tmp_path))
    for name, models, reason in (
        ("r1", {"two_tower": {"version": "another"}}, "two_tower is version 'made-up', manifest.json says 'another'"),
        ("r2", {"two_tower": {"version": "made-up"}}, "two_tower/items.npy has shape"),
    ):
        broken = replace(made, release_id=name)
        if name == "r2":
            broken = replace(broken, two_tower_items=made.two_tower_items[:, :3])
        manifest = make_manifest(broken)
        releases.write(replace(manifest, models={**manifest.models, **models}), broken)
        with pytest.raises(ReleaseError, match=reason):
            releases.load(name)
    alone = replace(snapshot, release_id="r3")
    manifest = make_manifest(alone)
    releases.write(replace(manifest, models={**manifest.models, "two_tower": {"version": "made-up"}}), alone)
    with pytest.raises(ReleaseError, match=r"does not list two_tower/items\.npy"):
        releases.load("r3")


def test_weights_that_are_none_are_refused(tmp_path: Path, snapshot: Snapshot) -> None:
    releases = Releases(str(tmp_path))
    releases.write(replace(make_manifest(snapshot), ranking={"als_weight": -1}), snapshot)
    with pytest.raises(ReleaseError, match="ranking that does not fit"):
        releases.load(NAME)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [("als_items", np.nan, "not finite"), ("similar", -2, "no position"), ("similar", 60, "no position of 60 items")],
)
def test_a_single_wrong_value_anywhere_in_an_array_is_refused(
    tmp_path: Path, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, name: str, value: float, reason: str
) -> None:
    monkeypatch.setattr("recsys_core.release.CHECKED_TOGETHER", 100)
    releases = Releases(str(tmp_path))
    for at in ((0, 0), (30, 3), (-1, -1)):
        array = getattr(snapshot, name).copy()
        array[at] = value
        broken = replace(snapshot, release_id=f"r{at[0]}", **{name: array})
        releases.write(make_manifest(broken), broken)
        with pytest.raises(ReleaseError, match=reason):
            releases.load(broken.release_id)


OUTSIDE = [
    "/etc/cron.d/x",
    "../x",
    "a/../../x",
    "..",
    ".",
    "",
    "a//b",
    "a/",
    "/",
    "..\\x",
    "C:\\x",
    "C:x",
    "a\\..\\x",
    "~/x",
    "a\0b",
    "a\nb",
]
"""Names that are no file of a release, on any system."""


def with_file(releases: Releases, name: object, entry: object = None) -> None:
    """Add a file to the manifest."""
    path = file_of(releases, MANIFEST)
    raw = json.loads(path.read_text())
    raw["files"][name] = entry or {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize("name", [*OUTSIDE, ".hidden", "als/.x", "manifest.json", "verified.json", "lock", "é", "a" * 300])
def test_a_manifest_that_names_what_is_no_file_of_its_folder_is_refused(releases: Releases, name: str, tmp_path: Path) -> None:
    with_file(releases, name)
    with pytest.raises(ReleaseError, match="can't be a file of a release"):
        releases.load(NAME, local=tmp_path / "local")
    assert not (tmp_path / "local").exists(), "nothing is written before the names are checked"


@given(st.text(max_size=40) | st.text("./\\ab:~\0", max_size=12))
def test_a_name_is_refused_or_lies_in_the_folder_of_the_release(name: str) -> None:
    raw = json.loads(make_manifest(make_small()).to_bytes()) | {"files": {name: {"bytes": 1, "sha256": "0"}}}
    try:
        Manifest.from_bytes(json.dumps(raw).encode(), "release x")
    except ReleaseError:
        return
    folder = Path("/srv/releases") / NAME
    for path in (PurePosixPath(folder, name), PureWindowsPath("C:/srv", name)):
        assert ".." not in path.parts
    assert Path(os.path.normpath(folder / name)).is_relative_to(folder)
    assert PureWindowsPath("C:/srv", name).is_relative_to("C:/srv")
    assert name.isprintable()


@example({"release_id": ""})
@given(
    st.dictionaries(
        st.sampled_from([*Manifest.__dataclass_fields__, "more"]),
        st.none()
        | st.booleans()
        | st.integers()
        | st.text(max_size=5)
        | st.lists(st.integers(), max_size=2)
        | st.just({"a": None}),
        min_size=1,
    )
)
def test_a_manifest_of_any_shape_is_read_or_refused_and_nothing_else(changes: dict[str, object]) -> None:
    raw = json.loads(make_manifest(make_small()).to_bytes()) | changes
    try:
        read = Manifest.from_bytes(json.dumps(raw).encode(), "release x")
    except ReleaseError as error:
        assert "manifest.json" in str(error)  # noqa: PT017
    else:
        assert json.loads(read.to_bytes()) == raw


@pytest.mark.parametrize(
    "entry", [{"bytes": "1", "sha256": "x"}, {"bytes": 1}, {"sha256": "x"}, [1], {"bytes": True, "sha256": "x"}]
)
def test_a_manifest_without_size_or_checksum_of_a_file_is_refused(releases: Releases, entry: object) -> None:
    with_file(releases, "more.npy", entry)
    with pytest.raises(ReleaseError, match=r"bytes and sha256 of more\.npy"):
        releases.load(NAME)


@pytest.mark.parametrize("name", [*OUTSIDE, "a/b"])
def test_an_id_that_is_no_folder_of_the_releases_is_refused_everywhere(releases: Releases, name: str) -> None:
    for pointer in (Pointer(name or "..", "0", 1.0), Pointer(NAME, "0", 1.0, previous=(name,))):
        Path(releases.path(CHAMPION)).write_text(json.dumps(asdict(pointer)))
        with pytest.raises(ReleaseError, match="can't be the id of a release"):
            releases.champion()
    file_of(releases, CHAMPION).unlink(missing_ok=True)
    for call in (releases.load, releases.manifest, releases.promote, releases.remove, releases.item_ids):
        with pytest.raises(ReleaseError):
            call(name)


def test_a_foreign_folder_among_the_releases_is_no_release(releases: Releases) -> None:
    for name in (".git", "my notes", "ä"):
        (Path(releases.root) / name).mkdir()
        (Path(releases.root) / name / MANIFEST).write_text("{}")
    assert releases.names() == [NAME]


def test_local_files_are_copies_that_nobody_writes(releases: Releases, tmp_path: Path) -> None:
    """A hard link or a link by name would be cut short with the store's file, which kills who has it mapped."""
    manifest, read = releases.load(NAME, local=tmp_path / "local")
    before = read.als_items.copy()
    for name in manifest.files:
        own = tmp_path / "local" / NAME / name
        assert not own.is_symlink()
        assert own.stat().st_nlink == 1
        assert not own.stat().st_mode & 0o222
        with open(file_of(releases, name), "r+b") as file:
            file.truncate(0)
    np.testing.assert_array_equal(read.als_items, before)
    assert releases.load(NAME, local=tmp_path / "local")[1].items.num_rows == read.items.num_rows, "what is there is verified"


def test_a_local_file_that_is_linked_to_another_place_is_copied_again(releases: Releases, tmp_path: Path) -> None:
    releases.load(NAME, local=tmp_path / "local")
    own = tmp_path / "local" / NAME / "popular.npy"
    os.link(own, tmp_path / "other")
    releases.load(NAME, local=tmp_path / "local")
    assert own.stat().st_nlink == 1


def test_a_copy_that_fails_leaves_nothing_half_made(releases: Releases, tmp_path: Path) -> None:
    path = file_of(releases, "popular.npy")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ReleaseError, match=r"popular\.npy has"):
        releases.load(NAME, local=tmp_path / "local")
    left = {p.name for p in (tmp_path / "local").rglob("*") if p.is_file()}
    assert not [name for name in left if name.endswith(".part") or name in ("popular.npy", "verified.json")]


class Broken:
    """A file system whose every call raises."""

    protocol = ("far",)

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getattr__(self, name: str) -> object:
        def call(*_: object, **__: object) -> None:
            raise self.error

        return call


class EndpointConnectionError(Exception):
    """Like botocore's: no OSError."""


@pytest.mark.parametrize(
    "error", [EndpointConnectionError("no route"), PermissionError("403"), TimeoutError("late"), TypeError("x"), KeyError("y")]
)
def test_whatever_the_store_raises_is_one_exception(releases: Releases, snapshot: Snapshot, error: Exception) -> None:
    releases.fs = Broken(error)
    other = replace(snapshot, release_id="2026-01-02.b")
    for call in (
        releases.champion,
        releases.names,
        releases.list,
        releases.roll_back,
        lambda: releases.manifest(NAME),
        lambda: releases.load(NAME),
        lambda: releases.promote(NAME),
        lambda: releases.remove(NAME),
        lambda: releases.item_ids(NAME),
        lambda: releases.newest_of("2026-01-01"),
        lambda: releases.write(make_manifest(other), other),
    ):
        with pytest.raises(StoreAway, match=str(error).strip("'")):
            call()


@cache
def make_small() -> Snapshot:
    return make_snapshot(NAME, items=12, rank=4)
