"""The reward of a rollout, from its verdict and its length.

    R = base(verdict) + penalty * clip(-(L - (Lmax - Lc)) / Lc, -1, 0)

Lmax is rollout.max_tokens and Lc the soft buffer before it (DAPO, arXiv 2503.14476, equation 13). The penalty shapes
the score only: polarity is the verifier's verdict and is read from the verdict, never from the sign of a reward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..batch import Verdict

if TYPE_CHECKING:
    from ..config import RewardOptions


def score(
    rollout_length: int,  # response tokens, the end-of-sequence token included
    finish: str,  # stop | length
    verdict: Verdict,
    options: RewardOptions,  # correct, wrong, overlong_tokens (Lc; 0 is off), overlong_penalty
    max_tokens: int,  # Lmax
) -> float:
    """The scalar reward; 0 for an invalid verdict, which leaves its group before the reward is used.

    A response that was cut off counts as Lmax long, whatever limit it met: a context shorter than prompt plus
    max_tokens also ends responses, and at a smaller length.
    """
    if verdict.outcome == "invalid":
        return 0.0
    base = options.correct if verdict.outcome == "correct" else options.wrong
    buffer = options.overlong_tokens
    if buffer == 0:
        return base
    length = max_tokens if finish == "length" else rollout_length
    excess = (length - (max_tokens - buffer)) / buffer
    return base - options.overlong_penalty * min(max(excess, 0.0), 1.0)
