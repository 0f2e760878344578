"""Grading beside sampling: what is finished is graded while the engine goes on; a step waits for the last ones only.

    engine ── a finished group ──▶ submit ── all that came meanwhile ──▶ one thread: grade_all ──▶ the group's verdicts

One thread, because the processes of a pool die with the thread that started them; and what came while it graded goes
into its next call together, so that many small groups keep all workers busy.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Protocol

from ..batch import Answered, Verdict


class Pool(Protocol):
    """Graders that answer at once: pool.py, ray_pool.py. A context manager."""

    def __enter__(self) -> Pool: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> object: ...

    def grade_all(self, items: Sequence[Answered]) -> list[Verdict]:
        """Their verdicts, in their order."""


class Beside:
    """Grades with `pool` in a thread of its own. Use it as a context manager."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._asked: queue.SimpleQueue[tuple[list[Answered], Future[list[Verdict]]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._grade, name="graders", daemon=True)

    def submit(self, items: Sequence[Answered]) -> Future[list[Verdict]]:
        """Their verdicts to come, in their order; its result raises what the pool raises."""
        future: Future[list[Verdict]] = Future()
        self._asked.put((list(items), future))
        return future

    def _grade(self) -> None:
        ended = False
        while not ended:
            asked = [self._asked.get()]
            while not self._asked.empty():
                asked.append(self._asked.get())
            ended = None in asked
            parts = [part for part in asked if part is not None]
            if not parts:
                continue
            try:
                verdicts = iter(self._pool.grade_all([item for items, _ in parts for item in items]))
                for items, future in parts:
                    future.set_result([next(verdicts) for _ in items])
            except BaseException as error:  # for whoever waits: this thread has nobody to tell
                for _, future in parts:
                    if not future.done():
                        future.set_exception(error)

    def __enter__(self) -> Beside:
        self._pool.__enter__()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for what is being graded; not after a failure, where the pool's processes end with the thread."""
        self._asked.put(None)
        if error is None:
            self._thread.join()
            self._pool.__exit__(kind, error, trace)
