"""The correction for the distribution that rollouts were sampled from: truncated importance sampling, as in verl and
slime."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import Correction, NoCorrection


@torch.no_grad()
def sampler_correction(old_logprobs: Tensor, rollout_logprobs: Tensor, options: Correction) -> Tensor:
    """TIS weights [T]: min(pi_train_old / pi_rollout, cap); all 1 when the correction is off."""
    if isinstance(options, NoCorrection):
        return torch.ones_like(old_logprobs)
    return torch.exp(old_logprobs - rollout_logprobs).clamp(max=options.cap)
