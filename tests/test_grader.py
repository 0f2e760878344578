"""Graders by name: the letter of an option, a number with a tolerance, and who grades what in one pool."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest

from a3po_megatron.batch import Answered, Verdict
from a3po_megatron.errors import RequestError
from a3po_megatron.reward.choice import letter_of
from a3po_megatron.reward.function import function_of
from a3po_megatron.reward.grader import GRADERS, grade
from a3po_megatron.reward.pool import GraderPool
from a3po_megatron.reward.worker import judge
from tests.harness import interrupted_runs as tools


@pytest.mark.parametrize(
    "text",
    [
        *(
            "C",
            "c",
            " C ",
            "(C)",
            "[C]",
            "C.",
            "C)",
            "C:",
            "**C**",
            "$C$",
            r"\\text{C}",
            r"\\text{(C)}",
            r"\\mathrm{C}",
        ),
        *("option C", "Choice (C)", "C) 42", "C. because it is", "(C) a long text, with A in it", "C: none of B"),
    ],
)
def test_a_letter_is_read_however_it_is_written(text: str) -> None:
    assert letter_of(text.replace("\\\\", "\\")) == "C"


@pytest.mark.parametrize(
    "text", ["", "A cat", "B and C", "C, D", "C or D", "Cobalt", "Z", "not C", "all of them", "42", "AC", "K"]
)
def test_what_names_no_single_option_is_no_letter(text: str) -> None:
    assert letter_of(text) is None


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        ("so it is\nAnswer: C", Verdict("correct")),
        ("so it is\nAnswer: (c) the third", Verdict("correct")),
        ("A is wrong, B is wrong.\nAnswer: B", Verdict("wrong", "another choice")),
        ("Answer: C\nbut no\nAnswer: D", Verdict("wrong", "another choice")),
        ("Answer: the third", Verdict("wrong", "the answer names no option")),
        ("I do not know", Verdict("wrong", "the answer names no option")),
        ("<think>Answer: C", Verdict("wrong", "cut off in its thoughts")),
    ],
)
def test_only_the_letter_of_the_answer_counts(response: str, verdict: Verdict) -> None:
    found = grade(response, "C", grader="choice", extract="answer")
    assert found.outcome == verdict.outcome and (not verdict.reason or found.reason), found


def test_a_choice_that_is_cut_off_counts_where_it_was_named_and_a_gold_that_is_none_is_invalid() -> None:
    assert grade("Answer: C\nbecause", "C", grader="choice", extract="answer", finished=False).outcome == "correct"
    assert grade("because", "C", grader="choice", extract="answer", finished=False).outcome == "wrong"
    assert grade("Answer: C", "the third", grader="choice", extract="answer").outcome == "invalid"


def gold(value: str, tolerance: object) -> str:
    return json.dumps({"value": value, "tolerance": tolerance})


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        (
            gold("3.2", 0.05),
            ["3.2", "3.15", "3.25", "x = 3.21", r"\frac{16}{5}", "320\\%"],
            ["3.1499", "3.26", "-3.2", "3,2,1"],
        ),
        (gold("1, 2", 0.1), ["1,2", "2, 1", "2.05, 0.95"], ["1", "1,2,3", "1, 2.2"]),
        (gold("10^{-3}", 1e-4), ["0.001", "0.0011", "9.5e-4"], ["0.0012", "10^{-4}"]),
        (gold("50", 0), ["50", "50.0"], ["50.001"]),
        ("50", ["50"], ["50.001"]),
        (gold(r"\sqrt{2}", 1e-3), ["1.414", r"\sqrt2"], ["1.41"]),
    ],
)
def test_a_number_is_right_within_its_tolerance_and_each_of_several_by_itself(
    answer: str, right: list[str], wrong: list[str]
) -> None:
    for text in right:
        assert grade(rf"so \boxed{{{text}}}", answer, grader="numeric").outcome == "correct", text
    for text in wrong:
        assert grade(rf"so \boxed{{{text}}}", answer, grader="numeric").outcome == "wrong", text


@pytest.mark.parametrize(
    "answer", [gold("x", 1), gold("1", -1), gold("1", "0.1"), gold("1", True), gold("1", float("nan")), "{}", "[]"]
)
def test_a_gold_number_that_nobody_can_read_is_invalid(answer: str) -> None:
    verdict = grade(r"\boxed{4}", answer, grader="numeric")
    assert verdict.outcome == "invalid" or answer == "[]", verdict


def test_one_pool_grades_each_item_by_its_own_grader() -> None:
    pool = GraderPool(functools.partial(grade, extract="boxed"), 1, 20.0, 2 << 30)
    items = [
        Answered(r"\boxed{4}", "4"),
        Answered("Answer: 4", "4"),  # no box, where the pool looks for one
        Answered("Answer: 4", "4", extract="answer"),
        Answered("Answer: C", "C", grader="choice", extract="answer"),
        Answered(r"\boxed{4.1}", gold("4", 0.2), grader="numeric"),
        Answered(r"\boxed{4.1}", gold("4", 0.2), finished=False, grader="numeric"),
        Answered("x", "y", grader="oracle"),
    ]
    with pool:
        outcomes = [verdict.outcome for verdict in pool.grade_all(items)]
    assert outcomes == ["correct", "wrong", "correct", "correct", "correct", "correct", "invalid"]
    assert set(GRADERS) >= {"math", "choice", "numeric"}


OWN = """
from a3po_megatron.batch import Verdict

def even(response, answer):
    return len(response) % 2 == 0

def long_enough(response, answer, *, finished):
    return Verdict("correct" if len(response) >= int(answer) else "wrong", f"finished: {finished}")

def shrugs(response, answer):
    return None

def breaks(response, answer):
    raise KeyError(answer)

VALUE = 3
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


def test_a_function_of_ones_own_grades_in_the_pool_and_what_goes_wrong_with_it_is_invalid(own: Path) -> None:
    asked = [("xx", "", True), ("x", "", True), ("xx", "", False), ("xxx", "3", False), ("xx", "3", True)]
    names = ("even", "long_enough", "shrugs", "breaks")
    graders = {name: functools.partial(grade, function=f"{own}:{name}") for name in names}
    verdicts = {name: [judge(graders[name], *each, "function") for each in asked] for name in names}
    with GraderPool(graders["even"], 1, 20.0, 2 << 30) as pool:
        assert pool.grade_all([Answered(*each, grader="function") for each in asked]) == verdicts["even"]
    assert [each.outcome for each in verdicts["even"]] == ["correct", "wrong", "wrong", "wrong", "correct"]
    assert verdicts["even"][2].reason == "the response was cut off"
    assert [each.outcome for each in verdicts["long_enough"][3:]] == ["correct", "wrong"]
    assert [each.reason for each in verdicts["long_enough"][3:]] == ["finished: False", "finished: True"]
    assert all("returned NoneType" in each.reason for each in verdicts["shrugs"][:2])
    assert all(each == Verdict("invalid", "grader raised KeyError: ''") for each in verdicts["breaks"][:2])


def test_a_function_that_is_none_is_refused_by_name(own: Path, tmp_path: Path) -> None:
    assert function_of("math:isfinite")(1.0)
    for named, says in (
        (f"{own}:odd", "has no attribute 'odd'"),
        (f"{own}:VALUE", "is no function: it is int"),
        (f"{tmp_path}/other.py:even", "FileNotFoundError"),
        ("no_such_module:even", "ModuleNotFoundError"),
    ):
        with pytest.raises(RequestError, match=f"reward.function: {re.escape(named)}") as error:
            function_of(named)
        assert says in str(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["data.grader=function"], "reward.function names none"),
        (["reward.function={own}:even"], "has no effect: no row has the grader `function`"),
        (["data.grader=function", "reward.function={own}:odd"], "has no attribute 'odd'"),
        (["data.grader=function", "reward.function=even"], "expected FILE.py:NAME or MODULE:NAME"),
        (["data.grader=function", "reward.function=gone.py:even"], "but there is no"),
        (["data.grader=maths"], "'maths' is no grader: there are math"),
    ],
)
def test_a_run_whose_rows_cannot_be_graded_is_refused_before_it_starts(
    options: list[str], says: str, own: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    asked = [f"data.path={tmp_path}/rows.jsonl", *(option.format(own=own) for option in options)]
    ended = tools.launched_here(tmp_path / "run", *tools.LAYOUTS["dp2"], *asked)
    assert ended.code == 2 and says in ended.err, ended.all
