r"""Grading of mathematical answers: extraction, equality, and what counts as wrong and what as invalid."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from a3po_megatron.errors import RequestError
from a3po_megatron.reward import math as grader
from a3po_megatron.reward.math import grade

ROOT = Path(__file__).resolve().parents[1]


def outcome(response: str, answer: str, extract: str = "any") -> str:
    return grade(response, answer, extract=extract).outcome


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"first \boxed{3}, no: \boxed{4}", "4"),  # the last one counts
        (r"\boxed{4} and so we are at \boxed{", "4"),  # the last complete one
        (r"\boxed{\frac{1}{\sqrt{1+\frac{1}{2}}}}", r"\frac{1}{\sqrt{3/2}}"),  # nested braces
        (r"\boxed{\left\{1, 2\right\}}", r"\{2, 1\}"),  # escaped braces
        (r"\boxed {7}", "7"),
        (r"\boxed{ \boxed{7} }", "7"),
        (r"\boxed{x = \boxed{7}}", "7"),
        (r"an open { brace before \boxed{7}", "7"),
        (r"a stray } before \boxed{7}", "7"),
        (r"\boxed{x = 5}", "5"),
        (r"\boxed{1,234}", "1234"),
        (r"\boxed{32,\! 349}", "32349"),
        (r"\boxed{007}", "7"),
        (r"\boxed{0.50}", r"\frac12"),
        (r"\boxed{\text{Evelyn}}", "Evelyn"),
        (r"\boxed{(B)}", r"\text{(B)}"),
        (r"\boxed{50\%}", r"50\%"),
        (r"\boxed{(x+1)^2}", "x^2+2x+1"),
        (r"\boxed{-0}", "0"),
        (r"\boxed{2**-3 * x**2}", r"\frac{x^2}{8}"),
        ("\\boxed{\n  12\n}", "12"),
    ],
)
def test_the_last_complete_box_is_the_answer(response: str, answer: str) -> None:
    assert outcome(response, answer) == "correct"
    assert outcome(response, answer, "boxed") == "correct"
    assert outcome(response, answer, "answer") == "wrong"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"first \boxed{3}, no: \boxed{4}", "3"),
        (r"\boxed{5,4}", "5"),
        (r"\boxed{54}", "5"),
        (r"\boxed{32, 349}", "32349"),  # two numbers
        (r"\boxed{-7}", "7"),
        (r"\boxed{4\frac{4}{9}}", "4"),
        (r"\boxed{4 4/9}", "4"),
        (r"\boxed{[0,9)}", "[0,1)"),
        (r"\boxed{1/0}", "4"),
        (r"\boxed{}", "4"),
        (r"\boxed{Eq(x**2, 1)}", "1"),  # what cannot be read as a whole is not its last number
        (r"\boxed{2**3}", "2"),
        (r"\boxed{C}", r"\text{B}"),
    ],
)
def test_another_value_is_wrong(response: str, answer: str) -> None:
    assert outcome(response, answer) == "wrong"


def test_boxes_in_a_row_are_also_a_list_but_boxes_in_a_text_are_not() -> None:
    row = r"\boxed{(1, 2)}, \boxed{(2, 1)} \quad\text{and}\quad \boxed{(3, 0)}"
    assert outcome(row, "(3,0),(2,1),(1,2)") == "correct"
    assert outcome(row, "(2,1),(1,2)") == "wrong"
    assert outcome(r"\boxed{1}, \boxed{\boxed{2}}, \boxed{3}", r"\{1, 2, 3\}") == "correct"
    assert outcome(r"\boxed{1} gives us \boxed{2}", r"\{1, 2\}") == "wrong"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Answer: 4", "4"),
        ("Answer: 3\nmore\nAnswer: 7", "7"),
        ("so\n**Final answer:** $\\frac{1}{2}$.", "0.5"),
        ("text\n  ANSWER: \\(x+1\\)", "1+x"),
        ("Answer: $5$ apples", "5"),
        ("> **Answer**: 1,000", "1000"),
    ],
)
def test_the_last_answer_line_is_the_answer(response: str, answer: str) -> None:
    assert outcome(response, answer) == "correct"
    assert outcome(response, answer, "answer") == "correct"
    assert grade(response, answer, extract="boxed").reason == "no \\boxed{…} found"


def test_the_box_goes_before_the_answer_line_and_the_line_before_the_last_expression() -> None:
    text = "Answer: 3\n\\boxed{5}\nthat is 6"
    assert [outcome(text, answer) for answer in "356"] == ["wrong", "correct", "wrong"]
    assert outcome(text, "3", "answer") == "correct"
    text = "Answer: 3\nwhich is less than 6"
    assert [outcome(text, answer) for answer in "36"] == ["correct", "wrong"]
    assert outcome("The value is therefore $\\sqrt{16}$", "4") == "correct"
    assert outcome("2 + 2 = 4", "4") == "correct"
    assert outcome("The answer is 4 4/9.", "4") == "wrong"


def test_no_answer_and_a_response_that_was_cut_off_are_wrong_with_their_reason() -> None:
    assert grade("I do not know.", "4") == grader.Verdict("wrong", "no answer found")
    assert grade("", "4").outcome == "wrong"
    assert grade("2 + 2 = \\boxed{4", "4") == grader.Verdict("wrong", "cut off inside \\boxed{")
    assert grade("\\boxed{\\frac{1}{2}", "\\frac{1}{2}").reason == "cut off inside \\boxed{"
    assert grade("it is 4", "4", extract="boxed").reason == "no \\boxed{…} found"
    assert grade("it is 4", "4", extract="answer").reason == "no line `Answer: …` found"
    assert grade("\\boxed{\\frac{1}}", "4").outcome == "wrong"


@pytest.mark.parametrize("gold", ["", "  ", "$$", "\\boxed{}", "\\frac{1}{", "\\frac{", "!!??"])
def test_a_gold_answer_that_cannot_be_read_is_invalid(gold: str) -> None:
    verdict = grade("\\boxed{4}", gold)
    assert verdict.outcome == "invalid"
    assert "gold" in verdict.reason


def test_whatever_grading_a_response_meets_it_is_wrong_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> bool:
        raise ZeroDivisionError("deep inside")

    grader.prepare()
    monkeypatch.setattr("a3po_megatron.reward.equal.equal", fail)
    verdict = grade("\\boxed{x+1}", "y")
    assert verdict == grader.Verdict("wrong", "the answer cannot be compared: ZeroDivisionError: deep inside")


@pytest.mark.parametrize("extract", ["", "Boxed", "last", None])
def test_an_unknown_extract_is_refused_by_name(extract: str) -> None:
    with pytest.raises(RequestError, match=f"extract: {extract!r}"):
        grade("\\boxed{4}", "4", extract=extract)


HOSTILE = {
    "power tower": "\\boxed{10^{10^{10}}}",
    "power of a decimal": "\\boxed{1.5^{1000000000}}",
    "tiny power": "\\boxed{10^{-1000000000}}",
    "factorial": "\\boxed{99999999!}",
    "factorials of factorials": "\\boxed{(((((9!)!)!)!)!)!}",
    "binomial": "\\boxed{\\binom{1000000000}{500000000}}",
    "sum": "\\boxed{\\sum_{i=1}^{1000000000} i^i}",
    "infinite sum": "\\boxed{\\sum_{k=1}^{\\infty}\\frac{\\sin k}{k}}",
    "nested sums": "\\boxed{\\sum_{i=1}^{100}\\sum_{j=1}^{100}\\sum_{k=1}^{100} ijk}",
    "product": "\\boxed{\\prod_{k=1}^{10000000} k}",
    "logarithm of a tower": "\\boxed{\\log(10^{10^{10}})}",
    "nested brackets": "\\boxed{" + "(" * 3000 + "1" + ")" * 3000 + "}",
    "fewer nested brackets": "\\boxed{" + "(" * 60 + "x" + ")" * 60 + "}",
    "nested brackets, bare": "(" * 3000 + "1" + ")" * 3000,
    "opened boxes": "\\boxed{" * 100_000,
    "opened and closed boxes": "\\boxed{" * 50_000 + "}" * 50_000,
    "boxes in a row": "\\boxed{1}, " * 50_000,
    "dollars": "$" * 1_000_000,
    "brackets": "\\[" * 500_000,
    "empty lines": "\n" * 2_000_000,
    "quoted empty lines": "> \n" * 500_000,
    "digits": "\\boxed{" + "9" * 5_000_000 + "}",
    "a long line": "Answer: " + "* " * 1_000_000,
    "a long word": "a" * 5_000_000,
    "a long sum": "\\boxed{" + "1+" * 900 + "1}",
    "spaces": "1" + " " * 1_000_000 + "1/",
    "a union of intervals": "\\boxed{" + "\\cup".join(f"({2 * i},{2 * i + 1})" for i in range(100)) + "}",
    "a self-made macro": "\\boxed{\\def\\a{\\a\\a}\\a}",
    "different boxes": ", ".join(f"\\boxed{{{n}}}" for n in range(10_000)),
    "a long list": "\\boxed{" + "1," * 900 + "1}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_response_is_wrong_within_seconds(name: str) -> None:
    grader.prepare()
    begin = time.monotonic()
    assert outcome(HOSTILE[name], "5") == "wrong"
    assert time.monotonic() - begin < 6  # most take milliseconds; the machine may be busy


def test_an_answer_too_large_to_evaluate_is_still_right_if_it_is_the_gold_answer() -> None:
    assert outcome("\\boxed{9^{9^{9^9}}}", "9^{9^{9^9}}") == "correct"
    assert outcome("\\boxed{2^{1000}}", "2^{999}\\cdot 2") == "correct"


def test_grading_works_in_a_thread_and_leaves_alarms_alone() -> None:
    import signal

    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(outcome("\\boxed{\\frac{2}{4}}", "0.5")))
    thread.start()
    thread.join()
    assert found == ["correct"]
    signal.alarm(1000)
    try:
        assert outcome("\\boxed{\\frac{3}{6}}", "0.5") == "correct"
        assert signal.alarm(0) > 900
    finally:
        signal.alarm(0)


def test_strings_and_integers_are_settled_without_sympy_and_the_module_is_light() -> None:
    code = """
import sys
from a3po_megatron.reward.math import grade
assert grade("\\\\boxed{42}", "42").outcome == "correct"
assert grade("\\\\boxed{1,042}", "1042").outcome == "correct"
assert grade("\\\\boxed{41}", "42").outcome == "wrong"
assert grade("\\\\boxed{\\\\dfrac{1}{2}}", "\\\\frac{1}{2}").outcome == "correct"
assert grade("\\\\boxed{4", "42").outcome == "wrong"
sys.exit(" ".join(name for name in ("sympy", "math_verify", "torch") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == ""


def test_agreement_with_the_assertions_of_public_graders() -> None:
    folder = os.environ.get("A3PO_TEST_DATA")
    file = Path(folder or "") / "grader_pairs.json"
    if not folder or not file.exists():
        pytest.skip("A3PO_TEST_DATA does not name a folder with grader_pairs.json")
    pairs = json.loads(file.read_text())
    agree = [(outcome(pair["prediction"], pair["gold"]) == "correct") == pair["expected"] for pair in pairs]
    rate = sum(agree) / len(agree)
    differing = [pair["id"] for pair, same in zip(pairs, agree, strict=True) if not same]
    print(f"agreement {rate:.4f} of {len(pairs)}; differing: {differing}")
    assert rate >= 0.98


@pytest.mark.parametrize(
    ("response", "gold", "expected"),
    [
        # Thoughts are no answer, wherever they began.
        ("<thinking>\\boxed{3}</thinking> It is \\boxed{4}.", "3", "wrong"),
        ("<think>so \\boxed{3}", "3", "wrong"),
        ("<|begin_of_thought|>3<|end_of_thought|>\nAnswer: 4", "4", "correct"),
        # Labels in other languages, values below them.
        ("Die Antwort: 12", "12", "correct"),
        ("Ответ: 12", "12", "correct"),
        ("### Réponse finale\n\n$\\frac{3}{7}$", "3/7", "correct"),
        # Wholes.
        ("\\boxed{6 sqrt(11)}", "6", "wrong"),
        ("\\boxed{2¾}", "2", "wrong"),
        ("\\boxed{2¾}", "\\frac{11}{4}", "correct"),
        ("\\boxed{8 \\text{ cubed}}", "8", "wrong"),
        ("\\boxed{\\text{at most } 9}", "9", "wrong"),
        ("\\boxed{101_2}", "101", "wrong"),
        ("\\boxed{-53_7}", "-53_{7}", "correct"),
        ("\\boxed{B2_{12}}", "\\text{B2}_{12}", "correct"),
        ("\\boxed{B, D}", "\\text{D,B}", "correct"),
        ("\\boxed{B}", "\\text{D,B}", "wrong"),
        ("\\boxed{R}", "\\text{(R)}", "correct"),
        ("\\boxed{2, 4, 6, \\dots}", "6", "wrong"),
        # Letters, units, signs.
        ("\\boxed{\\frac{Q}{q}}", "\\frac{q}{Q}", "wrong"),
        ("\\boxed{kT + g}", "g + kT", "correct"),
        ("\\boxed{12\\ \\mathrm{kg}}", "12 \\text{ g}", "wrong"),
        ("\\boxed{12 \\text{ marbles}}", "12", "correct"),
        ("\\boxed{４８}", "48", "correct"),
        ("\\boxed{-∞ < x ≤ 5}", "(-\\infty, 5]", "correct"),
        ("\\boxed{4.5e-6}", "4.5 \\times 10^{-6}", "correct"),
        ("\\boxed{2 pi sqrt(3)}", "2\\pi\\sqrt{3}", "correct"),
        ("\\boxed{\\frac{5}{12{,}500}}", "\\frac{1}{2500}", "correct"),
        # Values, lists, choices.
        ("\\boxed{3^{-70}}", "5^{-70}", "wrong"),
        ("\\boxed{u=4, v=9}", "v=9, u=4", "correct"),
        ("\\boxed{u=9, v=4}", "v=9, u=4", "wrong"),
        ("\\boxed{7,3}", "3,7", "correct"),
        ("Answer: (B) because 12 > 7", "B", "correct"),
        ("\\boxed{C: 40}", "A", "wrong"),
        ("\\boxed{\\textbf{(E) } \\sqrt{2}}", "\\sqrt{2}", "correct"),
        ("\\boxed{(2+x)^{1999}}", "(x+2)^{1999}", "correct"),
        ("\\boxed{x^{1999}+2}", "(x+2)^{1999}", "wrong"),
    ],
)
def test_a_second_instance_of_what_graders_get_wrong(response: str, gold: str, expected: str) -> None:
    assert outcome(response, gold) == expected


@pytest.mark.parametrize(
    ("response", "gold", "expected"),
    [
        # Neighbours are factors; only a whole number before a proper fraction is a mixed number.
        ("\\boxed{2(4)}", "8", "correct"),
        ("\\boxed{2(4)}", "6", "wrong"),
        ("\\boxed{(2)(4)}", "6", "wrong"),
        ("\\boxed{2\\binom{3}{1}}", "5", "wrong"),
        ("\\boxed{2\\left(\\frac12\\right)}", "1", "correct"),
        ("\\boxed{3\\frac{1}{2}}", "\\frac72", "correct"),
        ("\\boxed{2\\pi(r+h)}", "2\\pi r + 2\\pi h", "correct"),
        ("\\boxed{y'}", "y", "wrong"),
        ("\\boxed{2^3^2}", "64", "wrong"),
        ("\\boxed{e^-x}", "e^{-x}", "correct"),
        ("\\boxed{\\sqrt[3]{-8}}", "-2", "correct"),
        ("\\boxed{p-q}", "p - q", "correct"),
        ("\\boxed{3}", "\\log_2 8", "correct"),
        ("\\boxed{√(2+√(3))}", "\\sqrt{2+\\sqrt{3}}", "correct"),
        ("\\boxed{\\sqrt{ab}}", "\\sqrt{a}\\sqrt{b}", "correct"),
        ("\\boxed{\\cos t + i\\sin t}", "e^{it}", "correct"),
        # Sums are written out.
        ("\\boxed{\\sum_{k=1}^{n} k}", "\\frac{n(n+1)}{2}", "correct"),
        ("\\boxed{\\sum_{k=1}^{100} k}", "5051", "wrong"),
        # Thousands within formulas, decimal commas of LaTeX, large numbers in words.
        ("\\boxed{1,500\\pi}", "1500\\pi", "correct"),
        ("\\boxed{2500}", "(2,500)", "wrong"),
        ("\\boxed{3{,}5}", "3.5", "correct"),
        ("\\boxed{1.5 \\text{ million}}", "1500000", "correct"),
        ("\\boxed{1.5 \\text{ million}}", "1.5", "wrong"),
        # Signs of a list, regions by their pieces.
        ("\\boxed{\\pm 1, \\pm i}", "1, -1, i, -i", "correct"),
        ("\\boxed{\\{\\pm 1, 0\\}}", "\\{-1, 0, 1\\}", "correct"),
        ("\\boxed{|x| \\ge 3}", "(-\\infty,-3]\\cup[3,\\infty)", "correct"),
        ("\\boxed{(0,2)\\setminus\\{1\\}}", "(0,1)\\cup(1,2)", "correct"),
        ("\\boxed{(0,2)}", "(0,1)\\cup(1,2)", "wrong"),
        # Units by their powers.
        ("\\boxed{5\\,\\mathrm{m}}", "5", "correct"),
        ("\\boxed{5\\ \\mathrm{m\\,s^{-1}}}", "5 \\text{ m/s}", "correct"),
        ("\\boxed{5 \\text{ square meters}}", "5 \\text{ cm}^2", "wrong"),
        ("\\boxed{4 \\text{ is wrong}}", "4", "wrong"),
        # Choices, boxes, words.
        ("The correct answer is option B.", "B", "correct"),
        ("\\boxed{\\textbf{(B)}\\ A}", "A", "wrong"),
        ("\\boxed{1} and \\boxed{2}", "2", "wrong"),
        ("\\boxed{\\text{Version 15}}", "\\text{version 1.5}", "wrong"),
        ("\\boxed{5}", "9^{9^{9}}", "wrong"),  # too large to evaluate is not unreadable
        # Sentences: all that they list, nothing that they deny or qualify.
        ("The solutions are $x=2$ and $x=7$.", "7", "wrong"),
        ("The solutions are 2 and 7.", "2, 7", "correct"),
        ("The answer is not $7$.", "7", "wrong"),
        ("The answer is at most $7$.", "7", "wrong"),
        ("Sorry, but 7 attempts were not enough.", "7", "wrong"),
        ("Answer: **17** (since 8 + 9 = 17)", "17", "correct"),
        ("Answer: The maximum is 7 and the minimum is 5", "5", "wrong"),
        ("<answer>The answer is 15.</answer>", "15", "correct"),
        ("Die richtige Antwort ist C.", "C", "correct"),
        ("Всего 10 яблок.", "10", "correct"),
        ("正确选项是B。", "B", "correct"),
    ],
)
def test_nothing_is_misread_and_nothing_but_the_whole_is_paid(response: str, gold: str, expected: str) -> None:
    assert outcome(response, gold) == expected


@pytest.mark.parametrize(
    "text",
    ["{3\\over ", "0." + "7" * 1900, "^{" * 600 + "}" * 600, ")^{" * 300 + "}" * 300, "1.1." * 240, "\ud800", "\x00"],
)
def test_no_text_raises_or_hangs_as_answer_or_as_gold(text: str) -> None:
    begin = time.process_time()
    assert outcome("\\boxed{" + text + "}", "5") == "wrong"
    assert outcome("\\boxed{5}", text) in ("wrong", "invalid")
    assert time.process_time() - begin < 4


def test_a_response_that_was_cut_off_has_answered_only_what_it_named() -> None:
    assert grade("so \\boxed{12} and then", "12", finished=False).outcome == "correct"
    assert grade("The sides are 3, 4, so 3 * 4 = 12", "12", finished=False).outcome == "wrong"
    assert grade("The sides are 3, 4, so 3 * 4 = 12", "12").outcome == "correct"
    assert grade("Answer: 12", "12", finished=False).outcome == "wrong"  # of 123, it may be
    assert grade("Answer: 12\nThis", "12", finished=False).outcome == "correct"
