"""VESPO: a rollout's whole importance weight, from the sampler to the policy being trained, through a soft kernel.

    W = exp(Σ_t (log pi - log pi_rollout)),   log W within [log 1e-8, 20]
    phi(W) = W^k exp(lambda (1 - W)),   1 at W = 1;   (k, lambda) by whether A >= 0
    J_t = sg(phi(W)) A' log pi,   A' = token weight * A

Source: arXiv 2602.10693, appendix I; the bounds of log W as in the authors' code and TRL, which bound each token's
log-ratio at ±20 as well. W is from the distribution that tokens were sampled from: it makes up for the sampler, and a
correction on top would do so twice (launch/check.py refuses it).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...config import VespoOptions
from ..token_loss import TokenBatch
from .terms import Terms, TokenTerms, none_clipped

LOG_WEIGHT = (math.log(1e-8), 20.0)


def kernel(
    log_weights: Tensor,  # [T] log W of each token's rollout
    advantages: Tensor,  # [T]
    options: VespoOptions,
) -> Tensor:
    """Returns phi(W), [T]."""
    k, scale = (
        torch.where(advantages >= 0, advantages.new_tensor(positive), advantages.new_tensor(negative))
        for positive, negative in (
            (options.k_positive, options.k_negative),
            (options.lambda_positive, options.lambda_negative),
        )
    )
    log_weights = log_weights.clamp(*LOG_WEIGHT)
    # One exponential: W^k alone would overflow where the other factor is 0.
    return torch.exp(k * log_weights - scale * torch.expm1(log_weights))


@dataclass(frozen=True)
class Vespo(TokenTerms[VespoOptions]):
    def terms(self, batch: TokenBatch, advantages: Tensor) -> Terms:
        with torch.no_grad():
            log_weights = batch.sequence_sum(batch.logprobs - batch.rollout_logprobs)[batch.rollout]
            phi = kernel(log_weights, advantages, self.options)
        return Terms(phi * advantages * batch.logprobs, none_clipped(batch), none_clipped(batch))
