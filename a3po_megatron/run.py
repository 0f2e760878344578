"""A run and its folder: publish, record, and what a step leaves behind.

    config.yaml  provenance.json  metrics.jsonl  rollouts/  logs/  tensorboard/  checkpoints/step-N/  hf/step-N/

The launcher makes the folder (launch/folder.py); every rank opens it here. Rank 0 writes metrics and shows progress;
every engine's leaders write their share of its rollouts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from .algorithm.statistics import batch_metrics, batch_sums
from .batch import Batch, Collected
from .checkpoint.folder import Written, digest_of, partial_of, save_digests, whole_folder
from .checkpoint.store import save_sharded
from .checkpoint.torch_dist import INDEXES
from .cluster import Cluster, sum_lists
from .config import Config
from .data.prompts import Prompts
from .data.tokens import Tokens
from .errors import RunFailed
from .learner.learner import Learner
from .model.build import DTYPES
from .model.family import Family
from .model.files import HF, copy_side_files
from .model.layout import layout_of
from .rollout.engine import Engine, local_experts
from .telemetry.clock import CLOCK, phase
from .telemetry.metrics import MetricsWriter
from .telemetry.progress import ProgressLine, open_console
from .telemetry.rollouts import save_rejected, save_rollouts
from .weights.load import all_finite
from .weights.publish import Publisher
from .weights.receipt import Receipt

INERT_WARNING = 0.95
MANIFEST = "manifest.json"  # last of a checkpoint's files: one without it is not whole


class Run:
    def __init__(
        self, folder: Path, config: Config, cluster: Cluster, family: Family, tokens: Tokens, prompts: Prompts
    ) -> None:
        self.folder, self.config, self.cluster, self.tokens = folder, config, cluster, tokens
        layout = layout_of(config.parallel, cluster.backend.spec)
        canary = [prompts.at(number).tokens for number in range(config.publish.canary_prompts)]
        rollout, experts = config.rollout, family.experts.count if family.experts else 0

        def engine_experts(rank: int) -> tuple[int, int]:
            return local_experts(rank, rollout.tensor, rollout.expert, experts)

        self.publisher = Publisher(cluster, family, layout, config.publish, canary, engine_experts)
        self._started = float(os.environ.get("A3PO_STARTED", time.time()))
        self._startup: float | None = None
        self._step_start = time.perf_counter()
        self._saving = 0.0  # seconds of the checkpoint after the step before: a step's row is written before its own
        self._rejected = 0  # updates in a row that were not finite
        self._gave_up = False  # too many of them
        self._warned = False
        if cluster.rank == 0:
            self._metrics = MetricsWriter(folder, config.telemetry.tensorboard)
            self._progress = ProgressLine(config.trainer.steps, open_console())

    def steps(self) -> Iterator[int]:
        """The steps still to do."""
        self._startup = time.time() - self._started
        if self.cluster.rank == 0:
            self._progress.say(f"started in {self._startup:.0f} s: {self.config.trainer.steps} steps to go")
        for step in range(self.config.trainer.steps):
            CLOCK.begin(step)
            self._step_start = time.perf_counter()
            yield step

    def publish(self, learner: Learner, engine: Engine) -> Receipt:
        """The learner's weights into the engine, with proof."""
        options, model = self.config.publish, self.config.model
        receipt = self.publisher.publish(learner.parameters(), learner.logprobs, engine)
        first, every = receipt.version == 1 and options.witness_at_start, options.witness_every
        if options.canary_prompts and (first or (every and receipt.version % every == 0)):
            scratch = self.folder / "witness"
            witness = self.publisher.witness(learner.parameters(), DTYPES[model.dtype], Path(model.path), scratch)
            receipt = dataclasses.replace(receipt, witness=witness)
            if self.cluster.rank == 0:
                self._progress.say(f"publish {receipt.version}: learner and transformers agree to {witness:.1e}")
        return receipt

    def checkpoint(self, step: int, learner: Learner) -> None:
        """Saves the weights after a step where that is due, and after the last one."""
        done, options, model = step + 1, self.config.checkpoint, self.config.model
        last, start = done == self.config.trainer.steps, time.perf_counter()
        with phase("checkpoint"):
            if last or done % options.every_steps == 0:
                self._save(self.folder / "checkpoints" / f"step-{done:06d}", done, learner)
            if options.export_hf_every and (last or done % options.export_hf_every == 0):
                target = self.folder / "hf" / f"step-{done:06d}"
                self.publisher.export(learner.parameters(), DTYPES[model.dtype], Path(model.path), target)
        self._saving = time.perf_counter() - start

    def _save(self, target: Path, done: int, learner: Learner) -> None:
        """A Megatron checkpoint with what makes it a model: it appears whole or not at all."""
        broken = [name for (_, name), p in learner.parameters().items() if not all_finite(p.detach())]
        if found := self.cluster.agree("finite weights", broken, sum_lists):
            raise RunFailed(f"step {done - 1}: {found[0]} holds a value that is not finite: nothing is saved")
        with contextlib.ExitStack() as stack:
            if self.cluster.rank == 0:
                stack.enter_context(whole_folder(target))
            self.cluster.agree("checkpoint folder", True, all)
            partial = partial_of(target)
            save_sharded(learner.sharded_state(), partial)
            mine = [digest_of(path) for path in sorted(partial.glob(f"__{self.cluster.rank}_*.distcp"))]
            written = self.cluster.agree("checkpoint files", [dataclasses.asdict(file) for file in mine], sum_lists)
            if self.cluster.rank == 0:
                copy_side_files(Path(self.config.model.path), partial / HF, self.config.model.dtype)
                manifest = {"step": done, "weight_version": self.publisher.version}
                (partial / MANIFEST).write_text(json.dumps(manifest) + "\n")
                save_digests(partial, [Written(**file) for file in written], [*INDEXES, MANIFEST])
        self.cluster.agree("checkpoint", True, all)

    def record(
        self, step: int, collected: Collected, batch: Batch, stats: dict[str, float | None], receipt: Receipt
    ) -> dict[str, float | None] | None:
        """Writes down what the step was; returns the row of metrics on rank 0, None elsewhere.

        Raises RunFailed, with the row written, when too many updates in a row were not finite.
        """
        # The rollouts were sampled by the weights of the publish *before* this step's receipt.
        sums = self.cluster.sum_over_data(batch_sums(batch, receipt.version - 1))
        seconds = self.cluster.agree("seconds", CLOCK.seconds | {"checkpoint": self._saving}, _slowest)
        elapsed = self.cluster.agree("step seconds", time.perf_counter() - self._step_start, max)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        memory = self.cluster.agree("peak memory", peak, max)
        if self.config.telemetry.rollouts and self.cluster.rank in self.cluster.engine_leaders:
            self._save_rollouts(step, collected, batch)
        row = None
        if self.cluster.rank == 0:
            sampled = collected.metrics["rollout/tokens"] or 0.0
            row = self._metrics.write(
                step,
                {
                    **collected.metrics,
                    **batch_metrics(sums, batch.rho),
                    **stats,
                    "refit/seconds": receipt.seconds,
                    "refit/bytes": receipt.bytes,
                    "refit/canary": receipt.canary,
                    "refit/witness": receipt.witness,
                    "perf/tokens_per_second": sampled / elapsed,
                    **{f"perf/seconds_{name}": seconds.get(name, 0.0) for name in _PHASES},
                    "startup/seconds": self._startup,
                    "memory/peak_bytes": memory,
                },
            )
            self._progress.step(step + 1, row)
            self._warn(row)
        if self._gave_up:
            self.cluster.agree("the last row", True, all)  # rank 0 writes it before any rank ends the run
            raise RunFailed(
                f"step {step}: {self.config.trainer.max_rejected_updates} updates in a row were not finite "
                f"(trainer.max_rejected_updates); none was applied, and {self.folder / 'rejected'} holds what went "
                "into them"
            )
        return row

    def keep_scored(self, step: int, batch: Batch) -> None:
        """Raises RunFailed for old log-probs that are not finite, with the batch saved: its weights are broken."""
        assert batch.old_logprobs is not None and batch.entropy is not None, "score the batch first"
        sound = bool(torch.isfinite(batch.old_logprobs).all()) and bool(torch.isfinite(batch.entropy).all())
        if self.cluster.agree("scores", not sound, any):
            for number in range(batch.mini_batches):
                self._save_rejected(step, number, batch)
            raise RunFailed(
                f"step {step}: the learner's log-probs are not finite: its weights cannot be trusted; "
                f"{self.folder / 'rejected'} holds the batch"
            )

    def keep_rejected(self, step: int, batch: Batch) -> None:
        """Saves what went into updates that were not finite; `record` ends the run when too many came in a row."""
        for number in range(batch.mini_batches):
            self._rejected = self._rejected + 1 if number in batch.rejected else 0  # the same on all ranks
            self._gave_up |= self._rejected >= self.config.trainer.max_rejected_updates
            if number in batch.rejected:
                self._save_rejected(step, number, batch)
                if self.cluster.rank == 0:
                    what = f"step {step}: the update of mini-batch {number} was not finite and was not applied"
                    self._progress.say(f"{what}: its batch is in rejected/")

    def _save_rejected(self, step: int, mini_batch: int, batch: Batch) -> None:
        if self.cluster.batch_group.rank() == 0:
            save_rejected(self.folder / "rejected", step, mini_batch, self.cluster.rank, batch)
        self.cluster.agree("rejected", True, all)  # who raises first must not end another's writing

    def close(self) -> None:
        if self.cluster.rank == 0:
            self._progress.close()
            self._metrics.close()

    def _save_rollouts(self, step: int, collected: Collected, batch: Batch) -> None:
        # All ranks of a batch group hold its carried-over groups: the first of them, a leader too, writes them down.
        writer = self.cluster.batch_group.rank() == 0
        carried = [group for group in collected.groups if writer and group.rollouts[0].step < step]
        accepted = set(collected.accepted)
        save_rollouts(
            self.folder / "rollouts",
            step,
            self.cluster.rank,
            [*carried, *collected.sampled],
            accepted,
            batch,
            self.config.telemetry.texts_per_step,
            self.tokens.pieces,
        )

    def _warn(self, row: dict[str, float | None]) -> None:
        """Says once when shaping scales tokens that have no gradient to scale."""
        for side in ("positive", "negative"):
            rate = row[f"shaping/inert_rate_{side}"]
            if not self._warned and rate is not None and rate > INERT_WARNING:
                self._warned = True
                self._progress.say(
                    f"warning: {rate:.0%} of the shaped tokens of {side} rollouts have 1 - p < 1e-4: weighting them "
                    "changes next to nothing on this task (metric shaping/inert_rate)"
                )


_PHASES = ("rollout", "reward", "score", "update", "publish", "checkpoint")


def _slowest(by_rank: list[dict[str, float]]) -> dict[str, float]:
    """A phase lasts as long as its slowest rank."""
    return {name: max(seconds.get(name, 0.0) for seconds in by_rank) for name in _PHASES}
