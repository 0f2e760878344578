"""Learners that go on from a checkpoint, beside ones that were never stopped (tests/test_reload.py)."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from a3po_megatron.batch import Collected
from a3po_megatron.compat.megatron import GATHERED
from a3po_megatron.config import Config
from a3po_megatron.errors import RunFailed
from a3po_megatron.files.hashed import HashedFile
from a3po_megatron.files.run_folder import RunFolder
from a3po_megatron.files.writer import AtOnce
from a3po_megatron.learner.learner import Learner, Update
from a3po_megatron.model.read import read_facts
from a3po_megatron.run.background import Background
from a3po_megatron.run.checkpoints import Checkpoints, _Boundary
from a3po_megatron.run.found import Found
from a3po_megatron.run.journal import Journal
from a3po_megatron.run.manifest import check_whole
from a3po_megatron.run.stop import Interrupt, Stop
from a3po_megatron.run.store import Saving
from a3po_megatron.run.streams import random_state
from tests.distributed.cases_learner import as_hf, batch_of, settings, share
from tests.harness.ranks import CaseRanks
from tests.harness.saves_at_once import save, write_whole
from tests.harness.tiny_models import CLIPPED, make_collected

# name → (model, dtype, layout, optimizer): each way to keep an optimizer's state, and every kind of parallelism.
SAVED: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "tp2": ("qwen3", "float32", {"tensor": 2}, {}),
    "dp2": ("qwen3", "float32", {"data": 2}, {}),
    "pp2 tied": ("qwen3", "float32", {"pipeline": 2}, {}),  # several buckets of odd sizes: compat/megatron.py
    "pp2 vp2": ("qwen3_deep", "float32", {"pipeline": 2, "virtual": 2}, {}),
    "dp2 ep2": ("qwen3_moe", "float32", {"data": 2, "expert": 2}, {}),
    "dp2 bf16": ("qwen3", "bfloat16", {"data": 2}, {}),  # float32 masters
    "tp2 whole": ("qwen3", "float32", {"tensor": 2}, {"distributed": False}),
    "tp2 whole bf16": ("qwen3", "bfloat16", {"tensor": 2}, {"distributed": False}),
    "dp2 sgd": ("qwen3", "float32", {"data": 2}, {"distributed": False, "name": "sgd", "momentum": 0.9}),
}
# After two updates in these, which between them have every kind of parallelism and every way to keep the state (of
# tensor parallelism alone: `goes_on_meanwhile`). Before any update an optimizer has no state: one of each way to keep
# it. All by `make soak`.
TRAINED = ("pp2 tied", "pp2 vp2", "dp2 ep2", "dp2 bf16", "tp2 whole bf16", "dp2 sgd")
AT_ONCE = ("dp2 bf16", "tp2 whole", "dp2 sgd")
# Where what one layout saved is loaded by another one.
ELSEWHERE = {"tp2": ({"pipeline": 2}, {"data": 2}), "pp2 tied": ({"tensor": 2},), "dp2 bf16": ({"tensor": 2},)}


def _config(ranks: CaseRanks, name: str, layout: dict[str, Any]) -> Config:
    kind, dtype, _, optimizer = SAVED[name]
    parallel = {key: value for key, value in layout.items() if key not in ("tensor", "data")}
    sizes = layout.get("tensor", 1), layout.get("data", 1)
    config = settings(ranks.folder / kind, *sizes, parallel=parallel, optimizer=optimizer)
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})


def _learner(ranks: CaseRanks, name: str, layout: dict[str, Any], checkpoint: Path | None = None) -> Learner:
    config, cluster = _config(ranks, name, layout), ranks.arrange(**layout)
    return Learner(cluster, read_facts(ranks.folder / SAVED[name][0]), config, checkpoint)


def _update(learner: Learner, collected: Collected) -> Update:
    mine = share(collected, learner.ranks.coordinates.data, learner.ranks.data)
    return learner.update(batch_of(collected, mine), CLIPPED)


def goes_on(ranks: CaseRanks) -> dict[str, Any]:
    """After two updates, and before any."""
    return _goes_on(ranks, [*((name, 0) for name in AT_ONCE), *((name, 2) for name in TRAINED)])


def goes_on_as_well(ranks: CaseRanks) -> dict[str, Any]:
    """After two updates, and before any, in the others."""
    chosen = ((0, AT_ONCE), (2, TRAINED))
    return _goes_on(ranks, [(name, updates) for updates, names in chosen for name in SAVED if name not in names])


def _goes_on(ranks: CaseRanks, points: list[tuple[str, int]]) -> dict[str, Any]:
    """Saved after n updates, overwritten by another update before it is on the disk, loaded, two more of each."""
    collected, found = make_collected(groups=3, size=4), {}
    for name, before in points:
        layout = SAVED[name][2]
        stopped = _learner(ranks, name, layout)
        for _ in range(before):
            _update(stopped, collected)
        folder = ranks.folder / f"{name}-{before}"
        if ranks.rank == 0:
            os.makedirs(folder)
        dist.barrier()
        state, sharded = stopped.state(), stopped.sharded_state()
        gathered = sum(tensor.nbytes for tensor in GATHERED)
        saving = Saving(sharded, folder)
        rows = [_update(stopped, collected) for _ in range(2)]  # before it is written
        written = sum(file.bytes for file in write_whole(saving).files)
        again = _learner(ranks, name, layout, folder)
        again.restore(state)
        found[f"{name} {before}"] = {
            "rows": [_update(again, collected) for _ in range(2)] == rows,
            "weights": all(
                torch.equal(a, b)
                for a, b in zip(stopped.parameters().values(), again.parameters().values(), strict=True)
            ),
            "written": written,
            "gathered": gathered,
            "asked": _moments_asked(again),
        }
    return found


def _moments_asked(learner: Learner) -> int:
    """Bytes of a distributed optimizer's state that a learner reads of a checkpoint."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    asked = nested_values(learner.sharded_state(loading=True)["optimizer"])
    return sum(each.data.nbytes for each in asked if str(getattr(each, "key", "")).startswith("optimizer.state."))


def goes_on_elsewhere(ranks: CaseRanks) -> dict[str, Any]:
    """The same weights and moments in another layout; then two more updates, which must agree to rounding."""
    collected, found = make_collected(groups=3, size=4), {}
    for name, layouts in ELSEWHERE.items():
        stopped = _learner(ranks, name, SAVED[name][2])
        for _ in range(2):
            _update(stopped, collected)
        folder = ranks.folder / f"{name}-elsewhere"
        save(stopped, folder)
        weights = as_hf(stopped, {key: value.float() for key, value in stopped.parameters().items()})
        moments, state = _read(folder), stopped.state()
        rows = [_update(stopped, collected) for _ in range(2)]
        later = as_hf(stopped, {key: value.float() for key, value in stopped.parameters().items()})
        for number, layout in enumerate(layouts):
            moved = _learner(ranks, name, layout, folder)
            moved.restore(state)
            there = as_hf(moved, {key: value.float() for key, value in moved.parameters().items()})
            again = ranks.folder / f"{name}-again-{number}"
            save(moved, again)
            theirs = [_update(moved, collected) for _ in range(2)]
            ended = as_hf(moved, {key: value.float() for key, value in moved.parameters().items()})
            found[f"{name} {layout}"] = {
                "weights": all(torch.equal(there[key], weights[key]) for key in weights),
                "unequal": [key for key, value in _read(again).items() if not _equal(value, moments[key])],
                "apart": _norm(ended, later) / _norm(later, weights),
                "loss": [
                    abs(a.reported["learner/loss"] - b.reported["learner/loss"])
                    for a, b in zip(rows, theirs, strict=True)
                ],
                "norm": [abs(a.gradient_norm / b.gradient_norm - 1) for a, b in zip(rows, theirs, strict=True)],
            }
    return found


def _norm(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Euclidean, of the difference of all weights."""
    return float(sum((one[key] - other[key]).double().square().sum() for key in one)) ** 0.5


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """But for rows that pad the vocabulary, which a layout may have or not."""
    rows = min(len(one), len(other))
    return torch.equal(one[:rows], other[:rows]) and abs(len(one) - len(other)) <= 1


def _read(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by torch's own reader."""
    from torch.distributed import checkpoint

    reader = checkpoint.FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    whole = {key: torch.empty(e.size, dtype=e.properties.dtype) for key, e in entries.items() if hasattr(e, "size")}
    checkpoint.load(whole, storage_reader=reader, no_dist=True)
    return whole


# --- writing while the run goes on ----------------------------------------------------------------------------------


@contextlib.contextmanager
def held_back(seconds: float) -> Iterator[threading.Event]:
    """No byte of a checkpoint is written before the event is set, or so many seconds have passed."""
    event, write = threading.Event(), HashedFile.write

    def late(file: HashedFile, data: Any) -> int:
        if not event.wait(seconds):
            event.set()
        return write(file, data)

    HashedFile.write = late  # type: ignore[method-assign]
    try:
        yield event
    finally:
        HashedFile.write = write  # type: ignore[method-assign]


def goes_on_meanwhile(ranks: CaseRanks) -> dict[str, Any]:
    """An update from beginning to end while not a byte of the state before it has been written."""
    collected, name, found = make_collected(groups=3, size=4), "tp2", {}  # both ranks have a share to write
    layout = SAVED[name][2]
    learner = _learner(ranks, name, layout)
    _update(learner, collected)
    save(learner, ranks.folder / "at-once")
    before = {key: value.detach().clone() for key, value in learner.parameters().items()}
    folder = ranks.folder / "held-back"
    if ranks.rank == 0:
        os.makedirs(folder)
    dist.barrier()
    with held_back(seconds=30.0) as event:
        saving = Saving(learner.sharded_state(), folder)
        store = learner.ranks.store_of("held back")
        background = Background(store, saving.write, lambda shares, _: saving.complete(shares))
        found["over at once"] = background.over
        _update(learner, collected)
        found["over after an update"] = background.over
        found["bytes after an update"] = sum(p.stat().st_size for p in folder.glob(f"__{ranks.rank}_*.distcp"))
        event.set()
        background.wait(lambda: None, lambda: saving.bytes)
        found["failure"], found["over in the end"] = background.failure, background.over
        dist.barrier()
    found["the update changed something"] = not all(
        torch.equal(value, before[key]) for key, value in learner.parameters().items()
    )
    again = _learner(ranks, name, layout, folder)
    found["weights"] = all(torch.equal(value, before[key]) for key, value in again.parameters().items())
    held, at_once = _read(folder), _read(ranks.folder / "at-once")
    found["unlike what is written at once"] = [
        key for key in held.keys() | at_once.keys() if not torch.equal(held[key], at_once[key])
    ]
    return found


# --- a run's checkpoints, put in place or not -----------------------------------------------------------------------


def _run(ranks: CaseRanks, learner: Learner, folder: Path, name: str, **checkpoint: Any) -> Checkpoints:
    """As much of them as saves: no engine, no data."""
    run = Checkpoints.__new__(Checkpoints)
    config = _config(ranks, name, SAVED[name][2])
    run._settings = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update=checkpoint)})
    run.folder, run._ranks, run._learner = RunFolder(folder), learner.ranks, learner
    run._stop = Stop(learner.ranks, Interrupt())
    run._journal = Journal(folder / "journal", ranks.rank, "run", Found(folder / "journal"), AtOnce())
    run._pending, run._saved, run._inputs = None, 0, {}
    run._best, run._writer = lambda: None, AtOnce()
    return run


def _save_step(run: Checkpoints, step: int) -> None:
    run._save(_Boundary(step, step + 1, {}, [], random_state(), 0))
    run._complete_save(wait=True)


class _Full:
    """A file on a disk that takes so many bytes and no more."""

    def __init__(self, file: Any, space: int) -> None:
        self._file, self._space, self.name = file, space, file.name
        self.fileno, self.close = file.fileno, file.close

    def write(self, data: memoryview) -> int:
        if not self._space:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self._file.write(data[: self._space])
        self._space -= taken
        return taken


@contextlib.contextmanager
def full_disk(space: int) -> Iterator[None]:
    """Every file of a checkpoint meets a full disk."""
    init = HashedFile.__init__

    def on_full_disk(file: HashedFile, path: Path) -> None:
        init(file, path)
        file._file = _Full(file._file, space)  # type: ignore[assignment]

    HashedFile.__init__ = on_full_disk  # type: ignore[method-assign]
    try:
        yield
    finally:
        HashedFile.__init__ = init  # type: ignore[method-assign]


def _caught(act: Callable[[], None]) -> str:
    try:
        act()
    except RunFailed as error:
        return str(error)
    return "it did not fail"


def fails_on_one_rank(ranks: CaseRanks) -> dict[str, Any]:
    """The disk of one rank is full, at once or in the middle; then there is room again."""
    found: dict[str, Any] = {}
    learner = _learner(ranks, "tp2", SAVED["tp2"][2])
    folder = ranks.folder / "full-disk"
    for rank in range(ranks.world):
        for space in (0, 1 << 12):
            with full_disk(space) if ranks.rank == rank else contextlib.nullcontext():
                run = _run(ranks, learner, folder, "tp2")
                found[f"rank {rank}, {space} bytes"] = _caught(lambda run=run: _save_step(run, 2))  # type: ignore[misc]
            dist.barrier()
            found[f"left of rank {rank}, {space} bytes"] = sorted(p.name for p in (folder / "checkpoints").iterdir())
            dist.barrier()
    _save_step(_run(ranks, learner, folder, "tp2"), 2)
    found["with room"] = sorted(path.name for path in (folder / "checkpoints").iterdir())
    return found


def keeps(ranks: CaseRanks) -> dict[str, Any]:
    """Five saves; what is left of checkpoints and journals after each."""
    learner = _learner(ranks, "dp2", SAVED["dp2"][2])
    folder = ranks.folder / "keeps"
    found: dict[str, Any] = {}
    run = _run(ranks, learner, folder, "dp2", keep_last=2, keep_every=3)
    journal = folder / "journal"
    if ranks.rank == 0:
        journal.mkdir(parents=True)
    dist.barrier()
    for step in range(1, 6):
        (journal / f"step-{step:05d}.rank-{ranks.rank}").touch()  # of the step that begins after this save
        checkpoints = folder / "checkpoints"
        run._save(_Boundary(step, step + 1, {}, [], random_state(), 0))
        # As in a long rollout: no rank looks at the save, or takes part in a collective.
        deadline, latest = time.monotonic() + 30.0, checkpoints / "latest"
        while time.monotonic() < deadline and not (latest.exists() and latest.read_text() == f"step-{step:06d}\n"):
            time.sleep(0.02)
        meanwhile = (checkpoints / f"step-{step:06d}").is_dir()
        run._complete_save(wait=True)
        dist.barrier()
        found[str(step)] = {
            "meanwhile": meanwhile,
            "saved": sorted(int(path.name[5:]) for path in checkpoints.glob("step-*")),
            "journals": sorted(int(path.name[5:10]) for path in journal.glob(f"*.rank-{ranks.rank}")),
            "latest": (checkpoints / "latest").read_text().strip(),
            "step": check_whole(checkpoints / f"step-{step:06d}").step,
        }
        dist.barrier()
    return found
