"""`a3po report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from .arguments import path_argument, path_option


def report(
    run_dirs: Annotated[list[Path], path_argument(help="One or more run folders to compare.")],
    out: Annotated[Path | None, path_option(help="Default: report.html in the first run folder.")] = None,
) -> None:
    """Compare runs in one self-contained HTML page, with a rollout viewer."""
    from ..report.page import write_report

    print(f"report: {write_report(run_dirs, out)}")
