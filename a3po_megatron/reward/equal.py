r"""Whether an answer is the gold answer: exactly, as values; numbers that are written as decimals to their digits.

Formulas are compared by value at points, in 40 digits, and not by simplification, which need not end: two that agree at
all points at which both are real numbers are equal, and one point at which they differ tells them apart.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

from .formula import Formula, TooLarge
from .value import MAX_PIECES, Choice, Grid, Items, Region, Relation, Value, Words, as_region, readings

DIGITS = 40
CLOSE = 1e-25  # relative
POINTS = 10
NOISE = 1e-12  # relative: what doubles leave, 0.30000000000000004
LEAST_DIGITS = 6  # of a decimal number that stands for an exact one: 0.333333 is 1/3, 0.33 is not
INVERSE = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}


def equal(gold: Value, found: Value) -> bool:
    """Whether `found` is what `gold` asks for. Raises TooLarge where that cannot be told in time."""
    if isinstance(gold, Choice):
        if isinstance(found, Choice):
            return gold.letter == found.letter
        return bool(gold.rest) and _any(gold.rest, found, reverse=False)
    if isinstance(found, Choice):
        return bool(found.rest) and _any(found.rest, gold, reverse=True)
    if isinstance(gold, Words) or isinstance(found, Words):
        return _words(gold, found)
    if isinstance(gold, Relation) or isinstance(found, Relation):
        return _relations(gold, found)
    if isinstance(gold, Formula) and isinstance(found, Formula):
        return _formulas(gold, found)
    if isinstance(gold, Grid) or isinstance(found, Grid):
        return _grids(gold, found)
    return _collections(gold, found)


def _any(text: str, other: Value, reverse: bool) -> bool:
    return any(equal(other, each) if reverse else equal(each, other) for each in readings(text))


def _words(gold: Value, found: Value) -> bool:
    if isinstance(gold, Words) and isinstance(found, Words):
        return gold.text == found.text and not gold.text.startswith("base ")
    if isinstance(found, Relation) and isinstance(gold, Words) and isinstance(found.right, Words) and found.sign == "=":
        return gold.text == found.right.text
    if isinstance(gold, Words) and gold.text.startswith("base ") and isinstance(found, Formula):
        return gold.text == f"base {found.text}"
    return False


def _formulas(gold: Formula, found: Formula) -> bool:
    if gold.unit and found.unit and gold.unit != found.unit:
        return False
    ours, theirs = gold.expression, found.expression
    if same(ours, theirs, gold, found):
        return True
    if gold.percent != found.percent:
        hundredth = (ours / 100, theirs) if gold.percent else (ours, theirs / 100)
        return same(*hundredth, gold, found)
    return False


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


def _number(expression: Any) -> Any | None:
    """A constant's value in DIGITS digits; None: it has none."""
    try:
        value = expression.evalf(DIGITS, maxn=400)
    except (ValueError, TypeError, ArithmeticError, RecursionError, NotImplementedError, AttributeError):
        return None
    return value if value.is_number and value.is_finite else None


def _functions(one: Any, other: Any) -> bool:
    """By value at points: real ones of both signs, and positive integers where nothing else is defined."""
    symbols = sorted(one.free_symbols | other.free_symbols, key=str)
    if len(symbols) > 12 or max(one.count_ops(), other.count_ops()) > 400:
        raise TooLarge
    imaginary = [each for each in symbols if str(each) == "i"]
    if imaginary:
        import sympy

        to_unit = {each: sympy.I for each in imaginary}
        ours, theirs = one.subs(to_unit), other.subs(to_unit)
        if same(ours, theirs):
            return True
        if not ours.free_symbols and not theirs.free_symbols:
            return False
    for points in (_reals(len(symbols)), _integers(len(symbols))):
        agreed = 0
        for values in points:
            at = dict(zip(symbols, values, strict=True))
            left, right = _at(one, at), _at(other, at)
            if left is None or right is None or left.is_real is not True or right.is_real is not True:
                continue
            size = max(abs(left), abs(right))
            if size > 0 and abs(left - right) > CLOSE * size:
                return False
            agreed += 1
            if agreed == POINTS:
                return True
        if agreed >= 3:
            return True
    return False


def _at(expression: Any, at: dict[Any, Any]) -> Any | None:
    try:
        value = expression.evalf(DIGITS, subs=at)
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


def _grids(gold: Value, found: Value) -> bool:
    rows = [_rows(each) for each in (gold, found)]
    if rows[0] is None or rows[1] is None or [len(r) for r in rows[0]] != [len(r) for r in rows[1]]:
        return False
    return all(equal(a, b) for r, s in zip(*rows, strict=True) for a, b in zip(r, s, strict=True))


def _rows(value: Value) -> Sequence[Sequence[Any]] | None:
    """Of a matrix; of a tuple, which may be a column."""
    if isinstance(value, Grid):
        return value.rows
    return [[item] for item in value.items] if isinstance(value, Items) and value.kind == "tuple" else None


def _collections(gold: Value, found: Value) -> bool:
    if isinstance(gold, Region) or isinstance(found, Region):
        ours, theirs = _as_set(gold), _as_set(found)
        return ours is not None and theirs is not None and _same_regions(ours, theirs)
    if isinstance(gold, Formula) or isinstance(found, Formula):
        one = [each for each in (gold, found) if isinstance(each, Items) and each.kind != "tuple"]
        items = _distinct(one[0].items) if one else []
        other = found if isinstance(gold, Items) else gold
        return len(items) == 1 and equal(items[0], other)
    assert isinstance(gold, Items) and isinstance(found, Items)
    if "tuple" in (gold.kind, found.kind):
        if gold.kind == found.kind and gold.brackets != found.brackets and gold.kind == "tuple" and _mixed(gold, found):
            return False
        if len(gold.items) != len(found.items) or "set" in (gold.kind, found.kind):
            return False
        if gold.kind == "tuple" and all(isinstance(i, Relation) for i in found.items):
            found = Items("tuple", tuple(i.right for i in found.items))
        return all(equal(a, b) for a, b in zip(gold.items, found.items, strict=True))
    return _matched(_distinct(gold.items), _distinct(found.items))


def _mixed(gold: Items, found: Items) -> bool:
    """Two that may be intervals, of which the ends are open on different sides."""
    return len(gold.items) == 2 or {gold.brackets, found.brackets} - {"()", "[]"} != set()


def _distinct(items: Sequence[Any]) -> list[Any]:
    kept: list[Any] = []
    for item in items:
        if not any(equal(item, each) for each in kept):
            kept.append(item)
    return kept


def _matched(gold: list[Any], found: list[Any]) -> bool:
    """Whether each has its own partner, in any order."""
    if len(gold) != len(found):
        return False
    left = list(found)
    for item in gold:
        partner = next((number for number, each in enumerate(left) if equal(item, each)), None)
        if partner is None:
            return False
        del left[partner]
    return True


def _as_set(value: Value) -> Any | None:
    import sympy

    if isinstance(value, Region):
        return value.region
    if isinstance(value, Items):
        if value.kind == "tuple":
            region = as_region(value)
            return region.region if region else None
        parts = [_as_set(item) for item in value.items]
        if all(isinstance(item, Formula) for item in value.items):
            return sympy.FiniteSet(*(item.expression for item in value.items))
        return None if None in parts else sympy.Union(*parts)
    if isinstance(value, Relation):
        return _solutions(value)
    return None


def _same_regions(one: Any, other: Any) -> bool:
    import sympy

    if one == other:
        return True
    if isinstance(one, sympy.FiniteSet) != isinstance(other, sympy.FiniteSet):
        return False
    if max(len(one.args), len(other.args)) > MAX_PIECES:
        raise TooLarge
    try:
        return bool(sympy.SymmetricDifference(one, other).doit().is_empty) or bool(
            (sympy.Complement(one, other).is_empty) and sympy.Complement(other, one).is_empty
        )
    except (TypeError, NotImplementedError, ValueError, AttributeError):
        return False


def _solutions(relation: Relation) -> Any | None:
    """The set that an inequality in one unknown names, where it stands alone on its side."""
    import sympy

    if relation.sign == "in":
        return _as_set(relation.right)
    if " " in relation.sign:
        chain = [*relation.left, relation.right]
        parts = [Relation(s, a, b) for s, a, b in zip(relation.sign.split(), chain[:-1], chain[1:], strict=True)]
        sets = [_solutions(part) for part in parts]
        return None if None in sets else sympy.Intersection(*sets)
    relation = Relation(relation.sign, _unnamed(relation.left), _unnamed(relation.right))
    if not isinstance(relation.left, Formula) or not isinstance(relation.right, Formula):
        return None
    left, right, sign = relation.left.expression, relation.right.expression, relation.sign
    if right.is_Symbol and not left.free_symbols:
        left, right, sign = right, left, INVERSE[sign]
    if not left.is_Symbol or right.free_symbols or not right.is_extended_real:
        return None
    real = sympy.S.Reals
    return {
        "<": lambda: sympy.Interval.open(-sympy.oo, right),
        "<=": lambda: sympy.Interval(-sympy.oo, right),
        ">": lambda: sympy.Interval.open(right, sympy.oo),
        ">=": lambda: sympy.Interval(right, sympy.oo),
        "!=": lambda: real - sympy.FiniteSet(right),
        "=": lambda: sympy.FiniteSet(right),
    }[sign]()


def _unnamed(side: Any) -> Any:
    """f(x) as an unknown of its own."""
    import sympy

    return Formula(sympy.Symbol(side.text), side.text) if isinstance(side, Words) else side


def _relations(gold: Value, found: Value) -> bool:
    gold, found = _collapsed(gold), _collapsed(found)
    if isinstance(gold, Relation) and isinstance(gold.left, Items) and gold.sign == "=":
        gold = _spread(gold)
    if isinstance(found, Relation) and isinstance(found.left, Items) and found.sign == "=":
        found = _spread(found)
    if not isinstance(gold, Relation) and not isinstance(found, Relation):
        return equal(gold, found)
    if isinstance(gold, Relation) and isinstance(found, Relation):
        return _both(gold, found)
    relation, value = (gold, found) if isinstance(gold, Relation) else (found, gold)
    assert isinstance(relation, Relation)
    if relation.sign == "in":
        return equal(relation.right, value) if relation is gold else equal(value, relation.right)
    if relation.sign != "=" or isinstance(value, Region):
        ours = _as_set(relation)
        theirs = _as_set(value)
        return ours is not None and theirs is not None and _same_regions(ours, theirs)
    for name, side in ((relation.left, relation.right), (relation.right, relation.left)):
        if _is_name(name):
            return equal(side, value) if relation is gold else equal(value, side)
    return False


def _is_name(value: Any) -> bool:
    """What an assignment gives a value to: x, AB, f(x), area."""
    if isinstance(value, Words):
        return True
    if not isinstance(value, Formula) or value.unit:
        return False
    import sympy

    expression = value.expression
    symbols = (sympy.Symbol, sympy.core.function.AppliedUndef)
    if isinstance(expression, symbols):
        return True
    signs = (sympy.Integer(1), sympy.Integer(-1))
    return (
        expression.is_Mul and not expression.has(sympy.Add) and expression.atoms() <= expression.free_symbols | {*signs}
    )


def _spread(relation: Relation) -> Value:
    """(x, y) = (1, 2) → x = 1, y = 2"""
    right = relation.right
    if isinstance(right, Items) and len(right.items) == len(relation.left.items):
        pairs = zip(relation.left.items, right.items, strict=True)
        return Items("list", tuple(Relation("=", name, value) for name, value in pairs))
    return relation


def _collapsed(value: Value) -> Value:
    """A chain of equations as its first and last side, if what stands between is equal: 2 · 3 = 6 → 6."""
    if not isinstance(value, Relation) or set(value.sign.split()) != {"="}:
        return value
    sides = [*value.left, value.right] if isinstance(value.left, tuple) else [value.left, value.right]
    named = _is_name(sides[0])
    rest = sides[1:] if named else sides
    formulas = [side for side in rest if isinstance(side, Formula)]
    if len(rest) > 1 and len(formulas) == len(rest):
        if not all(same(formulas[0].expression, each.expression, formulas[0], each) for each in formulas[1:]):
            return value if len(sides) == 2 else Relation("=", Words("a false equation"), Words("a false equation"))
        return Relation("=", sides[0], rest[-1]) if named else rest[-1]
    return value if len(sides) == 2 else Relation("=", sides[0], sides[-1])


def _both(gold: Relation, found: Relation) -> bool:
    signs = gold.sign, found.sign
    if signs == ("=", "=") and _is_name(gold.left) and _is_name(found.left):
        return equal(gold.left, found.left) and equal(gold.right, found.right)
    if "=" in signs and signs[0] != signs[1]:
        return False
    if "in" in signs or " " in gold.sign or " " in found.sign or signs[0] != "=":
        ours, theirs = _solutions(gold), _solutions(found)
        if ours is not None and theirs is not None:
            return _same_regions(ours, theirs) and (_unknown(gold) == _unknown(found))
    if isinstance(gold.left, tuple) or isinstance(found.left, tuple):
        return _chains(gold, found)
    sides = (gold.left, gold.right, found.left, found.right)
    if not all(isinstance(side, Formula) for side in sides):
        return signs[0] == signs[1] and equal(gold.left, found.left) and equal(gold.right, found.right)
    ours = gold.left.expression - gold.right.expression
    theirs = found.left.expression - found.right.expression
    if signs[1] == INVERSE.get(signs[0]) and signs[0] != "=":
        theirs = -theirs
    elif signs[0] != signs[1]:
        return False
    return _proportional(ours, theirs, either=gold.sign in ("=", "!="))


def _chains(gold: Relation, found: Relation) -> bool:
    one, other = ([*r.left, r.right] if isinstance(r.left, tuple) else [r.left, r.right] for r in (gold, found))
    signs = found.sign.split()
    if signs == [INVERSE.get(sign, "") for sign in reversed(gold.sign.split())]:
        other, signs = other[::-1], gold.sign.split()
    return signs == gold.sign.split() and all(equal(a, b) for a, b in zip(one, other, strict=True))


def _unknown(relation: Relation) -> set[str]:
    sides = [*relation.left, relation.right] if isinstance(relation.left, tuple) else [relation.left, relation.right]
    return {str(s) for side in sides if isinstance(side, Formula) for s in side.expression.free_symbols}


def _proportional(one: Any, other: Any, either: bool) -> bool:
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
