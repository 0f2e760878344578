"""What a person is told while a run goes on, where it is no terminal."""

from __future__ import annotations

import io

from rich.console import Console

from a3po_megatron.telemetry.catalogue import METRICS
from a3po_megatron.telemetry.progress import ProgressLine


def shown(*stepwise: float | None, before: tuple[float | None, ...] = ()) -> list[str]:
    """The lines of a run with these shares of stepwise responses, a step each; `before`: in an earlier start."""
    out, first = io.StringIO(), len(before)
    progress = ProgressLine(first + len(stepwise), Console(file=out, width=200), first)
    progress.recall(before)
    for step, rate in enumerate(stepwise, 1):
        row: dict[str, float | None] = dict.fromkeys(METRICS, 0.25)
        progress.step(first + step, row | {"task/stepwise_rate": rate})
    progress.close()
    return out.getvalue().splitlines()


def test_a_run_says_once_and_in_words_when_most_responses_have_come_to_write_steps() -> None:
    lines = shown(0.01, 0.49, 0.5, 0.51, 0.4, 0.9)
    assert [line for line in lines if "more than half" in line] == [
        "step 4: more than half of the responses now write steps before they answer (51%; metric task/stepwise_rate)"
    ]
    assert "stepwise 0.490" in lines[1]


def test_a_run_that_begins_so_or_whose_task_names_no_ways_of_answering_says_nothing_of_it() -> None:
    assert not [line for line in shown(0.98, 1.0, 0.99) if "half" in line]
    assert not [line for line in shown(None, None) if "half" in line or "stepwise" in line]


def test_a_run_that_goes_on_says_what_was_not_said_before_and_nothing_twice() -> None:
    (line,) = [line for line in shown(0.6, 0.7, before=(0.1, 0.4)) if "half" in line]
    assert line.startswith("step 3: more than half")
    assert not [line for line in shown(0.4, 0.7, before=(0.1, 0.6)) if "half" in line]
