"""All ranks of a run on this machine: started as plain subprocesses, watched, and ended together.

Every rank's output goes to logs/rank-N.log; rank 0 shows progress on the launcher's terminal through a descriptor of
its own, so that the chatter of libraries never mixes with it. Ranks die with the launcher (PR_SET_PDEATHSIG).

USR1, TERM and Ctrl-C go on to the ranks, which leave together when they can (run/stop.py); a second Ctrl-C
ends them at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..config import Config
from ..errors import A3POError, Interrupted, RequestError, RunFailed
from ..ranks.handoff import Handoff
from ..ranks.topology import topology_of
from ..telemetry.watchdog import position, stalled
from .blame import Death, Kind, error_of, killed_by, silent
from .environment import WORDS_BYTES, die_with_parent, of_run, settings
from .shell import of_one_machine
from .signals import Signals, ignore

POLL_SECONDS = 0.1
GRACE_SECONDS = 1.0  # after a first death: whichever rank died of its own fault is then known


def rendezvous(wanted: int | None) -> socket.socket:
    """Where the ranks meet, listening already: a port that was only looked for may be taken when rank 0 comes to it.

    Raises RequestError if the wanted one is not free.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does: TIME_WAIT is no user
    try:
        listener.bind(("127.0.0.1", wanted or 0))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise RequestError(
            f"cluster.port = {wanted} is in use on this machine: leave it out to take a free one"
        ) from error
    return listener


def free_port() -> int:
    """A port that is free now."""
    with rendezvous(None) as listener:
        return int(listener.getsockname()[1])


@dataclass(frozen=True)
class _Rank:
    process: subprocess.Popen[bytes]
    words: int  # a pipe: what it fails of (environment.last_words)

    @property
    def code(self) -> int | None:
        return self.process.poll()

    def last_words(self) -> tuple[Kind, str]:
        """Kind and message of a rank that has ended by itself."""
        with contextlib.suppress(BlockingIOError):
            if line := os.read(self.words, WORDS_BYTES).partition(b"\n")[0]:
                words = json.loads(line)
                return words["kind"], words["message"]
        return silent(self.code)


def run_local(folder: Path, config: Config, started: float, lock: IO[str], signals: Signals) -> None:
    """Runs all ranks to their end, each holding the folder's lock.

    Raises the failed rank's error, naming rank and phase, or Interrupted when the ranks left because they were told to.
    """
    signals.check(folder)
    meeting = rendezvous(config.cluster.port)
    ranks: list[_Rank] = []
    try:
        world = topology_of(config.parallel, config.rollout.tensor).world
        for rank in range(world):
            ranks.append(_start(rank, world, folder, config, meeting, started, lock))
        _watch(ranks, folder, signals)
    finally:
        meeting.close()
        for each in ranks:
            if each.process.poll() is None:
                each.process.kill()
            each.process.wait()
            os.close(each.words)
        if sys.stdout.isatty():  # a rank that was killed left its progress bar, and the cursor hidden
            sys.stdout.write("\r\x1b[?25h")
            sys.stdout.flush()


def _start(
    rank: int, world: int, folder: Path, config: Config, meeting: socket.socket, started: float, lock: IO[str]
) -> _Rank:
    environment = {
        **settings(config.cluster.device),
        **of_run(config),
        **of_one_machine(os.environ),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(meeting.getsockname()[1]),
    }
    words, said = os.pipe()
    os.set_blocking(words, False)
    handoff = Handoff(started=started, words_fd=said)
    inherited = [said, os.dup(lock.fileno())]  # the run is live as long as any of its ranks is
    if rank == 0:
        console, store = os.dup(sys.stdout.fileno()), os.dup(meeting.fileno())
        handoff = dataclasses.replace(handoff, console_fd=console, store_fd=store)
        inherited += [console, store]
        # The rank cannot ask the terminal for its width: its own standard streams are files.
        environment.setdefault("COLUMNS", str(shutil.get_terminal_size().columns))
    for descriptor in inherited:
        os.set_inheritable(descriptor, True)
    with (folder / "logs" / f"rank-{rank}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "a3po_megatron.train", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment | handoff.environment(),
            pass_fds=inherited,
            preexec_fn=_begin_rank,
        )
    for descriptor in inherited:
        os.close(descriptor)
    return _Rank(process, words)


def _begin_rank() -> None:
    die_with_parent()
    ignore()


def _watch(ranks: list[_Rank], folder: Path, signals: Signals) -> None:
    while any(each.code is None for each in ranks):
        if any(each.code not in (None, 0) for each in ranks):
            break
        if signals.at_once:
            raise Interrupted(f"{folder}: ended at once; the same command goes on from the last checkpoint")
        signals.pass_on([each.process for each in ranks])
        time.sleep(POLL_SECONDS)
    if all(each.code == 0 for each in ranks):
        return
    dead = {rank for rank, each in enumerate(ranks) if each.code not in (None, 0)}
    where = {rank: position(folder / "logs", rank)[1] for rank in range(len(ranks))}
    if stalled(folder / "logs") is not None:
        for each in ranks:  # one that cannot act writes its stacks all the same, even if it is stopped
            if each.code is None:
                each.process.send_signal(signal.SIGUSR2)
                each.process.send_signal(signal.SIGCONT)
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and any(each.code is None for each in ranks):
        time.sleep(POLL_SECONDS)
    raise _failure(ranks, dead, where, folder)


def _failure(ranks: list[_Rank], dead: set[int], where: dict[int, str], folder: Path) -> A3POError:
    deaths = [_death(rank, each, rank in dead, where[rank], folder) for rank, each in enumerate(ranks) if each.code]
    return error_of(deaths, folder / "logs") or RunFailed(f"{folder}: no rank is left, and none has failed")


def _death(rank: int, each: _Rank, first: bool, where: str, folder: Path) -> Death:
    log = folder / "logs" / f"rank-{rank}.log"
    if each.code is not None and each.code < 0:
        number = signal.Signals(-each.code)
        return Death(rank, killed_by(number, first), f"was killed by {number.name}; its log: {log}", first, where)
    kind, message = each.last_words()
    if kind == "crash":
        message = f"failed: {message}; its log: {log}"
    return Death(rank, kind, message, first, where)
