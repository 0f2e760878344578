"""What objectives have in common: how terms become a loss, and what is reported beside it.

    an objective of tokens      loss = -Σ term[t] · correction[t], each rollout's part divided by its tokens where the
                                normaliser is `sequences`
    an objective of sequences   loss = -Σ term[i], in which the correction already is

The learner divides by the normaliser (algorithm/token_loss.py). A file in this folder holds the formula of its terms;
which of them a name of the configuration means stands in registry.py.

Every objective reports the same metrics, so that they compare: of tokens, whatever its ratio is of. A token of which
the whole rollout is clipped is clipped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ...config import Correction, SequenceObjective, TokenObjective
from ..correction import sampler_correction
from ..kl import kl_k3
from ..sums import Kind, Max, Sum
from ..token_loss import Normaliser, Objective, TokenBatch, TokenLoss, normaliser_count

METRICS: Mapping[str, Kind] = {
    "learner/loss": Sum,
    "policy/clip_low_rate": Sum,
    "policy/clip_high_rate": Sum,
    "policy/kl_old": Sum,
    "policy/ratio_first_max": Max,
}
OfTokens = TypeVar("OfTokens", bound=TokenObjective)
OfSequences = TypeVar("OfSequences", bound=SequenceObjective)


class Terms(NamedTuple):
    """What is maximised, of a micro-batch; only `values` carries a gradient."""

    values: Tensor  # [T] of tokens, or [rollouts that begin here] of sequences
    clipped_low: Tensor  # [T] bool, from below
    clipped_high: Tensor  # [T] bool, from above


@dataclass(frozen=True)
class TokenTerms(ABC, Generic[OfTokens]):
    """An objective that is a sum over tokens, of advantages that A3PO has weighted."""

    options: OfTokens
    correction: Correction
    metrics: ClassVar[Mapping[str, Kind]] = METRICS

    @abstractmethod
    def terms(self, batch: TokenBatch, advantages: Tensor) -> Terms:
        """Returns values [T]. `advantages`: [T] A' = token weight × advantage of the token."""

    @property
    def normaliser(self) -> Normaliser:
        return self.options.normaliser

    @property
    def constant(self) -> int:
        if self.options.constant is None:
            raise ValueError("objective.constant is open: config/resolve.py says what it is")
        return self.options.constant

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        terms = self.terms(batch, batch.token_weights * batch.advantages)
        losses = -terms.values * correction_of(batch, self.correction)
        if self.normaliser == "sequences":
            losses = losses / token_counts(batch)[batch.rollout]
        return reported(self, batch, losses.sum(), terms)


@dataclass(frozen=True)
class SequenceTerms(ABC, Generic[OfSequences]):
    """An objective that is a mean over rollouts of one term each."""

    options: OfSequences
    correction: Correction
    normaliser: ClassVar[Normaliser] = "sequences"
    constant: ClassVar[int] = 1
    metrics: ClassVar[Mapping[str, Kind]] = METRICS

    @abstractmethod
    def terms(self, batch: TokenBatch) -> Terms:
        """Returns values of the rollouts that begin here. Collective over the context-parallel ranks."""

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        terms = self.terms(batch)
        return reported(self, batch, -terms.values.sum(), terms)


def correction_of(batch: TokenBatch, correction: Correction) -> Tensor:
    """Returns what makes up for the sampler's other log-probs, [T], no gradient."""
    return sampler_correction(batch.old_logprobs, batch.rollout_logprobs, correction)


def token_counts(batch: TokenBatch) -> Tensor:
    """Returns how many tokens of each rollout are trained on, [rollouts] float, at least 1. Collective over the
    context-parallel ranks."""
    return batch.sequence_sum(torch.ones_like(batch.old_logprobs)).clamp(min=1)


def token_mean(batch: TokenBatch, values: Tensor, counts: Tensor) -> Tensor:
    """Returns the mean of values [T] over each rollout's tokens, [rollouts], differentiable; `counts`: `token_counts`.
    Collective over the context-parallel ranks."""
    return batch.sequence_sum(values) / counts


def begun(batch: TokenBatch, values: Tensor) -> Tensor:
    """Returns, of values [rollouts], those of the rollouts that begin here, in the order of their tokens: what counts
    once a rollout, whoever holds its tokens."""
    return values[batch.rollout[batch.begins]]


def clipped_surrogate(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Returns PPO's min(r A, clip(r, low, high) A), elementwise (arXiv 1707.06347, eq. 7)."""
    return torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)


@torch.no_grad()
def is_clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Returns whether that has no gradient, [T] bool: because A < 0 and the ratio is low, because A > 0 and it is
    high."""
    return (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)


def none_clipped(batch: TokenBatch) -> Tensor:
    """Returns [T] bool, all false: for what nothing is clipped in."""
    return torch.zeros_like(batch.begins)


@torch.no_grad()
def reported(objective: Objective, batch: TokenBatch, loss: Tensor, terms: Terms) -> TokenLoss:
    """Returns the loss [] with the metrics METRICS."""
    log_ratio, tokens = batch.logprobs - batch.old_logprobs, batch.logprobs.numel()
    farthest = log_ratio.new_zeros(())
    if batch.mini_batch == 0 and tokens:  # nothing has changed yet: it must be numerical noise
        farthest = (torch.exp(log_ratio) - 1).abs().max()
    return TokenLoss(
        loss,
        {
            "learner/loss": Sum(loss.detach(), normaliser_count(objective, batch)),
            "policy/clip_low_rate": Sum(terms.clipped_low.sum(), tokens),
            "policy/clip_high_rate": Sum(terms.clipped_high.sum(), tokens),
            "policy/kl_old": Sum(kl_k3(log_ratio).sum(), tokens),
            "policy/ratio_first_max": Max(farthest),
        },
    )
