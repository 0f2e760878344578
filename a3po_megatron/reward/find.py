r"""Where the answer stands in a response: the texts that may be it, in the order in which they count.

thoughts     what stands before `</think>`, or behind a `<think>` that never closes, is never the answer
<answer>     the last complete one; a box within it goes first
\boxed{…}    the last complete one; boxes listed one after another are the list of their contents
#### 42      the last such line
Answer: …    the last labelled line, in a dozen languages; the value may stand below its label
… is 42.     the end of the last sentence: only where nothing above is there, and the response was not cut off
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

MAX_LINE_CHARS = 20_000
MAX_LABELLED_CHARS = 200_000  # of the end of a response, in which a labelled line is sought
MAX_TAIL_CHARS = 4000  # the end of a response that names no answer

_BRACE = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?:(?P<token>[A-Za-z0-9])(?![A-Za-z0-9.,])|$)")
_BETWEEN_BOXES = re.compile(
    r"(?:\s|[$.;,]|\\[\[\]();,!: ]|\\q?quad|\band\b|\bor\b|\\text\s*\{\s*(?:and|or)\s*\})*", re.IGNORECASE
)
_LISTING = re.compile(r"[,;]|\band\b|\bor\b", re.IGNORECASE)
_THOUGHT_ENDS = re.compile(r"</(?:think|thinking|thought|reasoning)>|<\|end_of_thought\|>", re.IGNORECASE)
_THOUGHT_BEGINS = re.compile(r"<(?:think|thinking|thought|reasoning)>|<\|begin_of_thought\|>", re.IGNORECASE)
_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.IGNORECASE | re.DOTALL)
_SPECIAL = re.compile(r"<\|[A-Za-z_]{1,40}\|>|<(?:eos|bos|end_of_turn|pad)>|</s>|<｜[^｜>]{1,40}｜>")
_HASHES = re.compile(r"^[ \t]{0,8}####[ \t]{0,8}(\S.*)$", re.MULTILINE)
_LABELS = "|".join(
    (
        r"(?:the |my )?(?:final |correct |last )?answer",
        r"(?:the )?(?:correct|right) (?:option|choice)",
        *("正确选项", "最终答案", "答案", "最終答案", "答え", "最终结果", "结果", "解答", "回答", "答", "정답", "답"),
        r"(?:la )?(?:réponse|reponse)(?: finale)?",
        r"(?:la )?respuesta(?: final| correcta)?",
        r"(?:die )?(?:endgültige |richtige )?antwort",
        r"(?:la )?risposta(?: finale)?",
        r"(?:a )?resposta(?: final)?",
        r"(?:окончательный |правильный )?ответ",
        *("(?:het )?antwoord", "svar", "odpowiedź", "cevap", "đáp án", "उत्तर", "الجواب", "الإجابة"),
    )
)
# Bounded runs of marks in front: emphasis, headings, bullets, an emoji.
_LINE = re.compile(
    rf"^(?P<marks>[^\w\n\\$(\[{{]{{0,24}})(?:{_LABELS})"
    r"(?P<after>[ \t*_`]{0,6}(?:[:：=][ \t*_`]{0,6}|\s*$|(?=[ \t]*(?:\$|\\[(\[]))))(?P<value>.*)$",
    re.IGNORECASE | re.MULTILINE,
)
_IS = re.compile(
    rf"(?:{_LABELS})[ \t*_]{{0,4}}(?:(?:is|are|est|es|ist|è|é)(?!\w)|是|为|為|は|(?=[:：=]))[ \t]*[:：=]?[ \t]*",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?。！？]+(?=\s|$)|[。！？]")


@dataclass(frozen=True)
class Found:
    named: list[str] = field(default_factory=list)  # texts that the response calls its answer, whole
    tail: str = ""  # else the end of the response, in which the last expression may be it
    prose: bool = False  # a named one may be a sentence
    why: str = ""  # there is none: the reason


def find(response: str, extract: str, finished: bool) -> Found:
    """What may be the answer of `response` by the rules of `extract` (boxed, answer, any)."""
    text, why = without_thoughts(_SPECIAL.sub(" ", response))
    if why:
        return Found(why=why)
    if extract in ("any", "answer") and (tags := _TAG.findall(text)):
        inside = tags[-1].strip()
        run, _ = boxes(inside)
        if run:
            return Found(_listed(run))
        return Found([inside], prose=True) if inside else Found(why="the answer is empty")
    if extract != "answer":
        run, cut_off = boxes(text)
        if run:
            return Found(_listed(run)) if any(part.strip() for part in run) else Found(why="the answer is empty")
        if cut_off:
            return Found(why="cut off inside \\boxed{")
    if extract == "boxed":
        return Found(why="no \\boxed{…} found")
    if extract == "any" and (hashes := _HASHES.findall(text)):
        return Found([hashes[-1].strip()])
    line = _labelled(text[-MAX_LABELLED_CHARS:], finished)
    if line is not None:
        return Found([line], prose=True) if line else Found(why="the answer is empty")
    if extract == "answer":
        return Found(why="no line `Answer: …` found")
    if not finished:
        return Found(why="cut off before it named an answer")
    return Found(tail=text[-MAX_TAIL_CHARS:])


def without_thoughts(text: str) -> tuple[str, str]:
    """Returns what is no thought, and why there is nothing: empty, or there is something."""
    ends = list(_THOUGHT_ENDS.finditer(text))
    text = text[ends[-1].end() :] if ends else text
    begun = list(_THOUGHT_BEGINS.finditer(text))
    if begun:
        text = text[: begun[0].start()]
        if not text.strip():
            return "", "cut off in its thoughts"
    if ends and not text.strip():
        return "", "nothing behind its thoughts"
    return text, ""


def _listed(run: list[str]) -> list[str]:
    return [", ".join(run)] if len(run) > 1 and len(set(map(str.strip, run))) > 1 else run[-1:]


def boxes(text: str) -> tuple[list[str], bool]:
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
    if not spans:
        bare = [match["token"] for match in _BARE_BOX.finditer(text) if match["token"]]
        return bare[-1:], any(is_box for is_box, _, _ in stack)
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


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    last = None
    for each in pattern.finditer(text):
        last = each
    return last


def _labelled(text: str, finished: bool) -> str | None:
    """The text of the last labelled line; of the next line with anything on it where the label stands alone."""
    last = _last(_LINE, text)
    if last is None:
        return None
    value = last["value"].strip()
    if value.startswith(("$$", "\\[")) and len(value) < 4:  # a formula over several lines
        value = _display(text[last.start("value") :].strip())
    if value.strip("*_` \t#"):
        if not finished and last.end() == len(text):
            return None  # the line was cut off: Answer: 12 of Answer: 123
        return value[: MAX_LINE_CHARS + 1]
    below = text[last.end() :].strip()
    if "=" in last["after"] or not below:
        return ""
    if below.startswith(("$$", "\\[")):
        return _display(below)
    return below.partition("\n")[0].strip("*_` \t")[: MAX_LINE_CHARS + 1]


def _display(text: str) -> str:
    """A formula that begins a text, to its end."""
    close = text.find("$$" if text.startswith("$$") else "\\]", 2)
    return text[: close + 2] if close > 0 else text[: MAX_LINE_CHARS + 1]


def conclusion(text: str) -> str | None:
    """What a sentence states at its end: `… the answer is 42.` → 42; None where it does not say `answer`."""
    last = _last(_IS, text)
    if last is None:
        return None
    rest = text[last.end() :].partition("\n\n")[0].strip()
    end = _sentence_end(rest)
    return rest[:end].strip() or None


def _sentence_end(text: str) -> int:
    """Where its first sentence ends, outside of formulas."""
    depth = 0
    formulas = text.count("$") % 2 == 0  # else it is a currency
    for position, character in enumerate(text):
        if character == "$" and formulas:
            depth ^= 1
        elif depth == 0 and (match := _SENTENCE_END.match(text, position)):
            return match.start()
    return len(text)
