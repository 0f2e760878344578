"""`a3po eval`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from .arguments import Overrides, path_argument, path_option


def evaluate(
    model: Annotated[
        Path, path_argument(metavar="MODEL_OR_RUN", help="An HF folder, a Megatron checkpoint, or a run (its newest).")
    ],
    benchmark: Annotated[
        str, typer.Option(help="Names, or files of rows, with commas between; builtin:arithmetic is the demo's task.")
    ],
    data: Annotated[Path | None, path_option(help="The folder with the benchmarks' files.")] = None,
    samples: Annotated[int | None, typer.Option(help="Of each problem. Default: the benchmark's n.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of a response. Default: the benchmark's.")] = None,
    release: Annotated[str, typer.Option(help="Of a benchmark that has several, such as v5.")] = "",
    window: Annotated[str, typer.Option(metavar="FROM:TO", help="Dates of the problems, of one that has them.")] = "",
    seed: Annotated[int, typer.Option(min=0, help="Of all samples, and of the order of options.")] = 0,
    config: Annotated[
        Path | None, path_option(help="A configuration for a model that is no run: engines, form of prompts.")
    ] = None,
    json: Annotated[
        Path | None,
        path_option(help="The result's file; of several benchmarks NAME.BENCHMARK.json."),
    ] = None,
    set_: Overrides = None,
) -> None:
    """Measure a model on benchmarks, with intervals; every sample stands in the result."""
    started = time.time()
    from ..launch.signals import Signals

    signals = Signals()  # before the imports that take seconds
    from rich.console import Console

    from ..evaluate.ask import Wishes
    from ..evaluate.result import read
    from ..launch.check import check_machine
    from ..launch.evaluate import PROGRAM, config_of, make_evaluation, plan_evaluation, source_of, wishes_of
    from ..launch.local import rendezvous, run_local
    from ..launch.tables import result_table

    source, folder = source_of(model)
    settings = config_of(source, config, set_ or [])
    wishes = wishes_of(settings, benchmark, Wishes((), data, samples, max_tokens, release, window, seed))
    rendezvous(settings.cluster.port).close()

    def result(name: str) -> Path:
        if json is None:
            return (folder / f"{name}.json").resolve()
        return (json if len(wishes.benchmarks) == 1 else json.with_name(f"{json.stem}.{name}{json.suffix}")).resolve()

    resolved, request = plan_evaluation(
        source, settings, check_machine(settings), wishes, result, lambda text: print(f"data: {text}")
    )
    with make_evaluation(folder, resolved, request) as lock:
        problems = sum(len(asked.problems) for asked in request.asked)
        step = "" if source.step is None else f", step {source.step}"
        print(f"{source.path}{step}: {problems} problems (folder {folder})")
        run_local(folder, resolved, started, lock, signals, PROGRAM)
        signals.restore()
    files = [Path(asked.result) for asked in request.asked]
    Console(highlight=False).print(*(result_table(read(file)) for file in files))
    for file in files:
        print(f"result: {file}")
