"""A whole run whose ranks listen to who of their threads writes to the run folder within a step."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from a3po_megatron.telemetry.catalogue import Phase
from a3po_megatron.telemetry.clock import CLOCK
from tests.distributed import cases_runs
from tests.harness.file_counts import heard
from tests.harness.ranks import CaseRanks


def heard_of(folder: Path, rank: int) -> Path:
    """Where a rank's list is: thread, kind, path, a line each."""
    return folder.with_name(f"heard-{rank}")


def trains_heard(ranks: CaseRanks) -> None:
    folder, lines = Path(os.environ[cases_runs.FOLDER]).resolve(), list[str]()

    def listen(kind: str, path: str) -> None:
        # From a step's start to its checkpoint, which all ranks have agreed on when they come to its phase.
        if path.startswith(str(folder)) and kind not in ("open", "list"):
            thread = threading.current_thread()
            name = "main" if thread is threading.main_thread() else thread.name
            if CLOCK.step >= 0 and (name != "main" or CLOCK.current != Phase.CHECKPOINT):
                lines.append(f"{name}\t{kind}\t{path}")

    with heard(listen):
        cases_runs.trains(ranks)
    heard_of(folder, ranks.rank).write_text("".join(f"{line}\n" for line in lines))
