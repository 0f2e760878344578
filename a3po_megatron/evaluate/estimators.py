"""Estimates what a benchmark's samples say: avg@n, pass@k, majority@n, an interval, and whether two models differ.

A benchmark has P problems with n samples each. The samples of one problem are alike, so that a problem is the unit of
everything here: scores are means over problems, the bootstrap draws problems anew, never samples, and the permutation
test flips whole problems. Draws are by name: the same call gives the same interval every time, on every machine.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from ..data.order import named_seed

RESAMPLES = 10_000  # of the bootstrap, and sign flips drawn where there are too many to try all
LEVEL = 0.95
EXACT = 16  # with so many problems that differ, or fewer, every one of the 2^m sign flips is tried
BLOCK = 1 << 21  # numbers held at once while resampling


def pass_at_k(n: int, c: int, k: int) -> float:
    """Returns the probability that of k samples, drawn from n without replacement, one is among the c correct ones.

    It is the unbiased estimate of pass@k, 1 - C(n - c, k) / C(n, k) (Chen et al., arXiv 2107.03374, equation 1), in
    whole numbers up to the one division. Raises ValueError where n < k: fewer samples estimate nothing.
    """
    if not 0 <= c <= n:
        raise ValueError(f"pass@{k}: {c} correct samples of {n}")
    if k < 1:
        raise ValueError(f"pass@{k}: k is at least 1")
    if n < k:
        raise ValueError(f"pass@{k} needs at least {k} samples of each problem, and there are {n}")
    ways = math.comb(n, k)
    return (ways - math.comb(n - c, k)) / ways


def avg(
    correct: Sequence[int] | np.ndarray,  # [P] correct samples of each problem
    samples: Sequence[int] | np.ndarray,  # [P] graded samples of each problem
) -> float:
    """Returns avg@n: the mean over problems of the share of correct samples. Raises ValueError where there is none."""
    return float(np.mean(rates(correct, samples)))


def rates(correct: Sequence[int] | np.ndarray, samples: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns the share of correct samples of each problem, [P] float64. Raises ValueError where one has no sample."""
    right, total = np.asarray(correct, np.float64), np.asarray(samples, np.float64)
    if not total.size or total.min() < 1 or right.min() < 0 or (right > total).any():
        raise ValueError("a mean needs problems, each with samples, of which no more are correct than there are")
    return right / total


def majority(
    answers: Sequence[Hashable | None],  # [n] the answer of each sample; None: it has none, and does not vote
    correct: Sequence[bool],  # [n] its verdict
) -> float:
    """Returns majority@n of one problem: the expected value of the most frequent answer, in [0, 1].

    Of tied answers each is as likely to be chosen, so that a tie is worth its share of correct answers: no order, no
    seed and no spelling decides it. Where nobody votes the answer is wrong. Verdicts that differ within one answer
    (one response was cut off behind it, say) count by their share.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    tied = [answer for answer, count in votes.items() if count == most]
    right = Counter(answer for answer, verdict in zip(answers, correct, strict=True) if verdict)
    return sum(right[answer] / most for answer in tied) / len(tied)


def interval(
    values: Sequence[float] | np.ndarray,  # [P] one number of each problem, or the difference of two models' on it
    *name: object,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of the mean over problems (Efron and Tibshirani 1993, chapter 13).

    Problems are drawn with replacement, P of P, by a generator that is seeded by `name`. The interval says how far the
    score would move with other problems of the same kind; the chance of sampling is in it, since each problem's number
    carries its own. Where all values are equal it has no width.
    """
    numbers = np.asarray(values, np.float64)
    if not numbers.size:
        raise ValueError("an interval needs at least one problem")
    generator = np.random.default_rng(named_seed("bootstrap", *name))
    count, means = numbers.size, []
    block = max(1, BLOCK // count)
    for start in range(0, resamples, block):
        picks = generator.integers(0, count, (min(block, resamples - start), count))
        means.append(numbers[picks].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def permutation_p(
    differences: Sequence[float] | np.ndarray,  # [P] of each problem: one model's number minus the other's
    *name: object,
    flips: int = RESAMPLES,
) -> float:
    """Returns the two-sided p of the paired permutation test: how often chance alone would part two models as far.

    If the two are alike, each problem's difference has either sign equally often. Problems without a difference take no
    part. With at most `EXACT` others all sign flips are tried; else `flips` are drawn, by a generator that is seeded by
    `name`, and what was seen counts as one of them, so that p is never 0 and never too small (Phipson and Smyth 2010).
    """
    numbers = np.asarray(differences, np.float64)
    numbers = numbers[numbers != 0]
    count = numbers.size
    if not count:
        return 1.0
    # Sums of the same numbers in another order differ in their last bits, and equal ones must count as equal.
    size = abs(numbers.sum()) - 1e-9 * np.abs(numbers).sum()
    if count <= EXACT:
        masks = np.arange(1 << count)[:, None] >> np.arange(count) & 1
        return float(np.mean(np.abs((1 - 2 * masks) @ numbers) >= size))
    generator = np.random.default_rng(named_seed("permutation", *name))
    extreme, block = 0, max(1, BLOCK // count)
    for start in range(0, flips, block):
        signs = 1 - 2 * generator.integers(0, 2, (min(block, flips - start), count), np.int8)
        extreme += int((np.abs(signs @ numbers) >= size).sum())
    return (1 + extreme) / (1 + flips)
