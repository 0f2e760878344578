"""The command line: parse, call, print. Imports nothing heavy until a command needs it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from .cli_convert import app as convert_app
from .errors import A3POError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A3PO reinforcement learning from verifiable rewards, on Megatron-Core and vLLM.",
)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A configuration file, such as configs/demo.yaml.")],
    run_dir: Annotated[Path | None, typer.Option(help="Default: runs/<name>-<date>-<short id>.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override an option; repeatable.")
    ] = None,
) -> None:
    """Train on this machine, with as many ranks as the layout needs."""
    started = time.time()
    from .config import load_config
    from .launch.check import check_request
    from .launch.folder import default_folder, make_folder
    from .launch.local import rendezvous_port, run_local
    from .report.page import write_report

    settings = load_config(config, set_ or [])
    rendezvous_port(settings.cluster.port)
    check_request(settings)
    folder = run_dir or default_folder(settings.name)
    with make_folder(folder, settings, sys.argv):
        ranks = settings.parallel.ranks()
        if (folder / "before-1").exists():
            typer.echo(f"{folder}: an unfinished run starts again from step 0; what it had written is in before-*/")
        typer.echo(f"{settings.name}: starting {ranks} rank{'s' * (ranks > 1)} (run folder {folder})")
        run_local(folder, settings, started)
        page = write_report([folder], None)
    typer.echo(f"run folder: {folder}\nreport:     {page}")


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(help="One or more run folders to compare.")],
    out: Annotated[Path | None, typer.Option(help="Default: report.html in the first run folder.")] = None,
) -> None:
    """Compare runs in one self-contained HTML page, with a rollout viewer."""
    from .report.page import write_report

    typer.echo(f"report: {write_report(run_dirs, out)}")


app.add_typer(convert_app, name="convert")


@app.command()
def doctor() -> None:
    """Print what is installed, what is missing and what this machine can do."""
    from .launch.doctor import examine

    if not examine():
        raise typer.Exit(1)


def main() -> None:
    """The `a3po` program. Our errors are one message and an exit code; anything else is a bug, with its traceback."""
    try:
        app()
    except A3POError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
