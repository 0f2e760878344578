"""Evaluation while training: of the weights with which a step begins, before its rollouts, when that is due.

It has seeds of its own, and nothing of it reaches the training state: a run is the same with it and without. What it
finds stands in RUN/evaluations/step-000012/BENCHMARK.json, of the weights that the checkpoint of that step holds, and
in that step's row of metrics. Where it is interrupted, what was finished is taken over.

    evaluations/best.json      with evaluation.keep_best: benchmark, file, step, value. The checkpoint of that step is
                               chosen by this file of problems: its number there is no longer one of unseen problems.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ..config import Config, EvaluationOptions, Settings
from ..errors import RequestError
from ..files.replace import write_whole
from ..files.run_folder import RunFolder, step_folder
from ..files.writer import Writer
from ..model.facts import ModelFacts
from ..telemetry.catalogue import EVALUATION
from .ask import Wishes, ask
from .request import Asked, Source
from .result import Result, read
from .sampling import Evaluation


def asked_of_run(config: Config, facts: ModelFacts, remark: Callable[[str], None]) -> list[Asked]:
    """Returns what a run asks itself; nothing where it does not. The results' places follow with each step.

    Raises RequestError for a benchmark that cannot be asked, and for a `keep_best` that no checkpoint would follow.
    """
    options = config.evaluation
    if not options.every_steps:
        return []
    if not options.benchmarks:
        raise RequestError(
            f"evaluation.every_steps = {options.every_steps}, and evaluation.benchmarks names nothing to evaluate on"
        )
    wishes = Wishes(
        options.benchmarks,
        Path(options.data) if options.data else None,
        options.samples or None,
        options.max_tokens or None,
        options.release,
        options.window,
        config.trainer.seed,
    )
    asked = ask(wishes, config, Path(config.model.path), facts, Path, remark)
    if options.keep_best and options.keep_best not in (each.benchmark for each in asked):
        names = ", ".join(each.benchmark for each in asked)
        raise RequestError(f"evaluation.keep_best = {options.keep_best} is none of the benchmarks: {names}")
    every = config.checkpoint.every_steps
    if options.keep_best and options.every_steps % every:
        raise RequestError(
            f"evaluation.keep_best needs a checkpoint of every evaluation: evaluation.every_steps = "
            f"{options.every_steps} is no multiple of checkpoint.every_steps = {every}"
        )
    return asked


def engine_length(settings: Settings, asked: Sequence[Asked], counts: Callable[[Sequence[str]], list[int]]) -> int:
    """Returns how long a sequence the engine must take, in tokens: training's, or the longest of a benchmark.

    counts: the lengths of prompts in tokens
    """
    lengths = [max(counts(each.prompts)) + each.sampling.max_tokens for each in asked]
    return max([settings.rollout.longest, *lengths])


class WhileTraining:
    """Evaluates a run's weights at some of its steps."""

    def __init__(
        self,
        folder: Path,
        options: EvaluationOptions,
        asked: Sequence[Asked],
        evaluation: Callable[[Path], Evaluation],  # in a folder for what is unfinished
        numerics: Sequence[str],
        say: Callable[[str], None],
        writer: Writer,
    ) -> None:
        self._run, self._options, self._asked = RunFolder(folder), options, asked
        self._evaluation, self._numerics, self._say, self._writer = evaluation, numerics, say, writer
        self._best = self._read_best() if options.keep_best else None  # what best.json says, or is about to

    def __call__(self, step: int, weights: str) -> dict[str, float | None]:
        """Returns the metrics of the step that begins; none where no evaluation is due. Collective.

        weights: the digest of what the engines hold

        Raises Interrupted where it is time to stop.
        """
        if not self._asked or step % self._options.every_steps:
            return {}
        folder = step_folder(self._run.evaluations, step)
        metrics: dict[str, float | None] = {}
        for each in self._asked:
            placed = _placed(each, folder)
            source = Source(str(self._run.path), "run", step, str(step_folder(self._run.checkpoints, step)))
            result = self._evaluation(folder).run(placed, source, weights, self._numerics)
            if result is not None:
                metrics |= _metrics(result)
                self._tell(step, result)
        return metrics

    def best(self) -> int | None:
        """Returns the step that is best so far on the benchmark of `keep_best`; None: there is none."""
        best = self._best
        return int(best["step"]) if best and best["benchmark"] == self._options.keep_best else None

    def _read_best(self) -> dict[str, str | float] | None:
        try:
            return dict(json.loads(self._best_file.read_bytes()))
        except (OSError, ValueError):
            return None

    @property
    def _best_file(self) -> Path:
        return self._run.evaluations / "best.json"

    def _tell(self, step: int, result: Result) -> None:
        average = result.summary.avg
        if average is None:
            return
        low, high = 100 * average.low, 100 * average.high
        words = f"step {step}: {result.version} {100 * average.value:.1f} ({low:.1f} to {high:.1f})"
        if result.benchmark == self._options.keep_best:
            before = self._value(self.best())
            if before is None or average.value > before:
                best: dict[str, str | float] = {
                    "benchmark": result.benchmark,
                    "version": result.version,
                    "file": result.file.name,
                }
                best |= {"step": step, "value": average.value, "note": "chosen by this file: selection on it"}
                self._best = best
                text = json.dumps(best, indent=1) + "\n"
                self._writer.put(self._best_file, functools.partial(write_whole, self._best_file, text))
                words += f": the best so far, kept (selection on {result.file.name})"
        self._say(words)

    def _value(self, step: int | None) -> float | None:
        """Of an earlier step, whose result was written before the samples of this one were read."""
        if step is None:
            return None
        try:
            summary = read(step_folder(self._run.evaluations, step) / f"{self._options.keep_best}.json").summary
        except RequestError:  # removed by hand
            return None
        return None if summary.avg is None else summary.avg.value


def _placed(asked: Asked, folder: Path) -> Asked:
    return Asked(**{**vars(asked), "result": str(folder / f"{asked.benchmark}.json")})


def _metrics(result: Result) -> dict[str, float | None]:
    summary, name = result.summary, f"{EVALUATION}{result.benchmark}_"
    largest = summary.pass_at.get(max(summary.pass_at, default=0))
    return {
        f"{name}avg": None if summary.avg is None else summary.avg.value,
        f"{name}pass": None if largest is None else largest.value,
        f"{name}length": summary.length_mean,
    }
