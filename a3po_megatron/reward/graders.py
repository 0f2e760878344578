"""The graders of a run, each verdict given in a process that can be killed."""

from __future__ import annotations

import functools

from ..config import GraderPoolOptions, RayPool, RewardOptions
from .beside import Beside
from .grader import GRADERS, grade
from .pool import GraderPool
from .ray_pool import RayGraders


def graders_of(options: RewardOptions, pool: GraderPoolOptions) -> Beside:
    """What grades responses, here or on all nodes of a job, while others are sampled. Use it as a context manager."""
    return Beside(ray_graders(options, pool) if isinstance(pool, RayPool) else local_graders(options, pool))


def local_graders(options: RewardOptions, pool: GraderPoolOptions) -> GraderPool:
    """A pool of `grader_pool.workers` processes on this machine."""
    taken = {name: getattr(options, name) for row in GRADERS.values() for name in row.options}
    return GraderPool(
        functools.partial(grade, extract=options.extract, **taken),
        pool.workers,
        pool.timeout_seconds,
        pool.memory_bytes,
    )


def ray_graders(options: RewardOptions, pool: RayPool) -> RayGraders:
    """Such a pool on every node of the Ray cluster at `grader_pool.address`."""
    return RayGraders(functools.partial(local_graders, options, pool), pool.address)
