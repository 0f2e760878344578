"""`a3po options`."""

from __future__ import annotations

from typing import Annotated

import typer


def options(section: Annotated[str | None, typer.Argument(help="Of one section only.")] = None) -> None:
    """Every option of a configuration: its type, its default and what it means."""
    from ..config.describe import options

    lines = options(section)
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    for line in lines:
        print("  ".join([*(f"{text:<{width}}" for text, width in zip(line, widths, strict=False)), line.meaning]))
