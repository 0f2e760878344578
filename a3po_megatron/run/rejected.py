"""Updates that were not finite, and hence not applied: what went into them, and how many came in a row."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..batch import Batch
from ..files.run_folder import rejected_file
from ..files.writer import Writer
from ..ranks.groups import Ranks
from ..telemetry.rollouts import rejected_entries, write_rejected


class Rejected:
    def __init__(self, ranks: Ranks, folder: Path, limit: int, writer: Writer) -> None:
        """`folder`: where batches are kept; `limit`: trainer.max_rejected_updates."""
        self.folder, self._ranks, self._limit, self._writer = folder, ranks, limit, writer
        self._in_a_row = 0  # the same on all ranks
        self.too_many = False

    def keep(self, step: int, batch: Batch, say: Callable[[str], None]) -> None:
        """Saves what went into a step's updates that were not finite."""
        for number in range(batch.mini_batches):
            self._in_a_row = self._in_a_row + 1 if number in batch.rejected else 0
            self.too_many |= self._in_a_row >= self._limit
            if number in batch.rejected:
                self.save(step, number, batch)
                what = f"step {step}: the update of mini-batch {number} was not finite and was not applied"
                say(f"{what}: its batch is in rejected/")

    def save(self, step: int, mini_batch: int, batch: Batch) -> None:
        """Saves one mini-batch, bit for bit: beside the run, until `settle`."""
        if self._ranks.batch_group.rank() == 0:
            path = rejected_file(self.folder, step, mini_batch, self._ranks.rank)
            self._writer.put(path, functools.partial(write_rejected, path, rejected_entries(batch, mini_batch)))

    def settle(self) -> None:
        """Returns when all ranks have written what they saved: who raises first must not end another's writing.
        Collective."""
        self._writer.drain()
        self._ranks.agree("rejected", True, all)

    def state(self) -> dict[str, Any]:
        return {"in_a_row": self._in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        self._in_a_row = state["in_a_row"]
