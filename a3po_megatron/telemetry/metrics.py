"""`metrics.jsonl` (one flat object a step, `step` first), TensorBoard and W&B, written by rank 0.

Every metric of the catalogue stands in every row. A value that is not finite is an error here rather than invalid JSON
in a file.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import RunFailed
from ..files.run_folder import RunFolder
from ..files.writer import Writer
from .catalogue import METRICS, Metric
from .wandb_run import WandbRun


def read_metric(folder: Path, name: str) -> list[float | None]:
    """A metric in each row that stands there; a run that an older version began may lack it."""
    path = RunFolder(folder).metrics
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line).get(name) for line in lines]


def read_ends(folder: Path, first: int, last: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns so many of the first rows that stand there, and of the last ones; fewer where there are fewer."""
    path = RunFolder(folder).metrics
    beginning: list[str] = []
    latest: deque[str] = deque(maxlen=last)
    if path.exists():
        with path.open(encoding="utf-8") as file:
            for line in file:
                if len(beginning) < first:
                    beginning.append(line)
                latest.append(line)
    return [json.loads(line) for line in beginning], [json.loads(line) for line in latest]


class MetricsWriter:
    def __init__(
        self,
        folder: Path,
        tensorboard: bool,
        writer: Writer,
        first_step: int = 0,
        further: Sequence[Metric] = (),  # metrics beside the catalogue's, in every row behind them
        wandb: WandbRun | None = None,
    ) -> None:
        run = RunFolder(folder)
        self._writer, self._path, self._wandb = writer, run.metrics, wandb
        self._names = (*METRICS, *(metric.name for metric in further))
        self._file = run.metrics.open("a", encoding="utf-8")
        self._bytes = self._file.tell()
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run.tensorboard), purge_step=first_step)

    def write(self, step: int, values: dict[str, float | None]) -> dict[str, float | None]:
        """Has one row written with every metric, in the fixed order; returns it."""
        if unknown := values.keys() - set(self._names):
            raise KeyError(f"not in telemetry/catalogue.py: {sorted(unknown)}")
        row: dict[str, float | None] = {"step": step}
        for name in self._names:
            value = values.get(name)
            if value is not None and not math.isfinite(value):
                raise RunFailed(f"step {step}: the metric {name} is {value}")
            row[name] = value
        line = json.dumps(row) + "\n"
        self._bytes += len(line)  # ASCII
        self._writer.put(self._path, lambda: self._append(step, line, dict(row)))
        return row

    def _append(self, step: int, line: str, row: dict[str, float | None]) -> None:
        """Of the writer's thread alone."""
        self._file.write(line)
        self._file.flush()
        if self._board is not None:
            for name in self._names:
                if (value := row[name]) is not None:
                    self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.add(row)

    def bytes(self) -> int:
        """The size of metrics.jsonl with all rows that were given."""
        return self._bytes

    def close(self) -> None:
        self._writer.drain()
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.close()
