"""A learner that leaves its memory between updates, beside one that stays (tests/test_arena.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from a3po_megatron.learner.learner import Learner
from tests.distributed.cases_resume import SAVED, _learner, _read, _update, save
from tests.harness.ranks import CaseRanks
from tests.harness.tiny_models import make_collected

CYCLES = 2
# Between them every way to keep an optimizer's state and every kind of parallelism; the others by `make soak`.
CROSSING = ("pp2 vp2", "dp2 ep2", "dp2 bf16", "tp2 whole bf16", "dp2 sgd")


def _leave(learner: Learner, parameters: bool) -> None:
    learner.arena.gradients_away()
    learner.arena.optimizer_away()
    if parameters:
        learner.arena.parameters_away()


def _return(learner: Learner) -> None:
    learner.arena.parameters_back()
    learner.arena.gradients_back()
    learner.arena.optimizer_back()


def _held_bytes(learner: Learner) -> dict[str, int]:
    """What is left of each kind where the device's memory would be."""
    arena = learner.arena
    buffers = [b for chunk in learner.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return {
        "gradients": sum(b.grad_data.untyped_storage().nbytes() for b in buffers),
        "optimizer": arena._states.storage.nbytes() if arena._states is not None else 0,
        "parameters": sum(block.storage.nbytes() for block in arena._weights),
        "buffers": sum(b.param_data.untyped_storage().nbytes() for b in buffers if b.param_data is not None),
    }


def leaves_and_returns(ranks: CaseRanks) -> dict[str, Any]:
    return _leaves_and_returns(ranks, CROSSING)


def leaves_and_returns_elsewhere(ranks: CaseRanks) -> dict[str, Any]:
    return _leaves_and_returns(ranks, [name for name in SAVED if name not in CROSSING])


def _leaves_and_returns(ranks: CaseRanks, names: Sequence[str]) -> dict[str, Any]:
    """Per way to keep an optimizer: is all gone, readable while away, and the next step the same, bit for bit?"""
    collected, found = make_collected(groups=3, size=4), {}
    for name in names:
        layout = SAVED[name][2]
        stays = _learner(ranks, name, layout)
        rows = [_update(stays, collected) for _ in range(CYCLES)]
        at_home = ranks.folder / f"{name}-at-home"
        save(stays, at_home)
        rows.append(_update(stays, collected))
        kept = [value.detach().clone() for value in stays.parameters().values()]
        moves = _learner(ranks, name, layout)
        theirs, left, readable = [], [], []
        for _ in range(CYCLES):
            before = [value.detach().clone() for value in moves.parameters().values()]
            _leave(moves, parameters=True)
            left.append(_held_bytes(moves))
            moves.arena.parameters_back()
            now = [value.detach() for value in moves.parameters().values()]
            readable.append(all(torch.equal(a, b) for a, b in zip(before, now, strict=True)))
            _return(moves)
            theirs.append(_update(moves, collected))
        _leave(moves, parameters=False)
        away = ranks.folder / f"{name}-away"
        save(moves, away)  # taken while masters, moments and gradients are not there
        _return(moves)
        theirs.append(_update(moves, collected))
        one, other = _read(at_home), _read(away)
        again = _learner(ranks, name, layout, away)
        again.restore({"schedule_steps": CYCLES})
        _leave(again, parameters=True)  # a loaded optimizer has other tensors than the one that was built
        _return(again)
        found[name] = {
            "left": left,
            "readable": readable,
            "rows": theirs == rows,
            "weights": all(torch.equal(a, b) for a, b in zip(kept, moves.parameters().values(), strict=True)),
            "checkpoint": [key for key in one.keys() | other.keys() if not torch.equal(one[key], other[key])],
            "resumed": _update(again, collected) == rows[-1],
            "masters": sum(block.bytes for block in [moves.arena._states] if block is not None),
        }
        dist.barrier()
    return found
