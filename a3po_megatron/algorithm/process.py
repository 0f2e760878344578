"""Process rewards: what a grader gives for steps of a response becomes an advantage of the tokens of these steps.

    r̃_j    = (r_j - mean) / (std + eps)      over all steps j of the valid members of a group
    p_t    = r̃ of the step of token t; 0 in none              process.name: spans
           = Σ r̃ of the steps that end at or after token t    process.name: to_go
    A'_t   = A + weight · p_t                A: the advantage of the token's rollout (advantage.py)

`to_go` is DeepSeekMath's process supervision (arXiv 2402.03300, §4.1.3), there in place of the outcome's advantage;
`spans` leaves out what later steps are worth. The mean is taken off, and the deviation divided by, as `advantage` says.

A token is of the step in which its text begins (data/characters.py). Steps lie in order and none over another, so that
one search finds for each token the first step that ends behind its beginning: its own one, or else the next. A rollout
without steps has p = 0, and so has a token that is not trained on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch
from ..config import Advantage, AdvantageOptions, NoProcess, Process, RewardsToGo
from .advantage import normalised

# A sum of normalised scores that is 0 on paper is some 1e-16 of its terms in float64, and must have no sign.
ROUNDING = 1e-12


@torch.no_grad()
def process_advantages(
    scores: Tensor,  # [K] of the steps of all rollouts, rollout after rollout
    spans: Tensor,  # [K, 2] int64, the first character of a step and that behind its last
    step_rollout: Tensor,  # [K] int64, which rollout a step is of, ascending
    begins: Tensor,  # [T] int64, the character at which a token's text begins
    rollout_index: Tensor,  # [T] int64, which rollout a token is of, ascending
    group_index: Tensor,  # [B] int64, which group a rollout is of
    to_go: bool,
    options: AdvantageOptions,
) -> Tensor:
    """Process advantages [T] float64, before their weight."""
    if len(scores) == 0:
        return torch.zeros(len(begins), dtype=torch.float64, device=begins.device)
    worth = normalised(scores, group_index[step_rollout], torch.ones_like(scores, dtype=torch.bool), options)
    # One ascending key of (rollout, character) for all ends, and for all tokens.
    ends, places = (step_rollout << 32) + spans[:, 1], (rollout_index << 32) + begins
    step = torch.searchsorted(ends, places, right=True).clamp(max=len(scores) - 1)
    to_come = (step_rollout[step] == rollout_index) & (spans[step, 1] > begins)
    if to_go:
        return torch.where(to_come, _to_go(worth, step_rollout)[step], 0.0)
    return torch.where(to_come & (spans[step, 0] <= begins), worth[step], 0.0)


def _to_go(worth: Tensor, step_rollout: Tensor) -> Tensor:
    """What each step and those behind it are worth together [K]. Rollout by rollout: the last bits of a sum must not
    depend on which other rollouts are in the batch."""
    parts = worth.split(torch.unique_consecutive(step_rollout, return_counts=True)[1].tolist())
    sums, sizes = (
        torch.cat([part.flip(0).cumsum(0).flip(0) for part in each]) for each in (parts, [part.abs() for part in parts])
    )
    return torch.where(sums.abs() <= ROUNDING * sizes, 0.0, sums)


def add_process(
    batch: Batch,
    process: Process,
    advantage: Advantage,
    begins: Callable[[np.ndarray], np.ndarray],  # tokens of a response [n] → where they begin in its text [n]
) -> Batch:
    """Adds the process advantages of its tokens to a batch of whole groups and, where shaping goes by them, the tokens'
    polarity. A batch of a run without process rewards is left as it is."""
    if isinstance(process, NoProcess):
        return batch
    steps = [(row, step) for row, rollout in enumerate(batch.rollouts) for step in rollout.verdict.steps]
    # Where there are no steps, places in the text are of no use: to find them costs time.
    places = [
        begins(rollout.tokens) if rollout.verdict.steps else np.zeros(len(rollout.tokens), np.int64)
        for rollout in batch.rollouts
    ]
    found = process_advantages(
        torch.tensor([step.score for _, step in steps], dtype=torch.float64),
        torch.tensor([[step.begin, step.end] for _, step in steps], dtype=torch.int64).view(-1, 2),
        torch.tensor([row for row, _ in steps], dtype=torch.int64),
        torch.from_numpy(np.concatenate(places or [np.zeros(0, np.int64)])),
        batch.rollout_index,
        batch.group_index,
        isinstance(process, RewardsToGo),
        advantage if isinstance(advantage, AdvantageOptions) else AdvantageOptions(),
    )
    if batch.trained is not None:
        found = found * batch.trained
    batch.process_advantages = (process.weight * found).to(torch.float32)
    if process.polarity == "tokens":
        batch.token_positive = torch.where(found == 0, batch.positive[batch.rollout_index], found > 0)
    return batch
