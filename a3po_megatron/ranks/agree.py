"""What the decisions of all ranks are made with: operations for `Ranks.agree`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def same(values: list[Any]) -> Any:
    """An operation for `agree`: the value that all ranks gave; ValueError if they differ."""
    for rank, value in enumerate(values):
        if value != values[0]:
            raise ValueError(f"{values[0]!r} on rank 0, {value!r} on rank {rank}")
    return values[0]


def first(reasons: list[str | None]) -> str | None:
    """An operation for `agree`: what the first rank says that says anything."""
    return next((reason for reason in reasons if reason), None)


def sum_lists(values: list[list[Any]]) -> list[Any]:
    """An operation for `agree`: all ranks' lists, one after the other."""
    return [item for value in values for item in value]


def decide(tag: str, given: list[tuple[str, Any]], op: Callable[[list[Any]], Any]) -> dict[str, Any]:
    """What rank 0 answers to all, from every rank's tag and value: {"value": …}, or {"error": why there is none}."""
    for rank, (other, _) in enumerate(given):
        if other != tag:
            return {"error": f"the ranks have lost step: rank 0 is at '{tag}', rank {rank} at '{other}'"}
    try:
        return {"value": op([value for _, value in given])}
    except Exception as error:  # whatever it is: the other ranks wait for an answer
        return {"error": f"the ranks cannot agree at '{tag}': {error}"}
