"""One step's sampling on one rank: its engine takes prompts, its groups are graded while others are sampled.

    board ──▶ prompt ──▶ G requests ──▶ completions ──▶ group ──▶ journal, graders ──▶ verdicts ──▶ journal, board
                 └─────────── in the journal already ─────▶

All ranks of an engine hold the same completions: its leaders share out the groups.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from ..batch import Answered, Group, Prompt, Rollout, Segment, Verdict
from ..config import RewardOptions, RolloutOptions, TrainerOptions
from ..data.order import rollout_seed
from ..data.prompts import Prompts
from ..data.tokenizer import Tokenizer
from ..ranks.groups import Ranks
from ..reward.grader import grader_of
from ..reward.reward import score
from ..run.journal import Journal
from ..run.stop import Interrupt
from ..telemetry.catalogue import Phase
from ..telemetry.clock import CLOCK, phase
from .board import NO_MORE, NOTHING_NOW, Board
from .engine import Completion, Engine, Request

THOUGHTS = "<think>"
POLL_SECONDS = 0.01  # between two looks of an engine that has nothing to sample
PATIENCE_SECONDS = 0.5  # the same, while it waits for verdicts of its own


class Graders(Protocol):
    def submit(self, items: Sequence[Answered]) -> Future[list[Verdict]]:
        """Their verdicts to come, in their order."""


@dataclass
class Sampler:
    """What all steps of a run are sampled and graded with."""

    ranks: Ranks
    tokenizer: Tokenizer
    trainer: TrainerOptions
    rollout: RolloutOptions
    reward: RewardOptions
    journal: Journal
    interrupt: Interrupt
    engine: Engine
    prompts: Prompts
    graders: Graders


class Sampling:
    def __init__(self, step: int, sampler: Sampler, board: Board, counts: Callable[[Group], bool]) -> None:
        """`counts`: whether the step may train on a group."""
        self.recalled = 0  # groups that a run of before had finished
        self.seconds = self.idle = 0.0  # of sampling, and how many of them this rank's engine had nothing to sample
        self._step, self._by, self._board, self._counts = step, sampler, board, counts
        self._owners: list[tuple[Prompt, int, int]] = []  # of each request: its prompt, sample and seed
        self._open: dict[int, Group] = {}  # index of a prompt → its group as far as it is sampled; here, of any leader
        self._starved = False  # whether there was no prompt to take the last time
        self._led: set[int] = set()  # indices of the prompts that this rank answers for
        self._finished: dict[int, Group] = {}
        self._grading: dict[int, Future[list[Verdict]]] = {}

    def run(self) -> str | None:
        """Samples and grades until there is no more to take; returns why it ended early, if it did."""
        start, reason = time.monotonic(), None
        with phase(Phase.ROLLOUT):
            steps = self._by.engine.sample(self._requests(), room=self._by.rollout.max_sequences)
            with contextlib.closing(steps) as engine_steps:
                for completions in engine_steps:
                    if self._open:  # a sign of life; who waits for others gives none: so it shows where they are stuck
                        CLOCK.beat()
                    for number, completion in completions:
                        self._take(*self._owners[number], completion)
                    self._settle()
                    if reason := self._reason_to_stop(time.monotonic() - start):
                        break
                    if self._starved and not self._open:
                        self._wait()
            if reason and self._by.ranks.engine_rank == 0:
                self._board.leave()
            CLOCK.idle += self.idle
            self.seconds = time.monotonic() - start
        if reason is None:
            with phase(Phase.REWARD):
                while self._grading:
                    self._settle(PATIENCE_SECONDS)
            reason = self._by.interrupt.due(Phase.REWARD, Phase.SCORE)
        return reason

    def groups(self) -> list[Group]:
        """The groups that this rank answers for, in prompt order."""
        return [self._finished[index] for index in sorted(self._finished)]

    def _requests(self) -> Iterator[Request | None]:
        while (index := self._board.take(len(self._open))) != NO_MORE:
            self._starved = index == NOTHING_NOW
            if self._starved:
                yield None
                continue
            prompt = self._by.prompts.at(index)
            leads = self._by.ranks.topology.leader(index, self._by.ranks.engine) == self._by.ranks.rank
            if leads:
                self._led.add(prompt.index)
            if known := self._by.journal.group(self._step, prompt, self._by.tokenizer.decode):
                if leads:
                    self._recall(*known)
                continue
            self._open[prompt.index] = Group(prompt, [])
            for sample in range(self._by.trainer.rollouts_per_prompt):
                seed = rollout_seed(self._by.trainer.seed, self._step, prompt.id, sample)
                self._owners.append((prompt, sample, seed))
                yield Request(prompt.tokens, seed)

    def _recall(self, group: Group, graded: bool) -> None:
        self.recalled += 1
        self._finished[group.prompt.index] = group
        if graded:
            self._say([group])
        else:
            self._submit(group)

    def _take(self, prompt: Prompt, sample: int, seed: int, completion: Completion) -> None:
        group, leads = self._open[prompt.index], prompt.index in self._led
        rollout = Rollout(
            prompt=prompt,
            sample=sample,
            seed=seed,
            step=self._step,
            tokens=completion.tokens,
            logprobs=completion.logprobs,
            finish=completion.finish,
            text=self._by.tokenizer.decode(completion.tokens) if leads else "",
            segments=(Segment(len(completion.tokens), self._by.engine.weight_version),),
            routes=completion.routes,
        )
        group.rollouts.append(rollout)
        if len(group.rollouts) < self._by.trainer.rollouts_per_prompt:
            return
        del self._open[prompt.index]
        if leads:
            group.rollouts.sort(key=lambda each: each.sample)
            self._by.journal.add_group(self._step, group)
            self._finished[prompt.index] = group
            self._submit(group)

    def _submit(self, group: Group) -> None:
        self._grading[group.prompt.index] = self._by.graders.submit([_answered(rollout) for rollout in group.rollouts])

    def _settle(self, patience: float = 0.0) -> None:
        """Takes the verdicts that are there, after waiting for the first of them."""
        if patience:
            concurrent.futures.wait(self._grading.values(), patience, concurrent.futures.FIRST_COMPLETED)
        done = [self._finished[index] for index, verdicts in self._grading.items() if verdicts.done()]
        for group in done:
            verdicts = self._grading.pop(group.prompt.index).result()
            for rollout, verdict in zip(group.rollouts, verdicts, strict=True):
                rollout.verdict = verdict
                length = len(rollout.tokens)
                rollout.reward = score(length, rollout.finish, verdict, self._by.reward, self._by.rollout.max_tokens)
        self._by.journal.add_verdicts(self._step, done)
        self._say(done)

    def _say(self, groups: Sequence[Group]) -> None:
        self._board.say({group.prompt.index: self._counts(group) for group in groups})

    def _wait(self) -> None:
        """There is nothing to sample: verdicts are missing, of this rank or of others."""
        start = time.monotonic()
        if self._grading:
            self._settle(PATIENCE_SECONDS)
        else:
            time.sleep(POLL_SECONDS)
        self.idle += time.monotonic() - start

    def _reason_to_stop(self, elapsed: float) -> str | None:
        """Why this rank's engine is to stop sampling after this step, the same on all of its ranks; None: it is not.

        `elapsed`: seconds that it sampled, whose unfinished rollouts would be lost.
        """
        reason = self._by.interrupt.due(Phase.REWARD, Phase.SCORE)
        worth = self._by.interrupt.worth_finishing(Phase.ROLLOUT, elapsed, elapsed, Phase.REWARD, Phase.SCORE)
        wants = reason is not None and not worth
        return (reason or "another rank of the engine") if self._by.ranks.any_of_engine(wants) else None


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
