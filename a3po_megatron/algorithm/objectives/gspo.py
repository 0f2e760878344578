"""GSPO: a rollout's ratio is the geometric mean of its tokens', and it is clipped whole (arXiv 2507.18071, eq. 5 to 7).

    s = exp(mean_t log r),   r = pi / pi_old
    J = min(s A, clip(s, 1 - low, 1 + high) A),   mean over rollouts

The paper has no correction for the sampler. Here a rollout's is the mean of its tokens' weights: what TRL and verl get
when they multiply every token by its weight and take the mean over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...config import Correction, GspoOptions, LuspoOptions
from ..token_loss import TokenBatch
from .terms import SequenceTerms, Terms, begun, clipped_surrogate, correction_of, is_clipped, token_counts, token_mean


def sequence_ratio(batch: TokenBatch, counts: Tensor) -> Tensor:
    """Returns s of every rollout, [rollouts], differentiable; 1 of those without tokens. Collective over the
    context-parallel ranks."""
    return torch.exp(token_mean(batch, batch.logprobs - batch.old_logprobs, counts))


def sequence_surrogate(
    batch: TokenBatch, counts: Tensor, correction: Correction, options: GspoOptions | LuspoOptions
) -> Terms:
    """Returns GSPO's term, corrected, of the rollouts that begin here. Collective over the context-parallel ranks."""
    bounds = 1.0 - options.clip_low, 1.0 + options.clip_high
    ratio = sequence_ratio(batch, counts)
    weights = token_mean(batch, correction_of(batch, correction), counts)
    values = clipped_surrogate(begun(batch, ratio), batch.advantages[batch.begins], *bounds) * begun(batch, weights)
    return Terms(values, *is_clipped(ratio[batch.rollout], batch.advantages, *bounds))


@dataclass(frozen=True)
class Gspo(SequenceTerms[GspoOptions]):
    def terms(self, batch: TokenBatch) -> Terms:
        return sequence_surrogate(batch, token_counts(batch), self.correction, self.options)
