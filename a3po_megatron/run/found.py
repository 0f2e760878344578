"""What a journal held when a start began, and in which file: known to every rank, though none has read all of it.

    rank 0        lists the files once, of the steps that the run will come to; all agree on the list
    every rank    reads the headers of a share of them, the i-th file by rank i mod world, and cuts off a torn last
                  frame: what is appended behind one would not be found again
    all           exchange what is in which file (`Ranks.agree`), in keys of eight bytes

Then a rank opens the files that hold what it asks for, and no others, whichever rank of whichever layout wrote them. A
key is a hash: where two names share one, a file is opened in vain. Of a file counts what it held when the start began.
"""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from blake3 import blake3

from ..errors import RequestError, RunFailed
from ..files.run_folder import journal_file, rank_of, step_files, step_of
from .journal import Frame, names_of, read_frames

KEY_BYTES = 8
Share = list[tuple[int, int, int, str]]  # of each file: step, rank, bytes of its whole frames, keys in base64


class Agreeing(Protocol):
    """What is used of Ranks."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    def agree(self, tag: str, value: Any, op: Callable[[list[Any]], Any]) -> Any: ...


class Found:
    """One rank's view of it."""

    def __init__(self, folder: Path, shares: Iterable[Share] = ()) -> None:
        self._files: defaultdict[bytes, list[tuple[Path, int]]] = defaultdict(list)
        self._read: dict[Path, dict[tuple[str, Any], list[Frame]]] = {}
        for step, rank, end, text in sorted(file for share in shares for file in share):
            keys = base64.b64decode(text)
            for place in range(0, len(keys), KEY_BYTES):
                self._files[keys[place : place + KEY_BYTES]].append((journal_file(folder, step, rank), end))

    def frames(self, step: int, kind: str, name: Any) -> Iterator[Frame]:
        """Yields the frames of a kind and a name (journal.names_of) that were written in a step, by file and place."""
        for path, end in self._files.get(_key(step, kind, name), []):
            if path not in self._read:
                self._read[path] = {}
                for frame in read_frames(path, end):
                    for each in names_of(frame.header):
                        self._read[path].setdefault((frame.header["kind"], each), []).append(frame)
            yield from self._read[path].get((kind, name), [])


def find(folder: Path, ranks: Agreeing, first_step: int) -> Found:
    """Finds what the journal in `folder` holds of the steps from `first_step` on. Collective.

    Raises, on all ranks, RequestError for a file of another version's format, RunFailed for one that cannot be read.
    """
    listed = _listed(folder, first_step) if ranks.rank == 0 else None
    files = [(step, rank) for step, written in ranks.agree("journal", listed, _of_rank_0) for rank in written]
    if not files:
        return Found(folder)
    shares = ranks.agree("what is in the journal", _read_share(folder, files[ranks.rank :: ranks.world]), list)
    for kind, said in shares:
        if kind != "files":
            raise RequestError(said) if kind == "request" else RunFailed(said)
    return Found(folder, (share for _, share in shares))


def _listed(folder: Path, first_step: int) -> list[tuple[int, list[int]]]:
    """Per step the ranks that wrote a file in it."""
    written: dict[int, list[int]] = {}
    for path in step_files(folder):
        if step_of(path) >= first_step:
            written.setdefault(step_of(path), []).append(rank_of(path))
    return list(written.items())


def _read_share(folder: Path, files: list[tuple[int, int]]) -> tuple[str, Any]:
    """What is in some files, or why that cannot be said."""
    share: Share = []
    for step, rank in files:
        path = journal_file(folder, step, rank)
        try:
            share.append((step, rank, *_read_file(path, step)))
        except RequestError as error:
            return "request", str(error)
        except OSError as error:
            return "run", f"{path}: cannot read it: {error.strerror or error}"
    return "files", share


def _read_file(path: Path, step: int) -> tuple[int, str]:
    """How many bytes its whole frames have, and their keys; what is behind them is cut off."""
    end, keys = 0, set()
    for frame in read_frames(path):
        end = frame.offset + frame.header["bytes"]
        keys |= {_key(step, frame.header["kind"], name) for name in names_of(frame.header)}
    if path.stat().st_size > end:
        with path.open("r+b") as file:
            file.truncate(end)
    return end, base64.b64encode(b"".join(sorted(keys))).decode()


def _key(step: int, kind: str, name: Any) -> bytes:
    """Of scores the prompt alone counts: a key a rollout would be many. Where several ranks trained on a prompt's
    rollouts, the files of all of them are looked through."""
    name = name.rpartition("#")[0] if kind == "scores" else name
    return blake3(f"{step} {kind} {name}".encode()).digest(KEY_BYTES)


def _of_rank_0(values: list[Any]) -> Any:
    return values[0]
