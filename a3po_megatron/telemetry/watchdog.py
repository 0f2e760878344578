"""Ends a run that stands still, resumably, and says who stood still where.

A thread in every rank looks at this rank's clock. The limit follows from the phase: `telemetry.stall_factor` times the
longest silence that the phase has had so far in this run, at least `telemetry.stall_seconds`; a phase that was never
gone through has four times as long as that. A rank that waits for others is silent too, so being beyond the limit is
not enough: to blame are the ranks without a heartbeat or, if all have one, those that have gone through fewer changes
of phase than the others, once all of these are beyond their own limits.

    the first rank to notice   says in the store who is to blame, and where; writes it down in logs/stall, for launchers
    every rank                 hears it there, writes the stacks of its threads to logs/rank-N.stacks, and exits with 85

The heartbeat is a counter in the store (beats.py), which a thread of its own renews: it stops only with the whole
process. A rank has none if others see its counter stand still, look after look, or if it never came to the store; no
clock of a node counts. The store lives in rank 0, whose end ends all heartbeats: a rank that is silent beyond its limit
and whose store has not answered for as long as a heartbeat may be missed blames rank 0, writes that down, and ends by
itself, without asking anybody. A rank that cannot even run this thread (it is stopped, or holds the interpreter's lock)
is woken by the launcher with USR2, which writes the stacks without the interpreter.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import socket
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
from .beats import Beats, Store
from .catalogue import Phase
from .clock import Clock, place

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
        self._answered, self._unanswered = 0.0, 0  # when the store did last, and for how many looks it has not

    def start(self) -> None:
        """Once; later calls do nothing."""
        if self._stacks is not None:
            return
        self._stacks = rank_file(self._logs, self._rank, "stacks").open("a")
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)

    def meet(self, store: Store) -> None:
        """Watches from now on, with all ranks that have come to the store; `store`: over a connection of its own."""
        self.start()
        assert self._stacks is not None
        beats = self.beats_over(store)
        beats.start()
        threading.Thread(target=self._watch, args=(beats, self._stacks), name="watchdog", daemon=True).start()

    def beats_over(self, store: Store) -> Beats:
        node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        return Beats(self._logs, node, self._rank, self._world, store, self.period, self._clock, self.limit)

    def limit(self) -> float:
        """Seconds that the current phase may be silent."""
        least, known = self._options.stall_seconds, self._clock.longest_silence.get(self._clock.current)
        return UNKNOWN_PHASE * least if known is None else max(least, self._options.stall_factor * known)

    def _watch(self, beats: Beats, stacks: IO[str]) -> None:
        while (stall := beats.stall) is None:
            time.sleep(self.period)
            if message := self.look(beats):
                beats.announce(message)
                time.sleep(self.period)  # another one may have said it first: his words count
                stall = beats.stall or message  # nobody hears it where the store is gone
                self._write(stall)
                break
        assert stall is not None
        try:
            faulthandler.dump_traceback(file=stacks, all_threads=True)
            self._last_words("interrupted", stall)
            _say(stall)
            time.sleep(OTHERS * self.period)
        finally:
            os._exit(Interrupted.exit_code)

    def look(self, beats: Beats) -> str | None:
        """Once this rank has been silent beyond its limit: who it is that stands still.

        The others' heartbeats are looked at from a little before, so that it is known by then which of them stopped.
        """
        silence, limit = self._clock.silence(), self.limit()
        beats.wanted = silence > limit - (OTHERS + 1) * self.period  # it is heard a period later
        # Counted in looks, not in seconds: a process that was stopped for a while has missed its own answers.
        self._unanswered = self._unanswered + 1 if beats.answered == self._answered else 0
        self._answered = beats.answered
        if silence <= limit:
            return None
        if self._unanswered > OTHERS:
            gone = time.monotonic() - self._answered
            last = beats.seen.get(0, (None, 0))[0]
            where = place(-1, Phase.START_UP) if last is None else last.place
            return self._message(f"rank 0 ({where}; no heartbeat: its store has not answered for {gone:.0f} s)")
        return self._blame(beats) if beats.looks > OTHERS else None

    def _write(self, stall: str) -> None:
        """Whole at once: a launcher reads it at any time, and another rank may write it, too."""
        try:
            write_whole(self._logs / STALL, stall, by=f"rank-{self._rank}")
        except OSError as error:  # a full disk must not end what ends the run
            _say(f"watchdog: {error}")

    def _blame(self, beats: Beats) -> str | None:
        """Who stands still; None: whoever it is that the others wait for is still at work."""
        seen, looks = dict(beats.seen), beats.looks
        dead = [rank for rank, (_, new) in seen.items() if looks - new >= OTHERS]
        least = min(beat.changes for beat, _ in seen.values() if beat is not None)  # there is one: this rank's
        blamed = dead or [rank for rank, (beat, _) in seen.items() if beat is not None and beat.changes == least]
        facts, places = [], []
        for rank in blamed:
            beat = seen[rank][0]
            places.append(place(-1, Phase.START_UP) if beat is None else beat.place)
            if rank in dead:
                facts.append("no heartbeat")
            elif beat is None or beat.silence <= beat.limit:
                return None
            else:
                facts.append(f"no progress for {beat.silence:.0f} s, limit {beat.limit:.0f} s")
        if len(blamed) == self._world > 1:
            return self._message(f"all {self._world} ranks ({places[0]}; {facts[0]})")
        each = zip(blamed, places, facts, strict=True)
        return self._message(", ".join(f"rank {rank} ({where}; {fact})" for rank, where, fact in each))

    def _message(self, who: str) -> str:
        return (
            f"{who} stood still (telemetry.stall_seconds, telemetry.stall_factor). The stacks of all ranks are in "
            f"{self._logs}/rank-*.stacks; the same command continues the run"
        )


def stalled(logs: Path) -> str | None:
    """What ended a run that stood still; None if it did not, or that cannot be read just now.

    Opened, and its folder before it: a network file system asks its server then, and else may answer from memory.
    """
    try:
        os.close(os.open(logs, os.O_RDONLY | os.O_DIRECTORY))
        return (logs / STALL).read_text()
    except OSError:
        return None


def _say(words: str) -> None:
    with contextlib.suppress(OSError):  # the log's disk may be full
        print(words, file=sys.stderr, flush=True)
