"""Settings of `reward/`: what a verdict is worth, and the processes that grade."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from .section import NoEffect, NonNegative, Positive, PositiveFloat, Section, by_name, option


class RewardOptions(Section):
    extract: Literal["any", "boxed", "answer"] = option("any", "where the answer is looked for in a response")
    function: str = option("", "grader of your own for rows of the grader `function`: FILE.py:NAME, or MODULE:NAME")
    correct: float = option(1.0, "reward of a correct response")
    wrong: float = option(0.0, "reward of a wrong response")
    overlong_tokens: NonNegative = option(
        0, "DAPO's soft penalty over so many last tokens before rollout.max_tokens; 0: off"
    )
    overlong_penalty: PositiveFloat = option(1.0, "largest value of that penalty, which never changes polarity")
    max_invalid_rate: Annotated[float, Field(ge=0, le=1)] = option(
        0.5, "largest share of invalid verdicts in a step; above it the run ends"
    )
    without_effect = (
        NoEffect(("overlong_penalty",), lambda r: r.overlong_tokens == 0, "reward.overlong_tokens is 0 (off)"),
    )


class _GraderPool(Section):
    name: str
    workers: Positive = option(1, "grader processes per rank; with ray, per node")
    timeout_seconds: PositiveFloat = option(10.0, "per response; then the worker is killed and the verdict is wrong")
    memory_bytes: Positive = option(2 << 30, "of one grader's process, at most")


class LocalPool(_GraderPool):
    name: Literal["local"] = option("local", "where graders run: beside the ranks, or on all nodes of a Ray cluster")


class RayPool(_GraderPool):
    name: Literal["ray"] = option("ray", "where graders run")
    address: str = option("auto", "of the Ray cluster")


GraderPoolOptions = Annotated[Annotated[LocalPool, Tag("local")] | Annotated[RayPool, Tag("ray")], by_name("local")]
