"""As many experiments as fit into so many seconds, shortest first: what is decided soonest comes first, and a device
that is only lent for a while has shown something when it goes.

What an earlier run has shown on this device with these versions is not done again. An experiment begins only if the
seconds that it is expected to take are left, and ends with the budget: what that cut off has failed at nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .runner import Experiment, run

Record = dict[str, Any]


def unproven(experiments: Sequence[Experiment], before: Mapping[str, Mapping[str, Any]]) -> list[Experiment]:
    """Those that `before` (id → record) does not say `shown` of, the shortest first."""
    left = [e for e in experiments if before.get(e.id, {}).get("status") != "shown"]
    return sorted(left, key=lambda e: e.expected)


def run_within(
    seconds: float,
    experiments: Sequence[Experiment],  # in the order in which they are to be done
    lacks: Mapping[str, str],
    keep: Callable[[str, Record], None],  # gets every record as soon as it is there
    tell: Callable[[str], None],
    limit: float | None = None,
    logs: Path | None = None,
) -> dict[str, Record]:
    """Id → record of what was done, or left out; what there was no time for is told, and has none."""
    end, records = time.monotonic() + seconds, {}
    for experiment in experiments:
        missing = any(need in lacks for need in experiment.needs)
        left = end - time.monotonic()
        if not missing and left < experiment.expected:
            tell(f"{experiment.id:4}{'not begun':10}{experiment.expected:5.0f} s expected, {max(left, 0):.0f} s left")
            continue
        own = limit or experiment.seconds
        record = run(experiment, lacks, min(own, left) if not missing else own, logs)
        if record["cut"] and left < own:
            why = f"the budget ended after {record['seconds']:.0f} s of it"
            record |= {"status": "left out", "reason": why, "headline": why}
        records[experiment.id] = record
        keep(experiment.id, record)
        decides = experiment.decides or experiment.title
        tell(f"{experiment.id:4}{record['status']:10}{record['seconds']:7.1f} s  {decides}: {record['headline']}")
    return records
