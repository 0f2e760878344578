"""Advantages of rollouts, and the batch that the learner works on.

    group           A_i = (R_i - mean_G) / (std_G + eps)     GRPO, DAPO (arXiv 2503.14476, eq. 9); ddof = 1 as in the
                                                            A3PO authors' code. Without deviation Dr.GRPO (2503.20783)
    leave_one_out   A_i = R_i - mean of the others of G     RLOO (arXiv 2402.14740)
    max_rl          A_i = (R_i - mean_G) / (mean_G + eps)    MaxRL (arXiv 2602.02710): 0 where none is correct
    signed          A_i = 1 if correct, -1 if wrong         PSR (scales 1, 0), NSR (0, 1), W-REINFORCE (0.1, 1): arXiv
                                                            2506.01347. The A3PO authors' code has these scales with
                                                            `group`

over the valid members of rollout i's group, then times positive_scale or negative_scale by its verdict. A verdict
`invalid` is a failure of grading: the rollout leaves its group before mean and standard deviation and gets advantage 0;
but for `signed` a group with fewer than two valid members is all 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch, Collected
from ..config import Advantage, AdvantageOptions, LeaveOneOut, Signed


@torch.no_grad()
def group_advantages(
    rewards: Tensor,  # [B]
    group_index: Tensor,  # [B] int64, which group a rollout belongs to
    positive: Tensor,  # [B] bool, the verifier's verdict
    valid: Tensor,  # [B] bool, False: grading failed
    options: Advantage,
) -> Tensor:
    """Advantages [B] float32. Sums run in float64, so neither order nor a large common offset leaves a residue."""
    if rewards.numel() == 0:
        return rewards.new_zeros(0, dtype=torch.float32)
    scale = torch.where(positive, options.positive_scale, options.negative_scale)
    if isinstance(options, Signed):
        advantage = torch.where(positive, 1.0, -1.0).to(torch.float64) * valid
    elif isinstance(options, AdvantageOptions):
        advantage = normalised(rewards, group_index, valid, options)
    else:
        groups = _Groups.of(rewards, group_index, valid)
        count, mean = groups.members[group_index], groups.mean[group_index]
        if isinstance(options, LeaveOneOut):
            advantage = groups.centred * count / (count - 1).clamp(min=1)
        else:
            advantage = groups.centred / (mean.clamp(min=0) + options.eps)
        advantage = torch.where(groups.usable[group_index] & valid, advantage, 0.0)
    return (advantage * scale).to(torch.float32)


def normalised(
    rewards: Tensor,  # [N], at least one
    group_index: Tensor,  # [N] int64, which group one is of
    valid: Tensor,  # [N] bool, False: it has no part in its group, and gets 0
    options: AdvantageOptions,
) -> Tensor:
    """What each reward is above its group's mean, in standard deviations where these are wanted [N] float64."""
    groups = _Groups.of(rewards, group_index, valid)
    advantage = groups.centred
    if options.normalise_std:
        squares = torch.zeros_like(groups.mean).index_add_(0, group_index, advantage.square())
        spread = (squares / (groups.members - options.ddof).clamp(min=1)).sqrt()
        advantage = advantage / (spread[group_index] + options.eps)
    return torch.where(groups.usable[group_index] & valid, advantage, 0.0)


class _Groups(NamedTuple):
    """What the valid members of groups have in common [groups], and how far each is from its group's mean [N]."""

    members: Tensor
    mean: Tensor
    centred: Tensor
    usable: Tensor  # bool: of two members at least, and not all alike

    @classmethod
    def of(cls, rewards: Tensor, group_index: Tensor, valid: Tensor) -> _Groups:
        groups = int(group_index.max()) + 1
        keep = valid.to(torch.float64)
        reward = torch.where(valid, rewards.to(torch.float64), 0.0)

        def per_group(values: Tensor) -> Tensor:
            return torch.zeros(groups, dtype=torch.float64, device=rewards.device).index_add_(0, group_index, values)

        count = per_group(keep)
        mean = per_group(reward) / count.clamp(min=1)
        low = torch.full_like(count, float("inf")).scatter_reduce_(
            0, group_index, torch.where(valid, reward, float("inf")), "amin"
        )
        high = torch.full_like(count, float("-inf")).scatter_reduce_(
            0, group_index, torch.where(valid, reward, float("-inf")), "amax"
        )
        # Equal rewards must give exactly 0: a rounding residue of the mean over eps = 1e-6 would be a gradient.
        return cls(count, mean, (reward - mean[group_index]) * keep, (count >= 2) & (high > low))


def assemble(collected: Collected, options: Advantage, mini_batches: int) -> Batch:
    """Lays this replica's accepted groups out as one batch and gives each rollout its advantage and mini-batch.

    Mini-batch m takes the m-th of `mini_batches` nearly equal runs of the *global* prompt order, so that which rollouts
    share an optimiser step depends neither on the number of replicas nor on which engine sampled them. Rollouts whose
    grading failed are left out: they neither train nor count as tokens.
    """
    mini_batches = max(1, min(mini_batches, len(collected.accepted)))
    parts = np.array_split(np.array(collected.accepted, dtype=np.int64), mini_batches)
    part_of = {int(index): part for part, indices in enumerate(parts) for index in indices}
    rollouts = [rollout for group in collected.groups for rollout in group.valid]
    order = {group.prompt.index: position for position, group in enumerate(collected.groups)}
    group_index = torch.tensor([order[r.prompt.index] for r in rollouts], dtype=torch.int64)
    rewards = torch.tensor([r.reward for r in rollouts], dtype=torch.float32)
    positive = torch.tensor([r.verdict.outcome == "correct" for r in rollouts], dtype=torch.bool)
    lengths = torch.tensor([len(r.tokens) for r in rollouts], dtype=torch.int64)
    all_trained = not any(r.untrained for r in rollouts)
    logprobs = [torch.from_numpy(r.logprobs) for r in rollouts]
    return Batch(
        rollouts=rollouts,
        group_index=group_index,
        mini_batch=torch.tensor([part_of[r.prompt.index] for r in rollouts], dtype=torch.int64),
        mini_batches=mini_batches if collected.accepted else 0,
        rewards=rewards,
        positive=positive,
        advantages=group_advantages(rewards, group_index, positive, torch.ones_like(positive), options),
        lengths=lengths,
        rollout_index=torch.repeat_interleave(torch.arange(len(rollouts)), lengths),
        rollout_logprobs=torch.cat(logprobs) if logprobs else torch.zeros(0),
        trained=None if all_trained else torch.from_numpy(np.concatenate([r.trained() for r in rollouts])),
    )
