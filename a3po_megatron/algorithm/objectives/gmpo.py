"""GMPO: the geometric mean of the tokens' ratios, each clipped on the side where its gradient would go on growing.

    c_t = min(log r, log_clip_high) where A > 0,   max(log r, -log_clip_low) elsewhere;   r = pi / pi_old
    J = exp(mean_t c_t) A,   mean over rollouts

Source: arXiv 2507.20673, whose range e^-0.4 to e^0.4 is the default. It has no correction for the sampler; a rollout's
is the geometric mean of its tokens' weights, as in verl, which is what the paper's mean over tokens makes of them (TRL
has none here).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...config import GmpoOptions
from ..token_loss import TokenBatch
from .terms import SequenceTerms, Terms, begun, correction_of, is_clipped, token_counts, token_mean


def one_sided(log_ratio: Tensor, advantages: Tensor, options: GmpoOptions) -> Tensor:
    """Returns c_t [T] of log r [T], differentiable."""
    high, low = log_ratio.clamp(max=options.log_clip_high), log_ratio.clamp(min=-options.log_clip_low)
    return torch.where(advantages > 0, high, low)


@dataclass(frozen=True)
class Gmpo(SequenceTerms[GmpoOptions]):
    def terms(self, batch: TokenBatch) -> Terms:
        log_ratio, counts = batch.logprobs - batch.old_logprobs, token_counts(batch)
        ratio = torch.exp(token_mean(batch, one_sided(log_ratio, batch.advantages, self.options), counts))
        weight = torch.exp(token_mean(batch, correction_of(batch, self.correction).log(), counts))
        values = begun(batch, ratio) * batch.advantages[batch.begins] * begun(batch, weight)
        bounds = -self.options.log_clip_low, self.options.log_clip_high
        return Terms(values, *is_clipped(log_ratio, batch.advantages, *bounds))
