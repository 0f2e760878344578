"""Whether the starts of a run bring it any further: one that never does would be queued again for ever."""

from __future__ import annotations

import json
from pathlib import Path

from ..files.replace import write_whole
from ..files.run_folder import RunFolder, step_files, step_folders, step_of


def reached(folder: Path) -> list[int]:
    """How far a run has come: its newest checkpoint's step, the furthest step of its journal, and the bytes of that."""
    sizes: dict[int, int] = {}
    for path in step_files(RunFolder(folder).journal):
        if size := path.stat().st_size:
            sizes[step_of(path)] = sizes.get(step_of(path), 0) + size
    # A listing, and not newest_whole: progress is measured by it, nothing resumes from it, and it must never fail.
    saved = step_folders(RunFolder(folder).checkpoints)
    return [max(map(step_of, saved), default=0), *max(sizes.items(), default=(0, 0))]


def idle_starts(folder: Path, before: list[int], goes_on: bool) -> int:
    """How many interrupted starts in a row left the run where it was, with this one, which began at `before`: without a
    further checkpoint and without a finished group.

    Not `goes_on`: what was submitted counts from its own first start.
    """
    record = RunFolder(folder).starts
    try:
        earlier = int(json.loads(record.read_text())["idle"]) if goes_on else 0
    except (OSError, ValueError, KeyError, TypeError):  # a start that was killed left no record
        earlier = 0
    idle = 0 if reached(folder) > before else earlier + 1
    write_whole(record, json.dumps({"idle": idle}) + "\n")
    return idle
