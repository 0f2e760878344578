"""Grades the choice among lettered options: nothing but the letter counts.

(C) · C. · C) 42 · \boxed{\text{C}} · option C          C
A cat · B and C · Cobalt                                 none: what cannot be told from words is no letter
"""

from __future__ import annotations

import re

from ..batch import Verdict
from .find import find
from .math import answers_of, gold_text
from .spelling import spell

# Behind the letter: nothing, a mark, or the option's own text behind a mark.
_LETTER = re.compile(
    r"[\s*_$({\[\\]*(?:text|mathrm|mathbf)?[\s{(]*(?i:option|choice|answer)?[\s:({]*(?P<letter>[A-Ja-j])(?:[\s*_$]*$|\s*[)}\].:].*)",
    re.DOTALL,
)


def letter_of(text: str) -> str | None:
    """Returns the letter that an answer names; None: it names none, or more than one."""
    match = _LETTER.fullmatch(text.strip())
    return match["letter"].upper() if match else None


def why_unreadable(answer: str) -> str:
    """Says why a gold answer is none; empty: it is one."""
    return "" if letter_of(gold_text(answer)) else "the gold answer is no letter of an option"


def grade(response: str, answer: str, *, extract: str = "answer", finished: bool = True) -> Verdict:
    """The verdict on a response whose gold answer is the letter `answer`; `extract` and `finished` as in math.py."""
    wanted = letter_of(gold_text(answer))
    if wanted is None:
        return Verdict("invalid", why_unreadable(answer))
    place = find(response, extract, finished)
    if place.why:
        return Verdict("wrong", place.why)
    texts = answers_of(place)
    if not texts:
        return Verdict("wrong", "no answer found")
    letter = letter_of(texts[-1]) or letter_of(spell(texts[-1]))
    if letter is None:
        return Verdict("wrong", "the answer names no option")
    return Verdict("correct") if letter == wanted else Verdict("wrong", "another choice")
