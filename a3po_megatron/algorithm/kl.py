"""Estimators of a divergence, per token."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_k3(log_ratio: Tensor) -> Tensor:
    """Schulman's k3 estimator per token, (r - 1) - log r ≥ 0, of KL(q ‖ p) for tokens sampled from q, r = p / q."""
    return torch.expm1(log_ratio) - log_ratio
