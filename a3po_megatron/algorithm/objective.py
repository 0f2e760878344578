"""DAPO's clipped objective per token, and the correction for the sampler's distribution.

    J_t = min(r A', clip(r, 1 - low, 1 + high) A'),   for A' < 0 not below c A' (dual clip),   times the TIS weight
    r = pi / pi_old,   A' = token weight * A,   TIS weight = min(pi_old / pi_rollout, C)

The learner divides the sum of -J_t by the response tokens of the mini-batch over all ranks. Sources: DAPO (arXiv
2503.14476, eq. 8 and 12), dual clip (arXiv 1912.09729), truncated importance sampling as in verl and slime.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import CorrectionOptions, ObjectiveOptions


class TokenLoss(NamedTuple):
    """Per response token, all [T] float32; only `loss` carries a gradient."""

    loss: Tensor
    ratio: Tensor
    clipped_low: Tensor  # bool: A' < 0 and ratio below 1 - low
    clipped_high: Tensor  # bool: A' > 0 and ratio above 1 + high


def policy_loss(
    logprobs: Tensor,  # [T] of the policy being trained, with gradient
    old_logprobs: Tensor,  # [T] fixed over the mini-batches of a step
    advantages: Tensor,  # [T] A' = token weight * advantage of the rollout
    correction: Tensor,  # [T] TIS weight
    options: ObjectiveOptions,
) -> TokenLoss:
    """The negative objective of every token."""
    ratio = torch.exp(logprobs - old_logprobs)
    low, high = 1.0 - options.clip_low, 1.0 + options.clip_high
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    if options.dual_clip is not None:
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, options.dual_clip * advantages), surrogate)
    with torch.no_grad():
        clipped_low = (ratio < low) & (advantages < 0)
        clipped_high = (ratio > high) & (advantages > 0)
    return TokenLoss(-surrogate * correction, ratio.detach(), clipped_low, clipped_high)


@torch.no_grad()
def sampler_correction(old_logprobs: Tensor, rollout_logprobs: Tensor, options: CorrectionOptions) -> Tensor:
    """TIS weights [T]: min(pi_train_old / pi_rollout, cap); all 1 when the correction is off."""
    if options.tis_cap is None:
        return torch.ones_like(old_logprobs)
    return torch.exp(old_logprobs - rollout_logprobs).clamp(max=options.tis_cap)


def kl_k3(log_ratio: Tensor) -> Tensor:
    """Schulman's k3 estimator per token, (r - 1) - log r ≥ 0, of KL(q ‖ p) for tokens sampled from q, r = p / q."""
    return torch.expm1(log_ratio) - log_ratio
