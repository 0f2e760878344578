"""Starts all ranks of a run on this machine, as plain subprocesses; launch/supervise.py sees them to their end.

Every rank's output goes to logs/rank-N.log; rank 0 shows progress on the launcher's terminal through a descriptor of
its own, so that the chatter of libraries never mixes with it. Ranks die with the launcher (PR_SET_PDEATHSIG).

USR1, TERM and Ctrl-C go on to the ranks, which stop together when they can (run/stop.py); a second Ctrl-C
ends them at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..config import Settings
from ..errors import RequestError
from ..files.run_folder import RunFolder, rank_file
from ..ranks.handoff import Handoff
from ..telemetry.clock import noted
from .blame import Here, Words, words_of
from .environment import WORDS_BYTES, die_with_parent
from .shell import of_one_machine
from .signals import Signals, ignore
from .supervise import PROGRAM, Start, rank_environment, supervise


def rendezvous(wanted: int) -> socket.socket:
    """Where the ranks meet, listening already: a port that was only looked for may be taken when rank 0 comes to it.

    `wanted`: a port, 0 for a free one. Raises RequestError if it is not free.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does: TIME_WAIT is no user
    try:
        listener.bind(("127.0.0.1", wanted))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise RequestError(
            f"cluster.port = {wanted} is in use on this machine: leave it out to take a free one"
        ) from error
    return listener


def free_port() -> int:
    """A port that is free now."""
    with rendezvous(0) as listener:
        return int(listener.getsockname()[1])


@dataclass(frozen=True)
class _Rank:
    process: subprocess.Popen[bytes]
    words: int  # a pipe: what it fails of (environment.last_words)
    phase: int  # memory: where it is (telemetry/clock.py)

    @property
    def code(self) -> int | None:
        return self.process.poll()

    def last_words(self) -> Words | None:
        with contextlib.suppress(BlockingIOError):
            if line := os.read(self.words, WORDS_BYTES).partition(b"\n")[0]:
                return words_of(line)
        return None


def run_local(
    folder: Path,
    settings: Settings,
    started: float,
    lock: IO[str],
    signals: Signals,
    program: tuple[str, ...] = PROGRAM,
) -> None:
    """Runs all ranks of `program` to their end, each holding the folder's lock.

    Raises the failed rank's error, naming rank and phase, or Interrupted when the ranks left because they were told to.
    """
    if (error := supervise(_Processes(folder, settings, started, lock, program), folder, signals)) is not None:
        raise error


class _Processes(Start):
    poll_seconds, through_srun = 0.1, False

    def __init__(
        self, folder: Path, settings: Settings, started: float, lock: IO[str], program: tuple[str, ...]
    ) -> None:
        super().__init__()
        self._program = program
        self._folder, self._settings, self._started, self._lock = folder, settings, started, lock
        self._ranks: list[_Rank] = []
        self._meeting: socket.socket | None = None

    def begin(self) -> None:
        world = self._settings.ranks
        self._meeting = rendezvous(self._settings.cluster.port)
        for rank in range(world):
            self._ranks.append(self._begin(rank, world, self._meeting))
            self.processes.append(self._ranks[-1].process)

    def _begin(self, rank: int, world: int, meeting: socket.socket) -> _Rank:
        words, said = os.pipe()
        os.set_blocking(words, False)
        phase = os.memfd_create(f"phase of rank {rank}")
        shared = os.dup(phase)
        handoff = Handoff(started=self._started, words_fd=said, phase_fd=shared)
        inherited = [said, shared, os.dup(self._lock.fileno())]  # the run is live as long as any of its ranks is
        if rank == 0:
            console, store = os.dup(sys.stdout.fileno()), os.dup(meeting.fileno())
            handoff = dataclasses.replace(handoff, console_fd=console, store_fd=store)
            inherited += [console, store]
        environment = rank_environment(self._settings, of_one_machine(os.environ), meeting.getsockname(), handoff)
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        if rank == 0:  # it cannot ask the terminal for its width: its own standard streams are files
            environment.setdefault("COLUMNS", str(shutil.get_terminal_size().columns))
        for descriptor in inherited:
            os.set_inheritable(descriptor, True)
        with rank_file(RunFolder(self._folder).logs, rank, "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *self._program, str(self._folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=inherited,
                preexec_fn=_begin_rank,
            )
        for descriptor in inherited:
            os.close(descriptor)
        return _Rank(process, words, phase)

    def wake(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGUSR2)
            process.send_signal(signal.SIGCONT)

    def ended(self) -> Here:
        ranks = range(len(self._ranks))
        dead = {rank for rank in ranks if self._ranks[rank].code not in (None, 0)}
        return Here(self._ranks, dead, {rank: noted(self._ranks[rank].phase) for rank in ranks})

    def end(self) -> None:
        if self._meeting is not None:
            self._meeting.close()
        super().end()
        for each in self._ranks:
            os.close(each.words)
            os.close(each.phase)
        if sys.stdout.isatty():  # a rank that was killed left its progress bar, and the cursor hidden
            sys.stdout.write("\r\x1b[?25h")
            sys.stdout.flush()


def _begin_rank() -> None:
    die_with_parent()
    ignore()
