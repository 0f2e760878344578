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

from blake3 import blake3

from ..files.cache import Cache, name_of
from ..reward.math import gold_text, read_gold

_NUMBER = re.compile(r"[+-]?\d{1,300}(?:\.\d{1,300})?", re.ASCII)
EMPTY = "the gold answer is empty"


def unreadable(golds: Iterable[str], cache: Cache) -> dict[str, str]:
    """Gold answer → why the grader cannot read it, of those that it cannot."""
    texts = {gold: gold_text(gold) for gold in golds}
    asked = {text for text in texts.values() if not _NUMBER.fullmatch(text)}
    name = f"golds-{name_of(_grader())}.json"
    known: dict[str, str] = {}
    if asked and (kept := cache.find(name)) is not None:
        known = json.loads(kept.read_bytes())
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
