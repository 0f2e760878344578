"""What a step leaves behind for people: its row of metrics, its rollouts, the line of progress, warnings.

Rank 0 writes metrics and the timeline and shows progress; every engine's leaders write their share of its rollouts.
"""

from __future__ import annotations

import functools
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..algorithm.statistics import batch_metrics, batch_sums
from ..batch import Batch, Collected
from ..config import Settings
from ..data.tokenizer import Tokenizer
from ..errors import RunFailed
from ..files.run_folder import RunFolder, rollout_file
from ..files.writer import Writer
from ..ranks.groups import Ranks
from ..ranks.handoff import Handoff
from ..telemetry.alerts import Alerts, Scale, columns, rows_needed
from ..telemetry.catalogue import ELAPSED, PLANNED, RESIDENCY, SECONDS, STARTUP, STEP, Metric, Phase
from ..telemetry.clock import CLOCK
from ..telemetry.metrics import MetricsWriter, read_ends, read_metric
from ..telemetry.progress import ProgressLine, open_console
from ..telemetry.rollouts import rollout_table, write_rollouts
from ..telemetry.timeline import TimelineWriter
from ..telemetry.wandb_run import WandbRun
from .rejected import Rejected


class Recorder:
    def __init__(
        self,
        folder: Path,
        settings: Settings,
        ranks: Ranks,
        tokenizer: Tokenizer,
        rejected: Rejected,
        way_of: Callable[[str], str] | None,  # of a task that names ways of answering
        writer: Writer,
        started: float,  # when the command was given, seconds since the epoch
        first_step: int = 0,
        further: Sequence[Metric] = (),  # metrics beside the catalogue's
        home: Callable[[Batch], Batch] = lambda batch: batch,  # of what was trained on, what was sampled here
        predicted: Mapping[str, int] | None = None,  # bytes of the fullest rank by the plan, in the phases of PLANNED
    ) -> None:
        self._folder, self._settings, self._ranks = RunFolder(folder), settings, ranks
        self._tokenizer, self._rejected, self._way_of = tokenizer, rejected, way_of
        self._started, self._startup = started, 0.0
        self._home, self._writer, self._predicted = home, writer, predicted or {}
        self._stages: dict[str, float] = {}
        self._peak = 0  # bytes of the device
        self._said: set[str] = set()  # alerts
        self.alarm: str | None = None  # why the step that was written last ends the run (alerts.stop), on rank 0
        if ranks.rank == 0:
            self._progress = ProgressLine(settings.trainer.steps, open_console(Handoff.of().console_fd), first_step)
            telemetry, shown = settings.telemetry, settings.model_dump(mode="json")
            wandb = WandbRun(folder, telemetry, shown, self.say) if telemetry.wandb_project else None
            self._metrics = MetricsWriter(folder, telemetry.tensorboard, writer, first_step, further, wandb)
            self._timeline = TimelineWriter(self._folder.timeline, writer)
            self._progress.recall(read_metric(folder, "task/stepwise_rate"))
            scale = Scale.of(settings)
            self._alerts = Alerts(settings.alerts, scale, *read_ends(folder, *rows_needed(settings.alerts, scale)))

    def say(self, text: str) -> None:
        """Shows a line that stays, on rank 0."""
        if self._ranks.rank == 0:
            self._progress.say(text)

    def started(self, step: int) -> None:
        """Takes note that everything is in place, before the first step."""
        self._startup = max(0.0, time.time() - self._started)  # the clock may have been set back
        self._stages = {f"startup/{stage}": CLOCK.seconds.get(stage, 0.0) for stage in STARTUP}
        goes_on = f", goes on at step {step}" if step else ""
        self.say(f"started in {self._startup:.0f} s{goes_on}: {self._settings.trainer.steps - step} steps to go")

    def step(
        self,
        step: int,
        collected: Collected,
        batch: Batch,
        update: Any,
        receipt: Any,
        evaluated: Mapping[str, float | None] | None = None,
    ) -> dict[str, float | None] | None:
        """Has what the step was written down; returns the row of metrics on rank 0, None elsewhere. Collective.

        `update`: what the learner says of it (learner/learner.py); `receipt`: of the publish after it
        (weights/receipt.py); `evaluated`: metrics of the weights that it began with. Raises RunFailed, with the row
        written, when too many updates in a row were not finite.
        """
        self._rejected.keep(step, batch, self.say)
        # The rollouts were sampled by the weights of the publish *before* this step's receipt.
        sums = self._ranks.sum_over_data(batch_sums(batch, receipt.version - 1))
        by_rank: list[dict[str, float]] = []  # on rank 0, which hears all of them to decide

        def slowest(spent: list[dict[str, float]]) -> dict[str, float]:
            by_rank.extend(spent)
            return _slowest(spent)

        seconds = self._ranks.agree("seconds", CLOCK.spent(), slowest)
        elapsed = seconds[ELAPSED]
        memory = self._ranks.agree("memory", CLOCK.bytes | {"peak": self._peak_bytes()}, _largest)
        if self._settings.telemetry.rollouts:
            sampled_here = self._home(batch)
            if self._ranks.rank in self._ranks.engine_leaders:
                self._save_rollouts(step, collected, sampled_here)
        row = None
        if self._ranks.rank == 0:
            sampled = collected.metrics["rollout/tokens"] or 0.0
            values = {
                **collected.metrics,
                **batch_metrics(sums, batch.rho),
                **update.reported,
                "learner/entropy_weight": batch.entropy_weight,
                "learner/lr": update.learning_rate,
                "policy/grad_norm": update.gradient_norm,
                "policy/rejected_updates": float(update.rejected),
                "refit/seconds": receipt.seconds,
                "refit/bytes": receipt.bytes,
                "refit/canary": receipt.canary,
                "refit/canary_mean": receipt.canary_mean,
                "refit/witness": receipt.witness,
                "perf/imbalance": batch.imbalance,
                "perf/padding_share": update.padding,
                "perf/tokens_per_second": sampled / elapsed,
                "perf/learner_idle_share": max(0.0, 1 - (seconds[Phase.SCORE] + seconds[Phase.UPDATE]) / elapsed),
                **{f"{SECONDS}{name}": seconds.get(name, 0.0) for name in STEP},
                "startup/seconds": self._startup,
                **self._stages,
                **{f"memory/{name}_bytes": value for name, value in memory.items()},
                **self._by_plan(memory),
                **(evaluated or {}),
            }
            raised = self._alerts.judge(values)
            row = self._metrics.write(step, values | columns(raised))
            self._timeline.write(step, by_rank)
            self._progress.step(step + 1, row)
            self._tell(step, raised)
        if self._rejected.too_many:
            self._rejected.settle()  # batches, and on rank 0 the row, before any rank ends the run
            raise RunFailed(
                f"step {step}: {self._settings.trainer.max_rejected_updates} updates in a row were not finite "
                f"(trainer.max_rejected_updates); none was applied, and {self._rejected.folder} holds what went into "
                "them"
            )
        return row

    def bytes(self) -> int:
        """Returns the size of metrics.jsonl; 0 on ranks that do not write it."""
        return self._metrics.bytes() if self._ranks.rank == 0 else 0

    def close(self) -> None:
        if self._ranks.rank == 0:
            self._timeline.close()
            self._metrics.close()  # which may have something to say
            self._progress.close()

    def _by_plan(self, memory: Mapping[str, int]) -> dict[str, float | None]:
        """What the plan says of memory, beside what was in use: a CPU's process holds much that is nobody's tensor."""
        on_gpu = self._ranks.backend.device == "cuda"
        row: dict[str, float | None] = {}
        for phase, state in PLANNED.items():
            row[f"memory/predicted_{phase}"] = self._predicted.get(phase)
            row[f"memory/measured_{phase}"] = memory[state] if on_gpu else None
        return row

    def _peak_bytes(self) -> int:
        """The most memory that was in use: of this process on a CPU, else of the device as far as it was looked at."""
        if self._ranks.backend.device == "cpu":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self._peak = max(self._peak, *CLOCK.bytes.values(), torch.cuda.max_memory_reserved())
        return self._peak

    def _save_rollouts(self, step: int, collected: Collected, batch: Batch) -> None:
        # All ranks of a batch group hold its carried-over groups: the first of them, a leader too, writes them down.
        writer = self._ranks.batch_group.rank() == 0
        carried = [group for group in collected.groups if writer and group.rollouts[0].step < step]
        table = rollout_table(
            step,
            [*carried, *collected.sampled],
            set(collected.accepted),
            batch,
            self._settings.telemetry.texts_per_step,
            self._tokenizer.pieces,
            self._way_of,
        )
        path = rollout_file(self._folder.rollouts, step, self._ranks.rank)
        self._writer.put(path, functools.partial(write_rollouts, path, table))

    def _tell(self, step: int, raised: Mapping[str, str]) -> None:
        """Says an alert when it is raised for the first time since the start; one of alerts.stop ends the run."""
        for name, words in raised.items():
            if name not in self._said:
                self._said.add(name)
                self.say(f"alert {name} at step {step}: {words}")
        ending = (f"alert {name}: {raised[name]}" for name in self._settings.alerts.stop if name in raised)
        self.alarm = next(ending, None)


def _largest(by_rank: list[dict[str, int]]) -> dict[str, int]:
    return {name: max(values.get(name, 0) for values in by_rank) for name in ("peak", *RESIDENCY)}


def _slowest(by_rank: list[dict[str, float]]) -> dict[str, float]:
    """A phase lasts as long as its slowest rank."""
    return {name: max(seconds.get(name, 0.0) for seconds in by_rank) for name in (*STEP, ELAPSED)}
