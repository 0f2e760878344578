r"""A formula, read whole: a sympy expression, and the unit, percent sign and decimal places that it is written with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .latex import parse
from .spelling import TEXT
from .words import LARGE, MEANING, NUMBER_WORDS, unit_of


@dataclass(frozen=True)
class Formula:
    expression: Any  # sympy; decimals are exact rationals
    text: str
    unit: str = ""
    percent: bool = False
    places: int | None = None  # digits behind the point, where it is written as a decimal number
    digits: int = 0  # of these the significant ones


_FRACTION = re.compile(r"([+-]?) ?(?:\\frac ?\{ ?(-?\d{1,999}) ?\}\{ ?(\d{1,999}) ?\}|(\d{1,999}) ?/ ?(\d{1,999}))")
_NUMBER = re.compile(r"[+-]? ?(?:\d+(?:\.\d*)?|\.\d+)")
REPEATING = re.compile(  # of bounded length: what repeats is sought from every place
    r"(?=.{1,80}$)([+-]?)(\d*)\.(\d*?)"
    r"(?:\\overline ?\{ ?(\d+) ?\}|\\(?:dot|overline) ?(\d)|\((\d+)\)|(\d+?)\7+\d* ?\\ldots|(\d)\\ldots)"
)
_APPROX = re.compile(r"^\\approx ?")
_POWER = r"(?: ?\^ ?\{? ?-?\d ?\}?)?"
_NAME = r"(?:\\text\{[^{}]*\}|[A-Za-z]+)"
_UNIT = re.compile(
    rf"(?:\\text\{{[^{{}}]*\}}|(?<=[\d}}]) +[A-Za-z]{{2,}}(?: +[A-Za-z]{{2,}})*){_POWER}(?: ?/ ?{_NAME}{_POWER})? *$"
)
_SCALED = re.compile(rf"([+-]?\d[\d,]*(?:\.\d+)?) ?(?:\\text\{{ ?)?({'|'.join(LARGE)})\b ?([A-Za-z ]*)\}}?")
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
    if scaled := _SCALED.fullmatch(text):  # 5 million dollars
        behind = rf" \text{{{scaled[3]}}}" if scaled[3] else ""
        text = rf"{scaled[1].replace(',', '')} \cdot {LARGE[scaled[2]]}{behind}"
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
    expression = _fraction(joined) or parse(joined)
    if expression is not None:
        yield Formula(expression, joined, unit, percent)


def _fraction(text: str) -> Any | None:
    r"""\frac{1}{2} and 1/2, which need no parser."""
    import sympy

    match = _FRACTION.fullmatch(text)
    if match is None:
        return None
    top, bottom = int(match[2] or match[4]), int(match[3] or match[5])
    return sympy.Rational(-top if match[1].startswith("-") else top, bottom) if top and bottom else None


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
        return re.sub(r" ?\^\\circ ?(?:\\text\{ ?[CF] ?\}|[CF])?$", "", text), unit_of("deg")
    match = _UNIT.search(text)
    if match is None or not text[: match.start()].strip():
        return text, ""
    while (
        more := re.search(r"\\text\{[^{}]*\}(?: ?\^ ?\{? ?-?\d ?\}?)? ?(?:\\cdot|/)? ?$", text[: match.start()])
    ) is not None:
        match = re.compile(r".*", re.DOTALL).match(text, more.start())
        if match is None:
            return text, ""
    words = TEXT.sub(r" \1 ", match[0])
    names = re.findall(r"[A-Za-z]+", words)
    if any(name.lower() in MEANING or name.lower() in NUMBER_WORDS for name in names):
        return text, ""
    if [name.lower() for name in names] in (["th"], ["st"], ["nd"], ["rd"]):
        return text[: match.start()].strip(), ""
    return text[: match.start()].strip(), unit_of(words)
