"""A writer beside the run: a step hands over what is to be written, and a thread writes it, in that order.

    put      the main thread goes on at once; what it hands over must not change any more
    drain    returns when all that was put is written: before whatever promises that it is on the disk

A shared file system that hangs for a moment then stops nobody. What a killed process had put and not written is lost,
and is computed again from what was. The first failure ends the writing, since what comes after may lean on what is
missing; it is raised where the run comes next: at a `put` or a `drain`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ..errors import A3POError, RunFailed

LIMIT = 256  # works that wait; `put` waits, too, while there are so many, and the watchdog counts that as silence


class Writer(Protocol):
    def put(self, path: Path, work: Callable[[], Any]) -> None:
        """Has `work` write the file `path`. Raises RunFailed, naming the file, for what could not be written before."""

    def drain(self) -> None:
        """Returns when all works are done. Raises RunFailed likewise."""


class AtOnce:
    """The writer of what is no run: it does a work when it is put."""

    def put(self, path: Path, work: Callable[[], Any]) -> None:
        if (failure := _failure(path, work)) is not None:
            raise RunFailed(failure)

    def drain(self) -> None:
        pass


class BesideRun:
    """The writer of a run: one thread a rank, which ends with the process."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._works: queue.Queue[tuple[Path | None, Callable[[], Any]]] = queue.Queue(limit)
        self._failure: str | None = None
        threading.Thread(target=self._run, name="writer", daemon=True).start()

    def put(self, path: Path, work: Callable[[], Any]) -> None:
        self._check()
        self._works.put((path, work))

    def drain(self) -> None:
        done = threading.Event()
        self._works.put((None, done.set))
        done.wait()
        self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise RunFailed(self._failure)

    def _run(self) -> None:
        while True:
            path, work = self._works.get()
            if path is None:
                work()
            elif self._failure is None:
                self._failure = _failure(path, work)
            del work  # with what it holds: the next one may be long in coming


def _failure(path: Path, work: Callable[[], Any]) -> str | None:
    """What went wrong, naming the file; in a thread nobody else would hear of it."""
    try:
        work()
    except A3POError as error:
        return str(error)
    except OSError as error:
        return f"{path}: cannot write it: {error.strerror or error}"
    except Exception as error:
        return f"{path}: cannot write it: {type(error).__name__}: {error}"
    return None
