"""The graders of a run: math verdicts, each given in a process that can be killed."""

from __future__ import annotations

import functools

from ..config import RewardOptions
from .beside import Beside
from .math import grade
from .pool import GraderPool
from .ray_pool import RayGraders


def math_graders(options: RewardOptions) -> Beside:
    """What grades responses, here or on all nodes of a job, while others are sampled. Use it as a context manager."""
    return Beside(ray_graders(options) if options.pool == "ray" else local_graders(options))


def local_graders(options: RewardOptions) -> GraderPool:
    """A pool of `reward.workers` processes on this machine."""
    return GraderPool(
        functools.partial(grade, extract=options.extract),
        options.workers,
        options.timeout_seconds,
        options.memory_bytes,
    )


def ray_graders(options: RewardOptions) -> RayGraders:
    """Such a pool on every node of the Ray cluster at `reward.ray_address`."""
    return RayGraders(functools.partial(local_graders, options), options.ray_address)
