"""An answer's text cut into what stands in it: without its wrapping, at commas and signs, outside of brackets."""

from __future__ import annotations

import itertools
import re

from .spelling import closing

_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_AND = re.compile(
    r"(?:,? ?\\text\{ ?,? ?(?:and|or|und|et|oder|ou) ?\} ?|,? +(?:and|or) +|,?(?:和|或|以及)"
    r"|(?<=[)\]}])(?:and|or)(?=[(\[\\{]))"
)
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![a-z]) ?")


def bare(text: str) -> str:
    """Without the wrapping that carries no meaning: emphasis, quotes, math delimiters, the full stop of a sentence."""
    before = None
    text = text.strip()
    while text != before:
        before = text
        text = re.sub(r"^(?:\*\*)?([^*\n]+)\*\*(?= *(?:$|\([A-Za-z]))", r"\1", text)  # **5** (since …)
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


def thousands(text: str) -> str:
    """Without the commas that separate thousands in it, outside of brackets, where they list."""
    return _GROUPED.sub(lambda m: m[0].replace(",", "") if _outside(text, m.start()) else m[0], text)


def _outside(text: str, place: int) -> bool:
    return all(text.count(left, 0, place) == text.count(right, 0, place) for left, right in ("()", "[]", "{}"))


def named(parts: list[str]) -> list[str]:
    """n=2, 3, 4 → n=2, n=3, n=4"""
    head = re.match(r"([A-Za-z](?:_\{?\w+\}?)?) ?= ?", parts[0])
    if head is None or any(re.search(r"[=<>]|\\(?:le|ge|ne|in)(?![a-z])", part) for part in parts[1:]):
        return parts
    return [parts[0], *(f"{head[1]} = {part}" for part in parts[1:])]


def split(text: str) -> list[str]:
    """At commas, semicolons, `and`, `or` outside of all brackets; each \\pm is two of them."""
    return [each for part in _cut(text) for each in _signed(part)]


def _signed(text: str) -> list[str]:
    r"""1 \pm 2 → 1 + 2, 1 - 2; \mp is the other sign of the same \pm."""
    marks = _PLUS_MINUS.findall(text)
    if not marks or len(marks) > 2 or text.startswith("\\{"):
        return [text]
    one_choice = len(marks) == 2 and marks[0] != marks[1]
    signs = [("+", "-"), ("-", "+")] if one_choice else itertools.product("+-", repeat=len(marks))
    parts = _PLUS_MINUS.split(text)[::2]
    return ["".join(itertools.chain(*itertools.zip_longest(parts, choice, fillvalue=""))) for choice in signs]


def _cut(text: str) -> list[str]:
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


def matching(text: str) -> int:
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if depth == 0:
            return position
    return -1
