"""Prompts one after the other, as a run goes through them."""

from __future__ import annotations

from a3po_megatron.batch import Prompt
from a3po_megatron.data.prompts import Prompts


def take(prompts: Prompts, count: int) -> list[Prompt]:
    """The next `count` prompts."""
    first, prompts.position = prompts.position, prompts.position + count
    return [prompts.at(index) for index in range(first, first + count)]
