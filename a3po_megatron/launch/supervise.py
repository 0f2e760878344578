"""One start of all ranks, from its first process to its last: on this machine and in a Slurm job alike.

    start     by a starter: launch/local.py, subprocesses; launch/job.py, tasks of one srun
    watch     until one has failed, or all have ended; signals are passed on, again and again
    blame     what the ranks said of themselves, and what was seen of them, becomes one error (launch/blame.py)
    end       whatever is left is killed

What is different in a job follows from srun, which stands between and ends the rest after a first death:

    signals   whatever came, USR1 goes on: by TERM and INT srun would understand something else than "tell the ranks"
    Ctrl-C    a second one ends ranks of this machine at once; a job is ended by Slurm
    a stall   who cannot act is woken while srun is there; on this machine once a first rank has left, when the others
              have had their time to write their stacks
"""

from __future__ import annotations

import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from ..config import Settings
from ..errors import A3POError, Interrupted
from ..ranks.handoff import Handoff
from ..telemetry.watchdog import stalled
from .blame import Ended, failure
from .environment import of_run, variables
from .signals import Signals

PROGRAM = ("-m", "a3po_megatron.train")  # and the run folder: what every rank runs
GRACE_SECONDS = 1.0  # after a first death: whichever rank died of its own fault is then known


class Start(ABC):
    """What a starter knows of one start of all ranks."""

    poll_seconds: ClassVar[float]
    through_srun: ClassVar[bool]

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []  # the ranks; or srun

    @abstractmethod
    def begin(self) -> None:
        """Starts the processes."""

    @abstractmethod
    def wake(self) -> None:
        """Makes ranks that cannot act, even if they are stopped, write their stacks."""

    @abstractmethod
    def ended(self) -> Ended:
        """How it ends, at the first death; what ranks do after that is in it too."""

    def codes(self) -> list[int | None]:
        return [process.poll() for process in self.processes]

    def end(self) -> None:
        """Kills what is left, and waits for it."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def supervise(start: Start, folder: Path, signals: Signals) -> A3POError | None:
    """Starts all ranks and sees them to their end. Returns what they failed of; None: all ended well.

    Raises Interrupted for a signal that came before any was started, and for a second Ctrl-C on this machine.
    """
    signals.check(folder)
    try:
        start.begin()
        ended = _watch(start, folder, signals)
        return None if ended is None else failure(ended, folder, signals.number is not None)
    finally:
        start.end()


def _watch(start: Start, folder: Path, signals: Signals) -> Ended | None:
    """Until it is known what the ranks ended of."""
    woken = False
    while None in (codes := start.codes()) and not any(codes):
        if signals.at_once and not start.through_srun:
            raise Interrupted(f"{folder}: ended at once; the same command goes on from the last checkpoint")
        signals.pass_on(start.processes, always=signal.SIGUSR1 if start.through_srun else None)
        if start.through_srun and not woken and stalled(folder / "logs") is not None:
            woken = True
            start.wake()
        time.sleep(start.poll_seconds)
    if not any(start.codes()):
        return None
    ended = start.ended()
    if not start.through_srun and stalled(folder / "logs") is not None:
        start.wake()
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and None in start.codes():
        time.sleep(start.poll_seconds)
    return ended


def rank_environment(
    settings: Settings,
    inherited: Mapping[str, str],
    meeting: tuple[str, int],
    handoff: Handoff,
    container: bool = False,
) -> dict[str, str]:
    """What all ranks get: what is `inherited` of the launcher's shell (launch/shell.py), where they meet, what they are
    told."""
    return {
        **variables(settings.cluster.device, container),
        **of_run(settings),
        **inherited,
        "MASTER_ADDR": meeting[0],
        "MASTER_PORT": str(meeting[1]),
        **handoff.environment(),
    }
