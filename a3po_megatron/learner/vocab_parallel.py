"""Log-probs and entropy of softmax(logits / temperature) when every rank holds a slice of the vocabulary.

The formulas are in rows.py. The collectives are one MAX of [T] and one SUM of [3, T]; gradients are local, because
every rank keeps the global maximum, log Z and H: 12 bytes a token besides logits and targets. Columns that pad the
vocabulary take no part. Where the logits need not exist at all, fused_head.py computes the same from hidden states.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .rows import check, combine, gradient, in_slice, measure

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
    if logits.dim() != 2:
        raise ValueError(f"logits must be [T, V/tp]: got {tuple(logits.shape)}")
    tokens, columns = logits.shape
    first, valid = check(targets, tokens, columns, group, vocab_size, temperature, chunk_tokens)
    chunk = chunk_tokens or max(1, CHUNK_BYTES // (4 * max(columns, 1)))
    logprobs, entropy = _LogprobEntropy.apply(
        logits, targets, group, float(temperature), chunk, (first, valid), with_entropy
    )
    return logprobs, entropy if with_entropy else None


class _LogprobEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,  # [T, V/tp]
        targets: Tensor,  # [T]
        group: dist.ProcessGroup | None,
        temperature: float,
        chunk: int,
        columns: tuple[int, int],  # of this slice: the first, and how many are no padding
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        valid = columns[1]
        tokens = logits.shape[0]
        spans = [slice(begin, min(begin + chunk, tokens)) for begin in range(0, tokens, chunk)]
        here, column = in_slice(targets, *columns)
        local = logits.new_zeros((4, tokens), dtype=torch.float32)
        local[0] = float("-inf")
        for span in spans if valid else ():
            rows = _scaled(logits[span, :valid], temperature)
            measure(rows, here[span], column[span], with_entropy, local[:, span])
        logprobs, entropy, peak, log_z = combine(local, here, group)
        ctx.save_for_backward(logits, targets, peak, log_z, entropy)
        ctx.temperature, ctx.spans, ctx.columns, ctx.with_entropy = temperature, spans, columns, with_entropy
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logprob: Tensor, of_entropy: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, *statistics = ctx.saved_tensors
        here, column = in_slice(targets, *ctx.columns)
        grad, valid = torch.zeros_like(logits), ctx.columns[1]
        for span in ctx.spans if valid else ():
            rows = _scaled(logits[span, :valid], ctx.temperature)
            kept_here = (statistics[0][span], statistics[1][span], statistics[2][span])
            entropy = of_entropy[span] if ctx.with_entropy else None
            result = gradient(rows, here[span], column[span], kept_here, of_logprob[span], entropy)
            grad[span, :valid] = result.div_(ctx.temperature)
        return grad, None, None, None, None, None, None


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature in float32, always in new memory: `.float()` alone would hand out the caller's own."""
    return logits.to(torch.float32, copy=True).div_(temperature)
