"""Ends a run that stands still, resumably, and says who stood still where.

A thread in every rank looks at this rank's clock. The limit follows from the phase: `telemetry.stall_factor` times the
longest silence that the phase has had so far in this run, at least `telemetry.stall_seconds`; a phase that was never
gone through has four times as long as that. A rank that waits for others is silent too, so being beyond the limit is
not enough: to blame are the ranks without a heartbeat or, if all have one, those that have gone through fewer changes
of phase than the others, once all of these are beyond their own limits.

    the first rank to notice   writes logs/stall: the ranks to blame, and the phase of each
    every rank                 sees that file, writes the stacks of its threads to logs/rank-N.stacks, and exits with 85

The heartbeat is logs/rank-N.beat, which the thread renews: it stops only with the whole process. Ranks find each other
through files, because a thread that waits in torch's store blocks it for all others. A rank that cannot even run this
thread (it is stopped, or holds the interpreter's lock) is woken by the launcher with USR2, which writes the stacks
without the interpreter.
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
        self._stacks = (self._logs / f"rank-{self._rank}.stacks").open("a")
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def limit(self) -> float:
        """Seconds that the current phase may be silent."""
        least, known = self._options.stall_seconds, self._clock.longest_silence.get(self._clock.current)
        return UNKNOWN_PHASE * least if known is None else max(least, self._options.stall_factor * known)

    def _watch(self) -> None:
        while not (self._logs / STALL).exists():
            time.sleep(self.period)
            try:
                self._beat()
                if self._clock.silence() > self.limit() and (message := self._blame()):
                    _replace(self._logs / STALL, message)
            except OSError as error:  # a full disk must not end the watch, which may be what ends the run
                print(f"watchdog: {error}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        message = (self._logs / STALL).read_text()
        self._last_words("interrupted", message)
        print(message, file=sys.stderr, flush=True)
        time.sleep(OTHERS * self.period)
        os._exit(Interrupted.exit_code)

    def _beat(self) -> None:
        silence, limit = self._clock.silence(), self.limit()
        _replace(self._logs / f"rank-{self._rank}.beat", f"silent {silence:.1f} s of {limit:.1f} s\n")

    def _blame(self) -> str | None:
        """Who stands still; None: whoever it is that the others wait for is still at work."""
        where = {rank: position(self._logs, rank) for rank in range(self._world)}
        files = {rank: self._logs / f"rank-{rank}.beat" for rank in range(self._world)}
        beats = {rank: _renewed(file) for rank, file in files.items() if file.exists()}
        dead = [rank for rank, beat in beats.items() if max(beats.values()) - beat > OTHERS * self.period]
        least = min(changes for changes, _ in where.values())
        blamed = dead or [rank for rank, (changes, _) in where.items() if changes == least]
        facts = []
        for rank in blamed:
            words = files[rank].read_text().split() if rank in beats else ["silent", "0", "s", "of", "0", "s"]
            silence, limit = float(words[1]), float(words[4])
            if rank not in dead and silence <= limit:
                return None
            facts.append("no heartbeat" if rank in dead else f"no progress for {silence:.0f} s, limit {limit:.0f} s")
        if len(blamed) == self._world > 1:
            who = f"all {self._world} ranks ({where[0][1]}; {facts[0]})"
        else:
            who = ", ".join(f"rank {rank} ({where[rank][1]}; {fact})" for rank, fact in zip(blamed, facts, strict=True))
        return (
            f"{who} stood still (telemetry.stall_seconds, telemetry.stall_factor). The stacks of all ranks are in "
            f"{self._logs}/rank-*.stacks; the same command continues the run"
        )


def _renewed(path: Path) -> float:
    """When a file was last written. Opened, because a network file system asks its server then, not for a `stat`."""
    with path.open() as file:
        return os.fstat(file.fileno()).st_mtime


def _replace(path: Path, text: str) -> None:
    """Whole at once: others read it at any time."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    temporary.write_text(text)
    temporary.replace(path)


def position(logs: Path, rank: int) -> tuple[int, str]:
    """How many changes of phase a rank has gone through, and where it is: "phase rollout of step 3"."""
    try:
        first, _, rest = (logs / f"rank-{rank}.phase").read_text().partition("\n")
        step, _, phase = first.partition(" ")
        changes = int(rest.split()[1])
    except (OSError, IndexError, ValueError):
        return 0, "phase start-up"
    return changes, f"phase {phase} of step {step}" if step != "-1" else f"phase {phase}"
