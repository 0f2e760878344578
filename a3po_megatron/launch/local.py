"""All ranks of a run on this machine: started as plain subprocesses, watched, and ended together.

Every rank's output goes to logs/rank-N.log; rank 0 shows progress on the launcher's terminal through a descriptor of
its own, so that the chatter of libraries never mixes with it. Ranks die with the launcher (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from ..config import Config
from ..errors import A3POError, RequestError, RunFailed
from .environment import LOOPBACK, SETTINGS, die_with_parent

POLL_SECONDS = 0.1
GRACE_SECONDS = 1.0  # after a first death: whichever rank died of its own fault is then known


def rendezvous_port(wanted: int | None) -> int:
    """A port that is free now. Raises RequestError if the wanted one is not."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does: TIME_WAIT is no user
        try:
            probe.bind(("127.0.0.1", wanted or 0))
        except OSError as error:
            raise RequestError(
                f"cluster.port = {wanted} is in use on this machine: leave it out to take a free one"
            ) from error
        return int(probe.getsockname()[1])


def run_local(folder: Path, config: Config, started: float) -> None:
    """Runs all ranks to their end. Raises the failed rank's error, naming rank and phase."""
    port = rendezvous_port(config.cluster.port)
    ranks: list[subprocess.Popen[bytes]] = []
    previous = signal.signal(signal.SIGTERM, _terminated)
    try:
        for rank in range(config.parallel.ranks()):
            ranks.append(_start(rank, folder, config.parallel.ranks(), port, started))
        _watch(ranks, folder)
    except KeyboardInterrupt as error:
        raise RunFailed(f"{folder}: interrupted") from error
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.wait()
        signal.signal(signal.SIGTERM, previous)
        if sys.stdout.isatty():  # a rank that was killed left its progress bar, and the cursor hidden
            sys.stdout.write("\r\x1b[?25h")
            sys.stdout.flush()


def _terminated(*_: object) -> None:
    raise KeyboardInterrupt


def _start(rank: int, folder: Path, world: int, port: int, started: float) -> subprocess.Popen[bytes]:
    environment = {
        **SETTINGS,
        **LOOPBACK,
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "A3PO_STARTED": str(started),
    }
    inherited: tuple[int, ...] = ()
    if rank == 0:
        inherited = (os.dup(sys.stdout.fileno()),)
        os.set_inheritable(inherited[0], True)
        environment["A3PO_CONSOLE_FD"] = str(inherited[0])
        # The rank cannot ask the terminal for its width: its own standard streams are files.
        environment.setdefault("COLUMNS", str(shutil.get_terminal_size().columns))
    with (folder / "logs" / f"rank-{rank}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "a3po_megatron.train", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=inherited,
            preexec_fn=die_with_parent,
        )
    for descriptor in inherited:
        os.close(descriptor)
    return process


def _watch(ranks: list[subprocess.Popen[bytes]], folder: Path) -> None:
    while any(process.poll() is None for process in ranks):
        if any(process.poll() not in (None, 0) for process in ranks):
            break
        time.sleep(POLL_SECONDS)
    if all(process.poll() == 0 for process in ranks):
        return
    dead = {rank for rank, process in enumerate(ranks) if process.poll() not in (None, 0)}
    where = {rank: phase_of(folder, rank) for rank in range(len(ranks))}
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and any(process.poll() is None for process in ranks):
        time.sleep(POLL_SECONDS)
    raise _failure(ranks, dead, where, folder)


def phase_of(folder: Path, rank: int) -> str:
    """Where a rank was last: "phase rollout of step 3"."""
    try:
        step, _, phase = (folder / "logs" / f"rank-{rank}.phase").read_text().partition(" ")
    except OSError:
        return "phase start-up"
    return f"phase {phase} of step {step}" if step != "-1" else f"phase {phase}"


def _failure(ranks: list[subprocess.Popen[bytes]], dead: set[int], where: dict[int, str], folder: Path) -> A3POError:
    """The error of the rank that is to blame: one killed by a signal, else one that said what is wrong, else any."""
    reports: list[tuple[int, int, A3POError]] = []
    for rank, process in enumerate(ranks):
        code, place = process.poll(), f"rank {rank} ({where[rank]})"
        log = folder / "logs" / f"rank-{rank}.log"
        if code is None or code == 0:
            continue
        if code < 0:
            name = signal.Signals(-code).name
            reports.append((0 if rank in dead else 4, rank, RunFailed(f"{place} was killed by {name}; its log: {log}")))
            continue
        kind, message = _last_words(folder, rank)
        if kind == "request":
            reports.append((1, rank, RequestError(message)))
        elif kind == "run":
            reports.append((1, rank, RunFailed(f"{place}: {message}")))
        else:
            reports.append((2 if rank in dead else 3, rank, RunFailed(f"{place} failed: {message}; its log: {log}")))
    return min(reports, key=lambda report: report[:2])[2]


def _last_words(folder: Path, rank: int) -> tuple[str, str]:
    try:
        words = json.loads((folder / "logs" / f"rank-{rank}.error").read_text())
    except (OSError, ValueError):
        return "crash", "it left no message"
    return words["kind"], words["message"]
