"""The seam between the learner and an objective: tokens of a micro-batch in, a loss and what to report out.

    objective(TokenBatch) → TokenLoss(loss, sums)

The learner packs, calls, accumulates gradients and adds up over micro-batches, context- and data-parallel ranks; it
knows neither the formula nor a metric's name. An objective is one file in objectives/: it declares what the summed loss
is divided by, and which metrics it reports.

    loss = Σ over the mini-batch of all ranks / normaliser        tokens: response tokens of the mini-batch
                                                                  sequences: its rollouts
                                                                  constant: its rollouts × `constant`

Tokens that are not trained on (batch.Segment) never come here: no sum, normaliser or metric has to leave them out, and
a rollout of which none is trained on is none here.

Context-parallel ranks hold different tokens of the same rollouts. What is a sum over a rollout is `sequence_sum`, the
same on all of them; what counts once a rollout counts where the rollout `begins`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..batch import Pull
from ..config.objective import Normaliser as Normaliser  # for objectives, which declare one
from ..telemetry.catalogue import METRICS
from .sums import Kind, Max, Sum


@dataclass(frozen=True)
class TokenBatch:
    """Response tokens [T] of one micro-batch on this rank, those that are trained on; only `logprobs` and `entropy`
    carry a gradient. T may be 0."""

    logprobs: Tensor  # of the policy being trained
    old_logprobs: Tensor  # fixed over the mini-batches of a step
    rollout_logprobs: Tensor  # of the distribution they were sampled from
    advantages: Tensor  # of the token's rollout and, with process rewards, of its steps (process.py)
    token_weights: Tensor  # A3PO's
    rollout: Tensor  # int64, which of this replica's rollouts a token is of
    begins: Tensor  # bool, whether it is its rollout's first of these
    rollouts: int  # of this replica, whatever the micro-batch
    mini_batch: int  # which optimiser step of the RL step this is
    pulls: tuple[Pull, ...] = ()  # what draws them elsewhere, of the same kinds on all ranks (regulariser.py)
    entropy: Tensor | None = None  # None: of no interest in this step
    entropy_weight: float = 0.0
    context: Any = None  # process group of the ranks that hold parts of the same sequences; None: this rank alone

    def sequence_sum(self, values: Tensor) -> Tensor:
        """Sums values [T] over each rollout [rollouts], on all context-parallel ranks; differentiable. Collective over
        them: every rank must call it equally often, without tokens too."""
        sums = torch.zeros(self.rollouts, dtype=values.dtype, device=values.device)
        sums = sums.index_add(0, self.rollout, values)
        alone = self.context is None or dist.get_world_size(self.context) == 1
        return sums if alone else _Everywhere.apply(sums, self.context)  # type: ignore[no-untyped-call]  # torch's own


class _Everywhere(torch.autograd.Function):
    """A sum over the ranks of a group, on all of them. Each rank's loss is a part of the whole: what the whole gains by
    one rank's share is the sum of what all ranks' losses gain by it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class TokenLoss(NamedTuple):
    loss: Tensor  # [] summed over what this rank holds, to be divided by the normaliser
    sums: Mapping[str, Sum | Max]  # metric → what this micro-batch adds to it: exactly those that are declared


class Objective(Protocol):
    @property
    def normaliser(self) -> Normaliser: ...

    @property
    def constant(self) -> int:
        """With the normaliser `constant`: per rollout, such as the longest response."""

    @property
    def metrics(self) -> Mapping[str, Kind]:
        """What it reports, by names of the catalogue, and how that adds."""

    def __call__(self, batch: TokenBatch) -> TokenLoss: ...


def normaliser_count(objective: Objective, batch: TokenBatch) -> int:
    """Returns what a micro-batch on one rank adds to the normaliser."""
    if objective.normaliser == "tokens":
        return batch.logprobs.numel()
    rollouts = int(batch.begins.sum())
    return rollouts if objective.normaliser == "sequences" else rollouts * objective.constant


def known(objective: Objective) -> Objective:
    """Returns it. Raises KeyError where it reports a metric that is not in the catalogue."""
    if unknown := objective.metrics.keys() - set(METRICS):
        raise KeyError(f"{type(objective).__name__} reports {sorted(unknown)}: not in telemetry/catalogue.py")
    return objective
