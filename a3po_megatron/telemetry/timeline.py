"""`timeline.jsonl`: where each rank's seconds of a step went, one object a step, written by rank 0.

    {"step": 3, "seconds": 12.31, "world": 2, "slowest": 1, "fastest": 0, "ranks": [0, 1], "rollout": [4.1, 5.2], …}

A list for each part of a step (catalogue.py, PARTS) has an entry for each of `ranks`. The parts of a rank add up to its
seconds of the step, the checkpoint of the step before among them: a row is written before its own. `seconds` are those
of the rank that took longest.

The numbers come to rank 0 with the phases of the row of metrics: there is no further decision of all ranks. Of more
than LIMIT ranks those stand there that worked longest and shortest in this step, and others evenly spread over all,
which are the same ones in every step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..files.replace import write_whole
from ..files.writer import Writer
from .catalogue import ELAPSED, IDLE, PARTS, REST, STEP, WAITING, Phase

LIMIT = 64  # ranks in a row
_DIGITS = 4  # of a second


def parts_of(spent: Mapping[str, float]) -> dict[str, float]:
    """Returns the seconds of each part of a rank's step, from what its clock says (`Clock.spent`)."""
    inside = sum(spent.get(name, 0.0) for name in STEP if name != Phase.CHECKPOINT)
    parts = {str(name): spent.get(name, 0.0) for name in PARTS}
    sampling = parts[Phase.ROLLOUT] - spent[IDLE]
    return parts | {str(Phase.ROLLOUT): sampling, WAITING: spent[IDLE], REST: spent[ELAPSED] - inside}


def timeline_row(step: int, by_rank: Sequence[Mapping[str, float]]) -> dict[str, int | float | list[int] | list[float]]:
    """Returns the row of a step, from what the clocks of all ranks say."""
    parts = [parts_of(spent) for spent in by_rank]
    worked = [sum(seconds for name, seconds in each.items() if name not in (WAITING, REST)) for each in parts]
    slowest, fastest = worked.index(max(worked)), worked.index(min(worked))
    ranks = chosen_ranks(len(parts), slowest, fastest)
    return {
        "step": step,
        "seconds": round(max(sum(each.values()) for each in parts), _DIGITS),
        "world": len(parts),
        "slowest": slowest,
        "fastest": fastest,
        "ranks": ranks,
        **{str(name): [round(parts[rank][name], _DIGITS) for rank in ranks] for name in PARTS},
    }


def chosen_ranks(world: int, slowest: int, fastest: int) -> list[int]:
    """Returns the ranks that a row has, ascending."""
    if world <= LIMIT:
        return list(range(world))
    spread = LIMIT - 2
    return sorted({number * (world - 1) // (spread - 1) for number in range(spread)} | {slowest, fastest})


class TimelineWriter:
    def __init__(self, path: Path, writer: Writer) -> None:
        self._path, self._writer = path, writer
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, by_rank: Sequence[Mapping[str, float]]) -> None:
        """Has the row of a step written."""
        self._writer.put(self._path, lambda: self._append(json.dumps(timeline_row(step, by_rank)) + "\n"))

    def _append(self, line: str) -> None:
        """Of the writer's thread alone."""
        self._file.write(line)
        self._file.flush()

    def close(self) -> None:
        self._writer.drain()
        self._file.close()


def cut_timeline(path: Path, step: int) -> None:
    """Leaves the rows before `step`, at which a run resumes: it writes the others anew.

    To do it twice changes nothing, whatever a start was killed between. From a row on that is not whole all are gone:
    of them only times are lost.
    """
    if not path.exists():  # a new run, or one that an older version began
        return
    lines = path.read_bytes().splitlines(keepends=True)
    count = next((number for number, line in enumerate(lines) if not _is_before(line, step)), len(lines))
    if count < len(lines):
        write_whole(path, b"".join(lines[:count]))


def _is_before(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and bool(json.loads(line)["step"] < step)
    except (ValueError, KeyError, TypeError):
        return False
