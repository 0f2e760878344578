"""The reward of a rollout: the verdict's value and DAPO's soft overlong penalty."""

from __future__ import annotations

import pytest

from a3po_megatron.batch import Verdict
from a3po_megatron.config import RewardOptions
from a3po_megatron.reward.reward import score

CORRECT, WRONG, INVALID = Verdict("correct"), Verdict("wrong", "no answer"), Verdict("invalid", "killed")


def test_without_a_buffer_the_reward_is_the_verdicts_value_at_every_length() -> None:
    options = RewardOptions(correct=2.0, wrong=-1.0)
    for length in (1, 50, 100):
        assert score(length, "stop", CORRECT, options, 100) == 2.0
        assert score(length, "length", WRONG, options, 100) == -1.0
    assert RewardOptions().correct == 1.0
    assert RewardOptions().wrong == 0.0
    assert RewardOptions().overlong_tokens == 0


def dapo(length: int, max_tokens: int, buffer: int) -> float:
    """arXiv 2503.14476, equation 13, case by case as it is printed there."""
    if length <= max_tokens - buffer:
        return 0.0
    if length <= max_tokens:
        return ((max_tokens - buffer) - length) / buffer
    return -1.0


@pytest.mark.parametrize("verdict", [CORRECT, WRONG])
@pytest.mark.parametrize("penalty", [1.0, 0.5])
def test_the_penalty_is_dapos_equation_13_times_its_largest_value(verdict: Verdict, penalty: float) -> None:
    options = RewardOptions(overlong_tokens=40, overlong_penalty=penalty)
    base = 1.0 if verdict is CORRECT else 0.0
    for length in range(1, 140):
        found = score(length, "stop", verdict, options, 100)
        assert found == pytest.approx(base + penalty * dapo(length, 100, 40), abs=1e-12)


def test_the_penalty_never_exceeds_its_largest_value() -> None:
    options = RewardOptions(overlong_tokens=10, overlong_penalty=0.25)
    assert score(10_000, "stop", CORRECT, options, 100) == 0.75
    assert score(90, "stop", CORRECT, options, 100) == 1.0
    assert score(91, "stop", CORRECT, options, 100) == pytest.approx(1.0 - 0.025)


def test_a_response_that_was_cut_off_counts_as_long_as_the_limit() -> None:
    options = RewardOptions(overlong_tokens=40)
    assert score(30, "length", WRONG, options, 100) == -1.0  # the context ended before max_tokens did
    assert score(30, "stop", WRONG, options, 100) == 0.0


def test_an_invalid_verdict_is_worth_nothing_and_pays_no_penalty() -> None:
    options = RewardOptions(correct=2.0, wrong=-1.0, overlong_tokens=40)
    assert score(100, "length", INVALID, options, 100) == 0.0
