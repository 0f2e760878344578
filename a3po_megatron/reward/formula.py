r"""A formula, read whole: a sympy expression, and the unit, percent sign and decimal places that it is written with."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .words import MEANING, NUMBER_WORDS, UNITS

MAX_NESTING = 15  # brackets: the LaTeX parser takes 0.8 s for 15 pairs, 2.6 s for 30 and 9 s for 60
MAX_DIGITS = 5000  # of any number met on the way to the value: 10^10^10 and 99999999! must not be evaluated
MAX_TERMS = 10_000  # of a sum or product with numeric limits
MAX_CHARS, MAX_COMMANDS = 2000, 100


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


_NUMBER = re.compile(r"[+-]? ?(?:\d+(?:\.\d*)?|\.\d+)")
REPEATING = re.compile(
    r"([+-]?)(\d*)\.(\d*?)"
    r"(?:\\overline ?\{ ?(\d+) ?\}|\\(?:dot|overline) ?(\d)|\((\d+)\)|(\d+?)\7+\d* ?\\ldots|(\d)\\ldots)"
)
_APPROX = re.compile(r"^\\approx ?")
_POWER = r"(?: ?\^ ?\{? ?-?\d ?\}?)?"
_NAME = r"(?:\\text\{[^{}]*\}|[A-Za-z]+)"
_UNIT = re.compile(
    rf"(?:\\text\{{[^{{}}]*\}}|(?<=[\d}}]) +[A-Za-z]{{2,}}(?: +[A-Za-z]{{2,}})*){_POWER}(?: ?/ ?{_NAME}{_POWER})? *$"
)
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
CURRENCY = re.compile(r"^(-?) ?(?:\\?\$|€|£|¥|₹|\\(?:pounds|euro|yen)(?![A-Za-z])|USD|EUR|Rs\.?) ?(?=[\d.-])")
CURRENCY_BEHIND = re.compile(r"(?<=\d) ?(?:\\?\$|€|£|¥|₹|\\euro)$")


def number(text: str) -> Formula:
    import sympy

    places = len(text.partition(".")[2]) if "." in text else None
    digits = len(re.sub(r"\D", "", text).lstrip("0"))
    return Formula(
        sympy.Rational(text if "." not in text or text[-1] != "." else text[:-1]), text, "", False, places, digits
    )


def formula(text: str) -> Iterator[Formula]:
    text = _APPROX.sub("", text.strip())
    if repeating := REPEATING.fullmatch(text):
        yield _repeating(repeating, text)
        return
    text = CURRENCY_BEHIND.sub("", CURRENCY.sub(r"\1", text))
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
        plain = number(joined.replace(" ", ""))
        yield Formula(plain.expression, joined, unit, percent, plain.places, plain.digits)
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


def _without_unit(text: str) -> tuple[str, str]:
    """What stands before a unit or a noun behind a number, and the unit if it is a known one."""
    if re.search(r"\^\\circ ?(?:\\text\{ ?[CF] ?\}|[CF])?$", text) and not re.search(
        r"\\(?:sin|cos|tan|cot|sec|csc)", text
    ):
        return re.sub(r" ?\^\\circ ?(?:\\text\{ ?[CF] ?\}|[CF])?$", "", text), "deg"
    found = _UNIT.search(text)
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
def library() -> Any:
    import latex2sympy2_extended.latex2sympy2 as library

    return library


_BIG_BINOMIAL = re.compile(r"binom.*\d{5}", re.DOTALL)  # the one function that is evaluated while parsing


def parse(text: str) -> Any | None:
    """A sympy expression of all of a formula, with exact decimals; None: it is none. Raises TooLarge."""
    import sympy

    if (
        nesting(text) > MAX_NESTING
        or _BIG_BINOMIAL.search(text)
        or len(text) > MAX_CHARS
        or text.count("\\") > MAX_COMMANDS
    ):
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
    l2s = library()
    config = l2s.ConversionConfig(lowercase_symbols=False)
    try:
        found = l2s.latex2sympy(
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


def nesting(text: str) -> int:
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
