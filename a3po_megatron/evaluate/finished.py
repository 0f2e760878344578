"""The problems that an evaluation has finished, kept meanwhile: whoever kills it loses the unfinished ones alone.

    partial/<version>-<identity>/rank-0.jsonl      a line a problem: its number, its samples, and when

A line is written whole when the last sample of its problem has its verdict; one that was cut off does not count. While
a run trains, a thread beside it appends it (files/writer.py): no engine waits for a disk. The identity is that of
everything that a sample follows from: other weights, another file or another seed find nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3

from ..files.run_folder import rank_file
from ..files.writer import Writer
from .request import Asked
from .result import Sample


class Finished:
    """One rank's share of it."""

    def __init__(self, folder: Path, asked: Asked, numerics: Sequence[str], rank: int, writer: Writer) -> None:
        """`numerics`: the digest of the weights, and what else decides what these weights say."""
        whole = [asked.version, asked.seed, asked.file.digest, len(asked.problems), *numerics]
        self.folder = folder / "partial" / f"{asked.version}-{blake3(json.dumps(whole).encode()).hexdigest()[:16]}"
        self._path, self._writer = rank_file(self.folder, rank, "jsonl"), writer
        self._start = time.time()

    def read(self) -> tuple[dict[int, tuple[Sample, ...]], float]:
        """Returns the finished problems of all ranks, by number, and the seconds that they took."""
        problems: dict[int, tuple[Sample, ...]] = {}
        seconds: dict[float, float] = {}  # when a start began → how long it went on
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            for line in path.read_bytes().split(b"\n")[:-1]:
                try:
                    row = json.loads(line)
                except ValueError:  # a machine that lost power in the middle of it
                    continue
                problems[row["problem"]] = tuple(Sample(**sample) for sample in row["samples"])
                seconds[row["start"]] = max(seconds.get(row["start"], 0.0), row["seconds"])
        return problems, sum(seconds.values())

    def start(self, when: float) -> None:
        """Counts seconds from `when` on, the same on all ranks; ends a line that was cut off."""
        self._start = when
        # On every rank: a shared file system may go on saying to one that looked before that there is no such folder.
        self._writer.put(self.folder, functools.partial(self.folder.mkdir, parents=True, exist_ok=True))
        if self._path.exists() and not self._path.read_bytes().endswith(b"\n"):
            self._append(b"")

    def add(self, problem: int, samples: Sequence[Sample]) -> None:
        """Has a problem written down."""
        row: dict[str, Any] = {"problem": problem, "samples": [dataclasses.asdict(sample) for sample in samples]}
        row |= {"start": self._start, "seconds": time.time() - self._start}
        self._append(json.dumps(row).encode())

    def _append(self, line: bytes) -> None:
        self._writer.put(self._path, functools.partial(self._write, line))

    def _write(self, line: bytes) -> None:
        """Of the writer's thread alone."""
        with self._path.open("ab") as file:
            file.write(line + b"\n")

    def forget(self) -> None:
        """Removes what all ranks wrote, once the result is there."""
        for path in self.folder.glob("rank-*.jsonl"):
            path.unlink()
        self.folder.rmdir()
