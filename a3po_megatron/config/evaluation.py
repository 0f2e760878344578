"""Settings of `evaluate/`, as far as a run evaluates its own weights."""

from __future__ import annotations

from .section import NoEffect, NonNegative, Section, option


class EvaluationOptions(Section):
    every_steps: NonNegative = option(
        0, "steps between two evaluations of the weights that a step begins with; 0: none"
    )
    benchmarks: tuple[str, ...] = option((), "names as `a3po eval` has them, and files of rows")
    data: str = option("", "the folder with the benchmarks' files")
    samples: NonNegative = option(0, "of each problem; 0: the benchmark's n")
    max_tokens: NonNegative = option(0, "of a response, whatever training's are; 0: the benchmark's")
    release: str = option("", "of a benchmark that has several")
    window: str = option("", "FROM:TO, dates of the problems of one that has them")
    keep_best: str = option(
        "", "a benchmark: the checkpoint that is best on it is kept, which is selection on its file"
    )
    without_effect = (
        NoEffect(
            ("benchmarks", "data", "samples", "max_tokens", "release", "window", "keep_best"),
            lambda e: e.every_steps == 0,
            "evaluation.every_steps is 0 (off)",
        ),
    )
