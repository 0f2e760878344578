"""Ends a run that stands still, resumably, and says who stood still where.

A thread in every rank looks at this rank's clock. The limit follows from the phase: `telemetry.stall_factor` times the
longest silence that the phase has had so far in this run, at least `telemetry.stall_seconds`; a phase that was never
gone through has four times as long as that. Beyond it

    the first rank to notice   writes logs/stall: which ranks have no heartbeat or, if all have, are behind the others
    every rank                 sees that file, writes the stacks of its threads to logs/rank-N.stacks, and exits with 85

The heartbeat is the time of logs/rank-N.phase, which the thread renews: it stops only with the whole process. Ranks
find each other through files, because a thread that waits in torch's store blocks it for all others. A rank that cannot
even run this thread (it is stopped, or holds the interpreter's lock) is woken by the launcher with USR2, which writes
the stacks without the interpreter.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from ..config import TelemetryOptions
from ..errors import Interrupted
from .clock import Clock

STALL = "stall"
UNKNOWN_PHASE = 4  # times the least limit
OTHERS = 3.0  # periods that the others get to notice, and to write their stacks


class Watchdog:
    """Watches one rank: `start` it once, in the rank's main thread."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        world: int,
        options: TelemetryOptions,
        clock: Clock,
        last_words: Callable[[str, str], None],  # kind, message: to the launcher
    ) -> None:
        self._logs, self._rank, self._world, self._options, self._clock = folder / "logs", rank, world, options, clock
        self._last_words = last_words
        self.period = min(5.0, options.stall_seconds / 8)
        self._stacks: IO[str]

    def start(self) -> None:
        self._stacks = (self._logs / f"rank-{self._rank}.stacks").open("w")
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def limit(self) -> float:
        """Seconds that the current phase may be silent."""
        least, known = self._options.stall_seconds, self._clock.longest_silence.get(self._clock.current)
        return UNKNOWN_PHASE * least if known is None else max(least, self._options.stall_factor * known)

    def _watch(self) -> None:
        while not (self._logs / STALL).exists():
            time.sleep(self.period)
            os.utime(self._logs / f"rank-{self._rank}.phase")
            if self._clock.silence() > self.limit():
                self._declare()
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        self._stacks.flush()
        try:
            message = (self._logs / STALL).read_text()
        except OSError as error:
            message = f"a rank stands still, and {self._logs / STALL} cannot be read: {error.strerror}"
        self._last_words("interrupted", message)
        print(message, file=sys.stderr, flush=True)
        time.sleep(OTHERS * self.period)
        os._exit(Interrupted.exit_code)

    def _declare(self) -> None:
        """Writes which ranks all others wait for. Two that notice at once say the same."""
        silence, limit = self._clock.silence(), self.limit()
        where = {rank: position(self._logs, rank) for rank in range(self._world)}
        least = min(changes for changes, _ in where.values())
        dead = self._without_heartbeat()
        behind = [
            f"rank {rank} ({place}{', no heartbeat' if rank in dead else ''})"
            for rank, (changes, place) in where.items()
            if rank in dead or (not dead and changes == least)
        ]
        who = f"all {self._world} ranks ({where[self._rank][1]})" if len(behind) == self._world else ", ".join(behind)
        message = (
            f"{who} stood still: no progress for {silence:.0f} s, the limit of that phase is {limit:.0f} s "
            f"(telemetry.stall_factor, telemetry.stall_seconds). The stacks are in {self._logs}/rank-*.stacks; the "
            "same command continues the run"
        )
        temporary = self._logs / f"{STALL}.{self._rank}.partial"
        temporary.write_text(message)
        temporary.replace(self._logs / STALL)  # whole at once

    def _without_heartbeat(self) -> list[int]:
        """Ranks whose last one is older than the newest of all by more than they may be apart."""
        files = {rank: self._logs / f"rank-{rank}.phase" for rank in range(self._world)}
        beats = {rank: file.stat().st_mtime for rank, file in files.items() if file.exists()}
        return [rank for rank, beat in beats.items() if max(beats.values()) - beat > OTHERS * self.period]


def position(logs: Path, rank: int) -> tuple[int, str]:
    """How many changes of phase a rank has gone through, and where it is: "phase rollout of step 3"."""
    try:
        first, _, rest = (logs / f"rank-{rank}.phase").read_text().partition("\n")
        step, _, phase = first.partition(" ")
        changes = int(rest.split()[1])
    except (OSError, IndexError, ValueError):
        return 0, "phase start-up"
    return changes, f"phase {phase} of step {step}" if step != "-1" else f"phase {phase}"
