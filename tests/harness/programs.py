"""Programs for sandboxes, written as they are and not within quotes: `### NAME | WORDS`, then the text."""

from __future__ import annotations

import re
from pathlib import Path


def programs(file: str) -> dict[str, tuple[str, str]]:
    """Returns name → (text, words) of a file of this folder."""
    parts = re.split(r"^### (.*?) \|(.*)\n", Path(__file__).with_name(file).read_text(), flags=re.MULTILINE)[1:]
    return {name: (text, words.strip()) for name, words, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True)}
