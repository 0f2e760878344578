"""What a step's sampling came to: counts of every rank's groups, their sum over all ranks, and the metrics of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..batch import Group
from ..config import NoProcess, Process
from ..data.arithmetic import STEPWISE

_COUNTS = (
    *("sampled", "correct", "invalid", "truncated", "length", "stepwise", "with_steps", "steps"),
    *("groups", "spread", "phrases", "repeated", "recalled", "seconds", "idle"),
)
_SUMS = ("reward", "step_score")
PHRASE = 4  # tokens of what counts as a repetition


def tally(
    groups: list[Group],
    counts: Callable[[Group], bool],  # whether a step may train on a group
    way_of: Callable[[str], str] | None,
    recalled: int,
    seconds: float,  # of sampling
    idle: float,  # of these, with nothing to sample
) -> dict[str, Any]:
    """One rank's: {"wanted": indices of the prompts whose groups count, "counts": …, "sums": …}."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    repetition = [repeated_phrases(rollout.tokens) for rollout in rollouts]
    return {
        "wanted": [group.prompt.index for group in groups if counts(group)],
        "counts": {
            "sampled": len(rollouts),
            "correct": sum(r.verdict.outcome == "correct" for r in rollouts),
            "invalid": sum(r.verdict.outcome == "invalid" for r in rollouts),
            "truncated": sum(r.finish == "length" for r in rollouts),
            "phrases": sum(phrases for phrases, _ in repetition),
            "repeated": sum(repeated for _, repeated in repetition),
            "groups": len(groups),
            "spread": sum(group.has_spread for group in groups),
            "length": sum(len(r.tokens) for r in rollouts),
            "stepwise": sum(way_of(r.text) == STEPWISE for r in rollouts) if way_of else 0,
            "with_steps": sum(bool(r.verdict.steps) for r in rollouts),
            "steps": sum(len(r.verdict.steps) for r in rollouts),
            "recalled": recalled,
            "seconds": seconds,
            "idle": idle,
        },
        # Group by group: the sum of all is rounded once, whoever sampled which.
        "sums": {
            "reward": [math.fsum(r.reward for r in group.rollouts) for group in groups],
            "step_score": [math.fsum(s.score for r in group.rollouts for s in r.verdict.steps) for group in groups],
        },
    }


def merged(tallies: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums counts and sorts by prompt: the same for any number of engines."""
    return {
        "wanted": sorted(index for each in tallies for index in each["wanted"]),
        "counts": {name: math.fsum(each["counts"][name] for each in tallies) for name in _COUNTS}
        | {name: math.fsum(value for each in tallies for value in each["sums"][name]) for name in _SUMS},
    }


def repeated_phrases(tokens: np.ndarray) -> tuple[int, int]:
    """Returns how many runs of PHRASE tokens a response has, and how many of them stood in it before."""
    numbers = tokens.tolist()
    phrases = list(zip(*(numbers[start:] for start in range(PHRASE)), strict=False))
    return len(phrases), len(phrases) - len(set(phrases))


def metrics_of(totals: dict[str, float], has_ways: bool, process: Process) -> dict[str, float | None]:
    """Over all sampled rollouts, before any group is dropped; None where nothing was sampled (all carried over), of
    ways of answering where the task names none, and of steps in a run without process rewards."""
    sampled, steps, off = totals["sampled"], totals["steps"], isinstance(process, NoProcess)
    stepwise = totals["stepwise"] / sampled if sampled and has_ways else None
    return {
        "reward/mean": totals["reward"] / sampled if sampled else None,
        "reward/correct_rate": totals["correct"] / sampled if sampled else None,
        "reward/invalid_rate": totals["invalid"] / sampled if sampled else None,
        "reward/steps_rate": None if off or not sampled else totals["with_steps"] / sampled,
        "reward/steps_mean": None if off or not sampled else steps / sampled,
        "reward/step_score_mean": None if off or not steps else totals["step_score"] / steps,
        "rollout/length_mean": totals["length"] / sampled if sampled else None,
        "rollout/truncated_rate": totals["truncated"] / sampled if sampled else None,
        "rollout/repetition_rate": totals["repeated"] / totals["phrases"] if totals["phrases"] else None,
        "rollout/spread_rate": totals["spread"] / totals["groups"] if totals["groups"] else None,
        "rollout/tokens": totals["length"],
        "rollout/sampled_groups": totals["groups"],
        "task/stepwise_rate": stepwise,
        "task/at_once_rate": None if stepwise is None else 1 - stepwise,
        "perf/recalled_groups": totals["recalled"],
        "perf/engine_idle_share": totals["idle"] / totals["seconds"] if totals["seconds"] else None,
    }
