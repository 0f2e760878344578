"""A closer look at chosen steps of a run, on rank 0: `telemetry.profile_steps`.

    torch     profile/step-00003.rank-0.trace.json       operations and phases over time, for chrome://tracing, Perfetto
    memory    profile/step-00003.rank-0.memory.pickle    what held the GPU's memory when, for pytorch.org/memory_viz
    nsys      nothing here: the steps are what `nsys profile --capture-range=cudaProfilerApi` records of a run that it
              starts

A profile slows its steps down, and changes nothing else. What it saw is written beside the run (files/writer.py).
"""

from __future__ import annotations

import contextlib
import functools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

from ..config import TelemetryOptions
from ..files.replace import replacing
from ..files.run_folder import profile_file
from ..files.writer import Writer
from .clock import CLOCK

ENTRIES = 1_000_000  # of a memory's history, at most


class Profile:
    def __init__(self, folder: Path, options: TelemetryOptions, rank: int, writer: Writer) -> None:
        self._folder, self._options, self._rank, self._writer = folder, options, rank, writer

    def of(self, steps: Iterator[int]) -> Iterator[int]:
        """Yields the steps, and watches those that are to be."""
        for step in steps:
            watched = self._rank == 0 and step in self._options.profile_steps
            with self._watch(step) if watched else contextlib.nullcontext():
                yield step

    @contextlib.contextmanager
    def _watch(self, step: int) -> Iterator[None]:
        kind = self._options.profile_kind
        if kind == "nsys":
            with _marks():
                yield
            return
        self._writer.drain()  # one look at a time: what the one before saw is on the disk
        with _trace() if kind == "torch" else _history() as save:
            yield
        path = profile_file(self._folder, step, self._rank, kind)
        self._writer.put(path, functools.partial(_write, path, save))


def _write(path: Path, save: Callable[[Path], None]) -> None:
    """Of the writer's thread alone."""
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as partial:
        save(partial)


@contextlib.contextmanager
def _trace() -> Iterator[Callable[[Path], None]]:
    """Gives what writes the trace, once it has ended."""
    from torch.profiler import ProfilerActivity, profile, record_function, supported_activities

    plain, activities = CLOCK.mark, {ProfilerActivity.CPU, ProfilerActivity.CUDA} & supported_activities()
    with profile(activities=activities) as found:
        CLOCK.mark = record_function
        try:
            yield lambda path: found.export_chrome_trace(str(path))
        finally:
            CLOCK.mark = plain


@contextlib.contextmanager
def _history() -> Iterator[Callable[[Path], None]]:
    """Gives what writes the snapshot, once it was taken."""
    import torch

    taken: list[object] = []

    def save(path: Path) -> None:
        with path.open("wb") as file:
            pickle.dump(taken[0], file)

    torch.cuda.memory._record_memory_history(max_entries=ENTRIES)
    try:
        yield save
        taken.append(torch.cuda.memory._snapshot())
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


@contextlib.contextmanager
def _marks() -> Iterator[None]:
    import torch

    torch.cuda.profiler.start()
    try:
        yield
    finally:
        torch.cuda.profiler.stop()
