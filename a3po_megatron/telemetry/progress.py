"""What a person sees while a run goes on: a progress bar on a terminal, one plain line a step elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.text import Text

from .clock import CLOCK


class _Patient(Console):
    """A console whose reader may go away (`a3po train … | head`): then nobody looks, and the run goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


def open_console(descriptor: int | None) -> Console:
    """The launcher's terminal where it handed one down, else this process's standard output."""
    if descriptor is None:
        return _Patient(highlight=False)
    stream: TextIO = os.fdopen(descriptor, "w", buffering=1, closefd=False)
    return _Patient(file=stream, highlight=False, soft_wrap=True)


class _Left(ProgressColumn):
    """Time left, from the mean of the steps so far."""

    def render(self, task: Any) -> Text:
        return Text(task.fields.get("left", ""))


class ProgressLine:
    """Shows steps as they end and phases as they change."""

    def __init__(self, steps: int, console: Console, first: int = 0) -> None:
        self._steps, self._console, self._start, self._first = steps, console, time.monotonic(), first
        self._stepwise: float | None = None  # the last step's share of responses with steps
        self._said_stepwise = False
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[phase]:<8}"),
                TextColumn("{task.fields[facts]}"),
                _Left(),
                console=console,
                redirect_stdout=False,  # what libraries print belongs into the rank's log
                redirect_stderr=False,
            )
            self._task = self._bar.add_task("", total=steps, completed=first, phase="", facts="", left="")
            self._bar.start()
            CLOCK.listener = self._show_phase

    def recall(self, rates: Iterable[float | None]) -> None:
        """What an earlier start has shown of `task/stepwise_rate`: it is not said again."""
        for rate in rates:
            self._passes_half(rate)

    def step(self, done: int, row: dict[str, float | None]) -> None:
        """`done` steps have ended; `row` is the last one's metrics."""
        shares = {"correct": row["reward/correct_rate"], "entropy": row["policy/entropy"]}
        if row["task/stepwise_rate"] is not None:
            shares["stepwise"] = row["task/stepwise_rate"]
        facts = "  ".join(f"{name} {_number(value, '.3f')}" for name, value in shares.items())
        facts += f"  {_number(row['perf/tokens_per_second'], ',.0f')} tokens/s"
        remaining = (time.monotonic() - self._start) / max(done - self._first, 1) * (self._steps - done)
        left = f"{int(remaining) // 60}:{int(remaining) % 60:02d} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, facts=facts, left=left)
        else:
            groups = _number(row["rollout/kept_groups"], ".0f")
            self._console.print(f"step {done:>4}/{self._steps}  {facts}  {groups} groups  {left}")
        self._say_way(done, row["task/stepwise_rate"])

    def _say_way(self, done: int, rate: float | None) -> None:
        """Says once that most responses have come to write steps; nothing of a run that began so."""
        if self._passes_half(rate):
            self.say(
                f"step {done}: more than half of the responses now write steps before they answer ({rate:.0%}; metric "
                "task/stepwise_rate)"
            )

    def _passes_half(self, rate: float | None) -> bool:
        before, self._stepwise = self._stepwise, rate
        passes = not self._said_stepwise and before is not None and rate is not None and before <= 0.5 < rate
        self._said_stepwise |= passes
        return passes

    def say(self, text: str) -> None:
        """A line that stays."""
        (self._bar.console if self._bar is not None else self._console).print(text, markup=False)

    def close(self) -> None:
        if self._bar is not None:
            CLOCK.listener = lambda step, phase: None
            self._bar.update(self._task, phase="done")
            self._bar.stop()

    def _show_phase(self, step: int, phase: str) -> None:
        assert self._bar is not None
        self._bar.update(self._task, phase=phase)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
