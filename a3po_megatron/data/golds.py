"""Which gold answers nobody can read: found when data is loaded, each distinct one once.

Integers and plain decimals are readable without asking. A formula takes milliseconds, so that what was found is kept,
by the answer's text and by the grader's own source.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from ..files.cache import Cache, name_of
from ..reward.grader import why_unreadable
from ..reward.math import gold_text, read_gold
from .load import Loaded
from .table import Row

_NUMBER = re.compile(r"[+-]?\d{1,300}(?:\.\d{1,300})?", re.ASCII)
EMPTY = "the gold answer is empty"


class Unreadable(NamedTuple):
    """A row whose gold answer its grader cannot read."""

    number: int
    row: Row
    gold: str
    why: str


def unreadable_rows(data: Loaded, grader: str, cache: Cache) -> list[Unreadable]:
    """All such rows; `grader` is that of rows which name none."""
    bad = {name: unreadable(data.golds(name), cache, name or grader) for name in data.graders()}
    if not any(bad.values()):
        return []
    rows = []
    for number, row in enumerate(data.rows):
        golds = (row.gold,) if isinstance(row.gold, str) else row.gold
        if (gold := next((each for each in golds if each in bad[row.grader]), None)) is not None:
            rows.append(Unreadable(number, row, gold, bad[row.grader][gold]))
    return rows


def unreadable(golds: Iterable[str], cache: Cache, grader: str = "math") -> dict[str, str]:
    """Gold answer → why the grader cannot read it, of those that it cannot."""
    if grader != "math":
        reasons = {gold: why_unreadable(grader, gold) for gold in golds}
        return {gold: why for gold, why in reasons.items() if why}
    texts = {gold: gold_text(gold) for gold in golds}
    asked = {text for text in texts.values() if not _NUMBER.fullmatch(text)}
    name = f"golds-{name_of(_grader())}.json"
    known: dict[str, str] = {}
    if asked and (cached := cache.find(name)) is not None:
        known = json.loads(cached.read_bytes())
    if new := sorted(asked - known.keys()):
        known |= {text: _why(text) for text in new}
        cache.put(name, lambda file: file.write(json.dumps(known).encode()))
    return {gold: known[text] for gold, text in texts.items() if known.get(text)}


def _why(text: str) -> str:
    if not text.strip("$*. "):
        return EMPTY
    read = read_gold(text)
    return read if isinstance(read, str) else ""


@functools.cache
def _grader() -> str:
    """A digest of what reads gold answers."""
    digest = blake3()
    for path in sorted((Path(__file__).parents[1] / "reward").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
