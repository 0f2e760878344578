"""Files with weights: hashed as they are written, and held against their digests before they are read."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from ..errors import RequestError, RunFailed
from .run_folder import MANIFEST

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
    path = next((path for name in (DIGESTS, MANIFEST) if (path := folder / name).exists()), None)
    if path is None:
        return {}
    try:
        stored = json.loads(path.read_text())
        if stored["algorithm"] != "blake3":
            raise ValueError(f"unknown algorithm {stored['algorithm']!r}")
        return {name: Written(name, entry["bytes"], entry["blake3"]) for name, entry in stored["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{path}: not a readable list of digests: {error!r}") from error
