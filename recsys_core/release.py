"""The release: one immutable bundle of everything serving needs, verified before use, named by a pointer file.

    <releases>/<release_id>/manifest.json                       written last: a folder without it is not a release
    <releases>/<release_id>/items.parquet                       item_id and catalogue, in the order of positions
    <releases>/<release_id>/als/items.npy                       float32 (items, rank)
    <releases>/<release_id>/als/gram.npy                        float64 (rank, rank), YᵀY for the fold-in
    <releases>/<release_id>/index/inner_product.faiss           user vector -> items
    <releases>/<release_id>/index/cosine.faiss                  item vector -> similar items
    <releases>/<release_id>/similar.npy                         int32 (items, k), nearest other items by cosine
    <releases>/<release_id>/popular.npy                         float32 (items,), the window's popularity
    <releases>/<release_id>/two_tower/items.npy                 float32 (items, d), vectors of the item tower
    <releases>/<release_id>/two_tower/tower.json, *.npy         the user tower, see tower.py
    <releases>/<release_id>/two_tower/index.faiss               user tower's vector -> items; with few items they are scanned

A release without a two-tower model has no `two_tower/`, and `notes` of its manifest says why.
    <releases>/champion.json                                    which release is served, replaced atomically

A reader trusts nothing: the names in manifest and pointer, size and sha256 of each file, then shapes and id maps against
each other.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import mmap
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from recsys_core.cores import usable_cores
from recsys_core.errors import UserError
from recsys_core.index import ExactIndex, Metric, Searchable, VectorIndex
from recsys_core.masking import masked_text
from recsys_core.ranking import Snapshot
from recsys_core.settings import RankingSettings
from recsys_core.stores import open_filesystem, read_pointer, update, write_atomically
from recsys_core.tower import TowerError, UserTower

MANIFEST = "manifest.json"
CHAMPION = "champion.json"
SCHEMA_VERSION = 1
KEPT_CHAMPIONS = 20
NPY_HEADER_BYTES = 4096
COPIED_BYTES = 1 << 18
"""Bytes of a file that are copied and hashed in one step, so many as stay in the processor's cache."""
FETCHED_BYTES = 1 << 25
"""Bytes that one request to an object store fetches."""
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}){0,7}")
"""Names inside a release: parts joined by `/`, none of which is empty, hidden, `..` or could mean another place anywhere."""
RELEASE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
CHECKED_TOGETHER = 1 << 18
"""Values of an array that are checked in one step."""

Buffer = bytes | memoryview
"""The content of a file, in memory or mapped."""

ITEMS_FILE = "items.parquet"
ITEM_COLUMNS = ("item_id", "title", "category", "available")
ALS_ITEMS_FILE = "als/items.npy"
ALS_GRAM_FILE = "als/gram.npy"
ALS_ITEM_WEIGHTS_FILE = "als/item_weights.npy"
POPULAR_FILE = "popular.npy"
SIMILAR_FILE = "similar.npy"
TWO_TOWER = "two_tower"
TWO_TOWER_ITEMS_FILE = f"{TWO_TOWER}/items.npy"
TWO_TOWER_INDEX_FILE = f"{TWO_TOWER}/index.faiss"
INDEX_FILES: dict[Metric, str] = {"inner_product": "index/inner_product.faiss", "cosine": "index/cosine.faiss"}


class ReleaseError(UserError):
    """A release can't be used; the message names the release, the file and what is wrong with it."""


class StoreAway(ReleaseError):
    """The store of the releases does not answer, or not with what was asked for; the message has its reason."""


class ChampionServes(ReleaseError):
    """A release can't be removed because it is the champion."""


class ChampionChanged(ReleaseError):
    """Another champion was named since the one that a promotion was decided against."""


@dataclass(frozen=True)
class Manifest:
    """What a release was made from and what its files must be.

    `sources` maps an asset to its partition and data version, `models` a model to its version and parameters (None: the
    release has no such model, and `notes` says why), `index` a metric to its efSearch and recall, `ranking` has the weights of
    the scoring path, `files` maps a name to its bytes and sha256.
    """

    release_id: str
    day: str
    created_at: float
    sources: dict[str, dict[str, str]]
    models: dict[str, dict[str, Any] | None]
    index: dict[str, dict[str, Any]]
    ranking: dict[str, Any]
    metrics: dict[str, Any]
    run_ids: dict[str, str]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        """Raises ReleaseError when a name could reach outside of the release's folder, or a file lacks its size or sha256."""
        check_release_id(self.release_id)
        for name, expected in self.files.items():
            if not FILE_NAME.fullmatch(name) or name.split("/")[0] in (MANIFEST, *LocalFiles.OWN):
                raise ReleaseError(f"release {self.release_id}: {MANIFEST} lists {name!r}, which can't be a file of a release")
            if not (isinstance(expected, dict) and type(expected.get("bytes")) is int and type(expected.get("sha256")) is str):
                raise ReleaseError(f"release {self.release_id}: {MANIFEST} does not say bytes and sha256 of {name}")

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), indent=2, sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Manifest:
        """Raises ReleaseError when `data` is not a manifest of this schema."""
        try:
            raw = json.loads(data)
            version = raw.get("schema_version")
        except (ValueError, AttributeError) as error:
            raise ReleaseError(f"{where}: {MANIFEST} is not JSON: {error}") from error
        if version != SCHEMA_VERSION:
            raise ReleaseError(f"{where}: {MANIFEST} has schema version {version!r}, this process reads {SCHEMA_VERSION}")
        try:
            _check_types(raw, _MANIFEST_KINDS, dict)
            if "release_id" in raw:
                check_release_id(raw["release_id"], f"{where}: {MANIFEST}: ")
            return cls(**raw)
        except TypeError as error:
            raise ReleaseError(f"{where}: {MANIFEST} does not fit its schema: {error}") from error


_MANIFEST_KINDS = {"release_id": str, "day": str, "created_at": (int, float), "schema_version": int}


def _check_types(raw: Mapping[str, Any], kinds: Mapping[str, Any], others: type, lists: Collection[str] = ()) -> None:
    """Raises TypeError when a member is not of its kind, or a number that is none."""
    for name, value in raw.items():
        kind = list if name in lists else kinds.get(name, others)
        if not isinstance(value, kind) or (isinstance(value, float) and not math.isfinite(value)):
            raise TypeError(f"{name} is {value!r:.100}")


def check_release_id(release_id: object, where: str = "") -> None:
    """Raises ReleaseError, which begins with `where`, when an id could name another place than a folder of the releases."""
    if not isinstance(release_id, str) or not RELEASE_NAME.fullmatch(release_id):
        raise ReleaseError(f"{where}{release_id!r:.100} can't be the id of a release")


@dataclass(frozen=True)
class Pointer:
    """Which release is served.

    Attributes:
        manifest_sha256: ties the pointer to the manifest's content.
        previous: the champions before it, newest first, to which a rollback returns.
        withdrawn: the releases from which one has returned: no answer of theirs is served any more.
        sequence: how many times a champion was named, this time included.
        removing: releases whose removal has begun, which can't become champion. While none was named, `release_id` is empty.
    """

    release_id: str
    manifest_sha256: str
    promoted_at: float
    reason: str = ""
    previous: tuple[str, ...] = ()
    withdrawn: tuple[str, ...] = ()
    sequence: int = 0
    removing: tuple[str, ...] = field(default=(), compare=False)

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), indent=2).encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Pointer:
        """What a pointer file says; what later versions add to it is left out. Raises ReleaseError."""
        try:
            raw = json.loads(data)
            known = {f.name: raw[f.name] for f in fields(cls) if f.name in raw}
            _check_types(known, {"promoted_at": (int, float), "sequence": int}, str, ("previous", "withdrawn", "removing"))
            lists = {name: tuple(raw.get(name, ())) for name in ("previous", "withdrawn", "removing")}
            pointer = cls(**{**known, **lists})
            if pointer.release_id and not pointer.manifest_sha256:
                raise ValueError(f"it does not say which {MANIFEST} of {pointer.release_id} it means")
            for name in (*filter(None, [pointer.release_id]), *pointer.previous, *pointer.withdrawn, *pointer.removing):
                check_release_id(name)
        except (ValueError, TypeError, AttributeError, ReleaseError) as error:
            raise ReleaseError(f"{masked_text(where)} is not a pointer: {error}") from error
        return pointer


NO_CHAMPION = Pointer("", "", 0.0)
"""What the pointer is before the first promotion."""


class Releases:
    """The releases under a path or URI. Whatever its store raises is StoreAway."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self.fs, self.root = open_filesystem(uri)

    def path(self, *parts: str) -> str:
        """A place in the store. Raises ReleaseError when a part could name one outside of it."""
        for part in parts:
            if not FILE_NAME.fullmatch(part):
                raise ReleaseError(f"{part!r:.100} can't be a release or a file of one")
        return "/".join((self.root, *parts))

    @contextmanager
    def reached(self, what: str) -> Iterator[None]:
        """The adapter of the store: what it raises of `what` is StoreAway, but for a file that is not there.

        Clients of object stores raise classes of their own (botocore, aiohttp), which no caller can list.
        """
        try:
            yield
        except (ReleaseError, FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise
        except Exception as error:
            reason = masked_text(f"{self.uri}: {what}: {type(error).__name__}: {error}")
            raise StoreAway(f"the store of the releases does not answer as it should: {reason}") from error

    # -- writing ------------------------------------------------------------------------------------------------

    def write(self, manifest: Manifest, snapshot: Snapshot) -> Manifest:
        """Write `snapshot` as a new release and return its completed manifest. A release is never written twice."""
        release_id = manifest.release_id
        with self.reached(f"writing release {release_id}"):
            if self.fs.exists(self.path(release_id, MANIFEST)):
                raise ReleaseError(f"release {release_id} exists already; releases are immutable")
            files = {}
            for name, data in _files_of(snapshot):
                write_atomically(self.fs, self.path(release_id, name), data)
                files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            complete = Manifest(**{**asdict(manifest), "files": files})
            write_atomically(self.fs, self.path(release_id, MANIFEST), complete.to_bytes())
        return complete

    def promote(self, release_id: str, reason: str = "", sequence: int | None = None) -> Pointer:
        """Make a release the champion after reading and verifying all of it. Raises ReleaseError.

        `sequence` is that of the champion against which it was decided (0: there was none); another one that was named since
        stays, and ChampionChanged is raised. None: whatever the champion is, as an operator wants it.
        A pointer that can't be read is replaced, so that a promotion repairs it; the champions before are forgotten.
        """
        self.load(release_id)

        def take_the_place(current: Pointer) -> Pointer:
            if sequence is not None and current.sequence != sequence:
                raise ChampionChanged(
                    f"release {release_id} was judged against another champion than {current.release_id}, which was named since"
                )
            before = (current.release_id, *current.previous) if current.release_id else ()
            earlier = tuple(name for name in before if name != release_id)
            return self._named(release_id, reason, earlier, current.withdrawn, current)

        return self._repoint(take_the_place, repair=sequence is None)

    def roll_back(self, reason: str = "rollback") -> tuple[Pointer, dict[str, str]]:
        """Return to the champion before this one, or to the next one before it that is whole.

        Returns the new pointer and, by release id, why others were passed over. Raises ReleaseError when there is none.
        """
        passed_over: dict[str, str] = {}

        def go_back(current: Pointer) -> Pointer:
            for at, release_id in enumerate(current.previous):
                if release_id in passed_over:
                    continue
                try:
                    self.load(release_id)
                    withdrawn = (current.release_id, *current.withdrawn)
                    return self._named(release_id, reason, current.previous[at + 1 :], withdrawn, current)
                except ReleaseError as error:
                    passed_over[release_id] = str(error)
            raise ReleaseError("; ".join(["there is no earlier champion to return to", *passed_over.values()]))

        return self._repoint(go_back), passed_over

    def remove(self, release_id: str) -> None:
        """Remove a release, its manifest first, so that nobody takes the rest for one. Raises ReleaseError for the champion.

        The pointer names the removal from its beginning to its end: a release on its way out can't become champion.
        """

        def begin(current: Pointer) -> Pointer:
            if current.release_id == release_id:
                raise ChampionServes(f"release {release_id} is the champion")
            return replace(current, removing=(*(name for name in current.removing if name != release_id), release_id))

        def end(current: Pointer) -> Pointer:
            return replace(current, removing=tuple(name for name in current.removing if name != release_id))

        self._repoint(begin)
        for delete in (lambda: self.fs.rm_file(self.path(release_id, MANIFEST)), lambda: self._remove_folder(release_id)):
            with suppress(FileNotFoundError), self.reached(f"removing release {release_id}"):
                delete()
        self._repoint(end)

    def _remove_folder(self, release_id: str) -> None:
        self.fs.invalidate_cache()
        self.fs.rm(self.path(release_id), recursive=True)
        self.fs.invalidate_cache()

    def _named(
        self, release_id: str, reason: str, previous: tuple[str, ...], withdrawn: tuple[str, ...], current: Pointer
    ) -> Pointer:
        """The pointer that names a release after `current`. Raises ReleaseError for one that is removed or being removed."""
        if release_id in current.removing:
            raise ReleaseError(f"release {release_id} is being removed")
        digest = hashlib.sha256(self._bytes(release_id, MANIFEST)).hexdigest()
        return Pointer(
            release_id=release_id,
            manifest_sha256=digest,
            promoted_at=time.time(),
            reason=reason,
            previous=previous[:KEPT_CHAMPIONS],
            withdrawn=tuple(dict.fromkeys(name for name in withdrawn if name != release_id))[:KEPT_CHAMPIONS],
            sequence=current.sequence + 1,
            removing=current.removing,
        )

    def _repoint(self, change: Callable[[Pointer], Pointer], repair: bool = False) -> Pointer:
        """Change the pointer by what it says; what can't be read counts as none with `repair`. Raises ReleaseError."""
        changed = NO_CHAMPION

        def rewrite(said: bytes | None) -> bytes:
            nonlocal changed
            try:
                current = Pointer.from_bytes(said, f"{self.uri}/{CHAMPION}") if said is not None else NO_CHAMPION
            except ReleaseError:
                if not repair:
                    raise
                current = NO_CHAMPION
            changed = change(current)
            return changed.to_bytes()

        with self.reached(f"writing {CHAMPION}"):
            update(self.fs, self.path(CHAMPION), rewrite)
        return changed

    # -- reading ------------------------------------------------------------------------------------------------

    def champion(self) -> Pointer | None:
        """The pointer, None when nothing was promoted yet. Raises ReleaseError when it can't be read."""
        pointer = self._pointer()
        return pointer if pointer.release_id else None

    def removing(self) -> tuple[str, ...]:
        """Releases whose removal has begun and not ended. Raises ReleaseError when the pointer can't be read."""
        return self._pointer().removing

    def _pointer(self) -> Pointer:
        where = f"{self.uri}/{CHAMPION}"
        try:
            with self.reached(CHAMPION):
                said = read_pointer(self.fs, self.path(CHAMPION))
        except (NotADirectoryError, IsADirectoryError) as error:
            raise ReleaseError(f"{masked_text(where)} is not a pointer: {error}") from error
        return NO_CHAMPION if said is None else Pointer.from_bytes(said, where)

    def list(self) -> list[Manifest]:
        """The manifests of all complete releases, oldest first."""
        return sorted((self.manifest(name) for name in self.names()), key=lambda m: m.created_at)

    def newest_of(self, day: str) -> str:
        """The release of a day that was made last. Raises ReleaseError when there is none."""
        names = [name for name in self.names() if name.startswith(f"{day}.")]
        if not names:
            raise ReleaseError(f"there is no release of {day} under {masked_text(self.uri)}")
        return max(names, key=lambda name: self.manifest(name).created_at)

    def names(self) -> Sequence[str]:
        """The ids of all complete releases."""
        with self.reached("listing them"):
            self.fs.invalidate_cache()
            try:
                entries = self.fs.ls(self.root, detail=True)
            except FileNotFoundError:
                return []
            names = (entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries)
            return [name for name in names if RELEASE_NAME.fullmatch(name) and self.fs.exists(self.path(name, MANIFEST))]

    def manifest(self, release_id: str, sha256: str | None = None) -> Manifest:
        """The manifest of a release, the one with a sha256 where that is known. Raises ReleaseError."""
        check_release_id(release_id)
        data = self._bytes(release_id, MANIFEST)
        if sha256 and hashlib.sha256(data).hexdigest() != sha256:
            raise ReleaseError(f"release {release_id}: {MANIFEST} is not the one that was promoted")
        manifest = Manifest.from_bytes(data, f"release {release_id}")
        if manifest.release_id != release_id:
            raise ReleaseError(f"release {release_id}: {MANIFEST} is that of release {manifest.release_id}")
        return manifest

    def item_ids(self, release_id: str) -> Sequence[str]:
        """The items of a release. Raises ReleaseError."""
        try:
            table = pq.read_table(pa.BufferReader(self._bytes(release_id, ITEMS_FILE)), columns=["item_id"])
        except (pa.ArrowInvalid, OSError, KeyError) as error:
            raise ReleaseError(f"release {release_id}: {ITEMS_FILE} is no table of items: {error}") from error
        ids: Sequence[str] = table["item_id"].to_pylist()
        return ids

    def load(self, release_id: str, manifest_sha256: str | None = None, local: Path | None = None) -> tuple[Manifest, Snapshot]:
        """Read and verify a release. Raises ReleaseError that names the file at fault.

        With `local`, a folder on this machine that belongs to the readers, the files are copied there and mapped into memory:
        the processes that load the release share its pages, and what becomes of its files at the source, deletion and writing
        in place included, does no harm. What was verified there is not hashed again as long as its size, time and inode stay.
        """
        manifest = self.manifest(release_id, manifest_sha256)
        where = f"release {release_id}"
        if local is None:
            read = {name: self._verified(release_id, name, expected) for name, expected in manifest.files.items()}
            return manifest, _snapshot_of(manifest, read, where)
        mapped = LocalFiles(self, manifest, local).fetch()
        snapshot = _snapshot_of(manifest, mapped, where)
        _ = snapshot.longest  # made of all vectors, once
        for view in mapped.values():
            _leave_to_the_cache(view)
        return manifest, snapshot

    def _verified(self, release_id: str, name: str, expected: Mapping[str, Any]) -> bytes:
        data = self._bytes(release_id, name)
        check_file(release_id, name, expected, len(data), lambda: hashlib.sha256(data).hexdigest())
        return data

    def forget(self, local: Path, kept: Collection[str]) -> None:
        """Remove the local files of all releases but `kept`. Pages that are mapped stay readable."""
        for folder in local.iterdir() if local.is_dir() else ():
            if folder.is_dir() and folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def _bytes(self, release_id: str, name: str) -> bytes:
        try:
            with self.reached(f"release {release_id}: {name}"):
                return bytes(self.fs.cat_file(self.path(release_id, name)))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise ReleaseError(f"release {release_id}: {name} is missing") from error


def check_file(release_id: str, name: str, expected: Mapping[str, Any], size: int, sha256: Callable[[], str]) -> None:
    """Raises ReleaseError when a file is not the one that the manifest lists."""
    if size != expected["bytes"]:
        raise ReleaseError(f"release {release_id}: {name} has {size} bytes, the manifest says {expected['bytes']}")
    if sha256() != expected["sha256"]:
        raise ReleaseError(f"release {release_id}: {name} is corrupt: its sha256 is not the manifest's")


class LocalFiles:
    """A release's files in a folder of this machine: copied and verified once, mapped into memory.

    They are copies even where the store lies on the same file system. A mapped file that somebody cuts short kills the
    process that reads it (SIGBUS), and the store's files are open to `cp` and `rsync --inplace`; these are the server's own.
    """

    OWN = ("lock", "verified.json")
    """What else is in the folder; no file of a release may have these names."""

    def __init__(self, releases: Releases, manifest: Manifest, local: Path) -> None:
        self._releases = releases
        self._manifest = manifest
        self._folder = local / manifest.release_id
        self._lock, self._mark = (self._folder / name for name in self.OWN)

    def fetch(self) -> dict[str, memoryview]:
        """The mapped files by name. One process at a time fetches, the others find what it brought. Raises ReleaseError."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(self._lock, "w") as lock, _exclusive(lock):
                return self._bring_all()
        except OSError as error:
            raise ReleaseError(
                f"release {self._manifest.release_id}: it can't be brought to {self._folder}: {error}"
            ) from error

    def _bring_all(self) -> dict[str, memoryview]:
        known, files = self._verified_before(), self._manifest.files
        missing = [
            name
            for name, expected in files.items()
            if not (self._folder / name).is_file() or known.get(name) != _stamp(self._folder / name, expected)
        ]
        if missing:
            # The interpreter is free while a thread hashes; the largest files first, so that the threads end together.
            with ThreadPoolExecutor(usable_cores(), "verify") as threads:
                list(threads.map(self._bring, sorted(missing, key=lambda name: -int(files[name]["bytes"]))))
            verified = {name: _stamp(self._folder / name, expected) for name, expected in files.items()}
            write_atomically(LocalFileSystem(), str(self._mark), json.dumps(verified).encode())
        return {name: _mapped(self._folder / name) for name in files}

    def _verified_before(self) -> dict[str, list[Any]]:
        try:
            found = json.loads(self._mark.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _bring(self, name: str) -> None:
        """Copy a file, hashing what is written. It gets its name once it is whole and verified, and is then read-only."""
        path, expected = self._folder / name, self._manifest.files[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            size, sha256 = self._copied(name, half)
            check_file(self._manifest.release_id, name, expected, size, lambda: sha256)
            half.chmod(0o444)
            half.replace(path)
        finally:
            half.unlink(missing_ok=True)

    def _copied(self, name: str, to: Path) -> tuple[int, str]:
        """Bytes and sha256 of a file of the store as it was copied."""
        release_id, size, digest = self._manifest.release_id, 0, hashlib.sha256()
        try:
            with self._releases.reached(f"release {release_id}: {name}"):
                source = self._opened(name)
            room = memoryview(bytearray(COPIED_BYTES))
            with source, open(to, "wb") as target:
                while taken := self._read(source, room, name):
                    target.write(room[:taken])
                    digest.update(room[:taken])
                    size += taken
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise ReleaseError(f"release {release_id}: {name} is missing") from error
        return size, digest.hexdigest()

    def _opened(self, name: str) -> IO[bytes]:
        path = self._releases.path(self._manifest.release_id, name)
        if isinstance(self._releases.fs, LocalFileSystem):
            return open(path, "rb", buffering=0)
        found: IO[bytes] = self._releases.fs.open(path, "rb", block_size=FETCHED_BYTES)
        return found

    def _read(self, source: Any, room: memoryview, name: str) -> int:
        with self._releases.reached(f"release {self._manifest.release_id}: {name}"):
            taken: int = source.readinto(room)
            return taken


@contextmanager
def _exclusive(lock: IO[str]) -> Iterator[None]:
    """Hold the file's lock among processes; it is given back when the file is closed."""
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)
    yield


def _stamp(path: Path, expected: Mapping[str, Any]) -> list[Any]:
    """What tells that a verified file has not been touched since, and has no other name by which it might be."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_nlink, expected["sha256"]]


def _mapped(path: Path) -> memoryview:
    """The file in memory, read-only, its pages shared by all processes; it stays readable after the file is deleted."""
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if path.stat().st_size else memoryview(b"")


def _leave_to_the_cache(view: memoryview) -> None:
    """Give back what checking a mapped file has touched: it stays in the system's cache, and calls touch what they need."""
    if isinstance(view.obj, mmap.mmap) and sys.platform == "linux":
        view.obj.madvise(mmap.MADV_DONTNEED)


def new_release_id(day: str, created_at: float) -> str:
    """Sortable and readable: the day of the data and the moment of the making (UTC)."""
    return f"{day}.{time.strftime('%Y%m%dT%H%M%S', time.gmtime(created_at))}.{int(created_at * 1e6) % 0xFFFF:04x}"


def _files_of(snapshot: Snapshot) -> list[tuple[str, bytes]]:
    table = pa.BufferOutputStream()
    pq.write_table(snapshot.items, table, compression="zstd")
    files: list[tuple[str, bytes]] = [
        (ITEMS_FILE, table.getvalue().to_pybytes()),
        (ALS_ITEMS_FILE, npy_bytes(snapshot.als_items)),
        (ALS_GRAM_FILE, npy_bytes(snapshot.als_gram)),
        (POPULAR_FILE, npy_bytes(snapshot.popular)),
        (SIMILAR_FILE, npy_bytes(snapshot.similar)),
    ]
    if snapshot.als_item_weights is not None:
        files.append((ALS_ITEM_WEIGHTS_FILE, npy_bytes(snapshot.als_item_weights)))
    for metric, name in INDEX_FILES.items():
        index = snapshot.indexes[metric]
        if not isinstance(index, VectorIndex):
            raise TypeError(f"a release holds HNSW indexes, not {type(index).__name__}")
        files.append((name, index.serialize()))
    if snapshot.tower is not None and snapshot.two_tower_items is not None:
        files.append((TWO_TOWER_ITEMS_FILE, npy_bytes(snapshot.two_tower_items)))
        files += [(f"{TWO_TOWER}/{name}", data) for name, data in snapshot.tower.to_files().items()]
        if isinstance(snapshot.two_tower_index, VectorIndex):
            files.append((TWO_TOWER_INDEX_FILE, snapshot.two_tower_index.serialize()))
    return files


def npy_bytes(array: np.ndarray) -> bytes:
    """An array in NumPy's format."""
    out = io.BytesIO()
    np.save(out, np.ascontiguousarray(array), allow_pickle=False)
    return out.getvalue()


def npy_array(data: Buffer) -> np.ndarray:
    """What `npy_bytes` made, over the memory of `data` and read-only. Raises ValueError; pickled objects are refused."""
    head = io.BytesIO(data[:NPY_HEADER_BYTES])
    version = np.lib.format.read_magic(head)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read_header(head)
    if dtype.hasobject or fortran_order:
        raise ValueError(f"an array of {dtype}{' in Fortran order' if fortran_order else ''} is not read")
    count = math.prod(shape)
    if len(data) != head.tell() + count * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes are not the {count} values of {dtype} that its header says")
    return np.frombuffer(data, dtype, count, head.tell()).reshape(shape)


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """The values of an array, as many at a time as stay in the processor's cache."""
    values = array.reshape(-1)
    for at in range(0, len(values), CHECKED_TOGETHER):
        yield values[at : at + CHECKED_TOGETHER]


def _snapshot_of(manifest: Manifest, files: Mapping[str, Buffer], where: str) -> Snapshot:
    absent = [
        n
        for n in (ITEMS_FILE, ALS_ITEMS_FILE, ALS_GRAM_FILE, POPULAR_FILE, SIMILAR_FILE, *INDEX_FILES.values())
        if n not in files
    ]
    if absent:
        raise ReleaseError(f"{where}: {MANIFEST} does not list {', '.join(absent)}")

    def array(name: str, shape: tuple[int | None, ...]) -> np.ndarray:
        try:
            loaded = npy_array(files[name])
        except ValueError as error:
            raise ReleaseError(f"{where}: {name} is not an array: {error}") from error
        if len(shape) != loaded.ndim or any(want not in (None, got) for want, got in zip(shape, loaded.shape, strict=True)):
            raise ReleaseError(f"{where}: {name} has shape {loaded.shape}, expected {shape}")
        if loaded.dtype.kind not in "iu" and not all(np.isfinite(block).all() for block in _blocks(loaded)):
            raise ReleaseError(f"{where}: {name} holds values that are not finite")
        return loaded

    als = manifest.models.get("als") or {}
    with ThreadPoolExecutor(len(INDEX_FILES), "read-index") as threads:
        # FAISS looks at every edge of a graph and leaves the interpreter to the rest.
        reading: dict[Metric, Future[VectorIndex]] = {
            metric: threads.submit(_index_of, manifest, metric, metric, files[name], f"{where}: {name}")
            for metric, name in INDEX_FILES.items()
        }
        items = _items_of(files[ITEMS_FILE], where)
        als_items = array(ALS_ITEMS_FILE, (items.num_rows, als.get("rank")))
        similar = array(SIMILAR_FILE, (items.num_rows, None))
        if similar.dtype.kind != "i" or any(b.min() < -1 or b.max() >= items.num_rows for b in _blocks(similar)):
            raise ReleaseError(f"{where}: {SIMILAR_FILE} holds what is no position of {items.num_rows} items")
    indexes = {metric: future.result() for metric, future in reading.items()}
    for metric, index in indexes.items():
        if (index.items, index.dimension) != als_items.shape:
            raise ReleaseError(
                f"{where}: {INDEX_FILES[metric]} holds {index.items} vectors of dimension {index.dimension}, "
                f"{ALS_ITEMS_FILE} {als_items.shape}"
            )
    try:
        ranking = RankingSettings.model_validate(manifest.ranking)
    except ValueError as error:
        raise ReleaseError(f"{where}: {MANIFEST} has a ranking that does not fit: {error}") from error
    two_tower_items, two_tower_index, tower = _two_tower_of(manifest, files, where, items.num_rows, array)
    try:
        return Snapshot(
            release_id=manifest.release_id,
            items=items,
            als_items=als_items,
            als_gram=array(ALS_GRAM_FILE, (als_items.shape[1], als_items.shape[1])),
            als_version=str(als.get("version", "")),
            als_alpha=float(als.get("alpha", 1.0)),
            als_base_preference=float(als.get("base_preference", 1.0)),
            als_regularization=float(als.get("regularization", 0.0)),
            als_regularization_per_item=float(als.get("regularization_per_item", 0.0)),
            als_item_weights=array(ALS_ITEM_WEIGHTS_FILE, (items.num_rows,)) if ALS_ITEM_WEIGHTS_FILE in files else None,
            popular=array(POPULAR_FILE, (items.num_rows,)),
            similar=similar,
            indexes=indexes,
            ranking=ranking,
            two_tower_items=two_tower_items,
            two_tower_index=two_tower_index,
            tower=tower,
        )
    except ValueError as error:
        raise ReleaseError(f"{where}: {ITEMS_FILE}: {error}") from error


def _items_of(data: Buffer, where: str) -> pa.Table:
    try:
        items = pq.ParquetFile(pa.BufferReader(data)).read()
    except pa.ArrowInvalid as error:
        raise ReleaseError(f"{where}: {ITEMS_FILE} is not Parquet: {error}") from error
    lacking = [name for name in ITEM_COLUMNS if name not in items.column_names]
    if lacking:
        raise ReleaseError(f"{where}: {ITEMS_FILE} lacks {', '.join(lacking)}")
    return items


def _index_of(manifest: Manifest, entry: str, metric: Metric, data: Buffer, where: str) -> VectorIndex:
    """An index with the efSearch that `entry` of the manifest's `index` says."""
    try:
        return VectorIndex.deserialize(data, metric, int(manifest.index[entry]["ef_search"]))
    except (ValueError, KeyError) as error:
        raise ReleaseError(f"{where}: {error}") from error


def _two_tower_of(
    manifest: Manifest,
    files: Mapping[str, Buffer],
    where: str,
    items: int,
    array: Callable[[str, tuple[int | None, ...]], np.ndarray],
) -> tuple[np.ndarray | None, Searchable | None, UserTower | None]:
    """Item vectors, their index and the user tower; three times None for a release without the model."""
    wanted = manifest.models.get(TWO_TOWER) or {}
    if "version" not in wanted:
        return None, None, None
    if TWO_TOWER_ITEMS_FILE not in files:
        raise ReleaseError(f"{where}: {MANIFEST} does not list {TWO_TOWER_ITEMS_FILE}")
    of_items = (TWO_TOWER_ITEMS_FILE, TWO_TOWER_INDEX_FILE)
    of_tower = {
        name.partition("/")[2]: bytes(data)
        for name, data in files.items()
        if name.startswith(f"{TWO_TOWER}/") and name not in of_items
    }
    try:
        tower = UserTower.from_files(of_tower)
    except TowerError as error:
        raise ReleaseError(f"{where}: {TWO_TOWER}: {error}") from error
    if tower.version != wanted["version"]:
        raise ReleaseError(f"{where}: {TWO_TOWER} is version {tower.version!r}, {MANIFEST} says {wanted['version']!r}")
    vectors = array(TWO_TOWER_ITEMS_FILE, (items, tower.dimension))
    if TWO_TOWER_INDEX_FILE not in files:
        return vectors, ExactIndex(vectors, "inner_product"), tower
    index = _index_of(manifest, TWO_TOWER, "inner_product", files[TWO_TOWER_INDEX_FILE], f"{where}: {TWO_TOWER_INDEX_FILE}")
    if (index.items, index.dimension) != vectors.shape:
        raise ReleaseError(
            f"{where}: {TWO_TOWER_INDEX_FILE} holds {index.items} vectors, {TWO_TOWER_ITEMS_FILE} {vectors.shape}"
        )
    return vectors, index, tower
