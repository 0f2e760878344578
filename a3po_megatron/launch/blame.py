"""Which rank's death decides how a run ends, and with which exit code: for ranks of this machine and of a Slurm job.

What a rank says of itself is never a consequence of another one's death: a wrong request, a failed run, an order to
leave. That it crashed may be one, since what it waits for fails as soon as the other is gone, and so may be that it was
killed, since srun kills the rest after a first death. Of several seen dead at once, one that only missed another
(LOST) is blamed last. The table is in docs/resume.md.

`Here` and `InJob` turn what is seen of a start's end (exit codes and pipes; srun's lines and files) into deaths;
`failure` turns deaths into the run's error.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from ..errors import A3POError, Interrupted, RequestError, RunFailed
from ..files.run_folder import rank_file
from ..run.stop import SIGNALS
from ..telemetry.watchdog import NAMED, stalled

Kind = Literal["request", "run", "interrupted", "crash", "killed"]
Words = tuple[Kind, str]  # of a rank: kind and message of what it failed of
ERRORS: dict[str, type[A3POError]] = {"request": RequestError, "run": RunFailed, "interrupted": Interrupted}
# srun: error: rl1: task 1: Killed; srun: error: rl0: tasks 0,2-3: Exited with exit code 1
ENDED = re.compile(r"^srun: error: (\S+): tasks? ([\d,-]+): (.*?)\s*$", re.MULTILINE)
EXITED = re.compile(r"Exited with exit code (\d+)")
# What a rank says that lost another: gloo's pairs and torch's store (strings of libtorch_cpu 2.13.0), the system's own
# words for a socket, NCCL (torch/csrc/distributed/c10d/NCCLUtils.cpp).
LOST = re.compile(
    r"connection (was likely )?closed|connection (reset|refused|aborted)|broken pipe|pair closure|ncclRemoteError",
    re.IGNORECASE,
)
SAID_CHARACTERS = 1000  # of srun's, in a message


@dataclass(frozen=True)
class Death:
    rank: int
    kind: Kind
    message: str  # what it said, or what was seen of it
    first: bool = False  # of those that were among the first to be gone
    where: str = ""  # its phase, its node


def blamed(deaths: Iterable[Death]) -> Death:
    """The one that decides; `deaths` is not empty."""
    return min(deaths, key=lambda death: (_severity(death), not death.first, death.rank))


def _severity(death: Death) -> int:
    if death.kind in ERRORS:
        return tuple(ERRORS).index(death.kind)
    if not death.first:
        return 5
    return 4 if death.kind == "crash" and LOST.search(death.message) else 3


class Ended(Protocol):
    """How a start ended."""

    def deaths(self, logs: Path) -> list[Death]: ...

    def unexplained(self, folder: Path, told: bool) -> A3POError:
        """What it is where nobody died that could be blamed; `told`: the launcher had been told to stop."""


def failure(ended: Ended, folder: Path, told: bool) -> A3POError:
    """What the run in `folder` ends with. A stall comes before all else: what ranks die of after it is that the first
    of them has left."""
    if (message := stalled(folder / "logs")) is not None:
        return Interrupted(message)
    deaths = ended.deaths(folder / "logs")
    if not deaths:
        return ended.unexplained(folder, told)
    death = blamed(deaths)
    place = f"rank {death.rank}" + (f" ({death.where})" if death.where else "")
    if death.kind == "run":
        return RunFailed(f"{place}: {death.message}")
    if death.kind in ERRORS:
        return ERRORS[death.kind](death.message)
    return RunFailed(f"{place} {death.message}")


def words_of(line: str | bytes) -> Words:
    """What a rank handed over (environment.last_words)."""
    words = json.loads(line)
    return words["kind"], words["message"]


def killed_by(number: int, first: bool) -> Kind:
    """The kind of a death by a signal: one that is meant for the run may come before a rank can hear it. Not of a later
    one, since srun ends the rest with TERM."""
    return "interrupted" if first and number in SIGNALS else "killed"


def silent(code: int) -> Words:
    """Kind and message of a rank that ended by itself and left no words, as it does where a disk is full."""
    if code == Interrupted.exit_code:
        return "interrupted", "interrupted; the same command goes on"
    return "crash", "it left no message"


class Rank(Protocol):
    """A process of this machine."""

    @property
    def code(self) -> int | None: ...

    def last_words(self) -> Words | None: ...


@dataclass(frozen=True)
class Here:
    """A start on this machine."""

    ranks: Sequence[Rank]
    first: set[int]  # of them, those that were dead when the first death was seen
    where: Mapping[int, str]  # rank → its phase at that time

    def deaths(self, logs: Path) -> list[Death]:
        return [self._death(rank, each, code, logs) for rank, each in enumerate(self.ranks) if (code := each.code)]

    def _death(self, rank: int, each: Rank, code: int, logs: Path) -> Death:
        first, where, log = rank in self.first, self.where[rank], rank_file(logs, rank, "log")
        if code < 0:
            number = signal.Signals(-code)
            return Death(rank, killed_by(number, first), f"was killed by {number.name}; its log: {log}", first, where)
        kind, message = each.last_words() or silent(code)
        return Death(rank, kind, f"failed: {message}; its log: {log}" if kind == "crash" else message, first, where)

    def unexplained(self, folder: Path, told: bool) -> A3POError:
        return RunFailed(f"{folder}: no rank is left, and none has failed")


@dataclass(frozen=True)
class InJob:
    """A start by one srun."""

    code: int
    words: Mapping[int, Words]  # by rank
    bad_node: str | None  # the first whose task failed
    said: str = ""  # by srun

    def deaths(self, logs: Path) -> list[Death]:
        return deaths_in_job(self.words, self.said)

    def unexplained(self, folder: Path, told: bool) -> A3POError:
        if self.code == Interrupted.exit_code or (told and self.bad_node is None):
            # No rank could write why, or srun was told to leave before it had started any.
            return Interrupted(f"{folder}: interrupted; the same command goes on")
        where = f" on {self.bad_node}" if self.bad_node else ""
        said = "; ".join(line for line in self.said.splitlines() if line.strip())[-SAID_CHARACTERS:]
        return RunFailed(
            f"{folder}: a rank{where} failed and left no message; srun ended with {self.code} and said: "
            f"{said or 'nothing'}; see logs/attempt-*"
        )

    def bad_nodes(self, folder: Path, nodes: Sequence[str], ranks_per_node: int) -> set[str]:
        """The nodes, of `nodes`, that the next start should do without."""
        if (message := stalled(folder / "logs")) is not None:  # ranks on other nodes only waited
            return {nodes[int(rank) // ranks_per_node] for rank in NAMED.findall(message)}
        if self.bad_node is None or any(kind != "crash" for kind, _ in self.words.values()):
            return set()  # what a rank says of the run would be the same on any node
        return {self.bad_node}


def deaths_in_job(words: Mapping[int, Words], srun: str) -> list[Death]:
    """Of the tasks of one srun: what they said (rank → kind, message), and what `srun` says of their ends."""
    seen: dict[int, tuple[str, str, bool]] = {}
    for number, (node, tasks, what) in enumerate(ENDED.findall(srun)):
        for rank in _numbers(tasks):
            seen.setdefault(rank, (node, what, number == 0))
    deaths = []
    for rank in sorted(words.keys() | seen.keys()):
        node, what, first = seen.get(rank, ("", "", False))
        where = f"on {node}" if node else ""
        exited = EXITED.search(what)
        if rank in words:
            kind, message = words[rank]
        elif exited:
            kind, message = silent(int(exited.group(1)))
        else:
            number = next((each for each in SIGNALS if signal.strsignal(each) == what), signal.SIGKILL)
            kind, message = killed_by(number, first), f"was killed: {what}"
        deaths.append(Death(rank, kind, f"failed: {message}" if kind == "crash" else message, first, where))
    return deaths


def first_bad_node(srun: str) -> str | None:
    """Where the first task ended that was not told to."""
    told = f"Exited with exit code {Interrupted.exit_code}"
    return next((node for node, _, what in ENDED.findall(srun) if what != told), None)


def _numbers(text: str) -> list[int]:
    """0,2-3 → 0, 2, 3"""
    ends = [part.partition("-") for part in text.split(",") if part]
    return [number for low, _, high in ends for number in range(int(low), int(high or low) + 1)]
