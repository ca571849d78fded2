"""The ledger of the landing zone: in every kind of store, and under several writers."""

from __future__ import annotations

import os
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st
from together import in_processes

from recsys_core import ledger as ledger_module
from recsys_core.lake import Lake
from recsys_core.ledger import HEAD, LEDGER, Advance, DamagedLedger, LandingFile, Ledger, LedgerChanged


@pytest.fixture
def ledger(any_store: str) -> Ledger:
    """One in a store of each kind, whose head holds few changes."""
    return Ledger(Lake(any_store))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "HEAD_ROWS", 4)
    monkeypatch.setattr(ledger_module, "PART_ROWS", 32)


def file(ledger: Ledger, name: str, first: int = 0, last: int = 10, **more: int) -> LandingFile:
    rows = more.pop("rows", 3)
    return LandingFile(
        ledger._lake.path("landing", f"{name}.parquet"), rows, 100, first, last, 1_700, hours={"2026-03-02T10": rows}, **more
    )


def names(ledger: Ledger) -> list[str]:
    return [one.path.rsplit("/", 1)[-1].removesuffix(".parquet") for one in ledger.read().files()]


def test_a_file_counts_from_its_commit_on(ledger: Ledger) -> None:
    assert (ledger.read().version, names(ledger)) == (0, [])
    assert ledger.commit([file(ledger, "app/b"), file(ledger, "app/a", 5, 7)]) == 1
    assert names(ledger) == ["a", "b"]
    found = Ledger(ledger._lake).read()
    assert found.files()[0] == file(ledger, "app/a", 5, 7, since=1)
    assert found.extent() == (0, 10)
    assert [one.path for one in found.covering(8, 9)] == [file(ledger, "app/b").path]


def test_files_are_replaced_and_taken_out_together(ledger: Ledger) -> None:
    ledger.commit([file(ledger, "app/a"), file(ledger, "app/b")])
    ledger.commit([file(ledger, "app/a", rows=2)], [file(ledger, "app/b").path])
    found = ledger.read()
    assert [one.rows for one in found.files()] == [2]
    assert [row["path"] for row in found.gone.to_pylist()] == ["landing/app/b.parquet"]


def test_any_name_counts_as_it_is(ledger: Ledger) -> None:
    odd = ["app/a b%20", "app/ä'\"\\", "app/=x", 'app/{"path"}']
    ledger.commit([file(ledger, name) for name in odd])
    assert sorted(names(ledger)) == sorted(name.removeprefix("app/") for name in odd)


def test_what_arrived_since_a_commit_is_what_came_and_is_still_there(ledger: Ledger) -> None:
    def news(since: int) -> list[tuple[str, int]]:
        rows = ledger.added_since(since)
        return list(zip(rows["path"].to_pylist(), rows["since"].to_pylist(), strict=True))

    first = ledger.commit([file(ledger, "a")])
    ledger.commit([file(ledger, "b"), file(ledger, "c")])
    ledger.commit(removed=[file(ledger, "c").path])
    assert news(first) == [("landing/b.parquet", 2)]
    last = ledger.commit([file(ledger, "joined", since=2)], [file(ledger, "a").path, file(ledger, "b").path])
    assert news(last) == []
    assert news(first) == [("landing/joined.parquet", 2)], "who has not looked since hears of it"
    for n in range(20):
        ledger.commit([file(ledger, f"more-{n}")])
    assert len(news(last)) == 20
    assert news(first)[0] == ("landing/joined.parquet", 2)


def test_an_archive_goes_on_only_from_where_it_is_or_beyond(ledger: Ledger) -> None:
    def go_on(first: int, end: int, archive: str = "t/0") -> None:
        ledger.commit([file(ledger, f"{archive}-{first}-{end}")], advance=Advance(archive, first, end))

    assert ledger.reached("t/0") is None
    go_on(5, 10)
    go_on(0, 3, "t/1")
    for first in (0, 5, 9):
        with pytest.raises(LedgerChanged, match="is at 10"):
            go_on(first, 12)
    go_on(10, 12)
    go_on(20, 22)
    assert (ledger.reached("t/0"), ledger.reached("t/1")) == (22, 3)
    assert len(names(ledger)) == 4


@pytest.mark.parametrize("later", [0, 9])
def test_a_commit_that_rests_on_files_is_refused_once_one_of_them_changed(ledger: Ledger, later: int) -> None:
    ledger.commit([file(ledger, "a"), file(ledger, "b")])
    seen = ledger.read().version
    for n in range(later):
        ledger.commit([file(ledger, f"other-{n}")])
    ledger.commit([file(ledger, "joined")], [file(ledger, "b").path], as_of=seen)
    with pytest.raises(LedgerChanged, match=r"b\.parquet changed after commit"):
        ledger.commit([file(ledger, "b")], as_of=seen)
    ledger.commit([file(ledger, "a", rows=1)], as_of=seen)
    with pytest.raises(LedgerChanged, match=r"a\.parquet changed after commit"):
        ledger.commit(removed=[file(ledger, "a").path], as_of=seen)


def test_a_head_that_cannot_be_read_is_named(ledger: Ledger) -> None:
    ledger.commit([file(ledger, "a")])
    ledger._lake.fs.pipe_file(ledger._lake.path(LEDGER, HEAD), b"{half")
    for use in (ledger.read, ledger.version, lambda: ledger.commit([file(ledger, "b")])):
        with pytest.raises(DamagedLedger, match=r"head\.json is damaged .* from a backup"):
            use()


CHANGES = st.lists(st.tuples(st.sampled_from(["add", "add", "add", "remove", "settle"]), st.integers(0, 12)), max_size=80)


@given(CHANGES)
def test_whatever_is_folded_and_settled_the_same_files_count(changes: list[tuple[str, int]]) -> None:
    ledger = Ledger(Lake(f"memory://{uuid.uuid4().hex}"))
    counting: dict[str, tuple[int, int]] = {}
    for at, (what, n) in enumerate(changes):
        path = file(ledger, str(n)).path
        if what == "add":
            counting[path] = (at, ledger.commit([file(ledger, str(n), rows=at)]))
        elif what == "remove":
            ledger.commit(removed=[path])
            counting.pop(path, None)
        else:
            listing = ledger.read()
            ledger.settle(listing, listing.gone.slice(0, 0))
        other = Ledger(ledger._lake)
        assert {one.path: (one.rows, one.since) for one in other.read().files()} == counting
        news = {other._lake.path(row["path"]): (row["rows"], row["since"]) for row in other.added_since(3).to_pylist()}
        assert news == {path: said for path, said in counting.items() if said[1] > 3}


def test_settling_forgets_what_was_taken_out_but_for_what_it_is_told_to_keep(ledger: Ledger) -> None:
    for n in range(20):
        ledger.commit([file(ledger, str(n))])
    ledger.commit(removed=[file(ledger, str(n)).path for n in range(18)])
    listing = ledger.read()
    kept = listing.gone.slice(0, 1)
    ledger.settle(listing, kept)
    now = Ledger(ledger._lake).read()
    assert now.table.equals(listing.table)
    assert now.gone.equals(kept)
    assert len(Ledger(ledger._lake).parts()) == 1


def test_settling_by_an_older_look_changes_nothing(ledger: Ledger) -> None:
    ledger.commit([file(ledger, str(n)) for n in range(6)])
    listing = ledger.read()
    for n in range(30):
        ledger.commit([file(ledger, f"later-{n}")])
    ledger.settle(listing, listing.gone)
    assert len(names(Ledger(ledger._lake))) == 36


# -- several writers ------------------------------------------------------------------------------------------------------


def go_on(place: str, environment: dict[str, str], writer: str) -> None:
    os.environ.update(environment)
    ledger_module.HEAD_ROWS = 4
    ledger, done = Ledger(Lake(place)), 0
    while done < 10:
        at = ledger.reached("t/0") or 0
        try:
            ledger.commit([file(ledger, f"t/{at:04d}-{writer}")], advance=Advance("t/0", at, at + 1))
            done += 1
        except LedgerChanged:
            continue


def add(place: str, environment: dict[str, str], writer: str) -> None:
    os.environ.update(environment)
    ledger_module.HEAD_ROWS = 4
    ledger = Ledger(Lake(place))
    for n in range(20):
        ledger.commit([file(ledger, f"{writer}/{n}")])


@pytest.fixture(params=["local", "s3"])
def shared(request: pytest.FixtureRequest, tmp_path: object) -> tuple[str, dict[str, str]]:
    """A store that processes share, and the variables by which they find it."""
    if request.param == "local":
        return f"{tmp_path}/lake", {}
    return str(request.getfixturevalue("s3")), request.getfixturevalue("shared_s3").environment


def test_of_workers_on_one_partition_each_offset_is_taken_once(shared: tuple[str, dict[str, str]]) -> None:
    in_processes(go_on, [(*shared, "a"), (*shared, "b"), (*shared, "c")])
    ledger = Ledger(Lake(shared[0]))
    assert [int(name[:4]) for name in names(ledger)] == list(range(30))
    assert ledger.reached("t/0") == 30


def test_writers_of_different_sources_lose_nothing_to_each_other(shared: tuple[str, dict[str, str]]) -> None:
    in_processes(add, [(*shared, "a"), (*shared, "b"), (*shared, "c")])
    found = Ledger(Lake(shared[0])).read()
    assert (found.version, len(found.files())) == (60, 60)
