"""The run's endless, seeded order of prompts, the same on every rank.

A JSONL file is checked whole before anything starts: every row an object with a problem and an answer, no problem and
no id twice. Each epoch has its own order, drawn by hash from (seed, epoch, row): position n of the order is the same
whatever happened before, so that the only state is the position.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..batch import Prompt
from ..config import ARITHMETIC, DataOptions
from ..errors import RequestError
from . import arithmetic
from .kinds import what_else
from .order import named_order
from .tokens import Tokens

# Names that public data sets have for the fields.
SYNONYMS = {
    "problem": ("question", "prompt", "query", "input", "instruction", "text"),
    "answer": ("final_answer", "solution", "ground_truth", "gold", "target", "label", "output", "response"),
}


class Prompts:
    def __init__(self, options: DataOptions, tokens: Tokens, seed: int, max_tokens: int) -> None:
        self._options, self._tokens, self._seed, self._limit = options, tokens, seed, max_tokens
        self._rows = None if options.path == ARITHMETIC else self._fitting(read_rows(options))
        if self._rows is None and (length := len(tokens.encode(arithmetic.LONGEST))) > max_tokens:
            raise RequestError(
                f"{ARITHMETIC}: its longest prompt has {length} tokens, rollout.max_prompt_tokens is {max_tokens}"
            )
        # In which of the task's ways a response answers; None: the task names none. Recorded, never rewarded.
        self.way_of: Callable[[str], str] | None = arithmetic.way_of if self._rows is None else None
        self._orders: dict[int, list[int]] = {}
        self.position = 0

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        taken = [self.at(self.position + offset) for offset in range(count)]
        self.position += count
        return taken

    def at(self, index: int) -> Prompt:
        """The prompt at a position of the endless order."""
        if self._rows is None:
            text, answer = arithmetic.problem(index, self._seed)
            return Prompt(f"arithmetic/{index}", text, answer, self._tokens.encode(text), index)
        epoch, place = divmod(index, len(self._rows))
        if epoch not in self._orders:  # a step may reach into the next epoch; older ones are done with
            self._orders = {known: order for known, order in self._orders.items() if known >= epoch - 1}
            self._orders[epoch] = (
                named_order(len(self._rows), self._seed, epoch)
                if self._options.shuffle
                else list(range(len(self._rows)))
            )
        name, problem, answer = self._rows[self._orders[epoch][place]]
        # The id names the draw of a rollout's seed: the same problem in a later epoch is another draw.
        return Prompt(f"{name}@{epoch}" if epoch else name, problem, answer, self._tokens.encode(problem), index)

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def _fitting(self, rows: list[tuple[str, str, str, int]]) -> list[tuple[str, str, str]]:
        kept = []
        for name, problem, answer, line in rows:
            length = len(self._tokens.encode(problem))
            if length == 0:
                raise RequestError(f"{self._options.path}:{line}: the tokenizer makes no token at all of the problem")
            if length <= self._limit:
                kept.append((name, problem, answer))
            elif not self._options.drop_long_prompts:
                raise RequestError(
                    f"{self._options.path}:{line}: the prompt has {length} tokens, rollout.max_prompt_tokens is "
                    f"{self._limit}: raise it, or set data.drop_long_prompts: true"
                )
        if not kept:
            raise RequestError(f"{self._options.path}: no prompt is left within rollout.max_prompt_tokens")
        return kept


def read_rows(options: DataOptions) -> list[tuple[str, str, str, int]]:
    """(id, problem, answer, line) of every row. Raises RequestError with file and line for the first bad one."""
    path = Path(options.path)
    rows: list[tuple[str, str, str, int]] = []
    seen: dict[tuple[str, str], int] = {}
    twice: list[str] = []
    try:
        for line, row in _parsed(path):
            where = f"{path}:{line}"
            try:
                problem = _text(row, "problem", options.problem_field, where)
                answer = _text(row, "answer", options.answer_field, where)
            except RequestError as error:
                raise (error if rows else _of_another_kind(path, error)) from error
            given = row.get(options.id_field)
            name = f"{path.name}/{line}" if given in (None, "") else str(given)
            for kind, value in (("problem", problem.strip()), ("id", name)):
                if (kind, value) in seen:
                    twice.append(f"{where}: the {kind} stands in line {seen[kind, value]} already: {value[:80]!r}")
                seen.setdefault((kind, value), line)
            rows.append((name, problem, answer, line))
    except RequestError:
        if not twice:  # the first thing that is wrong is named
            raise
    if twice:
        more = f" (and {len(twice) - 1} more like it)" if len(twice) > 1 else ""
        raise RequestError(f"{twice[0]}{more}: remove all but one, since a run keeps them apart by it")
    if not rows:
        raise RequestError(f"{path}: the file holds no prompts")
    return rows


def _of_another_kind(path: Path, error: RequestError) -> RequestError:
    """What is wrong with the first row, unless the whole file is something else than rows."""
    try:
        kind = what_else(path)
    except OSError:
        kind = None
    return error if kind is None else RequestError(f"{path}: this {kind}")


def _parsed(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        cannot = RequestError(f"{path}: cannot read the prompts: {error.strerror}")
        raise _of_another_kind(path, cannot) from error
    good = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, _row(line, f"{path}:{number}", first=number == 1)
        except RequestError as error:
            raise (error if good else _of_another_kind(path, error)) from error
        good += 1


def _row(line: bytes, where: str, first: bool) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")
        row = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise RequestError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from error
    except ValueError as error:
        raise RequestError(f"{where}: not valid JSON: {error}") from error
    except RecursionError as error:
        raise RequestError(f"{where}: nested too deeply") from error
    if not isinstance(row, dict):
        raise RequestError(f"{where}: expected an object with a problem and an answer")
    return row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose fields stand once: JSON itself would keep the last of two silently."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"a field of {sorted(row)} stands twice")
    return row


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _text(row: dict[str, Any], role: str, field: str, where: str) -> str:
    if field not in row:
        names = ", ".join(repr(name) for name in list(row)[:12]) or "no field"
        meant = next((name for name in SYNONYMS[role] if name in row), None)
        hint = f": set data.{role}_field: {meant}" if meant else f"; data.{role}_field says which holds the {role}"
        raise RequestError(f"{where}: the field {field!r} is missing; the row has {names}{hint}")
    value = row.get(field)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        shown = json.dumps(value, ensure_ascii=False)
        shown = shown if len(shown) <= 80 else f"{shown[:80]}…"
        raise RequestError(f"{where}: the field {field!r} is empty or no text: it holds {shown}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise RequestError(f"{where}: the field {field!r} holds half a surrogate pair, which is no character")
    return value
