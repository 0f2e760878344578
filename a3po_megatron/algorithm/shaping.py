"""A3PO's token weights (arXiv 2512.21625; authors' code txy77/Sample-Polarity-of-RLVR).

    rho(s)  = max(rho - decay * (s - origin), 1)
    w[i,t]  = rho+(s)  if rollout i is correct and t is among its  fraction  LOWEST-probability response tokens
            = rho-(s)  if rollout i is wrong   and t is among its  fraction  HIGHEST-probability response tokens
            = 1        for every other response token (no renormalisation)

This is the default. A weight below 1 goes up to 1 likewise; other schedules start as steeply or end as soon
(`_weight`); `positives` and `negatives` choose the other end of the ranking, for the arms of the paper's study.

The count is max(1, floor(fraction * n)) of n response tokens. Ties go to the earlier token, for both polarities, so
that the result depends on no rank count and no order. Tokens are ranked by log-prob, not by exp(log-prob), which in
float32 would tie everything above 1 - 6e-8. Ranking is one segmented sort on the device: no loop over rollouts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..batch import Batch
from ..config import Shaping, ShapingOptions
from .largest import keys_of


def rho(step: int, options: ShapingOptions) -> tuple[float, float]:
    """The weights (of positives, of negatives) at RL step `step`, counted from 0."""
    lost = options.decay * max(step - options.origin, 0)
    start_negative = options.rho if options.rho_negative is None else options.rho_negative
    return _weight(options.rho, lost, options.schedule), _weight(start_negative, lost, options.schedule)


def _weight(start: float, lost: float, schedule: str) -> float:
    """What is left of a weight when a linear one has lost so much on its way to 1."""
    if schedule == "constant" or start == 1:
        return start
    if schedule == "linear":
        return max(start - lost, 1.0) if start > 1 else min(start + lost, 1.0)
    passed = lost / abs(start - 1)  # of the way that is linear
    if schedule == "cosine":
        return 1.0 if passed >= 1 else 1 + (start - 1) * (1 + math.cos(math.pi * passed)) / 2
    return 1 + (start - 1) * math.exp(-passed)


@torch.no_grad()
def token_weights(
    old_logprobs: Tensor,  # [T] log pi_old of each response token
    rollout_index: Tensor,  # [T] int64, which rollout a token belongs to, ascending
    positive: Tensor,  # [B] bool, the verifier's verdict
    step: int,
    options: ShapingOptions,
    *,
    metric: Tensor | None = None,  # [T] rank by this instead: positives take the lowest, negatives the highest
) -> Tensor:
    """Token weights [T] float32, without gradient. Rollouts may have no tokens at all."""
    tokens = old_logprobs.numel()
    ranked = (old_logprobs if metric is None else metric).detach()
    weights = torch.ones(tokens, dtype=torch.float32, device=old_logprobs.device)
    up, down = rho(step, options)
    if tokens == 0 or (up == 1.0 and down == 1.0):
        return weights
    if ranked.isnan().any():
        raise ValueError("token_weights: cannot rank NaN")
    is_positive = positive[rollout_index]
    unlikely = torch.where(is_positive, options.positives == "unlikely", options.negatives == "unlikely")
    # One stable sort by (rollout, key, position), both in one integer: the position of a token in its segment is its
    # rank.
    key = (rollout_index.long() << 32) + keys_of(torch.where(unlikely, ranked, -ranked))
    order = torch.argsort(key, stable=True)
    length = torch.bincount(rollout_index, minlength=positive.numel())
    start = length.cumsum(0) - length
    rank = torch.empty_like(order)
    rank[order] = torch.arange(tokens, device=order.device) - start[rollout_index]
    share = options.fraction * length.to(torch.float64)
    count = (share.ceil() if options.rounding == "ceil" else share.floor()).clamp(min=1)
    chosen = rank < count[rollout_index]
    weight = torch.where(is_positive, torch.tensor(up, device=key.device), torch.tensor(down, device=key.device))
    return torch.where(chosen, weight.to(torch.float32), weights)


def shape(batch: Batch, step: int, options: Shaping) -> Batch:
    """Adds the token weights of RL step `step` to a scored batch. Tokens that are not trained on are neither ranked nor
    counted, and have weight 0. Where tokens have a polarity of their own, a rollout's positive ones are ranked and
    counted among themselves, and its negative ones likewise."""
    assert batch.old_logprobs is not None, "score the batch first"
    if not isinstance(options, ShapingOptions):  # what fork_tokens leaves out is not trained on (fork_tokens.py)
        ones = torch.ones_like(batch.old_logprobs)
        batch.token_weights = ones if batch.trained is None else ones * batch.trained
        batch.rho = (1.0, 1.0)
        return batch
    source = batch.old_logprobs if options.source == "training" else batch.rollout_logprobs
    # High entropy is where low probability is: the same tokens are chosen by the *lowest* negative entropy.
    metric = None
    if options.metric == "entropy":
        assert batch.entropy is not None, "score the batch first"
        metric = -batch.entropy
    trained = batch.is_trained()
    sides = [(trained, batch.positive)]
    if batch.token_positive is not None:
        sides = [
            (trained & (batch.token_positive == side), torch.full_like(batch.positive, side)) for side in (True, False)
        ]
    batch.token_weights = torch.zeros_like(source)
    for chosen, positive in sides:
        ranked = None if metric is None else metric[chosen]
        weights = token_weights(source[chosen], batch.rollout_index[chosen], positive, step, options, metric=ranked)
        batch.token_weights.masked_scatter_(chosen, weights)
    batch.rho = rho(step, options)
    return batch
