"""The largest of values that many ranks hold: a threshold, exact, that is the same whoever holds which.

It is found digit by digit in keys of 32 bits, by two histograms that are added over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]  # a sum over the replicas; collective

DIGIT = 1 << 16
KEYS = DIGIT * DIGIT  # keys are 0 … KEYS - 1


def keys_of(values: Tensor) -> Tensor:
    """Returns keys [T] int64 that are in the order of their values, as float32: its bits order like integers once those
    of negative numbers are turned round."""
    bits = (values.to(torch.float32) + 0.0).view(torch.int32).to(torch.int64)  # + 0.0: -0.0 is 0.0
    return torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF)) + (1 << 31)


def threshold(keys: Tensor, wanted: int, total: Total) -> int:
    """Returns the largest key that so many of the keys of all replicas reach, at least one; 0 where there are fewer.
    Collective."""
    high = _histogram(keys // DIGIT, total)
    if int(high.sum()) < wanted:
        return 0
    first, above = _digit(high, wanted)
    second, _ = _digit(_histogram(keys[keys // DIGIT == first] % DIGIT, total), wanted - above)
    return first * DIGIT + second


def count(mask: Tensor, total: Total) -> int:
    """Returns how many are true on all replicas. Collective."""
    return int(total(mask.sum()[None]))


def _histogram(digits: Tensor, total: Total) -> Tensor:
    return total(torch.bincount(digits, minlength=DIGIT))


def _digit(histogram: Tensor, wanted: int) -> tuple[int, int]:
    """Returns the largest digit that so many reach, and how many are above it."""
    reaching = histogram.flip(0).cumsum(0).flip(0)
    digit = int((reaching >= wanted).sum()) - 1
    return digit, int(reaching[digit] - histogram[digit])
