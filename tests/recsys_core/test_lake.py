import json
import os
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_core.lake import DamagedPartition, Lake, MissingPartition
from recsys_core.stores import LOCK, read_pointer, write_atomically

KEY = "2026-03-02T10"


@pytest.fixture
def anywhere(any_store) -> Lake:
    """A lake in a store of each kind."""
    return Lake(f"{any_store}/lake")


def numbers(*values: int) -> pa.Table:
    return pa.table({"n": pa.array(values, pa.int64())})


def held(lake: Lake, table: str, keys: list[str]) -> list[int]:
    dataset = lake.dataset(table, keys)
    return [] if dataset is None else dataset.to_table()["n"].to_pylist()


def stage(lake: Lake, table: str, contents: dict[str, list[int]]) -> str:
    staged = lake.stage(table)
    for key, values in contents.items():
        lake.fs.makedirs(f"{staged}/hour={key}", exist_ok=True)
        with lake.fs.open(f"{staged}/hour={key}/part-0.parquet", "wb") as out:
            pq.write_table(numbers(*values), out)
    return staged


def test_what_was_written_is_read_back_and_described(anywhere):
    written = anywhere.write("t", KEY, numbers(1, 2, 3), extra={"engine": "x"})
    assert anywhere.get("t", KEY) == written
    assert (written.table, written.key, written.rows, written.extra) == ("t", KEY, 3, {"engine": "x"})
    assert written.bytes == anywhere.fs.size(anywhere.files("t", [KEY])[0])
    assert anywhere.read("t", KEY).equals(numbers(1, 2, 3))
    assert anywhere.read("t", KEY, ["n"]).column_names == ["n"]


def test_a_stream_of_batches_is_written_like_a_table_and_needs_its_schema(anywhere):
    batches = [batch for values in ((1,), (2, 3)) for batch in numbers(*values).to_batches()]
    assert anywhere.write("t", KEY, iter(batches), numbers().schema).rows == 3
    assert held(anywhere, "t", [KEY]) == [1, 2, 3]
    with pytest.raises(ValueError, match="t: a stream of batches needs its schema"):
        anywhere.write("t", KEY, iter(batches))


def test_the_data_version_is_that_of_the_content(anywhere):
    versions = [anywhere.write("t", KEY, numbers(*values)).data_version for values in ((1, 2), (1, 2), (1, 3))]
    assert versions[0] == versions[1] != versions[2]


def test_a_reader_of_the_old_version_can_go_on_while_a_new_one_is_published(anywhere):
    anywhere.write("t", KEY, numbers(1))
    old = anywhere.dataset("t", [KEY])
    anywhere.write("t", KEY, numbers(2))
    assert old.to_table()["n"].to_pylist() == [1]
    assert held(anywhere, "t", [KEY]) == [2]


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_so_many_versions_of_a_partition_stay_and_they_are_the_newest(anywhere, keep):
    lake = Lake(anywhere.uri, keep_versions=keep)
    paths = []
    for value in range(6):
        lake.write("t", KEY, numbers(value))
        paths += lake.files("t", [KEY])
    assert [lake.fs.exists(path) for path in paths] == [False] * (6 - keep) + [True] * keep


def test_staged_versions_age_like_written_ones(anywhere):
    paths = []
    for value in range(4):
        staged = stage(anywhere, "t", {KEY: [value]})
        anywhere.publish_staged("t", staged, "hour", {KEY: (1, f"v{value}")})
        paths += anywhere.files("t", [KEY])
    assert [anywhere.fs.exists(path) for path in paths] == [False, False, True, True]


@pytest.mark.parametrize("how", ["write", "write_blobs", "publish_staged"])
def test_a_crash_before_the_pointer_is_replaced_leaves_the_old_partition(anywhere, monkeypatch, how):
    anywhere.write("t", KEY, numbers(1))
    staged = stage(anywhere, "t", {KEY: [2]})

    def crash(fs, path, change):
        change(read_pointer(fs, path))
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("recsys_core.lake.update", crash)
        with pytest.raises(OSError, match="no space left"):
            {
                "write": lambda: anywhere.write("t", KEY, numbers(2)),
                "write_blobs": lambda: anywhere.write_blobs("t", KEY, {"n": b"2"}, 1),
                "publish_staged": lambda: anywhere.publish_staged("t", staged, "hour", {KEY: (1, "v")}),
            }[how]()
    assert held(anywhere, "t", [KEY]) == [1]
    anywhere.write("t", KEY, numbers(3))
    assert held(anywhere, "t", [KEY]) == [3]


def test_a_write_that_breaks_off_half_way_leaves_the_old_partition(anywhere):
    anywhere.write("t", KEY, numbers(1))

    def breaks_off():
        yield numbers(2).to_batches()[0]
        raise RuntimeError("the source is gone")

    with pytest.raises(RuntimeError, match="the source is gone"):
        anywhere.write("t", KEY, breaks_off(), numbers().schema)
    assert held(anywhere, "t", [KEY]) == [1]


def test_a_file_is_replaced_as_a_whole_and_nothing_else_is_left(tmp_path):
    lake = Lake(str(tmp_path))
    path = str(tmp_path / "a" / "file")
    write_atomically(lake.fs, path, b"old content")
    with open(path, "rb") as reader:
        write_atomically(lake.fs, path, b"new")
        assert reader.read() == b"old content"
    assert (tmp_path / "a" / "file").read_bytes() == b"new"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["file"]


def test_a_missing_partition_is_named_with_its_table_and_the_lake(anywhere):
    anywhere.write("clicks", "a", numbers(1))
    with pytest.raises(MissingPartition, match=r"table 'clicks' under .*lake has no partition b, c: materialize it first"):
        anywhere.dataset("clicks", ["a", "b", "c"])
    for read in (anywhere.get, anywhere.read, lambda table, key: anywhere.read_blob(table, key, "f")):
        with pytest.raises(MissingPartition, match=r"'views' under .* has no partition a"):
            read("views", "a")
    with pytest.raises(MissingPartition, match="k0, k1, k2, k3, k4 and 3 more"):
        anywhere.files("clicks", [f"k{i}" for i in range(8)])
    assert anywhere.find("clicks", "b") is None


def test_missing_partitions_can_be_left_out(anywhere):
    anywhere.write("t", "a", numbers(1))
    anywhere.write("t", "c", numbers(3))
    assert anywhere.dataset("t", ["a", "b", "c"], missing_ok=True).to_table()["n"].to_pylist() == [1, 3]
    assert anywhere.dataset("t", ["b"], missing_ok=True) is None
    assert anywhere.dataset("t", []) is None


def test_find_all_gives_those_that_exist_in_the_order_asked_for(anywhere):
    for key in ("a", "b", "c"):
        anywhere.write("t", key, numbers(1))
    assert list(anywhere.find_all("t", ["c", "x", "a"])) == ["c", "a"]
    assert anywhere.find_all("t", []) == {}
    assert anywhere.find_all("t", ["x", "y"]) == {}


def test_a_pointer_that_cannot_be_read_is_an_error_and_not_a_missing_partition(tmp_path):
    lake = Lake(str(tmp_path))
    Path(lake.pointer("t", KEY)).mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        lake.find("t", KEY)


def test_a_staged_range_is_published_and_keys_without_rows_are_empty_not_missing(anywhere):
    staged = stage(anywhere, "t", {"a": [1, 2], "c": [3], "other": [4]})
    published = anywhere.publish_staged("t", staged, "hour", {"a": (2, "va"), "b": (0, "empty"), "c": (1, "vc")})
    assert [(p.key, p.rows, p.data_version, len(p.files)) for p in published] == [
        ("a", 2, "va", 1),
        ("b", 0, "empty", 0),
        ("c", 1, "vc", 1),
    ]
    assert held(anywhere, "t", ["a", "b", "c"]) == [1, 2, 3]
    assert anywhere.dataset("t", ["b"]) is None
    assert not anywhere.fs.exists(staged)
    assert anywhere.keys("t") == ["a", "b", "c"]
    with pytest.raises(MissingPartition, match="'t', partition 'b': made, but without any row"):
        anywhere.read("t", "b")


def test_a_partition_that_lost_its_rows_is_published_empty(anywhere):
    anywhere.write("t", "a", numbers(1))
    anywhere.publish_staged("t", anywhere.stage("t"), "none", {"a": (0, "empty")})
    assert anywhere.get("t", "a").rows == 0
    assert held(anywhere, "t", ["a"]) == []


def test_rows_that_were_promised_but_not_staged_are_an_error(anywhere):
    with pytest.raises(OSError, match="t/a: 5 rows expected"):
        anywhere.publish_staged("t", anywhere.stage("t"), "hour", {"a": (5, "v")})
    assert anywhere.find("t", "a") is None


def test_a_stage_that_the_store_has_no_trace_of_is_published_as_empty(anywhere):
    staged = anywhere.stage("t")
    with suppress(FileNotFoundError):
        anywhere.fs.rm(staged, recursive=True)
    assert anywhere.publish_staged("t", staged, "none", {"a": (0, "empty")})[0].rows == 0


def test_blobs_are_read_back_and_a_wrong_name_lists_those_there_are(anywhere):
    written = anywhere.write_blobs("index", KEY, {"b.bin": b"\x00\x01", "a.json": b"{}"}, rows=7, extra={"ef": 5})
    assert (written.files, written.rows, written.bytes, written.extra) == (("a.json", "b.bin"), 7, 4, {"ef": 5})
    assert anywhere.read_blob("index", KEY, "b.bin") == b"\x00\x01"
    with pytest.raises(MissingPartition, match=r"'index', partition '2026-03-02T10' has no file 'c', only a.json, b.bin"):
        anywhere.read_blob("index", KEY, "c")


def test_blobs_that_are_made_on_the_way_are_in_memory_one_at_a_time(tmp_path):
    lake, alive = Lake(str(tmp_path)), []

    class Content(bytes):
        def __del__(self):
            alive.remove(bytes(self))

    def made():
        for name in "cab":
            assert alive == []
            content = Content(name.encode())
            alive.append(bytes(content))
            yield name, content
            del content

    written = lake.write_blobs("t", KEY, made(), 3)
    assert written == lake.get("t", KEY)
    assert (written.files, written.bytes) == (("a", "b", "c"), 3)
    assert written.data_version == lake.write_blobs("t", KEY, {name: name.encode() for name in "abc"}, 3).data_version


def test_blobs_whose_source_breaks_off_leave_the_old_partition(anywhere):
    anywhere.write_blobs("t", KEY, {"a": b"old"}, 1)

    def breaks_off():
        yield "a", b"new"
        raise RuntimeError("the source is gone")

    with pytest.raises(RuntimeError, match="the source is gone"):
        anywhere.write_blobs("t", KEY, breaks_off(), 1)
    assert anywhere.read_blob("t", KEY, "a") == b"old"


def test_the_latest_partition_can_be_bounded(anywhere):
    assert anywhere.latest("t") is None
    assert anywhere.keys("t") == []
    for key in ("2026-03-02", "2026-03-01", "2026-03-04"):
        anywhere.write("t", key, numbers(1))
    staged = anywhere.stage("t")
    assert anywhere.keys("t") == ["2026-03-01", "2026-03-02", "2026-03-04"]
    assert anywhere.latest("t") == "2026-03-04"
    assert anywhere.latest("t", until="2026-03-03") == "2026-03-02"
    assert anywhere.latest("t", until="2026-02-28") is None
    anywhere.publish_staged("t", staged, "day", {})


def test_spark_gets_an_address_it_knows():
    assert Lake("/data/lake").url("/data/lake/t") == "file:///data/lake/t"
    assert Lake("memory://bucket/lake").url("/bucket/lake/t") == "memory:///bucket/lake/t"


@pytest.fixture
def far_lake(s3, monkeypatch) -> tuple[Lake, list[str]]:
    """A lake in S3 with ten partitions, and the requests that are made to it from now on."""
    lake = Lake(s3)
    for day in range(1, 11):
        lake.write("t", f"2026-03-{day:02d}", numbers(1))
    asked = []
    call = lake.fs._call_s3

    async def counted(method, *arguments, **more):
        asked.append(method)
        return await call(method, *arguments, **more)

    monkeypatch.setattr(lake.fs, "_call_s3", counted)
    return lake, asked


@pytest.mark.parametrize("look", ["keys", "latest"])
def test_which_partitions_there_are_is_told_by_one_request_to_s3(far_lake, look):
    lake, asked = far_lake
    assert getattr(lake, look)("t")
    assert len(asked) == 1
    assert lake.get("t", "2026-03-01")
    assert len(asked) == 2, "calls are counted"


def test_partitions_of_a_window_that_are_not_there_cost_no_request(far_lake):
    lake, asked = far_lake
    window = [f"2026-{month:02d}-{day:02d}" for month in range(1, 5) for day in range(1, 29)]
    assert list(lake.find_all("t", window)) == [f"2026-03-{day:02d}" for day in range(1, 11)]
    assert len(asked) == 1 + 10


def files_under(lake: Lake) -> set[str]:
    return {path for path in lake.fs.find(lake.root) if not path.endswith(LOCK)}


def test_a_writer_that_breaks_off_leaves_no_file(anywhere):
    anywhere.write("t", KEY, numbers(1))
    before = files_under(anywhere)

    def breaks_off():
        yield numbers(2).to_batches()[0]
        raise RuntimeError("the source is gone")

    def blobs():
        yield "a", b"1"
        raise RuntimeError("the source is gone")

    staged = stage(anywhere, "t", {KEY: [2], "other": [3]})
    for write in (
        lambda: anywhere.write("t", KEY, breaks_off(), numbers().schema),
        lambda: anywhere.write_blobs("t", KEY, blobs(), 1),
        lambda: anywhere.replace_rows(anywhere.get("t", KEY), breaks_off(), numbers().schema),
    ):
        with pytest.raises(RuntimeError, match="the source is gone"):
            write()
    with pytest.raises(OSError, match="t/none: 5 rows expected"):
        anywhere.publish_staged("t", staged, "hour", {"none": (5, "v")})
    assert files_under(anywhere) == before


@pytest.mark.parametrize("how", ["write", "write_blobs", "publish_staged"])
def test_everything_that_a_pointer_names_is_on_the_disk_before_it(tmp_path, monkeypatch, how):
    lake = Lake(str(tmp_path))
    staged = stage(lake, "t", {KEY: [2]})
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda opened: (done.append(os.readlink(f"/proc/self/fd/{opened}")), fsync(opened)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append(f"named {new}"), replace(old, new)))
    {
        "write": lambda: lake.write("t", KEY, numbers(2)),
        "write_blobs": lambda: lake.write_blobs("t", KEY, {"n": b"2"}, 1),
        "publish_staged": lambda: lake.publish_staged("t", staged, "hour", {KEY: (1, "v")}),
    }[how]()
    part = lake.get("t", KEY)
    folder = lake.path("t", KEY)
    pointer = lake.pointer("t", KEY)
    named = done.index(f"named {pointer}")
    before = set(done[:named])
    assert {f"{folder}/{part.version}/{name}" for name in part.files} <= before
    assert {f"{folder}/{part.version}", folder} <= before
    assert os.path.dirname(pointer) in done[named:], "the pointer's own name"


def test_a_pointer_that_is_no_pointer_is_repaired_by_making_the_partition_again(anywhere):
    anywhere.write("t", KEY, numbers(1))
    anywhere.fs.pipe_file(anywhere.pointer("t", KEY), b"{half")
    with pytest.raises(DamagedPartition, match=f"t/_current/{KEY}.json is damaged .*property name.* make partition {KEY} of t"):
        anywhere.get("t", KEY)
    anywhere.write("t", KEY, numbers(2))
    assert held(anywhere, "t", [KEY]) == [2]


def test_what_a_later_version_adds_to_a_pointer_is_left_out(anywhere):
    part = anywhere.write("t", KEY, numbers(1))
    path = anywhere.pointer("t", KEY)
    anywhere.fs.pipe_file(path, json.dumps({**json.loads(anywhere.fs.cat_file(path)), "added": 1}).encode())
    assert anywhere.find("t", KEY) == part
    anywhere.write("t", KEY, numbers(2))
    assert anywhere.get("t", KEY).older == (part.version,)
