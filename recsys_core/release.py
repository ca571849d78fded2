"""The release: one immutable bundle of everything serving needs, verified before use, named by a pointer file.

    <releases>/<release_id>/manifest.json                       written last: a folder without it is not a release
    <releases>/<release_id>/items.parquet                       item_id and catalogue, in the order of positions
    <releases>/<release_id>/als/items.npy                       float32 (items, rank)
    <releases>/<release_id>/als/gram.npy                        float64 (rank, rank), YᵀY for the fold-in
    <releases>/<release_id>/index/inner_product.faiss           user vector -> items
    <releases>/<release_id>/index/cosine.faiss                  item vector -> similar items
    <releases>/<release_id>/similar.npy                         int32 (items, k), nearest other items by cosine
    <releases>/<release_id>/popular.npy                         float32 (items,), the window's popularity
    <releases>/<release_id>/two_tower/items.npy                 float32 (items, d), unit vectors of the item tower
    <releases>/<release_id>/two_tower/tower.json, *.npy         the user tower, see tower.py
    <releases>/<release_id>/two_tower/index.faiss               user tower's vector -> items; with few items they are scanned

A release without a two-tower model has no `two_tower/`, and `notes` of its manifest says why.
    <releases>/champion.json                                    which release is served, replaced atomically

A reader trusts nothing: size and sha256 of each file, then shapes and id maps against each other.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys_core.index import ExactIndex, Metric, Searchable, VectorIndex
from recsys_core.lake import open_filesystem, write_atomically
from recsys_core.ranking import Snapshot
from recsys_core.settings import RankingSettings
from recsys_core.tower import TowerError, UserTower

MANIFEST = "manifest.json"
CHAMPION = "champion.json"
SCHEMA_VERSION = 1

ITEMS_FILE = "items.parquet"
ITEM_COLUMNS = ("item_id", "title", "category", "available")
ALS_ITEMS_FILE = "als/items.npy"
ALS_GRAM_FILE = "als/gram.npy"
POPULAR_FILE = "popular.npy"
SIMILAR_FILE = "similar.npy"
TWO_TOWER = "two_tower"
TWO_TOWER_ITEMS_FILE = f"{TWO_TOWER}/items.npy"
TWO_TOWER_INDEX_FILE = f"{TWO_TOWER}/index.faiss"
INDEX_FILES: dict[Metric, str] = {"inner_product": "index/inner_product.faiss", "cosine": "index/cosine.faiss"}


class ReleaseError(Exception):
    """A release can't be used; the message names the release, the file and what is wrong with it."""


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
            return cls(**raw)
        except TypeError as error:
            raise ReleaseError(f"{where}: {MANIFEST} does not fit its schema: {error}") from error


@dataclass(frozen=True)
class Pointer:
    """Which release is served. `manifest_sha256` ties it to the manifest's content."""

    release_id: str
    manifest_sha256: str
    promoted_at: float
    reason: str = ""


class Releases:
    """The releases under a path or URI."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self.fs, self.root = open_filesystem(uri)

    def path(self, *parts: str) -> str:
        return "/".join((self.root, *parts))

    # -- writing ------------------------------------------------------------------------------------------------

    def write(self, manifest: Manifest, snapshot: Snapshot) -> Manifest:
        """Write `snapshot` as a new release and return its completed manifest. A release is never written twice."""
        folder = self.path(manifest.release_id)
        if self.fs.exists(f"{folder}/{MANIFEST}"):
            raise ReleaseError(f"release {manifest.release_id} exists already; releases are immutable")
        files = {}
        for name, data in _files_of(snapshot):
            write_atomically(self.fs, f"{folder}/{name}", data)
            files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        complete = Manifest(**{**asdict(manifest), "files": files})
        write_atomically(self.fs, f"{folder}/{MANIFEST}", complete.to_bytes())
        return complete

    def promote(self, release_id: str, reason: str = "") -> Pointer:
        """Make a release the champion after reading and verifying all of it. Raises ReleaseError."""
        self.load(release_id)
        digest = hashlib.sha256(self._bytes(release_id, MANIFEST)).hexdigest()
        pointer = Pointer(release_id, digest, time.time(), reason)
        write_atomically(self.fs, self.path(CHAMPION), json.dumps(asdict(pointer), indent=2).encode())
        return pointer

    # -- reading ------------------------------------------------------------------------------------------------

    def champion(self) -> Pointer | None:
        """The pointer, None when nothing was promoted yet. Raises ReleaseError when it can't be read."""
        try:
            raw = json.loads(self.fs.cat_file(self.path(CHAMPION)))
            return Pointer(**raw)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise ReleaseError(f"{self.uri}/{CHAMPION} is not a pointer: {error}") from error

    def list(self) -> list[Manifest]:
        """The manifests of all complete releases, oldest first."""
        self.fs.invalidate_cache()
        if not self.fs.exists(self.root):
            return []
        names = [entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in self.fs.ls(self.root, detail=True)]
        found = [self.manifest(name) for name in names if self.fs.exists(self.path(name, MANIFEST))]
        return sorted(found, key=lambda m: m.created_at)

    def manifest(self, release_id: str) -> Manifest:
        """The manifest of a release. Raises ReleaseError."""
        data = self._bytes(release_id, MANIFEST)
        manifest = Manifest.from_bytes(data, f"release {release_id}")
        if manifest.release_id != release_id:
            raise ReleaseError(f"release {release_id}: {MANIFEST} is that of release {manifest.release_id}")
        return manifest

    def load(self, release_id: str, manifest_sha256: str | None = None) -> tuple[Manifest, Snapshot]:
        """Read and verify a release. Raises ReleaseError that names the file at fault."""
        where = f"release {release_id}"
        manifest = self.manifest(release_id)
        if manifest_sha256 and hashlib.sha256(self._bytes(release_id, MANIFEST)).hexdigest() != manifest_sha256:
            raise ReleaseError(f"{where}: {MANIFEST} is not the one that was promoted")
        files = {}
        for name, expected in manifest.files.items():
            data = self._bytes(release_id, name)
            if len(data) != expected["bytes"]:
                raise ReleaseError(f"{where}: {name} has {len(data)} bytes, the manifest says {expected['bytes']}")
            if hashlib.sha256(data).hexdigest() != expected["sha256"]:
                raise ReleaseError(f"{where}: {name} is corrupt: its sha256 is not the manifest's")
            files[name] = data
        return manifest, _snapshot_of(manifest, files, where)

    def _bytes(self, release_id: str, name: str) -> bytes:
        try:
            return bytes(self.fs.cat_file(self.path(release_id, name)))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise ReleaseError(f"release {release_id}: {name} is missing") from error
        except OSError as error:
            raise ReleaseError(f"release {release_id}: {name} can't be read: {error}") from error


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


def npy_array(data: bytes) -> np.ndarray:
    """What `npy_bytes` made. Raises ValueError; pickled objects are refused."""
    array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    return array


def _snapshot_of(manifest: Manifest, files: Mapping[str, bytes], where: str) -> Snapshot:
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
        if not np.isfinite(loaded).all():
            raise ReleaseError(f"{where}: {name} holds values that are not finite")
        return loaded

    try:
        items = pq.read_table(pa.BufferReader(files[ITEMS_FILE]))
    except pa.ArrowInvalid as error:
        raise ReleaseError(f"{where}: {ITEMS_FILE} is not Parquet: {error}") from error
    lacking = [name for name in ITEM_COLUMNS if name not in items.column_names]
    if lacking:
        raise ReleaseError(f"{where}: {ITEMS_FILE} lacks {', '.join(lacking)}")
    als = manifest.models.get("als") or {}
    als_items = array(ALS_ITEMS_FILE, (items.num_rows, als.get("rank")))
    indexes: dict[Metric, VectorIndex] = {}
    for metric, name in INDEX_FILES.items():
        try:
            index = VectorIndex.deserialize(files[name], metric, int(manifest.index[metric]["ef_search"]))
        except (ValueError, KeyError) as error:
            raise ReleaseError(f"{where}: {name}: {error}") from error
        if (index.items, index.dimension) != als_items.shape:
            raise ReleaseError(
                f"{where}: {name} holds {index.items} vectors of dimension {index.dimension}, "
                f"{ALS_ITEMS_FILE} {als_items.shape}"
            )
        indexes[metric] = index
    similar = array(SIMILAR_FILE, (items.num_rows, None))
    if similar.dtype.kind != "i" or similar.min(initial=-1) < -1 or similar.max(initial=-1) >= items.num_rows:
        raise ReleaseError(f"{where}: {SIMILAR_FILE} holds what is no position of {items.num_rows} items")
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
            als_regularization=float(als.get("regularization", 0.0)),
            als_regularization_per_item=float(als.get("regularization_per_item", 0.0)),
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


def _two_tower_of(
    manifest: Manifest,
    files: Mapping[str, bytes],
    where: str,
    items: int,
    array: Callable[[str, tuple[int | None, ...]], np.ndarray],
) -> tuple[np.ndarray | None, Searchable | None, UserTower | None]:
    """Item vectors, their index and the user tower; three times None for a release without the model."""
    wanted = manifest.models.get(TWO_TOWER) or {}
    if "version" not in wanted:
        return None, None, None
    absent = [name for name in (TWO_TOWER_ITEMS_FILE,) if name not in files]
    if absent:
        raise ReleaseError(f"{where}: {MANIFEST} does not list {', '.join(absent)}")
    of_tower = {name.partition("/")[2]: bytes(data) for name, data in files.items() if name.startswith(f"{TWO_TOWER}/")}
    try:
        tower = UserTower.from_files(of_tower)
    except TowerError as error:
        raise ReleaseError(f"{where}: {TWO_TOWER}: {error}") from error
    if tower.version != wanted["version"]:
        raise ReleaseError(f"{where}: {TWO_TOWER} is version {tower.version!r}, {MANIFEST} says {wanted['version']!r}")
    vectors = array(TWO_TOWER_ITEMS_FILE, (items, tower.dimension))
    if TWO_TOWER_INDEX_FILE not in files:
        return vectors, ExactIndex(vectors, "inner_product"), tower
    try:
        index = VectorIndex.deserialize(
            files[TWO_TOWER_INDEX_FILE], "inner_product", int(manifest.index[TWO_TOWER]["ef_search"])
        )
    except (ValueError, KeyError) as error:
        raise ReleaseError(f"{where}: {TWO_TOWER_INDEX_FILE}: {error}") from error
    if (index.items, index.dimension) != vectors.shape:
        raise ReleaseError(
            f"{where}: {TWO_TOWER_INDEX_FILE} holds {index.items} vectors, {TWO_TOWER_ITEMS_FILE} {vectors.shape}"
        )
    return vectors, index, tower
