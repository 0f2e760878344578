"""Experiment 1: the learner on Transformer Engine.

bf16_against_oracle   log-probs, loss and gradients of a packed, variable-length step against float64 on the CPU
fp8_against_bf16      the same step in FP8 against bf16; score and update must see the same forward
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from a3po_megatron.learner.learner import Learner
from a3po_megatron.model.read import read_facts
from a3po_megatron.ranks.backend import CUDA, Backend
from a3po_megatron.ranks.groups import Ranks

from . import oracle
from .measure import largest, relative
from .rank import CLIPPED, LENGTHS, TINY, alone, batch_of, draw_sequences, gradients, make_learner, make_model
from .report import Report

# Against float64, Transformer Engine may err as much as plain PyTorch does when it computes the same in bf16, in the
# same order of operations but for the kernels' own sums: half as much again for those.
WITHIN = 1.5
# Rounding to e4m3 alone, imitated in plain PyTorch (tests/harness/fp8_rounding.py), moves this model's gradient by 0.21
# to 0.22 and its log-probs by a mean exp |Δ| of 1.13 to 1.15. Kernels that do no more than round stay within a third
# of that; a wrong scale or a stale weight is beyond 0.5.
FP8_GRADIENT = 0.3
FP8_RATIO = 1.2


def scored(learner: Learner, sequences: Sequence[Any]) -> Tensor:
    """The learner's log-probs [T], as `score` computes them."""
    return torch.cat(learner.logprobs(sequences))


def step(learner: Learner, sequences: Sequence[Any], old: Tensor | None, advantages: Tensor) -> dict[str, Any]:
    """One update; `old` None: the learner's own scores first, so that every ratio is to be 1."""
    batch = batch_of(sequences, old, advantages)
    if old is None:
        learner.score(batch)
        assert batch.old_logprobs is not None
        batch.rollout_logprobs = batch.old_logprobs  # the sampler's correction is 1
    stats = learner.update(batch, CLIPPED)
    return {"stats": stats.reported, "old": batch.old_logprobs, "gradients": gradients(learner)}


def whole(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([values[name].flatten().double() for name in sorted(values)])


def against_oracle(report: Report, cluster: Ranks, folder: Path) -> None:
    facts = read_facts(folder)
    sequences = draw_sequences(facts.vocab, LENGTHS)
    lengths = [len(response) for _, response in sequences]
    generator = torch.Generator().manual_seed(2)
    advantages = torch.randn(len(sequences), generator=generator)
    exact, plain = oracle.read_weights(folder), oracle.read_weights(folder, torch.bfloat16)
    wanted = oracle.all_logprobs(exact, facts, sequences)
    # Old log-probs a little off, so that ratios are no ones, and never by as much as the clip.
    old = [each.detach().float() + 0.1 * (2 * torch.rand(len(each), generator=generator) - 1) for each in wanted]
    loss = oracle.loss(wanted, old, advantages)
    loss.backward()
    in_bf16 = oracle.all_logprobs(plain, facts, sequences)
    oracle.loss(in_bf16, old, advantages).backward()

    learner = make_learner(cluster, folder)
    found = scored(learner, sequences)
    truth, other = torch.cat(wanted).detach(), torch.cat(in_bf16).detach()
    # What lies beside a sequence in its pack is nothing to it.
    apart = torch.cat([scored(learner, [each]) for each in sequences])
    report.claim("packed against alone, over plain bf16's error", _rms(apart - found) / _rms(other - truth), WITHIN)
    ended = step(learner, sequences, torch.cat(old), advantages)
    theirs = {name: value.grad for name, value in exact.items()}
    rounded = {name: value.grad for name, value in plain.items()}
    ours = ended["gradients"]
    parts = len(learner._micro_batches(batch_of(sequences, torch.cat(old), advantages), range(len(sequences))))
    report.number("sequences, response tokens, micro-batches", [len(sequences), sum(lengths), parts])
    values = {
        "log-prob, root mean square": (_rms(found - truth), _rms(other - truth)),
        "gradient, all": (relative(whole(ours), whole(theirs)), relative(whole(rounded), whole(theirs))),
        "gradient, worst tensor": (
            max(relative(ours[name], value) for name, value in theirs.items()),
            max(relative(rounded[name], value) for name, value in theirs.items()),
        ),
    }
    for name, (mine, plains) in values.items():
        report.number(f"{name}: ours, plain bf16 on the CPU", [float(mine), float(plains)])
        report.claim(f"{name}: error over that of plain bf16", float(mine) / float(plains), WITHIN)
    report.number("log-prob, largest error", largest(found, truth))
    scale = float(advantages.abs().mean())  # a sum of ratios near 1 may cancel: its own size is no measure
    error = abs(float(ended["stats"]["learner/loss"]) - float(loss)) / scale
    report.number("loss: oracle, ours", [float(loss), ended["stats"]["learner/loss"]])
    # A mean of 505 ratios, each off by about a log-prob's error (some 1e-2), of either sign.
    report.claim("loss: error over the mean |advantage|", error, 1e-2)
    report.claim("tokens that clipped (the oracle has no clip)", _clipped(ended["stats"]), 0.0)
    report.headline(
        f"gradient error {float(values['gradient, all'][0]):.1e}, plain bf16 {float(values['gradient, all'][1]):.1e}"
    )


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _clipped(stats: dict[str, Any]) -> float:
    return float(stats["policy/clip_low_rate"] + stats["policy/clip_high_rate"])


def bf16_against_oracle(report: Report) -> None:
    against_oracle(report, alone(), make_model())


def fp8_step(report: Report, cluster: Ranks, folder: Path, precisions: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every precision's step against that in bf16. Returns each one's errors."""
    facts = read_facts(folder)
    sequences = draw_sequences(facts.vocab, LENGTHS)
    advantages = torch.randn(len(sequences), generator=torch.Generator().manual_seed(2))
    plain = make_learner(cluster, folder, learner={"precision": "bf16", "micro_batch_tokens": 512})
    reference = step(plain, sequences, None, advantages)
    found = {}
    for name, options in precisions.items():
        learner = make_learner(cluster, folder, learner={"micro_batch_tokens": 512, **options})
        mine = step(learner, sequences, None, advantages)
        difference = mine["old"] - reference["old"]
        found[name] = {
            "logprob_abs_mean": float(difference.abs().mean()),
            "exp_abs_mean": float(difference.abs().exp().mean()),
            "loss": [float(mine["stats"]["learner/loss"]), float(reference["stats"]["learner/loss"])],
            "gradient": relative(whole(mine["gradients"]), whole(reference["gradients"])),
            "ratio_first_max": _number(mine["stats"]["policy/ratio_first_max"]),
        }
        report.number(name, found[name])
    return found


PRECISIONS: dict[str, dict[str, Any]] = {
    "fp8-blockwise": {"precision": "fp8-blockwise"},
    "fp8-blockwise, first and last layer in bf16": {"precision": "fp8-blockwise", "bf16_layers": (1, 1)},
    "fp8-tensorwise": {"precision": "fp8-tensorwise"},
}


def fp8_on(report: Report, backend: Backend) -> None:
    folder = make_model(TINY)
    found = fp8_step(report, alone(backend), folder, PRECISIONS)
    for name, errors in found.items():
        report.claim(f"{name}: gradient against bf16", errors["gradient"], FP8_GRADIENT)
        report.claim(f"{name}: mean exp |Δ log-prob| against bf16", errors["exp_abs_mean"], FP8_RATIO)
        # Otherwise nothing was computed in FP8 at all: 3 bits cannot be had for less.
        report.claim_above(f"{name}: gradient differs from bf16 at all", errors["gradient"], 1e-3)
        # The same packs, the same weights, the same kernels: not one bit may differ, or old log-probs would be stale.
        report.claim(f"{name}: |ratio − 1| of an update on its own scores", errors["ratio_first_max"], 1e-6)
    edges, all_layers = (found[name]["gradient"] for name in list(PRECISIONS)[1::-1])
    report.number("gradient error with bf16 edges over that without", edges / max(all_layers, 1e-12))
    blockwise, tensorwise = (found[name]["gradient"] for name in ("fp8-blockwise", "fp8-tensorwise"))
    report.headline(f"gradient error against bf16: blockwise {blockwise:.3f}, tensorwise {tensorwise:.3f}")


def fp8_against_bf16(report: Report) -> None:
    report.number("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", os.environ.get("NVTE_FP8_BLOCK_SCALING_FP32_SCALES"))
    fp8_on(report, CUDA)
