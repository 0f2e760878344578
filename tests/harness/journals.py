"""Journals of ranks that are alone: they read what is there themselves, and write at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from a3po_megatron.files.writer import AtOnce
from a3po_megatron.run.found import find
from a3po_megatron.run.journal import Journal


class Alone:
    """The one rank of a world."""

    rank, world = 0, 1

    def agree(self, tag: str, value: Any, op: Callable[[list[Any]], Any]) -> Any:
        return op([value])


def journal_of(folder: Path, rank: int, run: str, any_weights: bool = False) -> Journal:
    """What rank `rank` of a run has, that finds whatever any rank left."""
    return Journal(folder, rank, run, find(folder, Alone(), 0), AtOnce(), any_weights)
