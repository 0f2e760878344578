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

import re
from collections.abc import Iterator

from .forms import Choice, Grid, Items, Region, Relation, Value, Words
from .formula import CURRENCY, CURRENCY_BEHIND, REPEATING, Formula, formula, number
from .latex import MAX_NESTING, TooLarge, converter, explodes, nesting
from .parts import bare, matching, named, split, thousands
from .spelling import TEXT, spell
from .words import NUMBER_WORDS

MAX_CHARS = 2000
MAX_COMMANDS = 250  # of LaTeX: the parser takes some 20 ms for each function
MAX_ITEMS = 200  # of a list
MAX_PIECES = 24  # of a union of intervals, which sympy compares pair by pair
_LABEL = re.compile(
    r"^(?:\\text\{ ?(?:the )?(?:final |correct )?(?:answer|result)(?: is)?:? ?\} ?:?"
    r"|\\(?:therefore|Rightarrow|implies)(?![A-Za-z])|=) ?",
    re.IGNORECASE,
)
_THOUSANDS = re.compile(r"([+-]?)(\d{1,3}(?:,\d{3})+)(\.\d+)?")
_DECIMAL_COMMA = re.compile(r"([+-]?\d+),(\d{1,2}|\d{4,})")
_CHOICE = re.compile(
    r"(?:(?:[Oo]ption|[Cc]hoice|选项) ?)?"
    r"(?:\(([A-J])\)|\\text\{ ?(?:(?:[Oo]ption|[Cc]hoice) )?\(?([A-J])(?:\)|\.|:)? ?\}"
    r"|([A-J])(?=[).:] ?|$)|\\text\{ ?\(?([A-J])[).:] ?(?=[^}]))"
    r"[).:]?\s*(.*)",
    re.DOTALL,
)
_BASE = re.compile(r"-?[0-9A-Z]+ ?_ ?\{? ?(?:\\text\{ ?)?[a-z0-9]+ ?\}? ?\}?")
_LETTERS = re.compile(r"\\text\{ ?(\(?[A-Z]\)?(?: ?, ?\(?[A-Z]\)?)*) ?\}")  # of statements, points, choices
_QUALIFIER = re.compile(
    r"(?:,? ?\\text\{ ?,? ?|,? (?<=[\s,])\(?)(?:for|where|with|as|when|in which|such that|since|because)\b"
    r"(?![^{}]*otherwise).*$",
    re.DOTALL,
)
_MOD = re.compile(r"(?<![\w.^{}(])(\d{1,18}) ?\\mod ?(\d{1,18})(?![\d.^!])")
_HYPHEN = r"(?<=[A-Za-z]{3})-|-(?=[A-Za-z]{3})"  # twenty-one, x-axis; p-q is a difference
_PROSE = re.compile(rf"[A-Za-z][A-Za-z.']*(?:(?: |{_HYPHEN})[A-Za-z][A-Za-z.']*)*")
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


def readings(text: str) -> list[Value]:
    """All that an answer may mean, the most plain first; empty: nothing that can be compared."""
    if len(text) > MAX_CHARS or text.count("\\") > MAX_COMMANDS or nesting(text) > MAX_NESTING:
        raise TooLarge
    spelled = bare(spell(bare(text)))
    return list(dict.fromkeys(_readings(spelled))) if spelled else []


def _readings(text: str) -> Iterator[Value]:
    text = _LABEL.sub("", text)
    if choice := _CHOICE.fullmatch(text):
        letter = next(filter(None, choice.groups()[:4]))
        rest = choice[5].strip()
        yield Choice(letter, rest[:-1] if rest.endswith("}") and rest.count("{") < rest.count("}") else rest)
    amount = CURRENCY_BEHIND.sub("", CURRENCY.sub(r"\1", text))
    if grouped := _THOUSANDS.fullmatch(amount.replace(" ", "") if ", " not in amount else amount):
        yield number(f"{grouped[1]}{grouped[2].replace(',', '')}{grouped[3] or ''}")
    elif decimal := _DECIMAL_COMMA.fullmatch(amount):
        yield from _whole(text)
        yield number(f"{decimal[1]}.{decimal[2]}")
        return
    yield from _whole(text)


def _whole(text: str) -> Iterator[Value]:
    """One answer as a whole: words, relation, list, region, tuple, formula."""
    text = bare(text)
    if not text:
        return
    if behind := re.fullmatch(r"\$([^$]+)\$ ?(\\%|[A-Za-z][A-Za-z ]*)", text):  # $125$ miles
        text = behind[1] + (behind[2] if behind[2] == "\\%" else rf" \text{{{behind[2]}}}")
    if "\\text{" not in text and "$" in text[1:] and text.count("$") % 2 == 0:  # formulas between words
        yield from _sentence(text)
        return
    if letters := _LETTERS.fullmatch(text):
        text = re.sub("[()]", "", letters[1])
    text = re.sub(r"\\text\{ ?([0-9A-Z]+) ?\}(?= ?_)", r"\1", text)
    if len(cut := _QUALIFIER.sub("", text).strip(" ,")) < len(text) and cut and "otherwise" not in text:
        text = cut
    plain = TEXT.sub(r"\1", text).strip()
    if _PROSE.fullmatch(plain) and (len(plain) > 1 or "\\text" in text):
        yield from _words(plain)
        if "\\text" in text or not re.fullmatch(r"[a-z]{2,3}|[A-Z]{2}|[A-Za-z](?: [A-Za-z]){1,3}", plain):
            return
    text = _MOD.sub(lambda found: str(int(found[1]) % int(found[2])) if int(found[2]) else found[0], text)
    if re.search(
        r"\\ldots|\\pmod|\\equiv|\\mod(?![a-z])|'' *$|\\begin\{(?:cases|aligned)|otherwise|\\circ.*'", text
    ) and not (REPEATING.fullmatch(text)):
        yield _as_words(text)
        return
    if _BASE.fullmatch(text) and re.search(r"\d.*_", text):
        yield _as_words(text)
        if digits := re.match(r"-?\d+", text):
            yield Words(f"base {digits[0]}")
        return
    if re.fullmatch(r"\d+(?: ?: ?\d+)+[A-Za-z. ]*", plain):
        yield Words(_folded(plain))
        if re.fullmatch(r"\d+ ?: ?\d+", text) and not re.search(r"\b0+\b", text):
            top, bottom = map(str.strip, text.split(":"))
            yield from formula(rf"\frac{{{top}}}{{{bottom}}}")
        return
    yield from _structure(text)


def _structure(text: str) -> Iterator[Value]:
    if (joined := thousands(text)) != text:
        yield from _structure(joined)
    parts = split(text)
    if len(parts) > 1:
        if len(parts) > MAX_ITEMS:
            raise TooLarge
        items = [next(_whole(part), None) for part in named(parts)]
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
    if brackets := list(_bracketed(text)):
        yield from brackets
        return
    yield from formula(text)


def _words(text: str) -> Iterator[Value]:
    folded = _folded(text)
    words = text.lower().replace("-", " ").replace(" and ", " ").split()
    if words and all(word in NUMBER_WORDS for word in words):
        total = part = 0
        for word in words:
            worth = NUMBER_WORDS[word]
            if worth == 100:
                part = max(part, 1) * 100
            elif worth >= 1000:
                total, part = total + max(part, 1) * worth, 0
            else:
                part += worth
        yield number(str(total + part))
    yield Words(folded)


def _folded(text: str) -> str:
    """Without what does not count between words; a point or sign of a number does."""
    return re.sub(r"[\s'\"()_]+", "", re.sub(r"[.,-](?!\s*\d)", "", text)).casefold()


def as_sentence(text: str) -> list[Value]:
    """An answer in words that cannot be read otherwise: `Room 12`; empty: it has no words."""
    plain = TEXT.sub(r"\1", bare(spell(bare(text))))
    return [Words(_folded(plain))] if re.search(r"(?<![\\A-Za-z])[A-Za-z]{3,}", plain) and "\\" not in plain else []


def _as_words(text: str) -> Words:
    text = TEXT.sub(r"\1", text)
    text = re.sub(r"([_^])\{ ?([^{}]*?) ?\}", r"\1\2", text)
    text = re.sub(r"\\pmod ?\{? ?([^{}() ]+) ?\}?", r"\\pmod\1", text)
    letters = sum(c.isalpha() for c in re.sub(r"\\[a-z]+", "", text)) > 3
    return Words(_folded(text) if letters and "\\" not in text else re.sub(r"[\s.]+(?!\d)", "", text.replace(" ", "")))


def _relation(text: str) -> Relation | Items | None:
    depth = 0
    places: list[tuple[int, int, str]] = []
    for match in re.finditer(r"\\\{|\\\}|[([{]|[)\]}]|\\(?:le|ge|ne|in|approx)(?![A-Za-z])|[<>=]", text):
        mark = match[0]
        if mark in ("\\{", "(", "[", "{"):
            depth += 1
        elif mark in ("\\}", ")", "]", "}"):
            depth -= 1
        elif depth == 0:
            places.append((match.start(), match.end(), dict(_SIGNS)[mark]))
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
    plain = TEXT.sub(r"\1", text).strip()
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
    if len(parts) > MAX_PIECES:
        raise TooLarge
    if len(parts) > 1:
        regions = [_region(part.strip()) or _interval(part.strip()) or _finite(part.strip()) for part in parts]
        whole = [each.region for each in regions if each is not None]
        return Region(sympy.Union(*whole)) if len(whole) == len(parts) else None
    left, minus, right = text.partition("\\setminus")
    if minus:
        base, removed = (
            _region(left.strip()) or _interval(left.strip()),
            _finite(right.strip()) or _interval(right.strip()),
        )
        return Region(sympy.Complement(base.region, removed.region)) if base and removed else None
    if match := re.fullmatch(r"\\(?:mathbb|mathbf|Bbb) ?\{? ?([RZNQC]) ?\}?", text):
        return Region(getattr(sympy.S, _SETS[match[1]]))
    if text == "\\emptyset" or re.fullmatch(r"\\\{ *\\\}", text):
        return Region(sympy.S.EmptySet)
    return None


def _finite(text: str) -> Region | None:
    import sympy

    if not (text.startswith("\\{") and text.endswith("\\}")):
        return None
    items = [next(formula(part), None) for part in split(text[2:-2])]
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
        items = [next(_whole(part), None) for part in split(text[2:-2])]
        if None not in items:
            yield Items("set", tuple(items))
        return
    if len(text) < 3 or text[0] not in "([])" or text[-1] not in "()[]":
        return
    outward = text[0] in ")]" or text[-1] in "(["  # ]0, 1[
    if not outward and matching(text) != len(text) - 1:
        return
    inside = split(text[1:-1])
    if len(inside) < 2:
        return
    items = [next(_whole(part), None) for part in inside]
    if None in items:
        return
    opens = {"(": "(", "[": "[", "]": "("}.get(text[0])
    closes = {")": ")", "]": "]", "[": ")"}.get(text[-1])
    if opens and closes:
        yield Items("tuple", tuple(items), opens + closes)


def _grid(text: str) -> Grid | None:
    text = re.sub(r"^[\[(] ?(?=\\begin)|(?<=\}) ?[\])]$", "", text) if "\\begin" in text else text
    match = re.fullmatch(r"\\begin ?\{([pbvBV]?matrix|array)\} ?(?:\{[lcr| ]*\})?(.*?)\\end ?\{\1\}", text, re.DOTALL)
    if match is None or "\\begin" in match[2]:
        return _computed_grid(text)
    rows = [row for row in re.split(r"\\\\(?: ?\[[^\]&]*\])?|\\cr", match[2]) if row.strip()]
    if sum(row.count("&") + 1 for row in rows) > MAX_ITEMS:
        raise TooLarge
    values = tuple(tuple(next(formula(cell.strip()), None) for cell in row.split("&")) for row in rows)
    return None if any(cell is None for row in values for cell in row) else Grid(values)


def _computed_grid(text: str) -> Grid | None:
    """A sum or product of matrices."""
    import sympy

    if "matrix" not in text or text.count("&") > MAX_ITEMS:
        return None
    try:
        matrix = converter()(text).doit()
    except Exception:  # the parser raises Exception itself
        return None
    if not isinstance(matrix, sympy.MatrixBase) or any(explodes(entry) for entry in matrix.flat()):
        return None
    return Grid(tuple(tuple(Formula(entry, str(entry)) for entry in matrix.row(n)) for n in range(matrix.rows)))


def _sentence(text: str) -> Iterator[Value]:
    r"""A gold answer in words: `The maximum is $9$, attained at …` → 9; `$n = 4$ or $n = 7$` → both."""
    spans = [
        (match.start(), match.end(), match[1] or match[2]) for match in re.finditer(r"\$([^$]+)\$|\\\((.+?)\\\)", text)
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
