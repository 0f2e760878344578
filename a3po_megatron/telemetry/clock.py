"""Which phase this process is in, and how long each phase of a step took.

One clock per process, like a logger: any room may mark its phase. Every change is written to `logs/rank-N.phase`
(step and phase), so that whoever finds this rank dead or stuck can say where it was.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path


class Clock:
    def __init__(self) -> None:
        self.step = -1
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._stack = ["start-up"]
        self._file: Path | None = None
        self.listener = lambda step, phase: None  # called at every change, for the progress line

    def attach(self, file: Path) -> None:
        """Writes the current phase to `file` from now on."""
        self._file = file
        self._announce()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Marks the block as phase `name`; a phase inside another one counts for itself only."""
        start, inside = time.perf_counter(), sum(self.seconds.values())
        self._stack.append(name)
        self._announce()
        yield  # on an exception the phase stays announced: it is where the process died
        nested = sum(self.seconds.values()) - inside
        self.seconds[name] += time.perf_counter() - start - nested
        self._stack.pop()
        self._announce()

    def begin(self, step: int) -> None:
        """A new step: its seconds start at 0."""
        self.step = step
        self._stack[0] = "between phases"
        self.seconds.clear()
        self._announce()

    def _announce(self) -> None:
        if self._file is not None:
            self._file.write_text(f"{self.step} {self._stack[-1]}")
        self.listener(self.step, self._stack[-1])


CLOCK = Clock()
phase = CLOCK.phase
