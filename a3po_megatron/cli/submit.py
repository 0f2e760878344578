"""`a3po submit`: the same run, through Slurm."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import RequestError
from .arguments import Force, Overrides, RunDir, path_argument, path_option


def submit(
    config: Annotated[Path, path_argument(help="A configuration file with a `slurm` section.")],
    run_dir: RunDir = None,
    set_: Overrides = None,
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="SECTION.KEY=A,B,C", help="A run for each value; repeatable: all pairs.")
    ] = None,
    export: Annotated[
        Path | None, path_option(help="Export the weights there as an HF folder when it is done.")
    ] = None,
    evaluate: Annotated[
        str, typer.Option("--eval", metavar="NAME[,NAME…]", help="Evaluate the weights on these when it is done.")
    ] = "",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print what would be submitted, do nothing; weights and data are not read."),
    ] = False,
    write: Annotated[bool, typer.Option("--write", help="Make the run folder and its script; do not submit.")] = False,
    force: Force = False,
) -> None:
    """Train through Slurm: the same run, queued, and back by itself after an interruption."""
    from ..config import load_config
    from ..launch import slurm
    from ..launch.folder import default_folder

    overrides = slurm.swept(sweep or [])
    configs = [load_config(config, [*(set_ or []), *each]) for each in overrides]
    folder = (run_dir or default_folder(configs[0].name)).resolve()
    for option, wanted in (("--export", export is not None), ("--eval", bool(evaluate))):
        if wanted and (sweep or configs[0].slurm.resume == "chain"):
            raise RequestError(f"{option} waits for one job: not with --sweep or slurm.resume chain")
    runs = [slurm.settled(each) for each in configs]
    if not force and runs[0].cluster.device == "cuda":
        from ..launch.plan import check_memory

        for each, run in zip(configs, runs, strict=True):
            check_memory(each, run)
    plan = slurm.plan(runs, folder, bool(sweep))
    if dry_run:
        sys.stdout.buffer.write(plan.script.encode())  # a file for sbatch, whatever the terminal knows
        return
    from ..launch.check_files import check_files
    from ..ranks.backend import backend_of

    remarks = [remark for run in plan.runs for remark in check_files(run, backend_of(run.cluster.device), here=False)]
    if evaluate:
        from ..launch.evaluate import check_benchmarks

        remarks += check_benchmarks(configs[0], evaluate)
    for remark in dict.fromkeys(remarks):
        print(f"data: {remark}", file=sys.stderr)
    if not write:
        for remark in slurm.check_cluster(plan, export, evaluate):
            print(f"warning: {remark}", file=sys.stderr)
    slurm.write(plan, overrides)
    if write:
        print(f"made, not submitted: {folder / slurm.SCRIPT}")
        return
    numbers = slurm.submit(plan, export, evaluate)
    print(f"submitted job {numbers[0]}: {folder}")
    if export is not None:
        print(f"submitted job {numbers[1]}, after it: export to {export}")
    if evaluate:
        print(f"submitted job {numbers[-1]}, after it: evaluation on {evaluate}")
