r"""Grades a mathematical response against its gold answer: correct, wrong or invalid.

    response → the answer in it → the same as the gold answer?
               \boxed{…}          the same string, the same integer, or equal to math-verify (sympy)
               Answer: …
               last expression

Pure and in-process: no signals, no threads, no time limit (math-verify's own limits use SIGALRM, which fails outside
the main thread and clears the caller's alarm, so they are off). What is cheap to recognise as explosive is refused
before sympy evaluates it; the real guard is the pool of killable processes, `pool.py`.

Fail closed: a response without an answer, cut off, unreadable or absurdly large is *wrong*; *invalid* is kept for a
failure of grading, that is a gold answer nobody can read or an exception inside the library while comparing.

math-verify and sympy are imported at the first answer that needs them: most are settled by comparing strings.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from fractions import Fraction
from types import ModuleType
from typing import Any

from ..batch import Verdict
from ..errors import RequestError

EXTRACTS = ("any", "boxed", "answer")
MAX_ANSWER_CHARS = 2000  # of one answer; the longest gold answer of MATH has 159
MAX_LONG_CHARS = 20_000  # of an answer or a response that is compared as a string
MAX_TAIL_CHARS = 4000  # the end of a response that is searched when it names no answer: the search is superlinear
MAX_NESTING = 15  # brackets: the LaTeX parser takes 0.8 s for 15 pairs, 2.6 s for 30 and 9 s for 60
MAX_DIGITS = 5000  # of any number met on the way to the value: 10^10^10 and 99999999! must not be evaluated
MAX_TERMS = 10_000  # of a sum or product with numeric limits

_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
# Bounded runs of blanks: `\s*` after `^` would cross lines and be quadratic in a response of empty ones.
_ANSWER_LINE = re.compile(
    r"^[ \t>*_#-]{0,20}(?:the )?(?:final )?answer[ *_]{0,5}:[ \t*_]{0,20}(\S.*)$", re.IGNORECASE | re.MULTILINE
)
_BETWEEN_BOXES = re.compile(r"(?:\s|[$.;,]|\\[\[\]();,!: ]|\\q?quad|\band\b|\bor\b|\\text\s*\{\s*(?:and|or)\s*\})*")
_LISTING = re.compile(r"[,;]|\band\b|\bor\b")
_INTEGER = re.compile(r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)")
_PERCENT = r"(?P<percent>\s*(?:\\?%|percent(?:age)?|pct))?"
_NUMBER = re.compile(rf"[$€£¥]?\s*[+-]?(?:\d{{1,3}}(?:[ ,]\d{{3}})+|\d*)(?:[.,]\d+)?{_PERCENT}", re.IGNORECASE)
_MIXED = re.compile(
    rf"(?<![\d.,/^])(?P<whole>-?(?:\d{{1,3}}(?:[ ,]\d{{3}})+|\d+)) +(?P<top>\d+)/(?P<bottom>\d+){_PERCENT}\s*\.?\s*$",
    re.IGNORECASE,
)
_BIG_BINOMIAL = re.compile(r"binom.*\d{5}", re.DOTALL)  # the one function that is evaluated while parsing
_PYTHON_POWER = re.compile(r"(?<=[\w)\]}])(?:\*\*| \*\* )(?:(-?\d+|[a-z]\b)|(?=[({]))")  # 2**3, which LaTeX reads as 2
_DELIMITED = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed")
_STYLE = re.compile(r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z '.,:;()-]*")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}[^A-Za-z\\{}]*\s[^\\{}]*?(?<![\\A-Za-z])[A-Za-z]{2,}")


def grade(response: str, answer: str, *, extract: str = "any") -> Verdict:
    r"""The verdict on `response`, whose gold answer is `answer`.

    extract: where the response's answer stands.
        boxed    the last complete \boxed{…}; boxes listed one after another also count as the list of their contents
        answer   the last line of the form `Answer: …`
        any      the box, else the answer line, else what math-verify finds as the last expression; a response whose
                 only box never closes was cut off and is wrong
    Raises RequestError for another `extract`. Every other trouble is a verdict with its reason.
    """
    if extract not in EXTRACTS:
        raise RequestError(f"extract: {extract!r} is not one of {', '.join(EXTRACTS)}")
    boxed_gold, _ = _boxes(answer)
    gold = _bare(boxed_gold[-1] if boxed_gold else answer)
    if not gold:
        return Verdict("invalid", "the gold answer is empty")
    candidates: list[str] = []
    if extract != "answer":
        run, cut_off = _boxes(response)
        if cut_off and not run:
            return Verdict("wrong", "cut off inside \\boxed{")
        candidates = [run[-1], ", ".join(run)] if len(run) > 1 else run
    if not candidates and extract != "boxed":
        lines = _ANSWER_LINE.findall(response)
        candidates = [_bare(lines[-1][: MAX_LONG_CHARS + 1])] if lines else []
    if candidates and not candidates[0].strip():
        return Verdict("wrong", "the answer is empty")
    if not candidates and extract != "any":
        return Verdict("wrong", "no \\boxed{…} found" if extract == "boxed" else "no line `Answer: …` found")

    settled = [_settle(candidate, gold) for candidate in candidates or [response]]
    if True in settled:
        return Verdict("correct")
    if candidates and all(equal is False for equal in settled):
        return Verdict("wrong", "another value")
    if len(gold) > MAX_ANSWER_CHARS:
        return Verdict("invalid", f"the gold answer has more than {MAX_ANSWER_CHARS} characters")
    return _compare(candidates, response[-MAX_TAIL_CHARS:], answer, gold)


def _boxes(text: str) -> tuple[list[str], bool]:
    r"""(contents, cut off): the last complete \boxed{…} with those listed directly before it; whether one never closes.

    One pass with a stack, because a scan per box is quadratic in a response that repeats `\boxed{`.
    """
    stack: list[tuple[bool, int, int]] = []
    spans: list[tuple[int, int, int, int]] = []  # outermost complete boxes: start, content start, content end, end
    for token in _BRACE.finditer(text):
        mark = token.group()
        if mark == "{":
            stack.append((False, token.start(), token.end()))
        elif mark.endswith("{") and len(mark) > 2:
            stack.append((True, token.start(), token.end()))
        elif mark == "}" and stack:
            is_box, start, content = stack.pop()
            if is_box:
                inside = []
                while spans and spans[-1][0] > start:
                    inside.append(spans.pop())
                end = token.start()
                if len(inside) == 1 and not (text[content : inside[0][0]] + text[inside[0][3] : end]).strip():
                    _, content, end, _ = inside[0]  # a box in a box
                spans.append((start, content, end, token.end()))
    run: list[str] = []
    for position in range(len(spans) - 1, -1, -1):
        if run:
            between = text[spans[position][3] : min(spans[position + 1][0], spans[position][3] + 81)]
            if len(between) > 80 or not (_LISTING.search(between) and _BETWEEN_BOXES.fullmatch(between)):
                break
        run.insert(0, text[spans[position][1] : spans[position][2]])
        if len(run) == 100:
            break
    return run, any(is_box for is_box, _, _ in stack)


def _bare(text: str) -> str:
    """Without the wrapping that carries no meaning: emphasis, math delimiters, the full stop of a sentence."""
    before = None
    text = text.strip()
    while text != before:
        before = text
        text = text.strip("* \t\r\n")
        text = text if text.endswith("..") else text.removesuffix(".")  # 0.33… must not become 0.33
        for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
            inner = text[len(left) : -len(right)]
            if text.startswith(left) and text.endswith(right) and inner and "$" not in inner and left not in inner:
                text = inner.strip()
    return text


def _normalise(text: str) -> str:
    """One spelling for what is typeset differently; equal results mean the same answer."""
    text = re.sub(r"\\!\s*", "", _bare(text)).replace("{,}", ",")
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])", "", text)
    text = re.sub(r"\\[,;: ]|~", " ", text)
    text = _STYLE.sub(r" \1 ", text)
    return re.sub(r"(?<![0-9A-Za-z.])\s+|\s+(?![0-9A-Za-z.])", "", text.strip())


def _settle(candidate: str, gold: str) -> bool | None:
    """Equal or not by comparing strings and plain integers alone; None: needs algebra."""
    if len(candidate) > MAX_LONG_CHARS:
        return False
    left, right = _normalise(candidate), _normalise(gold)
    if left and left == right:
        return True
    if _INTEGER.fullmatch(left) and _INTEGER.fullmatch(right) and " " not in candidate + gold:
        return _canonical(left) == _canonical(right)
    return False if len(candidate) > MAX_ANSWER_CHARS else None


def _canonical(integer: str) -> str:
    """An integer's digits; not int(), which refuses more than 4,300 of them."""
    digits = integer.lstrip("+-").replace(",", "").lstrip("0") or "0"
    return "-" + digits if integer.startswith("-") and digits != "0" else digits


def _compare(candidates: list[str], tail: str, answer: str, gold: str) -> Verdict:
    """The verdict by algebra. Without candidates the response names no answer, and `tail`, its end, is searched."""
    try:
        reference = _read(gold, answer)
        if reference is None:
            return Verdict("invalid", "the gold answer cannot be read")
        if _explodes(reference[0]):
            return Verdict("invalid", "the gold answer is too large to evaluate")
        why = "another value"
        found = [_read(candidate, candidate) for candidate in candidates] if candidates else [_search(tail)]
        for value in found:
            if value is None:
                why = "the answer cannot be read" if candidates else "no answer found"
            elif _explodes(value[0]):
                why = "the answer is too large to evaluate"
            elif _equal(reference, value):
                return Verdict("correct")
        return Verdict("wrong", why)
    except MemoryError:
        return Verdict("invalid", "grader ran out of memory")
    except Exception as error:
        return Verdict("invalid", f"grader raised {type(error).__name__}: {str(error)[:200]}")


def prepare() -> None:
    """Loads what grading needs, so that no response's time limit pays for it. Grader processes call this at start."""
    _library().parse("$x$", parsing_timeout=None)


@functools.cache
def _library() -> ModuleType:
    # It warns, once per process, that its time limits are off; the pool is the limit.
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import math_verify

    return math_verify


def _parse(text: str) -> list[Any] | None:
    """math-verify's reading of `text` as [sympy object, its string] or [string]; None if it finds nothing."""
    if _nesting(text) > MAX_NESTING or _BIG_BINOMIAL.search(text):
        return None
    return _library().parse(text, parsing_timeout=None, raise_on_error=True) or None


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    return deepest


def _mixed(text: str) -> list[Any] | str | None:
    """The value of a mixed numeral (`4 4/9`, `4 4/9%`) that ends `text`; "" if it is malformed; None if there is none.

    math-verify would read its whole part alone, and call 4 4/9 equal to 4.
    """
    mixed = _MIXED.search(text)
    if mixed is None:
        return None
    whole, top, bottom = re.sub("[ ,]", "", mixed["whole"]), int(mixed["top"]), int(mixed["bottom"])
    if top >= bottom:
        return ""
    part = Fraction(top, bottom)
    value = int(whole) - part if whole.startswith("-") else int(whole) + part
    if mixed["percent"]:
        value /= 100
    import sympy

    return [sympy.Rational(value.numerator, value.denominator)]


def _read(text: str, original: str) -> list[Any] | None:
    """One answer as [sympy object, …] or [words]; None if it cannot be read. `original` still has its delimiters."""
    mixed = _mixed(text)
    if mixed is not None:
        return mixed if isinstance(mixed, list) else None
    one_line = re.sub(r"\\!\s*|^\\\$\s*", "", " ".join(text.split())).replace("\\%", "%")
    one_line = _PYTHON_POWER.sub(lambda power: f"^{{{power[1]}}}" if power[1] else "^", one_line)
    if _DELIMITED.search(one_line):  # formulas between words, or several
        attempts = [original, one_line]
    elif _NUMBER.fullmatch(one_line) or _PROSE.search(_STYLE.sub("", one_line)):
        attempts = [one_line, f"${one_line}$"]
    else:  # a formula only: what cannot be read as a whole must not be read as the last number in it
        attempts = [f"${one_line}$"]
    readings = [_parse(attempt) for attempt in attempts]
    for reading in readings:
        if reading is not None and not isinstance(reading[0], str):
            return reading
    words = _normalise(text)
    return [words] if _WORDS.fullmatch(words) else None


def _search(tail: str) -> list[Any] | None:
    """The last expression of a response that names no answer. A response that is nothing but one is read as one."""
    mixed = _mixed(tail)
    if mixed is not None:
        return mixed if isinstance(mixed, list) else None
    bare = tail.strip()
    formula = "\n" not in bare and not _DELIMITED.search(bare) and not _PROSE.search(_STYLE.sub("", bare))
    if formula and len(bare) <= MAX_ANSWER_CHARS and not _NUMBER.fullmatch(bare) and re.search(r"[\\^_=+*/()]", bare):
        return _read(bare, bare)
    return _parse(tail)


def _equal(gold: list[Any], found: list[Any]) -> bool:
    try:
        return bool(_library().verify(gold, found, timeout_seconds=None, raise_on_error=True))
    except ValueError as error:
        if "nan or zoo" in str(error):  # 4/0: a value that equals nothing
            return False
        raise


def _explodes(expression: Any) -> bool:
    """True if evaluating the expression would meet a number beyond MAX_DIGITS or a sum beyond MAX_TERMS."""
    if isinstance(expression, str):
        return False
    try:
        return not _digits(expression) <= MAX_DIGITS
    except RecursionError:
        return True


def _digits(node: Any) -> float:
    """An upper bound on log10 of the largest number that evaluating the tree meets; symbols count as one digit."""
    import sympy

    if isinstance(node, sympy.MatrixBase):
        return max((_digits(entry) for entry in node.flat()), default=0.0)
    if isinstance(node, sympy.Rational):
        return max(abs(node.p).bit_length(), node.q.bit_length()) * math.log10(2)
    if isinstance(node, sympy.Float):
        return max(float(sympy.log(abs(node), 10)), 0.0) if node.is_finite and node != 0 else 0.0
    if not getattr(node, "args", ()):
        return 1.0
    inner = [_digits(argument) for argument in node.args if isinstance(argument, sympy.Basic | sympy.MatrixBase)]
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
        terms = max((10 ** min(_digits(bound), 300.0) for limit in node.limits for bound in limit[1:]), default=1.0)
        if terms > MAX_TERMS:
            return math.inf
        return largest * (terms if isinstance(node, sympy.Product) else 1.0) + math.log10(terms + 1)
    return largest
