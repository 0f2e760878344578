"""Settings of `reward/`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .section import NonNegative, Positive, PositiveFloat, Section


class RewardOptions(Section):
    extract: Literal["any", "boxed", "answer"] = "any"
    correct: float = 1.0
    wrong: float = 0.0
    overlong_tokens: NonNegative = 0  # DAPO's soft penalty over the last tokens before rollout.max_tokens; 0: off
    overlong_penalty: PositiveFloat = 1.0  # its largest value; it never changes polarity
    pool: Literal["local", "ray"] = "local"  # ray: on all nodes of a Ray cluster (launchers/ray_cluster.py)
    ray_address: str = "auto"  # of it
    workers: Positive = 1  # grader processes per rank; with ray, per node
    timeout_seconds: PositiveFloat = 10.0  # per response; then the worker is killed and the verdict is invalid
    memory_bytes: Positive = 2 << 30  # per worker
    max_invalid_rate: Annotated[float, Field(ge=0, le=1)] = 0.5  # of a step's verdicts; above it the run ends
