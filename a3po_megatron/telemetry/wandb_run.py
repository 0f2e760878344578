"""Weights & Biases beside metrics.jsonl: the same rows, sent by rank 0 (`telemetry.wandb_project`).

What is sent: each row of metrics, the settings of the run, and what W&B notes of the machine. No text of a rollout, no
line of a log, no code. The step of a row is a value like the others, and what charts are drawn over: a run that resumes
does steps again, and W&B refuses rows whose own count goes back.

A run folder has one id, made at its first start and kept in wandb/id, by which every later start resumes the same run
of W&B. A thread hands rows to a process of W&B's, which buffers them on the disk (wandb/) while its server cannot be
reached. Should that process fail, or take no more rows, nothing more is sent, which is said once, and the run goes on:
metrics.jsonl has all.
"""

from __future__ import annotations

import queue
import secrets
import threading
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..config import TelemetryOptions
from ..errors import RequestError
from ..files.replace import write_whole
from ..files.run_folder import RunFolder

WAITING_ROWS = 64  # that W&B has not taken yet; with more of them it counts as failed
END_SECONDS = 10.0  # that the end of a run waits for what is still to be sent; a job that is interrupted has no more


def check_wandb(options: TelemetryOptions) -> None:
    """Raises RequestError where W&B is asked for and not installed."""
    if options.wandb_project and find_spec("wandb") is None:
        raise RequestError(
            f"telemetry.wandb_project = {options.wandb_project}: the package wandb is not installed: pip install "
            '"a3po-megatron[wandb]", or leave the option out'
        )


class WandbRun:
    """A run of W&B, for as long as this start lasts."""

    def __init__(
        self, folder: Path, options: TelemetryOptions, settings: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        """Begins or resumes it. `settings`: as they are shown there. Raises RequestError where W&B takes it not."""
        import wandb

        self._failures: tuple[type[Exception], ...] = (wandb.errors.Error, OSError)
        self._say, self._failed = say, False
        try:
            self._run: Any = wandb.init(
                project=options.wandb_project,
                entity=options.wandb_entity or None,
                mode=options.wandb_mode,
                id=run_id(folder),
                name=folder.resolve().name,
                dir=str(folder.resolve()),
                resume="allow",
                config=dict(settings),
                allow_val_change=True,  # what may change between two starts
                settings=wandb.Settings(
                    console="off",  # a log may hold texts
                    disable_code=True,
                    save_code=False,
                    finish_timeout=END_SECONDS,
                ),
            )
        except self._failures as error:
            raise RequestError(
                f"telemetry.wandb_project = {options.wandb_project}: W&B cannot begin a run: {error}. Set "
                "WANDB_API_KEY, or telemetry.wandb_mode: offline, which writes to the run folder what `wandb sync` "
                "sends later"
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._rows: queue.Queue[dict[str, float] | None] = queue.Queue(WAITING_ROWS)
        self._thread = threading.Thread(target=self._send, name="wandb", daemon=True)
        self._thread.start()

    def add(self, row: Mapping[str, float | None]) -> None:
        """Hands over a row of metrics, without those that are undefined. Never waits."""
        self._put({name: value for name, value in row.items() if value is not None})

    def close(self) -> None:
        """Waits for what is still to be sent, and not for long."""
        self._put(None)
        if not self._failed:
            self._thread.join(2 * END_SECONDS)  # of which W&B itself takes half at most
            if self._thread.is_alive():
                self._fail("its process does not answer")

    def _put(self, row: dict[str, float] | None) -> None:
        if not self._failed:
            try:
                self._rows.put_nowait(row)
            except queue.Full:
                self._fail(f"{WAITING_ROWS} rows wait for its process")

    def _send(self) -> None:
        """Of the thread alone: until the run closes, or W&B fails."""
        try:
            while (row := self._rows.get()) is not None:
                self._run.log(row)
            self._run.finish()
        except self._failures as error:
            self._fail(str(error))

    def _fail(self, why: str) -> None:
        if not self._failed:
            self._failed = True
            self._say(f"W&B fails ({why}): nothing more is sent to it in this start; metrics.jsonl has every row")


def run_id(folder: Path) -> str:
    """Returns the id of the run in a folder, which is made where there is none yet."""
    path = RunFolder(folder).wandb_id
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_whole(path, f"{secrets.token_hex(8)}\n")
    return path.read_text().strip()
