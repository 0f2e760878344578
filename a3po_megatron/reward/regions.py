"""Sets of reals: intervals, unions, what an inequality in one unknown says."""

from __future__ import annotations

from typing import Any

from .forms import Items, Region, Relation, Value, Words
from .formula import Formula
from .latex import TooLarge
from .same import same
from .value import as_region

MAX_SYMBOLIC_PIECES = 4
INVERSE = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}


def as_set(value: Value) -> Any | None:
    import sympy

    if isinstance(value, Region):
        return value.region
    if isinstance(value, Items):
        if value.kind == "tuple":
            region = as_region(value)
            return region.region if region else None
        parts = [as_set(item) for item in value.items]
        if all(isinstance(item, Formula) for item in value.items):
            return sympy.FiniteSet(*(item.expression for item in value.items))
        return None if None in parts else sympy.Union(*parts)
    if isinstance(value, Relation):
        return solutions(value)
    return None


def same_regions(one: Any, other: Any) -> bool:
    """Whether two sets are equal. sympy keeps a union as its separate pieces, so that these are equal one by one."""
    import sympy

    if one == other:
        return True
    ours, theirs = _pieces(one), _pieces(other)
    if ours is not None and theirs is not None:
        return len(ours) == len(theirs) and all(map(_same_pieces, ours, theirs))
    if max(len(one.args), len(other.args)) > MAX_SYMBOLIC_PIECES:
        raise TooLarge
    try:
        return bool(sympy.SymmetricDifference(one, other).doit().is_empty)
    except (TypeError, NotImplementedError, ValueError, AttributeError):
        return False


def _pieces(region: Any) -> list[Any] | None:
    """The intervals of a set, single points as well, from the left; None: it is not made of intervals."""
    import sympy

    intervals: list[Any] = []
    for part in region.args if isinstance(region, sympy.Union) else [region]:
        if isinstance(part, sympy.FiniteSet):
            intervals += [(point, point, False, False) for point in part.args]
        elif isinstance(part, sympy.Interval):
            intervals.append((part.start, part.end, part.left_open, part.right_open))
        elif part != sympy.S.EmptySet:
            return None
    if any(end.free_symbols or not end.is_extended_real for low, high, *_ in intervals for end in (low, high)):
        return None
    return sorted(intervals, key=lambda each: (float(each[0]), float(each[1])))


def _same_pieces(one: Any, other: Any) -> bool:
    return bool(one[2:] == other[2:]) and same(one[0], other[0]) and same(one[1], other[1])


def solutions(relation: Relation) -> Any | None:
    """The set that an inequality in one unknown names, where it stands alone on its side."""
    import sympy

    if relation.sign == "in":
        return as_set(relation.right)
    if " " in relation.sign:
        chain = [*relation.left, relation.right]
        parts = [Relation(s, a, b) for s, a, b in zip(relation.sign.split(), chain[:-1], chain[1:], strict=True)]
        sets = [solutions(part) for part in parts]
        return None if None in sets else sympy.Intersection(*sets)
    relation = Relation(relation.sign, _unnamed(relation.left), _unnamed(relation.right))
    if not isinstance(relation.left, Formula) or not isinstance(relation.right, Formula):
        return None
    left, right, sign = relation.left.expression, relation.right.expression, relation.sign
    if right.is_Symbol and not left.free_symbols:
        left, right, sign = right, left, INVERSE[sign]
    if right.free_symbols or not right.is_extended_real:
        return None
    if isinstance(left, sympy.Abs) and left.args[0].is_Symbol and right.is_positive and sign in ("<", "<=", ">", ">="):
        inside = sympy.Interval(-right, right, sign in ("<", ">="), sign in ("<", ">="))
        return inside if sign.startswith("<") else sympy.S.Reals - inside
    if not left.is_Symbol:
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
