"""Parquet tables under one URI, a folder for each table and partition, each partition replaced atomically.

    <uri>/<table>/_current/<partition>.json          which version is read, its rows and its data version
    <uri>/<table>/<partition>/<version>/*.parquet    immutable

A writer makes a new version folder, sees it onto the disk, and then replaces the partition's pointer by `stores.update`. A
reader therefore sees the old or the new partition, never half of one. A writer whose result rests on what the partition was
(`instead_of`) is refused once it is another. Only versions that the pointer has named are dropped for age: a folder that
it never named is that of a writer at work, or of one that broke off, which `retention` removes after a day.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from recsys_core.errors import UserError
from recsys_core.masking import masked_text
from recsys_core.stores import delete_pointer, is_local, open_filesystem, sync_files, update, write_atomically

if TYPE_CHECKING:
    from pyarrow.dataset import Dataset

T = TypeVar("T")

POINTERS = "_current"
"""The folder of a table's pointers: one listing tells all partitions."""
FEW_KEYS = 4
"""So many partitions are looked for one by one."""
POINTER_ENDING = ".json"
STAGING = "_staging"
PUBLISHED_AT_ONCE = 16
"""Partitions of a staged folder that are taken over at once: each waits for the disk or the store."""


class MissingPartition(UserError, LookupError):
    """A table has no data for a partition that a reader asked for."""


class DamagedPartition(UserError, ValueError):
    """The pointer of a partition can't be read; the message names it and says how it is mended."""


class PartitionChanged(RuntimeError):
    """A partition is no longer the one that a new content was made from; make it again from what is there now."""


@dataclass(frozen=True)
class Partition:
    """What a pointer says of a partition. `files` are names inside the version's folder, `older` the versions that are
    kept besides, newest first."""

    table: str
    key: str
    version: str
    files: tuple[str, ...]
    rows: int
    bytes: int
    data_version: str
    written_at: float
    extra: dict[str, Any] = field(default_factory=dict)
    older: tuple[str, ...] = ()


class _Whatever(Enum):
    IS_THERE = "whatever is there"


WHATEVER: Final = _Whatever.IS_THERE
"""`instead_of` of a writer whose result does not rest on what the partition was."""
InsteadOf = Partition | None | Literal[_Whatever.IS_THERE]
"""What a partition has to be still, so that it is replaced: as it was read, None: not there, WHATEVER."""


def timed_name() -> str:
    """A fresh name; names sort by the time they were made, which every kind of store can list."""
    return f"{time.time_ns():016x}-{uuid.uuid4().hex[:8]}"


def _missing_message(table: str, keys: list[str], uri: str) -> str:
    shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
    return f"table {table!r} under {masked_text(uri)} has no partition {shown}: materialize it first"


def _version_of(part: Partition | None) -> str | None:
    return part.version if part else None


def _partition(said: bytes) -> Partition:
    """What a pointer file says; what later versions add to it is left out. Raises ValueError, KeyError or TypeError."""
    raw = json.loads(said)
    known = {f.name: raw[f.name] for f in fields(Partition) if f.name in raw}
    return Partition(**{**known, "files": tuple(raw["files"]), "older": tuple(raw.get("older", ()))})


def _partition_to_replace(said: bytes | None) -> Partition | None:
    """A pointer that can't be read is replaced like one that is not there, so that making the partition again repairs it."""
    try:
        return _partition(said) if said is not None else None
    except (ValueError, KeyError, TypeError):
        return None


class Lake:
    """Reads and writes the tables under `uri`."""

    def __init__(self, uri: str, keep_versions: int = 2) -> None:
        self.uri = uri.rstrip("/")
        self.fs, self.root = open_filesystem(uri)
        self.keep_versions = keep_versions

    def path(self, *parts: str) -> str:
        """A path of the lake's filesystem."""
        return "/".join((self.root, *parts))

    def below(self, path: str) -> str:
        """A path of the lake's filesystem as it is wherever the lake lies."""
        return path.removeprefix(f"{self.root}/")

    def pointer(self, table: str, key: str) -> str:
        """Path of the pointer of a partition."""
        return self.path(table, POINTERS, f"{key}{POINTER_ENDING}")

    def url(self, path: str) -> str:
        """The address of a lake path for Spark: plain for a local lake, `scheme://…` otherwise (s3 as s3a)."""
        if is_local(self.fs):
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
        instead_of: InsteadOf = WHATEVER,
    ) -> Partition:
        """Replace partition `key` of `table` by `data`, a table or a stream of batches (then `schema` is needed).

        Raises PartitionChanged when the partition is another than `instead_of`.
        """
        if isinstance(data, pa.Table):
            schema, batches = data.schema, iter(data.to_batches(max_chunksize=262_144))
        elif schema is None:
            raise ValueError(f"{table}: a stream of batches needs its schema")
        else:
            batches = iter(data)
        with self._new_version(table, key) as version:
            name, rows, size = self._write_rows(table, key, version, batches, schema)
            digest = self._digest([self.path(table, key, version, name)])
            new = Partition(table, key, version, (name,), rows, size, digest, time.time(), extra or {})
            return self._point(new, instead_of)

    def write_blobs(
        self,
        table: str,
        key: str,
        blobs: Mapping[str, bytes] | Iterable[tuple[str, bytes]],
        rows: int,
        extra: dict[str, Any] | None = None,
        instead_of: InsteadOf = WHATEVER,
    ) -> Partition:
        """Replace partition `key` of `table` by files that are not Parquet; `read_blob` reads them.

        Pairs of a name and its content are taken one at a time and let go when they are written: files that are made on the way
        need memory for the largest alone. Raises PartitionChanged when the partition is another than `instead_of`.
        """
        sizes: dict[str, int] = {}
        with self._new_version(table, key) as version:
            for name, content in blobs.items() if isinstance(blobs, Mapping) else blobs:
                write_atomically(self.fs, self.path(table, key, version, name), content)
                sizes[name] = len(content)
                del content
            names = tuple(sorted(sizes))
            digest = self._digest([self.path(table, key, version, name) for name in names])
            new = Partition(table, key, version, names, rows, sum(sizes.values()), digest, time.time(), extra or {})
            return self._point(new, instead_of)

    def replace_rows(self, part: Partition, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Partition:
        """Replace the rows of a partition that keeps its data version and what else its pointer says, and drop what it was.

        For rows that must go although nothing new was made: what was derived from the partition stays valid. Raises
        PartitionChanged when the partition is another by now.
        """
        with self._new_version(part.table, part.key) as version:
            name, rows, size = self._write_rows(part.table, part.key, version, batches, schema)
            new = replace(part, version=version, files=(name,), rows=rows, bytes=size, written_at=time.time())
            return self._point(new, part, keep=0)

    def drop_older(self, part: Partition) -> Partition:
        """Keep only the version of a partition that is read. Raises PartitionChanged when it is another by now."""
        return self._point(part, part, keep=0)

    def revise(self, table: str, key: str, work: Callable[[Partition | None], T]) -> T:
        """Call `work` with what a partition is now, again each time that another writer was faster than its own write."""
        while True:
            try:
                return self._read_whole(table, key, work)
            except PartitionChanged:
                continue

    def _read_whole(self, table: str, key: str, work: Callable[[Partition | None], T]) -> T:
        """Call `work` with what a partition is now, again where what it read was dropped because newer versions came."""
        while True:
            part = self.find(table, key)
            try:
                return work(part)
            except FileNotFoundError:
                if _version_of(self.find(table, key)) == _version_of(part):
                    raise

    def remove(self, part: Partition) -> bool:
        """Remove a partition, its pointer first. One that is another by now stays. Returns whether it went."""
        pointer = self.pointer(part.table, part.key)
        if not delete_pointer(self.fs, pointer, lambda said: _partition(said).version == part.version):
            return False
        self._drop(part.table, part.key, (part.version, *part.older))
        if is_local(self.fs):
            with suppress(OSError):  # another writer is making it again
                os.rmdir(self.path(part.table, part.key))
        return True

    @contextmanager
    def _new_version(self, table: str, key: str) -> Iterator[str]:
        """The name of a version in the making, whose files go when it is not published."""
        version = timed_name()
        try:
            yield version
        except BaseException:
            self._drop(table, key, [version])
            raise

    def _write_rows(
        self, table: str, key: str, version: str, batches: Iterable[pa.RecordBatch], schema: pa.Schema
    ) -> tuple[str, int, int]:
        """Write rows as the one file of a version. Returns its name, rows and bytes."""
        name = "part-00000.parquet"
        path = self.path(table, key, version, name)
        self.fs.makedirs(os.path.dirname(path), exist_ok=True)
        rows = 0
        with self.fs.open(path, "wb") as raw, pq.ParquetWriter(raw, schema, compression="zstd") as out:
            for batch in batches:
                out.write_batch(batch)
                rows += batch.num_rows
        return name, rows, int(self.fs.size(path))

    def stage(self, table: str) -> str:
        """A fresh folder of the lake into which an engine writes many partitions; `publish_staged` takes them over."""
        path = self.path(table, STAGING, timed_name())
        self.fs.makedirs(path, exist_ok=True)
        return path

    def publish_staged(
        self,
        table: str,
        staged: str,
        column: str,
        contents: dict[str, tuple[int, str]],
        extras: Mapping[str, dict[str, Any]] | None = None,
    ) -> list[Partition]:
        """Replace each partition of `contents` (key -> rows, data version) by the staged folder `<column>=<key>`.

        A key with no staged folder becomes an empty partition: it is known to have no rows, which is not the same as
        never having been made. `extras` are what the pointers say besides, by key.
        """

        def publish(key: str) -> Partition:
            return self._publish_folder(table, staged, column, key, *contents[key], (extras or {}).get(key, {}))

        try:
            with ThreadPoolExecutor(PUBLISHED_AT_ONCE) as pool:
                return list(pool.map(publish, contents))
        finally:
            self.fs.invalidate_cache()
            if self.fs.exists(staged):
                self.fs.rm(staged, recursive=True)

    def _publish_folder(
        self, table: str, staged: str, column: str, key: str, rows: int, data_version: str, extra: dict[str, Any]
    ) -> Partition:
        source = f"{staged}/{column}={key}"
        version = os.path.basename(staged)
        try:
            files, size = self._take_over(source, table, key, version)
            if rows and not files:
                raise OSError(f"{table}/{key}: {rows} rows expected in {source}, no Parquet file found")
            new = Partition(table, key, version, files, rows, size, data_version, time.time(), extra)
            return self._point(new, WHATEVER)
        except BaseException:
            self._drop(table, key, [version])
            raise

    def _take_over(self, source: str, table: str, key: str, version: str) -> tuple[tuple[str, ...], int]:
        """Move the Parquet files of a staged folder to where a version lies. Returns them and their bytes.

        File by file: a store of objects has no folder that could be moved.
        """
        self.fs.invalidate_cache()
        staged = {os.path.basename(p): d for p, d in self.fs.find(source, detail=True).items() if p.endswith(".parquet")}
        if staged:
            self.fs.makedirs(self.path(table, key, version), exist_ok=True)
        for name in staged:
            self.fs.mv(f"{source}/{name}", self.path(table, key, version, name))
        return tuple(sorted(staged)), sum(int(d["size"]) for d in staged.values())

    def _point(self, new: Partition, instead_of: InsteadOf, keep: int | None = None) -> Partition:
        """Let the pointer name a version whose files are on the disk, and drop those that are older than `keep` others."""
        sync_files(self.fs, [self.path(new.table, new.key, new.version, name) for name in new.files])
        known: tuple[str, ...] = ()
        made = new

        def change(said: bytes | None) -> bytes:
            nonlocal known, made
            current = _partition_to_replace(said)
            if instead_of is not WHATEVER and _version_of(current) != _version_of(instead_of):
                raise PartitionChanged(f"{new.table}/{new.key} has been replaced since it was read")
            known = (current.version, *current.older) if current else ()
            known = tuple(version for version in known if version != new.version)
            made = replace(new, older=known[: self.keep_versions - 1 if keep is None else keep])
            return json.dumps(asdict(made)).encode()

        update(self.fs, self.pointer(new.table, new.key), change)
        self._drop(new.table, new.key, known[len(made.older) :])
        return made

    def _drop(self, table: str, key: str, versions: Iterable[str]) -> None:
        for version in versions:
            self.fs.invalidate_cache()
            with suppress(FileNotFoundError):
                self.fs.rm(self.path(table, key, version), recursive=True)

    def _digest(self, paths: Sequence[str]) -> str:
        digest = hashlib.sha256()
        for path in paths:
            with self.fs.open(path, "rb") as source:
                while block := source.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()[:32]

    def versions(self, table: str, key: str) -> dict[str, list[str]]:
        """Paths of the Parquet files of every version of a partition that is there, oldest first."""
        self.fs.invalidate_cache()
        folders = [e["name"] for e in self.fs.ls(self.path(table, key), detail=True) if e["type"] == "directory"]
        return {
            os.path.basename(folder.rstrip("/")): [p for p in sorted(self.fs.find(folder)) if p.endswith(".parquet")]
            for folder in sorted(folders)
        }

    # -- reading ------------------------------------------------------------------------------------------------

    def find(self, table: str, key: str) -> Partition | None:
        """The current version of a partition, None when it was never written."""
        return self.find_all(table, [key]).get(key)

    def find_all(self, table: str, keys: Iterable[str]) -> dict[str, Partition]:
        """The current versions of those partitions that exist, in the order of `keys`; pointers are read concurrently.

        Which of many exist is asked by one listing: a store of objects needs several requests for each that does not.
        Raises DamagedPartition for a pointer that can't be read.
        """
        wanted = list(keys)
        if len(wanted) > FEW_KEYS:
            there = set(self.keys(table))
            wanted = [key for key in wanted if key in there]
        pointers = {self.pointer(table, key): key for key in wanted}
        found = self.fs.cat(list(pointers), on_error="return") if pointers else {}
        parsed = {}
        for path, data in found.items():
            if isinstance(data, bytes):
                try:
                    parsed[pointers[path]] = _partition(data)
                except (ValueError, KeyError, TypeError) as error:
                    raise DamagedPartition(
                        f"{masked_text(self.url(path))} is damaged ({type(error).__name__}: {error}): make partition "
                        f"{pointers[path]} of {table} again; where nothing makes it, put the file back from a backup, or "
                        "delete it to begin anew"
                    ) from error
            elif not isinstance(data, FileNotFoundError):
                raise data
        return {key: parsed[key] for key in pointers.values() if key in parsed}

    def get(self, table: str, key: str) -> Partition:
        """The current version of a partition. Raises MissingPartition."""
        found = self.find(table, key)
        if found is None:
            raise MissingPartition(_missing_message(table, [key], self.uri))
        return found

    def keys(self, table: str) -> list[str]:
        """The partitions that exist, in order, by one listing."""
        names = self._listed(self.path(table, POINTERS))
        return [name.removesuffix(POINTER_ENDING) for name in names if name.endswith(POINTER_ENDING)]

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

        def whole(_: Partition | None) -> pa.Table:
            self.get(table, key)
            dataset = self.dataset(table, [key])
            if dataset is None:
                raise MissingPartition(f"table {table!r}, partition {key!r}: made, but without any row")
            return dataset.to_table(columns=list(columns) if columns else None)

        return self._read_whole(table, key, whole)

    def latest(self, table: str, until: str | None = None) -> str | None:
        """The last partition that exists, not later than `until`."""
        return max((key for key in self.keys(table) if until is None or key <= until), default=None)

    def folders(self, table: str) -> list[str]:
        """Names of a table's partition folders, in order, whether or not they hold a version."""
        return [name for name in self._listed(self.path(table)) if name not in (STAGING, POINTERS)]

    def _listed(self, folder: str) -> list[str]:
        """The names in a folder, in order; none where there is none."""
        self.fs.invalidate_cache()
        try:
            entries = self.fs.ls(folder, detail=False)
        except FileNotFoundError:
            return []
        return sorted(os.path.basename(entry.rstrip("/")) for entry in entries)
