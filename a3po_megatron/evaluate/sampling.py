"""Asks the engines one benchmark: prompts are pulled by whoever has room, verdicts come while others are sampled.

    numbers of open problems ──▶ an engine that has room takes the next ──▶ n samples ──▶ graders ──▶ finished.py

Which engine answers which problem is a matter of time, and nothing else is: a sample's seed follows from its name, so
that the result is the same for any number of engines, however fast each is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from .. import __version__
from ..batch import Answered, Verdict
from ..data.tokenizer import Tokenizer
from ..errors import Interrupted, RequestError, RunFailed
from ..files.writer import Writer
from ..ranks.agree import first
from ..ranks.groups import Ranks
from ..reward.grader import grader_of
from ..rollout.engine import Engine, Request
from ..rollout.sample import Graders, opened_thoughts
from ..run.stop import Interrupt
from ..telemetry.catalogue import Phase
from ..telemetry.clock import CLOCK, phase
from ..telemetry.versions import installed
from .finished import Finished
from .problems import Problem
from .progress import Progress
from .request import Asked, Source
from .result import FORMAT, Model, Result, Sample, graded, read, write
from .summary import summarise


@dataclasses.dataclass
class _Open:
    """A problem that is being answered."""

    number: int
    problem: Problem
    seeds: list[int]
    samples: dict[int, Sample] = dataclasses.field(default_factory=dict)  # not graded yet


class Evaluation:
    """Asks one benchmark after the other with the weights that the engines hold."""

    def __init__(
        self,
        ranks: Ranks,
        engine: Engine,
        tokenizer: Tokenizer,
        graders: Graders,
        interrupt: Interrupt,
        folder: Path,
        max_sequences: int,  # rollout.max_sequences
        writer: Writer,
    ) -> None:
        self._ranks, self._engine, self._tokenizer = ranks, engine, tokenizer
        self._graders, self._interrupt, self._folder = graders, interrupt, folder
        self._max_sequences, self._writer = max_sequences, writer
        self._leads = ranks.engine_rank == 0  # the rank of an engine that keeps and grades what it samples

    def run(self, asked: Asked, source: Source, weights: str, numerics: Sequence[str]) -> Result | None:
        """Samples and grades what is missing, and has the result written, which rank 0 returns. Collective.

        weights: their digest
        numerics: what else decides what the engine says: dtype, quantisation

        Raises Interrupted on all ranks where one was told to stop; what was finished is safe.
        """
        before = self._result(asked, weights) if self._ranks.rank == 0 else None
        if self._ranks.agree("evaluated before", before is not None, lambda values: values[0]):
            with Progress(asked, len(asked.problems), self._ranks.rank == 0):
                return before
        finished = Finished(self._folder, asked, [weights, *numerics], self._ranks.rank, self._writer)
        done, _ = finished.read()
        missing = [number for number in range(len(asked.problems)) if number not in done]
        missing = self._ranks.agree("problems that are left", missing, lambda values: values[0])
        begun = self._ranks.agree("evaluation begins", time.time(), lambda values: values[0])
        finished.start(begun)
        store = self._ranks.store_of(f"evaluation/{begun}")  # no other evaluation of this start counts there
        progress = Progress(asked, len(done), self._ranks.rank == 0)
        with phase(Phase.EVALUATE), progress:
            reason = self._sample(asked, missing, finished, store, progress)
            self._writer.drain()  # what rank 0 reads, and what a start after this one takes over
            if reason := self._ranks.agree("evaluation ends", reason, first):
                raise Interrupted(reason)
            progress.show(len(missing))
        if self._ranks.rank:
            return None
        done, seconds = finished.read()
        if lost := len(asked.problems) - len(done):
            raise RunFailed(
                f"{finished.folder}: {lost} of {len(asked.problems)} problems are missing, which ranks wrote"
            )
        problems = [graded(problem, done[number]) for number, problem in enumerate(asked.problems)]
        result = Result(
            benchmark=asked.benchmark,
            version=asked.version,
            protocol=asked.protocol,
            seed=asked.seed,
            file=asked.file,
            model=Model(source.path, source.kind, source.step, weights),
            software=_software(),
            summary=summarise(problems, asked.version, asked.protocol, seconds),
            problems=tuple(problems),
            format=FORMAT,
        )
        path = Path(asked.result)
        self._writer.put(path, functools.partial(write, path, result))
        self._writer.put(finished.folder, finished.forget)
        return result

    def _result(self, asked: Asked, weights: str) -> Result | None:
        """What there is already of these weights, asked so; None: nothing."""
        try:
            result = read(Path(asked.result))
        except RequestError:
            return None
        wanted = (asked.version, asked.seed, asked.file, weights)
        return result if (result.version, result.seed, result.file, result.model.digest) == wanted else None

    def _sample(
        self, asked: Asked, missing: Sequence[int], finished: Finished, store: Any, progress: Progress
    ) -> str | None:
        """Samples and grades; returns why it ended early."""
        owners: list[tuple[_Open, int]] = []  # of each request: its problem, and which sample it is
        grading: deque[tuple[_Open, Future[list[Verdict]]]] = deque()

        def requests() -> Iterator[Request]:
            for turn in self._pulled(store, len(missing)):
                problem = asked.problems[missing[turn]]
                seeds = [asked.seed_of(problem, sample) for sample in range(asked.n)]
                opened = _Open(missing[turn], problem, seeds)
                tokens = self._tokenizer.tokens_of(asked.prompts[missing[turn]])
                for sample, seed in enumerate(seeds):
                    owners.append((opened, sample))
                    yield Request(tokens, seed)

        def settle(wait: bool) -> None:
            while grading and (wait or grading[0][1].done()):
                opened, verdicts = grading.popleft()
                finished.add(opened.number, _graded(opened, verdicts.result()))
                store.add("done", 1)
                progress.show(store.add("done", 0))

        total = len(missing) * asked.n
        room = min(self._max_sequences, max(asked.n, -(-total // self._ranks.engines)))
        reason: str | None = None  # why all is to end
        with contextlib.closing(self._engine.sample(requests(), asked.sampling, room)) as engine_steps:
            for completions in engine_steps:
                CLOCK.beat()
                for number, completion in completions:
                    opened, sample = owners[number]
                    text = self._tokenizer.decode(completion.tokens)
                    count = len(completion.tokens)
                    opened.samples[sample] = Sample(opened.seeds[sample], text, count, completion.finish, "invalid", "")
                    if len(opened.samples) == asked.n and self._leads:
                        grading.append((opened, self._graders.submit(_answers(asked, opened))))
                settle(wait=False)
                progress.show(store.add("done", 0) if self._ranks.rank == 0 else 0)
                reason = self._interrupt.due()
                if self._ranks.any_of_engine(reason is not None):
                    reason = reason or "another rank of the engine"
                    break
        CLOCK.beat()
        settle(wait=True)
        return reason

    def _pulled(self, store: Any, count: int) -> Iterator[int]:
        """Numbers below `count`, each to one engine, whose ranks all get the same."""
        while (number := self._ranks.told_by_engine(store.add("next", 1) - 1 if self._leads else 0)) < count:
            yield number


def _answers(asked: Asked, opened: _Open) -> list[Answered]:
    problem = opened.problem
    thoughts = opened_thoughts(asked.prompts[opened.number])
    asks = problem.text if grader_of(problem.grader).problem else ""
    return [
        Answered(thoughts + each.text, problem.gold, each.finish == "stop", problem.grader, problem.extract, asks)
        for _, each in sorted(opened.samples.items())
    ]


def _graded(opened: _Open, verdicts: Sequence[Verdict]) -> list[Sample]:
    samples = [sample for _, sample in sorted(opened.samples.items())]
    return [
        dataclasses.replace(sample, outcome=verdict.outcome, reason=verdict.reason)
        for sample, verdict in zip(samples, verdicts, strict=True)
    ]


def _software() -> dict[str, str]:
    found = {name: version for name, version in installed().items() if version is not None}
    return {"a3po-megatron": __version__, **found}
