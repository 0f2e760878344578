"""The graders of a run, each verdict given in a process that can be killed."""

from __future__ import annotations

import functools

from ..config import AutoSandbox, GraderPoolOptions, RayPool, RewardOptions, SandboxOptions
from .beside import Beside
from .grader import GRADERS, grade
from .pool import GraderPool
from .ray_pool import RayGraders
from .sandbox.program import Chosen, Limits

ANY_SANDBOX = AutoSandbox()


def graders_of(options: RewardOptions, pool: GraderPoolOptions, sandbox: SandboxOptions = ANY_SANDBOX) -> Beside:
    """What grades responses, here or on all nodes of a job, while others are sampled. Use it as a context manager."""
    graders = (
        ray_graders(options, pool, sandbox) if isinstance(pool, RayPool) else local_graders(options, pool, sandbox)
    )
    return Beside(graders)


def local_graders(options: RewardOptions, pool: GraderPoolOptions, sandbox: SandboxOptions = ANY_SANDBOX) -> GraderPool:
    """A pool of `grader_pool.workers` processes on this machine."""
    own = {name for row in GRADERS.values() for name in row.options} - {"sandbox"}
    taken = {name: getattr(options, name) for name in own} | {"sandbox": chosen(sandbox)}
    return GraderPool(
        functools.partial(grade, extract=options.extract, **taken),
        pool.workers,
        pool.timeout_seconds,
        pool.memory_bytes,
    )


def ray_graders(options: RewardOptions, pool: RayPool, sandbox: SandboxOptions = ANY_SANDBOX) -> RayGraders:
    """Such a pool on every node of the Ray cluster at `grader_pool.address`."""
    return RayGraders(functools.partial(local_graders, options, pool, sandbox), pool.address)


def chosen(options: SandboxOptions) -> Chosen:
    """Returns the sandbox in what a grader's process can be sent without the settings."""
    values = options.model_dump()
    limits = {name: values.pop(name) for name in Limits.__dataclass_fields__ if name in values}
    return Chosen(**values, limits=Limits(**limits))
