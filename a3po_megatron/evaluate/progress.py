"""What a person sees of an evaluation: a bar on a terminal, elsewhere a line for every tenth."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from ..ranks.handoff import Handoff
from ..telemetry.progress import open_console
from .request import Asked

PARTS = 10  # lines of a benchmark where there is no terminal


class Progress:
    """Use it as a context manager; only rank 0 shows anything."""

    def __init__(self, asked: Asked, recalled: int, shown: bool) -> None:
        """`recalled`: problems that an earlier start finished."""
        self._name, self._total = asked.benchmark, len(asked.problems)
        self._recalled, self._shown, self._part = recalled, shown, 0
        self._console = open_console(Handoff.of().console_fd) if shown else None
        self._bar: Bar | None = None
        if self._console is not None and self._console.is_terminal:
            columns = (TextColumn(self._name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("", total=self._total, completed=recalled)

    def show(self, done: int) -> None:
        """`done`: problems that all engines have finished in this start."""
        if not self._shown:
            return
        done += self._recalled
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        elif self._console is not None and (part := PARTS * done // self._total) > self._part:
            self._part = part
            self._console.print(f"{self._name}: {done} of {self._total} problems", markup=False)

    def __enter__(self) -> Self:
        if self._console is not None and self._recalled:
            self._console.print(f"{self._name}: {self._recalled} problems were finished before", markup=False)
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
