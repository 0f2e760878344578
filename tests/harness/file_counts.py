"""What ranks do to a file system, counted by an audit hook: of threads that stand for ranks, or of one's own thread.

A hook cannot be taken out again: one is put in when it is first needed, and hears of nothing between two counts. Files
that C++ opens go unheard; the package opens its own in Python.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
NAMES = {"os.rename": "rename", "os.mkdir": "mkdir", "os.truncate": "truncate", "os.remove": "remove"}
LISTS = ("os.listdir", "os.scandir")
Heard = Callable[[str, str], None]  # a kind of call, the path

_listeners: list[Heard] = []
_installed: list[bool] = []


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if not _listeners or event not in {"open", *NAMES, *LISTS}:
        return
    path = arguments[0]
    if not isinstance(path, str | os.PathLike):
        return
    if event == "open":
        flags = int(arguments[2])
        kind = "create" if flags & os.O_CREAT else "open to write" if flags & WRITES else "open"
    else:
        kind = NAMES.get(event, "list")
    for listener in list(_listeners):
        listener(kind, os.fspath(path))


@contextmanager
def heard(listener: Heard) -> Iterator[None]:
    if not _installed:
        sys.addaudithook(_hear)
        _installed.append(True)
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


class Left(Exception):
    """A rank of a simulated world has done what counts."""


class Threads:
    """Ranks of a simulated world, each of them a thread; what they agree on goes through memory."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._barrier = threading.Barrier(world)
        self._given: list[Any] = [None] * world
        self._result: Any = None

    def agree(self, rank: int, value: Any, op: Callable[[list[Any]], Any]) -> Any:
        self._given[rank] = value
        if self._barrier.wait(120) == 0:
            self._result = op(list(self._given))
        self._barrier.wait(120)
        return self._result

    def counts(
        self, folder: Path, work: Callable[[int], None], of: Iterable[int] | None = None
    ) -> dict[int, Counter[str]]:
        """work(rank) of all ranks at once, or of some that agree on nothing: by rank, how often it did what to files in
        `folder`."""
        of = range(self.world) if of is None else of
        ranks: dict[int, int] = {}
        counted = {rank: Counter[str]() for rank in of}
        errors: list[BaseException] = []

        def listen(kind: str, path: str) -> None:
            rank = ranks.get(threading.get_ident())
            if rank is not None and path.startswith(str(folder)):
                counted[rank][kind] += 1

        def run(rank: int) -> None:
            ranks[threading.get_ident()] = rank
            try:
                work(rank)
            except Left:
                pass
            except BaseException as error:  # to be raised where it is seen
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in counted]
        with heard(listen):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return counted
