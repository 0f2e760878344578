"""Which phase this process is in, how long each phase of a step took, and when it last got on.

One clock per process, like a logger: any room may mark its phase, or a `beat` within one. Every change is written to
`logs/rank-N.phase`, so that whoever finds this rank dead or stuck can say where it was:

    3 rollout
    changes 57                  of phase, since the start: ranks that wait for another are ahead of it
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from .catalogue import Phase


class Clock:
    def __init__(self) -> None:
        self.step = -1
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.before: dict[str, float] = {}  # the seconds of the step before
        self.begun = time.perf_counter()  # when the step began
        self.idle = 0.0  # seconds of the step that this rank's engine had nothing to sample
        self.bytes: dict[str, int] = {}  # memory in use in each state of residency.py, at its end
        self.longest_silence: dict[str, float] = {}  # phase → seconds between two signs of life in it, so far
        self.changes = 0
        self._moved = time.monotonic()
        self._stack = [Phase.START_UP]
        self._file: Path | None = None
        self.mark: Callable[[str], AbstractContextManager[Any]] = lambda name: contextlib.nullcontext()  # for a profile
        self.listener = lambda step, phase: None  # called at every change, for the progress line

    @property
    def current(self) -> Phase:
        return self._stack[-1]

    def attach(self, file: Path) -> None:
        """Writes the current phase to `file` from now on."""
        self._file = file
        self._announce()

    @contextlib.contextmanager
    def phase(self, name: Phase | str) -> Iterator[None]:
        """Marks the block as a phase; a phase inside another one counts for itself only. ValueError for no phase."""
        name = Phase(name)
        start, inside = time.perf_counter(), sum(self.seconds.values())
        self.beat()
        self._stack.append(name)
        self._announce()
        with self.mark(name):
            yield  # on an exception the phase stays announced: it is where the process died
        nested = sum(self.seconds.values()) - inside
        self.seconds[name] += time.perf_counter() - start - nested
        self.beat()
        self._stack.pop()
        self._announce()

    def beat(self) -> None:
        """A sign of life within a phase."""
        self.longest_silence[self.current] = max(self.silence(), self.longest_silence.get(self.current, 0.0))
        self._moved = time.monotonic()

    def silence(self) -> float:
        """Seconds since the last sign of life."""
        return time.monotonic() - self._moved

    def begin(self, step: int) -> None:
        """A new step: its seconds start at 0."""
        self.step, self.begun = step, time.perf_counter()
        self.beat()
        self._stack[0] = Phase.BETWEEN
        self.before = dict(self.seconds)
        self.seconds.clear()
        self.idle = 0.0
        self._announce()

    def _announce(self) -> None:
        self.changes += 1
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk: who writes what counts says so, and where
                self._file.write_text(f"{self.step} {self.current}\nchanges {self.changes}\n")
        self.listener(self.step, self.current)


CLOCK = Clock()
phase = CLOCK.phase
