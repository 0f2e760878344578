"""Whether the starts of a run bring it any further: one that never does would be queued again for ever."""

from __future__ import annotations

import json
from pathlib import Path

from ..run.journal import journal_files
from ..run.manifest import saved_steps, step_of

RECORD = "starts.json"  # in logs/


def reached(folder: Path) -> list[int]:
    """How far a run has come: its newest checkpoint's step, the furthest step of its journal, and the bytes of that."""
    sizes: dict[int, int] = {}
    for path in journal_files(folder / "journal"):
        if size := path.stat().st_size:
            step = int(path.name[5:].partition(".")[0])
            sizes[step] = sizes.get(step, 0) + size
    return [max(map(step_of, saved_steps(folder / "checkpoints")), default=0), *max(sizes.items(), default=(0, 0))]


def idle_starts(folder: Path, before: list[int], goes_on: bool) -> int:
    """How many interrupted starts in a row left the run where it was, with this one, which began at `before`: without a
    further checkpoint and without a finished group.

    Not `goes_on`: what was submitted counts from its own first start.
    """
    record = folder / "logs" / RECORD
    try:
        earlier = int(json.loads(record.read_text())["idle"]) if goes_on else 0
    except (OSError, ValueError, KeyError, TypeError):  # a start that was killed left no record
        earlier = 0
    idle = 0 if reached(folder) > before else earlier + 1
    partial = record.with_suffix(".partial")
    partial.write_text(json.dumps({"idle": idle}) + "\n")
    partial.replace(record)
    return idle
