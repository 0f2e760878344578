r"""The built-in task: evaluate a chain of `+ - *` on digits, left to right, modulo 10, writing the steps.

    problem    6+5*8-5:
    solution   1,1*8=8?y,3,\boxed{3}

A problem has 2 to 6 operands; every intermediate value is one digit, because every step is taken modulo 10. A solution
is one step per operator, each followed by a comma, then the boxed answer. A step is terse (`8`) or written out
(`1*8=8`), may be wrong, and may be checked: `?y` says right, `?n8` says wrong and gives the right value, from which the
solution goes on. Written-out and checked steps are wrong less often, so there is something to discover for
reinforcement learning: a policy warm-started on these solutions knows careful and careless ways of working.

A problem can also be answered at once (`\boxed{3}`), which so small a model cannot learn to do right much more often
than one time in three. So there are two ways of answering, and a run records their shares (`way_of`).

Invariants: problem `index` of `seed` is a function of the two alone (a hash, no stream), so that no order of reading,
rank count or restart changes it. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from ..errors import RequestError

OPERATORS = "+-*"
BOX = "\\boxed{"  # one token of the tiny model: seven characters of boilerplate would dilute the policy gradient
SYMBOLS = "0123456789+-*=,?yn:}"  # with BOX, everything that problems and solutions are written in
MIN_OPERANDS, MAX_OPERANDS = 2, 6  # the knob for difficulty: 3 to 7 halves the warm-started model's correct rate

LONGEST = "9*9*9*9*9*9:"  # a problem with MAX_OPERANDS operands

STEPWISE, AT_ONCE = "stepwise", "at_once"  # the ways of answering


@dataclass(frozen=True)
class Habits:
    """How solutions are written. A writer is brief or careful: that decides how often steps are written out or checked.

    Injected errors are off by up to three; they keep the policy's entropy up.
    """

    brief: float = 0.55  # share of brief writers
    written_out: tuple[float, float] = (0.25, 0.75)  # share of steps, of brief and of careful writers
    checked: tuple[float, float] = (0.15, 0.35)  # the same
    wrong_terse: float = 0.28
    wrong_written_out: float = 0.16


def apply(value: int, operator: str, operand: int) -> int:
    """One step: `value operator operand` modulo 10."""
    if operator == "+":
        return (value + operand) % 10
    if operator == "-":
        return (value - operand) % 10
    return value * operand % 10


def parse(text: str) -> tuple[int, list[tuple[str, int]]]:
    """The start value and the (operator, operand) steps of a problem's text; RequestError if it is none."""
    body = text.removesuffix(":")
    operators, operands = body[1::2], body[0::2]
    well_formed = text.endswith(":") and len(operands) == len(operators) + 1 and set(operators) <= set(OPERATORS)
    if not well_formed or not (operands.isascii() and operands.isdigit()):
        raise RequestError(f"not a problem of the built-in arithmetic task: {text!r} (they look like '6+5*8-5:')")
    return int(operands[0]), [(op, int(d)) for op, d in zip(operators, operands[1:], strict=True)]


def problem(index: int, seed: int) -> tuple[str, str]:
    """Problem number `index` of `seed` as (text, answer); the answer is one digit."""
    digest = hashlib.blake2b(f"arithmetic/{seed}/{index}".encode(), digest_size=64).digest()
    number = int.from_bytes(digest, "big")  # 512 bits; the 12 draws below use about 33, so their bias is negligible

    def draw(choices: int) -> int:
        nonlocal number
        number, drawn = divmod(number, choices)
        return drawn

    operands = MIN_OPERANDS + draw(MAX_OPERANDS - MIN_OPERANDS + 1)
    value = draw(10)
    text = str(value)
    for _ in range(operands - 1):
        operator, operand = OPERATORS[draw(len(OPERATORS))], 1 + draw(9)
        text += f"{operator}{operand}"
        value = apply(value, operator, operand)
    return text + ":", str(value)


def solution(rng: random.Random, text: str, habits: Habits = Habits()) -> str:
    """One solution to the problem `text`, in steps; about three in five are right."""
    value, steps = parse(text)
    style = 0 if rng.random() < habits.brief else 1
    written = ""
    for operator, operand in steps:
        right = apply(value, operator, operand)
        in_full = rng.random() < habits.written_out[style]
        wrong = rng.random() < (habits.wrong_written_out if in_full else habits.wrong_terse)
        result = (right + rng.choice((-3, -2, -1, 1, 2, 3))) % 10 if wrong else right
        written += (f"{value}{operator}{operand}=" if in_full else "") + str(result)
        if rng.random() < habits.checked[style]:
            written += "?y" if result == right else f"?n{right}"
            result = right
        written += ","
        value = result
    return written + BOX + str(value) + "}"


def way_of(response: str) -> str:
    """STEPWISE if at least one step stands before the answer, else AT_ONCE."""
    return STEPWISE if "," in response.partition(BOX)[0] else AT_ONCE
