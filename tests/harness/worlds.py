"""Ranks that stay: forked once for a session, they take one group of cases after the other.

Ranks are forked off a process that has imported torch, Megatron-Core, transformers and vLLM (11 s) and done nothing
with them (tests/harness/preloaded.py); those with Transformer Engine off another one, since it must be found before
anything imports Megatron-Core (tests/harness/preloaded_te.py).
A group of cases finds a process as if it were new, but for what is imported, which takes the seconds: groups of
processes, Megatron's and vLLM's are destroyed, and random streams, environment, folder, threads, signal handlers and
the clock are those of the beginning. Whatever fails, dies or hangs takes its world down, and others come after it.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import importlib
import itertools
import json
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

import tests.distributed  # noqa: F401  # prepares this process, before anything imports Megatron
from a3po_megatron.launch.environment import SETTINGS, die_with_parent
from a3po_megatron.launch.local import rendezvous
from tests.harness import tidying
from tests.harness.tidying import ROOT

HARNESS = str(ROOT / "tests/harness/te_on_cpu")
SERVERS = {False: forkserver.ForkServer(), True: forkserver.ForkServer()}  # what ranks are forked off: with TE or not
SERVERS[False].set_forkserver_preload(["tests.harness.preloaded"])
SERVERS[True].set_forkserver_preload(["tests.harness.preloaded_te"])
OTHERS_SECONDS = 2.0  # that ranks get to say what they failed of, once one has; most wait for it in a collective
RANK_BYTES = 3 << 29  # a larger rank is replaced, and a new one is started where so much is free, or others are ended


@dataclass(frozen=True)
class Task:
    """What all ranks of a world do next."""

    cases: list[str]  # module:function
    folder: Path
    timeout: float
    environment: dict[str, str]


class World:
    """So many connected ranks, which do what they are told until they are ended."""

    def __init__(self, size: int, logs: Path, te: bool = False, fresh: bool = False) -> None:
        """`fresh`: in processes that have imported nothing. `te`: with the stand-in for Transformer Engine."""
        self.size = size
        meeting = rendezvous(0)
        context = multiprocessing.get_context("spawn" if fresh else "forkserver")
        self._processes, self._pipes = [], []
        for rank in range(size):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(meeting.getsockname()[1]),
                "GLOO_SOCKET_IFNAME": "lo",
                "VLLM_HOST_IP": "127.0.0.1",
                "TORCH_GLOO_LAZY_INIT": SETTINGS["TORCH_GLOO_LAZY_INIT"],
            }
            if te:
                environment |= {"A3PO_TEST_SPEC": "te", "NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1"}
            ours, theirs = context.Pipe()
            arguments = (environment, dict(os.environ), meeting if rank == 0 else None, theirs, _log(logs, rank))
            process = context.Process(target=_rank, args=arguments)
            path = [*[HARNESS] * te, *sys.path]
            around = environment | ({"PYTHONPATH": os.pathsep.join(path)} if te else {})  # for its server's start
            with contextlib.ExitStack() as stack:
                stack.enter_context(mock.patch.dict(os.environ, around))
                stack.enter_context(mock.patch.object(sys, "path", path))
                connect = SERVERS[te].connect_to_new_process
                stack.enter_context(mock.patch.object(forkserver, "connect_to_new_process", connect))
                process.start()
            theirs.close()  # else its end would not be noticed
            self._processes.append(process)
            self._pipes.append(ours)
        meeting.close()

    def run(self, task: Task) -> list[dict[str, Any]]:
        """Case → what it returned, of every rank. Ends the world, and raises AssertionError with the traceback or the
        log's end of the first rank that failed, if one did."""
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        answers: dict[int, dict[str, Any]] = {}
        failed: list[str] = []
        deadline = time.monotonic() + task.timeout
        try:
            for pipe in self._pipes:
                with contextlib.suppress(OSError):  # dead already: that is noticed below
                    pipe.send(task)
            while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
                dead, wrong = [], []
                for pipe in ready:
                    rank = waiting.pop(pipe)  # type: ignore[call-overload]
                    try:
                        answers[rank] = json.loads(pipe.recv())  # type: ignore[union-attr]
                        if answers[rank]["error"]:
                            wrong.append(f"on rank {rank} of {self.size}, {answers[rank]['error']}")
                    except (EOFError, OSError):
                        dead.append(f"rank {rank} died:\n{_end_of_log(task.folder, rank)}")
                failed += dead + wrong  # of those that come at once, a death is the cause
                if failed:
                    deadline = min(deadline, time.monotonic() + OTHERS_SECONDS)
            if not failed:
                failed += [f"rank {r} hangs:\n{_end_of_log(task.folder, r)}" for r in sorted(waiting.values())]
        except BaseException:
            self.end()
            raise
        if failed:
            self.end()
            raise AssertionError(failed[0])
        return [answers[rank]["values"] for rank in range(self.size)]

    @property
    def fit(self) -> bool:
        """Whether it can take more cases: all ranks are there, and small."""
        if not all(process.is_alive() for process in self._processes):
            return False
        return all(psutil.Process(process.pid).memory_info().rss < RANK_BYTES for process in self._processes)

    def end(self) -> None:
        """Kills the ranks, and what they started."""
        family = []
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                family += psutil.Process(process.pid).children(recursive=True)
        for process in (*self._processes, *family):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()


_waiting: dict[tuple[int, bool], World] = {}  # size, with Transformer Engine → the world of this session


def world_of(size: int, logs: Path, te: bool = False) -> World:
    """The session's world of this kind, started now if there is none."""
    kind = size, te
    if kind in _waiting and not _waiting[kind].fit:
        _waiting.pop(kind).end()
    if kind not in _waiting:
        if not _waiting:
            atexit.register(end_worlds)
        if psutil.virtual_memory().available < size * RANK_BYTES:
            end_worlds()
        _waiting[kind] = World(size, logs, te)
    return _waiting[kind]


def end_worlds() -> None:
    """Ends all ranks that wait for cases."""
    while _waiting:
        _waiting.popitem()[1].end()


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.log"


def _end_of_log(folder: Path, rank: int) -> str:
    path = _log(folder, rank)
    return path.read_text(errors="replace")[-4000:] if path.exists() else "it had not begun"


# ------------------------------------------------------------------------------------------------- in a rank's process


def _rank(
    own: dict[str, str], environment: dict[str, str], meeting: socket.socket | None, pipe: Connection, log: Path
) -> None:
    os.environ.clear()  # of the server's first days, not of the test
    os.environ.update(environment | own)
    os.chdir(ROOT)
    die_with_parent()
    _log_to(log)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, size = int(own["RANK"]), int(own["WORLD_SIZE"])
    # The port is listened on since before this process was started: nobody else can have it.
    listening = meeting.detach() if meeting else None
    seconds = timedelta(seconds=120)
    address, port = own["MASTER_ADDR"], int(own["MASTER_PORT"])
    store = dist.TCPStore(address, port, size, rank == 0, seconds, master_listen_fd=listening)
    tidying.hold_weakly()
    as_new = tidying.kept()
    for number in itertools.count():
        try:
            task: Task = pipe.recv()
        except EOFError:
            os._exit(0)
        _log_to(_log(task.folder, rank))
        os.environ.clear()
        os.environ.update(task.environment | own)
        own_store = dist.PrefixStore(f"task-{number}", store)
        pipe.send(_answer(task, rank, size, own_store, as_new))


def _log_to(path: Path) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def _answer(task: Task, rank: int, size: int, store: Any, as_new: Callable[[], None]) -> str:
    """What the cases returned and what went wrong, as JSON."""
    import torch.distributed as dist

    from tests.harness.ranks import CaseRanks

    values: dict[str, Any] = {}
    doing = "they could not begin"
    faulthandler.dump_traceback_later(task.timeout - 5, exit=True)  # a hang ends with every thread's stack in the log
    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=120))
        ranks = CaseRanks(rank, size, dist.PrefixStore("cases", store), task.folder)
        for name in task.cases:
            module, _, function = name.partition(":")
            doing = f"{name} failed"
            print(f"case {name}", flush=True)
            values[name] = getattr(importlib.import_module(module), function)(ranks)
        doing = "tidying up after them failed"
        answer = json.dumps({"values": values, "error": ""})
        dist.barrier()
        del ranks, values
        as_new()
        return answer
    except BaseException:
        return json.dumps({"values": {}, "error": f"{doing}:\n{traceback.format_exc()}"})
    finally:
        faulthandler.cancel_dump_traceback_later()
