"""DAPO's clipped objective per token, with A3PO's token weights and the correction for the sampler's distribution.

    J_t = min(r A', clip(r, 1 - low, 1 + high) A'),   for A' < 0 not below c A' (dual clip),   times the TIS weight
    r = pi / pi_old,   A' = token weight * A,   TIS weight = min(pi_old / pi_rollout, C)

The sum of -J_t is divided by the response tokens of the mini-batch over all ranks. Sources: DAPO (arXiv 2503.14476,
eq. 8 and 12), dual clip (arXiv 1912.09729).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ...config import Correction, ObjectiveOptions
from ..correction import sampler_correction
from ..kl import kl_k3
from ..sums import Kind, Max, Sum
from ..token_loss import Normaliser, TokenBatch, TokenLoss


class Surrogate(NamedTuple):
    """Per response token, all [T]; only `loss` carries a gradient."""

    loss: Tensor
    ratio: Tensor
    clipped_low: Tensor  # bool: A' < 0 and ratio below 1 - low
    clipped_high: Tensor  # bool: A' > 0 and ratio above 1 + high


def policy_loss(
    logprobs: Tensor,  # [T] of the policy being trained, with gradient
    old_logprobs: Tensor,  # [T] fixed over the mini-batches of a step
    advantages: Tensor,  # [T] A' = token weight * advantage of the token
    correction: Tensor,  # [T] TIS weight
    options: ObjectiveOptions,
) -> Surrogate:
    """The negative objective of every token."""
    ratio = torch.exp(logprobs - old_logprobs)
    low, high = 1.0 - options.clip_low, 1.0 + options.clip_high
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    if options.dual_clip:
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, options.dual_clip * advantages), surrogate)
    with torch.no_grad():
        clipped_low = (ratio < low) & (advantages < 0)
        clipped_high = (ratio > high) & (advantages > 0)
    return Surrogate(-surrogate * correction, ratio.detach(), clipped_low, clipped_high)


@dataclass(frozen=True)
class Clipped:
    options: ObjectiveOptions
    correction: Correction
    normaliser: ClassVar[Normaliser] = "tokens"
    constant: ClassVar[int] = 1
    metrics: ClassVar[Mapping[str, Kind]] = {
        "learner/loss": Sum,
        "policy/clip_low_rate": Sum,
        "policy/clip_high_rate": Sum,
        "policy/kl_old": Sum,
        "policy/ratio_first_max": Max,
    }

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        advantages = batch.token_weights * batch.advantages
        correction = sampler_correction(batch.old_logprobs, batch.rollout_logprobs, self.correction)
        surrogate = policy_loss(batch.logprobs, batch.old_logprobs, advantages, correction, self.options)
        loss, tokens = surrogate.loss.sum(), batch.logprobs.numel()
        farthest = surrogate.ratio.new_zeros(())
        if batch.mini_batch == 0 and tokens:  # nothing has changed yet: it must be numerical noise
            farthest = (surrogate.ratio - 1).abs().max()
        return TokenLoss(
            loss,
            {
                "learner/loss": Sum(loss.detach(), tokens),
                "policy/clip_low_rate": Sum(surrogate.clipped_low.sum(), tokens),
                "policy/clip_high_rate": Sum(surrogate.clipped_high.sum(), tokens),
                "policy/kl_old": Sum(kl_k3(batch.logprobs.detach() - batch.old_logprobs).sum(), tokens),
                "policy/ratio_first_max": Max(farthest),
            },
        )
