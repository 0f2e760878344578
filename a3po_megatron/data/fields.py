"""Takes a problem, its gold answer and its id out of a row.

A field is a path: `answer`, `reward_model.ground_truth`, `prompt[0].content`, `turns[-1]`. A field of exactly that name
goes first. Where no option names them, the fields are those of the first known layout that the first row has.
"""

from __future__ import annotations

import decimal
import functools
import json
import math
import re
from typing import Any, NamedTuple

from ..batch import Gold
from ..errors import RequestError

# What public data sets call problem and answer, in the order in which they are looked for.
LAYOUTS = (
    ("problem", "answer"),  # and AIME, Big-Math
    ("problem", "solution"),  # MATH: the gold answer stands in the box
    ("question", "answer"),  # GSM8K (behind ####), AMC
    ("question", "final_answer"),  # OlympiadBench: a list
    ("prompt", "reward_model.ground_truth"),  # verl: DAPO-Math-17k
)
SYNONYMS = {
    "problem": ("question", "prompt", "query", "input", "instruction", "text"),
    "answer": ("final_answer", "solution", "ground_truth", "gold", "target", "label", "output", "response"),
}
ROLES = ("system", "user", "assistant", "tool", "developer")

_STEP = re.compile(r"\[(-?\d+)\]|(?:^|\.)([^.\[\]]+)")
MISSING = object()


class Turn(NamedTuple):
    role: str
    content: str


Problem = str | tuple[Turn, ...]  # one turn of a user, or a conversation


class Fields(NamedTuple):
    """Which fields of a row are read."""

    problem: str
    answer: str
    id: str

    def columns(self) -> list[str]:
        """Of a table: those that can hold them."""
        return [name for path in self for name in dict.fromkeys((path, str(steps(path)[0])))]


@functools.cache
def steps(path: str) -> tuple[str | int, ...]:
    """The names and numbers of a path. Raises RequestError for what is none."""
    parts: list[str | int] = []
    end = 0
    for match in _STEP.finditer(path):
        if match.start() != end:
            break
        parts.append(int(match[1]) if match[1] else match[2])
        end = match.end()
    if not parts or end < len(path) or isinstance(parts[0], int):
        raise RequestError(
            f"{path!r} is no path of a field, such as answer, reward_model.ground_truth, prompt[0].content"
        )
    return tuple(parts)


def value_at(row: dict[str, Any], path: str) -> Any:
    """What stands there; `MISSING` where nothing does."""
    if path in row:
        return row[path]
    value: Any = row
    for step in steps(path):
        inside = step in value if isinstance(value, dict) else isinstance(value, list) and isinstance(step, int)
        if not inside or (isinstance(value, list) and not -len(value) <= int(step) < len(value)):
            return MISSING
        value = value[step]
    return value


def fields_of(row: dict[str, Any], problem: str, answer: str, id: str) -> Fields:
    """The fields to read: as options name them (empty: they do not), else as a known layout that the row has; ours
    where it has none."""
    for known_problem, known_answer in LAYOUTS:
        pair = problem or known_problem, answer or known_answer
        if all(value_at(row, path) is not MISSING for path in pair):
            return Fields(*pair, id)
    one = next((known for known, _ in LAYOUTS if value_at(row, known) is not MISSING), LAYOUTS[0][0])
    return Fields(problem or one, answer or LAYOUTS[0][1], id)


def _plain(row: dict[str, Any], field: str) -> str | None:
    """A field's text, where nothing about it needs a closer look, as in nearly every row; None: it does."""
    value = row.get(field)
    return value if isinstance(value, str) and value and value.isascii() and not value.isspace() else None


def problem_of(row: dict[str, Any], field: str) -> Problem:
    """Raises RequestError with the field, and without the row's place, which who reads rows knows."""
    if (text := _plain(row, field)) is not None:
        return text
    value = _present(row, "problem", field)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        turns = tuple(_turn(each, field, number) for number, each in enumerate(value))
        if turns[-1].role not in ("user", "tool"):
            raise RequestError(
                f"the field {field!r} ends with a turn of the {turns[-1].role}: a prompt ends with a user's"
            )
        if any(turn.role == "system" for turn in turns[1:]):
            raise RequestError(f"the field {field!r} has a system message that is not the first")
        return turns[0].content if len(turns) == 1 and turns[0].role == "user" else turns
    return _text(value, field)


def _turn(value: Any, field: str, number: int) -> Turn:
    where = _named(field, number)
    if not isinstance(value, dict) or not {"role", "content"} <= value.keys():
        raise RequestError(f"{where} is no message: expected role and content, it holds {_shown(value)}")
    content = value["content"]
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        if other := [part for part in content if part.get("type", "text") != "text"]:
            raise RequestError(f"{where} holds something else than text: {_shown(other[0])}")
        content = "".join(part["text"] for part in content)
    if value["role"] not in ROLES:
        raise RequestError(f"{where} has the role {_shown(value['role'])}: expected one of {', '.join(ROLES)}")
    return Turn(value["role"], _text(content, field, number))


def answer_of(row: dict[str, Any], field: str) -> Gold:
    """Raises as problem_of does."""
    if (text := _plain(row, field)) is not None:
        return text
    value = _present(row, "answer", field)
    if isinstance(value, list) and value:
        golds = tuple(dict.fromkeys(_text(each, field) for each in value))
        return golds[0] if len(golds) == 1 else golds
    return _text(value, field)


def id_of(row: dict[str, Any], field: str) -> str | None:
    value = value_at(row, field)
    return None if value is MISSING or value in (None, "") else str(value)


def _present(row: dict[str, Any], role: str, field: str) -> Any:
    value = value_at(row, field)
    if value is MISSING:
        names = ", ".join(repr(name) for name in list(row)[:12]) or "no field"
        top = steps(field)[0]
        inside = f" ({top!r} holds {_shown(row[top])})" if top in row and top != field else ""
        meant = next((name for name in SYNONYMS[role] if name in row and name != top), None)
        hint = f": set data.{role}_field: {meant}" if meant else f"; data.{role}_field says which holds the {role}"
        raise RequestError(f"the field {field!r} is missing; the row has {names}{inside}{hint}")
    return value


def _spelled(value: Any) -> Any:
    """A number as text; everything else as it is."""
    finite = isinstance(value, int | decimal.Decimal) or (isinstance(value, float) and math.isfinite(value))
    return str(value) if finite and not isinstance(value, bool) else value


def _text(value: Any, field: str, turn: int | None = None) -> str:
    text = value if isinstance(value, str) else _spelled(value)
    if not isinstance(text, str) or not text.strip():
        raise RequestError(f"{_named(field, turn)} is empty or no text: it holds {_shown(value)}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            what = "half a surrogate pair, which is no character"
            raise RequestError(f"{_named(field, turn)} holds {what}") from error
    return text


def _named(field: str, turn: int | None) -> str:
    return f"the field {field!r}" if turn is None else f"turn {turn} of the field {field!r}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else f"{text[:80]}…"
