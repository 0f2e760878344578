"""Ends a run that stands still, resumably, and says who stood still where.

A thread in every rank looks at this rank's clock. The limit follows from the phase: `telemetry.stall_factor` times the
longest silence that the phase has had so far in this run, at least `telemetry.stall_seconds`; a phase that was never
gone through has four times as long as that. A rank that waits for others is silent too, so being beyond the limit is
not enough: to blame are the ranks without a heartbeat or, if all have one, those that have gone through fewer changes
of phase than the others, once all of these are beyond their own limits.

    the first rank to notice   writes logs/stall: the ranks to blame, and the phase of each
    every rank                 sees that file, writes the stacks of its threads to logs/rank-N.stacks, and exits with 85

The heartbeat is logs/rank-N.beat, a counter which the thread renews: it stops only with the whole process. A rank has
none if others see its counter stand still, look after look; what time a file bears says nothing, because nodes' clocks
differ. Ranks find each other through files, because a thread that waits in torch's store blocks it for all others. A
rank that cannot even run this thread (it is stopped, or holds the interpreter's lock) is woken by the launcher with
USR2, which writes the stacks without the interpreter.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from ..config import TelemetryOptions
from ..errors import Interrupted
from ..files.replace import write_whole
from ..files.run_folder import STALL, RunFolder, rank_file
from .clock import Clock

UNKNOWN_PHASE = 4  # times the least limit
OTHERS = 3  # periods that the others get to notice, and to write their stacks; heartbeats that may be missed
NAMED = re.compile(r"rank (\d+) \(")  # in what logs/stall says


class Watchdog:
    """Watches one rank: `start` it in the rank's main thread."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        world: int,
        options: TelemetryOptions,
        clock: Clock,
        last_words: Callable[[str, str], object],  # kind, message: to the launcher
    ) -> None:
        self._logs, self._rank, self._world = RunFolder(folder).logs, rank, world
        self._options, self._clock = options, clock
        self._last_words = last_words
        self.period = min(5.0, options.stall_seconds / 8)
        self._stacks: IO[str] | None = None
        self._left: tuple[int, int] | None = None  # the stall file that was there before
        self._count = 0  # heartbeats
        self._looks = 0
        self._seen: dict[int, tuple[str | None, int]] = {}  # rank → its heartbeat, and in which look it was new

    def start(self) -> None:
        """Once; later calls do nothing."""
        if self._stacks is not None:
            return
        self._stacks = rank_file(self._logs, self._rank, "stacks").open("a")
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        # Whoever makes the folder ready moves an earlier start's away; another node may see it for a while yet.
        if (stall := _stall(self._logs)) is not None:
            self._left = stall[1]
        threading.Thread(target=self._watch, args=(self._stacks,), name="watchdog", daemon=True).start()

    def limit(self) -> float:
        """Seconds that the current phase may be silent."""
        least, known = self._options.stall_seconds, self._clock.longest_silence.get(self._clock.current)
        return UNKNOWN_PHASE * least if known is None else max(least, self._options.stall_factor * known)

    def _watch(self, stacks: IO[str]) -> None:
        while (stall := _stall(self._logs)) is None or stall[1] == self._left:
            time.sleep(self.period)
            try:
                if message := self.look():
                    self._write(self._logs / STALL, message)
            except OSError as error:  # a full disk must not end the watch, which may be what ends the run
                _say(f"watchdog: {error}")
        try:
            faulthandler.dump_traceback(file=stacks, all_threads=True)
            self._last_words("interrupted", stall[0])
            _say(stall[0])
            time.sleep(OTHERS * self.period)
        finally:
            os._exit(Interrupted.exit_code)

    def look(self) -> str | None:
        """Renews this rank's heartbeat. Once this rank has been silent beyond its limit: who it is that stands still.

        It begins to look at the others' heartbeats a little before, so that it knows by then which of them stopped.
        """
        silence, limit = self._clock.silence(), self.limit()
        self._count += 1
        beat = rank_file(self._logs, self._rank, "beat")
        self._write(beat, f"silent {silence:.1f} s of {limit:.1f} s, beat {self._count}\n")
        if silence <= limit - OTHERS * self.period:
            self._looks = 0
            self._seen.clear()
            return None
        self._looks += 1
        for rank in range(self._world):
            words = _text(rank_file(self._logs, rank, "beat"))
            if rank not in self._seen or self._seen[rank][0] != words:
                self._seen[rank] = words, self._looks
        return self._blame() if silence > limit and self._looks > OTHERS else None

    def _write(self, path: Path, text: str) -> None:
        """Whole at once: others read it at any time, or write it too."""
        write_whole(path, text, by=f"rank-{self._rank}")

    def _blame(self) -> str | None:
        """Who stands still; None: whoever it is that the others wait for is still at work, or only just starting."""
        where = {rank: position(self._logs, rank) for rank in range(self._world)}
        beats = {rank: beat for rank, (beat, _) in self._seen.items() if beat is not None}
        dead = [rank for rank in beats if self._looks - self._seen[rank][1] >= OTHERS]
        least = min(changes for changes, _ in where.values())
        blamed = dead or [rank for rank, (changes, _) in where.items() if changes == least]
        facts = []
        for rank in blamed:
            words = beats.get(rank, "silent 0 s of 0 s").split()
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


def stalled(logs: Path) -> str | None:
    """What ended a run that stood still; None if it did not."""
    return None if (stall := _stall(logs)) is None else stall[0]


def _stall(logs: Path) -> tuple[str, tuple[int, int]] | None:
    """What the stall file says, and which file that is; None: there is none, or it cannot be read just now.

    Opened, and its folder before it: a network file system asks its server then, and else may answer from memory.
    """
    try:
        os.close(os.open(logs, os.O_RDONLY | os.O_DIRECTORY))
        with (logs / STALL).open() as file:
            facts = os.fstat(file.fileno())
            return file.read(), (facts.st_ino, facts.st_mtime_ns)
    except OSError:
        return None


def _text(path: Path) -> str | None:
    """What a file holds now; None if there is none."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def _say(words: str) -> None:
    with contextlib.suppress(OSError):  # the log's disk may be full
        print(words, file=sys.stderr, flush=True)


def position(logs: Path, rank: int) -> tuple[int, str]:
    """How many changes of phase a rank has gone through, and where it is: "phase rollout of step 3"."""
    try:
        first, _, rest = rank_file(logs, rank, "phase").read_text().partition("\n")
        step, _, phase = first.partition(" ")
        changes = int(rest.split()[1])
    except (OSError, IndexError, ValueError):
        return 0, "phase start-up"
    return changes, f"phase {phase} of step {step}" if step != "-1" else f"phase {phase}"
