r"""What an answer is: read whole, or not at all. A part that was understood is never taken for the whole.

3\sqrt{2}, 1/3, 0.25, 10\%, 15 \text{ cm}      Formula: a sympy expression; unit, percent and decimal places beside it
1, 2 · 1 and 2 · \{1, 2\} · 1 \pm \sqrt{2}     Items: of any order (list, set)
(1, 2) · [0, 1)                                Items in their order (tuple), which two also make an interval
(-\infty, 2] \cup (3, 5) · \mathbb{R}          Region: a sympy set of reals
x = 3 · f(x) = 2x · x > 3 · x \in [0, 1]       Relation
\begin{pmatrix}…                               Grid
(D) 12 · D · E: some words                     Choice: a letter, and what stands behind it
even, 3:30 p.m., 1 + 2 + \ldots + n, 52_8      Words: equal if they are spelled alike
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .spelling import closing, spell

MAX_NESTING = 15  # brackets: the LaTeX parser takes 0.8 s for 15 pairs, 2.6 s for 30 and 9 s for 60
MAX_ITEMS = 200  # of a list
MAX_DIGITS = 5000  # of any number met on the way to the value: 10^10^10 and 99999999! must not be evaluated
MAX_TERMS = 10_000  # of a sum or product with numeric limits


class TooLarge(Exception):
    """Evaluating it would not end in time."""


@dataclass(frozen=True)
class Formula:
    expression: Any  # sympy; decimals are exact rationals
    text: str
    unit: str = ""
    percent: bool = False
    places: int | None = None  # digits behind the point, where it is written as a decimal number
    digits: int = 0  # of these the significant ones


@dataclass(frozen=True)
class Items:
    kind: str  # list, set, tuple
    items: tuple[Any, ...]
    brackets: str = ""  # of a tuple, as written: "()", "[]", "(]", "[)"


@dataclass(frozen=True)
class Region:
    region: Any  # sympy set


@dataclass(frozen=True)
class Relation:
    sign: str  # = < <= > >= != in
    left: Any
    right: Any


@dataclass(frozen=True)
class Grid:
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Choice:
    letter: str
    rest: str


@dataclass(frozen=True)
class Words:
    text: str


Value = Formula | Items | Region | Relation | Grid | Choice | Words

_NUMBER = re.compile(r"[+-]? ?(?:\d+(?:\.\d*)?|\.\d+)")
_THOUSANDS = re.compile(r"([+-]?)(\d{1,3}(?:,\d{3})+)(\.\d+)?")
_DECIMAL_COMMA = re.compile(r"([+-]?\d+),(\d{1,2}|\d{4,})")
_REPEATING = re.compile(
    r"([+-]?)(\d*)\.(\d*?)(?:\\overline ?\{ ?(\d+) ?\}|\\(?:dot|overline) ?(\d)|\((\d+)\)|(\d+?)\7+\d* ?\\ldots|(\d)\\ldots)"
)
_CHOICE = re.compile(
    r"(?:\(([A-J])\)|\\text\{ ?\(?([A-J])(?:\)|\.|:)? ?\}|([A-J])(?=[).:] ?|$)|\\text\{ ?\(?([A-J])[).:] ?(?=[^}]))[).:]?\s*(.*)",
    re.DOTALL,
)
_BASE = re.compile(r"[0-9A-Z]+ ?_ ?\{? ?(?:\\text\{ ?)?[a-z0-9]+ ?\}? ?\}?")
_QUALIFIER = re.compile(
    r"(?:,? ?\\text\{ ?,? ?|,? (?<=[\s,]))(?:for|where|with|as|when|in which|such that)\b(?![^{}]*otherwise).*$",
    re.DOTALL,
)
_MOD = re.compile(r"(?<![\w.^{}(])(\d{1,18}) ?\\mod ?(\d{1,18})(?![\d.^!])")
_PROSE = re.compile(r"[A-Za-z][A-Za-z.']*(?:[ -][A-Za-z][A-Za-z.']*)*")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_WORD = re.compile(r"[A-Za-z]{2,}")
_AND = re.compile(
    r"(?:,? ?\\text\{ ?,? ?(?:and|or|und|et|oder|ou) ?\} ?|,? +(?:and|or) +|,?(?:和|或|以及)|(?<=[)\]}])(?:and|or)(?=[(\[\\{]))"
)
_APPROX = re.compile(r"^\\approx ?")
_SIGNS = (
    ("\\le", "<="),
    ("\\ge", ">="),
    ("\\ne", "!="),
    ("\\in", "in"),
    ("\\approx", "="),
    ("<", "<"),
    (">", ">"),
    ("=", "="),
)
_SETS = {"R": "Reals", "Z": "Integers", "N": "Naturals", "Q": "Rationals", "C": "Complexes"}
_CURRENCY = re.compile(r"^(-?) ?(?:\\?\$|€|£|¥|₹|\\(?:pounds|euro|yen)(?![A-Za-z])|USD|EUR|Rs\.?) ?(?=[\d.-])")
_CURRENCY_BEHIND = re.compile(r"(?<=\d) ?(?:\\?\$|€|£|¥|₹|\\euro)$")
# Words beside a number that say another number.
MEANING = frozenset(
    "squared cubed times plus minus over half halves third thirds quarter quarters dozen hundred thousand million billion "
    "trillion least most not or and more less than about by to of double twice triple between from under above below "
    "factorial root power modulo mod divided multiplied percent at up no none infinitely many approximately negative "
    "positive even odd except if unless otherwise pairs".split()
)
UNITS = {
    **dict.fromkeys(("cm", "centimeter", "centimetre", "centimeters", "centimetres", "cms"), "cm"),
    **dict.fromkeys(("m", "meter", "metre", "meters", "metres"), "m"),
    **dict.fromkeys(("mm", "millimeter", "millimetre", "millimeters", "millimetres"), "mm"),
    **dict.fromkeys(("km", "kilometer", "kilometre", "kilometers", "kilometres", "kms"), "km"),
    **dict.fromkeys(("in", "inch", "inches"), "in"),
    **dict.fromkeys(("ft", "foot", "feet"), "ft"),
    **dict.fromkeys(("yd", "yard", "yards"), "yd"),
    **dict.fromkeys(("mi", "mile", "miles"), "mi"),
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), "s"),
    **dict.fromkeys(("min", "mins", "minute", "minutes"), "min"),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), "h"),
    **dict.fromkeys(("day", "days"), "day"),
    **dict.fromkeys(("week", "weeks"), "week"),
    **dict.fromkeys(("month", "months"), "month"),
    **dict.fromkeys(("year", "years", "yr", "yrs"), "year"),
    **dict.fromkeys(("kg", "kilogram", "kilograms", "kgs"), "kg"),
    **dict.fromkeys(("g", "gram", "grams"), "g"),
    **dict.fromkeys(("mg", "milligram", "milligrams"), "mg"),
    **dict.fromkeys(("lb", "lbs", "pound", "pounds"), "lb"),
    **dict.fromkeys(("oz", "ounce", "ounces"), "oz"),
    **dict.fromkeys(("l", "liter", "litre", "liters", "litres"), "l"),
    **dict.fromkeys(("ml", "milliliter", "millilitre", "milliliters", "millilitres"), "ml"),
    **dict.fromkeys(("degree", "degrees", "deg"), "deg"),
    **dict.fromkeys(("radian", "radians", "rad"), "rad"),
    **dict.fromkeys(("dollar", "dollars", "usd"), "$"),
    **dict.fromkeys(("cent", "cents"), "cent"),
    **dict.fromkeys(("mph",), "mi/h"),
    **{"n": "N", "newton": "N", "newtons": "N", "j": "J", "joule": "J", "joules": "J", "w": "W", "v": "V", "pa": "Pa"},
    **{"hz": "Hz", "kj": "kJ", "kw": "kW", "ev": "eV", "k": "K", "c": "C", "f": "F", "mol": "mol", "ohm": "ohm"},
}
NUMBER_WORDS = {
    word: number
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
        "eighteen nineteen twenty".split()
    )
} | dict(
    zip(
        "thirty forty fifty sixty seventy eighty ninety hundred thousand million".split(),
        (30, 40, 50, 60, 70, 80, 90, 100, 1000, 1000000),
        strict=True,
    )
)


def readings(text: str) -> list[Value]:
    """All that an answer may mean, the most plain first; empty: nothing that can be compared."""
    if len(text) > 8000 or _nesting(text) > MAX_NESTING:
        raise TooLarge
    spelled = _bare(spell(_bare(text)))
    return list(dict.fromkeys(_readings(spelled))) if spelled else []


def _bare(text: str) -> str:
    """Without the wrapping that carries no meaning: emphasis, quotes, math delimiters, the full stop of a sentence."""
    before = None
    text = text.strip()
    while text != before:
        before = text
        text = text.strip('*`_" \t\r\n') if not text.startswith("_") else text
        if re.fullmatch(r"\s*\\text\s*\{[^{}]*\}\s*", text) is None:
            text = text if text.endswith(("..", "\\.")) else text.removesuffix(".")
        text = re.sub(r"(?<!\\)\\$", "", text.rstrip(",;"))
        for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
            inner = text[len(left) : -len(right)]
            if text.startswith(left) and text.endswith(right) and inner and "$" not in inner and left not in inner:
                text = inner.strip()
        if text.startswith("{") and closing(text, 0) == len(text) - 1:
            text = text[1:-1].strip()
        if text.endswith("$") and text.count("$") == 1 and not text.endswith("\\$"):
            text = text[:-1]
        if text.startswith("$") and text.count("$") == 1 and not re.match(r"\$ ?[\d.]", text):
            text = text[1:]
    return text


def _readings(text: str) -> Iterator[Value]:
    text = re.sub(r"^\\text\{ ?(?:the )?(?:final |correct )?answer is:? ?\} ?", "", text, flags=re.IGNORECASE)
    if choice := _CHOICE.fullmatch(text):
        letter = next(filter(None, choice.groups()[:4]))
        yield Choice(letter, choice[5].strip("} "))
    amount = _CURRENCY_BEHIND.sub("", _CURRENCY.sub(r"\1", text))
    if thousands := _THOUSANDS.fullmatch(amount.replace(" ", "") if ", " not in amount else amount):
        yield _number(f"{thousands[1]}{thousands[2].replace(',', '')}{thousands[3] or ''}")
    elif decimal := _DECIMAL_COMMA.fullmatch(amount):
        yield from _whole(text)
        yield _number(f"{decimal[1]}.{decimal[2]}")
        return
    yield from _whole(text)


def _whole(text: str) -> Iterator[Value]:
    """One answer as a whole: words, relation, list, region, tuple, formula."""
    text = _bare(text)
    if not text:
        return
    if behind := re.fullmatch(r"\$([^$]+)\$ ?(\\%|[A-Za-z][A-Za-z ]*)", text):  # $125$ miles
        text = behind[1] + (behind[2] if behind[2] == "\\%" else rf" \text{{{behind[2]}}}")
    if "\\text{" not in text and "$" in text[1:] and text.count("$") % 2 == 0:  # formulas between words
        yield from _sentence(text)
        return
    if len(cut := _QUALIFIER.sub("", text).strip(" ,")) < len(text) and cut and "otherwise" not in text:
        text = cut
    plain = _TEXT.sub(r"\1", text).strip()
    if _PROSE.fullmatch(plain) and (len(plain) > 1 or "\\text" in text):
        yield from _words(plain)
        if "\\text" in text or not re.fullmatch(r"[a-z]{2,3}|[A-Z]{2}|[A-Za-z](?: [A-Za-z]){1,3}", plain):
            return
    text = _MOD.sub(lambda found: str(int(found[1]) % int(found[2])) if int(found[2]) else found[0], text)
    if re.search(
        r"\\ldots|\\pmod|\\equiv|\\mod(?![a-z])|'' *$|\\begin\{(?:cases|aligned)|otherwise|\\circ.*'", text
    ) and not (_REPEATING.fullmatch(text)):
        yield _as_words(text)
        return
    if _BASE.fullmatch(text) and text[0].isdigit() and re.search(r"_", text):
        yield _as_words(text)
        if bare := re.match(r"\d+", text):
            yield Words(f"base {bare[0]}")
        return
    if re.fullmatch(r"\d+(?: ?: ?\d+)+[A-Za-z. ]*", plain):
        yield Words(_folded(plain))
        if re.fullmatch(r"\d+ ?: ?\d+", text) and not re.search(r"\b0+\b", text):
            top, bottom = map(str.strip, text.split(":"))
            yield from _formula(rf"\frac{{{top}}}{{{bottom}}}")
        return
    yield from _structure(text)


def _structure(text: str) -> Iterator[Value]:
    parts = _split(text)
    if len(parts) > 1:
        if len(parts) > MAX_ITEMS:
            raise TooLarge
        items = [next(_whole(part), None) for part in _named(parts)]
        if None not in items:
            yield Items("list", tuple(items))
        return
    text = (
        re.sub(r"(?<=[\w})\]]) ?\\approx(?![A-Za-z]).*$", "", text)
        if not re.match(r"[A-Za-z] ?\\approx", text)
        else text
    )
    relation = _relation(text)
    if relation is not None:
        yield relation
        return
    if region := _region(text):
        yield region
        return
    if grid := _grid(text):
        yield grid
        return
    yield from _bracketed(text)
    yield from _formula(text)


def _named(parts: list[str]) -> list[str]:
    """n=2, 3, 4 → n=2, n=3, n=4"""
    head = re.match(r"([A-Za-z](?:_\{?\w+\}?)?) ?= ?", parts[0])
    if head is None or any(re.search(r"[=<>]|\\(?:le|ge|ne|in)(?![a-z])", part) for part in parts[1:]):
        return parts
    return [parts[0], *(f"{head[1]} = {part}" for part in parts[1:])]


def _words(text: str) -> Iterator[Value]:
    folded = _folded(text)
    words = text.lower().replace("-", " ").replace(" and ", " ").split()
    if words and all(word in NUMBER_WORDS for word in words):
        total = part = 0
        for word in words:
            number = NUMBER_WORDS[word]
            if number == 100:
                part = max(part, 1) * 100
            elif number >= 1000:
                total, part = total + max(part, 1) * number, 0
            else:
                part += number
        yield _number(str(total + part))
    yield Words(folded)


def _folded(text: str) -> str:
    return re.sub(r"[\s.,'\"()_-]+", "", text).casefold()


def _as_words(text: str) -> Words:
    text = _TEXT.sub(r"\1", text)
    text = re.sub(r"([_^])\{ ?([^{}]*?) ?\}", r"\1\2", text)
    text = re.sub(r"\\pmod ?\{? ?([^{}() ]+) ?\}?", r"\\pmod\1", text)
    letters = sum(c.isalpha() for c in re.sub(r"\\[a-z]+", "", text)) > 3
    return Words(_folded(text) if letters and "\\" not in text else re.sub(r"[\s.]+(?!\d)", "", text.replace(" ", "")))


def _number(text: str) -> Formula:
    import sympy

    places = len(text.partition(".")[2]) if "." in text else None
    digits = len(re.sub(r"\D", "", text).lstrip("0"))
    return Formula(
        sympy.Rational(text if "." not in text or text[-1] != "." else text[:-1]), text, "", False, places, digits
    )


def _split(text: str) -> list[str]:
    """At commas, semicolons, `and`, `or` outside of all brackets; thousands stay together."""
    if "\\pm" in text and "\\mp" not in text and len(signs := re.findall(r"\\pm(?![a-z])", text)) == 1 and signs:
        both = [re.sub(r"\\pm ?", sign, text) for sign in ("+", "-")]
        return [part for each in both for part in _split(each)]
    parts, depth, begin = [], 0, 0
    position = 0
    while position < len(text):
        character = text[position]
        if character == "\\" and text[position + 1 : position + 2] in ("{", "}", ",", ";"):
            depth += {"{": 1, "}": -1}.get(text[position + 1], 0)
            position += 2
            continue
        if depth == 0 and (joined := _AND.match(text, position)):
            parts.append(text[begin:position])
            position = begin = joined.end()
            continue
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif depth == 0 and character in ",;":
            parts.append(text[begin:position])
            begin = position + 1
        position += 1
    parts = [part.strip() for part in [*parts, text[begin:]]]
    return [part for part in parts if part] if len(parts) > 1 else parts


_ARROWS = re.compile(r"\\(?:le|ge|ne|in|approx)(?![A-Za-z])|[<>=]")


def _relation(text: str) -> Relation | Items | None:
    depth = 0
    places: list[tuple[int, int, str]] = []
    for found in re.finditer(r"\\\{|\\\}|[([{]|[)\]}]|\\(?:le|ge|ne|in|approx)(?![A-Za-z])|[<>=]", text):
        mark = found[0]
        if mark in ("\\{", "(", "[", "{"):
            depth += 1
        elif mark in ("\\}", ")", "]", "}"):
            depth -= 1
        elif depth == 0:
            places.append((found.start(), found.end(), dict(_SIGNS)[mark]))
    if not places or len(places) > 6 or places[0][0] == 0:
        return None
    ends = [0, *(end for _, end, _ in places)]
    begins = [*(start for start, _, _ in places), len(text)]
    sides = [text[a:b].strip() for a, b in zip(ends, begins, strict=True)]
    signs = [sign for _, _, sign in places]
    values = [_side(side) for side in sides]
    if any(value is None for value in values):
        return None
    if len(signs) == 1:
        return Relation(signs[0], values[0], values[1])
    return Relation(" ".join(signs), tuple(values[:-1]), values[-1])


def _side(text: str) -> Value | None:
    plain = _TEXT.sub(r"\1", text).strip()
    if re.fullmatch(r"[A-Za-z][A-Za-z ]+", plain) and not re.fullmatch(r"[a-z]{2}", plain):
        return Words(_folded(plain))
    if re.fullmatch(
        r"\\(?:m?angle|triangle|overline|overrightarrow|vec|widehat|hat|bar|overset)(?![A-Za-z]).{1,20}", text
    ):
        return Words(re.sub(r"[{} ]", "", text))
    if re.fullmatch(r"[A-Za-z](?:'+)? ?\( ?[A-Za-z](?:, ?[A-Za-z])* ?\)", text):  # f(x)
        return Words(text.replace(" ", ""))
    return next(_whole(text), None)


def _region(text: str) -> Region | None:
    import sympy

    parts = re.split(r"\\cup(?![A-Za-z])", text)
    if len(parts) > 100:
        raise TooLarge
    if len(parts) > 1:
        regions = [_region(part.strip()) or _interval(part.strip()) or _finite(part.strip()) for part in parts]
        if any(each is None for each in regions):
            return None
        return Region(sympy.Union(*(each.region for each in regions)))
    left, minus, right = text.partition("\\setminus")
    if minus:
        base, removed = (
            _region(left.strip()) or _interval(left.strip()),
            _finite(right.strip()) or _interval(right.strip()),
        )
        return Region(sympy.Complement(base.region, removed.region)) if base and removed else None
    if found := re.fullmatch(r"\\(?:mathbb|mathbf|Bbb) ?\{? ?([RZNQC]) ?\}?", text):
        return Region(getattr(sympy.S, _SETS[found[1]]))
    if text == "\\emptyset" or re.fullmatch(r"\\\{ *\\\}", text):
        return Region(sympy.S.EmptySet)
    return None


def _finite(text: str) -> Region | None:
    import sympy

    if not (text.startswith("\\{") and text.endswith("\\}")):
        return None
    items = [next(_formula(part), None) for part in _split(text[2:-2])]
    return None if None in items else Region(sympy.FiniteSet(*(item.expression for item in items if item)))


def _interval(text: str) -> Region | None:
    for value in _bracketed(text):
        if isinstance(value, Items) and value.kind == "tuple":
            return as_region(value)
    return None


def as_region(value: Items) -> Region | None:
    """Of two formulas in brackets: the interval."""
    import sympy

    if len(value.items) != 2 or not all(isinstance(item, Formula) for item in value.items) or not value.brackets:
        return None
    low, high = (item.expression for item in value.items)
    if low.free_symbols or high.free_symbols or not (low.is_extended_real and high.is_extended_real):
        return None
    return Region(sympy.Interval(low, high, value.brackets[0] == "(", value.brackets[1] == ")"))


def _bracketed(text: str) -> Iterator[Value]:
    if text.startswith("\\{") and text.endswith("\\}"):
        items = [next(_whole(part), None) for part in _split(text[2:-2])]
        if None not in items:
            yield Items("set", tuple(items))
        return
    if len(text) < 3 or text[0] not in "([])" or text[-1] not in "()[]":
        return
    outward = text[0] in ")]" or text[-1] in "(["  # ]0, 1[
    if not outward and _matching(text) != len(text) - 1:
        return
    inside = _split(text[1:-1])
    if len(inside) < 2:
        return
    items = [next(_whole(part), None) for part in inside]
    if None in items:
        return
    opens = {"(": "(", "[": "[", "]": "("}.get(text[0])
    closes = {")": ")", "]": "]", "[": ")"}.get(text[-1])
    if opens and closes:
        yield Items("tuple", tuple(items), opens + closes)


def _matching(text: str) -> int:
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if depth == 0:
            return position
    return -1


def _grid(text: str) -> Grid | None:
    text = re.sub(r"^[\[(] ?(?=\\begin)|(?<=\}) ?[\])]$", "", text) if "\\begin" in text else text
    found = re.fullmatch(r"\\begin ?\{([pbvBV]?matrix|array)\} ?(?:\{[lcr| ]*\})?(.*?)\\end ?\{\1\}", text, re.DOTALL)
    if found is None or "\\begin" in found[2]:
        return _computed_grid(text)
    rows = [row for row in re.split(r"\\\\|\\cr", found[2]) if row.strip()]
    if sum(row.count("&") + 1 for row in rows) > MAX_ITEMS:
        raise TooLarge
    values = tuple(tuple(next(_formula(cell.strip()), None) for cell in row.split("&")) for row in rows)
    return None if any(cell is None for row in values for cell in row) else Grid(values)


def _computed_grid(text: str) -> Grid | None:
    """A sum or product of matrices."""
    import sympy

    if "matrix" not in text or text.count("&") > MAX_ITEMS:
        return None
    try:
        found = _library().latex2sympy(text, is_real=True, convert_degrees=False, normalization_config=None).doit()
    except Exception:  # the parser raises Exception itself
        return None
    if not isinstance(found, sympy.MatrixBase) or any(explodes(entry) for entry in found.flat()):
        return None
    return Grid(tuple(tuple(Formula(entry, str(entry)) for entry in found.row(n)) for n in range(found.rows)))


def _sentence(text: str) -> Iterator[Value]:
    r"""A gold answer in words: `The maximum is $9$, attained at …` → 9; `$n = 4$ or $n = 7$` → both."""
    spans = [
        (found.start(), found.end(), found[1] or found[2]) for found in re.finditer(r"\$([^$]+)\$|\\\((.+?)\\\)", text)
    ]
    between = [
        text[a:b]
        for a, b in zip([0, *(end for _, end, _ in spans)], [*(s for s, _, _ in spans), len(text)], strict=True)
    ]
    joined = all(re.fullmatch(r"[\s,;]*(?:and|or)?\s*", words) for words in between)
    if joined:
        yield from _whole(", ".join(inner for _, _, inner in spans))
        return
    if re.search(r"\b(?:otherwise|if|even|odd|all|any|every)\b", " ".join(between)):
        yield Words(_folded(text.replace("$", "")))
        return
    if stated := re.search(r"\b(?:is|are|equals)[: ]+\$([^$]+)\$(?= *(?:[,.;]|$))", text):
        yield from _whole(stated[1])
    elif (
        re.fullmatch(r"\s*,? *(?:where|for|with|as|when)\b.*", "".join(between[1:]), re.DOTALL)
        and not between[0].strip()
    ):
        yield from _whole(spans[0][2])
    else:
        yield Words(_folded(text.replace("$", "")))


def _formula(text: str) -> Iterator[Formula]:
    text = _APPROX.sub("", text.strip())
    if repeating := _REPEATING.fullmatch(text):
        yield _repeating(repeating, text)
        return
    text = _CURRENCY_BEHIND.sub("", _CURRENCY.sub(r"\1", text))
    text, unit = _without_unit(text)
    percent = text.endswith("\\%")
    text = text.removesuffix("\\%").strip()
    text = re.sub(r"(?<![\w.}/])(\d+) ?/ ?(\d+) +(?=\\(?:sqrt|pi)|[A-Za-z(])", r"\\frac{\1}{\2} ", text)
    joined = re.sub(r"(?<![\d.])(\d{1,3}(?:,\d{3})+)(?![\d,])", lambda found: found[0].replace(",", ""), text)
    if (
        not joined
        or "\\text" in joined
        or re.search(r"(?<![\\A-Za-z])[A-Za-z]{2,} +[A-Za-z]{2,}", joined)
        or re.search(r"[$\"?!]{2}|\\\$", joined)
    ):
        return
    if _NUMBER.fullmatch(joined):
        number = _number(joined.replace(" ", ""))
        yield Formula(number.expression, joined, unit, percent, number.places, number.digits)
        return
    expression = parse(joined)
    if expression is not None:
        yield Formula(expression, joined, unit, percent)


def _repeating(found: re.Match[str], text: str) -> Formula:
    import sympy

    sign, whole, fixed = found[1], found[2] or "0", found[3] or ""
    cycle = next(filter(None, found.groups()[3:]))
    value = sympy.Rational(int(whole + fixed), 10 ** len(fixed))
    value += sympy.Rational(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(fixed))
    return Formula(-value if sign == "-" else value, text)


_UNIT_TEXT = re.compile(
    r"(?:\\text\{([^{}]*)\}|(?<=[\d}) ])((?: ?[A-Za-z]{2,}\.?)+))((?: ?[/^\\cdot{} -]*(?:\d|\\text\{[^{}]*\}|[A-Za-z]{1,3}))*) *$"
)


def _without_unit(text: str) -> tuple[str, str]:
    """What stands before a unit or a noun behind a number, and the unit if it is a known one."""
    if re.search(r"\^\\circ ?(?:\\text\{ ?[CF] ?\}|[CF])?$", text) and not re.search(
        r"\\(?:sin|cos|tan|cot|sec|csc)", text
    ):
        return re.sub(r" ?\^\\circ ?(?:\\text\{ ?[CF] ?\}|[CF])?$", "", text), "deg"
    found = re.search(
        r"(?:\\text\{[^{}]*\}|(?<=[\d}]) +[A-Za-z]{2,}(?: +[A-Za-z]{2,})*)(?: ?\^ ?\{? ?-?\d ?\}?)?(?: ?/ ?(?:\\text\{[^{}]*\}|[A-Za-z]+)(?: ?\^ ?\{? ?-?\d ?\}?)?)? *$",
        text,
    )
    if found is None or not text[: found.start()].strip():
        return text, ""
    while (
        more := re.search(r"\\text\{[^{}]*\}(?: ?\^ ?\{? ?-?\d ?\}?)? ?(?:\\cdot|/)? ?$", text[: found.start()])
    ) is not None:
        found = re.compile(r".*", re.DOTALL).match(text, more.start())
        if found is None:
            return text, ""
    words = _TEXT.sub(r" \1 ", found[0])
    names = re.findall(r"[A-Za-z]+", words)
    if any(name.lower() in MEANING or name.lower() in NUMBER_WORDS for name in names):
        return text, ""
    if [name.lower() for name in names] in (["th"], ["st"], ["nd"], ["rd"]):
        return text[: found.start()].strip(), ""
    known = [UNITS.get(name.lower() if len(name) > 1 else name, UNITS.get(name.lower(), "")) for name in names]
    powers = "".join(re.findall(r"[\d/]", words.replace("per", "/")))
    unit = "".join(known) + powers if known and all(known) else ""
    return text[: found.start()].strip(), unit


@functools.cache
def _library() -> Any:
    import latex2sympy2_extended.latex2sympy2 as library

    return library


_BIG_BINOMIAL = re.compile(r"binom.*\d{5}", re.DOTALL)  # the one function that is evaluated while parsing


def parse(text: str) -> Any | None:
    """A sympy expression of all of a formula, with exact decimals; None: it is none. Raises TooLarge."""
    import sympy

    if _nesting(text) > MAX_NESTING or _BIG_BINOMIAL.search(text) or len(text) > 2000:
        raise TooLarge
    if re.search(r"\d +\d|\d_|[A-Za-z]{12,}|\\(?:int|lim|variable|begin|text|prime)(?![A-Za-z])|[\"#@&]|__", text):
        return None
    text = re.sub(
        r"(\\(?:sin|cos|tan|cot|sec|csc)) ?\(? ?(-?[\d.]+|\\frac\{[^{}]*\}\{[^{}]*\}) ?\^\\circ ?\)?",
        r"\1(\2 \\cdot \\frac{\\pi}{180})",
        text,
    )
    if "\\circ" in text:
        return None
    library = _library()
    config = library.ConversionConfig(lowercase_symbols=False)
    try:
        found = library.latex2sympy(
            text, is_real=True, convert_degrees=False, normalization_config=None, conversion_config=config
        )
    except RecursionError as error:
        raise TooLarge from error
    except Exception:  # the parser raises Exception itself
        return None
    if not isinstance(found, sympy.Expr):
        return None
    if explodes(found):
        raise TooLarge
    exact = {each: sympy.Rational(str(each)) for each in found.atoms(sympy.Float)}
    return found.xreplace(exact) if exact else found


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
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
