r"""Whether two expressions have one value: exactly; numbers that are written as decimals to their digits.

Formulas are compared at points, in 40 digits, and not by simplification, which need not end: two that agree at all
points at which both are real numbers are equal, and one point at which they differ tells them apart.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable
from typing import Any

from .formula import Formula
from .latex import MAX_TERMS, TooLarge

DIGITS = 40
CLOSE = 1e-25  # relative
POINTS = 10
NOISE = 1e-12  # relative: what doubles leave, 0.30000000000000004
LEAST_DIGITS = 6  # of a decimal number that stands for an exact one: 0.333333 is 1/3, 0.33 is not


def same(one: Any, other: Any, written: Formula | None = None, and_written: Formula | None = None) -> bool:
    """Whether two expressions have one value; of numbers that were written as decimals, to their digits."""
    import sympy

    if one == other:
        return True
    if isinstance(one, sympy.Rational) and isinstance(other, sympy.Rational):
        return _decimals(one, other, written, and_written)
    if not one.free_symbols and not other.free_symbols:
        return _constants(one, other, written, and_written)
    return _functions(one, other)


def _decimals(one: Any, other: Any, written: Formula | None, and_written: Formula | None) -> bool:
    texts = [each for each in (written, and_written) if each is not None and each.places is not None]
    if len(texts) == 2:
        noisy = max(each.digits for each in texts) >= 15
        return noisy and abs(one - other) <= NOISE * abs(one)
    if len(texts) == 1 and texts[0].digits >= LEAST_DIGITS and not (one.q == 1 and other.q == 1):
        exact = other if texts[0] is written else one
        return exact.q != 1 and _rounds(one, other, texts[0])
    return False


def _rounds(one: Any, other: Any, written: Formula) -> bool:
    """Whether they differ by no more than what the last digit of the decimal leaves open."""
    import sympy

    return bool(abs(one - other) * 2 <= sympy.Rational(1, 10 ** (written.places or 0)))


def _constants(one: Any, other: Any, written: Formula | None, and_written: Formula | None) -> bool:
    import sympy

    left, right = _number(one), _number(other)
    if left is None or right is None:
        return False
    if one.is_integer and other.is_integer and max(abs(left), abs(right)) > 10**20:
        exactly = (sympy.Integer(one.doit()), sympy.Integer(other.doit())) if one.is_real and other.is_real else (0, 1)
        return bool(exactly[0] == exactly[1])
    size = max(abs(left), abs(right))
    if size == 0 or abs(left - right) <= CLOSE * size:
        return True
    for text in (written, and_written):
        if text is not None and text.places is not None and text.digits >= LEAST_DIGITS:
            return abs(left - right) <= 0.5000001 * 10.0**-text.places
    return False


@functools.lru_cache(maxsize=1024)
def _number(expression: Any) -> Any | None:
    """A constant's value in DIGITS digits; None: it has none."""
    try:
        if _sums(expression):
            expression = _unrolled(expression, [MAX_TERMS])
        value = expression.evalf(DIGITS, maxn=400)
    except (ValueError, TypeError, ArithmeticError, RecursionError, NotImplementedError, AttributeError):
        return None
    return value if value.is_number and value.is_finite else None


def _sums(expression: Any) -> bool:
    import sympy

    return bool(expression.has(sympy.Sum, sympy.Product))


def _unrolled(expression: Any, terms_left: list[int]) -> Any:
    """With every sum and product written out, because sympy's own evaluation of one need not end.

    Raises TooLarge for more terms than `terms_left`, which it counts down, and for other limits than whole numbers.
    """
    import sympy

    if not _sums(expression):
        return expression
    if not isinstance(expression, sympy.Sum | sympy.Product):
        return expression.func(*(_unrolled(each, terms_left) for each in expression.args))
    (name, *limits), *others = expression.limits
    low, high = (limit.doit() for limit in limits)
    if others or not (low.is_Integer and high.is_Integer) or high - low >= terms_left[0]:
        raise TooLarge
    terms_left[0] -= max(int(high - low) + 1, 0)
    terms = [_unrolled(expression.function.subs(name, n), terms_left) for n in range(int(low), int(high) + 1)]
    return sympy.Add(*terms) if isinstance(expression, sympy.Sum) else sympy.Mul(*terms)


def _functions(one: Any, other: Any) -> bool:
    """By value at points: real ones of both signs, and positive integers where nothing else is defined."""
    import sympy

    symbols = sorted(one.free_symbols | other.free_symbols, key=str)
    if len(symbols) > 12 or max(one.count_ops(), other.count_ops()) > 400:
        raise TooLarge
    imaginary = [each for each in symbols if str(each) == "i"]
    if imaginary:
        to_unit = {each: sympy.I for each in imaginary}
        ours, theirs = one.subs(to_unit), other.subs(to_unit)
        if same(ours, theirs):
            return True
        if not ours.free_symbols and not theirs.free_symbols:
            return False
    on_plane = one.has(sympy.I) or other.has(sympy.I)
    sums = _sums(one) or _sums(other)
    for points in (_integers(len(symbols)),) if sums else (_reals(len(symbols)), _integers(len(symbols))):
        agreed = 0
        for values in points:
            at = dict(zip(symbols, values, strict=True))
            left, right = _at(one, at), _at(other, at)
            if left is None or right is None or not (on_plane or (left.is_real and right.is_real)):
                continue
            size = max(abs(left), abs(right))
            if size > 0 and abs(left - right) > CLOSE * size:
                if _even_root_of_negative(one, at) or _even_root_of_negative(other, at):
                    continue
                return False
            agreed += 1
            if agreed == POINTS:
                return True
        if agreed >= 3:
            return True
    return False


def _even_root_of_negative(expression: Any, at: dict[Any, Any]) -> bool:
    """Whether a part of it is no real number there, though all of it may be: sqrt(a) sqrt(b) at -1, -1."""
    import sympy

    for power in expression.atoms(sympy.Pow):
        exponent = power.exp
        if isinstance(exponent, sympy.Rational) and exponent.q % 2 == 0:
            base = _at(power.base, at)
            if base is None or not base.is_real or base < 0:
                return True
    return False


def _at(expression: Any, at: dict[Any, Any]) -> Any | None:
    try:
        at_point = _unrolled(expression.subs(at), [MAX_TERMS // POINTS]) if _sums(expression) else expression
        value = at_point.evalf(DIGITS, subs=at)
    except (ValueError, TypeError, ArithmeticError, RecursionError, NotImplementedError, AttributeError):
        return None
    return value if value.is_number and value.is_finite else None


def _reals(count: int) -> Iterable[list[Any]]:
    import sympy

    draw = random.Random(count)
    for turn in range(4 * POINTS):
        sign = 1 if turn % 2 else -1
        yield [sympy.Rational((sign if turn % 3 else 1) * draw.randint(11, 380), 101) for _ in range(count)]


def _integers(count: int) -> Iterable[list[Any]]:
    import sympy

    draw = random.Random(count)
    for _ in range(2 * POINTS):
        yield [sympy.Integer(draw.randint(1, 9)) for _ in range(count)]


def proportional(one: Any, other: Any, either: bool) -> bool:
    """Whether one is a constant times the other, positive unless `either`: the same line, circle, half-plane."""
    if one.free_symbols != other.free_symbols or not one.free_symbols:
        return False
    symbols = sorted(one.free_symbols, key=str)
    ratio, agreed = None, 0
    for values in _reals(len(symbols)):
        at = dict(zip(symbols, values, strict=True))
        left, right = _at(one, at), _at(other, at)
        if (
            left is None
            or right is None
            or left.is_real is not True
            or right.is_real is not True
            or right == 0
            or left == 0
        ):
            continue
        here = left / right
        if ratio is not None and abs(here - ratio) > CLOSE * abs(ratio):
            return False
        ratio, agreed = here, agreed + 1
        if agreed == POINTS:
            break
    return ratio is not None and agreed >= 3 and (either or bool(ratio > 0))
