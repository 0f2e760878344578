"""One step's groups: sample, grade, keep those with spread, in prompt order.

Engines take prompt after prompt until enough groups count (schedule/refill.py, board.py, sample.py); every engine's
leaders grade what it sampled; the outcomes (not the tokens) are merged on all ranks. Groups are accepted in *prompt
order*, never in order of arrival, which would favour short answers. Groups with spread beyond the step's need are
carried into the next step, so that no finished work is lost. Tokens travel only within the model replica that trains on
them.

Every group goes into the journal as it is finished, and one that a run of before finished is taken from there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ..batch import Collected, Group, Rollout
from ..config import NoProcess, Process
from ..errors import Interrupted, RunFailed
from ..ranks.agree import first
from ..schedule.refill import Refill, Share
from .balance import gather_rollouts
from .board import Board
from .sample import Sampler, Sampling
from .tally import merged, metrics_of, tally

NO_PROCESS = NoProcess()


class Intake:
    """Takes in one step's groups after the other; holds the surplus that is carried over."""

    def __init__(self, sampler: Sampler, process: Process = NO_PROCESS) -> None:
        self.sampler, self.process = sampler, process
        self._surplus: list[int] = []  # prompt indices with spread, known to all ranks
        self._own: dict[int, Group] = {}  # those of them that this rank's engine sampled
        self._empty_steps = 0
        self._share = Share()  # of groups that count
        self._store = sampler.ranks.store_of("rollout")

    def next(self, step: int) -> Collected:
        """The accepted groups of one step. Collective over all ranks.

        Raises RunFailed when grading itself fails too often, and when `trainer.max_empty_steps` steps in a row found no
        group with spread; Interrupted when any rank is to stop, with what was finished in the journal.
        """
        ranks, prompts = self.sampler.ranks, self.sampler.prompts
        wanted, carried = self.sampler.trainer.prompts_per_step, set(self._surplus)
        most = self.sampler.rollout.max_batches * wanted
        refill = Refill(max(0, wanted - len(carried)), wanted, most, self._share)
        board = Board(ranks, self._store, prompts.position, refill)
        sampling = Sampling(step, self.sampler, board, self._counts)
        reason = ranks.agree("stop the rollout", sampling.run(), first)
        if ranks.rank == 0:
            board.clear()
        if reason:
            raise Interrupted(reason)
        sampled = sampling.groups()
        self._own |= {group.prompt.index: group for group in sampled if self._counts(group)}
        spent = (sampling.seconds, sampling.idle) if ranks.engine_rank == 0 else (0.0, 0.0)  # once an engine
        mine = tally(sampled, self._counts, prompts.way_of, sampling.recalled, *spent)
        outcome = ranks.agree("groups", mine, merged)
        totals, tried = outcome["counts"], int(outcome["counts"]["groups"])
        prompts.position += tried
        self._share = self._share.after(len(outcome["wanted"]), tried)
        indices = [*self._surplus, *outcome["wanted"]]
        accepted, self._surplus = indices[:wanted], indices[wanted:]
        owned = [self._own.pop(index) for index in accepted if index in self._own]
        rollouts = [rollout for group in owned for rollout in group.rollouts]
        groups = _groups(gather_rollouts(ranks, rollouts, prompts.at))
        self._check(step, totals, bool(accepted), sampled)
        return Collected(
            groups=groups,
            sampled=sampled,
            accepted=accepted,
            metrics=metrics_of(totals, prompts.way_of is not None, self.process)
            | {
                "rollout/kept_groups": len(accepted),
                "rollout/carried_groups": len(carried.intersection(accepted)),
            },
        )

    def _counts(self, group: Group) -> bool:
        """Whether a step may train on a group."""
        return group.has_spread if self.sampler.rollout.dynamic_sampling else bool(group.valid)

    def state(self) -> dict[str, Any]:
        """What all ranks know alike; `held` has the groups themselves."""
        share = [self._share.kept, self._share.tried]
        return {"surplus": list(self._surplus), "empty_steps": self._empty_steps, "share": share}

    def restore(self, state: dict[str, Any]) -> None:
        self._surplus, self._empty_steps = list(state["surplus"]), state["empty_steps"]
        self._share = Share(*state["share"])

    def held(self) -> list[Group]:
        """The groups that are carried over and that this rank answers for."""
        return list(self._own.values())

    def take_over(self, groups: Iterable[Group]) -> None:
        """Makes this rank answer for carried-over groups, which some rank held when they were saved."""
        self._own = {group.prompt.index: group for group in groups}

    def _check(self, step: int, totals: dict[str, float], any_accepted: bool, groups: list[Group]) -> None:
        sampled = totals["sampled"]
        if sampled and totals["invalid"] / sampled > self.sampler.reward.max_invalid_rate:
            verdicts = [rollout.verdict for group in groups for rollout in group.rollouts]
            reasons = Counter(verdict.reason for verdict in verdicts if verdict.outcome == "invalid")
            commonest = "".join(f": {reason}" for reason, _ in reasons.most_common(1))  # of this rank's own
            raise RunFailed(
                f"step {step}: grading failed for {totals['invalid']:.0f} of {sampled:.0f} responses, more than "
                f"reward.max_invalid_rate = {self.sampler.reward.max_invalid_rate:g}{commonest}"
            )
        self._empty_steps = 0 if any_accepted else self._empty_steps + 1
        if self._empty_steps >= self.sampler.trainer.max_empty_steps:
            raise RunFailed(
                f"step {step}: no group with both correct and wrong responses for {self._empty_steps} steps in a row "
                f"(trainer.max_empty_steps); the correct rate was {totals['correct'] / sampled:.3f} over "
                f"{sampled:.0f} responses: the task is too hard or too easy for this model, or no answer is recognised"
            )


def _groups(rollouts: Sequence[Rollout]) -> list[Group]:
    """Groups in prompt order."""
    by_prompt: dict[int, Group] = {}
    for rollout in rollouts:
        by_prompt.setdefault(rollout.prompt.index, Group(rollout.prompt, [])).rollouts.append(rollout)
    return [by_prompt[index] for index in sorted(by_prompt)]
