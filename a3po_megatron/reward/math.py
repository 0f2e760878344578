r"""Grades a mathematical response against its gold answer: correct, wrong or invalid.

    response → find (where its answer stands) → spell (one LaTeX spelling) → read (as a whole) → equal to the gold?

Pure and in-process: no signals, no threads, no time limit. What is cheap to recognise as explosive is refused before
sympy evaluates it; the real guard is the pool of killable processes, `pool.py`.

Fail closed: a response without an answer, cut off, unreadable, too deep or absurdly large is *wrong*, whatever grading
it met; *invalid* is kept for a gold answer that nobody can read. The rules are in docs/reward.md.

sympy and its LaTeX parser are imported at the first answer that needs them: most are settled by comparing strings.
"""

from __future__ import annotations

import functools
import re

from ..batch import Verdict
from ..errors import RequestError
from .find import Found, boxes, conclusion, find
from .forms import Choice, Value, Words
from .latex import MAX_NESTING, TooLarge, converter, nesting
from .spelling import spell
from .value import as_sentence, readings
from .words import MEANING

EXTRACTS = ("any", "boxed", "answer")
MAX_ANSWER_CHARS = 2000  # of one answer; the longest gold answer of MATH has 159
MAX_LONG_CHARS = 20_000  # of an answer that is compared as a string

_INTEGER = re.compile(r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)", re.ASCII)
_SQUARE_UNIT = re.compile(r"(\d) ?(?:mm?|cm|km|ft|in)(?:[²³]|\^\{?[23]\}?)$")  # in prose no letter is a variable
_MARKED = re.compile(r"\\(?:begin|end) ?\{[a-z]*\}|\\(?:text[a-z]*|mathrm|mbox) ?\{[^{}]*\}|\\[A-Za-z]+")
_PROSE = re.compile(r"[A-Za-z]{2,}[^A-Za-z]+[A-Za-z]{2,}")  # two words
_VERB = r"\b(?:is|are|equals|be)\b"
_WORDED = re.compile(r"[^\w\\]*[^\W\d_]{2,}(?=[\s:]|\d)")  # Hence $n = 7$.
_STATED = re.compile(rf"(?:(?!{_VERB}).)*{_VERB}:? +((?:(?!{_VERB}).)+)", re.DOTALL)  # of a sentence on an answer line
_LISTED = re.compile(r"\s*(?:[,;]?\s*(?:and|or|und|y|et|e|和|或)\b|[,;、])\s*")
_CLAUSE = re.compile(r"[,;:]|\b(?:is|are|was|equals)\b|['’]s\b", re.IGNORECASE)
_DENIED = re.compile(r"\b(?:not|cannot|never|unable|neither|sorry)\b|n['’]t\b", re.IGNORECASE)
_HARMLESS = {"is", "are", "to", "of", "by", "from", "each", "and", "percent", "up", "even", "pairs"}
_HASHES = re.compile(r"^[ \t]*####[ \t]*(\S.*)$", re.MULTILINE)
_SPAN = re.compile(
    r"\$\$(.+?)\$\$|(?<![\\$])\$([^$\n]+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]|`([^`\n]+)`|\*\*([^*\n]+)\*\*",
    re.DOTALL,
)
_EXPRESSION = re.compile(
    r"(?<![A-Za-z0-9_.])(?:[$€£¥]\s?)?[+\-−]?\s?(?:\d[\d,. ]*|[A-Za-z]\s?=|√|π)"
    r"(?:[\d.,+\-−*/^()=√π×÷·² ]|\\[a-z]+|\{[^{}]*\}|%|°|[A-Za-z](?![A-Za-z]))*",
)


def grade(response: str, answer: str, *, extract: str = "any", finished: bool = True) -> Verdict:
    r"""The verdict on `response`, whose gold answer is `answer`.

    extract: where the response's answer stands (find.py).
        boxed    the last complete \boxed{…}; boxes listed one after another are the list of their contents
        answer   the last line of the form `Answer: …`, or what stands in <answer>…</answer>
        any      the tag, the box, `#### …`, the answer line, else the end of the last sentence
    finished: False if the response was cut off: then only what it has named counts.

    Raises RequestError for another `extract`. Every other trouble is a verdict with its reason.
    """
    if extract not in EXTRACTS:
        raise RequestError(f"extract: {extract!r} is not one of {', '.join(EXTRACTS)}")
    gold = gold_text(answer)
    if not gold.strip("$*. "):
        return Verdict("invalid", "the gold answer is empty")
    place = find(response, extract, finished)
    if place.why:
        return Verdict("wrong", place.why)
    settled = [_settle(each, gold) for each in place.named]
    if True in settled:
        return Verdict("correct")
    if settled and all(each is False for each in settled):
        return Verdict("wrong", "another value")
    return _compare(place, gold)


def gold_text(answer: str) -> str:
    """The gold answer within what a data set holds: a box, several of them, the line behind ####."""
    run, _ = boxes(answer)
    if run:
        return ", ".join(run).strip()
    hashes = _HASHES.findall(answer)
    return (hashes[-1] if hashes else answer).strip()


def _settle(candidate: str, gold: str) -> bool | None:
    """Equal or not by comparing strings and plain integers alone; None: it must be read."""
    if len(candidate) > MAX_LONG_CHARS:
        return False
    left, right = candidate.strip().strip("$*. "), gold.strip("$*. ")
    if left == right:
        return True
    if _INTEGER.fullmatch(left) and _INTEGER.fullmatch(right) and "," not in right:
        return _canonical(left) == _canonical(right)
    if _readable(left) and _readable(right) and spell(left) == _spelled_gold(right):
        return True
    return False if len(candidate) > MAX_ANSWER_CHARS else None


@functools.lru_cache(maxsize=4096)
def _spelled_gold(gold: str) -> str:
    """Many responses are held against one gold answer."""
    return spell(gold)


def _readable(text: str) -> bool:
    return len(text) <= MAX_ANSWER_CHARS and nesting(text) <= MAX_NESTING


def _canonical(integer: str) -> str:
    """An integer's digits; not int(), which refuses more than 4,300 of them."""
    digits = integer.lstrip("+-").replace(",", "").lstrip("0") or "0"
    return "-" + digits if integer.startswith("-") and digits != "0" else digits


def read_gold(gold: str) -> list[Value] | str:
    """What a gold answer may mean; none: it is too large to evaluate; a text: why nobody can read it."""
    if len(gold) > MAX_ANSWER_CHARS:
        return f"the gold answer has more than {MAX_ANSWER_CHARS} characters"
    return _read_gold(gold)


@functools.lru_cache(maxsize=4096)
def _read_gold(gold: str) -> list[Value] | str:
    try:
        return readings(gold) or as_sentence(gold) or "the gold answer cannot be read"
    except (TooLarge, RecursionError):
        return []
    except Exception as error:  # of sympy
        return f"the gold answer cannot be read: {type(error).__name__}: {str(error)[:200]}"


def _compare(found: Found, gold: str) -> Verdict:
    wanted = read_gold(gold)
    if isinstance(wanted, str):
        return Verdict("invalid", wanted)
    if not wanted:
        return Verdict("wrong", "the gold answer is too large to evaluate, and this one is spelled otherwise")
    from .equal import equal

    why = "no answer found" if not found.named else "the answer cannot be read"
    for text in answers_of(found):
        try:
            read = readings(text)
            if not read and (stated := _STATED.fullmatch(text)) and found.prose:
                read = readings(stated[1])
            if not read and found.named:
                read = as_sentence(text)
            letters = [{each.letter for each in side if isinstance(each, Choice)} for side in (wanted, read)]
            if all(letters) and letters[0] != letters[1]:
                return Verdict("wrong", "another choice")
            if any(equal(g, r) for g in wanted for r in read):
                return Verdict("correct")
            if read:
                why = "another value"
                if not found.named and not isinstance(read[0], Words):
                    break
        except TooLarge:
            why = "the answer is too large to evaluate"
        except MemoryError:
            why = "the answer takes too much memory"
        except RecursionError:
            why = "the answer is nested too deeply"
        except Exception as error:  # of sympy, for something that only a response holds
            why = f"the answer cannot be compared: {type(error).__name__}: {str(error)[:200]}"
    return Verdict("wrong", why)


def answers_of(found: Found) -> list[str]:
    """The texts that may be a response's answer, in the order in which they count."""
    return found.named or _ends(found.tail)


def _ends(tail: str) -> list[str]:
    """What the end of a response may call its answer: what a sentence says it is, else its last expression."""
    if stated := conclusion(tail):
        return [stated, *_last_expression(stated)]
    bare = tail.strip()
    if "\n" not in bare and len(bare) <= MAX_ANSWER_CHARS and not _PROSE.search(_MARKED.sub(" ", bare)):
        return [bare, *(_last_expression(bare) if _WORDED.match(bare) else [])]
    lines = [line for line in bare.splitlines() if line.strip()]
    return _last_expression(lines[-1]) if lines else []


def _last_expression(line: str) -> list[str]:
    """The last formula or number of a sentence, with those listed before it; none if the sentence denies it."""
    spans = [(span.start(), span.end(), next(filter(None, span.groups()))) for span in _SPAN.finditer(line)]
    inside = [range(start, end) for start, end, _ in spans]
    plain = [
        (each.start(), each.end(), _SQUARE_UNIT.sub(r"\1", each.group().strip(" ,.")))
        for each in _EXPRESSION.finditer(line)
        if not any(each.start() in span for span in inside)
    ]
    marks = sorted(spans + plain)
    if not marks:
        return []
    listed = [marks.pop()]
    while marks and _LISTED.fullmatch(line[marks[-1][1] : listed[0][0]]):
        listed.insert(0, marks.pop())
    begin, end = listed[0][0], listed[-1][1]
    clause = max((each.end() for each in _CLAUSE.finditer(line, 0, begin)), default=0)
    around = {*line[:begin].lower().split()[-1:], *re.split(r"[^\w-]+", line[end:].lower().lstrip())[:1]}
    if _DENIED.search(line, clause) or around & MEANING - _HARMLESS:
        return []
    if len(listed) > 1:
        return [", ".join(text for _, _, text in listed)]
    text = listed[0][2]
    return [text if listed[0] in spans else text.rpartition("=")[2].strip() or text]


def prepare() -> None:
    """Loads what grading needs, so that no response's time limit pays for it. Grader processes call this at start."""
    converter()
    readings("\\frac{1}{2}")
