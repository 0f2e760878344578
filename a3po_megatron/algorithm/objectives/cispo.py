"""CISPO: the ratio is a weight, clipped from above and without gradient, so that no token's gradient is cut off.

    J_t = sg(min(r, 1 + high)) A' log pi,   r = pi / pi_old,   A' = token weight * A

Source: MiniMax-M1 (arXiv 2506.13585, eq. 4 and 5), which has no lower bound in effect and gives no number for the
upper one; the default maximum of 5 is within ScaleRL's range (arXiv 2510.13786). The correction is per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...config import CispoOptions
from ..token_loss import TokenBatch
from .terms import Terms, TokenTerms, none_clipped


@torch.no_grad()
def clipped_weights(logprobs: Tensor, old_logprobs: Tensor, clip_high: float) -> tuple[Tensor, Tensor]:
    """Returns min(r, 1 + clip_high), [T], no gradient, and where it is not r, whatever the advantage: [T] bool."""
    ratio = torch.exp(logprobs - old_logprobs)
    return ratio.clamp(max=1.0 + clip_high), ratio > 1.0 + clip_high


@dataclass(frozen=True)
class Cispo(TokenTerms[CispoOptions]):
    def terms(self, batch: TokenBatch, advantages: Tensor) -> Terms:
        weights, clipped = clipped_weights(batch.logprobs, batch.old_logprobs, self.options.clip_high)
        return Terms(weights * advantages * batch.logprobs, none_clipped(batch), clipped)
