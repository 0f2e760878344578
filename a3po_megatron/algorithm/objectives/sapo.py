"""SAPO: a gate that closes smoothly as the ratio leaves 1, in place of a clip.

    J_t = (4 / tau) sigmoid(tau (r - 1)) A',   r = pi / pi_old,   A' = token weight * A
    tau = temperature_positive where A' > 0, temperature_negative elsewhere

Source: arXiv 2511.20347. The gradient by log pi is 4 p (1 - p) r A' with p the sigmoid: r A' at r = 1, whatever tau.
Nothing is clipped. The correction is per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...config import SapoOptions
from ..token_loss import TokenBatch
from .terms import Terms, TokenTerms, none_clipped


def gated(
    logprobs: Tensor,  # [T] of the policy being trained, with gradient
    old_logprobs: Tensor,  # [T]
    advantages: Tensor,  # [T]
    options: SapoOptions,
) -> Tensor:
    """Returns the objective of every token, [T]."""
    positive, negative = (
        advantages.new_tensor(tau) for tau in (options.temperature_positive, options.temperature_negative)
    )
    temperature = torch.where(advantages > 0, positive, negative)
    ratio = torch.exp(logprobs - old_logprobs)
    return 4 / temperature * torch.sigmoid(temperature * (ratio - 1)) * advantages


@dataclass(frozen=True)
class Sapo(TokenTerms[SapoOptions]):
    def terms(self, batch: TokenBatch, advantages: Tensor) -> Terms:
        values = gated(batch.logprobs, batch.old_logprobs, advantages, self.options)
        return Terms(values, none_clipped(batch), none_clipped(batch))
