"""Stopping a run before its end, so that it can be resumed: on USR1, TERM or Ctrl-C, or shortly before the time limit.

A signal only sets a flag, however often it comes. Ranks look at it where they can stop without losing finished work,
and stop together (`due` is one rank's opinion; ranks.agree decides):

    in a rollout        after any engine step; what was sampled is in the journal
    before an update    the scored batch is in the journal, the weights are still those of the step's beginning
    after a step        an update is never left half done

The time limit is that of `checkpoint.time_limit_seconds`, or of the Slurm job (SLURM_JOB_END_TIME). How long before it
a rank must stop follows from what the phases up to the next such place, and a save, took so far; TERM is a limit too.
What was measured stands in the run's folder, for its next start:

    lead_seconds    line 1: how long before a job's end its signal must come; line 2: seconds of each phase, JSON
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..errors import Interrupted
from ..files.replace import write_whole
from ..files.run_folder import RunFolder
from ..files.writer import Writer
from ..ranks.agree import first
from ..telemetry.catalogue import Phase

if TYPE_CHECKING:  # this module is imported before torch is
    from ..ranks.groups import Ranks

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
CAUTION = 1.5  # a phase may take longer than it ever did
MARGIN_SECONDS = 3.0  # agreeing, ending, and what no phase counts
REMEMBERED = 5
TERM_SECONDS = 30.0  # from TERM to KILL, if no more is promised: Slurm's KillWait


class Interrupt:
    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.signal: str | None = None  # the first one that came
        self.saves = 1  # that stopping takes: one more while one is being written
        self._now = now
        self._deadline, self._killed = math.inf, math.inf
        self._seconds: dict[str, deque[float]] = {}

    def install(self) -> None:
        """Catches the signals, and keeps them from whatever this process starts from now on. In the main thread, before
        there are others.

        srun and terminals signal every process of a job, also helpers that libraries start: vLLM inspects a model's
        class in one. A handler does not survive exec, a blocked mask does. So all threads block the signals, by
        inheritance, and one has nothing else to do than to wait for them. The price: a child of this process does not
        end on TERM, and who wants to end one must send KILL.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for number in SIGNALS:  # should a library unblock them in the main thread; and over an inherited SIG_IGN
            signal.signal(number, self._caught)
        threading.Thread(target=self._wait, name="signals", daemon=True).start()

    def _wait(self) -> None:
        while True:
            self._caught(signal.sigwait(SIGNALS), None)

    def _caught(self, number: int, _: object) -> None:
        self.signal = self.signal or signal.Signals(number).name
        if number == signal.SIGTERM:
            self._killed = min(self._killed, self._now() + TERM_SECONDS)

    def limit(self, seconds: float, elapsed: float) -> None:
        """Sets the deadline: `seconds` (0: no limit) after the start, `elapsed` ago, or the Slurm job's end."""
        ends = [self._now() + seconds - elapsed] if seconds else []
        if (job_end := os.environ.get("SLURM_JOB_END_TIME", "")).isdigit():
            ends.append(self._now() + int(job_end) - time.time())
        self._deadline = min(ends, default=math.inf)

    def observe(self, seconds: Mapping[str, float]) -> None:
        """Learns how long each phase of a step, or a save from its beginning until it was in place, took."""
        for phase, took in seconds.items():
            self._seconds.setdefault(phase, deque(maxlen=REMEMBERED)).append(took)

    def expected(self, *phases: str) -> float:
        """Seconds that the phases will take: the longest of the last few times; 0 for what was never measured."""
        return sum(max(self._seconds.get(phase, ()), default=0.0) for phase in phases)

    def lead(self, *ahead: str) -> float:
        """How long before a deadline a rank must stop if these phases lie ahead."""
        return CAUTION * self.expected(*ahead, *["save"] * self.saves) + MARGIN_SECONDS

    def due(self, *ahead: str) -> str | None:
        """Why to stop now rather than go through the phases `ahead`; None: nothing says so."""
        if self.signal is not None:
            return self.signal
        if self._now() + self.lead(*ahead) >= self._deadline:
            return "the time limit"
        return None

    def worth_finishing(self, phase: str, done: float, at_stake: float, *after: str) -> bool:
        """Whether the rest of a phase, `done` seconds into it, is shorter than what stopping would lose, `at_stake`
        seconds of it, and fits before the deadline with the phases `after` it."""
        left = self.expected(phase) - done
        fits = self._now() + CAUTION * left + self.lead(*after) < min(self._deadline, self._killed)
        return 0 < left <= at_stake and fits

    def save(self, folder: Path, writer: Writer) -> None:
        """Has written down what was measured, for the run's next start, and its next job's signal."""
        lead = max(self.lead(Phase.REWARD, Phase.SCORE), self.lead(Phase.UPDATE, Phase.PUBLISH))
        seconds = {phase: round(self.expected(phase), 3) for phase in self._seconds}
        path, text = RunFolder(folder).lead_seconds, f"{lead:.0f}\n{json.dumps(seconds)}\n"
        writer.put(path, lambda: write_whole(path, text))

    def recall(self, folder: Path) -> None:
        """What a start of before measured counts as seen once, if there is anything to be read."""
        try:
            seconds = json.loads(RunFolder(folder).lead_seconds.read_text().splitlines()[1])
            self.observe({phase: float(took) for phase, took in seconds.items()})
        except (OSError, ValueError, IndexError, AttributeError, TypeError):
            return  # nothing measured yet, or a file that was cut off: only times are lost


INTERRUPT = Interrupt()


class Stoppable(Protocol):
    """What `Stop.saving` saves: the checkpoints."""

    def stop(self, reason: Interrupted) -> None: ...

    def close(self) -> None: ...


class Stop:
    """When all ranks stop: any one's reason counts, and all hear of it at the same place."""

    def __init__(self, ranks: Ranks, interrupt: Interrupt) -> None:
        self.interrupt, self._ranks = interrupt, ranks

    def if_due(self, *ahead: str) -> None:
        """Raises Interrupted where it is time to stop rather than go through the phases `ahead`. Collective."""
        tag = f"stop before {' and '.join(ahead) or 'the start'}"
        if reason := self._ranks.agree(tag, self.interrupt.due(*ahead), first):
            raise Interrupted(reason)

    def while_starting(self, folder: Path) -> None:
        """The same between the parts of a start, each of which may take minutes of a signal's lead."""
        try:
            self.if_due()
        except Interrupted as reason:
            raise Interrupted(
                f"{folder}: interrupted by {reason} while it started; the same command starts it again"
            ) from reason

    @contextlib.contextmanager
    def saving(self, checkpoints: Stoppable) -> Iterator[None]:
        """Where an agreed stop ends up: what the weights in memory belong to is saved, and the run ends so."""
        try:
            yield
        except Interrupted as reason:
            checkpoints.stop(reason)
        checkpoints.close()
