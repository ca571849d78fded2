"""Files on a local disk or in an object store: written whole, kept over a power failure, replaced only knowing what they said.

A pointer is a small file that says which version of something counts. `update` is the one way to change a pointer by what it
said before; of two writers at once neither undoes the other. What each kind of store gives for it:

    local disk, NFS   a lock file beside the pointer is held while it is read and replaced, by all processes of all machines
    S3                the object is written under the condition that it is still the one that was read (`If-Match`); a store of
                      the same protocol that knows no conditions refuses the write
    memory            a lock of the process, which is all that can reach it
    any other         a lock of the process; between processes the content is compared just before it is written
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any

import fsspec

from recsys_core.errors import UserError
from recsys_core.masking import masked_text

TEMPORARY = ".tmp"
LOCK = ".lock"

Change = Callable[[bytes | None], bytes | None]
"""From what a pointer says (None: it is not there) to what it shall say, None where it shall stay as it is.

It may be called again when another writer was faster, and must touch no other pointer."""

_S3_CONFLICTS = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409", "NoSuchKey", "404"}
"""What S3 answers when an object is no longer the one that a condition names."""

_guards = [threading.Lock() for _ in range(1024)]


class UnknownStore(UserError):
    """There is no client for what a URI names."""


def open_filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec filesystem of a path or URI, and the path inside it. Raises UnknownStore."""
    try:
        fs, path = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        cure = " (`pip install recsys[s3]`)" if uri.startswith(("s3:", "s3a:")) else ""
        raise UnknownStore(f"{masked_text(uri)} can't be used as a store: {masked_text(str(error))}{cure}") from error
    return fs, path.rstrip("/")


def is_of_the_store(error: OSError) -> bool:
    """Whether an error tells of the store, and not of what lies there: parsers raise OSError itself or classes of their own,
    without a number."""
    return error.errno is not None or (type(error) is not OSError and type(error).__module__ == OSError.__module__)


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether the files are those of a mounted file system."""
    return "file" in _protocols(fs)


def write_atomically(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
    """Put `data` at `path` so that a reader sees the old content or the new one, also after a power failure."""
    fs.makedirs(os.path.dirname(path), exist_ok=True)
    if not is_local(fs):
        fs.pipe_file(path, data)
        return
    with _replacing(path) as temporary, open(temporary, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def move_atomically(fs: fsspec.AbstractFileSystem, local: str, path: str) -> None:
    """Put what a file of this machine holds at `path`, as `write_atomically` does; the content need not fit the memory."""
    fs.makedirs(os.path.dirname(path), exist_ok=True)
    if not is_local(fs):
        fs.put_file(local, path)
        return
    with _replacing(path) as temporary:
        shutil.copyfile(local, temporary)
        _sync(temporary)


@contextmanager
def _replacing(path: str) -> Iterator[str]:
    """A file beside a local one that takes its place once the block has written it."""
    temporary = f"{path}.{uuid.uuid4().hex}{TEMPORARY}"
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync(os.path.dirname(path))


def sync_files(fs: fsspec.AbstractFileSystem, paths: Iterable[str]) -> None:
    """Return when files that were written would be there, by their names, after a power failure.

    A store of objects has them from the start.
    """
    if not is_local(fs):
        return
    folders: dict[str, None] = {}
    for path in paths:
        _sync(path)
        folders[os.path.dirname(path)] = None
    for folder in list(folders):
        folders[os.path.dirname(folder)] = None
    for folder in folders:
        _sync(folder)


def files_below(
    fs: fsspec.AbstractFileSystem, folder: str, unseen: Callable[[str, OSError], None]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The path of each file below a folder, if that is there, and how its store lists it; `unseen` is told of each folder that
    can't be listed.

    `exists` and `find` of fsspec say of what they can't see that it is empty.
    """
    try:
        entries = sorted(fs.ls(folder, detail=True), key=lambda entry: entry["name"])
    except FileNotFoundError:
        return
    except OSError as error:
        unseen(folder, error)
        return
    for entry in entries:
        if entry["type"] == "directory":
            yield from files_below(fs, entry["name"].rstrip("/"), unseen)
        else:
            yield entry["name"], entry


def written_at(entry: Mapping[str, Any]) -> float:
    """When a file was written (seconds since 1970), by what its store calls that; `entry` is how the store lists it."""
    written = next(entry[name] for name in ("mtime", "LastModified", "last_modified", "created") if name in entry)
    return float(written.timestamp() if isinstance(written, datetime) else written)


def _sync(path: str) -> None:
    if sys.platform == "win32":  # folders can't be opened there
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


# -- pointers ---------------------------------------------------------------------------------------------------------


def read_pointer(fs: fsspec.AbstractFileSystem, path: str) -> bytes | None:
    """What a pointer says now, None when it is not there."""
    try:
        return bytes(fs.cat_file(path))
    except FileNotFoundError:
        return None


def update(fs: fsspec.AbstractFileSystem, path: str, change: Change) -> bytes | None:
    """Change a pointer by what it says. Returns what it says then; what `change` raises leaves it as it is."""
    with _alone(fs, path):
        if "s3" in _protocols(fs):
            return _update_s3(fs, path, change)
        before = read_pointer(fs, path)
        after = change(before)
        if after is None:
            return before
        write_atomically(fs, path, after)
        return after


def delete_pointer(fs: fsspec.AbstractFileSystem, path: str, may_go: Callable[[bytes], bool]) -> bool:
    """Delete a pointer if what it says may go. Returns whether it is gone.

    On a store of objects a write of another process in the moment between the look and the deletion is lost.
    """
    with _alone(fs, path):
        said = read_pointer(fs, path)
        if said is not None and not may_go(said):
            return False
        with suppress(FileNotFoundError):
            fs.rm_file(path)
        if is_local(fs):
            os.unlink(path + LOCK)
        return True


@contextmanager
def _alone(fs: fsspec.AbstractFileSystem, path: str) -> Iterator[None]:
    """Hold a pointer: no other thread, and on a local disk no other process, changes it meanwhile."""
    with _guards[hash(path) % len(_guards)]:
        if not is_local(fs):
            yield
            return
        lock = _locked(path + LOCK)
        try:
            yield
        finally:
            os.close(lock)


def _locked(path: str) -> int:
    """An open lock file that this process holds until it is closed. One that was deleted meanwhile is no lock."""
    while True:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the folder was removed since
            continue
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                return lock
        os.close(lock)


def _update_s3(fs: Any, path: str, change: Change) -> bytes | None:
    while True:
        condition, before = _object(fs, path)
        after = change(before)
        if after is None:
            return before
        try:
            fs.pipe_file(path, after, **condition)
        except OSError as error:
            if not _is_conflict(error):
                raise
            if read_pointer(fs, path) == after:  # it was written, and asked for again because the answer was lost
                return after
            continue
        return after


def _object(fs: Any, path: str) -> tuple[dict[str, str], bytes | None]:
    """The condition under which an object is still the one that was read, and its content.

    The tag is read first: content that is newer than its tag makes the write fail, never pass.
    """
    try:
        tag = fs.info(path, refresh=True)["ETag"]
        return {"IfMatch": tag}, bytes(fs.cat_file(path))
    except FileNotFoundError:
        return {"IfNoneMatch": "*"}, None


def _is_conflict(error: OSError) -> bool:
    said = getattr(error.__cause__, "response", None) or {}
    code = str(said.get("Error", {}).get("Code", ""))
    return isinstance(error, FileExistsError | FileNotFoundError) or code in _S3_CONFLICTS


def _protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)
