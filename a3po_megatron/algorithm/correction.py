"""The correction for the distribution that rollouts were sampled from: pi_train_old / pi_rollout is not 1 where the
engine computes otherwise than the learner, or sampled with older weights.

    tis             min(ratio, cap) for every token: truncated importance sampling, as in verl and slime
    icepop          the ratio where it lies within [low, high], else 0 (IcePop, arXiv 2510.18855)
    sequence_mask   a rollout is not trained on where the geometric mean of its ratios, or one of them, leaves a band
                    (masked importance sampling, as in slime and verl); the rest as with tis

A token of weight 0 still counts among the tokens that a loss is divided by; a rollout that is masked does not, nor is
it shaped: otherwise the loss of the others would shrink with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import Batch
from ..config import Correction, IcePop, SequenceMask, TisOptions


@torch.no_grad()
def sampler_correction(old_logprobs: Tensor, rollout_logprobs: Tensor, options: Correction) -> Tensor:
    """Weights of tokens [T], by their log-probs at the learner and at the sampler [T]; all 1 without correction."""
    ratio = torch.exp(old_logprobs - rollout_logprobs)
    if isinstance(options, IcePop):
        return torch.where((ratio >= options.low) & (ratio <= options.high), ratio, 0.0)
    if isinstance(options, TisOptions | SequenceMask) and options.cap:
        return ratio.clamp(max=options.cap)
    return torch.ones_like(old_logprobs)


@torch.no_grad()
def outside(
    old_logprobs: Tensor,  # [T]
    rollout_logprobs: Tensor,  # [T]
    rollout_index: Tensor,  # [T] int64, which rollout a token is of
    rollouts: int,
    options: SequenceMask,
) -> Tensor:
    """Returns which rollouts are to be masked [rollouts] bool; one without tokens is not."""
    log_ratio = (old_logprobs - rollout_logprobs).double()
    sums, count = torch.zeros(2, rollouts, dtype=torch.float64, device=log_ratio.device)
    count.index_add_(0, rollout_index, torch.ones_like(log_ratio))
    sums.index_add_(0, rollout_index, log_ratio)
    mean = (sums / count.clamp(min=1)).exp()
    far = torch.zeros_like(log_ratio, dtype=torch.bool)
    if options.token_low:
        far |= log_ratio.exp() < options.token_low
    if options.token_high:
        far |= log_ratio.exp() > options.token_high
    any_far = torch.zeros_like(sums).index_add_(0, rollout_index, far.double()) > 0
    within = (mean >= options.mean_low) & (mean <= options.mean_high) & ~any_far
    return torch.logical_and(~within, count > 0)


def mask_far(batch: Batch, options: Correction) -> Batch:
    """Takes rollouts that the sampler drew from too far a distribution out of a scored batch."""
    if not isinstance(options, SequenceMask):
        return batch
    assert batch.old_logprobs is not None, "score the batch first"
    trained = batch.is_trained()
    values = (batch.old_logprobs[trained], batch.rollout_logprobs[trained], batch.rollout_index[trained])
    return _without(batch, outside(*values, len(batch.rollouts), options))


def mask_truncated(batch: Batch) -> Batch:
    """Takes responses that were cut off out of a batch: DAPO's overlong filtering (arXiv 2503.14476, section 3.4). They
    have had their part in the mean of their group."""
    return _without(batch, torch.tensor([rollout.finish == "length" for rollout in batch.rollouts], dtype=torch.bool))


def _without(batch: Batch, masked: Tensor) -> Batch:
    """masked: [B] bool"""
    batch.masked = masked if batch.masked is None else batch.masked | masked
    if masked.any():
        kept = ~masked[batch.rollout_index]
        batch.trained = kept if batch.trained is None else batch.trained & kept
    return batch
