"""`a3po doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import RequestError
from .arguments import Overrides, path_argument


def doctor(
    config: Annotated[Path | None, path_argument(help="The run that is to start here: what it needs counts.")] = None,
    set_: Overrides = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Look at the CUDA path, also where this one is for CPUs.")] = False,
) -> None:
    """Print what is installed, what is missing and what this machine can do."""
    from ..config import load_config
    from ..launch.doctor.examine import examine

    quantized = config is not None and load_config(config, set_ or []).rollout.quantization != "none"
    if not examine(gpu, quantized):
        raise typer.Exit(RequestError.exit_code)
