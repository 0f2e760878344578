"""GSPO-token: GSPO's ratio and clip, with an advantage of each token's own (arXiv 2507.18071, eq. 13 and 14).

    s_t = sg(s) pi_t / sg(pi_t),   s as in gspo.py
    J_t = min(s_t A', clip(s_t, 1 - low, 1 + high) A'),   A' = token weight * A

s_t equals s, and its gradient is that of the token's log-prob: where all A' of a rollout are equal, the mean over its
tokens is GSPO. Hence the form for A3PO and process rewards. The correction is per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...config import GspoTokenOptions
from ..token_loss import TokenBatch
from .gspo import sequence_ratio
from .terms import Terms, TokenTerms, clipped_surrogate, is_clipped, token_counts


def token_ratio(logprobs: Tensor, ratio: Tensor) -> Tensor:
    """Returns s_t [T], from log-probs [T] with gradient and s of each token's rollout [T]."""
    return ratio.detach() * torch.exp(logprobs - logprobs.detach())


@dataclass(frozen=True)
class GspoToken(TokenTerms[GspoTokenOptions]):
    def terms(self, batch: TokenBatch, advantages: Tensor) -> Terms:
        bounds = 1.0 - self.options.clip_low, 1.0 + self.options.clip_high
        with torch.no_grad():
            ratio = sequence_ratio(batch, token_counts(batch))[batch.rollout]
        values = clipped_surrogate(token_ratio(batch.logprobs, ratio), advantages, *bounds)
        return Terms(values, *is_clipped(ratio, advantages, *bounds))
