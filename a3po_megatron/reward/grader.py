"""The graders, by name: a row of data may name its own (`data.grader_field`), a benchmark names that of its problems.

A grader is a function of a response and its gold answer in a module that nothing heavy imports; it is applied in a
process that can be killed (pool.py), and everything that goes wrong on the way has one rule (worker.py). Another one is
a module with such a function, and a line here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..batch import Verdict
from ..errors import RequestError

Grade = Callable[..., Verdict]  # (response, answer, *, extract, finished)


@dataclass(frozen=True)
class Grader:
    """Where a grader stands, and what it takes."""

    module: str  # within this room; it has `grade`
    gold: str  # what its gold answer is, for people
    extracts: tuple[str, ...] = ("any", "boxed", "answer")  # where it may look for the answer; (): it has one way
    options: tuple[str, ...] = ()  # of the section `reward` that it takes, and `sandbox`: that whole section
    problem: bool = False  # it is told the problem, too
    steps: bool = False  # its verdicts may score steps of a response


JUDGE = tuple(f"judge_{name}" for name in ("url", "model", "key_variable", "max_tokens", "retries", "timeout_seconds"))
GRADERS = {
    "math": Grader("math", "a number, formula, set, … in LaTeX or plain"),
    "choice": Grader("choice", "the letter of an option"),
    "numeric": Grader("numeric", 'a number, or {"value": text, "tolerance": number}'),
    "code": Grader("code", "JSON text with its tests (reward/code.py)", extracts=(), options=("sandbox",)),
    "judge": Grader("judge", "a reference answer, in words", extracts=(), options=JUDGE, problem=True),
    "function": Grader("function", "what a function of your own takes", extracts=(), options=("function",), steps=True),
}


def grader_of(name: str) -> Grader:
    """Returns the grader of that name. Raises RequestError with those that there are."""
    try:
        return GRADERS[name]
    except KeyError:
        raise RequestError(f"{name!r} is no grader: there are {', '.join(GRADERS)}") from None


def grade(
    response: str,
    answer: str,
    *,
    grader: str = "math",
    extract: str = "any",
    finished: bool = True,
    problem: str = "",
    **options: Any,  # of the settings, that graders take
) -> Verdict:
    """The verdict of the grader of that name. Raises RequestError for a name that is none."""
    row = grader_of(grader)
    function: Grade = importlib.import_module(f".{row.module}", __package__).grade
    own = {name: options.get(name, "") for name in row.options}
    own |= ({"extract": extract} if row.extracts else {}) | ({"problem": problem} if row.problem else {})
    return function(response, answer, finished=finished, **own)


def why_unreadable(grader: str, gold: str) -> str:
    """Says why a grader cannot read a gold answer; empty: it can, or has nothing to say of it."""
    says = getattr(importlib.import_module(f".{grader_of(grader).module}", __package__), "why_unreadable", None)
    return str(says(gold)) if says is not None else ""


def prepare() -> None:
    """Loads what most grading needs, so that no response's time limit pays for it. Grader processes call this."""
    from .math import prepare

    prepare()
