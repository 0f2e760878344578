"""A run and its folder: publish, record, save, and what a step leaves behind.

    config.yaml  provenance.json  metrics.jsonl  rollouts/  logs/  tensorboard/  checkpoints/  journal/  hf/  rejected/

The launcher makes the folder (launch/folder.py); every rank opens it here. Rank 0 writes metrics and shows progress;
every engine's leaders write their share of its rollouts.

What must survive a restart is declared here, in `inventory`, and in a _Boundary: the state between two steps. Weights
and optimizer are saved as they are at such a boundary; what a step finished since then is in the journal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..algorithm.statistics import batch_metrics, batch_sums
from ..batch import Batch, Collected, Group
from ..config import Config
from ..data.prompts import Prompts
from ..data.tokens import Tokens
from ..errors import Interrupted, RequestError, RunFailed
from ..files.hashed import HashedFile, Written, digest_of, partial_of, sync, whole_folder
from ..files.side_files import HF, copy_side_files
from ..files.torch_dist import indexes
from ..learner.learner import Learner
from ..model.build import DTYPES
from ..model.facts import ModelFacts
from ..model.layout import layout_of
from ..model.precision import is_fp8
from ..ranks.agree import first, same, sum_lists
from ..ranks.groups import Cluster
from ..ranks.handoff import Handoff
from ..rollout.engine import Engine, local_experts
from ..rollout.intake import Collector
from ..telemetry.clock import CLOCK, phase
from ..telemetry.metrics import RESIDENCY, STARTUP, MetricsWriter, read_metric
from ..telemetry.progress import ProgressLine, open_console
from ..telemetry.rollouts import save_rejected, save_rollouts
from ..weights.load import all_finite
from ..weights.publish import Publisher
from ..weights.receipt import Receipt
from .background import Background
from .journal import read_frames, read_group, write_group, write_verdicts
from .manifest import (
    MANIFEST,
    Manifest,
    Stateful,
    inputs_of,
    name_latest,
    prune,
    read_manifest,
    saved_steps,
    step_of,
)
from .stop import Interrupt
from .store import Saving, Share
from .streams import random_state, restore_random_state

INERT_WARNING = 0.95
BYTES_PER_PARAMETER, ASSUMED_BYTES_PER_SECOND = 12, 100e6  # of a save: float32 weights and both moments of Adam


def resumed_from(folder: Path, cluster: Cluster) -> Path | None:
    """The checkpoint that a run goes on from, the newest that the launcher left; None: it begins anew.

    Rank 0 says which: another node's file system may still show the folder as it was. Raises RunFailed if one does not
    have it as rank 0 does.
    """
    newest = saved_steps(folder / "checkpoints")[-1:]
    name = cluster.agree("checkpoint", newest[0].name if newest else None, _of_rank_0)
    if name is None:
        return None
    checkpoint = folder / "checkpoints" / str(name)
    manifest = checkpoint / MANIFEST
    cluster.agree(f"{name}/{MANIFEST}", digest_of(manifest).blake3 if manifest.exists() else "missing", same)
    return checkpoint


def leave_if_told(folder: Path, cluster: Cluster, interrupt: Interrupt) -> None:
    """Between the parts of a start, each of which may take minutes of a signal's lead. Raises Interrupted."""
    if reason := cluster.agree("leave while starting", interrupt.due(), first):
        raise Interrupted(f"{folder}: interrupted by {reason} while it started; the same command starts it again")


@dataclass(frozen=True)
class _Boundary:
    """Everything but weights and optimizer, as it was between two steps."""

    step: int  # steps done
    weight_version: int  # that the engines hold
    state: dict[str, dict[str, Any]]  # of the inventory, the same on all ranks
    held: list[Group]  # carried over, on this rank
    random: dict[str, Any]  # this rank's streams
    metrics_bytes: int


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written."""

    step: int
    saving: Saving
    background: Background


class Run:
    def __init__(
        self,
        folder: Path,
        config: Config,
        cluster: Cluster,
        facts: ModelFacts,
        tokens: Tokens,
        prompts: Prompts,
        collect: Collector,
        learner: Learner,
        checkpoint: Path | None = None,  # where the run goes on from; the learner has its share
    ) -> None:
        self.folder, self.config, self.cluster, self.tokens = folder, config, cluster, tokens
        self.collect, self.journal, self.interrupt = collect, collect.journal, collect.interrupt
        # What all ranks know alike and must survive a restart. Later parts register here.
        self.inventory: dict[str, Stateful] = {
            "prompts": prompts,
            "collector": collect,
            "learner": learner,
            "rejected": self,
        }
        layout = layout_of(config.parallel, cluster.backend.spec)
        canary = [prompts.at(number).tokens for number in range(config.publish.canary_prompts)]
        rollout, experts = config.rollout, facts.experts.count if facts.experts else 0

        def engine_experts(rank: int) -> tuple[int, int]:
            return local_experts(rank, rollout.tensor, rollout.expert, experts)

        fp8 = is_fp8(config.learner.precision)
        self.publisher = Publisher(cluster, facts, layout, config.publish, canary, engine_experts, fp8)
        self._started = Handoff.of().started or time.time()
        self._startup: float | None = None
        self._stages: dict[str, float] = {}
        self._step_start = time.perf_counter()
        self._saving = 0.0  # seconds of the checkpoint after the step before: a step's row is written before its own
        self._peak = 0  # bytes of the device
        self._rejected = 0  # updates in a row that were not finite
        self._gave_up = False  # too many of them
        self._warned = False
        self._way_of = prompts.way_of
        self._scored_before = False  # the batch of this step, by a run that was interrupted after that
        self._pending: _Pending | None = None
        self._streams: dict[str, Any] | None = None  # as the run left them, for the first step's beginning
        self._inputs = inputs_of(config) if cluster.rank == 0 else {}  # as they are when the run reads them
        first_step = 0 if checkpoint is None else self._resume(checkpoint, prompts)
        self._saved = first_step  # the step of the last checkpoint that is in place
        if cluster.rank == 0:
            self._metrics = MetricsWriter(folder, config.telemetry.tensorboard, first_step)
            self._progress = ProgressLine(config.trainer.steps, open_console(Handoff.of().console_fd), first_step)
            self._progress.recall(read_metric(folder, "task/stepwise_rate"))
        self._boundary = self._state(first_step)
        share = sum(p.numel() for p in learner.parameters().values()) * BYTES_PER_PARAMETER
        self.interrupt.observe({"save": share / ASSUMED_BYTES_PER_SECOND})  # until one was measured
        self.interrupt.recall(folder)
        self.interrupt.limit(config.checkpoint.time_limit_seconds, max(0.0, time.time() - self._started))

    def steps(self) -> Iterator[int]:
        """The steps still to do."""
        self._startup = max(0.0, time.time() - self._started)  # the clock may have been set back
        start, steps = self._boundary.step, self.config.trainer.steps
        self._stages = {f"startup/{stage}": CLOCK.seconds.get(stage, 0.0) for stage in STARTUP}
        if self.cluster.rank == 0:
            goes_on = f", goes on at step {start}" if start else ""
            self._progress.say(f"started in {self._startup:.0f} s{goes_on}: {steps - start} steps to go")
        if leave := self.cluster.agree("leave at the start", self.interrupt.due("score"), first):
            raise Interrupted(leave)
        if self._streams is not None:  # not before: publish, canary and witness of a start may draw, too
            restore_random_state(self._streams)
        for step in range(start, steps):
            CLOCK.begin(step)
            self._step_start = time.perf_counter()
            yield step

    def _resume(self, checkpoint: Path, prompts: Prompts) -> int:
        """Restores everything but weights and optimizer; returns the step to go on with."""
        manifest = read_manifest(checkpoint)
        if unlike := sorted(manifest.state.keys() ^ self.inventory.keys()):
            raise RequestError(
                f"{checkpoint}: it holds the state of {', '.join(manifest.state)}, this version needs that of "
                f"{', '.join(self.inventory)}: {', '.join(unlike)} differ, so it cannot go on from there"
            )
        for name, part in self.inventory.items():
            part.restore(manifest.state[name])
        self.publisher.version = manifest.weight_version - 1  # the publish that every start begins with gives it again
        before = Config.model_validate(manifest.config)
        if (before.parallel, before.rollout.tensor) == (self.config.parallel, self.config.rollout.tensor):
            self._streams = json.loads((checkpoint / f"rank-{self.cluster.rank}.json").read_text())
            self.collect.take_over(self._surplus(checkpoint / f"surplus.rank-{self.cluster.rank}", prompts))
        elif self.cluster.batch_group.rank() == 0:  # another layout: its replicas share them out, in prompt order
            files = sorted(checkpoint.glob("surplus.rank-*"))
            groups = sorted((g for file in files for g in self._surplus(file, prompts)), key=lambda g: g.prompt.index)
            self.collect.take_over(groups[self.cluster.coordinates.data :: self.cluster.data])
        return manifest.step

    def _surplus(self, file: Path, prompts: Prompts) -> list[Group]:
        """Groups that were carried over, from a file of a checkpoint."""
        groups = []
        frames = list(read_frames(file))
        for group, verdicts in zip(frames[::2], frames[1::2], strict=True):
            whole = read_group(group, verdicts, prompts.at(group.header["prompt"]), self.tokens.decode)
            if whole is None:
                raise RequestError(f"{file}: the group of prompt {group.header['prompt']} is not of this run's prompts")
            groups.append(whole)
        return groups

    def state(self) -> dict[str, Any]:
        return {"in_a_row": self._rejected}

    def restore(self, state: dict[str, Any]) -> None:
        self._rejected = state["in_a_row"]

    def publish(self, learner: Learner, engine: Engine) -> Receipt:
        """The learner's weights into the engine, with proof."""
        options, model = self.config.publish, self.config.model
        receipt = self.publisher.publish(learner.parameters(), learner.logprobs, engine)
        self.journal.weights = receipt.weights
        start, every = self._startup is None and options.witness_at_start, options.witness_every
        if options.canary_prompts and (start or (every and receipt.version % every == 0)):
            dtype, scratch = DTYPES[model.known_dtype()], self.folder / "witness"
            if (said := self.publisher.lacks_room_for_witness(dtype)) is None:
                witness = self.publisher.witness(learner.parameters(), dtype, Path(model.path), scratch)
                receipt = dataclasses.replace(receipt, witness=witness)
                said = f"learner and transformers agree to {witness:.1e}"
            else:
                said = f"warning: nobody independent has seen these weights: {said}"
            if self.cluster.rank == 0:
                self._progress.say(f"publish {receipt.version}: {said}")
        return receipt

    def checkpoint(self, step: int, learner: Learner) -> None:
        """After a step: saves where that is due, and at the end. Raises Interrupted where all agreed to leave."""
        done, options, model = step + 1, self.config.checkpoint, self.config.model
        last, start = done == self.config.trainer.steps, time.perf_counter()
        with phase("checkpoint"):
            self._complete_save(wait=False)
            self._boundary = self._state(done)
            if last or done % options.every_steps == 0:
                self._save(self._boundary, learner)
            if options.export_hf_every and (last or done % options.export_hf_every == 0):
                target = self.folder / "hf" / f"step-{done:06d}"
                self.publisher.export(learner.parameters(), DTYPES[model.known_dtype()], Path(model.path), target)
            if last:
                self._complete_save(wait=True)
        self._saving = time.perf_counter() - start
        self.interrupt.observe(CLOCK.seconds)
        if self.cluster.rank == 0:  # what a job's signal should come before its end, for the next submission
            self.interrupt.save(self.folder)
        if not last and (leave := self.cluster.agree("leave after the step", self.interrupt.due("score"), first)):
            raise Interrupted(leave)

    @contextlib.contextmanager
    def leaving(self, learner: Learner) -> Iterator[None]:
        """Where an agreed interrupt ends up: saves what the weights in memory belong to, and ends the run so."""
        try:
            yield
        except Interrupted as reason:
            boundary = self._boundary
            with phase("checkpoint"):
                self._complete_save(wait=True)
                if boundary.step not in (0, self._saved):  # at 0 there is nothing that the configuration does not say
                    self._save(boundary, learner)
                    self._complete_save(wait=True)
            self.close()
            raise Interrupted(
                f"{self.folder}: interrupted by {reason} in step {boundary.step} of {self.config.trainer.steps}; all "
                "finished work is saved, the same command continues the run"
            ) from reason

    def _state(self, done: int) -> _Boundary:
        """Everything but the weights, as it is between two steps. Cheap: of groups only references are kept."""
        state = {name: part.state() for name, part in self.inventory.items()}
        metrics = self._metrics.bytes() if self.cluster.rank == 0 else 0
        return _Boundary(done, self.publisher.version, state, self.collect.held(), random_state(), metrics)

    def _save(self, boundary: _Boundary, learner: Learner) -> None:
        """Begins a checkpoint, which is written while the run goes on. It appears whole or not at all."""
        self._complete_save(wait=True)
        broken = [name for (_, name), p in learner.parameters().items() if not all_finite(p.detach())]
        if found := self.cluster.agree("finite weights", broken, sum_lists):
            raise RunFailed(f"step {boundary.step - 1}: {found[0]} holds a value that is not finite: nothing is saved")
        self.cluster.agree(f"state of step {boundary.step}", json.dumps(boundary.state, sort_keys=True), same)
        target = self.folder / "checkpoints" / f"step-{boundary.step:06d}"
        whole, partial = contextlib.ExitStack(), partial_of(target)
        if self.cluster.rank == 0:
            whole.enter_context(whole_folder(target))
        self.cluster.agree("checkpoint folder", True, all)
        saving = Saving(learner.sharded_state(), partial)

        def write() -> Share:
            share = saving.write()
            return dataclasses.replace(share, files=[*share.files, *self._save_rank(boundary, partial)])

        def end(shares: list[Share], failure: str | None) -> None:
            with whole:
                if failure:
                    raise RunFailed(failure)
                saving.complete(shares)
                self._save_manifest(boundary, partial, [file for share in shares for file in share.files])
            self._drop_older(target)

        background = Background(self.cluster.store_of(f"save {boundary.step}"), write, end)
        self._pending, self.interrupt.saves = _Pending(boundary.step, saving, background), 2

    def _complete_save(self, wait: bool) -> None:
        """Takes note of a checkpoint that is in place; `wait`: until it is. RunFailed if it could not be written."""
        if self._pending is None:
            return
        pending, background = self._pending, self._pending.background
        if wait:
            background.wait(CLOCK.beat, lambda: pending.saving.bytes)
        over, failure, seconds = self.cluster.agree(
            "saved", [background.over, background.failure, background.seconds], _of_rank_0
        )
        if over:
            self._pending, self.interrupt.saves = None, 1
            if failure:
                raise RunFailed(f"the checkpoint of step {pending.step} could not be written: {failure}")
            self._saved = pending.step
            self.interrupt.observe({"save": seconds})

    def _drop_older(self, newest: Path) -> None:
        """Names the newest checkpoint, and removes what it makes needless: older ones, and what led to it."""
        options = self.config.checkpoint
        name_latest(newest.parent, newest.name)
        prune(newest.parent, options.keep_last, options.keep_every)
        self.journal.forget(step_of(saved_steps(newest.parent)[-options.keep_last :][0]))

    def _save_rank(self, boundary: _Boundary, folder: Path) -> list[Written]:
        """What this rank alone holds; returns the files. On the disk then, and with them what steps since the last save
        left elsewhere and a run that goes on from this checkpoint counts on."""
        rank = self.cluster.rank
        with HashedFile(folder / f"rank-{rank}.json") as random:
            random.write(json.dumps(boundary.random).encode())
        with HashedFile(folder / f"surplus.rank-{rank}") as surplus:
            for group in boundary.held:
                write_verdicts(surplus, group, write_group(surplus, group))
        files = [random.written(), surplus.written()]
        for path in [*(folder / file.name for file in files), *self._left_by(range(self._saved, boundary.step))]:
            sync(path)
        return files

    def _left_by(self, steps: range) -> Iterator[Path]:
        """Files that this rank wrote in some steps, all done, and their folders."""
        for part in ("rollouts", "rejected"):
            found = (self.folder / part).glob(f"step-*.rank-{self.cluster.rank}.*")
            yield from (path for path in found if int(path.name[5:].partition(".")[0]) in steps)
            yield from (path for path in [self.folder / part] if path.exists())
        yield from (path for path in [self.folder / "metrics.jsonl"] if self.cluster.rank == 0 and path.exists())

    def _save_manifest(self, boundary: _Boundary, folder: Path, files: list[Written]) -> None:
        copy_side_files(Path(self.config.model.path), folder / HF, self.config.model.known_dtype())
        beside = indexes(folder) + sorted((folder / HF).iterdir())
        files += [dataclasses.replace(digest_of(path), name=str(path.relative_to(folder))) for path in beside]
        Manifest(
            step=boundary.step,
            weight_version=boundary.weight_version,
            ranks=self.cluster.world,
            config=self.config.model_dump(mode="json"),
            inputs=self._inputs,
            state=boundary.state,
            metrics_bytes=boundary.metrics_bytes,
            files={file.name: file for file in files},
        ).save(folder)

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
        memory = self.cluster.agree("memory", CLOCK.bytes | {"peak": self._peak_bytes()}, _largest)
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
                    "refit/canary_mean": receipt.canary_mean,
                    "refit/witness": receipt.witness,
                    "perf/tokens_per_second": sampled / elapsed,
                    **{f"perf/seconds_{name}": seconds.get(name, 0.0) for name in _PHASES},
                    "startup/seconds": self._startup,
                    **self._stages,
                    **{f"memory/{name}_bytes": value for name, value in memory.items()},
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

    def _peak_bytes(self) -> int:
        """The most memory that was in use: of this process on a CPU, else of the device as far as it was looked at."""
        if self.cluster.backend.device == "cpu":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self._peak = max(self._peak, *CLOCK.bytes.values(), torch.cuda.max_memory_reserved())
        return self._peak

    def recall(self, step: int, batch: Batch) -> Batch:
        """Gives a batch the old log-probs and entropies that it had before the run was interrupted, if it had."""
        known = self.journal.scores(step, batch.rollouts)
        self._scored_before = self.cluster.agree("scored before", known is not None, all)
        if self._scored_before:
            assert known is not None
            values, rerouted = known
            batch.old_logprobs, batch.entropy = torch.from_numpy(values)
            batch.rerouted = None if rerouted is None else torch.tensor(rerouted, dtype=torch.int64)
        return batch

    def keep(self, step: int, batch: Batch) -> None:
        """Makes a scored batch durable before its update. Raises Interrupted where all agreed to leave, and RunFailed
        for old log-probs that are not finite, with the batch saved: its weights are broken."""
        assert batch.old_logprobs is not None and batch.entropy is not None, "score the batch first"
        sound = bool(torch.isfinite(batch.old_logprobs).all()) and bool(torch.isfinite(batch.entropy).all())
        if self.cluster.agree("scores", not sound, any):
            for number in range(batch.mini_batches):
                self._save_rejected(step, number, batch)
            raise RunFailed(
                f"step {step}: the learner's log-probs are not finite: its weights cannot be trusted; "
                f"{self.folder / 'rejected'} holds the batch"
            )
        if self.cluster.batch_group.rank() == 0 and not self._scored_before:
            self.journal.add_scores(step, batch)
        if leave := self.cluster.agree("leave before the update", self.interrupt.due("update", "publish"), first):
            raise Interrupted(leave)

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
        """Ends a run, whichever way. Collective."""
        self.cluster.leave()
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
            self._way_of,
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


def _of_rank_0(values: list[Any]) -> Any:
    return values[0]


_PHASES = ("rollout", "reward", "score", "update", "publish", "checkpoint")


def _largest(by_rank: list[dict[str, int]]) -> dict[str, int]:
    return {name: max(values.get(name, 0) for values in by_rank) for name in ("peak", *RESIDENCY)}


def _slowest(by_rank: list[dict[str, float]]) -> dict[str, float]:
    """A phase lasts as long as its slowest rank."""
    return {name: max(seconds.get(name, 0.0) for seconds in by_rank) for name in _PHASES}
