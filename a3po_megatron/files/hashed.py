"""A folder that appears whole or not at all: it is written under a hidden name beside its place, then renamed.

    parent/.NAME.partial/   while it is being written, locked by the writer
    parent/NAME/            once every byte is on the disk

A killed writer leaves its partial folder behind, without the lock: the next one throws it away and begins again.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from ..errors import RequestError, RunFailed

DIGESTS = "digests.json"


@dataclass(frozen=True)
class Written:
    """A file with weights, as it was written."""

    name: str  # relative to its folder
    bytes: int
    blake3: str


class HashedFile(io.RawIOBase):
    """A new file that is hashed as it is written. A failed write is kept in `failure` too: C++ callers lose it."""

    _STEP = 1 << 20  # hashed and written while it is in the processor's cache
    _SYNC = 1 << 28  # then handed to the disk, so that the end has not everything still to write

    def __init__(self, path: Path) -> None:
        self._file, self._digest, self.bytes = path.open("wb", buffering=0), blake3(), 0
        self.failure: RunFailed | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            for begin in range(0, len(view), self._STEP):
                part = view[begin : begin + self._STEP]
                self._digest.update(part)
                synced = self.bytes // self._SYNC
                while len(part):  # an unbuffered file may take less than it is given
                    taken = self._file.write(part)
                    part, self.bytes = part[taken:], self.bytes + taken
                if self.bytes // self._SYNC > synced:
                    os.fdatasync(self._file.fileno())
        except OSError as error:
            self.failure = RunFailed(f"{self._file.name}: cannot write it: {error.strerror}")
            raise self.failure from error
        return len(view)

    def tell(self) -> int:
        return self.bytes

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()
        super().close()

    def written(self) -> Written:
        """What was written so far."""
        return Written(Path(self._file.name).name, self.bytes, self._digest.hexdigest())


def check_free(folder: Path, need: int = 0) -> None:
    """Raises RequestError where `folder` cannot become a new folder of `need` bytes."""
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RequestError(f"{folder}: exists already and is not an empty folder: name another one, or remove it")
        if folder.is_dir() and os.path.ismount(folder):
            raise RequestError(f"{folder}: it is a mount point, which cannot be replaced: name a folder within it")
        parent = next(path for path in folder.resolve().parents if path.is_dir())
        if (free := shutil.disk_usage(parent).free) < need:
            raise RequestError(f"{folder}: {need:,} bytes are to be written, and {free:,} are free there")
    except OSError as error:
        raise RequestError(f"{folder}: cannot make it: {error.strerror}") from error


def partial_of(folder: Path) -> Path:
    """Where a folder is while it is being written. Of a link, the place it points to counts."""
    folder = folder.resolve()
    return folder.parent / f".{folder.name}.partial"


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """The partial folder to write into; it becomes `folder` when the block ends, and vanishes if the block raises.

    Raises RequestError if `folder` exists and holds anything, cannot be made, or is being written by another process,
    and RunFailed if the disk fails while it is being written.
    """
    folder, partial = folder.resolve(), partial_of(folder)
    holder = _claim(folder, partial)
    try:
        yield partial
        for path in partial.rglob("*"):
            sync(path)
        sync(partial)
        if folder.exists():
            folder.rmdir()  # an empty folder that was there before
        os.rename(partial, folder)
        sync(folder.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunFailed(f"{error.filename2 or error.filename or folder}: cannot write it: {error.strerror}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(holder)


def _claim(folder: Path, partial: Path) -> int:
    """Makes the partial folder anew and locks it; two that start at once are told apart by a lock on the parent."""
    with contextlib.ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            parent = os.open(folder.parent, os.O_RDONLY)
            stack.callback(os.close, parent)
            fcntl.flock(parent, fcntl.LOCK_EX)
            check_free(folder)  # now that nobody else can finish it
            if partial.exists():
                stale = os.open(partial, os.O_RDONLY)
                stack.callback(os.close, stale)
                fcntl.flock(stale, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(partial)
            partial.mkdir()
            holder = os.open(partial, os.O_RDONLY)
            fcntl.flock(holder, fcntl.LOCK_EX)
            return holder
        except BlockingIOError as error:
            raise RequestError(f"{partial}: another process is writing this folder") from error
        except OSError as error:
            raise RequestError(f"{folder}: cannot make it: {error.strerror}") from error


def sync(path: Path) -> None:
    """Returns when a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_of(path: Path) -> Written:
    """Size and digest of a file as it is now."""
    digest = blake3(max_threads=blake3.AUTO)
    digest.update_mmap(path)
    return Written(path.name, path.stat().st_size, digest.hexdigest())


def save_digests(folder: Path, files: Iterable[Written], others: Iterable[str] = ()) -> None:
    """Writes size and digest of every file with weights, and of the `others`, which say where the weights lie."""
    everything = [*files, *(digest_of(folder / name) for name in others)]
    entries = {file.name: {"bytes": file.bytes, "blake3": file.blake3} for file in everything}
    (folder / DIGESTS).write_text(json.dumps({"algorithm": "blake3", "files": entries}, indent=2) + "\n")


def check_digest(path: Path, stored: dict[str, Written]) -> None:
    """Raises RequestError if a file is not what was hashed when it was written; no digests at all: nothing to hold."""
    if not path.is_file():
        raise RequestError(f"{path}: the file is missing")
    if not stored:
        return
    if path.name not in stored:
        raise RequestError(f"{path}: {DIGESTS} does not know this file: it is not one of those that were written")
    if digest_of(path) != stored[path.name]:
        raise RequestError(f"{path}: its bytes are not those that were written ({DIGESTS}): it is damaged")


def read_digests(folder: Path) -> dict[str, Written]:
    """Size and digest by file name, of `save_digests` or a run's manifest; empty where the folder has neither.

    Raises RequestError if unreadable.
    """
    path = next((path for name in (DIGESTS, "manifest.json") if (path := folder / name).exists()), None)
    if path is None:
        return {}
    try:
        stored = json.loads(path.read_text())
        if stored["algorithm"] != "blake3":
            raise ValueError(f"unknown algorithm {stored['algorithm']!r}")
        return {name: Written(name, entry["bytes"], entry["blake3"]) for name, entry in stored["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{path}: not a readable list of digests: {error!r}") from error
