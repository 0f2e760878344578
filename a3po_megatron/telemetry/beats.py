"""The heartbeats of all ranks: in torch's store, and of every node in one file for who looks on from outside.

    rank 3 beat 17, silent 1.5 s of 300.0 s, 57 changes, phase rollout of step 3

is what a rank says of itself: a counter; how long ago its last sign of life was, and how long that may be; how many
changes of phase it has gone through, and where it is. It says so every `period`, and when its phase changes: a rank
that is killed leaves the phase that it died in. Of each node the rank that came to the store first writes what those of
its node say into logs/node-NAME.beat, every `period`, in a thread of its own: a disk that hangs stops no heartbeat.

A thread that waits in torch's store blocks all others on the same connection: each rank has one more, for this thread
alone. The store lives in rank 0: where it does not answer any more, `answered` stands still.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..files.replace import write_whole
from ..files.run_folder import beat_file, beat_files
from .clock import Clock, place

SHORTEST = 0.1  # seconds between two beats: some phases are shorter
_LINE = re.compile(r"rank (\d+) beat (\d+), silent (\S+) s of (\S+) s, (\d+) changes, (phase .+)", re.ASCII)


class Store(Protocol):
    """What is used of torch's stores."""

    def set(self, key: str, value: str, /) -> Any: ...
    def add(self, key: str, value: int, /) -> int: ...
    def append(self, key: str, value: str, /) -> Any: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    rank: int
    count: int
    silence: float  # seconds
    limit: float  # seconds
    changes: int  # of phase, since the start: ranks that wait for another are ahead of it
    place: str  # "phase rollout of step 3"

    def line(self) -> str:
        return (
            f"rank {self.rank} beat {self.count}, silent {self.silence:.1f} s of {self.limit:.1f} s, "
            f"{self.changes} changes, {self.place}"
        )

    @classmethod
    def of(cls, line: str) -> Beat | None:
        """None: the line is no beat."""
        if (match := _LINE.fullmatch(line)) is None:
            return None
        rank, count, silence, limit, changes, where = match.groups()
        return cls(int(rank), int(count), float(silence), float(limit), int(changes), where)


def read_beats(logs: Path) -> dict[int, tuple[Beat, Path]]:
    """Reads what the ranks of a run said last, and in which file, by rank; of those that have said anything."""
    found: dict[int, tuple[Beat, Path]] = {}
    for path in beat_files(logs):
        with contextlib.suppress(OSError):  # of a start that is just being cleared away
            for line in path.read_text().splitlines():
                if (beat := Beat.of(line)) is not None:
                    found[beat.rank] = beat, path
    return dict(sorted(found.items()))


class Beats:
    """One rank's part in it: `start` the thread, or go through its rounds by oneself."""

    def __init__(
        self,
        logs: Path,
        node: str,
        rank: int,
        world: int,
        store: Store,  # over a connection of its own
        period: float,  # seconds
        clock: Clock,
        limit: Callable[[], float],  # seconds that the rank may be silent now
    ) -> None:
        self._logs, self._node, self._rank, self._world = logs, node, rank, world
        self._store, self._period, self._clock, self._limit = store, period, clock, limit
        self._count = 0
        self._leads: bool | None = None  # its node
        self._looked = -float("inf")  # when the others were looked at
        self._lines: list[bytes] = []  # of its node's file
        self._said = ""
        self.answered = time.monotonic()  # when the store did last
        self._to_announce: str | None = None
        self.stall: str | None = None  # why all ranks are to end
        self.wanted = False  # whether the others' beats are looked at
        self.looks = 0
        self.seen: dict[int, tuple[Beat | None, int]] = {}  # rank → its beat, and in which look it was new

    def start(self) -> None:
        threading.Thread(target=self._run, name="beats", daemon=True).start()

    def announce(self, stall: str) -> None:
        """Has all ranks told why they end; of several words the first ones count."""
        self._to_announce = stall
        self._clock.changed.set()

    def _run(self) -> None:
        while True:
            led = self._leads
            try:
                self.round()
            except Exception as error:  # whatever a store raises that is gone: who waits for its answers notices
                self._tell(error)
                time.sleep(self._period)
            if self._leads and not led:
                threading.Thread(target=self._keep_file, name="beats of the node", daemon=True).start()
            self._clock.changed.wait(self._period)
            time.sleep(SHORTEST)
            self._clock.changed.clear()

    def round(self) -> None:
        """Says what this rank has to say, and hears what it is to hear."""
        self._count += 1
        now, clock = time.monotonic(), self._clock
        beat = Beat(
            self._rank, self._count, clock.silence(), self._limit(), clock.changes, place(clock.step, clock.current)
        )
        self._store.set(f"{self._rank}", beat.line())
        if self._leads is None:
            self._leads = self._store.add(f"node/{self._node}", 1) == 1
            self._store.append(f"ranks/{self._node}", f"{self._rank} ")
        if self._to_announce is not None:
            self.stall = self._store.compare_set("stall", "", self._to_announce).decode()
        elif self._store.check(["stall"]):
            self.stall = self._store.get("stall").decode()
        if self.wanted and now >= self._looked + self._period:
            self._looked = now
            self._look()
        elif not self.wanted:
            self.looks = 0
            self.seen.clear()
        if self._leads:
            mine = self._store.get(f"ranks/{self._node}").decode().split()
            self._lines = sorted(self._store.multi_get(mine), key=lambda line: int(line.split()[1]))
        self.answered = time.monotonic()

    def _keep_file(self) -> None:
        while True:
            try:
                self.write()
            except OSError as error:  # a full disk must not end what may be what ends the run
                self._tell(error)
            time.sleep(self._period)

    def write(self) -> None:
        """Writes the node's file, where this rank leads it."""
        if self._lines:
            write_whole(beat_file(self._logs, self._node), b"".join(line + b"\n" for line in self._lines))

    def _tell(self, error: Exception) -> None:
        """Once for each error: they come again and again."""
        if (words := f"heartbeat: {type(error).__name__}: {error}") != self._said:
            self._said = words
            print(words, flush=True)

    def _look(self) -> None:
        """At every rank's beat: only a rank that is silent itself does, since there may be many."""
        known = [rank for rank, (beat, _) in self.seen.items() if beat is not None]
        if not self._store.check([f"{rank}" for rank in range(self._world)]):
            asked = (rank for rank in range(self._world) if rank not in set(known))
            there = sorted([*known, *(rank for rank in asked if self._store.check([f"{rank}"]))])
        else:
            there = list(range(self._world))
        lines = dict(zip(there, self._store.multi_get([f"{rank}" for rank in there]), strict=True))
        self.looks += 1
        for rank in range(self._world):
            beat = Beat.of(lines[rank].decode()) if rank in lines else None
            if rank not in self.seen or self.seen[rank][0] != beat:
                self.seen[rank] = beat, self.looks
