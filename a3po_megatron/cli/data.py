"""`a3po data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .arguments import Overrides, path_argument, path_option

data_app = typer.Typer(no_args_is_help=True, help="Looks at data.")


@data_app.command()
def check(
    files: Annotated[list[Path], path_argument(help="Files or folders of prompts: one data set.")],
    model: Annotated[
        Path | None, path_option(help="Folder of a model: its tokenizer counts tokens, its chat template renders.")
    ] = None,
    benchmark: Annotated[
        list[Path] | None, path_option(help="A file whose problems should not be among the prompts; repeatable.")
    ] = None,
    set_: Overrides = None,
) -> None:
    """What a run would see of data: counts, lengths, duplicates, conflicts, gold answers, prompts, overlap.

    Exit code 2 where a run would refuse it.
    """
    from ..config import data_options
    from ..launch.data_check import data_check

    for line in data_check(data_options([str(path) for path in files], set_ or []), model, benchmark or []):
        print(line)
