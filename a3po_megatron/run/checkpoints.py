"""Checkpoints of a run: when one is due, what is in it, how it is written while the run goes on, and how a run resumes.

What must survive a restart is declared here, in `inventory`, and in a _Boundary: the state between two steps. Weights
and optimizer are saved as they are at such a boundary; what a step finished since then is in the journal.

The launcher makes the folder (launch/folder.py) and leaves the newest whole checkpoint in place; every rank opens it
here. Who trains, samples and publishes is known only as things with a state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..batch import Group
from ..config import Settings
from ..data.prompts import Prompts
from ..data.tokenizer import Tokenizer
from ..errors import Interrupted, RequestError, RunFailed
from ..files.hashed import HashedFile, Written, digest_of
from ..files.replace import partial_of, sync, whole_folder
from ..files.run_folder import (
    MANIFEST,
    RunFolder,
    rank_of,
    rollout_file,
    step_files,
    step_folder,
    step_folders,
    step_of,
)
from ..files.side_files import HF, copy_side_files
from ..files.torch_dist import indexes
from ..files.writer import Writer
from ..ranks.agree import first, same, sum_lists
from ..ranks.groups import Ranks
from ..telemetry.catalogue import Phase
from ..telemetry.clock import CLOCK, phase
from .background import Background
from .folder import name_latest, newest_whole, prune
from .journal import Journal, read_frames, read_group, write_group, write_verdicts
from .manifest import Manifest, Stateful, check_saved, inputs_of, read_manifest
from .recorder import Recorder
from .stop import Stop
from .store import Saving, Share
from .streams import random_state, restore_random_state

BYTES_PER_PARAMETER, ASSUMED_BYTES_PER_SECOND = 12, 100e6  # of a save: float32 weights and both moments of Adam


class Weights(Stateful, Protocol):
    """What is saved as shards: the learner."""

    def sharded_state(self) -> dict[str, Any]:
        """Returns this rank's weights and optimizer, as Megatron's sharded state dict."""

    def elements(self) -> int:
        """Returns the size of this rank's weights."""

    def broken(self) -> list[str]:
        """Returns the names of weights on this rank that are not finite."""


class Holder(Stateful, Protocol):
    """What carries groups over into the next step: the intake."""

    def held(self) -> list[Group]: ...

    def take_over(self, groups: Iterable[Group]) -> None: ...


class Versioned(Protocol):
    """What counts the weights that the engines hold: the publisher."""

    version: int


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


def resumed_from(folder: Path, ranks: Ranks) -> Path | None:
    """Returns the checkpoint that a run resumes from, the newest that the launcher left; None: it begins anew.

    Rank 0 says which: another node's file system may still show the folder as it was. Raises RunFailed if one does not
    have it as rank 0 does.
    """
    checkpoints = RunFolder(folder).checkpoints
    newest = newest_whole(checkpoints, check_saved)[0] if ranks.rank == 0 else None
    name = ranks.agree("checkpoint", newest.name if newest else None, _of_rank_0)
    if name is None:
        return None
    checkpoint = checkpoints / str(name)
    manifest = checkpoint / MANIFEST
    ranks.agree(f"{name}/{MANIFEST}", digest_of(manifest).blake3 if manifest.exists() else "missing", same)
    return checkpoint


class Checkpoints:
    def __init__(
        self,
        folder: Path,
        settings: Settings,
        ranks: Ranks,
        prompts: Prompts,
        tokenizer: Tokenizer,
        learner: Weights,
        intake: Holder,
        publisher: Versioned,
        others: Mapping[str, Stateful],
        recorder: Recorder,
        journal: Journal,
        stop: Stop,
        export: Callable[[Path], None],  # writes the weights as an HF folder; collective
        writer: Writer,
        best: Callable[[], int | None],  # the step whose checkpoint is kept beside the last ones
        checkpoint: Path | None = None,  # where the run resumes from; the learner has its share
    ) -> None:
        self.folder, self._settings, self._ranks = RunFolder(folder), settings, ranks
        self._prompts, self._tokenizer = prompts, tokenizer
        self._learner, self._intake, self._publisher = learner, intake, publisher
        self._recorder, self._journal, self._stop, self._export = recorder, journal, stop, export
        self._best, self._writer = best, writer
        # What all ranks know alike and must survive a restart. Later parts register here.
        self.inventory: dict[str, Stateful] = {"prompts": prompts, "collector": intake, "learner": learner, **others}
        self._pending: _Pending | None = None
        self._streams: dict[str, Any] | None = None  # as the run left them, for the first step's beginning
        self._inputs = inputs_of(settings) if ranks.rank == 0 else {}  # as they are when the run reads them
        first_step = 0 if checkpoint is None else self._resume(checkpoint)
        self._saved = first_step  # the step of the last checkpoint that is in place
        self._boundary = self._state(first_step)
        share = learner.elements() * BYTES_PER_PARAMETER
        stop.interrupt.observe({"save": share / ASSUMED_BYTES_PER_SECOND})  # until one was measured
        stop.interrupt.recall(folder)

    def steps(self) -> Iterator[int]:
        """Yields the steps still to do. Raises Interrupted where all ranks agreed to stop before the first."""
        start = self._boundary.step
        self._recorder.started(start)
        self._stop.if_due(Phase.SCORE)
        if self._streams is not None:  # not before: publish, canary and witness of a start may draw, too
            restore_random_state(self._streams)
        for step in range(start, self._settings.trainer.steps):
            CLOCK.begin(step)
            yield step

    def step(self, step: int) -> None:
        """After a step: saves where that is due, and at the end. Raises Interrupted where all agreed to stop, and
        RunFailed, with the step saved, where an alert of `alerts.stop` is raised."""
        done, options = step + 1, self._settings.checkpoint
        last = done == self._settings.trainer.steps
        with phase(Phase.CHECKPOINT):
            self._complete_save(wait=False)
            self._boundary = self._state(done)
            if last or done % options.every_steps == 0:
                self._save(self._boundary)
            if options.export_hf_every and (last or done % options.export_hf_every == 0):
                self._export(step_folder(self.folder.hf, done))
            if last:
                self._complete_save(wait=True)
        self._stop.interrupt.observe(CLOCK.seconds)
        if self._ranks.rank == 0:  # what a job's signal should come before its end, for the next submission
            self._stop.interrupt.save(self.folder.path, self._writer)
        self._end_where_alerted()
        if not last:
            self._stop.if_due(Phase.SCORE)

    def stop(self, reason: Interrupted) -> None:
        """Saves what the weights in memory belong to, and ends the run so: raises Interrupted. Collective."""
        self._save_boundary()
        self.close()
        steps = self._settings.trainer.steps
        raise Interrupted(
            f"{self.folder.path}: interrupted by {reason} in step {self._boundary.step} of {steps}; all "
            "finished work is saved, the same command continues the run"
        ) from reason

    def _end_where_alerted(self) -> None:
        """Ends a run in whose last row an alert of `alerts.stop` stands, with what it has done saved. Collective."""
        if not self._settings.alerts.stop:
            return
        reason = self._ranks.agree("alerts.stop", self._recorder.alarm, first)  # rank 0 judges its rows
        if reason is None:
            return
        self._save_boundary()
        done, steps = self._boundary.step, self._settings.trainer.steps
        saved = step_folder(self.folder.checkpoints, done)
        self.close()
        further = (
            ". The same command goes on from there, and ends again if the alert still holds: take it out of "
            "alerts.stop, or change its threshold"
        )
        raise RunFailed(
            f"step {done - 1}: {reason}. alerts.stop ended the run; what it has done is in {saved}"
            f"{further if done < steps else ', its last step'}"
        )

    def _save_boundary(self) -> None:
        """Saves the state between two steps that the weights in memory belong to, unless that is done. Collective."""
        with phase(Phase.CHECKPOINT):
            self._complete_save(wait=True)
            if self._boundary.step not in (0, self._saved):  # at 0 there is nothing that the configuration does not say
                self._save(self._boundary)
                self._complete_save(wait=True)

    def close(self) -> None:
        """Ends a run, whichever way, with all that it handed to its writer on the disk. Collective."""
        self._writer.drain()
        self._ranks.end()
        self._recorder.close()

    def _resume(self, checkpoint: Path) -> int:
        """Restores everything but weights and optimizer; returns the step to resume at."""
        manifest = read_manifest(checkpoint)
        if unlike := sorted(manifest.state.keys() ^ self.inventory.keys()):
            raise RequestError(
                f"{checkpoint}: it holds the state of {', '.join(manifest.state)}, this version needs that of "
                f"{', '.join(self.inventory)}: {', '.join(unlike)} differ, so it cannot go on from there"
            )
        for name, part in self.inventory.items():
            part.restore(manifest.state[name])
        self._publisher.version = manifest.weight_version - 1  # the publish of every start gives it again
        before = Settings.model_validate(manifest.config)
        if (before.parallel, before.rollout.tensor) == (self._settings.parallel, self._settings.rollout.tensor):
            self._streams = json.loads((checkpoint / f"rank-{self._ranks.rank}.json").read_text())
            self._intake.take_over(self._surplus(checkpoint / f"surplus.rank-{self._ranks.rank}"))
        else:
            self._intake.take_over(self._shared_out(checkpoint, manifest.ranks))
        return manifest.step

    def _shared_out(self, checkpoint: Path, before: int) -> list[Group]:
        """What this rank takes over of the groups that `before` ranks of another layout carried over: replicas share
        them out, in prompt order. Every rank looks through a share of the files, and opens those of its groups.
        Collective."""
        files = [f"surplus.rank-{rank}" for rank in range(self._ranks.rank, before, self._ranks.world)]
        groups = {file: list(read_frames(checkpoint / file))[::2] for file in files}
        there = [(g.header["prompt"], file, number) for file in files for number, g in enumerate(groups[file])]
        held = sorted(self._ranks.agree("carried over", there, sum_lists))
        if self._ranks.batch_group.rank():
            return []
        mine = held[self._ranks.coordinates.data :: self._ranks.data]
        read = {file: self._surplus(checkpoint / file) for file in {file for _, file, _ in mine}}
        return [read[file][number] for _, file, number in mine]

    def _surplus(self, file: Path) -> list[Group]:
        """Groups that were carried over, from a file of a checkpoint."""
        groups = []
        frames = list(read_frames(file))
        for group, verdicts in zip(frames[::2], frames[1::2], strict=True):
            prompt = self._prompts.at(group.header["prompt"])
            whole = read_group(group, verdicts, prompt, self._tokenizer.decode)
            if whole is None:
                raise RequestError(f"{file}: the group of prompt {group.header['prompt']} is not of this run's prompts")
            groups.append(whole)
        return groups

    def _state(self, done: int) -> _Boundary:
        """Everything but the weights, as it is between two steps. Cheap: of groups only references are kept."""
        state = {name: part.state() for name, part in self.inventory.items()}
        version, metrics = self._publisher.version, self._recorder.bytes()
        return _Boundary(done, version, state, self._intake.held(), random_state(), metrics)

    def _save(self, boundary: _Boundary) -> None:
        """Begins a checkpoint, which is written while the run goes on. It appears whole or not at all."""
        self._complete_save(wait=True)
        if broken := self._ranks.agree("finite weights", self._learner.broken(), sum_lists):
            raise RunFailed(f"step {boundary.step - 1}: {broken[0]} holds a value that is not finite: nothing is saved")
        self._ranks.agree(f"state of step {boundary.step}", json.dumps(boundary.state, sort_keys=True), same)
        target = step_folder(self.folder.checkpoints, boundary.step)
        whole, partial = contextlib.ExitStack(), partial_of(target)
        if self._ranks.rank == 0:
            whole.enter_context(whole_folder(target))
        self._ranks.agree("checkpoint folder", True, all)
        saving = Saving(self._learner.sharded_state(), partial)

        def write() -> Share:
            self._writer.drain()  # what the steps before it left elsewhere, and it counts on (_save_rank)
            share = saving.write()
            return dataclasses.replace(share, files=[*share.files, *self._save_rank(boundary, partial)])

        def end(shares: list[Share], failure: str | None) -> None:
            with whole:
                if failure:
                    raise RunFailed(failure)
                saving.complete(shares)
                self._save_manifest(boundary, partial, [file for share in shares for file in share.files])
            self._drop_older(target)

        background = Background(self._ranks.store_of(f"save {boundary.step}"), write, end)
        self._pending, self._stop.interrupt.saves = _Pending(boundary.step, saving, background), 2

    def _complete_save(self, wait: bool) -> None:
        """Takes note of a checkpoint that is in place; `wait`: until it is. RunFailed if it could not be written."""
        if self._pending is None:
            return
        pending, background = self._pending, self._pending.background
        if wait:
            background.wait(CLOCK.beat, lambda: pending.saving.bytes)
        over, failure, seconds = self._ranks.agree(
            "saved", [background.over, background.failure, background.seconds], _of_rank_0
        )
        if over:
            self._pending, self._stop.interrupt.saves = None, 1
            if failure:
                raise RunFailed(f"the checkpoint of step {pending.step} could not be written: {failure}")
            self._saved = pending.step
            self._stop.interrupt.observe({"save": seconds})

    def _drop_older(self, newest: Path) -> None:
        """Names the newest checkpoint, and removes what it makes needless: older ones, and what led to it."""
        options = self._settings.checkpoint
        name_latest(newest.parent, newest.name)
        prune(newest.parent, options.keep_last, options.keep_every, self._best())
        self._journal.forget(step_of(step_folders(newest.parent)[-options.keep_last :][0]))

    def _save_rank(self, boundary: _Boundary, folder: Path) -> list[Written]:
        """What this rank alone holds; returns the files. On the disk then, and with them what steps since the last save
        left elsewhere and a run that resumes from this checkpoint counts on."""
        rank = self._ranks.rank
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
        run = self.folder
        # By their names: of a long run with many ranks the folder of rollouts is too large for every rank to list.
        mine = (rollout_file(run.rollouts, step, self._ranks.rank) for step in steps)
        yield from (path for path in mine if path.exists())
        if run.rejected.exists():
            rejected = (path for path in step_files(run.rejected) if rank_of(path) == self._ranks.rank)
            yield from (path for path in rejected if step_of(path) in steps)
        yield from (path for path in [run.rollouts, run.rejected] if path.exists())
        yield from (path for path in [run.metrics, run.timeline] if self._ranks.rank == 0 and path.exists())

    def _save_manifest(self, boundary: _Boundary, folder: Path, files: list[Written]) -> None:
        copy_side_files(Path(self._settings.model.path), folder / HF, self._settings.model.dtype)
        beside = indexes(folder) + sorted((folder / HF).iterdir())
        files += [dataclasses.replace(digest_of(path), name=str(path.relative_to(folder))) for path in beside]
        Manifest(
            step=boundary.step,
            weight_version=boundary.weight_version,
            ranks=self._ranks.world,
            config=self._settings.model_dump(mode="json"),
            inputs=self._inputs,
            state=boundary.state,
            metrics_bytes=boundary.metrics_bytes,
            files={file.name: file for file in files},
        ).save(folder)


def _of_rank_0(values: list[Any]) -> Any:
    return values[0]
