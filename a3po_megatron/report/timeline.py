"""What the page draws of where each rank's seconds went: of timeline.jsonl (telemetry/timeline.py), the mean over the
run and as many steps as the page takes.

The mean is over all rows, of the ranks that stand in each of them: of a large world those are the ranks evenly spread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..telemetry.catalogue import PARTS
from .charts import short

DIGITS = 3  # of a number of seconds
VALUES = 60_000  # embedded at most, of all runs together; about 5 bytes each

Row = Mapping[str, Any]


def timeline_of(rows: Mapping[int, Row], limit: int) -> tuple[dict[str, Any] | None, list[str]]:
    """Returns what the page embeds of a run's rows, of at most about `limit` values, and what to say of the rest; None
    for a run without rows."""
    if not rows:
        return None, []
    parts = [str(name) for name in PARTS if any(any(row[name]) for row in rows.values())]
    each = len(parts) * max(len(row["ranks"]) for row in rows.values())
    stride = -(-len(rows) * each // max(limit, each))
    steps = list(rows)[::stride]
    worlds = [row["world"] for row in rows.values()]
    notes = []
    if stride > 1:
        notes.append(f"The timeline shows every {stride}th of {len(rows)} steps, to keep the page small.")
    if any(len(row["ranks"]) < row["world"] for row in rows.values()):
        notes.append(
            f"The timeline shows {len(rows[steps[-1]]['ranks'])} of {worlds[-1]} ranks: of each step the one that "
            "worked longest, the one that worked shortest, and others evenly spread; of the mean only those."
        )
    return {
        "parts": parts,
        "mean": _mean(rows, parts),
        "steps": [{"step": step, **_drawn(rows[step], parts)} for step in steps],
    }, notes


def _drawn(row: Row, parts: list[str]) -> dict[str, Any]:
    """The ranks of a row, and of each its seconds, part by part."""
    values = [[short(seconds, DIGITS) for seconds in rank] for rank in zip(*(row[name] for name in parts), strict=True)]
    return {"ranks": row["ranks"], "values": values, "slowest": row["slowest"], "fastest": row["fastest"]}


def _mean(rows: Mapping[int, Row], parts: list[str]) -> dict[str, Any]:
    always = sorted(set.intersection(*(set(row["ranks"]) for row in rows.values())))
    totals = {rank: [0.0] * len(parts) for rank in always}
    for row in rows.values():
        place = {rank: number for number, rank in enumerate(row["ranks"])}
        for rank, total in totals.items():
            for number, name in enumerate(parts):
                total[number] += row[name][place[rank]]
    values = [[short(total / len(rows), DIGITS) for total in totals[rank]] for rank in always]
    return {"ranks": always, "values": values}
