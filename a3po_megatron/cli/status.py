"""`a3po status`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from .arguments import path_argument


def status(run_dir: Annotated[Path, path_argument(help="A run folder, or one of a sweep.")]) -> None:
    """How far a run is, whether it lives, and what it waits for; changes nothing."""
    from ..launch.status import status

    for name, text in status(run_dir):
        print(f"{name:<12}{text}")
