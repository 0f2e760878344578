"""Estimators of a divergence KL(p ‖ q) per token, from tokens sampled from p (J. Schulman, "Approximating KL
divergence", 2020), with x = log p - log q of the token.

    k1    x                  unbiased, of either sign. Its gradient as a loss is 0 in the mean
    k2    x² / 2             biased, not negative. On tokens of p its gradient is that of KL(p ‖ q) (arXiv 2510.01555)
    k3    e^(-x) - 1 + x     unbiased, not negative. On tokens of p its gradient is that of KL(q ‖ p)
    abs   |x|                what KL-Cov weighs (arXiv 2505.22617)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def kl_k3(log_ratio: Tensor) -> Tensor:
    """k3 of log_ratio = log q - log p."""
    return torch.expm1(log_ratio) - log_ratio


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda x: x,
    "k2": lambda x: x.square() / 2,
    "k3": lambda x: kl_k3(-x),
    "abs": torch.abs,
}
