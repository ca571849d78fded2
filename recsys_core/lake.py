"""Parquet tables under one URI, a folder for each table and partition, each partition replaced atomically.

    <uri>/<table>/<partition>/_current.json          which version is read, its rows and its data version
    <uri>/<table>/<partition>/<version>/*.parquet    immutable

A writer makes a new version folder and then replaces `_current.json`, which is atomic on a local disk (rename) and on
an object store (one PUT). A reader therefore sees the old or the new partition, never half of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from recsys_core.errors import UserError

if TYPE_CHECKING:
    from pyarrow.dataset import Dataset

POINTER = "_current.json"
STAGING = "_staging"
PUBLISHED_AT_ONCE = 16
"""Partitions of a staged folder that are taken over at once: each waits for the disk or the store."""


class MissingPartition(UserError, LookupError):
    """A table has no data for a partition that a reader asked for."""


@dataclass(frozen=True)
class Partition:
    """What `_current.json` says of a partition. `files` are names inside the version's folder."""

    table: str
    key: str
    version: str
    files: tuple[str, ...]
    rows: int
    bytes: int
    data_version: str
    written_at: float
    extra: dict[str, Any] = field(default_factory=dict)


def open_filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec filesystem of a path or URI, and the path inside it."""
    fs, path = fsspec.core.url_to_fs(uri)
    return fs, path.rstrip("/")


def write_atomically(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
    """Put `data` at `path` so that a reader sees the old content or the new one."""
    fs.makedirs(os.path.dirname(path), exist_ok=True)
    if not _is_local(fs):
        fs.pipe_file(path, data)
        return
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    with open(temporary, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)


def timed_name() -> str:
    """A fresh name; names sort by the time they were made, which every kind of store can list."""
    return f"{time.time_ns():016x}-{uuid.uuid4().hex[:8]}"


def _missing_message(table: str, keys: list[str], uri: str) -> str:
    shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
    return f"table {table!r} under {uri} has no partition {shown}: materialize it first"


def _is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


class Lake:
    """Reads and writes the tables under `uri`."""

    def __init__(self, uri: str, keep_versions: int = 2) -> None:
        self.uri = uri.rstrip("/")
        self.fs, self.root = open_filesystem(uri)
        self.keep_versions = keep_versions

    def path(self, *parts: str) -> str:
        """A path of the lake's filesystem."""
        return "/".join((self.root, *parts))

    def url(self, path: str) -> str:
        """The address of a lake path for Spark: plain for a local lake, `scheme://…` otherwise (s3 as s3a)."""
        if _is_local(self.fs):
            return f"file://{path}"
        scheme = self.uri.split("://", 1)[0]
        return f"{'s3a' if scheme == 's3' else scheme}://{path}"

    # -- writing ------------------------------------------------------------------------------------------------

    def write(
        self,
        table: str,
        key: str,
        data: pa.Table | Iterable[pa.RecordBatch],
        schema: pa.Schema | None = None,
        extra: dict[str, Any] | None = None,
    ) -> Partition:
        """Replace partition `key` of `table` by `data`, a table or a stream of batches (then `schema` is needed)."""
        if isinstance(data, pa.Table):
            schema, batches = data.schema, iter(data.to_batches(max_chunksize=262_144))
        elif schema is None:
            raise ValueError(f"{table}: a stream of batches needs its schema")
        else:
            batches = iter(data)
        version = timed_name()
        name = "part-00000.parquet"
        path = self.path(table, key, version, name)
        self.fs.makedirs(os.path.dirname(path), exist_ok=True)
        rows = 0
        with self.fs.open(path, "wb") as raw, pq.ParquetWriter(raw, schema, compression="zstd") as out:
            for batch in batches:
                out.write_batch(batch)
                rows += batch.num_rows
        digest = self._digest([path])
        size = self.fs.size(path)
        return self._point(table, key, version, (name,), rows, size, digest, extra or {})

    def write_blobs(
        self,
        table: str,
        key: str,
        blobs: Mapping[str, bytes] | Iterable[tuple[str, bytes]],
        rows: int,
        extra: dict[str, Any] | None = None,
    ) -> Partition:
        """Replace partition `key` of `table` by files that are not Parquet; `read_blob` reads them.

        Pairs of a name and its content are taken one at a time and let go when they are written: files that are made on the way
        need memory for the largest alone.
        """
        version = timed_name()
        sizes: dict[str, int] = {}
        for name, content in blobs.items() if isinstance(blobs, Mapping) else blobs:
            write_atomically(self.fs, self.path(table, key, version, name), content)
            sizes[name] = len(content)
            del content
        names = tuple(sorted(sizes))
        digest = self._digest([self.path(table, key, version, name) for name in names])
        return self._point(table, key, version, names, rows, sum(sizes.values()), digest, extra or {})

    def stage(self, table: str) -> str:
        """A fresh folder of the lake into which an engine writes many partitions; `publish_staged` takes them over."""
        path = self.path(table, STAGING, timed_name())
        self.fs.makedirs(path, exist_ok=True)
        return path

    def publish_staged(self, table: str, staged: str, column: str, contents: dict[str, tuple[int, str]]) -> list[Partition]:
        """Replace each partition of `contents` (key -> rows, data version) by the staged folder `<column>=<key>`.

        A key with no staged folder becomes an empty partition: it is known to have no rows, which is not the same as
        never having been made.
        """
        with ThreadPoolExecutor(PUBLISHED_AT_ONCE) as pool:
            published = list(pool.map(lambda one: self._publish_folder(table, staged, column, *one), contents.items()))
        self.fs.invalidate_cache()
        if self.fs.exists(staged):
            self.fs.rm(staged, recursive=True)
        return published

    def _publish_folder(self, table: str, staged: str, column: str, key: str, content: tuple[int, str]) -> Partition:
        rows, data_version = content
        source = f"{staged}/{column}={key}"
        version = os.path.basename(staged)
        target = self.path(table, key, version)
        files: tuple[str, ...] = ()
        size = 0
        if self.fs.exists(source):
            self.fs.makedirs(self.path(table, key), exist_ok=True)
            self.fs.mv(source, target, recursive=True)
            found = {os.path.basename(p): d for p, d in self.fs.find(target, detail=True).items() if p.endswith(".parquet")}
            files = tuple(sorted(found))
            size = sum(int(d["size"]) for d in found.values())
        if rows and not files:
            raise OSError(f"{table}/{key}: {rows} rows expected in {source}, no Parquet file found")
        return self._point(table, key, version, files, rows, size, data_version, {})

    def _point(
        self,
        table: str,
        key: str,
        version: str,
        files: tuple[str, ...],
        rows: int,
        size: int,
        digest: str,
        extra: dict[str, Any],
    ) -> Partition:
        new = Partition(table, key, version, files, rows, size, digest, time.time(), extra)
        pointer = self.path(table, key, POINTER)
        write_atomically(self.fs, pointer, json.dumps(asdict(new)).encode())
        self._drop_old_versions(table, key, version)
        return new

    def _drop_old_versions(self, table: str, key: str, current: str) -> None:
        self.fs.invalidate_cache()
        folders = [e for e in self.fs.ls(self.path(table, key), detail=True) if e["type"] == "directory"]
        names = (e["name"].rstrip("/") for e in folders)
        old = sorted((name for name in names if os.path.basename(name) != current), reverse=True)
        for name in old[self.keep_versions - 1 :]:
            self.fs.rm(name, recursive=True)

    def _digest(self, paths: Sequence[str]) -> str:
        digest = hashlib.sha256()
        for path in paths:
            with self.fs.open(path, "rb") as source:
                while block := source.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()[:32]

    def replace_rows(self, part: Partition, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Partition:
        """Replace the rows of a partition that keeps its data version and what else its pointer says.

        For rows that must go although nothing new was made: what was derived from the partition stays valid.
        """
        version = timed_name()
        name = "part-00000.parquet"
        path = self.path(part.table, part.key, version, name)
        self.fs.makedirs(os.path.dirname(path), exist_ok=True)
        rows = 0
        with self.fs.open(path, "wb") as raw, pq.ParquetWriter(raw, schema, compression="zstd") as out:
            for batch in batches:
                out.write_batch(batch)
                rows += batch.num_rows
        size = self.fs.size(path)
        return self._point(part.table, part.key, version, (name,), rows, size, part.data_version, part.extra)

    def versions(self, table: str, key: str) -> dict[str, list[str]]:
        """Paths of the Parquet files of every version of a partition that is kept, oldest first."""
        self.fs.invalidate_cache()
        folders = [e["name"] for e in self.fs.ls(self.path(table, key), detail=True) if e["type"] == "directory"]
        return {
            os.path.basename(folder.rstrip("/")): [p for p in sorted(self.fs.find(folder)) if p.endswith(".parquet")]
            for folder in sorted(folders)
        }

    def drop_older(self, table: str, key: str) -> None:
        """Keep only the version of a partition that is read."""
        for version in self.versions(table, key):
            if version != self.get(table, key).version:
                self.fs.rm(self.path(table, key, version), recursive=True)

    # -- reading ------------------------------------------------------------------------------------------------

    def find(self, table: str, key: str) -> Partition | None:
        """The current version of a partition, None when it was never written."""
        return self.find_all(table, [key]).get(key)

    def find_all(self, table: str, keys: Iterable[str]) -> dict[str, Partition]:
        """The current versions of those partitions that exist, in the order of `keys`; pointers are read concurrently."""
        pointers = {self.path(table, key, POINTER): key for key in keys}
        found = self.fs.cat(list(pointers), on_error="return") if pointers else {}
        parsed = {}
        for path, data in found.items():
            if isinstance(data, bytes):
                parsed[pointers[path]] = json.loads(data)
            elif not isinstance(data, FileNotFoundError):
                raise data
        return {
            key: Partition(**{**parsed[key], "files": tuple(parsed[key]["files"])})
            for key in pointers.values()
            if key in parsed
        }

    def get(self, table: str, key: str) -> Partition:
        """The current version of a partition. Raises MissingPartition."""
        found = self.find(table, key)
        if found is None:
            raise MissingPartition(_missing_message(table, [key], self.uri))
        return found

    def keys(self, table: str) -> list[str]:
        """The partitions that exist, in order."""
        return [name for name in self._folders(table) if self.fs.exists(self.path(table, name, POINTER))]

    def files(self, table: str, keys: Iterable[str], missing_ok: bool = False) -> list[str]:
        """Paths of the Parquet files of some partitions. Raises MissingPartition unless `missing_ok`."""
        wanted = list(keys)
        found = self.find_all(table, wanted)
        missing = [key for key in wanted if key not in found]
        if missing and not missing_ok:
            raise MissingPartition(_missing_message(table, missing, self.uri))
        return [self.path(table, p.key, p.version, name) for p in found.values() for name in p.files]

    def read_blob(self, table: str, key: str, name: str) -> bytes:
        """One file of a partition that `write_blobs` made. Raises MissingPartition."""
        found = self.get(table, key)
        if name not in found.files:
            raise MissingPartition(f"table {table!r}, partition {key!r} has no file {name!r}, only {', '.join(found.files)}")
        return bytes(self.fs.cat_file(self.path(table, key, found.version, name)))

    def dataset(self, table: str, keys: Iterable[str], missing_ok: bool = False) -> Dataset | None:
        """An Arrow dataset over some partitions, None when they hold no file."""
        from pyarrow.dataset import dataset  # brings pandas, which a serving process does without

        paths = self.files(table, keys, missing_ok)
        return dataset(paths, filesystem=self.fs, format="parquet") if paths else None

    def read(self, table: str, key: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A whole partition in memory; for tables that are small by their nature."""
        self.get(table, key)
        dataset = self.dataset(table, [key])
        if dataset is None:
            raise MissingPartition(f"table {table!r}, partition {key!r}: made, but without any row")
        return dataset.to_table(columns=list(columns) if columns else None)

    def latest(self, table: str, until: str | None = None) -> str | None:
        """The last partition that exists, not later than `until`. It looks at as few pointers as it can."""
        for name in reversed(self._folders(table)):
            if (until is None or name <= until) and self.fs.exists(self.path(table, name, POINTER)):
                return name
        return None

    def _folders(self, table: str) -> list[str]:
        """Names of a table's partition folders, in order, whether or not they hold a version."""
        self.fs.invalidate_cache()
        try:
            entries = self.fs.ls(self.path(table), detail=False)
        except FileNotFoundError:
            return []
        return sorted(name for e in entries if (name := os.path.basename(e.rstrip("/"))) != STAGING)
