"""`a3po compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .arguments import path_argument


def compare(
    first: Annotated[Path, path_argument(metavar="A.json", help="The result of an evaluation.")],
    second: Annotated[Path, path_argument(metavar="B.json", help="Another one, of the same benchmark and protocol.")],
    changed: Annotated[int, typer.Option(min=0, help="How many of the problems that changed are listed.")] = 20,
) -> None:
    """Say whether B is better than A: the paired difference, its interval, a p-value, the problems that changed."""
    from rich.console import Console

    from ..evaluate.compare import compare
    from ..evaluate.result import read
    from ..launch.tables import comparison_tables

    results = read(first), read(second)
    names = str(first), str(second)
    console = Console(highlight=False)
    for table in comparison_tables(compare(*results, names), names, changed):
        console.print(table)
