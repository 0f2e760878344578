"""Settings of `reward/`: what a verdict is worth, and the processes that grade."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from .section import NoEffect, NonNegative, Positive, PositiveFloat, Section, by_name, option


class RewardOptions(Section):
    extract: Literal["any", "boxed", "answer"] = option("any", "where the answer is looked for in a response")
    function: str = option("", "grader of your own for rows of the grader `function`: FILE.py:NAME, or MODULE:NAME")
    judge_url: str = option("", "endpoint of the grader `judge`, as OpenAI has it: http://HOST:PORT/v1; empty: none")
    judge_model: str = option("", "its model")
    judge_key_variable: str = option("", "the variable of the environment that holds its key; empty: it needs none")
    judge_max_tokens: Positive = option(512, "of its reply")
    judge_retries: NonNegative = option(2, "further questions where it does not answer, or its reply has no verdict")
    judge_timeout_seconds: PositiveFloat = option(60.0, "for one reply")
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
        NoEffect(
            ("judge_model", "judge_key_variable", "judge_max_tokens", "judge_retries", "judge_timeout_seconds"),
            lambda r: not r.judge_url,
            "reward.judge_url is empty (no judge)",
        ),
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
