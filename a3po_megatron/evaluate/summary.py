"""What the samples of an evaluation come to: avg@n, pass@k, majority@n with their intervals, lengths and counts.

A sample whose grading failed is invalid: it says nothing of the model, so that it is left out of its problem's n, and
counted. A problem without a valid sample is left out of avg and majority; pass@k is over problems with k valid ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..reward.find import find
from ..reward.latex import MAX_NESTING, nesting
from ..reward.math import MAX_ANSWER_CHARS
from ..reward.spelling import spell
from .estimators import interval, majority, pass_at_k
from .result import Estimate, Graded, Sample, Summary

_LETTER = re.compile(r"(?<![A-Za-z])([A-J])(?![A-Za-z])")
GOLD = ("gold",)  # the one answer that all correct responses give, however each spells it


def summarise(
    problems: Sequence[Graded],
    version: str,  # names the draws of the intervals
    protocol: dict[str, Any],
    seconds: float,  # of sampling and grading
) -> Summary:
    """Returns the summary. k runs over the powers of two up to n."""
    samples = [sample for problem in problems for sample in problem.samples]
    counts = [(problem.valid, problem.correct) for problem in problems]
    powers = [1 << power for power in range(int(protocol["n"]).bit_length())]
    chances = {k: [pass_at_k(n, c, k) for n, c in counts if n >= k] for k in powers}
    tokens = sum(sample.tokens for sample in samples)
    return Summary(
        avg=_estimate([c / n for n, c in counts if n], version, "avg"),
        pass_at={k: each for k in powers if (each := _estimate(chances[k], version, "pass", k)) is not None},
        majority=_estimate(_majorities(problems, protocol), version, "majority"),
        length_mean=tokens / max(1, len(samples)),
        truncated_rate=sum(sample.finish == "length" for sample in samples) / max(1, len(samples)),
        invalid=sum(sample.outcome == "invalid" for sample in samples),
        seconds=seconds,
        tokens_per_second=tokens / seconds if seconds > 0 else 0.0,
    )


def _estimate(values: list[float], *name: object) -> Estimate | None:
    return Estimate(sum(values) / len(values), *interval(values, *name), len(values)) if values else None


def _majorities(problems: Sequence[Graded], protocol: dict[str, Any]) -> list[float]:
    """Returns that of each problem with a valid sample; none where an answer is a program: no two are alike."""
    if protocol["grader"] == "code":
        return []
    values = []
    for problem in problems:
        if valid := [sample for sample in problem.samples if sample.outcome != "invalid"]:
            votes = [vote(sample, protocol["grader"], protocol["extract"]) for sample in valid]
            values.append(majority(votes, [sample.outcome == "correct" for sample in valid]))
    return values


def vote(sample: Sample, grader: str, extract: str) -> object | None:
    """Returns what a response votes for; None: it names no answer.

    All correct responses vote for one answer, since each equals the gold. Of others those that are spelled alike do,
    once LaTeX is spelled one way: 1/2 and 0.5 are two wrong answers, a bound on the grader's work that costs little.
    """
    if sample.outcome == "correct":
        return GOLD
    answers = find(sample.text, extract, finished=sample.finish == "stop").named
    if not answers:
        return None
    text = answers[-1].strip().strip("$*. ")
    if grader == "choice" and (letters := _LETTER.findall(text)):
        return str(letters[0])
    if len(text) > MAX_ANSWER_CHARS or nesting(text) > MAX_NESTING:
        return text
    return spell(text)
