"""`a3po compare` through the command line, against an oracle that shares nothing with it."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from typer.testing import CliRunner

from a3po_megatron.cli import app
from a3po_megatron.errors import RequestError
from a3po_megatron.evaluate.benchmarks import BENCHMARKS
from a3po_megatron.evaluate.compare import compare
from a3po_megatron.evaluate.result import Result, write
from tests.harness.results import result_with

Counts = list[tuple[int, int]]


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")  # so that no path is folded


def printed(folder: Path, first: Result, second: Result, *options: str) -> tuple[str, BaseException | None]:
    for name, result in (("a.json", first), ("b[red].json", second)):
        write(folder / name, result)
    done = CliRunner().invoke(app, ["compare", str(folder / "a.json"), str(folder / "b[red].json"), *options])
    return done.output, done.exception


def drawn(seed: int, problems: int, n: int, changed: int) -> tuple[Counts, Counts]:
    """Two sets of counts that differ in the first problems."""
    generator = random.Random(seed)
    first = [(generator.randint(0, n - 1), n) for _ in range(problems)]
    second = [(generator.randint(c + 1, n) if p < changed else c, n) for p, (c, _) in enumerate(first)]
    for place in generator.sample(range(changed), changed // 3):
        first[place], second[place] = second[place], first[place]
    return first, second


def rate(counts: tuple[int, int]) -> Fraction:
    return Fraction(*counts)


def test_difference_interval_and_p_are_those_of_an_oracle(tmp_path: Path) -> None:
    first, second = drawn(1, problems=40, n=8, changed=9)
    found = compare(result_with(first), result_with(second))
    differences = [rate(b) - rate(a) for a, b in zip(first, second, strict=True)]
    mean = sum(differences) / len(differences)
    assert found.difference.value == pytest.approx(float(mean), abs=1e-15)
    assert found.first == pytest.approx(float(sum(map(rate, first)) / 40), abs=1e-15)
    assert found.second == pytest.approx(float(sum(map(rate, second)) / 40), abs=1e-15)
    flips = [
        abs(sum(sign * each for sign, each in zip(signs, filter(None, differences), strict=True)))
        for signs in itertools.product((1, -1), repeat=9)
    ]
    assert found.p == sum(each >= abs(mean * 40) for each in flips) / 2**9
    # Another generator, other draws. Two quantiles of 10,000 resamples each: their standard error is 2.1 % of the
    # spread's standard deviation at the 2.5 % point (sqrt(q(1 - q) / R) / density), so four errors of a difference are
    # 0.12 of it, and 0.03 of the width. Means lie on a grid of 1/320: a quantile between two of its points is either.
    generator = random.Random(2)
    values = [float(each) for each in differences]
    means = sorted(sum(generator.choices(values, k=40)) / 40 for _ in range(10_000))
    near = 0.03 * (found.difference.high - found.difference.low) + 1 / 320 + 1e-12
    assert found.difference.low == pytest.approx(means[250], abs=near)
    assert found.difference.high == pytest.approx(means[9750], abs=near)
    output, error = printed(tmp_path, result_with(first), result_with(second))
    assert error is None
    low, high = found.difference.low, found.difference.high
    for words in (
        f"{found.version}: 40 problems",
        f"{found.first:.2%} │ avg@8 of {tmp_path}/a.json",
        f"{found.second:.2%} │ avg@8 of {tmp_path}/b[red].json",
        f"{100 * float(mean):+.2f} │ points (of 100); 95 % interval {100 * low:+.2f} to {100 * high:+.2f} (paired",
        f"{found.p:.2g} │ how often two equal models are as far apart",
        "9 │ problems: B is better on 6, worse on 3",
    ):
        assert words in output
    assert "left out" not in output


def test_the_pairing_is_what_makes_it_sharp() -> None:
    """Two models a little apart on problems of very different difficulty: the pair tells, two intervals do not."""
    first = [(c, 10) for c in (0, 2, 4, 6, 8) for _ in range(20)]
    second = [(c + (p % 2), 10) for p, (c, _) in enumerate(first)]
    a, b = result_with(first, n=10), result_with(second, n=10)
    found = compare(a, b)
    assert found.difference.low > 0 and found.p < 0.001
    assert a.summary.avg is not None and b.summary.avg is not None
    assert a.summary.avg.high > b.summary.avg.low


def test_the_other_way_round_is_the_negative() -> None:
    first, second = drawn(3, problems=30, n=4, changed=25)
    there, back = (compare(*(result_with(each, n=4) for each in pair)) for pair in ((first, second), (second, first)))
    assert back.difference.value == -there.difference.value
    assert back.p == there.p
    assert [(each.id, each.first, each.second) for each in back.changed] == [
        (each.id, each.second, each.first) for each in there.changed
    ]


def test_problems_that_changed_are_listed_by_size_with_their_counts(tmp_path: Path) -> None:
    first = [(4, 8), (0, 8), (8, 8), (3, 8), (1, 4), (0, 0)]
    second = [(5, 8), (8, 8), (2, 8), (3, 8), (2, 8), (8, 8)]
    output, _ = printed(tmp_path, result_with(first), result_with(second))
    rows = re.findall(r"│ (p\d) +│ +(\d/\d) │ +(\d/\d) │ +([-+]\d+\.\d) │", output)
    assert rows == [("p1", "0/8", "8/8", "+100.0"), ("p2", "8/8", "2/8", "-75.0"), ("p0", "4/8", "5/8", "+12.5")]
    assert "3 │ problems: B is better on 2, worse on 1" in output
    assert re.search(r"left out │ +1 │ problems without a valid sample in A or in B", output)
    assert ": 5 problems" in output
    output, _ = printed(tmp_path, result_with(first), result_with(second), "--changed", "2")
    assert "p0" not in output and "… and 1 more (--changed lists more)" in output
    output, _ = printed(tmp_path, result_with(first), result_with(first))
    assert "0/8" not in output and re.search(r"p +│ +1 │", output)


A = result_with([(1, 2), (2, 2)], n=2)


def changed_problem(result: Result, number: int, **fields: str) -> Result:
    problems = list(result.problems)
    problems[number] = dataclasses.replace(problems[number], **fields)  # type: ignore[arg-type]
    return dataclasses.replace(result, problems=tuple(problems))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda: result_with([(1, 2), (2, 2)], n=2, benchmark="aime25"), 'the benchmark is "aime24" in A and "aime25"'),
        (lambda: result_with([(1, 3), (2, 3)], n=3), "the protocol's n is 2 in A and 3 in B"),
        (
            lambda: dataclasses.replace(A, protocol={k: v for k, v in A.protocol.items() if k != "extract"}),
            'the protocol\'s extract is "boxed" in A and null in B',
        ),
        (lambda: dataclasses.replace(A, version="aime24-00000000"), 'in A and "aime24-00000000" in B'),
        (
            lambda: dataclasses.replace(A, file=dataclasses.replace(A.file, digest="e" * 64)),
            "the digest of the benchma",
        ),
        (lambda: dataclasses.replace(A, problems=A.problems[:1]), "the number of problems is 2 in A and 1 in B"),
        (lambda: changed_problem(A, 1, id="q"), 'the id of problem 2 is "p1" in A and "q" in B'),
        (
            lambda: dataclasses.replace(changed_problem(A, 1, gold="C"), seed=3),
            "problem p1 is put in two ways (the seeds are 0 and 3)",
        ),
        (lambda: changed_problem(A, 0, text="What?"), "problem p0 is put in two ways"),
    ],
)
def test_what_is_no_pair_is_refused_with_the_first_difference(
    tmp_path: Path, change: Callable[[], Result], says: str
) -> None:
    output, error = printed(tmp_path, A, change())
    assert isinstance(error, RequestError) and error.exit_code == 2
    names = {"A": f"{tmp_path}/a.json", "B": f"{tmp_path}/b[red].json"}
    assert str(error).startswith(f"{names['A']} and {names['B']} cannot be compared: ")
    assert re.sub(r"(?<=in )([AB])(?= and| in|$)", lambda match: names[match[1]], says) in str(error)
    assert "B - A" not in output


def test_results_that_share_no_graded_problem_are_refused() -> None:
    with pytest.raises(RequestError, match="no problem has a valid sample in both"):
        compare(result_with([(0, 0), (1, 2)], n=2), result_with([(1, 2), (0, 0)], n=2))


def test_another_seed_alone_is_a_pair() -> None:
    assert compare(A, dataclasses.replace(A, seed=5)).difference.value == 0
    assert A.version == BENCHMARKS["aime24"].chosen(samples=2).version


def test_a_file_that_is_no_result_ends_with_2(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "x.json"), str(tmp_path / "x.json")])
    assert isinstance(done.exception, RequestError)
    assert str(done.exception).startswith(f"{tmp_path}/x.json: not the result of an evaluation")
