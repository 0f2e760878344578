r"""A LaTeX formula as a sympy expression: all of it, with exact decimals, or nothing.

The parser is latex2sympy2_extended's. What it reads otherwise than a mathematician is spelled out for it first, and one
of its rules is replaced. What would explode is refused before anybody evaluates it.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

MAX_NESTING = 15  # brackets: the LaTeX parser takes 0.8 s for 15 pairs, 2.6 s for 30 and 9 s for 60
MAX_DIGITS = 5000  # of any number met on the way to the value: 10^10^10 and 99999999! must not be evaluated
MAX_TERMS = 2000  # of a sum or product with numeric limits
MAX_CHARS, MAX_COMMANDS = 1000, 100  # the parser takes up to 1 ms for a character, 10 ms for a command


class TooLarge(Exception):
    """Evaluating it would not end in time."""


@functools.cache
def converter() -> Callable[[str], Any]:
    """What makes a sympy object of LaTeX. It raises Exception itself for what it cannot read."""
    import latex2sympy2_extended.latex2sympy2 as library
    import sympy

    class Converter(library._Latex2Sympy):  # type: ignore[misc]
        def convert_postfix_list(self, factors: list[Any], first: int = 0) -> Any:
            """A product of neighbours; the parser's own makes a sum of 2(3), of 2\\binom{3}{1} and of 2\\frac{4}{3}."""
            left = self.convert_postfix(factors[first])
            if first == len(factors) - 1:
                return left
            if not isinstance(left, sympy.Expr | sympy.MatrixBase):
                raise ValueError("a product of something that is no number")
            right = self.convert_postfix_list(factors, first + 1)
            if isinstance(left, sympy.MatrixBase) or isinstance(right, sympy.MatrixBase):
                return self.mat_mul_flat(left, right)
            return self.mul_flat(left, right)

    config = library.ConversionConfig(lowercase_symbols=False)
    return lambda text: Converter(None, True, False, config=config).parse(text)


_BIG_BINOMIAL = re.compile(r"binom.*\d{5}", re.DOTALL)  # the one function that is evaluated while parsing

_MIXED = re.compile(r"(?<![\w.}^)/])(\d+) ?\\frac ?\{(\d+)\}\{(\d+)\}")
_DOUBLE_POWER = re.compile(r"\^ ?(?:\{[^{}]*\}|\w|\\[A-Za-z]+) ?\^")  # 2^3^2 is two numbers
_REFUSED = re.compile(
    r"\d +\d|\d_|\d ?'|\.\d*\.|\\(?:int|lim|variable|begin|text|prime)(?![A-Za-z])|[\"#@&]|__"
    r"|[A-Za-z]{12,}|(?<![\\A-Za-z{])[A-Z][a-z]{2,}"  # words, no products of letters
)


def _explicit(text: str) -> str:
    r"""With what the parser would misread written out: 3\frac{1}{2}, \pi(r + 1), y'."""
    text = _MIXED.sub(lambda m: rf"({m[1]}+\frac{{{m[2]}}}{{{m[3]}}})" if int(m[2]) < int(m[3]) else m[0], text)
    text = re.sub(r"\\pi ?(?=\()", r"\\pi \\cdot ", text)
    return re.sub(r"([A-Za-z])('+)", lambda m: f"{m[1]}_{{{'prime' * len(m[2])}}}", text)


def parse(text: str) -> Any | None:
    """A sympy expression of all of a formula, with exact decimals; None: it is none. Raises TooLarge."""
    import sympy

    if (
        len(text) > MAX_CHARS
        or text.count("\\") > MAX_COMMANDS
        or nesting(text) > MAX_NESTING
        or _BIG_BINOMIAL.search(text)
    ):
        raise TooLarge
    if _REFUSED.search(text) or _DOUBLE_POWER.search(text):
        return None
    text = re.sub(
        r"(\\(?:sin|cos|tan|cot|sec|csc)) ?\(? ?(-?[\d.]+|\\frac\{[^{}]*\}\{[^{}]*\}) ?\^\\circ ?\)?",
        r"\1(\2 \\cdot \\frac{\\pi}{180})",
        text,
    )
    if "\\circ" in text:
        return None
    try:
        expression = converter()(_explicit(text))
    except RecursionError as error:
        raise TooLarge from error
    except Exception:  # the parser raises Exception itself
        return None
    if not isinstance(expression, sympy.Expr):
        return None
    if explodes(expression):
        raise TooLarge
    exact = {each: sympy.Rational(str(each)) for each in expression.atoms(sympy.Float)}
    exact |= {each: -((-each.base) ** each.exp) for each in expression.atoms(sympy.Pow) if _odd_root_of_negative(each)}
    return expression.xreplace(exact) if exact else expression


def _odd_root_of_negative(power: Any) -> bool:
    """The cube root of -8 is -2, as in school, and no complex number."""
    base, exponent = power.base, power.exp
    return bool(base.is_Rational and base < 0 and exponent.is_Rational and exponent.p == 1 and exponent.q % 2)


_CLOSES = {")": "(", "]": "[", "}": "{"}


def nesting(text: str) -> int:
    """An upper bound on how deep brackets stand in brackets; one that closes another kind, or nothing, counts not."""
    depth = dict.fromkeys("([{", 0)
    deepest = 0
    for character in text:
        if character in depth:
            depth[character] += 1
            deepest = max(deepest, sum(depth.values()))
        elif (opens := _CLOSES.get(character)) and depth[opens]:
            depth[opens] -= 1
    return deepest


def explodes(expression: Any) -> bool:
    """True if evaluating the expression would meet a number beyond MAX_DIGITS or a sum beyond MAX_TERMS."""
    try:
        return not _size(expression) <= MAX_DIGITS
    except RecursionError:
        return True


def _size(node: Any) -> float:
    """An upper bound on log10 of the largest number that evaluating the tree meets; symbols count as one digit."""
    import sympy

    if isinstance(node, sympy.Rational):
        return max(abs(node.p).bit_length(), node.q.bit_length()) * math.log10(2)
    if isinstance(node, sympy.Float):
        return max(float(sympy.log(abs(node), 10)), 0.0) if node.is_finite and node != 0 else 0.0
    if not getattr(node, "args", ()):
        return 1.0
    inner = [_size(argument) for argument in node.args if isinstance(argument, sympy.Basic)]
    largest = max(inner, default=1.0)
    if largest > MAX_DIGITS:
        return math.inf
    if isinstance(node, sympy.Mul):
        return sum(inner)
    if isinstance(node, sympy.Add):
        return largest + math.log10(len(inner))
    if isinstance(node, sympy.Pow | sympy.exp):
        base, exponent = (inner[0], node.args[1]) if isinstance(node, sympy.Pow) else (0.5, node.args[0])
        size = abs(float(exponent)) if isinstance(exponent, sympy.Number) else 10 ** min(inner[-1], 300.0)
        return max(base, largest, max(base, 0.31) * size)
    if isinstance(node, sympy.factorial | sympy.factorial2 | sympy.gamma | sympy.binomial | sympy.subfactorial):
        return 10 ** min(inner[0], 300.0) * max(inner[0], 1.0)
    if isinstance(node, sympy.Sum | sympy.Product):
        terms = max((10 ** min(_size(bound), 300.0) for limit in node.limits for bound in limit[1:]), default=1.0)
        if terms > MAX_TERMS:
            return math.inf
        return largest * (terms if isinstance(node, sympy.Product) else 1.0) + math.log10(terms + 1)
    return largest
