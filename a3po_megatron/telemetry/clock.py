"""Which phase this process is in, how long each phase of a step took, and when it last got on.

One clock per process, like a logger: any room may mark its phase, or a `beat` within one. Every change wakes the thread
of the heartbeats (beats.py), which tells the others. It is also noted in memory that the launcher of this machine
holds, if there is one: that is no disk, which the main thread must not wait for, and it is true at once, so that the
launcher can say where a rank was in the moment in which it was killed:

    3 rollout
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from .catalogue import ELAPSED, IDLE, Phase

NOTE_BYTES = 64  # in the launcher's memory


class Clock:
    def __init__(self) -> None:
        self.step = -1
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.before: dict[str, float] = {}  # the seconds of the step before
        self.begun = time.perf_counter()  # when the step began
        self.idle = 0.0  # seconds of the step that this rank's engine had nothing to sample
        self.bytes: dict[str, int] = {}  # memory in use in each state of residency.py, at its end
        self.longest_silence: dict[str, float] = {}  # phase → seconds between two signs of life in it, so far
        self.changes = 0  # of phase, since the start: ranks that wait for another are ahead of it
        self.changed = threading.Event()  # for who tells it
        self._moved = time.monotonic()
        self._stack = [Phase.START_UP]
        self._note: int | None = None
        self.mark: Callable[[str], AbstractContextManager[Any]] = lambda name: contextlib.nullcontext()  # for a profile
        self.listener = lambda step, phase: None  # called at every change, for the progress line

    @property
    def current(self) -> Phase:
        return self._stack[-1]

    def attach(self, note: int) -> None:
        """Notes the current phase from now on in what this descriptor stands for: memory, no file on a disk."""
        self._note = note
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

    def spent(self) -> dict[str, float]:
        """Returns the seconds of each phase of the step so far, all of them and the idle ones. Its own checkpoint comes
        after its row is written: what counts for it is the one of the step before."""
        spent = {**self.seconds, ELAPSED: time.perf_counter() - self.begun, IDLE: self.idle}
        return spent | {str(Phase.CHECKPOINT): self.before.get(Phase.CHECKPOINT, 0.0)}

    def _announce(self) -> None:
        self.changes += 1
        self.changed.set()
        if self._note is not None:
            os.pwrite(self._note, f"{self.step} {self.current}".encode().ljust(NOTE_BYTES), 0)
        self.listener(self.step, self.current)


def noted(note: int) -> str:
    """Reads where a rank is, or was when it died, from what its clock noted."""
    step, _, phase = os.pread(note, NOTE_BYTES, 0).decode().strip().partition(" ")
    return place(int(step), phase) if phase else place(-1, Phase.START_UP)


def place(step: int, phase: str) -> str:
    """Says it in words: "phase rollout of step 3"; before the first step "phase engine"."""
    return f"phase {phase} of step {step}" if step >= 0 else f"phase {phase}"


CLOCK = Clock()
phase = CLOCK.phase
