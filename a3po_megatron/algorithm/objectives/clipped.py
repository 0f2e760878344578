"""The clipped objective per token: DAPO's, GRPO's and Dr.GRPO's, by what it is divided by.

    J_t = min(r A', clip(r, 1 - low, 1 + high) A'),   for A' < 0 not below c A' (dual clip),   times the correction
    r = pi / pi_old,   A' = token weight * A

    normaliser: tokens      mean over the response tokens of the mini-batch: DAPO (arXiv 2503.14476, eq. 8 and 12)
                sequences   mean over each rollout's tokens, then over rollouts: GRPO (arXiv 2402.03300, eq. 3)
                constant    sum over rollouts × constant: Dr.GRPO (arXiv 2503.20783), with advantages R - mean

Dual clip: arXiv 1912.09729. The correction is per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...config import ClippedOptions
from ..token_loss import TokenBatch
from .terms import Terms, TokenTerms, clipped_surrogate, is_clipped


def surrogate(
    logprobs: Tensor,  # [T] of the policy being trained, with gradient
    old_logprobs: Tensor,  # [T] fixed over the mini-batches of a step
    advantages: Tensor,  # [T] A' = token weight * advantage of the token
    options: ClippedOptions,
) -> Terms:
    """Returns the objective of every token, before the correction."""
    ratio = torch.exp(logprobs - old_logprobs)
    bounds = 1.0 - options.clip_low, 1.0 + options.clip_high
    values = clipped_surrogate(ratio, advantages, *bounds)
    if options.dual_clip:
        values = torch.where(advantages < 0, torch.maximum(values, options.dual_clip * advantages), values)
    return Terms(values, *is_clipped(ratio, advantages, *bounds))


@dataclass(frozen=True)
class Clipped(TokenTerms[ClippedOptions]):
    def terms(self, batch: TokenBatch, advantages: Tensor) -> Terms:
        return surrogate(batch.logprobs, batch.old_logprobs, advantages, self.options)
