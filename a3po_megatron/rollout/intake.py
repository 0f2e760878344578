"""One step's groups: sample, grade, keep those with spread, in prompt order.

Dynamic sampling runs in rounds. Prompts of a round are dealt over the engines; every engine's leaders grade what it
sampled; the outcomes (not the tokens) are merged on all ranks. Groups are accepted in *prompt order*, never in order of
arrival, which would favour short answers. Groups with spread beyond the step's need are carried into the next step, so
that no finished work is lost. Tokens travel only within the model replica that trains on them.

Every group goes into the journal as it is finished, and one that a run of before finished is taken from there.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np

from ..batch import Answered, Collected, Group, Prompt, Rollout, Segment, Verdict
from ..config import NoProcess, Process, RewardOptions, RolloutOptions, TrainerOptions
from ..data.arithmetic import STEPWISE
from ..data.order import rollout_seed
from ..data.prompts import Prompts
from ..data.tokenizer import Tokenizer
from ..errors import Interrupted, RunFailed
from ..ranks.agree import first
from ..ranks.groups import Ranks
from ..reward.grader import grader_of
from ..reward.reward import score
from ..run.journal import Journal
from ..run.stop import Interrupt
from ..telemetry.catalogue import Phase
from ..telemetry.clock import CLOCK, phase
from .balance import gather_rollouts
from .engine import Engine, Request

_COUNTS = (
    *("sampled", "correct", "invalid", "truncated", "length", "reward", "stepwise"),
    *("with_steps", "steps", "step_score", "groups", "spread", "phrases", "repeated"),
)
PHRASE = 4  # tokens of what counts as a repetition


THOUGHTS = "<think>"
NO_PROCESS = NoProcess()


class Graders(Protocol):
    def submit(self, items: Sequence[Answered]) -> Future[list[Verdict]]:
        """Their verdicts to come, in their order."""


_Grading = tuple[Group, Future[list[Verdict]]]


class Intake:
    """Takes in one step's groups after the other; holds the surplus that is carried over."""

    def __init__(
        self,
        ranks: Ranks,
        tokenizer: Tokenizer,
        trainer: TrainerOptions,
        rollout: RolloutOptions,
        reward: RewardOptions,
        journal: Journal,
        interrupt: Interrupt,
        engine: Engine,
        prompts: Prompts,
        graders: Graders,
        process: Process = NO_PROCESS,
    ) -> None:
        self.ranks, self.tokenizer = ranks, tokenizer
        self.engine, self.prompts, self.graders = engine, prompts, graders
        self.trainer, self.rollout, self.reward, self.process = trainer, rollout, reward, process
        self.journal, self.interrupt = journal, interrupt
        self._surplus: list[int] = []  # prompt indices with spread, known to all ranks
        self._own: dict[int, Group] = {}  # those of them that this rank's engine sampled
        self._empty_steps = 0
        self._recalled = 0  # groups of this step that a run of before had finished

    def next(self, step: int) -> Collected:
        """The accepted groups of one step. Collective over all ranks.

        Raises RunFailed when grading itself fails too often, and when `trainer.max_empty_steps` steps in a row found no
        group with spread; Interrupted when any rank is to stop, with what was finished in the journal.
        """
        wanted = self.trainer.prompts_per_step
        indices = list(self._surplus)
        carried = set(indices)
        sampled: list[Group] = []
        self._recalled = 0
        totals = dict.fromkeys(_COUNTS, 0.0)
        rounds = tried = 0
        while len(indices) < wanted and rounds < self.rollout.max_rounds:
            fresh = len(indices) - len(carried)
            missing = wanted - len(indices)
            # Later rounds allow for the share of prompts that gave spread so far.
            count = missing if not fresh else min(wanted, math.ceil(missing * tried / fresh))
            groups, grading, reason = self._sample(self.prompts.take(count), step)
            if reason is None:
                self._grade(grading, step)
                reason = self.interrupt.due(Phase.REWARD, Phase.SCORE)
            if reason := self.ranks.agree("stop the rollout", reason, first):
                raise Interrupted(reason)
            sampled += groups
            self._own |= {group.prompt.index: group for group in groups if self._counts(group)}
            outcome = self.ranks.agree("round", _outcome(groups, self._counts, self.prompts.way_of), _merge)
            indices += outcome["wanted"]
            totals = {name: totals[name] + outcome["counts"][name] for name in _COUNTS}
            rounds, tried = rounds + 1, tried + count
        accepted, self._surplus = indices[:wanted], indices[wanted:]
        mine = [self._own.pop(index) for index in accepted if index in self._own]
        rollouts = [rollout for group in mine for rollout in group.rollouts]
        groups = _groups(gather_rollouts(self.ranks, rollouts, self.prompts.at))
        self._check(step, totals, bool(accepted), sampled)
        return Collected(
            groups=groups,
            sampled=sampled,
            accepted=accepted,
            metrics=_metrics(totals, self.prompts.way_of is not None)
            | _metrics_of_steps(totals, self.process)
            | {
                "rollout/kept_groups": len(accepted),
                "rollout/carried_groups": len(carried.intersection(accepted)),
                "rollout/rounds": rounds,
                "perf/recalled_groups": self.ranks.agree("recalled", self._recalled, sum),
            },
        )

    def _counts(self, group: Group) -> bool:
        """Whether a step may train on a group."""
        return group.has_spread if self.rollout.dynamic_sampling else bool(group.valid)

    def _sample(self, prompts: list[Prompt], step: int) -> tuple[list[Group], list[_Grading], str | None]:
        """The groups that this rank answers for, the verdicts to come of those that had none yet, and why the rest was
        left, if it was.

        All ranks of an engine hold the same completions: its leaders share them out.
        """
        with phase(Phase.ROLLOUT):
            start, before, leaders = time.monotonic(), CLOCK.seconds[Phase.ROLLOUT], self.ranks.engine_leaders
            mine = prompts[self.ranks.engine :: self.ranks.engines]
            place = leaders.index(self.ranks.rank) if self.ranks.rank in leaders else len(mine)
            led = {prompt.index for prompt in mine[place :: len(leaders)]}
            known = {prompt.index: self.journal.group(step, prompt, self.tokenizer.decode) for prompt in mine}
            finished_groups = {index: entry for index, entry in known.items() if entry is not None}
            self._recalled += len(led & finished_groups.keys())
            asked = [prompt for prompt in mine if prompt.index not in finished_groups]
            draws = [(prompt, sample) for prompt in asked for sample in range(self.trainer.rollouts_per_prompt)]
            seeds = [rollout_seed(self.trainer.seed, step, prompt.id, sample) for prompt, sample in draws]
            requests = [Request(prompt.tokens, seed) for (prompt, _), seed in zip(draws, seeds, strict=True)]
            begun = {prompt.index: Group(prompt, []) for prompt in asked}
            reason = None
            ungraded = [group for index, (group, graded) in finished_groups.items() if index in led and not graded]
            grading = {group.prompt.index: _submitted(self.graders, group) for group in ungraded}
            with contextlib.closing(self.engine.sample(requests)) as engine_steps:
                for finished in engine_steps:
                    CLOCK.beat()
                    for number, completion in finished:
                        prompt, sample = draws[number]
                        group = begun[prompt.index]
                        if prompt.index in led:
                            sampled = Segment(len(completion.tokens), self.engine.weight_version)
                            group.rollouts.append(
                                Rollout(
                                    prompt=prompt,
                                    sample=sample,
                                    seed=seeds[number],
                                    step=step,
                                    tokens=completion.tokens,
                                    logprobs=completion.logprobs,
                                    finish=completion.finish,
                                    text=self.tokenizer.decode(completion.tokens),
                                    segments=(sampled,),
                                    routes=completion.routes,
                                )
                            )
                        if len(group.rollouts) == self.trainer.rollouts_per_prompt:
                            group.rollouts.sort(key=lambda rollout: rollout.sample)
                            self.journal.add_group(step, group)
                            finished_groups[prompt.index] = group, False
                            grading[prompt.index] = _submitted(self.graders, group)
                    reason = self._reason_to_stop(before, time.monotonic() - start)
                    if reason:
                        break
            groups = [
                finished_groups[prompt.index][0] for prompt in mine if prompt.index in led & finished_groups.keys()
            ]
            return groups, [grading[prompt.index] for prompt in mine if prompt.index in grading], reason

    def _reason_to_stop(self, before: float, elapsed: float) -> str | None:
        """Why this rank's engine is to stop sampling after this step, the same on all of its ranks; None: it is not.

        `before`: seconds of the step's earlier rounds, which are safe; `elapsed`: of this one, whose unfinished
        rollouts would be lost.
        """
        reason = self.interrupt.due(Phase.REWARD, Phase.SCORE)
        worth = self.interrupt.worth_finishing(Phase.ROLLOUT, before + elapsed, elapsed, Phase.REWARD, Phase.SCORE)
        wants = reason is not None and not worth
        return (reason or "another rank of the engine") if self.ranks.any_of_engine(wants) else None

    def _grade(self, grading: list[_Grading], step: int) -> None:
        """Waits for the last verdicts: most came while others were sampled."""
        with phase(Phase.REWARD):
            for group, verdicts in grading:
                for rollout, verdict in zip(group.rollouts, verdicts.result(), strict=True):
                    rollout.verdict = verdict
                    length = len(rollout.tokens)
                    rollout.reward = score(length, rollout.finish, verdict, self.reward, self.rollout.max_tokens)
            self.journal.add_verdicts(step, [group for group, _ in grading])

    def state(self) -> dict[str, Any]:
        """What all ranks know alike; `held` has the groups themselves."""
        return {"surplus": list(self._surplus), "empty_steps": self._empty_steps}

    def restore(self, state: dict[str, Any]) -> None:
        self._surplus, self._empty_steps = list(state["surplus"]), state["empty_steps"]

    def held(self) -> list[Group]:
        """The groups that are carried over and that this rank answers for."""
        return list(self._own.values())

    def take_over(self, groups: Iterable[Group]) -> None:
        """Makes this rank answer for carried-over groups, which some rank held when they were saved."""
        self._own = {group.prompt.index: group for group in groups}

    def _check(self, step: int, totals: dict[str, float], any_accepted: bool, groups: list[Group]) -> None:
        sampled = totals["sampled"]
        if sampled and totals["invalid"] / sampled > self.reward.max_invalid_rate:
            verdicts = [rollout.verdict for group in groups for rollout in group.rollouts]
            reasons = Counter(verdict.reason for verdict in verdicts if verdict.outcome == "invalid")
            commonest = "".join(f": {reason}" for reason, _ in reasons.most_common(1))  # of this rank's own
            raise RunFailed(
                f"step {step}: grading failed for {totals['invalid']:.0f} of {sampled:.0f} responses, more than "
                f"reward.max_invalid_rate = {self.reward.max_invalid_rate:g}{commonest}"
            )
        self._empty_steps = 0 if any_accepted else self._empty_steps + 1
        if self._empty_steps >= self.trainer.max_empty_steps:
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


def _submitted(graders: Graders, group: Group) -> _Grading:
    return group, graders.submit([_answered(rollout) for rollout in group.rollouts])


def opened_thoughts(prompt: str) -> str:
    """What belongs before a response: a prompt may have opened the thoughts that it closes."""
    return THOUGHTS if prompt.rstrip().endswith(THOUGHTS) else ""


def _answered(rollout: Rollout) -> Answered:
    prompt = rollout.prompt
    opened = opened_thoughts(prompt.text)
    problem = prompt.text if grader_of(prompt.grader).problem else ""
    return Answered(
        opened + rollout.text,
        prompt.answer,
        rollout.finish == "stop",
        grader=prompt.grader,
        problem=problem,
        opened=len(opened),
    )


def _outcome(
    groups: list[Group], counts: Callable[[Group], bool], way_of: Callable[[str], str] | None
) -> dict[str, Any]:
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
            "reward": math.fsum(r.reward for r in rollouts),
            "stepwise": sum(way_of(r.text) == STEPWISE for r in rollouts) if way_of else 0,
            "with_steps": sum(bool(r.verdict.steps) for r in rollouts),
            "steps": sum(len(r.verdict.steps) for r in rollouts),
            "step_score": math.fsum(step.score for r in rollouts for step in r.verdict.steps),
        },
    }


def _merge(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums counts and sorts by prompt: the same for any number of engines."""
    return {
        "wanted": sorted(index for outcome in outcomes for index in outcome["wanted"]),
        "counts": {name: math.fsum(outcome["counts"][name] for outcome in outcomes) for name in _COUNTS},
    }


def repeated_phrases(tokens: np.ndarray) -> tuple[int, int]:
    """Returns how many runs of PHRASE tokens a response has, and how many of them stood in it before."""
    numbers = tokens.tolist()
    phrases = list(zip(*(numbers[start:] for start in range(PHRASE)), strict=False))
    return len(phrases), len(phrases) - len(set(phrases))


def _metrics(totals: dict[str, float], has_ways: bool) -> dict[str, float | None]:
    """Over all sampled rollouts, before any group is dropped; None where nothing was sampled (all carried over), and
    of ways of answering where the task names none."""
    sampled = totals["sampled"]
    stepwise = totals["stepwise"] / sampled if sampled and has_ways else None
    return {
        "reward/mean": totals["reward"] / sampled if sampled else None,
        "reward/correct_rate": totals["correct"] / sampled if sampled else None,
        "reward/invalid_rate": totals["invalid"] / sampled if sampled else None,
        "rollout/length_mean": totals["length"] / sampled if sampled else None,
        "rollout/truncated_rate": totals["truncated"] / sampled if sampled else None,
        "rollout/repetition_rate": totals["repeated"] / totals["phrases"] if totals["phrases"] else None,
        "rollout/spread_rate": totals["spread"] / totals["groups"] if totals["groups"] else None,
        "rollout/tokens": totals["length"],
        "task/stepwise_rate": stepwise,
        "task/at_once_rate": None if stepwise is None else 1 - stepwise,
    }


def _metrics_of_steps(totals: dict[str, float], process: Process) -> dict[str, float | None]:
    """Likewise; None in a run without process rewards."""
    off, sampled, steps = isinstance(process, NoProcess), totals["sampled"], totals["steps"]
    return {
        "reward/steps_rate": None if off or not sampled else totals["with_steps"] / sampled,
        "reward/steps_mean": None if off or not sampled else steps / sampled,
        "reward/step_score_mean": None if off or not steps else totals["step_score"] / steps,
    }
