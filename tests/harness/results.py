"""Results of evaluations that never were: what a test needs of one, with made-up samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from a3po_megatron.batch import Gold
from a3po_megatron.evaluate.benchmarks import BENCHMARKS
from a3po_megatron.evaluate.result import FORMAT, File, Graded, Model, Result, Sample
from a3po_megatron.evaluate.summary import summarise


def sample(text: str, outcome: str = "wrong", tokens: int = 10, finish: str = "stop") -> Sample:
    return Sample(7, text, tokens, finish, outcome, "")  # type: ignore[arg-type]


def boxed(answer: object, outcome: str = "wrong", **fields: Any) -> Sample:
    return sample(f"So it is \\boxed{{{answer}}}.", outcome, **fields)


def graded_problem(name: str, samples: Sequence[Sample], gold: Gold = "1") -> Graded:
    return Graded(name, f"What is {name}?", gold, tuple(samples))


def result_of(problems: Sequence[Graded], benchmark: str = "aime24", **fields: Any) -> Result:
    """A result of a benchmark; `n` is that of the first problem."""
    record = BENCHMARKS[benchmark].chosen(samples=len(problems[0].samples))
    summary = summarise(problems, record.version, record.protocol(), 12.5)
    file = File(f"{benchmark}.jsonl", "d" * 64, len(problems))
    model = Model("models/tiny", "hf", None, "m" * 64)
    whole = Result(
        benchmark, record.version, record.protocol(), 0, file, model, {"vllm": "0"}, summary, tuple(problems), FORMAT
    )
    return dataclasses.replace(whole, **fields)


def result_with(counts: Sequence[tuple[int, int]], n: int = 8, **fields: Any) -> Result:
    """A result whose problem p has counts[p] = (correct, valid) samples of n."""
    problems = []
    for number, (correct, valid) in enumerate(counts):
        outcomes = ["correct"] * correct + ["wrong"] * (valid - correct) + ["invalid"] * (n - valid)
        problems.append(graded_problem(f"p{number}", [boxed(1, outcome) for outcome in outcomes]))
    return result_of(problems, **fields)
