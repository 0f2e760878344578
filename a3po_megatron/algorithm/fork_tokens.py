"""Fork tokens: of all response tokens of a step only those of highest entropy are trained on (arXiv 2506.01939).

    kept = the ceil(fraction * T) tokens of highest entropy, T over all replicas, and what is as uncertain as the last

The loss is divided by what is kept. Entropies are compared over all ranks, exactly: with a threshold of each replica
the result would follow the layout. The threshold is found digit by digit in the bits of float32, by two histograms.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..batch import Batch
from ..config import ForkTokens

DIGIT = 1 << 16


@torch.no_grad()
def keep_forks(
    batch: Batch,
    options: ForkTokens,
    total: Callable[[Tensor], Tensor],  # a sum over the replicas; collective
) -> Batch:
    """Takes all but the fork tokens out of a scored batch. Collective over the replicas."""
    assert batch.entropy is not None, "score the batch first"
    trained = torch.ones_like(batch.rollout_index, dtype=torch.bool) if batch.trained is None else batch.trained
    keys = _keys(batch.entropy)
    threshold = _threshold(keys[trained], options.fraction, total)
    batch.trained = trained & (keys >= threshold)
    return batch


def _keys(entropy: Tensor) -> Tensor:
    """Returns integers [T] from 0 to 2^32 - 1 that are in the order of their values."""
    bits = (entropy.to(torch.float32) + 0.0).view(torch.int32).to(torch.int64)  # + 0.0: -0.0 is 0.0
    return torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF)) + (1 << 31)


def _threshold(keys: Tensor, fraction: float, total: Callable[[Tensor], Tensor]) -> int:
    """Returns the largest key that so large a share of the keys of all replicas reaches."""
    high = _histogram(keys // DIGIT, total)
    wanted = math.ceil(fraction * int(high.sum()))
    first, above = _digit(high, wanted)
    second, _ = _digit(_histogram(keys[keys // DIGIT == first] % DIGIT, total), wanted - above)
    return first * DIGIT + second


def _histogram(digits: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    return total(torch.bincount(digits, minlength=DIGIT))


def _digit(histogram: Tensor, wanted: int) -> tuple[int, int]:
    """Returns the largest digit that so many reach, and how many are above it."""
    reaching = histogram.flip(0).cumsum(0).flip(0)
    digit = int((reaching >= wanted).sum()) - 1
    return digit, int(reaching[digit] - histogram[digit])
