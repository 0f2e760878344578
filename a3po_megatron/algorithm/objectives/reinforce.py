"""REINFORCE: the policy gradient as it is, without ratio and clip.

    J_t = A' log pi,   A' = token weight * A

With the normaliser `constant` and `constant: 1` it is A log pi(response), mean over rollouts (Williams 1992; as in
arXiv 2402.14740 for language models). After the first mini-batch of a step it is off-policy, and nothing makes up for
that. The correction is per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...config import ReinforceOptions
from ..token_loss import TokenBatch
from .terms import Terms, TokenTerms, none_clipped


@dataclass(frozen=True)
class Reinforce(TokenTerms[ReinforceOptions]):
    def terms(self, batch: TokenBatch, advantages: Tensor) -> Terms:
        return Terms(advantages * batch.logprobs, none_clipped(batch), none_clipped(batch))
