"""Whether an answer is the gold answer: by its kind, down to its formulas (same.py) and sets (regions.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .forms import Choice, Grid, Items, Region, Relation, Value, Words
from .formula import Formula
from .regions import INVERSE, as_set, same_regions, solutions
from .same import proportional, same
from .value import readings


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
        ours, theirs = as_set(gold), as_set(found)
        return ours is not None and theirs is not None and same_regions(ours, theirs)
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
    distinct: list[Any] = []
    for item in items:
        if not any(equal(item, each) for each in distinct):
            distinct.append(item)
    return distinct


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
        ours = as_set(relation)
        theirs = as_set(value)
        return ours is not None and theirs is not None and same_regions(ours, theirs)
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
        ours, theirs = solutions(gold), solutions(found)
        if ours is not None and theirs is not None:
            return same_regions(ours, theirs) and (_unknown(gold) == _unknown(found))
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
    return proportional(ours, theirs, either=gold.sign in ("=", "!="))


def _chains(gold: Relation, found: Relation) -> bool:
    one, other = ([*r.left, r.right] if isinstance(r.left, tuple) else [r.left, r.right] for r in (gold, found))
    signs = found.sign.split()
    if signs == [INVERSE.get(sign, "") for sign in reversed(gold.sign.split())]:
        other, signs = other[::-1], gold.sign.split()
    return signs == gold.sign.split() and all(equal(a, b) for a, b in zip(one, other, strict=True))


def _unknown(relation: Relation) -> set[str]:
    sides = [*relation.left, relation.right] if isinstance(relation.left, tuple) else [relation.left, relation.right]
    return {str(s) for side in sides if isinstance(side, Formula) for s in side.expression.free_symbols}
