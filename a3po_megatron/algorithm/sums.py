"""What is reported of tokens that many ranks hold: sums that add, and maxima, over micro-batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Sum(NamedTuple):
    """A share of a metric that is a quotient of two sums: a mean, a rate."""

    numerator: Tensor | float
    denominator: Tensor | float


class Max(NamedTuple):
    """A share of a metric that is a maximum."""

    value: Tensor | float


Kind = type[Sum] | type[Max]


class Report:
    """Adds up what an objective reports of its declared metrics."""

    def __init__(self, declared: Mapping[str, Kind]) -> None:
        self._declared = declared
        self._sums = [name for name, kind in declared.items() if kind is Sum]
        self._maxima = [name for name, kind in declared.items() if kind is Max]
        self.sums = torch.zeros(2 * len(self._sums), dtype=torch.float64)  # numerators, then denominators
        self.largest = [0.0] * len(self._maxima)

    def vector(self, found: Mapping[str, Sum | Max], device: torch.device) -> Tensor:
        """Returns the sums of one micro-batch, to be added to `sums`; takes its maxima in.

        Raises ValueError where they are not what was declared.
        """
        kinds = {name: type(value) for name, value in found.items()}
        if kinds != self._declared:
            raise ValueError(f"the objective declares {dict(self._declared)}, and reports {kinds}")
        self.take([float(found[name][0]) for name in self._maxima])
        numbers = [found[name][side] for side in (0, 1) for name in self._sums]
        return torch.stack([torch.as_tensor(number, dtype=torch.float64, device=device) for number in numbers])

    def take(self, largest: list[float]) -> None:
        """Takes in maxima of others."""
        self.largest = largest_of_each([self.largest, largest])

    def metrics(self) -> dict[str, float | None]:
        """Returns every declared metric; None: a quotient by 0, or a maximum that is not finite."""
        values = self.sums.tolist()
        quotients = zip(values[: len(self._sums)], values[len(self._sums) :], strict=True)
        means = {
            name: numerator / denominator if denominator else None
            for name, (numerator, denominator) in zip(self._sums, quotients, strict=True)
        }
        finite = {name: v if math.isfinite(v) else None for name, v in zip(self._maxima, self.largest, strict=True)}
        return means | finite


def largest_of_each(rows: list[list[float]]) -> list[float]:
    """The maximum of each column; NaN if one of it is (Python's `max` would lose it)."""
    return [float(torch.tensor(column, dtype=torch.float64).max()) for column in zip(*rows, strict=True)]
