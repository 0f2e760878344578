"""Holds two results of one benchmark against each other, problem by problem.

Both models were asked the same problems, so that the difference on each problem is what counts: the interval and the
test are of these differences (estimators.py), and far sharper than two intervals side by side. Results of two
protocols, two files or two sets of problems are no pair: the first difference is named.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..errors import RequestError
from .estimators import interval, permutation_p
from .result import Estimate, Result

SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class Changed:
    """A problem that the two models solve unequally often: correct samples and valid ones, of the first and second."""

    id: str
    first: tuple[int, int]
    second: tuple[int, int]

    @property
    def difference(self) -> float:
        return self.second[0] / self.second[1] - self.first[0] / self.first[1]


@dataclass(frozen=True)
class Comparison:
    """What two results say together. Every number is over the problems with a valid sample in both."""

    version: str
    n: int
    first: float  # avg@n
    second: float
    difference: Estimate  # second minus first
    p: float  # two-sided, of the paired permutation test
    changed: tuple[Changed, ...]  # largest change first, gains and losses alike
    left_out: int  # problems without a valid sample on one side


def compare(first: Result, second: Result, names: tuple[str, str] = ("the first", "the second")) -> Comparison:
    """Returns the comparison. Raises RequestError with the first difference that makes the two no pair."""
    if (words := next(_unlike(first, second, names), None)) is not None:
        raise RequestError(f"{names[0]} and {names[1]} cannot be compared: {words}")
    pairs = [
        Changed(a.id, (a.correct, a.valid), (b.correct, b.valid))
        for a, b in zip(first.problems, second.problems, strict=True)
        if a.valid and b.valid
    ]
    if not pairs:
        raise RequestError(f"{names[0]} and {names[1]} cannot be compared: no problem has a valid sample in both")
    differences = np.array([pair.difference for pair in pairs])
    changes = sorted((pair for pair in pairs if pair.difference), key=lambda pair: (-abs(pair.difference), pair.id))
    return Comparison(
        first.version,
        int(first.protocol["n"]),
        float(np.mean([pair.first[0] / pair.first[1] for pair in pairs])),
        float(np.mean([pair.second[0] / pair.second[1] for pair in pairs])),
        Estimate(float(differences.mean()), *interval(differences, first.version, "difference"), len(pairs)),
        permutation_p(differences, first.version, "difference"),
        tuple(changes),
        len(first.problems) - len(pairs),
    )


def _unlike(first: Result, second: Result, names: tuple[str, str]) -> Iterator[str]:
    """Yields what makes two results no pair, one thing after another."""

    def differ(what: str, one: object, other: object) -> str:
        return f"{what} is {_shown(one)} in {names[0]} and {_shown(other)} in {names[1]}"

    if first.benchmark != second.benchmark:
        yield differ("the benchmark", first.benchmark, second.benchmark)
    for key in sorted({*first.protocol, *second.protocol}):
        if first.protocol.get(key) != second.protocol.get(key):
            yield differ(f"the protocol's {key}", first.protocol.get(key), second.protocol.get(key))
    if first.version != second.version:
        yield differ("the version", first.version, second.version)
    if first.file.digest != second.file.digest:
        yield differ("the digest of the benchmark's file", first.file.digest[:16], second.file.digest[:16])
    if len(first.problems) != len(second.problems):
        yield differ("the number of problems", len(first.problems), len(second.problems))
    for number, (one, other) in enumerate(zip(first.problems, second.problems, strict=False), start=1):
        if one.id != other.id:
            yield differ(f"the id of problem {number}", one.id, other.id)
        if (one.text, one.gold) != (other.text, other.gold):
            yield f"problem {one.id} is put in two ways (the seeds are {first.seed} and {second.seed})"


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
