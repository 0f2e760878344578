"""Experiment 1, FP8: the copies of weights that Transformer Engine keeps over micro-batches.

Megatron tells every layer which micro-batch is a schedule's first. In Transformer Engine 2.11 that means: quantise the
weight anew, else use the copy; and in the backward of a first one: overwrite main_grad, else add. With the copies:

    stale    a forward outside a schedule, after the weights have changed, is that of the weights before
    lost     two schedules between two optimizer steps leave the gradients of the second alone

`disable_parameter_transpose_cache`, which model/build.py sets, does without the copies. Shown here: both faults with
them, neither as the learner is built; and what the copies would save in time and cost in bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from a3po_megatron.learner.learner import Learner
from a3po_megatron.learner.micro_batch import MicroBatch
from a3po_megatron.ranks.backend import CUDA, Backend

from .measure import relative, seconds, settle
from .rank import CLIPPED, HALF_BILLION, LENGTHS, TINY, alone, batch_of, draw_sequences, make_learner, make_model
from .report import Report


@contextlib.contextmanager
def copies_kept(learner: Learner) -> Iterator[None]:
    """Within the block Megatron's layers keep quantised copies of their weights, as they do by default."""
    layers = [m for m in _modules(learner) if hasattr(m, "disable_parameter_transpose_cache")]
    assert layers and all(layer.disable_parameter_transpose_cache for layer in layers)
    for layer in layers:
        layer.disable_parameter_transpose_cache = False
    try:
        yield
    finally:
        for layer in layers:
            layer.disable_parameter_transpose_cache = True


def _modules(learner: Learner) -> list[Any]:
    return [module for chunk in learner.chunks for module in chunk.modules()]


def parts_of(learner: Learner, sequences: Sequence[Any]) -> list[MicroBatch]:
    batch = batch_of(sequences, torch.zeros(sum(len(r) for _, r in sequences)), torch.zeros(len(sequences)))
    return learner._micro_batches(batch, range(len(sequences)))


def accumulate(learner: Learner, parts: Sequence[MicroBatch]) -> None:
    """One schedule call that adds the gradients of Σ log p to main_grad."""

    def loss(part: MicroBatch, logprobs: Tensor, _: Tensor | None) -> tuple[Tensor, int, Tensor]:
        return logprobs.sum(), part.index.numel(), logprobs.detach().sum()

    learner.pipeline.forward_backward(parts, 1.0, loss)


def main_grads(learner: Learner) -> Tensor:
    """Of the linear layers between embedding and output layer, which alone compute in FP8."""
    named = [(key, p) for key, p in learner.parameters().items() if "linear_" in key[1] and p.dim() == 2]
    return torch.cat([p.main_grad.detach().flatten().clone() for _, p in named])  # type: ignore[attr-defined]


def zero(learner: Learner) -> None:
    for chunk in learner.chunks:
        chunk.zero_grad_buffer()


def lost_gradients(learner: Learner, parts: Sequence[MicroBatch]) -> float:
    """‖two schedules together − the sum of each alone‖, relative: 0 if nothing is lost."""
    settings = learner.chunks[0].config
    finalize, settings.finalize_model_grads_func = settings.finalize_model_grads_func, None  # it scales by token counts
    try:
        alone_each = []
        for part in parts[:2]:
            zero(learner)
            accumulate(learner, [part])
            alone_each.append(main_grads(learner))
        zero(learner)
        for part in parts[:2]:
            accumulate(learner, [part])
        return relative(main_grads(learner), alone_each[0] + alone_each[1])
    finally:
        settings.finalize_model_grads_func = finalize


@torch.no_grad()
def forward(learner: Learner, part: MicroBatch) -> Tensor:
    """Hidden states of the last layer, outside any schedule."""
    batch = part.to(learner.pipeline.device)
    return learner.chunks[0](batch.tokens, batch.positions, None, packed_seq_params=batch.packing).detach().clone()


@torch.no_grad()
def change(learner: Learner, by: float) -> None:
    """The linear layers' weights, as an optimizer step or a load would."""
    for (_, name), parameter in learner.parameters().items():
        if "linear_" in name and parameter.dim() == 2:
            parameter.mul_(by)


def stale_weights(learner: Learner, part: MicroBatch) -> tuple[float, float]:
    """Relative distance of a forward outside the schedules, after the weights were changed, from the forward with the
    weights as they are now, and from the one with those before."""
    accumulate(learner, [part])  # whatever is kept is kept from here on
    before = forward(learner, part)
    change(learner, 1.5)
    found = forward(learner, part)
    layers = [m for m in _modules(learner) if hasattr(m, "is_first_microbatch")]
    for layer in layers:
        layer.is_first_microbatch = True
    now = forward(learner, part)
    change(learner, 1 / 1.5)
    return relative(found, now), relative(found, before)


def traps_on(report: Report, backend: Backend) -> None:
    cluster, folder = alone(backend), make_model(TINY)
    sequences = draw_sequences(TINY["vocab_size"], LENGTHS)
    learner = make_learner(cluster, folder, learner={"precision": "fp8-blockwise", "micro_batch_tokens": 300})
    parts = parts_of(learner, sequences)
    assert len(parts) >= 2
    found: dict[str, dict[str, float]] = {}
    for name, around in (("with copies", copies_kept(learner)), ("ours", contextlib.nullcontext())):
        with around:
            lost = lost_gradients(learner, parts)
            of_now, of_before = stale_weights(learner, parts[0])
        found[name] = {"lost": lost, "stale_from_now": of_now, "stale_from_before": of_before}
        report.number(name, found[name])
    # With the copies the fault is as large as what is lost: the first of two gradients of like size.
    report.claim_above("with copies: gradients lost over two schedules", found["with copies"]["lost"], 0.1)
    report.claim_above("with copies: a changed weight is not seen", found["with copies"]["stale_from_now"], 0.05)
    report.claim("with copies: it is the weights before that are used", found["with copies"]["stale_from_before"], 1e-6)
    # Ours adds in float32 the very products that each schedule alone has: two roundings to 24 bits.
    report.claim("ours: gradients lost over two schedules", found["ours"]["lost"], 1e-5)
    report.claim("ours: a changed weight is not seen", found["ours"]["stale_from_now"], 1e-6)
    # As the learner trains and scores: an update, then a score, beside a learner that never had other weights.
    batch = batch_of(sequences, torch.cat(learner.logprobs(sequences)), torch.ones(len(sequences)))
    learner.update(batch, CLIPPED)
    fresh = make_learner(cluster, folder, learner={"precision": "fp8-blockwise", "micro_batch_tokens": 300})
    theirs = fresh.parameters()
    with torch.no_grad():
        for key, parameter in learner.parameters().items():
            theirs[key].copy_(parameter)
    difference = torch.cat(learner.logprobs(sequences)) - torch.cat(fresh.logprobs(sequences))
    report.claim("ours: scores after an update, against a fresh learner", float(difference.abs().max()), 0.0)
    stale = found["with copies"]
    report.headline(f"with copies {stale['lost']:.0%} of the gradient is lost; ours {found['ours']['lost']:.0e}")


def cache_traps(report: Report) -> None:
    traps_on(report, CUDA)


def workspace_bytes(learner: Learner) -> int:
    """What Transformer Engine keeps beside the weights: its modules' `_fp8_workspaces`, whatever tensors those hold."""
    found: dict[int, int] = {}
    for module in _modules(learner):
        for held in getattr(module, "_fp8_workspaces", {}).values():
            for value in [held, *vars(held).values()] if hasattr(held, "__dict__") else [held]:
                if type(value) is Tensor and value.device.type == "cuda":
                    found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(found.values())


def cache_price(report: Report) -> None:
    """Seconds of one schedule of four micro-batches, and bytes, with and without the copies."""
    cluster, folder = alone(), make_model(HALF_BILLION)
    sequences = draw_sequences(HALF_BILLION["vocab_size"], [(512, 1537)] * 16)
    found: dict[str, dict[str, float]] = {}
    for name, precision in (("bf16", "bf16"), ("fp8, ours", "fp8-blockwise"), ("fp8, with copies", "fp8-blockwise")):
        learner = make_learner(cluster, folder, learner={"precision": precision, "micro_batch_tokens": 8192})
        parts = parts_of(learner, sequences)
        around = copies_kept(learner) if name == "fp8, with copies" else contextlib.nullcontext()
        with around:
            zero(learner)
            settle(learner.pipeline.device)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            spent = seconds(lambda one=learner, given=parts: accumulate(one, given), learner.pipeline.device, 5, 2)  # type: ignore[misc]
            found[name] = {
                "seconds": spent,
                "tokens_per_second": sum(part.tokens.shape[1] for part in parts) / spent,
                "peak_bytes": torch.cuda.max_memory_allocated() - before,
                "kept_bytes": torch.cuda.memory_allocated() - before,
                "workspace_bytes": workspace_bytes(learner),
                "micro_batches": len(parts),
            }
        report.number(name, found[name])
        del learner, parts
        torch.cuda.empty_cache()
    price = found["fp8, ours"]["seconds"] / found["fp8, with copies"]["seconds"]
    report.number("price of doing without copies", price)
    report.number("speed of FP8 over bf16", found["bf16"]["seconds"] / found["fp8, ours"]["seconds"])
    report.claim("fp8, ours: bytes in _fp8_workspaces", found["fp8, ours"]["workspace_bytes"], 0)
    # Every weight is quantised once a micro-batch in place of once a schedule: bytes of the weights, against products
    # over 8,192 tokens. More than a quarter would ask for another way.
    report.claim("time without copies over time with", price, 1.25)
    saved = found["fp8, with copies"]["kept_bytes"] - found["fp8, ours"]["kept_bytes"]
    report.headline(f"without copies {price:.3f}× the time, {saved / 1e9:.2f} GB less")
