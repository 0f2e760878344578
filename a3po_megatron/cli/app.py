"""The `a3po` program: its commands, its messages and its exit codes. Imports nothing heavy."""

from __future__ import annotations

import codecs
import io
import sys
from typing import Annotated

import typer

from ..errors import A3POError
from .compare import compare
from .convert import convert_app
from .data import data_app
from .doctor import doctor
from .eval import evaluate
from .options import options
from .plan import plan
from .report import report
from .status import status
from .submit import submit
from .train import train

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"a3po-megatron {__version__}")
        raise typer.Exit()


Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and nothing else.")
]


@app.callback()
def a3po(version: Version = False) -> None:
    """A3PO reinforcement learning from verifiable rewards, on Megatron-Core and vLLM."""


app.command("eval")(evaluate)
for _command in (train, submit, plan, report, compare, status, options, doctor):
    app.command()(_command)
app.add_typer(data_app, name="data")
app.add_typer(convert_app, name="convert")

# What a terminal that knows ASCII alone shows instead.
PLAIN = {"→": "->", "…": "...", "×": "x", "–": "-", "’": "'", "≥": ">=", "≤": "<=", "·": "-", "•": "*"}


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(PLAIN.get(sign, "?") for sign in error.object[error.start : error.end]), error.end


def main() -> None:
    """The `a3po` program. Our errors are one message and an exit code; anything else is a bug, with its traceback."""
    codecs.register_error("a3po", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="a3po")
    try:
        app()
    except A3POError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
