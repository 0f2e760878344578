"""A closer look at chosen steps of a run, on rank 0: `telemetry.profile_steps`.

    torch     profile/step-00003.rank-0.trace.json       operations and phases over time, for chrome://tracing, Perfetto
    memory    profile/step-00003.rank-0.memory.pickle    what held the GPU's memory when, for pytorch.org/memory_viz
    nsys      nothing here: the steps are what `nsys profile --capture-range=cudaProfilerApi` records of a run that it
              starts

A profile slows its steps down, and changes nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ..config import TelemetryOptions
from ..files.replace import replacing
from ..files.run_folder import profile_file
from .clock import CLOCK

ENTRIES = 1_000_000  # of a memory's history, at most


class Profile:
    def __init__(self, folder: Path, options: TelemetryOptions, rank: int) -> None:
        self._folder, self._options, self._rank = folder, options, rank

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
        self._folder.mkdir(exist_ok=True)
        look = _trace if kind == "torch" else _history
        with replacing(profile_file(self._folder, step, self._rank, kind)) as partial, look(partial):
            yield


@contextlib.contextmanager
def _trace(path: Path) -> Iterator[None]:
    from torch.profiler import ProfilerActivity, profile, record_function, supported_activities

    plain, activities = CLOCK.mark, {ProfilerActivity.CPU, ProfilerActivity.CUDA} & supported_activities()
    with profile(activities=activities) as found:
        CLOCK.mark = record_function
        try:
            yield
        finally:
            CLOCK.mark = plain
    found.export_chrome_trace(str(path))


@contextlib.contextmanager
def _history(path: Path) -> Iterator[None]:
    import torch

    torch.cuda.memory._record_memory_history(max_entries=ENTRIES)
    try:
        yield
        torch.cuda.memory._dump_snapshot(str(path))
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
