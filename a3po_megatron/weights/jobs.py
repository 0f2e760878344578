"""Jobs over processes, with one count of the bytes that are done: what a conversion runs on.

One worker runs in this process; several are spawned. They end with their parent, however it ends.
"""

from __future__ import annotations

import concurrent.futures.process
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ..errors import RunFailed

POLL_SECONDS = 0.1


Count = Callable[[int], None]  # takes the bytes that were done since it was last called
Item = TypeVar("Item")
Job = Callable[[Count], Any]  # picklable: a functools.partial of a module's function
_shared: Any = None  # in a worker: the count that it shares with its parent


def deal(items: Sequence[Item], workers: int) -> list[Sequence[Item]]:
    """The items in as many shares as there are workers, round robin; none is empty."""
    return [items[number::workers] for number in range(min(workers, len(items)))]


def run_jobs(jobs: Sequence[Job], workers: int, show: Count) -> list[Any]:
    """Every job's result, in their order; `show` is called in this process.

    Raises what a job raised first, and RunFailed if a worker was killed.
    """
    if workers == 1 or len(jobs) <= 1:
        return [job(show) for job in jobs]
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's thread pools, locked
    total = context.Value("q", 0)
    done_bytes = total.get_obj()  # read without the lock, which a killed worker may hold for ever
    shown = 0
    with concurrent.futures.ProcessPoolExecutor(
        min(workers, len(jobs)), context, initializer=_start, initargs=(total, os.getpid())
    ) as pool:
        futures = [pool.submit(_run, job) for job in jobs]
        try:
            waiting: set[Any] = set(futures)
            while waiting:
                done, waiting = concurrent.futures.wait(waiting, POLL_SECONDS, concurrent.futures.FIRST_EXCEPTION)
                now = done_bytes.value
                show(now - shown)
                shown = now
                for future in done:
                    future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise RunFailed(
                "a worker process was killed (by the system, if memory ran out): try fewer --workers or a smaller "
                "--bucket-bytes"
            ) from error
        except BaseException:
            done_bytes.value = -1  # tells the others to stop
            pool.shutdown(cancel_futures=True)
            raise
        return [future.result() for future in futures]


class Stopped(Exception):
    """This worker's result is not wanted any more."""


def _start(total: Any, parent: int) -> None:
    global _shared
    _shared = total
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends this process

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        os._exit(1)  # nothing else ends a pool's worker whose parent was killed

    threading.Thread(target=watch, daemon=True).start()


def _run(job: Job) -> Any:
    import torch

    torch.set_num_threads(1)

    def count(amount: int) -> None:
        with _shared.get_lock():
            if _shared.value < 0:
                raise Stopped
            _shared.value += amount

    return job(count)
