"""The graders of a run: math verdicts, each given in a process that can be killed."""

from __future__ import annotations

import functools

from ..config import RewardOptions
from .math import grade
from .pool import GraderPool


def math_graders(options: RewardOptions) -> GraderPool:
    """A pool of `reward.workers` processes that grade (response, answer) pairs. Use it as a context manager."""
    return GraderPool(
        functools.partial(grade, extract=options.extract),
        options.workers,
        options.timeout_seconds,
        options.memory_bytes,
    )
