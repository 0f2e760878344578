"""Leaving a run before its end and coming back: on USR1, TERM or Ctrl-C, or shortly before the time limit.

A signal only sets a flag, however often it comes. Ranks look at it where they can leave without losing finished work,
and leave together (`due` is one rank's opinion; cluster.agree decides):

    in a rollout        after any engine step; what was sampled is in the journal
    before an update    the scored batch is in the journal, the weights are still those of the step's beginning
    after a step        an update is never left half done

The time limit is that of `checkpoint.time_limit_seconds`, or of the Slurm job (SLURM_JOB_END_TIME). How long before it
a rank must leave follows from what the phases up to the next such place, and a save, took so far.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
CAUTION = 1.5  # a phase may take longer than it ever did
MARGIN_SECONDS = 3.0  # agreeing, ending, and what no phase counts
REMEMBERED = 5
LEAD = "lead_seconds"  # file in a run folder: what the run measured, for the next job's signal


class Interrupt:
    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.signal: str | None = None  # the first one that came
        self._now = now
        self._deadline: float | None = None
        self._seconds: dict[str, deque[float]] = {}

    def install(self) -> None:
        """Catches the signals, in the main thread."""
        for number in SIGNALS:
            signal.signal(number, self._caught)

    def _caught(self, number: int, _: object) -> None:
        self.signal = self.signal or signal.Signals(number).name

    def limit(self, seconds: float | None, elapsed: float) -> None:
        """Sets the deadline: `seconds` after the run's start, which is `elapsed` ago, or the Slurm job's end."""
        ends = [] if seconds is None else [self._now() + seconds - elapsed]
        if (job_end := os.environ.get("SLURM_JOB_END_TIME", "")).isdigit():
            ends.append(self._now() + int(job_end) - time.time())
        self._deadline = min(ends, default=None)

    def observe(self, seconds: Mapping[str, float]) -> None:
        """Learns how long each phase of a step, or a save from its beginning until it was in place, took."""
        for phase, took in seconds.items():
            self._seconds.setdefault(phase, deque(maxlen=REMEMBERED)).append(took)

    def expected(self, *phases: str) -> float:
        """Seconds that the phases will take: the longest of the last few times; 0 for what was never measured."""
        return sum(max(self._seconds.get(phase, ()), default=0.0) for phase in phases)

    def lead(self, *ahead: str) -> float:
        """How long before a deadline a rank must leave if these phases lie ahead."""
        return CAUTION * self.expected(*ahead, "save") + MARGIN_SECONDS

    def due(self, *ahead: str) -> str | None:
        """Why to leave now rather than go through the phases `ahead`; None: go on."""
        if self.signal is not None:
            return self.signal
        if self._deadline is not None and self._now() + self.lead(*ahead) >= self._deadline:
            return "the time limit"
        return None

    def worth_finishing(self, phase: str, elapsed: float) -> bool:
        """Whether the rest of a phase is shorter than what leaving it would lose, and fits before the deadline."""
        expected = self.expected(phase)
        left = expected - elapsed
        fits = self._deadline is None or self._now() + CAUTION * (left + self.expected("save")) < self._deadline
        return 0 < left <= elapsed and fits


INTERRUPT = Interrupt()
