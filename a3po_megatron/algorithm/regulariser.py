"""What is added to any objective: a pull to other log-probs, and an entropy bonus.

    loss = objective + Σ weight[t] · divergence(log pi[t] - target[t]) - entropy weight · Σ H[t]

divided as the objective's loss is: by the mini-batch's tokens; or each rollout's part by its tokens, and by rollouts;
or by rollouts × constant. Neither A3PO's weights nor the correction for the sampler are on it.

    kl, in the loss      all tokens are drawn to the run's first weights (the reference)
    kl, in the reward    R_i - kl · Σ_t divergence(log pi_old - log pi_reference) is what a rollout's advantage is of
    entropy              a bonus; with a target it counts only where the step's mean entropy H is not above it, and its
                         weight goes up by entropy_step where H is below, down where it is above (Skywork-OR1, arXiv
                         2505.22312, section 4: adaptive entropy control, whose weight begins at 0)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch, Pull
from ..config import Advantage, RegulariserOptions
from .advantage import group_advantages
from .kl import ESTIMATORS
from .largest import Total
from .objectives.terms import token_counts
from .sums import Kind, Sum
from .token_loss import Normaliser, Objective, TokenBatch, TokenLoss, normaliser_count

METRIC = "learner/regulariser"


@dataclass(frozen=True)
class Regularised:
    """An objective with what is added to it."""

    objective: Objective

    @property
    def normaliser(self) -> Normaliser:
        return self.objective.normaliser

    @property
    def constant(self) -> int:
        return self.objective.constant

    @property
    def metrics(self) -> Mapping[str, Kind]:
        return {**self.objective.metrics, METRIC: Sum}

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        loss, sums = self.objective(batch)
        added = self._added(batch)
        return TokenLoss(
            loss if added is None else loss + added,
            {**sums, METRIC: Sum(0.0 if added is None else added.detach(), normaliser_count(self, batch))},
        )

    def _added(self, batch: TokenBatch) -> Tensor | None:
        """What is added to the summed loss []; None where nothing is, on all ranks."""
        if not batch.pulls and batch.entropy is None:
            return None
        values = torch.zeros_like(batch.logprobs)
        for pull in batch.pulls:
            # Of tokens that are not drawn the target may be anything: neither they nor their gradient may become NaN.
            apart = torch.where(pull.weights > 0, batch.logprobs - pull.targets, 0.0)
            values = values + pull.weights * ESTIMATORS[pull.estimator](apart)
        if batch.entropy is not None:
            values = values - batch.entropy_weight * batch.entropy
        if self.normaliser == "sequences":
            values = values / token_counts(batch)[batch.rollout]
        return values.sum()


class Regulariser:
    """Gives a scored batch what its updates are regularised by."""

    def __init__(
        self,
        options: RegulariserOptions,
        advantage: Advantage,
        total: Total,
        gather: Callable[[Tensor], list[Tensor]] = lambda values: [values],  # of every replica, by replica; collective
        replica: int = 0,
    ) -> None:
        self._options, self._advantage, self._total = options, advantage, total
        self._gather, self._replica = gather, replica
        self._entropy_weight = options.entropy  # the same on all ranks

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Batch:
        """Collective over the replicas."""
        options = self._options
        if options.kl and options.place == "loss":
            assert batch.reference_logprobs is not None, "score the batch by the reference, too"
            every = torch.full_like(batch.reference_logprobs, options.kl)
            batch.pulls.append(Pull(options.estimator, batch.reference_logprobs, every))
        elif options.kl:
            batch = self._from_reward(batch)
        if options.has_bonus:
            batch.entropy_weight = self._bonus(batch)
        return batch

    def _from_reward(self, batch: Batch) -> Batch:
        assert batch.old_logprobs is not None and batch.reference_logprobs is not None, "score the batch first"
        trained = batch.is_trained()
        apart = (batch.old_logprobs - batch.reference_logprobs)[trained].double()
        paid, tokens = torch.zeros(2, len(batch.rollouts), dtype=torch.float64)
        paid.index_add_(0, batch.rollout_index[trained], ESTIMATORS[self._options.estimator](apart))
        tokens.index_add_(0, batch.rollout_index[trained], torch.ones_like(apart))
        names = torch.tensor([(r.prompt.index, r.sample) for r in batch.rollouts], dtype=torch.float64).view(-1, 2)
        columns = (batch.rewards.double(), self._options.kl * paid, tokens, batch.positive.double())
        # A group's rollouts may be on several replicas (rollout/balance.py): they are added in one order wherever.
        tables = self._gather(torch.cat([names, torch.stack(columns, dim=1)], dim=1))
        table = torch.cat(tables)
        order = torch.from_numpy(np.lexsort((table[:, 1].numpy(), table[:, 0].numpy())))
        prompts, _, rewards, penalty, scored, positive = table[order].T
        groups = torch.unique(prompts, return_inverse=True)[1]
        # What is masked has no scores, and stays in its group: it pays what the others pay on average.
        sums = torch.zeros(2, len(groups), dtype=torch.float64)
        sums.index_add_(1, groups, torch.stack([penalty, torch.ones_like(penalty)]) * (scored > 0))
        penalty = torch.where(scored > 0, penalty, (sums[0] / sums[1].clamp(min=1))[groups])
        valid = torch.ones_like(groups, dtype=torch.bool)
        advantages = torch.empty(len(order))
        advantages[order] = group_advantages((rewards - penalty).float(), groups, positive > 0, valid, self._advantage)
        batch.advantages = advantages.split([len(each) for each in tables])[self._replica]
        return batch

    def _bonus(self, batch: Batch) -> float:
        """The weight of the bonus in this step; afterwards that of the next is known."""
        options, weight = self._options, self._entropy_weight
        if not options.entropy_target:
            return weight
        assert batch.entropy is not None, "score the batch first"
        trained = batch.is_trained()
        entropy, tokens = self._total(torch.stack([batch.entropy[trained].double().sum(), trained.sum().double()]))
        if not tokens:  # an empty step says nothing of entropy
            return 0.0
        mean = float(entropy / tokens)
        step = options.entropy_step if mean < options.entropy_target else -options.entropy_step
        self._entropy_weight = max(0.0, weight + (step if mean != options.entropy_target else 0.0))
        return weight if mean <= options.entropy_target else 0.0

    def state(self) -> dict[str, Any]:
        return {"entropy_weight": self._entropy_weight}

    def restore(self, state: dict[str, Any]) -> None:
        self._entropy_weight = state["entropy_weight"]
