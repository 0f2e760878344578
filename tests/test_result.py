"""The result of an evaluation: its numbers are those of its samples, and its file is read back or refused by name."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from a3po_megatron.errors import RequestError
from a3po_megatron.evaluate.problems import Problem
from a3po_megatron.evaluate.result import LONGEST_GOLD, graded, read, write
from a3po_megatron.evaluate.summary import vote
from tests.harness.results import boxed, graded_problem, result_of, result_with, sample


def test_a_summary_is_that_of_its_samples_counted_by_hand() -> None:
    outcomes = ["ccww", "wwww", "cccc", "cwii", "iiii"]  # of n = 4, one sign a sample
    words = {"c": "correct", "w": "wrong", "i": "invalid"}
    problems = [
        graded_problem(
            str(number), [boxed(place, words[letter], tokens=10 + place) for place, letter in enumerate(row)]
        )
        for number, row in enumerate(outcomes)
    ]
    summary = result_of(problems).summary
    rates = [Fraction(row.count("c"), 4 - row.count("i")) for row in outcomes[:4]]
    assert summary.avg is not None
    assert (summary.avg.value, summary.avg.problems) == (float(sum(rates) / 4), 4)
    assert summary.avg.low < summary.avg.value < summary.avg.high
    for k, rows in ((1, outcomes[:4]), (2, outcomes[:4]), (4, outcomes[:3])):
        subsets = [list(itertools.combinations(row.replace("i", ""), k)) for row in rows]
        chances = [Fraction(sum("c" in subset for subset in each), len(each)) for each in subsets]
        assert summary.pass_at[k].value == pytest.approx(float(sum(chances) / len(chances)), abs=1e-15)
        assert summary.pass_at[k].problems == len(rows)
    assert list(summary.pass_at) == [1, 2, 4]
    # Correct ones vote for one answer, wrong ones each for another: 2 of 4, none, all, and 1 to 1.
    assert summary.majority is not None
    assert (summary.majority.value, summary.majority.problems) == ((1 + 0 + 1 + 0.5) / 4, 4)
    assert (summary.invalid, summary.length_mean, summary.truncated_rate) == (6, 11.5, 0)
    assert (summary.seconds, summary.tokens_per_second) == (12.5, 20 * 11.5 / 12.5)


def test_n_that_is_no_power_of_two_has_the_powers_below_it() -> None:
    assert list(result_with([(1, 6), (2, 6)], n=6).summary.pass_at) == [1, 2, 4]
    assert list(result_with([(1, 1)], n=1).summary.pass_at) == [1]


def test_of_samples_that_are_all_invalid_nothing_is_estimated() -> None:
    summary = result_with([(0, 0)] * 3, n=2).summary
    assert (summary.avg, summary.majority, summary.pass_at, summary.invalid) == (None, None, {}, 6)


def test_a_program_has_no_majority() -> None:
    problems = [graded_problem("HumanEval/0", [sample("```python\n1\n```", "correct")] * 2)]
    summary = result_of(problems, "humaneval").summary
    assert summary.majority is None
    assert summary.avg is not None and summary.avg.value == 1


def test_a_cut_off_response_counts_as_truncated_and_votes_for_what_it_named() -> None:
    cut_off = [boxed(3, finish="length"), sample("so we", finish="length"), boxed(1, "correct"), boxed(3)]
    summary = result_of([graded_problem("a", cut_off)]).summary
    assert summary.truncated_rate == 0.5
    assert summary.majority is not None and summary.majority.value == 0  # two votes for 3, one for the gold


@pytest.mark.parametrize(
    ("texts", "grader", "extract", "alike"),
    [
        (("\\boxed{\\frac{1}{2}}", "\\boxed{\\dfrac12}", "\\boxed{ \\frac12 .}"), "math", "boxed", True),
        (("\\boxed{12}", "first \\boxed{11}, then \\boxed{12}"), "math", "boxed", True),
        (("\\boxed{12}", "\\boxed{13}"), "math", "boxed", False),
        (("Answer: C", "**Answer: (C)**", "Answer: C) four", "Answer: $C$"), "choice", "answer", True),
        (("Answer: C", "Answer: D"), "choice", "answer", False),
        (("Answer: none", "Answer: None of these"), "choice", "answer", False),
    ],
)
def test_responses_that_are_spelled_alike_vote_alike(
    texts: tuple[str, ...], grader: str, extract: str, alike: bool
) -> None:
    votes = {vote(sample(text), grader, extract) for text in texts}
    assert None not in votes
    assert len(votes) == (1 if alike else len(texts))


def test_a_line_that_was_cut_off_does_not_vote() -> None:
    assert vote(sample("Answer: 12"), "choice", "answer") is not None
    assert vote(sample("Answer: 12", finish="length"), "choice", "answer") is None  # of Answer: 123, maybe


def test_a_response_without_an_answer_does_not_vote_and_a_hostile_one_takes_no_time() -> None:
    assert vote(sample("It is 12."), "math", "boxed") is None
    assert vote(sample("It is 12.", "correct"), "math", "boxed") == vote(boxed("x", "correct"), "math", "boxed")
    for text in ("{" * 5000, "\\frac" * 1000, "(" * 1900, "\\text{" * 300 + "}" * 300):
        assert vote(boxed(text + "}" * text.count("{")), "math", "boxed")


def test_a_result_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    problems = [graded_problem("a≤b", [boxed("½", "correct"), boxed(2)], gold=("½", "0.5"))]
    result = result_of(problems)
    write(tmp_path / "result.json", result)
    assert read(tmp_path / "result.json") == result
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json"]
    tree = json.loads((tmp_path / "result.json").read_text())
    assert list(tree)[:5] == ["format", "benchmark", "version", "protocol", "seed"]
    assert tree["format"] == 1
    assert tree["summary"]["pass"]["1"] == {"value": 0.5, "low": 0.5, "high": 0.5, "problems": 1}
    assert tree["problems"][0]["samples"][1]["outcome"] == "wrong"


def test_half_a_surrogate_pair_does_not_cost_the_file(tmp_path: Path) -> None:
    write(tmp_path / "result.json", result_of([graded_problem("a", [boxed("\ud800")])]))
    assert read(tmp_path / "result.json").problems[0].samples[0].text == "So it is \\boxed{?}."


def test_of_a_gold_answer_of_megabytes_only_the_digest_is_kept() -> None:
    gold = "x" * (LONGEST_GOLD + 1)
    short, long = (graded(Problem("a", "t", each, "code", ""), [boxed(1)]).gold for each in (gold[1:], gold))
    assert short == gold[1:]
    assert isinstance(long, str) and long.startswith("blake3:") and len(long) == 71


def damaged(tree: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    *folders, last = path.split(".")
    inside: Any = tree
    for name in folders:
        inside = inside[int(name) if isinstance(inside, list) else name]
    if value is None:
        del inside[last]
    else:
        inside[last] = value
    return tree


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("format", 2, "a result of format 2, and this version reads format 1"),
        ("format", None, "not the result of an evaluation (a3po eval --json FILE writes one)"),
        ("seed", "7", "the result is damaged: seed: Input should be a valid integer"),
        ("file.digest", None, "the result is damaged: file.digest: Field required"),
        ("summary.best", 1, "the result is damaged: summary.best: Unexpected keyword argument"),
        ("problems.0.samples.1.outcome", "right", "problems.0.samples.1.outcome: Input should be 'correct', 'wrong'"),
        ("model.kind", "api", "model.kind: Input should be 'hf', 'checkpoint' or 'run'"),
        ("summary.pass.1.low", "0", "summary.pass.1.low: Input should be a valid number"),
    ],
)
def test_a_file_that_is_no_result_is_refused_by_name(tmp_path: Path, path: str, value: object, says: str) -> None:
    file = tmp_path / "result.json"
    write(file, result_with([(1, 2), (2, 2)], n=2))
    file.write_text(json.dumps(damaged(json.loads(file.read_text()), path, value)))
    with pytest.raises(RequestError) as error:
        read(file)
    assert str(error.value).startswith(f"{file}: ") and says in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "says"), [("", "not valid JSON"), ("[]", "not the result"), ('{"format": 1', "not valid JSON")]
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(RequestError, match=says):
        read(tmp_path / "x.json")
    with pytest.raises(RequestError, match="cannot read the result: No such file"):
        read(tmp_path / "y.json")
    with pytest.raises(RequestError, match="cannot write the result: No such file"):
        write(tmp_path / "folder" / "x.json", result_with([(1, 2)], n=2))
