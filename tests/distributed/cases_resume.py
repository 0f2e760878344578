"""Learners that go on from a checkpoint, beside ones that were never stopped (tests/test_reload.py)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from a3po_megatron.batch import Collected
from a3po_megatron.checkpoint.store import Saving
from a3po_megatron.learner.learner import Learner
from a3po_megatron.model.family import read_family
from tests.distributed.cases_learner import as_hf, batch_of, settings, share
from tests.distributed.runner import Ranks
from tests.tiny import make_collected

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
    "tp2 sgd": ("qwen3", "float32", {"tensor": 2}, {"distributed": False, "name": "sgd", "momentum": 0.9}),
}
# Where what one layout saved is loaded by another one.
ELSEWHERE = {"tp2": ({"pipeline": 2}, {"data": 2}), "pp2 tied": ({"tensor": 2},), "dp2 bf16": ({"tensor": 2},)}


def _learner(ranks: Ranks, name: str, layout: dict[str, Any], checkpoint: Path | None = None) -> Learner:
    kind, dtype, _, optimizer = SAVED[name]
    folder = ranks.folder / kind
    cluster = ranks.arrange(**layout)
    parallel = {key: value for key, value in layout.items() if key not in ("tensor", "data")}
    config = settings(folder, layout.get("tensor", 1), layout.get("data", 1), parallel=parallel, optimizer=optimizer)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    return Learner(cluster, read_family(folder), config, checkpoint)


def _update(learner: Learner, collected: Collected) -> dict[str, float | None]:
    mine = share(collected, learner.cluster.coordinates.data, learner.cluster.data)
    return learner.update(batch_of(collected, mine))


def save(learner: Learner, folder: Path) -> None:
    """As a run does, all at once."""
    if dist.get_rank() == 0:
        os.makedirs(folder)
    dist.barrier()
    saving = Saving(learner.sharded_state(), folder)
    assert saving.wait() == ""
    dist.barrier()
    saving.finish()
    dist.barrier()


def goes_on(ranks: Ranks) -> dict[str, Any]:
    """Saved after n updates, overwritten by another update before it is on the disk, loaded, three more of each."""
    collected, found = make_collected(groups=5, size=4), {}
    for name, (_, _, layout, _) in SAVED.items():
        for before in (0, 2):
            stopped = _learner(ranks, name, layout)
            for _ in range(before):
                _update(stopped, collected)
            folder = ranks.folder / f"{name}-{before}"
            if ranks.rank == 0:
                os.makedirs(folder)
            dist.barrier()
            state = stopped.state()
            saving = Saving(stopped.sharded_state(), folder)
            rows = [_update(stopped, collected) for _ in range(3)]  # while it is written
            assert saving.wait() == ""
            dist.barrier()
            saving.finish()
            dist.barrier()
            again = _learner(ranks, name, layout, folder)
            again.restore(state)
            found[f"{name} {before}"] = {
                "rows": [_update(again, collected) for _ in range(3)] == rows,
                "weights": all(
                    torch.equal(a, b)
                    for a, b in zip(stopped.parameters().values(), again.parameters().values(), strict=True)
                ),
            }
    return found


def goes_on_elsewhere(ranks: Ranks) -> dict[str, Any]:
    """The same weights and moments in another layout; then two more updates, which must agree to rounding."""
    collected, found = make_collected(groups=5, size=4), {}
    for name, layouts in ELSEWHERE.items():
        stopped = _learner(ranks, name, SAVED[name][2])
        for _ in range(2):
            _update(stopped, collected)
        folder = ranks.folder / f"{name}-elsewhere"
        save(stopped, folder)
        weights = as_hf(stopped, {key: value.float() for key, value in stopped.parameters().items()})
        moments, state = _read(folder), stopped.state()
        rows = [_update(stopped, collected) for _ in range(2)]
        for number, layout in enumerate(layouts):
            moved = _learner(ranks, name, layout, folder)
            moved.restore(state)
            there = as_hf(moved, {key: value.float() for key, value in moved.parameters().items()})
            again = ranks.folder / f"{name}-again-{number}"
            save(moved, again)
            theirs = [_update(moved, collected) for _ in range(2)]
            found[f"{name} {layout}"] = {
                "weights": all(torch.equal(there[key], weights[key]) for key in weights),
                "unequal": [key for key, value in _read(again).items() if not _equal(value, moments[key])],
                "loss": [abs(a["learner/loss"] - b["learner/loss"]) for a, b in zip(rows, theirs, strict=True)],
                "norm": [
                    abs(a["policy/grad_norm"] / b["policy/grad_norm"] - 1) for a, b in zip(rows, theirs, strict=True)
                ],
            }
    return found


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
