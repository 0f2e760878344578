"""One chunk of rows of x = logits / temperature, over this rank's slice of the vocabulary: statistics and gradient.

    m = max x,  Z = Σ e^(x - m),  S = Σ (x - m) e^(x - m)         of the slice; then, over all slices, with M = max m:
    Z = Σ Z e^(m - M),  S = Σ (S + (m - M) Z) e^(m - M)            one MAX of [T] and one SUM of [3, T]

    log p(y) = x_y - M - log Z              d log p(y) / d x = 1_y - p
    H        = log Z - S / Z                d H / d x        = -p (x - M - log Z + H)

H in this form does not cancel; the textbook M + log Z - Σ x e^(x-M) / Z loses 1e-3 at logits of 1e4. M and log Z are
kept apart: their float32 sum would lose as much. Everything here works in place, in float32; on CUDA in one pass over x
each (rows_triton.py).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min


def measure(
    x: Tensor,  # [t, v] float32, destroyed
    here: Tensor,  # [t] bool: the target lies in this slice
    column: Tensor,  # [t] int64: its column, 0 where it does not
    with_entropy: bool,
    out: Tensor,  # [4, t] float32: m, Z, S, x_y - m
    work: Tensor | None = None,  # [t, v] float32 for the exponentials; only entropy needs it
) -> None:
    if x.is_cuda:
        from . import rows_triton

        rows_triton.measure(x, here, column, with_entropy, out)
        return
    peak = out[0]
    torch.amax(x, dim=1, out=peak)
    # A row of -inf alone has no probability in this slice: its shift must not make NaN of it.
    x.sub_(torch.where(peak == float("-inf"), 0.0, peak)[:, None])
    out[3] = torch.where(here, x.gather(1, column[:, None])[:, 0], 0.0)
    if not with_entropy:
        torch.sum(x.exp_(), dim=1, out=out[1])
        return
    exponential = torch.exp(x, out=work)
    torch.sum(exponential, dim=1, out=out[1])
    # A logit of -inf has probability 0 and adds nothing: (-inf) * 0 must not become NaN.
    torch.sum(x.clamp_(min=LOWEST).mul_(exponential), dim=1, out=out[2])


def combine(
    local: Tensor,  # [4, T] of this slice; destroyed
    here: Tensor,  # [T] bool
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log p(y), H, M and log Z, each [T], over the slices of all ranks."""
    peak = local[0].clone()
    if group is not None and group.size() > 1:
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    shift = (local[0] - peak).clamp_(min=LOWEST)  # a slice without any column has m = -inf
    scale = shift.exp()
    sums = local[1:]
    sums[1].addcmul_(shift.clamp(min=-1e4), sums[0]).mul_(scale)  # below -1e4 the scale is 0
    sums[0].mul_(scale)
    sums[2].add_(torch.where(here, shift, 0.0))
    if group is not None and group.size() > 1:
        dist.all_reduce(sums, group=group)
    log_z = sums[0].log()
    return sums[2] - log_z, log_z - sums[1] / sums[0], peak, log_z


def gradient(
    x: Tensor,  # [t, v] float32, destroyed
    here: Tensor,
    column: Tensor,
    kept: tuple[Tensor, Tensor, Tensor],  # M, log Z, H of these rows, [t] each
    of_logprob: Tensor,  # [t] incoming
    of_entropy: Tensor | None,  # [t] incoming; None: nobody asked for entropy
    work: Tensor | None = None,  # [t, v] float32; only entropy needs it
) -> Tensor:
    """The gradient with respect to x, [t, v], in x's or work's memory."""
    if x.is_cuda:
        from . import rows_triton

        return rows_triton.gradient(x, here, column, kept, of_logprob, of_entropy)
    peak, log_z, entropy = kept
    x.sub_(peak[:, None]).sub_(log_z[:, None])  # log p of every column
    if of_entropy is None:
        result = x.exp_().mul_(-of_logprob[:, None])
    else:
        probability = torch.exp(x, out=work)
        # p (log p + H) first: at a logit of -inf it is 0, and stays 0 whatever the incoming gradient.
        result = x.clamp_(min=LOWEST).add_(entropy[:, None]).mul_(probability)
        result.mul_(of_entropy[:, None]).addcmul_(probability, of_logprob[:, None]).neg_()
    return result.scatter_add_(1, column[:, None], torch.where(here, of_logprob, 0.0)[:, None])


def in_slice(targets: Tensor, first: int, valid: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in the `valid` columns from `first` on, and their column there (0 for the others)."""
    targets = targets - first
    here = (targets >= 0) & (targets < valid)
    return here, torch.where(here, targets, 0)


def check(
    targets: Tensor, tokens: int, columns: int, group: dist.ProcessGroup | None, vocab_size: int | None,
    temperature: float, chunk_tokens: int | None,
) -> tuple[int, int]:  # fmt: skip
    """This rank's first column, and its number of columns that are no padding.

    Raises ValueError for shapes that do not fit and for a target outside the vocabulary.
    """
    if targets.shape != (tokens,):
        raise ValueError(f"targets must be [{tokens}], one a token: got {tuple(targets.shape)}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1: got {chunk_tokens}")
    if not 1e-30 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0 and finite: got {temperature}")
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    vocab_size = columns * ranks if vocab_size is None else vocab_size
    if not columns * ranks >= vocab_size > 0:
        raise ValueError(f"vocab_size = {vocab_size} does not fit {ranks} slices of {columns} columns")
    if targets.numel() and not bool(((targets >= 0) & (targets < vocab_size)).all()):
        raise ValueError(f"a target lies outside the vocabulary of {vocab_size}")
    first = rank * columns
    return first, min(max(vocab_size - first, 0), columns)
