"""What an answer may be, once it was read whole (value.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .formula import Formula


@dataclass(frozen=True)
class Items:
    kind: str  # list, set, tuple
    items: tuple[Any, ...]
    brackets: str = ""  # of a tuple, as written: "()", "[]", "(]", "[)"


@dataclass(frozen=True)
class Region:
    region: Any  # sympy set


@dataclass(frozen=True)
class Relation:
    sign: str  # = < <= > >= != in
    left: Any
    right: Any


@dataclass(frozen=True)
class Grid:
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Choice:
    letter: str
    rest: str


@dataclass(frozen=True)
class Words:
    text: str


Value = Formula | Items | Region | Relation | Grid | Choice | Words
