"""Group-normalised advantages, and the batch that the learner works on.

    A_i = (R_i - mean_G) / (std_G + eps)      over the valid members of rollout i's group

A verdict `invalid` is a failure of grading: the rollout leaves its group before mean and standard deviation and gets
advantage 0; a group with fewer than two valid members is all 0. Source: DAPO (arXiv 2503.14476, eq. 9); ddof = 1 as in
the A3PO authors' code.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch, Collected
from ..config import AdvantageOptions


@torch.no_grad()
def group_advantages(
    rewards: Tensor,  # [B]
    group_index: Tensor,  # [B] int64, which group a rollout belongs to
    positive: Tensor,  # [B] bool, the verifier's verdict
    valid: Tensor,  # [B] bool, False: grading failed
    options: AdvantageOptions,
) -> Tensor:
    """Advantages [B] float32. Sums run in float64, so neither order nor a large common offset leaves a residue."""
    if rewards.numel() == 0:
        return rewards.new_zeros(0, dtype=torch.float32)
    scale = torch.where(positive, options.positive_scale, options.negative_scale)
    return (normalised(rewards, group_index, valid, options) * scale).to(torch.float32)


def normalised(
    rewards: Tensor,  # [N], at least one
    group_index: Tensor,  # [N] int64, which group one is of
    valid: Tensor,  # [N] bool, False: it has no part in its group, and gets 0
    options: AdvantageOptions,
) -> Tensor:
    """What each reward is above its group's mean, in standard deviations where these are wanted [N] float64."""
    groups = int(group_index.max()) + 1
    keep = valid.to(torch.float64)
    reward = torch.where(valid, rewards.to(torch.float64), 0.0)

    def per_group(values: Tensor) -> Tensor:  # [B] → [groups], summed over valid members
        return torch.zeros(groups, dtype=torch.float64, device=rewards.device).index_add_(0, group_index, values)

    count = per_group(keep)
    mean = per_group(reward) / count.clamp(min=1)
    centred = (reward - mean[group_index]) * keep
    spread = (per_group(centred.square()) / (count - options.ddof).clamp(min=1)).sqrt()
    low = torch.full_like(count, float("inf")).scatter_reduce_(
        0, group_index, torch.where(valid, reward, float("inf")), "amin"
    )
    high = torch.full_like(count, float("-inf")).scatter_reduce_(
        0, group_index, torch.where(valid, reward, float("-inf")), "amax"
    )
    # Equal rewards must give exactly 0: a rounding residue of the mean over eps = 1e-6 would be a gradient.
    usable = (count >= 2) & (high > low)
    advantage = centred / (spread[group_index] + options.eps) if options.normalise_std else centred
    return torch.where(usable[group_index] & valid, advantage, 0.0)


def assemble(collected: Collected, options: AdvantageOptions, mini_batches: int) -> Batch:
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
