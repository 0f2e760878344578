"""Arguments that several commands take."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer


def path(text: str) -> Path:
    """An argument: ~ and $NAME as in a configuration."""
    from ..config.paths import expanded

    return Path(expanded(text, "the command line"))


path_argument = functools.partial(typer.Argument, parser=path)
path_option = functools.partial(typer.Option, parser=path)
RunDir = Annotated[Path | None, path_option(help="Default: runs/<name>-<date>-<short id>.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override an option; repeatable.")
]
Force = Annotated[bool, typer.Option("--force", help="Also where the plan of memory says that it does not fit.")]
