"""Which rank's death decides how a run ends, and with which exit code: for ranks of this machine and of a Slurm job.

What a rank says of itself is never a consequence of another one's death: a wrong request, a failed run, an order to
leave. That it crashed may be one, since what it waits for fails as soon as the other is gone, and so may be that it was
killed, since srun kills the rest after a first death. The table is in docs/resume.md.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import A3POError, Interrupted, RequestError, RunFailed
from ..run.stop import SIGNALS
from ..telemetry.watchdog import stalled

Kind = Literal["request", "run", "interrupted", "crash", "killed"]
ERRORS: dict[str, type[A3POError]] = {"request": RequestError, "run": RunFailed, "interrupted": Interrupted}
# srun: error: rl1: task 1: Killed; srun: error: rl0: tasks 0,2-3: Exited with exit code 1
ENDED = re.compile(r"^srun: error: (\S+): tasks? ([\d,-]+): (.*?)\s*$", re.MULTILINE)
EXITED = re.compile(r"Exited with exit code (\d+)")


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
    return ("request", "run", "interrupted").index(death.kind) if death.kind in ERRORS else 3 + (not death.first)


def error_of(deaths: Iterable[Death], logs: Path) -> A3POError | None:
    """What the run ends with; None: nobody died. A stall comes before all else: what ranks die of after it is that
    the first of them has left."""
    if (message := stalled(logs)) is not None:
        return Interrupted(message)
    deaths = list(deaths)
    if not deaths:
        return None
    death = blamed(deaths)
    place = f"rank {death.rank}" + (f" ({death.where})" if death.where else "")
    if death.kind == "run":
        return RunFailed(f"{place}: {death.message}")
    if death.kind in ERRORS:
        return ERRORS[death.kind](death.message)
    return RunFailed(f"{place} {death.message}")


def killed_by(number: int, first: bool) -> Kind:
    """The kind of a death by a signal: one that is meant for the run may come before a rank can hear it. Not of a later
    one, since srun ends the rest with TERM."""
    return "interrupted" if first and number in SIGNALS else "killed"


def silent(code: int | None) -> tuple[Kind, str]:
    """Kind and message of a rank that ended by itself and left no words, as it does where a disk is full."""
    if code == Interrupted.exit_code:
        return "interrupted", "interrupted; the same command goes on"
    return "crash", "it left no message"


def deaths_in_job(words: Mapping[int, tuple[Kind, str]], srun: str) -> list[Death]:
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
