"""Log-probs of a less noisy policy: of every distribution what is unlikely beside its likeliest token is cut off.

    q(y) = p(y) / Σ_kept p   where p(y) ≥ min_p · max p,   else 0          (min-p, as Lp-Reg has it: arXiv 2510.03222)

With x = logits / temperature and M = max x over all slices of the vocabulary, p(y) ≥ min_p · max p is x_y - M ≥ log
min_p, and log q(y) = x_y - M - log Σ_kept e^(x - M): what is kept is known once M is. So the logits are made twice, and
dropped again, chunk by chunk as in fused_head.py. No gradient: it is what a policy is drawn to, fixed for a step.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from .chunks import CHUNK_BYTES
from .fused_head import _chosen, _gather, _Work
from .rows import check, in_slice


@torch.no_grad()
def proxy_logprobs(
    hidden: Tensor,  # [T, H], the same on all ranks of the group
    weight: Tensor,  # [V/tp, H] this rank's slice
    targets: Tensor,  # [R] global token ids ([T] without rows)
    group: dist.ProcessGroup | None,  # tensor-parallel
    temperature: float,
    chunk_tokens: int | None = None,
    *,
    min_p: float,  # above 0, below 1
    vocab_size: int | None = None,  # true V where the last slices are padded
    sequence_parallel: bool = False,  # hidden is this rank's [T/tp, H]
    rows: Tensor | None = None,  # [R] int64: of these of the T tokens
) -> Tensor:
    """log q of the targets [R] float32, -inf of those that are cut off. Raises ValueError as `logprob_and_entropy`."""
    alone = group is None or group.size() == 1
    whole = hidden if alone or not sequence_parallel else _gather(hidden, group)
    scored = len(whole) if rows is None else rows.numel()
    first, valid = check(targets, scored, len(weight), None if alone else group, vocab_size, temperature, chunk_tokens)
    here, column = in_slice(targets, first, valid)
    chunk = chunk_tokens or max(1, CHUNK_BYTES[hidden.device.type] // (4 * max(len(weight), 1)))
    work = _Work(chunk, valid, scored, False, hidden.device)
    peak = hidden.new_full((scored,), float("-inf"), dtype=torch.float32)
    for span in work.spans:
        torch.amax(work.logits(_chosen(whole, rows, span), weight, temperature), dim=1, out=peak[span])
    if not alone:
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    sums = hidden.new_zeros((2, scored), dtype=torch.float32)  # of what is kept; x_y - M, on the rank that has y
    for span in work.spans:
        x = work.logits(_chosen(whole, rows, span), weight, temperature).sub_(peak[span, None])
        sums[1, span] = torch.where(here[span], x.gather(1, column[span, None])[:, 0], 0.0)
        torch.sum(x.masked_fill_(x < math.log(min_p), float("-inf")).exp_(), dim=1, out=sums[0, span])
    if not alone:
        dist.all_reduce(sums, group=group)
    kept, below = sums
    return torch.where(below < math.log(min_p), float("-inf"), below - kept.log())
