r"""Reads one row of a benchmark's file: what the prompt says of it, and what its grader gets as the gold answer.

    row → Item(parts of the prompt, gold)        None: the row is none of the benchmark's, such as another split's

A gold answer is a text, or several of which any is right. Of code it is JSON text:

    {"kind": "asserts", "tests": […], "setup": "", "setup_after": ""}      MBPP
    {"kind": "check", "prompt": …, "test": …, "entry_point": …}            HumanEval
    {"kind": "calls", "function": …, "cases": [{"input", "output"}, …]}    LiveCodeBench, with starter code
    {"kind": "stdin", "cases": [{"input", "output"}, …]}                   LiveCodeBench

and of a number with a tolerance {"value": its text, "tolerance": a number}. Every function raises RequestError with the
field, and without the row's place, which who reads rows knows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..batch import Gold
from ..data.fields import MISSING, answer_of, problem_of, value_at
from ..data.order import named_order
from ..errors import RequestError
from ..reward.find import boxes
from ..reward.math import gold_text

Row = dict[str, Any]
Layout = tuple[str, ...]  # fields: the problem's, then whatever its reading needs
ID_FIELDS = ("id", "unique_id", "task_id", "question_id", "Record ID")
MBPP_TEST = range(11, 511)  # task ids (the README of google-research/mbpp)
# Their set-up code makes trees of Node, a class that the solution itself defines (google-research/mbpp, mbpp.jsonl).
MBPP_SET_UP_AFTER = (367, 927)


class About(NamedTuple):
    """What a reading may depend on beside the row."""

    id: str
    seed: int
    window: str


class Item(NamedTuple):
    """What a row says: the parts that the prompt names, and the gold answer."""

    parts: Mapping[str, str]
    gold: Gold
    grader: str = ""  # of this row, where it is another than the benchmark's


def layout_of(row: Row, layouts: tuple[Layout, ...]) -> Layout:
    """Returns the first layout whose fields the row has all."""
    for layout in layouts:
        if all(value_at(row, field) is not MISSING for field in layout):
            return layout
    wanted = "; or ".join(" + ".join(layout) for layout in layouts)
    names = ", ".join(repr(name) for name in list(row)[:12]) or "no field"
    raise RequestError(f"expected the fields {wanted}; the row has {names}")


def one_answer(row: Row, layout: Layout, about: About) -> Item:
    """Reads a problem with an answer, without what stands around it: of a solution its last box, else the line behind
    #### (GSM8K). Several answers in a list are alternatives."""
    problem, answer = layout
    return Item({"problem": text_of(row, problem)}, _gold(row, answer))


def olympiad(row: Row, layout: Layout, about: About) -> Item:
    """Reads a row of OlympiadBench: a list of final answers, a unit, and of some numbers the error that is allowed.

    Where the row says that it has several answers, all of them belong to the gold. A response may give the unit or not.
    """
    problem, answer = layout
    gold = _gold(row, answer)
    several = str(row.get("is_multiple_answer")).lower() == "true"  # a table in text has it as a word
    if not isinstance(gold, str) and several:
        gold = ", ".join(gold)
    unit = str(row.get("unit") or "").replace("$", "").strip()
    error = str(row.get("error") or "").strip()
    parts = {"problem": text_of(row, problem)}
    if not isinstance(gold, str):
        return Item(parts, gold)
    if error:
        try:
            tolerance = float(error)
        except ValueError:
            raise RequestError(f"the field 'error' is no number: {error!r}") from None
        return Item(parts, json.dumps({"value": gold, "tolerance": tolerance}), "numeric")
    return Item(parts, (gold, f"{gold} {unit}") if unit and not several else gold)


def options(row: Row, layout: Layout, about: About) -> Item:
    """Reads a question with its right answer and wrong ones. The options stand in an order drawn by (seed, id), the
    same for all models; the letter of the right one is the gold answer."""
    question, *answers = layout
    texts = [text_of(row, field).strip() for field in answers]
    order = named_order(len(texts), "options", about.seed, about.id)
    letters = "ABCDEFGHIJ"[: len(texts)]
    lines = [f"{letter}) {texts[place]}" for letter, place in zip(letters, order, strict=True)]
    parts = {"problem": text_of(row, question).strip(), "options": "\n".join(lines), "letters": letters}
    return Item(parts, letters[order.index(0)])


def check_function(row: Row, layout: Layout, about: About) -> Item:
    """Reads a row of HumanEval: the beginning of a function, and a test that is called with it."""
    prompt, test, name = (text_of(row, field) for field in layout)
    gold = {"kind": "check", "prompt": prompt, "test": test, "entry_point": name.strip()}
    return Item({"problem": prompt}, json.dumps(gold))


def asserts(row: Row, layout: Layout, about: About) -> Item | None:
    """Reads a row of MBPP's test split: a task and the asserts that its code passes, all of which the prompt shows."""
    number = re.search(r"\d+$", about.id)
    if number is None:
        raise RequestError(f"the id {about.id!r} does not end with a task's number, which says whose split it is")
    if int(number[0]) not in MBPP_TEST:
        return None
    problem, field = layout
    tests = value_at(row, field)
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) and test.strip() for test in tests):
        raise RequestError(f"the field {field!r} is no list of asserts")
    imports, setup = row.get("test_imports") or [], str(row.get("test_setup_code") or "")
    if not isinstance(imports, list) or not all(isinstance(line, str) for line in imports):
        raise RequestError("the field 'test_imports' is no list of lines")
    after = int(number[0]) in MBPP_SET_UP_AFTER
    before = "\n".join([*imports, *([setup] if setup and not after else [])])
    gold = {"kind": "asserts", "tests": tests, "setup": before, "setup_after": setup if after else ""}
    return Item({"problem": text_of(row, problem).strip(), "tests": "\n".join(tests)}, json.dumps(gold))


def text_of(row: Row, field: str) -> str:
    """Returns a field's text. Raises RequestError for a conversation."""
    problem = problem_of(row, field)
    if not isinstance(problem, str):
        roles = ", ".join(turn.role for turn in problem)
        raise RequestError(f"the field {field!r} is a conversation ({roles}): a benchmark asks one question")
    return problem


def _gold(row: Row, field: str) -> Gold:
    gold = answer_of(row, field)
    if field == "solution" and isinstance(gold, str) and not boxes(gold)[0]:
        raise RequestError("the field 'solution' has no \\boxed{…}: it does not say which part is the answer")
    return gold_text(gold) if isinstance(gold, str) else tuple(dict.fromkeys(gold_text(each) for each in gold))
