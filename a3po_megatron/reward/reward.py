"""A verdict as a number, with DAPO's soft penalty for responses that come near the length limit (arXiv 2503.14476)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..batch import Verdict

if TYPE_CHECKING:
    from ..config import RewardOptions


def score(rollout_length: int, finish: str, verdict: Verdict, options: RewardOptions, max_tokens: int) -> float:
    """The reward of one response: never a change of polarity, which is the verdict's alone; 0 where grading failed."""
    if verdict.outcome == "invalid":
        return 0.0
    base = options.correct if verdict.outcome == "correct" else options.wrong
    if options.overlong_tokens == 0:
        return base
    over = rollout_length - (max_tokens - options.overlong_tokens)
    return base + options.overlong_penalty * max(-1.0, min(-over / options.overlong_tokens, 0.0))
