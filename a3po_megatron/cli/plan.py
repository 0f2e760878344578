"""`a3po plan`: whether a run fits, before anything is submitted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RequestError
from .arguments import Overrides, path_argument


def plan(
    config: Annotated[Path, path_argument(help="A configuration file; the model's config.json is enough.")],
    set_: Overrides = None,
    gpus: Annotated[int | None, typer.Option(metavar="N", help="GPUs, instead of what the slurm section has.")] = None,
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="Their kind: h200, h100, b200, …")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, in bytes.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Say by which formula each number comes.")] = False,
    build: Annotated[
        str, typer.Option(metavar="first|middle|last|RANK", help="Build that rank's real model, without its memory.")
    ] = "",
    world: Annotated[int | None, typer.Option(metavar="N", help="With --build: as --gpus.")] = None,
) -> None:
    """Say what a run needs in each phase, and whether it fits."""
    from ..config import load_config
    from ..launch.plan import on_gpus, plan, with_known_model
    from ..preflight.gpus import gpu_of
    from ..preflight.show import as_text, as_tree
    from ..preflight.verdict import Verdict

    if gpu is not None:
        gpu_of(gpu)
    if world is not None and world < 1:
        raise RequestError(f"--world {world}: a run has at least one rank")
    if world is not None and (not build or gpus is not None):
        raise RequestError("--world says of how many ranks --build builds one: with it, and not beside --gpus")
    gpus = world if world is not None else gpus
    wanted, remark = with_known_model(on_gpus(load_config(config, set_ or [], must_exist=False), gpus, gpu))
    found = plan(wanted, nodes_fixed=gpus is not None)
    built: dict[str, Any] | None = None
    if build:
        from ..model.read import read_facts
        from ..preflight.dry_run import built_rank, number_of

        number = number_of(build, found.settings.ranks)
        built = built_rank(read_facts(wanted.model.path), found, number)
    if as_json:
        print(json.dumps(as_tree(found) | ({"build": built} if built else {}), indent=1))
    else:
        if remark:
            print(remark, file=sys.stderr)
        if found.settings.cluster.device == "cpu":
            print("planned on CPUs, as the configuration asks for no GPU; --gpus N plans some", file=sys.stderr)
        print(as_text(found, explain))
        if built:
            from ..preflight.show import build_text

            print(build_text(built))
    if found.verdict == Verdict.NO:
        raise RequestError(found.refusal(str(config)))
