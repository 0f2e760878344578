"""Jobs over processes, with one count of the bytes that are done: what a conversion runs on.

One job runs in this process; several run in a process each. They end with their parent, however it ends, and it
learns of a worker's death whenever it comes (concurrent.futures does not, of the one that was started last). No lock
is shared: a killed process could hold it for ever.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import Any, TypeVar

from ..errors import RunFailed

POLL_SECONDS = 0.1


Count = Callable[[int], None]  # takes the bytes that were done since it was last called
Item = TypeVar("Item")
Job = Callable[[Count], Any]  # picklable: a functools.partial of a module's function


def deal(items: Sequence[Item], workers: int) -> list[Sequence[Item]]:
    """The items in as many shares as there are workers, round robin; none is empty."""
    return [items[number::workers] for number in range(min(workers, len(items)))]


def run_jobs(jobs: Sequence[Job], show: Count) -> list[Any]:
    """Every job's result, in their order; `show` is called in this process.

    Raises what a job raised first, and RunFailed if a worker was killed; then no worker is left.
    """
    if len(jobs) <= 1:
        return [job(show) for job in jobs]
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's thread pools, locked
    counts = [context.RawValue(ctypes.c_longlong, 0) for _ in jobs]
    results: dict[int, Any] = {}
    processes, pipes = [], []
    try:
        for job, count in zip(jobs, counts, strict=True):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(job, count, there, os.getpid()), daemon=True)
            process.start()
            there.close()  # its end is the worker's alone: that it closes is how a death shows
            processes.append(process)
            pipes.append(here)
        shown = 0
        while len(results) < len(jobs):
            waiting = [pipe for number, pipe in enumerate(pipes) if number not in results]
            ready = connection.wait(waiting, POLL_SECONDS)
            done = sum(count.value for count in counts)
            show(done - shown)
            shown = done
            for pipe in ready:
                results[pipes.index(pipe)] = _received(pipe)  # type: ignore[arg-type]
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [results[number] for number in range(len(jobs))]


def _received(pipe: connection.Connection) -> Any:
    try:
        sound, value = pipe.recv()
    except EOFError as error:
        raise RunFailed(
            "a worker process was killed (by the system, if memory ran out): try fewer --workers or a smaller "
            "--bucket-bytes"
        ) from error
    if not sound:
        raise value
    return value


def _run(job: Job, count: Any, pipe: connection.Connection, parent: int) -> None:
    """A worker: one job, its result or error through the pipe."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends this process

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    torch.set_num_threads(1)

    def add(amount: int) -> None:
        count.value += amount

    try:
        pipe.send((True, job(add)))
    except Exception as error:  # whatever it is: the parent raises it
        pipe.send((False, error))
