"""Updates that were not finite, and hence not applied: what went into them, and how many came in a row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..batch import Batch
from ..ranks.groups import Ranks
from ..telemetry.rollouts import save_rejected


class Rejected:
    def __init__(self, ranks: Ranks, folder: Path, limit: int) -> None:
        """`folder`: where batches are kept; `limit`: trainer.max_rejected_updates."""
        self.folder, self._ranks, self._limit = folder, ranks, limit
        self._in_a_row = 0  # the same on all ranks
        self.too_many = False

    def keep(self, step: int, batch: Batch, say: Callable[[str], None]) -> None:
        """Saves what went into a step's updates that were not finite. Collective."""
        for number in range(batch.mini_batches):
            self._in_a_row = self._in_a_row + 1 if number in batch.rejected else 0
            self.too_many |= self._in_a_row >= self._limit
            if number in batch.rejected:
                self.save(step, number, batch)
                what = f"step {step}: the update of mini-batch {number} was not finite and was not applied"
                say(f"{what}: its batch is in rejected/")

    def save(self, step: int, mini_batch: int, batch: Batch) -> None:
        """Saves one mini-batch, bit for bit. Collective."""
        if self._ranks.batch_group.rank() == 0:
            save_rejected(self.folder, step, mini_batch, self._ranks.rank, batch)
        self._ranks.agree("rejected", True, all)  # who raises first must not end another's writing

    def state(self) -> dict[str, Any]:
        return {"in_a_row": self._in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        self._in_a_row = state["in_a_row"]
