"""Grades numbers against a gold answer with a stated tolerance: |answer - gold| <= tolerance, each number by itself.

    {"value": "3.2", "tolerance": 0.05}      as OlympiadBench's rows become; `value` may be a list such as 1, 2
    3.2                                      the same with tolerance 0: then as math.py grades

What equals the gold answer by the rules of math.py is correct at any tolerance, units and percent signs included.
"""

from __future__ import annotations

import json
import math as numbers
from collections.abc import Iterator
from typing import Any

from ..batch import Verdict
from .find import find
from .forms import Items, Relation
from .formula import Formula
from .latex import TooLarge
from .math import answers_of, read_gold
from .math import grade as grade_math
from .value import readings

SLACK = 1e-9  # of the tolerance: a decimal such as 0.1 is no exact binary number


def read(answer: str) -> tuple[str, float]:
    """Returns value and tolerance of a gold answer. Raises ValueError with the reason."""
    try:
        tree = json.loads(answer)
    except ValueError:
        return answer, 0.0
    if not isinstance(tree, dict):
        return answer, 0.0
    value, tolerance = tree.get("value"), tree.get("tolerance")
    if not isinstance(value, str) or not isinstance(tolerance, int | float) or isinstance(tolerance, bool):
        raise ValueError('the gold answer is no {"value": text, "tolerance": number}')
    if not 0 <= tolerance < numbers.inf:
        raise ValueError(f"the gold answer's tolerance is {tolerance}")
    return value, float(tolerance)


def why_unreadable(answer: str) -> str:
    """Says why a gold answer is none; empty: it is one."""
    try:
        value, tolerance = read(answer)
    except ValueError as error:
        return str(error)
    wanted = read_gold(value)
    if isinstance(wanted, str):
        return wanted
    if tolerance and not any(_numbers(each) for each in wanted):
        return "the gold answer has a tolerance, and is no number"
    return ""


def grade(response: str, answer: str, *, extract: str = "any", finished: bool = True) -> Verdict:
    """The verdict on a response; `extract` and `finished` as in math.py."""
    try:
        value, tolerance = read(answer)
    except ValueError as error:
        return Verdict("invalid", str(error))
    verdict = grade_math(response, value, extract=extract, finished=finished)
    if verdict.outcome != "wrong" or not tolerance:
        return verdict
    wanted = read_gold(value)
    golds = [each for each in map(_numbers, wanted) if each] if isinstance(wanted, list) else []
    if not golds:
        return Verdict("invalid", why_unreadable(answer))
    for text in answers_of(find(response, extract, finished)):
        try:
            answers = [_numbers(reading) for reading in readings(text)]
        except (TooLarge, RecursionError, MemoryError):
            continue
        if any(_close(gold, each, tolerance) for gold in golds for each in answers if each):
            return Verdict("correct")
    return verdict


def _numbers(value: Any) -> list[float] | None:
    """What an answer comes to, a number or several; None: something of it is no real number."""
    parts = list(_parts(value))
    return None if not parts or None in parts else [part for part in parts if part is not None]


def _parts(value: Any) -> Iterator[float | None]:
    if isinstance(value, Relation) and value.sign == "=":  # x = 3.2
        yield from _parts(value.right)
    elif isinstance(value, Items):
        for item in value.items:
            yield from _parts(item)
    elif isinstance(value, Formula) and value.expression.is_number:
        number = complex(value.expression.evalf(30))
        yield None if number.imag or not numbers.isfinite(number.real) else number.real / (100 if value.percent else 1)
    else:
        yield None


def _close(golds: list[float], answers: list[float], tolerance: float) -> bool:
    if len(golds) != len(answers):
        return False
    pairs = zip(sorted(golds), sorted(answers), strict=True)
    return all(abs(gold - answer) <= tolerance * (1 + SLACK) for gold, answer in pairs)
