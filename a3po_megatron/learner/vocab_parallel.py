"""Log-probs and entropy of softmax(logits / temperature) when every rank holds a slice of the vocabulary.

With x = logits / temperature, m = max x, Z = Σ e^(x - m), S = Σ (x - m) e^(x - m), all over the whole vocabulary:

    log p(y) = x_y - m - log Z              d log p(y) / d logit = (1_y - p) / temperature
    H        = log Z - S / Z                d H / d logit        = -p (x - m - log Z + H) / temperature

H in this form does not cancel; the textbook m + log Z - Σ x e^(x-m) / Z loses 1e-3 at logits of 1e4. The collectives
are one MAX of [T] and one SUM of [3, T]; gradients are local, because every rank holds the global m, Z and H. Kept for
the backward pass besides logits and targets: m, log Z and H, 12 bytes a token (m and log Z apart: their float32 sum
would lose 1e-3 at logits of 1e4). Columns that pad the vocabulary take no part.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_BYTES = 64 << 20  # of float32 work space for one chunk of tokens, when the caller does not say


def logprob_and_entropy(
    logits: Tensor,  # [T, V/tp] this rank's slice, any float dtype, not modified
    targets: Tensor,  # [T] global token ids
    group: dist.ProcessGroup | None,  # tensor-parallel
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    *,
    vocab_size: int | None = None,  # true V where the last slices are padded
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the targets [T] and entropies [T] (nats, float32), both differentiable with respect to `logits`.

    Every rank of the group must call it with the same targets. Raises ValueError for shapes that do not fit and for a
    target outside the vocabulary.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"logits must be [T, V/tp] and targets [T]: got {tuple(logits.shape)}, {tuple(targets.shape)}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1: got {chunk_tokens}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0: got {temperature}")
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    columns = logits.shape[1]
    vocab_size = columns * ranks if vocab_size is None else vocab_size
    if not columns * ranks >= vocab_size > 0:
        raise ValueError(f"vocab_size = {vocab_size} does not fit {ranks} slices of {columns} columns")
    if targets.numel() and not bool(((targets >= 0) & (targets < vocab_size)).all()):
        raise ValueError(f"a target lies outside the vocabulary of {vocab_size}")
    first = rank * columns
    valid = min(max(vocab_size - first, 0), columns)  # columns of this slice that are no padding
    chunk = chunk_tokens or max(1, CHUNK_BYTES // (4 * max(columns, 1)))
    logprobs, entropy = _LogprobEntropy.apply(
        logits, targets - first, group, float(temperature), chunk, valid, with_entropy
    )
    return logprobs, entropy if with_entropy else None


class _LogprobEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,  # [T, V/tp]
        targets: Tensor,  # [T] relative to this slice
        group: dist.ProcessGroup | None,
        temperature: float,
        chunk: int,
        valid: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        tokens = logits.shape[0]
        spans = [slice(begin, min(begin + chunk, tokens)) for begin in range(0, tokens, chunk)]
        here, local = _in_slice(targets, valid)

        peak = logits.new_full((tokens,), float("-inf"), dtype=torch.float32)
        if valid:
            for span in spans:
                peak[span] = logits[span, :valid].amax(dim=1).float() / temperature
        if group is not None and group.size() > 1:
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)

        sums = logits.new_zeros((3, tokens), dtype=torch.float32)  # Z, S, x_y - m
        if valid:
            for span in spans:
                shifted = _scaled(logits[span, :valid], temperature).sub_(peak[span, None])
                chosen = shifted.gather(1, local[span, None])[:, 0]
                sums[2, span] = torch.where(here[span], chosen, 0.0)
                exponential = shifted.exp()
                sums[0, span] = exponential.sum(dim=1)
                if with_entropy:
                    # A logit of -inf has probability 0 and adds nothing: (-inf) * 0 must not become NaN.
                    shifted.clamp_(min=torch.finfo(torch.float32).min)
                    sums[1, span] = shifted.mul_(exponential).sum(dim=1)
        if group is not None and group.size() > 1:
            dist.all_reduce(sums, group=group)

        log_z = sums[0].log()
        logprobs = sums[2] - log_z
        entropy = log_z - sums[1] / sums[0]
        ctx.save_for_backward(logits, targets, peak, log_z, entropy)
        ctx.temperature, ctx.spans, ctx.valid, ctx.with_entropy = temperature, spans, valid, with_entropy
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, peak, log_z, entropy = ctx.saved_tensors
        here, local = _in_slice(targets, ctx.valid)
        grad = torch.zeros_like(logits)
        if ctx.valid:
            for span in ctx.spans:
                # log p of every column; p follows from it
                work = _scaled(logits[span, : ctx.valid], ctx.temperature)
                work.sub_(peak[span, None]).sub_(log_z[span, None])
                probability = work.exp()
                if ctx.with_entropy:
                    # p (log p + H) first: at a logit of -inf it is 0, and stays 0 whatever the incoming gradient.
                    work.clamp_(min=torch.finfo(torch.float32).min).add_(entropy[span, None]).mul_(probability)
                    work.mul_(grad_entropy[span, None]).addcmul_(probability, grad_logprobs[span, None]).neg_()
                else:
                    work = probability.mul_(-grad_logprobs[span, None])
                work.scatter_add_(
                    1, local[span, None], torch.where(here[span], grad_logprobs[span], 0.0)[:, None].to(work.dtype)
                )
                grad[span, : ctx.valid] = work.div_(ctx.temperature).to(grad.dtype)
        return grad, None, None, None, None, None, None


def _in_slice(targets: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in this slice, and their column there (0 for the others)."""
    here = (targets >= 0) & (targets < valid)
    return here, torch.where(here, targets, 0)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature in float32, always in new memory: `.float()` alone would hand out the caller's own."""
    return logits.to(torch.float32, copy=True).div_(temperature)
